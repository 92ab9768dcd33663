"""Parts of networks that are no attention: rotary embeddings, norms over frames, convolutions."""

from torch import nn

from stvision.layers.conv_s5 import ConvS5
from stvision.layers.ela import EfficientLocalAttention
from stvision.layers.light_attention import LightAttention
from stvision.layers.non_local import NonLocalBlock
from stvision.layers.state_space import S4
from stvision.layers.temporal_heads import TSLSTM, TemporalInception

#: name in configurations -> layer ``(dim, ...)`` from and to (B, T, H, W, C)
LAYERS: dict[str, type[nn.Module]] = {
    "conv-s5": ConvS5,
    "ela": EfficientLocalAttention,
    "light-attention": LightAttention,
    "non-local": NonLocalBlock,
    "s4": S4,
}

#: name in configurations -> head ``(dim, num_classes, **options)`` from (B, T, D) to (B, classes)
TEMPORAL_HEADS: dict[str, type[nn.Module]] = {
    "temporal-inception": TemporalInception,
    "ts-lstm": TSLSTM,
}
