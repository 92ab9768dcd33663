"""``python -m benchmarks.neighborhood``: neighborhood attention beside its peers, in one run.

On a GPU: ours (``triton``; its deterministic backward, and the free one that needs one pass, in rows
of their own), dense attention
through cuDNN, FlexAttention on permuted tokens (its permutation counted), and NATTEN when it can be
imported. On a CPU: blocked against reference and FlexAttention on smaller cases. Times are medians
after warm-up and include everything a call does on the device, with a cold L2 cache. "Effective"
counts the exact windows only, 4 * B * heads * head_dim * tokens * prod(window) operations forward
and 2.5 times that backward; "of roof" is the time of those at the measured rate of a large product,
over the measured time. ``--sweep`` times windows from a small to the whole of one grid instead.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stvision.kernels.neighborhood import (
    explain,
    neighborhood_attention_generic,
    triton_config,
)
from stvision.kernels.neighborhood.problem import build_axes
from stvision.kernels.neighborhood.triton_tiles import Tiles, three_axes
from stvision.kernels.neighborhood.windows import visible_keys

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class Case:
    """A problem: (batch, grid, heads, head_dim) and its window."""

    name: str
    batch: int
    grid: tuple[int, ...]
    heads: int
    dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1

    @property
    def operations(self) -> float:
        tokens = self.batch * math.prod(self.grid)
        return 4.0 * tokens * self.heads * self.dim * math.prod(self.window)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
        }


GPU_CASES = (
    Case("hunyuan", 1, (30, 48, 80), 24, 128, (18, 24, 24)),
    Case("hunyuan-stride", 1, (30, 48, 80), 24, 128, (18, 24, 24), (6, 8, 8)),
    Case("hunyuan-blocks", 1, (30, 48, 80), 24, 128, (15, 16, 16), (15, 16, 16)),
    Case("cosmos", 1, (16, 44, 80), 32, 128, (8, 24, 40)),
    Case("vit", 4, (16, 56, 56), 8, 64, (7, 7, 7)),
    Case("seer", 2, (12, 64, 64), 8, 64, (5, 9, 9)),
    Case("dinat", 64, (56, 56), 4, 32, (7, 7)),
    Case("dinat-dilated", 64, (56, 56), 4, 32, (7, 7), 1, (8, 8)),
)
#: one grid, windows from 1/50 of it to all of it
SWEEP = tuple(
    Case(f"sweep-{t}x{h}x{w}", 1, (16, 44, 80), 8, 128, (t, h, w))
    for t, h, w in (
        (4, 12, 20),
        (8, 12, 20),
        (8, 16, 28),
        (8, 24, 40),
        (10, 30, 50),
        (12, 33, 60),
        (14, 38, 70),
        (16, 44, 80),
    )
)
CPU_CASES = (
    Case("seer-small", 1, (8, 16, 16), 4, 64, (5, 9, 9)),
    Case("vit-small", 1, (8, 14, 14), 4, 64, (7, 7, 7)),
    Case("dinat-small", 1, (28, 28), 4, 32, (7, 7)),
    Case("dinat-dilated-small", 1, (28, 28), 4, 32, (7, 7), 1, (4, 4)),
    Case("blocks-small", 1, (8, 16, 16), 4, 64, (4, 8, 8), (4, 8, 8)),
    Case("audio", 1, (1024,), 4, 64, (65,)),
)


def inputs(case: Case, device: str, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, *case.grid, case.heads, case.dim)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(grad)
        for _ in range(3)
    ]


_FLUSH: dict[str, torch.Tensor] = {}


def milliseconds(call: Callable[[], Any], device: str, repeats: int, seconds: float = 1e9) -> float:
    """Median time of a call after warm-up; fewer repeats, at least three, where they take long."""
    start = time.perf_counter()
    for _ in range(2):
        call()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    if device not in _FLUSH:
        _FLUSH[device] = torch.empty(2**26, dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / 2
    repeats = max(3, min(repeats, int(seconds / max(each, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        # clears the L2 cache, and keeps the device busy while the host prepares the call
        _FLUSH[device].zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def measure(
    call: Call,
    case: Case,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    backward: bool,
    seconds: float,
) -> dict[str, float]:
    """Forward and, if asked for, backward milliseconds and peak memory of one training step."""
    q, k, v = inputs(case, device, dtype, False)
    with torch.no_grad():
        found = {"forward": milliseconds(lambda: call(q, k, v), device, repeats, seconds)}
    if backward:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        up = torch.randn_like(out)

        def back() -> None:
            torch.autograd.grad(out, leaves, up, retain_graph=True)

        found["backward"] = milliseconds(back, device, repeats, seconds)
        del out
        if device == "cuda":
            torch.cuda.synchronize()
            # q, k, v and the gradient of the output are there already
            given = 4 * q.numel() * q.element_size()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(call(*leaves), leaves, up)
            peak = torch.cuda.max_memory_allocated() - before + given
            found["peak_gib"] = peak / 2**30
            # with output, lse and gradients of q, k, v
            least = 2 * given + 4 * q.numel() // q.shape[-1]
            found["peak_over_least"] = peak / least
    return found


def errors(call: Call, case: Case, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of output and gradients for two heads of one batch element.

    Against the blocked path in float32 on the same rounded inputs; freed memory is NaN before.
    """
    small = Case(case.name, 1, case.grid, 2, case.dim, case.window, case.stride, case.dilation)
    q, k, v = inputs(small, device, dtype, True)
    up = torch.randn_like(q)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    truth = ours(case, "blocked")(*exact)
    wanted = [truth.detach(), *torch.autograd.grad(truth, exact, up.float())]
    poison = [torch.full_like(x, float("nan")) for x in wanted for _ in range(2)]
    del poison
    out = call(q, k, v)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), up)]
    names = ("out", "grad_q", "grad_k", "grad_v")
    return {
        name: ((a.float() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, found, wanted, strict=True)
    }


def largest_error(call: Call, case: Case, device: str, dtype: torch.dtype) -> float:
    """Relative error of some queries, borders among them, against float64 from their key sets."""
    q, k, v = inputs(case, device, dtype, False)
    with torch.no_grad():
        out = call(q, k, v)
    axes, _ = build_axes(case.grid, case.grid, **case.options)
    generator = torch.Generator().manual_seed(1)
    places = [tuple(0 for _ in axes), tuple(length - 1 for length in case.grid)]
    for _ in range(14):
        places.append(
            tuple(int(torch.randint(length, (), generator=generator)) for length in case.grid)
        )
    wanted, found = [], []
    for place in places:
        ks, vs = k[-1], v[-1]
        for a, (axis, at) in enumerate(zip(axes, place, strict=True)):
            keys = torch.tensor(list(visible_keys(axis, at)), device=device)
            ks, vs = ks.index_select(a, keys), vs.index_select(a, keys)
        ks, vs = ks.flatten(0, -3).double(), vs.flatten(0, -3).double()
        scores = torch.einsum("hd,khd->hk", q[(-1, *place)].double(), ks) * case.dim**-0.5
        wanted.append(torch.einsum("hk,khd->hd", scores.softmax(-1), vs))
        found.append(out[(-1, *place)].double())
    exact = torch.stack(wanted)
    return ((torch.stack(found) - exact).norm() / exact.norm()).item()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over all tokens: what a user without windows pays."""
    a, b, c = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out = F.scaled_dot_product_attention(a, b, c)
    else:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(a, b, c)
    return out.transpose(1, 2).reshape(q.shape)


def ours(case: Case, backend: str | None, deterministic: bool | None = None) -> Call:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return neighborhood_attention_generic(
            q, k, v, backend=backend, deterministic=deterministic, **case.options
        )

    return call


def one_pass(case: Case) -> Tiles | None:
    """Shapes for the backward that adds up the gradient of queries in memory, where it can run."""
    axes, _ = build_axes(case.grid, case.grid, **case.options)
    if any(axis.dilation > 1 for axis in axes):
        return None
    return triton_config.candidates("once", three_axes(axes), case.dim, 2)[0]


def natten(case: Case, device: str, dtype: torch.dtype) -> Call | None:
    """NATTEN with the fastest of the configurations it lists; ``None`` where it is not installed."""
    try:
        import natten as package
    except ImportError:
        return None
    function = getattr(package, f"na{len(case.grid)}d")

    def bound(**configuration: Any) -> Call:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return function(q, k, v, **case.options, **configuration)

        return call

    def fastest(run: Callable[[dict[str, Any]], Any], choices: list[dict[str, Any]]) -> dict:
        return min(choices, key=lambda one: milliseconds(lambda: run(one), device, 3, 0.5))

    q, k, v = inputs(case, device, dtype, False)
    try:
        forwards = [
            {"q_tile_shape": a, "kv_tile_shape": b, "kernel_schedule": c, "backend": "hopper-fna"}
            for (a, b), c in package.get_configs_for_cutlass_hopper_fna(q, k, v)
        ]
        backwards = [
            {"backward_q_tile_shape": a, "backward_kv_tile_shape": b}
            for a, b in package.get_bwd_configs_for_cutlass_hopper_fna(q, k, v)
        ]
    except (AttributeError, RuntimeError, ValueError):
        return bound()  # another version or GPU: its own choice
    if not forwards or not backwards:
        return bound()
    forward = fastest(lambda one: bound(**one)(q, k, v), forwards)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    up = torch.randn_like(q)

    def back(one: dict[str, Any]) -> Any:
        return torch.autograd.grad(bound(**forward, **one)(*leaves), leaves, up)

    chosen = forward | fastest(back, backwards)
    print(f"  NATTEN: {chosen}")
    return bound(**chosen)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the roof of this machine."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / (1e-3 * milliseconds(lambda: a @ b, device, 10))


def rows(case: Case, device: str, wanted: list[str] | None) -> dict[str, Call]:
    """Name -> call of everything that can run the case here, ours first."""
    calls: dict[str, Call] = {}
    names = ["sdpa", "triton"] if device == "cuda" else ["sdpa", "triton", "blocked", "reference"]
    q, k, v = (x[:1] for x in inputs(case, device, torch.bfloat16, False))
    for name in names:
        try:
            explain(q, k, v, backend=name, **case.options)
        except ValueError as error:
            print(f"  {name}: {error}")
        else:
            calls[name] = ours(case, name)
    if "triton" in calls and device == "cuda":
        calls["deterministic"] = ours(case, "triton", True)
        if one_pass(case) is not None:
            calls["one pass"] = ours(case, "triton", False)
    calls["FlexAttention"] = ours(case, "flex")
    calls["dense"] = dense
    wants = not wanted or "NATTEN" in wanted
    peer = natten(case, device, torch.bfloat16) if wants else None
    if peer is not None:
        calls["NATTEN"] = peer
    elif wants:
        print("  NATTEN: not installed")
    return {name: call for name, call in calls.items() if not wanted or name in wanted}


def line_of(row: dict[str, Any], first: dict[str, Any], case: Case, roof: float) -> str:
    """One row as text; ratios are over the first row of the case."""
    line = f"  {row['name']:14s}"
    exact = case.operations / roof * 1e3
    for name, share in (("forward", 1.0), ("backward", 2.5)):
        if name not in row:
            continue
        line += f" {name} {row[name]:9.3f} ms"
        if name in first:
            line += f" ({row[name] / first[name]:5.2f} x)"
        if row["name"] != "dense":
            rate = share * case.operations / row[name] * 1e-9
            line += f" {rate:7.2f} effective TFLOP/s, {share * exact / row[name]:.3f} of roof |"
    if "peak_gib" in row:
        line += f" peak {row['peak_gib']:.2f} GiB, {row['peak_over_least']:.2f} of least |"
    if row["error"] is not None:
        line += f" error {row['error']:.1e}"
    if "errors" in row:
        line += " (" + ", ".join(f"{n} {e:.1e}" for n, e in row["errors"].items()) + ")"
    return line


def run(case: Case, device: str, arguments: argparse.Namespace, roof: float) -> list[dict]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(
        f"\n{case.name}: batch {case.batch}, grid {case.grid}, {case.heads} heads of {case.dim}, "
    )
    print(f"  window {case.window}, stride {case.stride}, dilation {case.dilation}, {dtype}")
    table: list[dict[str, Any]] = []
    one = [x[:1] for x in inputs(case, device, dtype, arguments.backward)]
    taken = explain(*one, **case.options).backend
    del one
    for name, call in rows(case, device, arguments.only).items():
        backward = arguments.backward and not (name == "FlexAttention" and device == "cpu")
        freely = triton_config.forced(once=one_pass(case)) if name == "one pass" else nullcontext()
        found: dict[str, Any] = {}
        try:
            with freely:
                error = None if name == "dense" else largest_error(call, case, device, dtype)
                if device == "cuda" and name in {"triton", "deterministic", "one pass"}:
                    found["errors"] = errors(call, case, device, dtype)
                if not arguments.check:
                    found |= measure(
                        call, case, device, dtype, arguments.repeats, backward, arguments.seconds
                    )
        except Exception as failure:  # noqa: BLE001 - a peer that fails is a row of the table
            print(
                f"  {name}: failed: {str(failure).splitlines()[0] if str(failure) else failure!r}"
            )
            continue
        share = math.prod(w / n for w, n in zip(case.window, case.grid, strict=True))
        row: dict[str, Any] = {
            "case": case.name,
            "name": name,
            "fraction": share,
            "error": error,
            "taken": name == taken,
            **found,
        }
        row |= {"operations": case.operations, "roof": roof}
        table.append(row)
    for row in table:
        print(line_of(row, table[0], case, roof), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Neighborhood attention beside its peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--cases", nargs="*", default=None, help="names of cases; all by default")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--repeats", type=int, default=None, help="timed calls of each row")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each timing, on a GPU")
    parser.add_argument("--only", nargs="*", default=None, help="names of rows; all by default")
    parser.add_argument("--check", action="store_true", help="errors only, no times")
    parser.add_argument("--sweep", action="store_true", help="windows of growing size instead")
    parser.add_argument("--json", default=None, help="also write the table to this file")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.repeats = arguments.repeats or (20 if device == "cuda" else 3)
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    known = SWEEP if arguments.sweep else GPU_CASES if device == "cuda" else CPU_CASES
    chosen = [case for case in known if not arguments.cases or case.name in arguments.cases]
    if not chosen:
        parser.error(f"--cases must be among {', '.join(case.name for case in known)}")
    roof = matmul_rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}, product {roof * 1e-12:.2f} TFLOP/s")
    table = []
    for case in chosen:
        table += run(case, device, arguments, roof)
        if arguments.json:
            # after every case, so that a run that is cut short leaves what it measured
            found = {"device": name, "torch": torch.__version__, "rows": table}
            with open(arguments.json, "w") as file:
                json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
