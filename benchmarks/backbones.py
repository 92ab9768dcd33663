"""Backbones and their attention against their peers, forward and backward, in one process.

Bi-level routing without copies of keys (Triton kernels, FlexAttention with a block mask, or one copy
at a time) against the gather of its authors, alone and in BiFormer; DaViT and HaloNet against timm,
where timm is installed; a video NAT with one backend of its kernels against FlexAttention. Each pair
is checked against each other before it is timed, in turns.

Eager times are the host's as much as the device's: a batch of small images keeps a large GPU busy for
less time than Python needs to launch its kernels. So networks and our kernels are timed as CUDA
graphs too, whose replay is the device's time alone:

    python -m benchmarks.backbones --json backbones.json
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from stvision.attention.routing import bilevel_routing_attention, why_not_triton
from stvision.models.backbones import create_backbone
from stvision.models.davit import convert_davit_state_dict
from stvision.models.halonet import convert_halonet_state_dict
from stvision.optional import mend_torchvision

Run = Callable[[], Tensor]


def step(run: Run, leaves: list[Tensor]) -> Tensor:
    """One forward and backward; gradients are dropped, the output is kept."""
    out = run()
    torch.autograd.grad(out.float().square().mean(), leaves)
    return out.detach()


def timed(runs: Sequence[Callable[[], object]], repeats: int, cuda: bool) -> list[float]:
    """Median milliseconds of each, run in turns so that a drift of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            begin = perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            found.append((perf_counter() - begin) * 1e3)
    return [median(found) for found in times]


def measure(
    runs: Sequence[Run], leaves: Sequence[list[Tensor]], repeats: int
) -> tuple[list[float], list[float]]:
    """Median milliseconds of steps and peak MiB above what lay there before, 0 on the CPU."""
    cuda = leaves[0][0].is_cuda
    steps = [partial(step, run, given) for run, given in zip(runs, leaves, strict=True)]
    peaks = []
    for one in steps:
        for _ in range(3):
            one()
        peak = 0.0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            one()
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        peaks.append(peak)
    return timed(steps, repeats, cuda), peaks


def graph(run: Run, leaves: list[Tensor]) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph.

    Raises:
        RuntimeError: the step waits for the device or does what else a graph cannot hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once must not be made inside the graph
        for _ in range(3):
            step(run, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        step(run, leaves)
    return found


def replayed(
    runs: Sequence[Run], leaves: Sequence[list[Tensor]], repeats: int
) -> list[float] | None:
    """Median milliseconds of replayed graphs of steps; ``None`` where one cannot be captured."""
    try:
        graphs = [graph(run, given) for run, given in zip(runs, leaves, strict=True)]
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"  no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return None
    replays = [found.replay for found in graphs]
    timed(replays, 3, True)
    return timed(replays, repeats, True)


class Table:
    """Rows of what was measured, printed as they come."""

    def __init__(self, repeats: int, file: Path | None, facts: dict[str, object]) -> None:
        self.repeats, self.file, self.facts = repeats, file, facts
        self.rows: list[dict[str, object]] = []

    def add(
        self,
        what: str,
        ours: Run,
        peer: Run,
        leaves: list[Tensor],
        peers: list[Tensor],
        graphs: bool = False,
    ) -> None:
        first, second = ours().detach(), peer().detach()
        difference = float((first - second).abs().max() / second.abs().max())
        if difference > 0.05:
            raise SystemExit(f"{what}: results differ by {difference:.3f} of the largest value")
        runs, given = (ours, peer), (leaves, peers)
        (a, b), (a_peak, b_peak) = measure(runs, given, self.repeats)
        row: dict[str, object] = {"what": what, "ms": a, "peer_ms": b}
        row |= {"MiB": a_peak, "peer_MiB": b_peak}
        self.rows.append(row)
        memory = f", {a_peak:.0f} against {b_peak:.0f} MiB" if b_peak else ""
        share = f" ({b_peak / a_peak:.2f} times)" if a_peak else ""
        print(f"{what}: {a:.2f} against {b:.2f} ms ({b / a:.2f} times){memory}{share}", flush=True)
        replays = replayed(runs, given, self.repeats) if graphs and leaves[0].is_cuda else None
        if replays is not None:
            row["graph_ms"], row["peer_graph_ms"] = a, b = replays
            print(f"  as CUDA graphs: {a:.2f} against {b:.2f} ms ({b / a:.2f} times)", flush=True)
        if self.file is not None:  # a run that is cut short leaves what it measured
            self.file.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1))


def routing(table: Table, device: str, dtype: torch.dtype, batch: int) -> None:
    """The attention alone at k = 4, on a map of 56 x 56 and on a clip of 16 x 28 x 28."""
    for grid, region in (
        ((1, 56, 56), (1, 8, 8)),
        ((16, 28, 28), (16, 4, 4)),
        ((16, 28, 28), (1, 4, 4)),
    ):
        leaves = [
            torch.randn(batch, *grid, 4, 32, device=device, dtype=dtype).requires_grad_()
            for _ in range(3)
        ]
        run = partial(bilevel_routing_attention, *leaves, region=region, topk=4)
        gather = partial(run, implementation="gather")
        names = ["flex", "blocked"] if device == "cuda" else ["blocked"]
        if device == "cuda" and why_not_triton(*leaves) is None:
            names.insert(0, "triton")
        for name in names:
            what = f"routing {grid}, regions {region}, {name} against gather"
            graphs = name == "triton"
            table.add(what, partial(run, implementation=name), gather, leaves, leaves, graphs)


def pair(
    table: Table,
    what: str,
    ours: nn.Module,
    peer: nn.Module,
    x: Tensor,
    channels_last: bool,
) -> None:
    """Two models with the same weights on the same input, in one memory format."""
    ours, peer = (model.to(x.device, x.dtype).eval() for model in (ours, peer))
    if channels_last:
        for model in (ours, peer):
            cast(Any, model).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    table.add(
        what,
        partial(ours, x),
        partial(peer, x),
        list(ours.parameters()),
        list(peer.parameters()),
        graphs=True,
    )


def models(table: Table, device: str, dtype: torch.dtype, batch: int) -> None:
    """Whole networks against their peers."""
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    peer = create_backbone("biformer_tiny", num_classes=10, implementation="gather")
    ours = create_backbone("biformer_tiny", num_classes=10)
    ours.load_state_dict(peer.state_dict())
    pair(table, "biformer_tiny at 224 against gather", ours, peer, x, False)

    if device == "cuda":
        clip = torch.randn(1, 3, 16, 224, 224, device=device, dtype=dtype)
        options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dilations": [[1]] * 4}
        options |= {"num_classes": 10, "frames": 16}
        ours = create_backbone("nat_mini", **options)
        peer = create_backbone("nat_mini", backend="flex", **options)
        for model in (ours, peer):  # FlexAttention takes no bias table
            for module in model.modules():
                if hasattr(module, "rpb"):
                    cast(Any, module).rpb = None
        peer.load_state_dict(ours.state_dict())
        pair(table, "video NAT at (16, 56, 56) against FlexAttention", ours, peer, clip, False)

    mend_torchvision()
    try:
        import timm
    except ImportError:
        print("timm is not installed: no rows for DaViT and HaloNet")
        return
    for name, convert, size in (
        ("davit_tiny", convert_davit_state_dict, 224),
        ("halonet26t", convert_halonet_state_dict, 256),
    ):
        peer = timm.create_model(name, num_classes=10)
        ours = create_backbone(name, num_classes=10)
        ours.load_state_dict(convert(peer.state_dict()))
        x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        pair(table, f"{name} at {size} against timm", ours, peer, x, False)
        pair(table, f"{name} at {size} against timm, channels last", ours, peer, x, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="images of a batch; 16 on a GPU, 1 elsewhere")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--only", nargs="*", choices=("routing", "models"), help="parts; all by default"
    )
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = arguments.batch or (16 if device == "cuda" else 1)
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"{where}, torch {torch.__version__}, {dtype}, batch {batch}; forward and backward")
    torch.manual_seed(0)
    facts = {"device": where, "torch": torch.__version__, "batch": batch}
    table = Table(arguments.repeats, arguments.json, facts)
    for part in (routing, models):
        if not arguments.only or part.__name__ in arguments.only:
            part(table, device, dtype, batch)


if __name__ == "__main__":
    main()
