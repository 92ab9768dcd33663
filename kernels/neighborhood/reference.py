"""Neighborhood attention written to be checked: a dense oracle, and a gather with bounded memory.

``dense_attention`` is the definition: build the visible set of every query from
:func:`~stvision.kernels.neighborhood.windows.visible_keys`, a score matrix, a softmax. Tests run it
in float64. ``forward`` and ``backward`` compute the same per chunk of queries from gathered keys;
they serve any device, dtype and option, slowly.
"""

import math

import torch

from stvision.kernels.neighborhood.windows import Axis, axis_tables, key_position, visible_keys

#: elements of the largest tensor a chunk may create
CHUNK_ELEMENTS = 1 << 24


def visible_matrix(axis: Axis) -> torch.Tensor:
    """(query_length, key_length) bool: which key each query sees on one axis."""
    matrix = torch.zeros(axis.query_length, axis.key_length, dtype=torch.bool, device="cpu")
    for query in range(axis.query_length):
        matrix[query, list(visible_keys(axis, query))] = True
    return matrix


def dense_mask(axes: tuple[Axis, ...]) -> torch.Tensor:
    """(queries, keys) bool over the flattened grids: the product of the axes' sets."""
    mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis in axes:
        mask = torch.kron(mask, visible_matrix(axis))
    return mask


def dense_bias(rpb: torch.Tensor, axes: tuple[Axis, ...]) -> torch.Tensor:
    """(heads, queries, keys) relative position bias; entries of invisible pairs mean nothing."""
    index = []
    for axis in axes:
        query = torch.tensor(
            [key_position(axis, i) for i in range(axis.query_length)], device="cpu"
        )
        steps = (torch.arange(axis.key_length, device="cpu") - query[:, None]) // axis.dilation
        index.append((steps + axis.window - 1).clamp(0, 2 * axis.window - 2).to(rpb.device))
    rank = len(axes)
    where = [
        index[a].reshape(
            *(len(index[a]) if b == a else 1 for b in range(rank)),
            *(index[a].shape[1] if b == a else 1 for b in range(rank)),
        )
        for a in range(rank)
    ]
    queries = math.prod(axis.query_length for axis in axes)
    table = rpb.movedim(0, -1)[tuple(where)]
    return table.movedim(-1, 0).reshape(len(rpb), queries, -1)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    axes: tuple[Axis, ...],
    *,
    scale: float | None = None,
    rpb: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with the whole score matrix in memory; differentiable by plain autograd.

    Args:
        query: (B, *query grid, H, d).
        key: (B, *key grid, Hk, d), H a multiple of Hk.
        value: (B, *key grid, Hk, dv).
        axes: one per grid axis.
        scale: factor of the logits, ``d ** -0.5`` when not given.
        rpb: (H, 2 k - 1, ...) bias added to the scaled logits, indexed by key minus query.
        key_mask: (B, *key grid) bool, True where a key takes part.
        additional_keys: (B, M, Hk, d) seen by every query.
        additional_values: (B, M, Hk, dv).

    Returns:
        output (B, *query grid, H, dv) and log-sum-exp (B, *query grid, H). A query without any
        visible key gives 0 and minus infinity.
    """
    batch, *grid, heads, _ = query.shape
    repeats = heads // key.shape[-2]
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    mask = dense_mask(axes).to(q.device).expand(batch, heads, -1, -1)
    if key_mask is not None:
        mask = mask & key_mask.flatten(1)[:, None, None, :]
    bias = 0.0 if rpb is None else dense_bias(rpb, axes)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(repeats, 2))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale) + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    if additional_keys is not None and additional_values is not None:
        extra = torch.einsum("bqhd,bkhd->bhqk", q, additional_keys.repeat_interleave(repeats, 2))
        extra = extra * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = torch.cat([scores, extra], -1)
        v = torch.cat([v, additional_values], 1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(repeats, 2))
    return out.reshape(batch, *grid, heads, -1), lse.transpose(1, 2).reshape(batch, *grid, heads)


def _windows(
    axes: tuple[Axis, ...], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per axis, for every query: its window's keys, which of them exist, and their rpb index."""
    found = []
    for axis in axes:
        group, place, start, stop = (t.to(device) for t in axis_tables(axis))
        places = start[:, None] + torch.arange(min(axis.window, axis.key_length), device=device)
        inside = places < stop[:, None]
        keys = (group[:, None] + places * axis.dilation).clamp_max(axis.key_length - 1)
        relative = (places - place[:, None] + axis.window - 1).clamp(0, 2 * axis.window - 2)
        found.append((keys, inside, relative))
    return found


class _Gather:
    """Chunks of queries (in flat grid order) with the flat keys of each query's window."""

    def __init__(self, axes: tuple[Axis, ...], device: torch.device):
        self.axes = axes
        self.tables = _windows(axes, device)
        self.queries = math.prod(axis.query_length for axis in axes)
        self.keys = math.prod(min(axis.window, axis.key_length) for axis in axes)
        self.device = device

    def chunks(self, elements_per_key: int) -> list[tuple[int, int]]:
        size = max(1, CHUNK_ELEMENTS // max(1, self.keys * elements_per_key))
        return [(i, min(i + size, self.queries)) for i in range(0, self.queries, size)]

    def at(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat key index, existence, and flat rpb index, each (end - begin, keys)."""
        rest = torch.arange(begin, end, device=self.device)
        rows = []
        for axis in reversed(self.axes):
            rows.append(rest % axis.query_length)
            rest = rest // axis.query_length
        index = rest.new_zeros(end - begin, 1)
        inside = torch.ones(end - begin, 1, dtype=torch.bool, device=self.device)
        relative = index
        for axis, row, table in zip(self.axes, reversed(rows), self.tables, strict=True):
            keys, exists, steps = (t[row] for t in table)
            index = (index[:, :, None] * axis.key_length + keys[:, None]).flatten(1)
            inside = (inside[:, :, None] & exists[:, None]).flatten(1)
            relative = (relative[:, :, None] * (2 * axis.window - 1) + steps[:, None]).flatten(1)
        return index, inside, relative


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    inside: torch.Tensor,
    relative: torch.Tensor,
    scale: float,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """(n, Hk, G, keys) scaled, biased and masked logits of one chunk of one batch item."""
    scores = torch.einsum("nhgd,nkhd->nhgk", q, k) * scale
    if rpb is not None:
        bias = rpb.flatten(1)[:, relative]  # (H, n, keys)
        scores = scores + bias.unflatten(0, scores.shape[1:3]).permute(2, 0, 1, 3)
    if key_mask is not None:
        inside = inside & key_mask
    return scores.masked_fill(~inside[:, None, None], -torch.inf)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_at(
    total: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, deterministic: bool
) -> None:
    """``total.index_add_(dim, index, source)``, with ``deterministic`` the same bits every time.

    On a GPU ``index_add_`` adds in the order in which threads come by; ``index_put_`` sorts first.
    """
    if deterministic and total.is_cuda:
        total.movedim(dim, 0).index_put_((index,), source.movedim(dim, 0), accumulate=True)
    else:
        total.index_add_(dim, index, source)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
    part: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp from gathered windows, a chunk of queries at a time.

    With ``part`` the output is not rounded to the dtype of ``query``.
    """
    batch, *grid, heads, _ = query.shape
    kv_heads, dtype = key.shape[-2], _compute_dtype(query.dtype)
    gather = _Gather(axes, query.device)
    q = query.flatten(1, -3).unflatten(2, (kv_heads, heads // kv_heads))
    k, v = key.flatten(1, -3), value.flatten(1, -3)
    out = query.new_empty(
        batch, gather.queries, heads, value.shape[-1], dtype=dtype if part else query.dtype
    )
    lse = torch.empty(batch, gather.queries, heads, dtype=dtype, device=query.device)
    bias = None if rpb is None else rpb.to(dtype)
    for begin, end in gather.chunks(kv_heads * max(key.shape[-1], value.shape[-1])):
        index, inside, relative = gather.at(begin, end)
        for item in range(batch):
            seen = None if key_mask is None else key_mask.flatten(1)[item][index]
            scores = _scores(
                q[item, begin:end].to(dtype),
                k[item][index].to(dtype),
                inside,
                relative,
                scale,
                bias,
                seen,
            )
            total = scores.logsumexp(-1)
            weights = (scores - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
            found = torch.einsum("nhgk,nkhd->nhgd", weights, v[item][index].to(dtype))
            out[item, begin:end] = found.flatten(1, 2).to(out.dtype)
            lse[item, begin:end] = total.flatten(1, 2)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    part: bool = False,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and rpb; the weights are recomputed from ``lse``.

    With ``part``, ``out`` and ``lse`` are those of an attention to more keys than these, and the
    gradient of ``query``, one term of a sum, is not rounded to its dtype. With ``deterministic`` all
    repeat bit by bit.
    """
    batch, heads = query.shape[0], query.shape[-2]
    kv_heads, dtype = key.shape[-2], _compute_dtype(query.dtype)
    groups = (kv_heads, heads // kv_heads)
    gather = _Gather(axes, query.device)
    q, do = (x.flatten(1, -3).unflatten(2, groups) for x in (query, grad_out))
    k, v = key.flatten(1, -3), value.flatten(1, -3)
    if part:  # these weights are not all of a row's
        grad_lse = grad_lse - (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    total, dl = (x.flatten(1, -2).unflatten(2, groups) for x in (lse, grad_lse))
    dq = torch.empty_like(q, dtype=dtype)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    bias = None if rpb is None else rpb.to(dtype)
    drpb = None if bias is None else torch.zeros_like(bias).flatten(1)
    for begin, end in gather.chunks(kv_heads * max(key.shape[-1], value.shape[-1])):
        index, inside, relative = gather.at(begin, end)
        flat = index.flatten()
        for item in range(batch):
            seen = None if key_mask is None else key_mask.flatten(1)[item][index]
            qi, doi = (x[item, begin:end].to(dtype) for x in (q, do))
            ki, vi = k[item][index].to(dtype), v[item][index].to(dtype)
            scores = _scores(qi, ki, inside, relative, scale, bias, seen)
            rows = total[item, begin:end].to(dtype)
            weights = (scores - rows.masked_fill(rows == -torch.inf, 0.0)[..., None]).exp()
            part_v = torch.einsum("nhgk,nhgd->nkhd", weights, doi).flatten(0, 1)
            add_at(dv[item], 0, flat, part_v, deterministic)
            dp = torch.einsum("nhgd,nkhd->nhgk", doi, vi)
            shift = dl[item, begin:end].to(dtype)
            if not part:
                shift = shift - (weights * dp).sum(-1)
            ds = weights * (dp + shift[..., None])
            dq[item, begin:end] = torch.einsum("nhgk,nkhd->nhgd", ds, ki) * scale
            part_k = torch.einsum("nhgk,nhgd->nkhd", ds, qi).flatten(0, 1) * scale
            add_at(dk[item], 0, flat, part_k, deterministic)
            if drpb is not None:
                summed = ds.flatten(1, 2).transpose(0, 1).flatten(1)
                add_at(drpb, 1, relative.flatten(), summed, deterministic)
    return (
        (dq if part else dq.to(query.dtype)).reshape(query.shape),
        dk.to(key.dtype).reshape(key.shape),
        dv.to(value.dtype).reshape(value.shape),
        None if drpb is None or rpb is None else drpb.to(rpb.dtype).reshape(rpb.shape),
    )


__all__ = ["add_at", "backward", "dense_attention", "dense_bias", "dense_mask", "forward"]
