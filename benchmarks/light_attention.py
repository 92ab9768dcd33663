"""What attention blocks cost behind the residual blocks of a ResNet-50 for re-identification.

The light block and the non-local block at the same places: one image of 256 x 128 and last stride 1,
as on a robot, medians of single runs after a warm-up, in one process. Parameters and multiplications
are counted, too. Fresh blocks give the network's features bit by bit, which is checked first. Needs
torchvision (extra `vision`):

    python -m benchmarks.light_attention --json light_attention.json
"""

import argparse
import copy
import importlib.util
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stvision.layers.light_attention import LightAttention
from stvision.layers.non_local import NonLocalBlock
from stvision.models.placement import (
    Slot,
    attention_slots,
    measured_latency,
    place_attention,
)
from stvision.optional import mend_torchvision, require

#: stages by number, and rules by name
RULES: tuple[str | tuple[int, ...], ...] = (
    (0,),
    (1,),
    (2,),
    (3,),
    "last-block",
    "stage-ends",
    "every-block",
)

BLOCKS: dict[str, Callable[[Slot], nn.Module]] = {
    "light channel": lambda slot: LightAttention(slot.dim, "channel", channels_last=False),
    "light spatial": lambda slot: LightAttention(slot.dim, "spatial", channels_last=False),
    "light both": lambda slot: LightAttention(slot.dim, channels_last=False),
    "non-local": lambda slot: NonLocalBlock(slot.dim, channels_last=False),
}


def resnet50() -> nn.Module:
    """Random weights, last stride 1, pooled features."""
    mend_torchvision()
    models = require("torchvision.models", extra="vision", distribution="torchvision", pinned=True)
    net = models.resnet50()
    net.fc = nn.Identity()
    first = net.layer4[0]
    first.conv2.stride = first.downsample[0].stride = (1, 1)
    return net.eval()


def count(net: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Parameters, and floating-point operations of one pass."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("torchvision") is None:
        print("skipped: torchvision is missing (pip install 'stvision[vision]')")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch 1, float32")
    torch.manual_seed(0)
    net = resnet50().to(device)
    x = torch.randn(1, 3, 256, 128, device=device)
    slots = attention_slots(net, x)
    features = net(x)

    plain = copy.deepcopy(net)

    def timed() -> tuple[float, float]:
        """Median seconds with and without blocks, taken in turn: other work slows both alike."""
        torch.compiler.reset()
        pair = [torch.compile(m, dynamic=False) if args.compile else m for m in (net, plain)]
        times: list[list[float]] = [[], []]
        for i in range(args.warmup + args.runs):
            for run, taken in zip(pair, times, strict=True):
                seconds = measured_latency(partial(run, x), device, warmup=0, runs=1)
                if i >= args.warmup:
                    taken.append(seconds)
        return median(times[0]), median(times[1])

    rows: list[dict[str, Any]] = []
    print("| places | block | ms | without, ms | overhead | parameters | operations |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    parameters, operations = count(net, x)
    for rule in RULES:
        for kind, block in BLOCKS.items():
            taken = place_attention(net, slots, rule, block)
            assert torch.equal(net(x), features), "fresh blocks must leave features as they are"
            more, dearer = (
                a / b - 1 for a, b in zip(count(net, x), (parameters, operations), strict=True)
            )
            seconds, before = timed()
            label = rule if isinstance(rule, str) else f"stage {rule[0] + 1}"
            rows.append(
                {
                    "places": label,
                    "slots": len(taken),
                    "block": kind,
                    "ms": 1e3 * seconds,
                    "plain_ms": 1e3 * before,
                    "overhead": seconds / before - 1,
                    "parameters": more,
                    "operations": dearer,
                }
            )
            print(
                f"| {label} ({len(taken)}) | {kind} | {1e3 * seconds:.2f} | {1e3 * before:.2f} | "
                f"{100 * (seconds / before - 1):+.1f} % | {100 * more:+.3f} % | {100 * dearer:+.3f} % |",
                flush=True,
            )
    heavy = {row["places"]: row["overhead"] for row in rows if row["block"] == "non-local"}
    for kind in list(BLOCKS)[:-1]:
        part = max(row["overhead"] / heavy[row["places"]] for row in rows if row["block"] == kind)
        print(f"{kind}: at most {part:.2f} of the time that non-local adds at the same places")
    if args.json:
        args.json.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
