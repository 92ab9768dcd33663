"""Attention mechanisms over clips (B, T, H, W, C), one file each, chosen by name."""

from torch import nn

from stvision.attention.dispatch import BACKENDS, dispatch_attention
from stvision.attention.dual import ChannelGroupAttention, SpatialWindowAttention
from stvision.attention.full import FullAttention
from stvision.attention.halo import HaloAttention, halo_attention
from stvision.attention.neighborhood import NeighborhoodAttention
from stvision.attention.neighborhood_modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from stvision.attention.routing import BiLevelRoutingAttention, bilevel_routing_attention
from stvision.attention.seer_window import SeerWindowAttention, windowed_causal_attention
from stvision.attention.swap import SwapAttention, windowed_cross_attention
from stvision.attention.temporal import TemporalAttention, temporal_attention
from stvision.attention.volume import VolumeAttention

#: name in configurations -> module ``(dim, heads, **options)`` from and to (B, T, H, W, C)
ATTENTIONS: dict[str, type[nn.Module]] = {
    "seer-window": SeerWindowAttention,
    "full": FullAttention,
    "temporal": TemporalAttention,
    "neighborhood": NeighborhoodAttention,
    "routing": BiLevelRoutingAttention,
    "halo": HaloAttention,
    "spatial-window": SpatialWindowAttention,
    "channel-group": ChannelGroupAttention,
}

__all__ = [
    "ATTENTIONS",
    "BACKENDS",
    "BiLevelRoutingAttention",
    "ChannelGroupAttention",
    "FullAttention",
    "HaloAttention",
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "SeerWindowAttention",
    "SpatialWindowAttention",
    "SwapAttention",
    "TemporalAttention",
    "VolumeAttention",
    "bilevel_routing_attention",
    "dispatch_attention",
    "halo_attention",
    "temporal_attention",
    "windowed_causal_attention",
    "windowed_cross_attention",
]
