"""``python -m benchmarks.neighborhood_tuning``: tune the box kernels for the benchmark's cases.

Prints the fastest shapes of each kernel, then the lines of the shipped table
(``kernels/neighborhood/triton_config.py``), and writes all times as JSON.
"""

import argparse
import json
import time
from dataclasses import astuple

import torch

from benchmarks.neighborhood import GPU_CASES
from stvision.kernels.neighborhood import triton_config
from stvision.kernels.neighborhood.tune import Problem, show, tune


def main() -> int:
    cases = {case.name: case for case in GPU_CASES if case.dilation == 1}
    parser = argparse.ArgumentParser(description="Tune the kernels for the benchmark's cases.")
    parser.add_argument("--cases", nargs="*", choices=sorted(cases), default=list(cases))
    parser.add_argument("--kernels", nargs="*", choices=triton_config.KERNELS, default=["forward"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kernel of a case")
    parser.add_argument("--shapes", type=int, default=3, help="shapes of each size")
    parser.add_argument("--rows", type=int, default=6, help="rows to print of each kernel")
    parser.add_argument("--workers", type=int, default=None, help="processes that compile")
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    every: dict[str, dict] = {}
    lines = []
    for name in arguments.cases:
        case = cases[name]
        heads = case.heads
        # a quarter of a large problem takes a quarter of the time, with the same shapes
        if case.name.startswith(("hunyuan", "cosmos")):
            heads = max(1, case.heads // 4)
        problem = Problem(case.batch, case.grid, heads, case.dim, case.window, case.stride)
        start = time.perf_counter()
        results = tune(
            problem,
            arguments.kernels,
            seconds=arguments.seconds,
            shapes=arguments.shapes,
            workers=arguments.workers,
        )
        print(f"{name} ({heads} of {case.heads} heads), {time.perf_counter() - start:.0f} s")
        show(results, arguments.rows)
        every[name] = {
            kernel: [[ms, astuple(tiles)] for ms, tiles in found]
            for kernel, found in results.items()
        }
        for kernel, found in results.items():
            if found:
                key = triton_config.problem_key(kernel, problem.axes, case.dim, 2)  # type: ignore[arg-type]
                tiles = found[0][1]
                numbers = f"{tiles.query}, {tiles.key}, {tiles.warps}, {tiles.stages}"
                lines.append(f'    "{key}": Tiles({numbers}),')
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump({"device": torch.cuda.get_device_name(), "cases": every}, file)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
