"""Backbones and their attention against their peers, forward and backward, in one process.

Bi-level routing without copies of keys (Triton kernels, FlexAttention with a block mask, or one copy
at a time) against the gather of its authors; BiFormer by default and with the kernels; DaViT and HaloNet against timm, where timm is
installed; a video NAT with one backend of its kernels against FlexAttention. Each pair is checked
against each other before it is timed:

    python -m benchmarks.backbones --json backbones.json
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from stvision.attention.routing import HAS_TRITON, bilevel_routing_attention, why_not_triton
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


def measure(run: Run, leaves: list[Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds and peak MiB above what lay there before; memory is 0 on the CPU."""
    cuda = leaves[0].is_cuda
    for _ in range(3):
        step(run, leaves)
    peak = 0.0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(run, leaves)
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        step(run, leaves)
        if cuda:
            torch.cuda.synchronize()
        times.append((perf_counter() - begin) * 1e3)
    return median(times), peak


class Table:
    """Rows of what was measured, printed as they come."""

    def __init__(self, repeats: int, file: Path | None, facts: dict[str, object]) -> None:
        self.repeats, self.file, self.facts = repeats, file, facts
        self.rows: list[dict[str, object]] = []

    def add(
        self, what: str, ours: Run, peer: Run, leaves: list[Tensor], peers: list[Tensor]
    ) -> None:
        first, second = ours().detach(), peer().detach()
        difference = float((first - second).abs().max() / second.abs().max())
        if difference > 0.05:
            raise SystemExit(f"{what}: results differ by {difference:.3f} of the largest value")
        (a, a_peak), (b, b_peak) = (
            measure(run, given, self.repeats) for run, given in ((ours, leaves), (peer, peers))
        )
        row = {"what": what, "ms": a, "peer_ms": b, "MiB": a_peak, "peer_MiB": b_peak}
        self.rows.append(row)
        memory = f", {a_peak:.0f} against {b_peak:.0f} MiB" if b_peak else ""
        share = f" ({b_peak / a_peak:.2f} times)" if a_peak else ""
        print(f"{what}: {a:.2f} against {b:.2f} ms ({b / a:.2f} times){memory}{share}", flush=True)
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
            table.add(what, partial(run, implementation=name), gather, leaves, leaves)


def pair(
    table: Table,
    what: str,
    ours: nn.Module,
    peer: nn.Module,
    x: Tensor,
    channels_last: bool,
) -> None:
    """Two models with the same weights on the same input."""
    ours, peer = (model.to(x.device, x.dtype).eval() for model in (ours, peer))
    theirs = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    table.add(
        what,
        partial(ours, x),
        partial(peer, theirs),
        list(ours.parameters()),
        list(peer.parameters()),
    )


def models(table: Table, device: str, dtype: torch.dtype, batch: int) -> None:
    """Whole networks against their peers."""
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    peer = create_backbone("biformer_tiny", num_classes=10, implementation="gather")
    named: list[str | None] = [None]
    if device == "cuda" and HAS_TRITON:
        named.append("triton")
    for name in named:
        ours = create_backbone("biformer_tiny", num_classes=10, implementation=name)
        ours.load_state_dict(peer.state_dict())
        what = f"biformer_tiny at 224, {name or 'default'} against gather"
        pair(table, what, ours, peer, x, False)

    if device == "cuda":
        clip = torch.randn(1, 3, 16, 224, 224, device=device, dtype=dtype)
        options = {"depths": (1, 1, 1, 1), "dilations": [[1]] * 4, "num_classes": 10, "frames": 16}
        ours = create_backbone("nat_mini", **options)
        peer = create_backbone("nat_mini", backend="flex", **options)
        for model in (ours, peer):  # FlexAttention takes no bias table
            for module in model.modules():
                if hasattr(module, "rpb"):
                    module.rpb = None
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
    parser.add_argument("--repeats", type=int, default=10)
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
