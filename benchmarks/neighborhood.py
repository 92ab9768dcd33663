"""``python -m benchmarks.neighborhood``: neighborhood attention beside its peers, in one run.

On a GPU: ours (every backend that can run the case), dense attention through cuDNN, FlexAttention
on permuted tokens (its permutation counted), and NATTEN when it can be imported. On a CPU: blocked
against reference and FlexAttention on smaller cases. Times are medians after warm-up and include
everything a call does. "Effective" counts the exact windows only, 4 * B * heads * head_dim * tokens
* prod(window) operations forward and 2.5 times that backward.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stvision.kernels.neighborhood import explain, neighborhood_attention_generic
from stvision.kernels.neighborhood.problem import build_axes
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


def milliseconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call after warm-up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(
    call: Call, case: Case, device: str, dtype: torch.dtype, repeats: int, backward: bool
) -> dict[str, float]:
    """Forward and, if asked for, backward milliseconds and peak GiB of one training step."""
    q, k, v = inputs(case, device, dtype, False)
    with torch.no_grad():
        found = {"forward": milliseconds(lambda: call(q, k, v), device, repeats)}
    if backward:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        up = torch.randn_like(out)

        def back() -> None:
            torch.autograd.grad(out, leaves, up, retain_graph=True)

        found["backward"] = milliseconds(back, device, repeats)
        del out
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(call(*leaves), leaves, up)
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


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


def ours(case: Case, backend: str | None) -> Call:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return neighborhood_attention_generic(q, k, v, backend=backend, **case.options)

    return call


def natten(case: Case) -> Call | None:
    """NATTEN's own choice of backend, or ``None`` where it is not installed."""
    try:
        from natten import na1d, na2d, na3d
    except ImportError:
        return None
    function = {1: na1d, 2: na2d, 3: na3d}[len(case.grid)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return function(q, k, v, **case.options)

    return call


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the roof of this machine."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / (1e-3 * milliseconds(lambda: a @ b, device, 10))


def rows(case: Case, device: str) -> dict[str, Call]:
    """Name -> call of everything that can run the case here, ours first."""
    calls: dict[str, Call] = {}
    names = ["sdpa", "triton", "blocked", *(["reference"] if device == "cpu" else [])]
    q, k, v = (x[:1] for x in inputs(case, device, torch.bfloat16, False))
    for name in names:
        try:
            explain(q, k, v, backend=name, **case.options)
        except ValueError as error:
            print(f"  {name}: {error}")
        else:
            calls[name] = ours(case, name)
    calls["FlexAttention"] = ours(case, "flex")
    calls["dense"] = dense
    peer = natten(case)
    if peer is None:
        print("  NATTEN: not installed")
    else:
        calls["NATTEN"] = peer
    return calls


def run(case: Case, device: str, arguments: argparse.Namespace, roof: float) -> list[dict]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(
        f"\n{case.name}: batch {case.batch}, grid {case.grid}, {case.heads} heads of {case.dim}, "
    )
    print(f"  window {case.window}, stride {case.stride}, dilation {case.dilation}, {dtype}")
    table: list[dict[str, Any]] = []
    for name, call in rows(case, device).items():
        backward = arguments.backward and not (name == "FlexAttention" and device == "cpu")
        try:
            error = None if name == "dense" else largest_error(call, case, device, dtype)
            found = measure(call, case, device, dtype, arguments.repeats, backward)
        except Exception as failure:  # noqa: BLE001 - a peer that fails is a row of the table
            print(
                f"  {name}: failed: {str(failure).splitlines()[0] if str(failure) else failure!r}"
            )
            continue
        table.append({"case": case.name, "name": name, "error": error, **found})
    for row in table:
        exact = case.operations / roof * 1e3
        line = f"  {row['name']:14s} forward {row['forward']:9.3f} ms"
        line += f" ({row['forward'] / table[0]['forward']:6.2f} x {table[0]['name']})"
        if row["name"] != "dense":
            rate = case.operations / row["forward"] * 1e-9
            line += f" {rate:8.3f} effective TFLOP/s, roof / time {exact / row['forward']:.3f}"
        if "backward" in row:
            line += f" | backward {row['backward']:9.3f} ms"
            if "backward" in table[0]:
                line += f" ({row['backward'] / table[0]['backward']:6.2f} x)"
        if "peak_gib" in row:
            line += f" | peak {row['peak_gib']:.2f} GiB"
        if row["error"] is not None:
            line += f" | error {row['error']:.1e}"
        print(line, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Neighborhood attention beside its peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--cases", nargs="*", default=None, help="names of cases; all by default")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--repeats", type=int, default=None, help="timed calls of each row")
    parser.add_argument("--json", default=None, help="also write the table to this file")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.repeats = arguments.repeats or (20 if device == "cuda" else 3)
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    known = GPU_CASES if device == "cuda" else CPU_CASES
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
    table = [row for case in chosen for row in run(case, device, arguments, roof)]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": name, "torch": torch.__version__, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()
