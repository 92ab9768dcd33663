"""What attention mechanisms over a (B, T, H, W, C) volume share: projections, positions, windows."""

from torch import Tensor, nn

from stvision.attention.dispatch import check_backend, dispatch_attention
from stvision.attention.windows import WindowLayout, window_attention
from stvision.layers.checks import check_volume, check_whole
from stvision.layers.rotary import RotaryEmbedding, apply_rotary


class AttentionProjections(nn.Module):
    """Query, key and value without bias, output with bias: keys ``to_q|to_k|to_v|to_out.0``.

    Args:
        dim: channels of queries and of the output.
        heads: attention heads; must divide ``dim``.
        context_dim: channels of keys and values, default ``dim``.
        backend: name for :func:`stvision.attention.dispatch.dispatch_attention`, default "sdpa".
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.backend = check_backend("sdpa" if backend is None else backend)
        source = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(source, dim, bias=False)
        self.to_v = nn.Linear(source, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., heads, head_dim)."""
        return x.unflatten(-1, (self.heads, self.head_dim))


class VolumeAttention(AttentionProjections):
    """Self-attention over a clip's volume: (B, T, H, W, C) to (B, T, H, W, C).

    A subclass says which window a size of map gets. Everything in a
    transformer but attention works token by token, so a caller may keep its tokens packed
    throughout: ``layout = m.layout(grid)``, ``m.attend(layout.pack(x), layout)``.

    Args:
        dim: channels C.
        heads: attention heads; must divide ``dim``.
        causal: a token sees itself and what comes before it in its window, in (frame, row,
            column) order.
        rotary_dim: rotated channels per head, at most head_dim is used; 0 for no rotary embedding.
        backend: attention backend by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        rotary_dim: int = 32,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, heads, backend=backend)
        check_whole(0, rotary_dim=rotary_dim)
        self.causal = causal
        rotated = min(rotary_dim, self.head_dim) // 2 * 2
        self.rotary_emb = RotaryEmbedding(rotated) if rotated else None

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the window for a map of this size."""
        raise NotImplementedError

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: WindowLayout) -> Tensor:
        """Attend in packed windows: three (B · windows, length, heads, head_dim) to one."""
        return dispatch_attention(query, key, value, is_causal=self.causal, backend=self.backend)

    def positions(self, layout: WindowLayout, like: Tensor) -> Tensor | None:
        """Rotary table (T, H, W, dim / 2, 2): each token's index in the flattened volume."""
        if self.rotary_emb is None:
            return None
        frames, height, width = layout.grid
        table = self.rotary_emb.table(frames * height * width, like)
        return table.unflatten(0, (frames, height, width))

    def layout(self, grid: tuple[int, int, int]) -> WindowLayout | None:
        """Window layout of a (T, H, W) volume; ``None`` when the window does not divide it."""
        window = self.window(grid[1], grid[2])
        if grid[1] % window[0] or grid[2] % window[1]:
            return None
        return WindowLayout(grid, window)

    def _rotate(self, x: Tensor, table: Tensor | None, layout: WindowLayout) -> Tensor:
        if table is None:
            return x
        (nh, nw), (sh, sw) = layout.counts, layout.window
        windows = layout.split(table, start=0).permute(1, 3, 0, 2, 4, 5, 6)[..., None, :, :]
        folded = x.reshape(-1, nh, nw, layout.grid[0], sh, sw, self.heads, self.head_dim)
        return apply_rotary(folded, windows, overwrite=True).reshape(x.shape)

    def attend(self, packed: Tensor, layout: WindowLayout) -> Tensor:
        """Attention of packed tokens (B · windows, length, C), projections included."""
        table = self.positions(layout, packed)
        query = self._rotate(self.split_heads(self.to_q(packed)), table, layout)
        key = self._rotate(self.split_heads(self.to_k(packed)), table, layout)
        value = self.split_heads(self.to_v(packed))
        return self.to_out[0](self.mix(query, key, value, layout).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the volume.

        Args:
            x: (B, T, H, W, C), any floating dtype.

        Returns:
            (B, T, H, W, C).

        Raises:
            ValueError: another rank or width, or no tokens.
        """
        check_volume(x, self.to_q.in_features)
        frames, height, width = x.shape[1:4]
        layout = self.layout((frames, height, width))
        if layout is not None:
            return layout.unpack(self.attend(layout.pack(x), layout))
        return self.attend_ragged(x)

    def attend_ragged(self, x: Tensor) -> Tensor:
        """Attention of a volume (B, T, H, W, C) that the window does not divide."""
        height, width = x.shape[2:4]
        whole = WindowLayout((x.shape[1], height, width), (height, width))
        table = self.positions(whole, x)
        query, key, value = (self.split_heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        if table is not None:
            query, key = (
                apply_rotary(y, table[..., None, :, :], overwrite=True) for y in (query, key)
            )
        window = self.window(height, width)
        out = window_attention(
            query, key, value, window, is_causal=self.causal, backend=self.backend
        )
        return self.to_out[0](out.flatten(-2))
