"""One denoising step, and one training step, of an SD-1.5-sized Seer against its peer.

Random weights, bf16, 256 x 256 pixels (32 x 32 latents). The peer is diffusers' ``UNetMotionModel``
(AnimateDiff) inflated from the same image U-Net; ``plain`` is our own network with the windowed
causal attention written out (scores, mask, softmax). All of it in one process:

    python -m benchmarks.seer_step --frames 12 16 --batch 1 4 --json seer_step.json
"""

import argparse
import gc
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from stvision.attention import VolumeAttention
from stvision.models.fast import fast
from stvision.models.seer import SeerUNetModel
from stvision.train.graphed import GraphedStep

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

#: substring of a kernel's name -> operator class, first match wins
KERNELS = (
    ("flash", "attention"),
    ("fmha", "attention"),
    ("sdpa", "attention"),
    ("softmax", "attention"),
    ("conv", "convolution"),
    ("cudnn", "convolution"),
    ("xmma_fprop", "convolution"),
    ("gemm", "matrix product"),
    ("nvjet", "matrix product"),
    ("cutlass", "matrix product"),
    ("norm", "normalisation"),
    ("RowwiseMoments", "normalisation"),
    ("copy", "copy and layout"),
    ("cat", "copy and layout"),
    ("nchwToNhwc", "copy and layout"),
    ("nhwcToNchw", "copy and layout"),
    ("elementwise", "elementwise"),
    ("triton", "fused (compiled)"),
)


def image_unet(dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        return UNet2DConditionModel(**SD15).to(dtype).eval().requires_grad_(False)


def motion_unet(dtype: torch.dtype):
    from diffusers import MotionAdapter, UNetMotionModel

    with torch.device("cuda"):
        adapter = MotionAdapter(motion_max_seq_length=32)
        model = UNetMotionModel.from_unet2d(image_unet(dtype), adapter)
    return model.to("cuda", dtype).eval().requires_grad_(False)


def seer_unet(dtype: torch.dtype):
    model = SeerUNetModel.from_unet2d(image_unet(dtype)).to("cuda", dtype)
    # a fresh temporal layer adds exactly zero; real ones do not
    for name, parameter in model.named_parameters():
        if "temporal_attentions" in name and "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def temporal_backend(model: SeerUNetModel, backend: str) -> None:
    """Switch the temporal attention alone; image attention stays on SDPA."""
    for module in model.modules():
        if isinstance(module, VolumeAttention):
            module.backend = backend


def timed(call: Callable[[], object], repeats: int, warmup: int = 5) -> tuple[float, float]:
    """Median milliseconds by device events, and peak GiB over all repeats."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times), torch.cuda.max_memory_allocated() / 2**30


def operator_classes(call: Callable[[], object]) -> tuple[dict[str, float], int]:
    """Device milliseconds by operator class in one call, and its number of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    kernels = 0
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kernels += 1
        name = event.name.lower()
        kind = next((label for part, label in KERNELS if part.lower() in name), "other")
        spent[kind] += event.device_time_total / 1e3
    return {kind: round(ms, 2) for kind, ms in spent.most_common()}, kernels


class Case:
    """Inputs of one size in the layouts of both networks."""

    def __init__(self, batch: int, frames: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

        self.sample = draw(batch, 4, frames, 32, 32)
        self.text = draw(batch, frames, 77, 768)
        self.timestep = torch.tensor(500, device="cuda")

    def seer(self, model) -> Tensor:
        return model(self.sample, self.timestep, self.text, cond_frames=1).sample

    def motion(self, model) -> Tensor:
        # UNetMotionModel wants the text states of every frame in the batch
        return model(self.sample, self.timestep, self.text.flatten(0, 1)).sample


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure(args: argparse.Namespace) -> list[dict]:
    dtype = torch.bfloat16
    rows: list[dict] = []

    def note(case: tuple[int, int], name: str, ms: float, gib: float, **more: object) -> None:
        row = {"batch": case[0], "frames": case[1], "variant": name}
        row |= {"ms": round(ms, 2), "peak_gib": round(gib, 2), **more}
        rows.append(row)
        print(json.dumps(row), flush=True)

    if args.denoise:
        denoising(args, dtype, note)
    if args.train:
        training(args, dtype, note)
    return rows


def denoising(args: argparse.Namespace, dtype: torch.dtype, note: Callable) -> None:
    """One evaluation of the network, as a sampler makes it."""
    cases = [(batch, frames) for frames in args.frames for batch in args.batch]
    with torch.no_grad():
        model = motion_unet(dtype)
        for case in cases:
            inputs = Case(*case, dtype)
            note(case, "motion eager", *timed(partial(inputs.motion, model), args.repeats))
        if args.compile:
            compiled = torch.compile(model)
            for case in cases[: args.compile]:
                inputs = Case(*case, dtype)
                begin = time.perf_counter()
                inputs.motion(compiled)
                cold = round(time.perf_counter() - begin, 1)
                result = timed(partial(inputs.motion, compiled), args.repeats)
                note(case, "motion compiled", *result, cold_start_s=cold)
            del compiled
            torch.compiler.reset()
        for case in cases[:1]:
            inputs = Case(*case, dtype)
            classes, kernels = operator_classes(partial(inputs.motion, model))
            print(f"motion kernels {kernels}, device ms by class: {classes}")
        del model
        release()

        model = seer_unet(dtype)
        for case in cases:
            inputs = Case(*case, dtype)
            eager = inputs.seer(model)
            note(case, "seer eager", *timed(partial(inputs.seer, model), args.repeats))
            with fast(model):
                begin = time.perf_counter()
                inputs.seer(model)
                cold = round(time.perf_counter() - begin, 1)
                same = bool(torch.equal(inputs.seer(model), eager))
                result = timed(partial(inputs.seer, model), args.repeats)
                note(case, "seer fast", *result, cold_start_s=cold, bit_equal=same)
            release()
        for case in cases[: args.compile]:
            inputs = Case(*case, dtype)
            eager = inputs.seer(model).float()
            with fast(model, compile=True):
                begin = time.perf_counter()
                inputs.seer(model)
                cold = round(time.perf_counter() - begin, 1)
                out = inputs.seer(model).float()
                error = ((out - eager).norm() / eager.norm()).item()
                result = timed(partial(inputs.seer, model), args.repeats)
                note(case, "seer fast compiled", *result, cold_start_s=cold, relative_error=error)
            torch.compiler.reset()
            release()
        for case in cases[:1]:
            inputs = Case(*case, dtype)
            classes, kernels = operator_classes(partial(inputs.seer, model))
            print(f"seer kernels {kernels}, device ms by class: {classes}")
        model.to(memory_format=torch.channels_last)
        for case in cases:
            inputs = Case(*case, dtype)
            note(
                case, "seer eager channels-last", *timed(partial(inputs.seer, model), args.repeats)
            )
            with fast(model):
                result = timed(partial(inputs.seer, model), args.repeats)
                note(case, "seer fast channels-last", *result)
            release()
        model.to(memory_format=torch.contiguous_format)
        temporal_backend(model, "math")
        for case in cases:
            inputs = Case(*case, dtype)
            note(case, "seer plain", *timed(partial(inputs.seer, model), args.repeats))
        temporal_backend(model, "sdpa")
        del model
        release()


def training(args: argparse.Namespace, dtype: torch.dtype, note: Callable) -> None:
    """Forward and backward with only the temporal layers trained, as in the paper."""
    cases = [(batch, args.frames[0]) for batch in args.batch]
    model = seer_unet(dtype)
    for parameter in model.temporal_parameters():
        parameter.requires_grad_(True)

    def step(forward: Callable, model: torch.nn.Module) -> None:
        forward(model).square().mean().backward()
        model.zero_grad(set_to_none=True)

    for case in cases:
        inputs = Case(*case, dtype)
        for backend, name in (("sdpa", "seer train"), ("math", "seer plain train")):
            temporal_backend(model, backend)
            note(case, name, *timed(partial(step, inputs.seer, model), args.repeats))
        temporal_backend(model, "sdpa")
        note(case, "seer fast train", *timed(captured(inputs, model), args.repeats))
        release()
    del model
    release()
    model = motion_unet(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    for case in cases:
        inputs = Case(*case, dtype)
        note(case, "motion train", *timed(partial(step, inputs.motion, model), args.repeats))


def captured(inputs: Case, model: SeerUNetModel) -> Callable[[], object]:
    """The same training step as one CUDA graph, as ``loop.cuda_graphs`` of the trainer makes it."""
    for parameter in model.temporal_parameters():
        parameter.grad = torch.zeros_like(parameter)
    graphed = GraphedStep(
        lambda sample, text: {
            "loss": model(sample, inputs.timestep, text, cond_frames=1).sample.square().mean()
        },
        lambda loss: loss.backward(),
        model,
    )

    def step() -> None:
        graphed({"sample": inputs.sample, "text": inputs.text})
        model.zero_grad(set_to_none=False)

    return step


def table(rows: list[dict]) -> str:
    """Rows with their ratio to the peer's: a denoising step to one, a training step to one."""
    lines = ["| batch | frames | variant | ms | peak GiB | time / motion |", "|---" * 6 + "|"]
    base = {(r["batch"], r["frames"], r["variant"]): r["ms"] for r in rows}
    for row in sorted(rows, key=lambda r: (r["frames"], r["batch"])):
        peer = "motion train" if "train" in row["variant"] else "motion eager"
        ratio = row["ms"] / base[row["batch"], row["frames"], peer]
        lines.append(
            f"| {row['batch']} | {row['frames']} | {row['variant']} | {row['ms']:.1f} "
            f"| {row['peak_gib']:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[12, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--compile", type=int, default=1, help="how many of the cases to compile, 0 for none"
    )
    parser.add_argument("--denoise", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("seer_step measures a GPU; found none")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Python {platform.python_version()}, bf16, 32x32")
    rows = measure(args)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
