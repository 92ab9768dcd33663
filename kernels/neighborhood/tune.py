"""``stvision tune``: find the fastest shapes for a problem, keep them.

Times the candidates of the model on this GPU and writes the best to the cache, from where every
later call with the same grid, window and head size takes them.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from stvision.kernels.neighborhood import triton_config
from stvision.kernels.neighborhood.problem import AXIS_NAMES, build_axes
from stvision.kernels.neighborhood.triton_config import KERNELS, POINTER_KERNELS, Axes, Kernel
from stvision.kernels.neighborhood.triton_tiles import Tiles, ranked_tiles, three_axes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """What to tune for; sizes as in :func:`stvision.kernels.neighborhood.na3d`."""

    batch: int
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    causal: tuple[bool, ...] | bool = False
    kv_heads: int | None = None
    dtype: str = "bf16"
    dilation: tuple[int, ...] | int = 1

    @property
    def axes(self) -> Axes:
        axes, _ = build_axes(
            self.grid,
            self.grid,
            kernel_size=self.window,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.causal,
        )
        return three_axes(axes)


def _pointer_variants(kernel: Kernel, problem: Problem, shapes: int) -> list[Tiles]:
    """:func:`variants` of a kernel that loads through pointers."""
    size = problem.head_dim * (1 if kernel == "pointers" else 2)
    by_size: dict[tuple[int, int], list[Tiles]] = {}
    for tiles in ranked_tiles(problem.axes, size, 2):
        by_size.setdefault((math.prod(tiles.query), math.prod(tiles.key)), []).append(tiles)
    best = [tiles for same in by_size.values() for tiles in same[:shapes]]
    return [
        Tiles(tiles.query, tiles.key, warps, stages)
        for tiles, warps, stages in product(best, (4, 8), (1, 2, 3))
    ]


def variants(kernel: Kernel, problem: Problem, shapes: int) -> list[Tiles]:
    """The best shapes of the model, each with the warps and depths that may suit it."""
    if kernel in POINTER_KERNELS:
        return _pointer_variants(kernel, problem, shapes)
    base = triton_config.candidates(kernel, problem.axes, problem.head_dim, 2, 4000)
    seen: dict[tuple[Any, ...], None] = {}
    by_size: dict[tuple[int, int], int] = {}
    for tiles in base:
        rows, columns = (math.prod(x) for x in (tiles.query, tiles.key))
        place = by_size[rows, columns] = by_size.get((rows, columns), 0) + 1
        if place <= shapes:
            seen.setdefault((tiles.query, tiles.key))
    found = []
    for (query, key), warps, stages in product(seen, (4, 8), (2, 3)):
        scores = math.prod(query) * math.prod(key) / (32 * warps)
        padded = 1 << (problem.head_dim - 1).bit_length()
        rows = math.prod(key if kernel in {"key", "once"} else query)
        sums = rows * padded / (32 * warps) * (2 if kernel in {"key", "once"} else 1)
        live = sums + scores * (1 if kernel == "forward" else 2)
        # far more numbers than a thread has registers, or a second group of warps without rows
        if live > 320 or (warps == 8 and rows < 128 and padded < 256):
            continue
        found.append(Tiles(query, key, warps, stages))
    return found


def _tensors(problem: Problem) -> list[torch.Tensor]:
    dtype = DTYPES[problem.dtype]
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for heads in (
        problem.heads,
        problem.kv_heads or problem.heads,
        problem.kv_heads or problem.heads,
    ):
        shape = (problem.batch, *problem.grid, heads, problem.head_dim)
        made.append(torch.randn(shape, generator=generator, device="cuda", dtype=dtype))
    return made


def _call(kernel: Kernel, problem: Problem, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """One pass that runs ``kernel``; for "query" and "key" both of them, as a call does."""
    from stvision.kernels.neighborhood import triton_launch

    q, k, v = tensors[:3]
    axes, scale = problem.axes[3 - len(problem.grid) :], problem.head_dim**-0.5
    pointers = kernel in POINTER_KERNELS
    if kernel in {"forward", "pointers"}:
        boxes = not pointers
        return lambda: triton_launch.forward(q, k, v, None, None, axes, scale, boxes=boxes)
    out, lse = tensors[3:]
    grad, nothing = torch.ones_like(out) * q.mean(), torch.zeros_like(lse)
    inputs = (grad, nothing, q, k, v, None, None, out, lse, axes, scale)
    how: dict[str, Any] = {"deterministic": kernel != "once", "boxes": False if pointers else None}
    return lambda: triton_launch.backward(*inputs, **how)


def _warm(job: tuple[Kernel, Problem, Tiles]) -> str | None:
    """In a worker: compile one configuration by a small call of its kind; the error, if any."""
    kernel, problem, tiles = job
    try:
        # the same kernel on a fraction of the work: one batch element and the fewest heads
        small = Problem(
            1,
            problem.grid,
            max(1, problem.heads // (problem.kv_heads or problem.heads)),
            problem.head_dim,
            problem.window,
            problem.stride,
            problem.causal,
            1,
            problem.dtype,
            problem.dilation,
        )
        tensors = _tensors(small)
        if kernel not in {"forward", "pointers"}:
            tensors += [tensors[0], torch.zeros(tensors[0].shape[:-1], device="cuda")]
        with triton_config.forced(**{kernel: tiles}):
            _call(kernel, small, tensors)()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a configuration that fails is skipped
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


def _milliseconds(call: Callable[[], Any], repeats: int, flush: torch.Tensor) -> float:
    """Median device time, with a cold L2 cache; queued behind the flush, so the host is hidden."""
    times = []
    call()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def tune(
    problem: Problem,
    kernels: Sequence[Kernel] = KERNELS,
    *,
    seconds: float = 60.0,
    shapes: int = 3,
    workers: int | None = None,
    keep: bool = True,
) -> dict[str, list[tuple[float, Tiles]]]:
    """Time the candidates of each kernel on the current GPU.

    Compiles in worker processes first, then times one after the other in this process.

    Args:
        problem: the sizes.
        kernels: which kernels; "query" and "key" are timed together with the best of each other.
        seconds: time for measuring each kernel, after compilation; the model's favourites first.
        shapes: shapes of each size to try.
        workers: processes that compile; half the processors when not given.
        keep: write the best to the cache; for "once" that two passes win, where they do.

    Returns:
        For each kernel the milliseconds and shapes, fastest first; empty where nothing ran.
    """
    device = torch.cuda.get_device_name()
    jobs = {kernel: variants(kernel, problem, shapes) for kernel in kernels}
    every = [(kernel, problem, tiles) for kernel in kernels for tiles in jobs[kernel]]
    workers = workers or max(1, (os.cpu_count() or 2) // 2)
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(_warm, every, chunksize=1))
    bad = {(kernel, tiles): e for (kernel, _, tiles), e in zip(every, errors, strict=True) if e}
    print(
        f"compiled {len(every) - len(bad)} of {len(every)} configurations in "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    for reason in sorted({e for e in bad.values()})[:4]:
        print(f"  {sum(e == reason for e in bad.values())} x {reason}")
    tensors = _tensors(problem)
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    results: dict[str, list[tuple[float, Tiles]]] = {}
    best: dict[str, Tiles] = {}
    forwards = {"forward", "pointers"}
    if set(kernels) - forwards:
        forward: Kernel = "pointers" if set(kernels) & set(POINTER_KERNELS) else "forward"
        out_lse = _call(forward, problem, tensors)()
    for kernel in kernels:
        inputs = tensors if kernel in forwards else [*tensors, *out_lse]
        call = _call(kernel, problem, inputs)
        found: list[tuple[float, Tiles]] = []
        stop = time.perf_counter() + seconds
        for tiles in jobs[kernel]:
            if (kernel, tiles) in bad or time.perf_counter() > stop:
                continue
            others = {name: one for name, one in best.items() if name != kernel}
            try:
                with triton_config.forced(**others, **{kernel: tiles}):
                    first = _milliseconds(call, 1, flush)
                    if found and first > 1.5 * min(found, key=lambda one: one[0])[0]:
                        found.append((first, tiles))
                        continue
                    found.append((_milliseconds(call, 7, flush), tiles))
            except Exception as error:  # noqa: BLE001 - a configuration that fails is skipped
                print(f"  {kernel} {astuple(tiles)}: {str(error)[:100]!r}")
        found.sort(key=lambda one: one[0])
        results[kernel] = found
        if not found:
            continue
        best[kernel] = found[0][1]
        chosen: Tiles | None = found[0][1]
        if kernel == "once":
            shapes_ = {name: one for name, one in best.items() if name != "once"}
            with triton_config.forced(**shapes_, once=None):
                if _milliseconds(call, 7, flush) < found[0][0]:
                    chosen = None
        if keep:
            key = triton_config.problem_key(kernel, problem.axes, problem.head_dim, 2)
            triton_config.save(device, key, chosen)
    return results


def show(results: dict[str, list[tuple[float, Tiles]]], rows: int) -> None:
    """Print the fastest shapes of each kernel."""
    for kernel, found in results.items():
        print(f"  {kernel}: {len(found)} timed")
        for time_, tiles in found[:rows]:
            print(
                f"    {time_:8.3f} ms  query {tiles.query} key {tiles.key} warps {tiles.warps} "
                f"stages {tiles.stages}" + (f" regs {tiles.registers}" if tiles.registers else "")
            )


def numbers(text: str) -> tuple[int, ...]:
    """``"18,24,24"`` or ``"7"`` as a tuple."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, not {text!r}") from None


def _refusal(chosen: argparse.Namespace) -> str | None:
    """One sentence on numbers that no problem has; those of its window are checked by the problem."""
    if len(chosen.grid) not in AXIS_NAMES or min(chosen.grid) < 1:
        return f"--grid takes one to three sizes of at least 1, not {chosen.grid}"
    kv_heads = chosen.heads if chosen.kv_heads is None else chosen.kv_heads
    sizes = {"--heads": chosen.heads, "--kv-heads": kv_heads, "--head-dim": chosen.head_dim}
    sizes |= {"--batch": chosen.batch, "--shapes": chosen.shapes}
    for name, size in sizes.items():
        if size < 1:
            return f"{name} must be at least 1, not {size}"
    if chosen.heads % kv_heads or chosen.head_dim > 256:
        return (
            f"--kv-heads must divide --heads and --head-dim be at most 256, not {kv_heads}, "
            f"{chosen.heads} and {chosen.head_dim}"
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="stvision tune",
        description="Find the fastest kernel shapes for a problem on this GPU and keep them.",
    )
    parser.add_argument("--grid", type=numbers, required=True, help="tokens per axis: 30,48,80")
    parser.add_argument("--window", type=numbers, required=True, help="kernel_size: 18,24,24")
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, default=None, help="as --heads when not given")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--stride", type=numbers, default=(1,))
    parser.add_argument("--dilation", type=numbers, default=(1,))
    parser.add_argument("--causal", type=numbers, default=(0,), help="1 for a causal axis: 1,0,0")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument(
        "--kernels",
        nargs="*",
        choices=[*KERNELS, *POINTER_KERNELS],
        default=None,
        help="those that a call without bias and mask runs when not given: on an NVIDIA GPU of "
        "compute capability 9 or later and without dilation the first four, else the pointers'",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kernel")
    parser.add_argument("--shapes", type=int, default=3, help="shapes of each size")
    parser.add_argument("--json", default=None, help="also write all times to this file")
    chosen = parser.parse_args(arguments)
    wrong = _refusal(chosen)
    if wrong is not None:
        print(wrong, file=sys.stderr)
        return 2
    rank = len(chosen.grid)
    problem = Problem(
        chosen.batch,
        chosen.grid,
        chosen.heads,
        chosen.head_dim,
        chosen.window * (rank if len(chosen.window) == 1 else 1),
        chosen.stride * (rank if len(chosen.stride) == 1 else 1),
        tuple(bool(c) for c in chosen.causal) * (rank if len(chosen.causal) == 1 else 1),
        chosen.kv_heads,
        chosen.dtype,
        chosen.dilation * (rank if len(chosen.dilation) == 1 else 1),
    )
    try:
        problem.axes  # noqa: B018 - checks the numbers before anything runs
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("tuning needs a GPU of NVIDIA or AMD, and torch finds none", file=sys.stderr)
        return 2
    units = not torch.version.hip and torch.cuda.get_device_capability()[0] >= 9
    boxes = units and all(axis.dilation == 1 for axis in problem.axes)
    kernels = chosen.kernels or (KERNELS if boxes else POINTER_KERNELS)
    if not boxes and set(kernels) & set(KERNELS):
        print(
            f"--kernels {' '.join(KERNELS)} need an NVIDIA GPU of compute capability 9 or later and "
            f"no dilation; take {' '.join(POINTER_KERNELS)}",
            file=sys.stderr,
        )
        return 2
    results = tune(problem, kernels, seconds=chosen.seconds, shapes=chosen.shapes)
    show(results, 5)
    print(f"kept in {triton_config.cache_file(torch.cuda.get_device_name())}")
    if chosen.json:
        rows = {
            name: [[t, astuple(tiles)] for t, tiles in found] for name, found in results.items()
        }
        with open(chosen.json, "w") as file:
            json.dump(rows, file)
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
