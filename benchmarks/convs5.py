"""A training step of ConvS5 over long clips: its scan against loops over frames and ConvLSTM.

One layer (system, residual readout, norm) on latents of 16 x 16, forward and backward, against the
same layer run frame by frame, against the same layer with only its recurrence in a loop, and against
ConvLSTM with as many channels: written out here (Shi et al. 2015, equation 3, with the convolution of
the input over all frames at once), and a published one where ``--peer`` names a folder with its
``convlstm.py`` (a class ``ConvLSTM(input_dim, hidden_dim, kernel_size, num_layers, batch_first)``).
Scan and loops are checked against each other first, in outputs and gradients:

    python -m benchmarks.convs5 --peer ConvLSTM_pytorch --json convs5.json
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.conv_s5 import ConvS5
from stvision.layers.linear_scan import IMPLEMENTATIONS, linear_scan, why_not_triton

Run = Callable[[Tensor], Tensor]


def by_frame(layer: ConvS5, x: Tensor) -> Tensor:
    """The layer as a loop over frames, each through the whole of it; the system is made once."""
    ssm, pad = layer.ssm, layer.ssm.kernel_size // 2
    a, b, c = ssm.system()
    into = torch.view_as_real(b).movedim(-1, 1).flatten(0, 1)
    back = torch.stack([2 * c.real, -2 * c.imag], dim=2).flatten(1, 2)
    state: Tensor | None = None
    out = []
    for frame in x.unbind(1):
        with torch.autocast(x.device.type, enabled=False):
            image = frame.permute(0, 3, 1, 2).to(into.dtype)
            pairs = F.conv2d(image, into, padding=pad).permute(0, 2, 3, 1)
            driven = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())
            state = driven if state is None else driven + a * state
            pairs = torch.view_as_real(state).flatten(-2).permute(0, 3, 1, 2)
            y = F.conv2d(pairs, back, padding=pad).permute(0, 2, 3, 1)
        y = layer.readout(y[:, None].to(layer.norm.weight.dtype), frame[:, None])[:, 0]
        out.append(layer.norm(frame + y))
    return torch.stack(out, dim=1)


@contextlib.contextmanager
def looped_scan() -> Iterator[None]:
    """Let layers run their recurrence, and only that, as a loop over frames."""
    import stvision.layers.conv_s5 as module

    def loop(b: Tensor, a: Tensor, state: Tensor | None = None, **_: Any) -> Tensor:
        x, out = state, []
        for frame in b.unbind(1):
            x = frame if x is None else frame + a * x
            out.append(x)
        return torch.stack(out, dim=1)

    kept, module.linear_scan = module.linear_scan, loop
    try:
        yield
    finally:
        module.linear_scan = kept


class ConvLSTM(nn.Module):
    """Shi et al. 2015, equation 3, with peepholes; (B, T, H, W, C) to the same, channels last.

    Args:
        dim: channels of input and state.
        size: rows and columns, on which the peephole weights depend.
        compiled: ``torch.compile`` what follows the convolution of a frame.
    """

    def __init__(self, dim: int, size: int, compiled: bool = False) -> None:
        super().__init__()
        self.input = nn.Conv2d(dim, 4 * dim, 3, padding=1)
        self.hidden = nn.Conv2d(dim, 4 * dim, 3, padding=1, bias=False)
        self.peephole = nn.Parameter(torch.zeros(3, dim, size, size))
        self.gate = torch.compile(self._gate, dynamic=False) if compiled else self._gate
        self.to(memory_format=torch.channels_last)

    def _gate(self, driven: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, c, o = driven.chunk(4, dim=1)
        w_i, w_f, w_o = self.peephole.to(cell.dtype)
        i, f = torch.sigmoid(i + w_i * cell), torch.sigmoid(f + w_f * cell)
        cell = f * cell + i * torch.tanh(c)
        return torch.sigmoid(o + w_o * cell) * torch.tanh(cell), cell

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.input(x.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, x.shape[:2])
        cell = hidden = torch.zeros_like(inputs[:, 0].chunk(4, dim=1)[0])
        out = []
        for frame in inputs.unbind(1):
            hidden, cell = self.gate(frame + self.hidden(hidden), cell)
            out.append(hidden)
        return torch.stack(out, dim=1).permute(0, 1, 3, 4, 2)


def published_convlstm(folder: Path, dim: int) -> tuple[nn.Module, Run]:
    """The class in ``convlstm.py`` of a folder, and a run on clips with channels last."""
    path = folder / "convlstm.py"
    if not path.is_file():
        raise SystemExit(f"--peer must name a folder with convlstm.py, got {folder}")
    spec = importlib.util.spec_from_file_location("published_convlstm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    net = module.ConvLSTM(dim, dim, (3, 3), 1, batch_first=True)
    return net, lambda x: net(x.permute(0, 1, 4, 2, 3))[0][0].permute(0, 1, 3, 4, 2)


def check(layer: ConvS5, loop: Callable[[ConvS5, Tensor], Tensor], x: Tensor, what: str) -> None:
    """Outputs and gradients of the layer and of a loop over it, in float64."""
    layer, x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    found = []
    for run in (layer, partial(loop, layer)):
        y = run(x)
        leaves = (x, *layer.parameters())
        # the norm at the end makes sums of squares constant: a weight for each value
        weight = torch.linspace(-1, 1, y.numel(), device=x.device, dtype=x.dtype).view(y.shape)
        found.append([y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)])
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    print(f"check in float64, scan against {what}: relative difference {worst:.1e}", flush=True)
    if not worst < 1e-7:
        raise SystemExit(f"scan and {what} differ")


def measure(run: Run, x: Tensor, leaves: list[Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds of a step and peak GiB above what lay there; 0 GiB on the CPU."""

    def step() -> None:
        y = run(x)
        torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))

    times, peak, before = [], 0.0, 0
    if x.is_cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    for i in range(2 + repeats):
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begin = perf_counter()
        step()
        if x.is_cuda:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        if i >= 2:
            times.append(1e3 * (perf_counter() - begin))
    return median(times) if times else 0.0, peak


def kernels(run: Run, x: Tensor, leaves: list[Tensor], count: int = 15) -> list[tuple[str, float]]:
    """The kernels of a step that take longest on the device, in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        measure(run, x, leaves, 0)  # two steps
    found = [
        (event.key, event.self_device_time_total / 2e3)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(found, key=lambda row: -row[1])[:count]


PRECISIONS = {
    "float32": (False, None),
    "tf32": (True, None),
    "bfloat16": (True, torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="clips; 8 on a GPU, 1 elsewhere")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--size", type=int, help="rows and columns; 16 on a GPU, 8 elsewhere")
    parser.add_argument("--dim", type=int, help="channels and states; 256 on a GPU, 32 elsewhere")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        help="of convolutions; bfloat16 by autocast (ConvS5's system stays at tf32); "
        "tf32 and bfloat16 on a GPU, float32 elsewhere",
    )
    parser.add_argument("--peer", type=Path, help="folder with a published convlstm.py")
    parser.add_argument("--compile", action="store_true", help="rows of compiled layers too")
    parser.add_argument(
        "--profile", action="store_true", help="on a GPU, also the longest kernels of the first row"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    batch, size = args.batch or (8 if gpu else 1), args.size or (16 if gpu else 8)
    dim = args.dim or (256 if gpu else 32)
    where = torch.cuda.get_device_name() if gpu else platform.processor() or "CPU"
    print(
        f"{where}, torch {torch.__version__}; forward and backward of ({batch}, {args.frames}, "
        f"{size}, {size}, {dim}), medians of {args.repeats}"
    )
    torch.manual_seed(0)
    x = torch.randn(batch, args.frames, size, size, dim, device=device).requires_grad_()
    layer = ConvS5(dim, clip_eigs=True, groups=max(1, dim // 8)).to(device)

    def scanned(x: Tensor, implementation: str, run: Run = layer) -> Tensor:
        layer.ssm.implementation = implementation
        return run(x)

    def in_loop(layer: ConvS5, x: Tensor) -> Tensor:
        with looped_scan():
            return layer(x)

    why = why_not_triton(torch.view_as_complex(torch.zeros(1, 2, device=device)))
    scans = [name for name in IMPLEMENTATIONS if name != "triton" or (gpu and why is None)]
    for name in scans:
        layer.ssm.implementation = name
        check(layer, by_frame, x[:1], f"loop over frames ({name})")
    check(layer, in_loop, x[:1], "loop in the recurrence")

    lstm = ConvLSTM(dim, size).to(device)
    runs: dict[str, tuple[Run, nn.Module]] = {
        f"ConvS5, scan ({name})": (partial(scanned, implementation=name), layer) for name in scans
    }
    runs["ConvS5, loop over frames"] = (partial(by_frame, layer), layer)
    runs["ConvS5, loop in the recurrence"] = (partial(in_loop, layer), layer)
    runs["ConvLSTM, equation 3"] = (lstm, lstm)
    if args.peer is not None:
        net, run = published_convlstm(args.peer, dim)
        runs[f"ConvLSTM, {args.peer.resolve().name}"] = (run, net.to(device))
    if args.compile:
        compiled = torch.compile(layer, dynamic=False)
        runs |= {
            f"ConvS5 compiled, scan ({name})": (
                partial(scanned, implementation=name, run=compiled),
                layer,
            )
            for name in scans
        }
        fused = ConvLSTM(dim, size, compiled=True).to(device)
        runs["ConvLSTM, equation 3, gates compiled"] = (fused, fused)

    rows: list[dict[str, Any]] = []
    print("| precision | layer | parameters | ms | peak GiB | time / first row |")
    print("| --- | --- | --- | --- | --- | --- |")
    for precision in args.precision or (["tf32", "bfloat16"] if gpu else ["float32"]):
        tf32, dtype = PRECISIONS[precision]
        first = 0.0
        for what, (run, net) in runs.items():
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, gpu
            with torch.autocast(device, dtype, enabled=dtype is not None):
                ms, peak = measure(run, x, list(net.parameters()), args.repeats)
                if args.profile and gpu and not first:
                    for name, spent in kernels(run, x, list(net.parameters())):
                        print(f"{precision}: {spent:8.3f} ms  {name[:100]}")
            first = first or ms
            count = sum(p.numel() for p in net.parameters())
            rows.append({
                "precision": precision, "layer": what, "parameters": count,
                "ms": ms, "GiB": peak, "ratio": ms / first,
            })  # fmt: skip
            print(
                f"| {precision} | {what} | {count / 1e6:.2f} M | {ms:.1f} | {peak:.2f} | "
                f"{ms / first:.2f} |",
                flush=True,
            )
    # the recurrence alone, in the layer's size
    driven = torch.randn(batch, args.frames, size, size, dim // 2, 2, device=device)
    b, a = torch.view_as_complex(driven).requires_grad_(), layer.ssm.system()[0].detach()
    a.requires_grad_()
    times = {}
    for name in scans:
        run = partial(linear_scan, a=a, implementation=name)
        times[name], peak = measure(run, b, [a], args.repeats)
        rows.append({"layer": f"scan alone ({name})", "ms": times[name], "GiB": peak})
        print(f"scan alone ({name}): {times[name]:.2f} ms, {peak:.2f} GiB", flush=True)
    if len(times) > 1:
        print(f"scan alone: {times['blocked'] / times['triton']:.2f} times")
    if args.json:
        shape = list(x.shape)
        result = {"device": where, "torch": torch.__version__, "shape": shape, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
