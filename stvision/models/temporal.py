"""The temporal transformer that inflation puts behind every spatial transformer."""

from typing import Any, cast

from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from stvision.attention import ATTENTIONS, VolumeAttention
from stvision.attention.windows import WindowLayout
from stvision.layers.frames import PointwiseConv, group_norm_volume, is_channels_last


class TemporalBlock(nn.Module):
    """Self-attention over the volume and a gated feed-forward, both pre-norm with residuals.

    Args:
        dim: channels.
        heads: attention heads.
        attention: a name in :data:`stvision.attention.ATTENTIONS`.
        attention_kwargs: options of that mechanism.
    """

    def __init__(
        self, dim: int, heads: int, attention: str, attention_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(
                f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}"
            )
        self.attn1 = ATTENTIONS[attention](dim, heads, **(attention_kwargs or {}))
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)  # norm2 is the cross-attention's, which there is none of
        self.ff = FeedForward(dim, activation_fn="geglu")

    def forward(
        self, tokens: Tensor, layout: WindowLayout, packed: bool, skip_frames: int = 0
    ) -> Tensor:
        """Transform packed tokens (B · windows, length, C).

        Args:
            tokens: in the order of ``layout``.
            layout: windows of the volume; one window of the whole map when ``packed`` is false.
            packed: whether ``layout`` is the attention's own, else attention packs for itself.
            skip_frames: leading frames that the feed-forward leaves as they are.
        """
        normed = self.norm1(tokens)
        if packed:
            tokens = tokens + cast(VolumeAttention, self.attn1).attend(normed, layout)
        else:
            tokens = tokens + self.attn1(normed.unflatten(1, layout.grid)).flatten(1, 3)
        if skip_frames == 0:
            return tokens + self.ff(self.norm3(tokens))
        first = skip_frames * layout.tokens_per_frame
        out = tokens.clone()
        later = tokens[:, first:]
        out[:, first:] = later + self.ff(self.norm3(later))
        return out


class TemporalTransformer(nn.Module):
    """Group norm, 1 x 1 conv, transformer blocks, zero-initialised 1 x 1 conv, residual.

    Fresh, it is the identity. Tokens stay in the order of the attention's windows from the first
    projection to the last, so a clip is reordered once on the way in and, inside the residual
    addition, once on the way out.

    Args:
        dim: channels C.
        heads: attention heads.
        attention: a name in :data:`stvision.attention.ATTENTIONS`.
        attention_kwargs: options of that mechanism.
        num_layers: transformer blocks.
        norm_num_groups: groups of the group norm.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention: str = "seer-window",
        attention_kwargs: dict[str, Any] | None = None,
        num_layers: int = 1,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, dim, eps=1e-6)
        self.proj_in = PointwiseConv(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TemporalBlock(dim, heads, attention, attention_kwargs) for _ in range(num_layers)
        )
        self.proj_out = PointwiseConv(dim, dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    @property
    def attention(self) -> VolumeAttention:
        """The attention of the first block; all blocks have the same windows."""
        return self.transformer_blocks[0].attn1  # type: ignore[union-attr,return-value]

    def forward(
        self, x: Tensor, frames: int, norm_frames: int | None = None, skip_frames: int = 0
    ) -> Tensor:
        """Transform a clip.

        Args:
            x: (B·T, C, h, w), frames of a clip consecutive.
            frames: T.
            norm_frames: frames that share group-norm statistics, T (default) or 1.
            skip_frames: leading frames that the feed-forward leaves as they are.

        Returns:
            (B·T, C, h, w) in the memory format of ``x``.
        """
        n, channels, height, width = x.shape
        grid = (frames, height, width)
        own = self.attention.layout(grid)
        layout = WindowLayout(grid, (height, width)) if own is None else own

        shared = frames if norm_frames is None else norm_frames
        normed = group_norm_volume(self.norm, x, frames, shared)
        tokens = self.proj_in(layout.pack(normed))
        for block in self.transformer_blocks:
            tokens = block(tokens, layout, own is not None, skip_frames)
        update = layout.unpack_view(self.proj_out(tokens))  # (B, T, windows, rows, ..., C)

        # the residual is viewed in the shape of the update, so that one addition reorders too
        (nh, nw), (sh, sw) = layout.counts, layout.window
        split = (n // frames, frames, nh, sh, nw, sw)
        if is_channels_last(x):
            out = x.permute(0, 2, 3, 1).reshape(*split, channels) + update
            return out.reshape(n, height, width, channels).permute(0, 3, 1, 2)
        out = x.reshape(*split[:2], channels, *split[2:]) + update.permute(0, 1, 6, 2, 3, 4, 5)
        return out.reshape(n, channels, height, width)
