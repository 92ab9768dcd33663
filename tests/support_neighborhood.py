"""Random neighborhood attention problems and the float64 answer to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.deterministic
from hypothesis import strategies as st

from stvision.kernels.neighborhood.problem import build_axes
from stvision.kernels.neighborhood.reference import dense_attention, dense_bias, dense_mask

#: allowed relative error in the Frobenius norm
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 3e-3,
}


@dataclass
class Problem:
    """Inputs, arguments and sizes of one call."""

    seed: int
    batch: int
    grid: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    window: dict[str, Any]
    tokens: int = 0
    bias: bool = False
    masked: bool = False
    query_grid: tuple[int, ...] | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def build(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """Draw the inputs, rounded to ``dtype``."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
            return x.to(device).requires_grad_()

        b, hk = self.batch, self.kv_heads
        self.inputs = {
            "query": draw(b, *(self.query_grid or self.grid), self.heads, self.dim),
            "key": draw(b, *self.grid, hk, self.dim),
            "value": draw(b, *self.grid, hk, self.value_dim),
        }
        if self.tokens:
            self.inputs["additional_keys"] = draw(b, self.tokens, hk, self.dim)
            self.inputs["additional_values"] = draw(b, self.tokens, hk, self.value_dim)
        if self.bias:
            self.inputs["rpb"] = draw(self.heads, *(2 * k - 1 for k in self.window["kernel_size"]))
        self.mask = None
        if self.masked:
            self.mask = (torch.rand(b, *self.grid, generator=g) > 0.4).to(device)
        return self

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Output, log-sum-exp and the inputs in float64 on the CPU, from the dense definition."""
        exact = {
            name: x.detach().cpu().double().requires_grad_() for name, x in self.inputs.items()
        }
        axes, kept = build_axes(exact["query"].shape[1:-2], self.grid, **self.window)
        query = exact["query"][(slice(None), *kept)]
        rest = {name: x for name, x in exact.items() if name != "query"}
        mask = None if self.mask is None else self.mask.cpu()
        out, lse = dense_attention(query, axes=axes, key_mask=mask, **rest)
        return out, lse, exact


@st.composite
def problems(draw: st.DrawFn, *, dims: tuple[int, ...] = (8, 16, 40, 80), largest: int = 8):
    """Problems of every rank with all options, small enough for a dense score matrix."""
    rank = draw(st.integers(1, 3))
    top = {1: 4 * largest, 2: largest + 3, 3: largest}[rank]
    grid, window = [], {"kernel_size": [], "stride": [], "dilation": [], "is_causal": []}
    for _ in range(rank):
        length = draw(st.integers(2, top))
        size = draw(st.integers(1, min(length, 7)))
        grid.append(length)
        window["kernel_size"].append(size)
        window["stride"].append(draw(st.integers(1, size)))
        window["dilation"].append(draw(st.integers(1, length // size)))
        window["is_causal"].append(draw(st.booleans()))
    kv_heads = draw(st.integers(1, 2))
    options: dict[str, Any] = {name: tuple(values) for name, values in window.items()}
    query_grid = None
    kind = draw(st.sampled_from(["same", "same", "same", "valid", "center", "start", "offset"]))
    if kind == "valid":
        options |= {"stride": 1, "border": "valid"}
    elif kind in {"center", "start"}:
        query_grid = tuple(draw(st.integers(1, top)) for _ in range(rank))
        options["query_map"] = kind
    elif kind == "offset":
        query_grid = tuple(draw(st.integers(1, length)) for length in grid)
        options["query_map"] = tuple(
            draw(st.integers(0, k - q)) for k, q in zip(grid, query_grid, strict=True)
        )
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 2)),
        grid=tuple(grid),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from(dims)),
        value_dim=draw(st.sampled_from(dims)),
        window=options,
        tokens=draw(st.sampled_from([0, 0, 1, 5])),
        bias=draw(st.booleans()),
        masked=draw(st.booleans()),
        query_grid=query_grid,
    )


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the exact value, at least 1e-3 a number."""
    found, exact = found.detach().cpu().double(), exact.detach().double()
    assert found.shape == exact.shape
    assert torch.equal(found.isinf(), exact.isinf())
    assert not found.isnan().any()
    found, exact = (x.masked_fill(x.isinf(), 0.0) for x in (found, exact))
    floor = 1e-3 * max(1, exact.numel()) ** 0.5
    return ((found - exact).norm() / exact.norm().clamp_min(floor)).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(
    problem: Problem,
    call: Any,
    dtype: torch.dtype,
    *,
    grad: bool = True,
    rounded: bool = False,
    **options: Any,
) -> None:
    """Compare a backend with the float64 definition, forward and (both outputs) backward.

    With ``rounded`` a gradient may be as far off as in :func:`rounding_errors`.
    """
    out, lse, exact = problem.expected()
    with poisoned():
        found, found_lse = call(
            **problem.inputs, **problem.window, key_mask=problem.mask, return_lse=True, **options
        )
    assert found.dtype == dtype
    limit = RELATIVE[dtype]
    assert relative_error(found, out) <= limit, "output"
    assert relative_error(found_lse, lse) <= min(limit, 1e-5), "lse"
    if not grad:
        return
    g = torch.Generator().manual_seed(problem.seed + 1)
    up = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).double()
    up_lse = torch.randn(lse.shape, generator=g, dtype=torch.float64).float().double()
    up_lse = up_lse.masked_fill(lse == -torch.inf, 0.0)
    names = list(exact)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    total = (out * up).sum() + (safe * up_lse).sum()
    wanted = torch.autograd.grad(total, list(exact.values()))
    with poisoned():
        grads = torch.autograd.grad(
            (found, found_lse),
            [problem.inputs[name] for name in names],
            (up.to(found), up_lse.to(found_lse)),
        )
    errors = {n: relative_error(a, b) for n, a, b in zip(names, grads, wanted, strict=True)}
    if not rounded or max(errors.values()) <= limit:
        assert max(errors.values()) <= limit, f"errors of gradients: {errors}"
        return
    within = rounding_errors(
        problem, dtype, up, up_lse, dict(zip(names, (x.detach() for x in wanted), strict=True))
    )
    wrong = [name for name, error in errors.items() if error > max(limit, within[name])]
    assert not wrong, f"errors of gradients: {errors}; by rounding alone: {within}"


def rounding_errors(
    problem: Problem,
    dtype: torch.dtype,
    up: torch.Tensor,
    up_lse: torch.Tensor,
    exact: dict[str, torch.Tensor],
    draws: int = 20,
) -> dict[str, float]:
    """Largest relative error of each gradient in float64 with random roundings to ``dtype``.

    Rounded are what tensor cores of 16 bits take or what is returned in 16 bits: the weights of
    the forward, the output, from which the backward takes its row sums, weights and gradients of
    scores in the backward, and the gradients. Where a window holds a few keys or a head a few
    numbers, these do not average out and move a gradient by several times a rounding of its own, in
    every attention that keeps its output in 16 bits. A rounding is drawn evenly from half a unit of
    the last place at the least mantissa, which nearest roundings stay within: what comes out is up to
    twice what they make. Not for additional tokens.
    """
    inputs = {name: x.detach().cpu().double() for name, x in problem.inputs.items()}
    axes, kept = build_axes(inputs["query"].shape[1:-2], problem.grid, **problem.window)
    query = inputs["query"][(slice(None), *kept)]
    scale = query.shape[-1] ** -0.5
    groups = problem.heads // problem.kv_heads
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, inputs["key"], inputs["value"]))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if problem.bias:
        table = inputs["rpb"].requires_grad_()
        bias = dense_bias(table, axes)
        scores = scores + bias.detach()
    seen = dense_mask(axes)[None, None]
    if problem.mask is not None:
        seen = seen & problem.mask.cpu().flatten(1)[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    do, dlse = (x.flatten(1, y).transpose(1, 2) for x, y in ((up, -3), (up_lse, -2)))
    unit = torch.finfo(dtype).eps / 2
    g = torch.Generator().manual_seed(0)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        step = (unit * x.abs()).clamp_min(unit * torch.finfo(dtype).tiny)
        return x + step * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)

    def of_keys(x: torch.Tensor, name: str) -> torch.Tensor:
        one = x.unflatten(1, (-1, groups)).sum(2).transpose(1, 2)
        return rounded(one.unflatten(1, inputs[name].shape[1:-2]))

    worst = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        delta = (do * rounded(rounded(weights) @ v)).sum(-1) - dlse
        ds = weights * (do @ v.mT - delta[..., None])
        found = {"query": torch.zeros_like(inputs["query"])}
        dq = rounded(rounded(ds) @ k * scale)
        found["query"][(slice(None), *kept)] = dq.transpose(1, 2).unflatten(1, query.shape[1:-2])
        found["key"] = of_keys(rounded(ds).mT @ q * scale, "key")
        found["value"] = of_keys(rounded(weights).mT @ do, "value")
        if problem.bias:
            (one,) = torch.autograd.grad((bias * ds).sum(), table, retain_graph=True)
            found["rpb"] = rounded(one)
        for name, x in found.items():
            worst[name] = max(worst[name], relative_error(x, exact[name]))
    return worst
