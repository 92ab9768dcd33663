"""Inflation with a temporal branch beside the image layers and Swap-CA between the two."""

from torch import Tensor, nn

from stvision.attention.swap import Branch, SwapAttention, Window3D
from stvision.layers.frames import FrameConv, PointwiseConv, group_norm_volume, is_channels_last
from stvision.models.temporal import TemporalBlock


class TemporalBranch(nn.Module):
    """What each pixel makes of its own frames: 1-D convolution, attention, feed-forward.

    Group norm, SiLU, convolution over frames, a transformer block over frames, and a
    **zero-initialised** projection. Fresh, the branch is zero rather than the identity, so that
    adding it to the spatial branch does not double the signal.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        kernel_size: frames of the convolution, odd.
        causal: attention sees only earlier frames and the own one.
        rotary_dim: rotated channels per head, at most head_dim; positions are frame numbers.
        norm_num_groups: groups of the group norm.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel_size: int = 3,
        causal: bool = False,
        rotary_dim: int = 32,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, dim, eps=1e-6)
        self.activation = nn.SiLU()
        self.conv = FrameConv(dim, dim, kernel_size)
        options = {"causal": causal, "rotary_dim": rotary_dim}
        self.block = TemporalBlock(dim, heads, "temporal", options)
        self.proj_out = PointwiseConv(dim, dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, frames: int, norm_frames: int | None = None, skip_frames: int = 0
    ) -> Tensor:
        """Output (B, T, H, W, C) for (B·T, C, H, W), frames of a clip consecutive.

        Args:
            x: the spatial branch.
            frames: T.
            norm_frames: frames that share group-norm statistics, T (default) or 1.
            skip_frames: leading frames that the feed-forward leaves as they are.
        """
        layout = self.block.attn1.layout((frames, *x.shape[2:]))  # type: ignore[operator]
        shared = frames if norm_frames is None else norm_frames
        tokens = layout.pack(self.activation(group_norm_volume(self.norm, x, frames, shared)))
        tokens = self.block(self.conv(tokens), layout, True, skip_frames)
        return layout.unpack(self.proj_out(tokens))


class SwapTransformer(nn.Module):
    """A temporal branch and a Swap-CA, in place of Seer's temporal transformer.

    The image layers before it are the spatial branch z_s; z_t is :class:`TemporalBranch` of z_s; the
    result is ``z_s + z_t + Swap-CA(z_s, z_t)``. The temporal branch and the Swap-CA both start at
    zero, so the fresh module is the identity and a fresh inflation is the image U-Net at every
    frame (with group norms of each frame by itself). Further layers take the result as their z_s
    and swap the roles.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        num_layers: pairs of a temporal branch and a Swap-CA.
        first_query: branch that asks in the first Swap-CA.
        window: frames, rows and columns of Swap-CA's windows; None for all frames.
        shift: frames, rows and columns by which the windows of every second Swap-CA are moved,
            those that ask from the spatial branch.
        ff_mult: width of Swap-CA's feed-forward over C.
        kernel_size: frames of the temporal convolution.
        causal: the temporal branch's attention sees no later frame. Its convolution and Swap-CA
            see later frames all the same.
        rotary_dim: rotated channels per head of the temporal branch.
        norm_num_groups: groups of all group norms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        num_layers: int = 1,
        first_query: Branch = "temporal",
        window: Window3D = (None, 8, 8),
        shift: tuple[int, int, int] = (0, 0, 0),
        ff_mult: int = 4,
        kernel_size: int = 3,
        causal: bool = False,
        rotary_dim: int = 32,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            TemporalBranch(
                dim,
                heads,
                kernel_size=kernel_size,
                causal=causal,
                rotary_dim=rotary_dim,
                norm_num_groups=norm_num_groups,
            )
            for _ in range(num_layers)
        )
        queries = [asking(index + (first_query == "spatial")) for index in range(num_layers)]
        self.swaps = nn.ModuleList(
            SwapAttention(
                dim,
                heads,
                window=window,
                shift=shift if query == "spatial" else (0, 0, 0),
                query=query,
                ff_mult=ff_mult,
                norm_num_groups=norm_num_groups,
            )
            for query in queries
        )

    def forward(
        self, x: Tensor, frames: int, norm_frames: int | None = None, skip_frames: int = 0
    ) -> Tensor:
        """Transform a clip.

        Args:
            x: (B·T, C, h, w), frames of a clip consecutive.
            frames: T.
            norm_frames: frames that share group-norm statistics, T (default) or 1.
            skip_frames: leading frames that the feed-forwards leave as they are.

        Returns:
            (B·T, C, h, w) in the memory format of ``x``.
        """
        for branch, swap in zip(self.branches, self.swaps, strict=True):
            spatial = x.permute(0, 2, 3, 1).unflatten(0, (-1, frames))
            temporal = branch(x, frames, norm_frames, skip_frames)
            update = temporal + swap.update(  # type: ignore[operator]
                spatial, temporal, norm_frames, skip_frames
            )
            if is_channels_last(x):
                x = (spatial + update).flatten(0, 1).permute(0, 3, 1, 2)
            else:
                x = x + update.flatten(0, 1).permute(0, 3, 1, 2)
        return x


def asking(index: int) -> Branch:
    """Branch that asks in the Swap-CA of this number: temporal first, then in turn."""
    return "spatial" if index % 2 else "temporal"
