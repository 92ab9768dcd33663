"""A full sampling run with BroadWay against the same run without it: time and peak memory.

diffusers' ``AnimateDiffPipeline`` around a ``UNetMotionModel`` of SD-1.5 size with random weights,
16 frames of 512 x 512 pixels (64 x 64 latents), 25 steps, classifier-free guidance; texts are random
states, and latents are not decoded. Plain and guided runs take turns in one process:

    python -m benchmarks.broadway --json broadway.json

``--tiny`` tries the script anywhere; its ratios say nothing.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.seer_step import SD15
from stvision.guidance import PRESETS, BroadWay

TINY = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "block_out_channels": (16, 16, 32, 32),
    "norm_num_groups": 4,
    "down_block_types": SD15["down_block_types"],
    "up_block_types": SD15["up_block_types"],
}


def animatediff(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The pipeline, with random weights on the device and no text encoder or VAE."""
    from diffusers import (
        AnimateDiffPipeline,
        DDIMScheduler,
        MotionAdapter,
        UNet2DConditionModel,
        UNetMotionModel,
    )

    sizes: dict[str, Any] = TINY if args.tiny else SD15
    motion = {"motion_norm_num_groups": 4, "motion_num_attention_heads": 2} if args.tiny else {}
    torch.manual_seed(0)
    with torch.device(args.device):
        adapter = MotionAdapter(block_out_channels=sizes["block_out_channels"], **motion).to(dtype)
        image = UNet2DConditionModel(**sizes).to(dtype)
        unet = UNetMotionModel.from_unet2d(image, adapter)
    del image, adapter
    pipe = AnimateDiffPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet.to(args.device, dtype).eval().requires_grad_(False),
        motion_adapter=None,
        scheduler=DDIMScheduler(
            beta_schedule="linear", clip_sample=False, timestep_spacing="linspace"
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Run:
    """One call of the pipeline, timed as a whole and step by step."""

    def __init__(self, pipe: Any, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.pipe, self.args = pipe, args
        self.on_gpu = torch.device(args.device).type == "cuda"
        width = pipe.unet.config.cross_attention_dim
        generator = torch.Generator(args.device).manual_seed(0)
        shape = (2, 1, 8 if args.tiny else 77, width)
        states = torch.randn(shape, generator=generator, device=args.device, dtype=dtype)
        self.texts = {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, steps: int, stamps: list[float] | None = None) -> torch.Tensor:
        def stamp(_pipe: Any, _index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
            if stamps is not None:
                stamps.append(self._now())
            return {}

        return self.pipe(
            **self.texts,
            num_frames=self.args.frames,
            height=self.args.size,
            width=self.args.size,
            num_inference_steps=steps,
            guidance_scale=7.5,
            generator=torch.Generator(self.args.device).manual_seed(0),
            output_type="latent",
            callback_on_step_end=stamp,
        ).frames

    def measured(self) -> dict[str, Any]:
        """Seconds of a run, of its steps one by one, and its peak memory."""
        begin = self._now()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        frames = self(self.args.steps)
        seconds = self._now() - begin
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        return {"seconds": seconds, "peak": peak, "frames": frames}

    def step_times(self) -> list[float]:
        """Seconds of each step, waiting for the device after each."""
        stamps = [self._now()]
        self(self.args.steps, stamps)
        return [after - before for before, after in itertools.pairwise(stamps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="animatediff")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind, in turns")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-map-bytes", type=int, default=BroadWay.max_map_bytes)
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to try the script")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    args = parser.parse_args()
    if torch.device(args.device).type != "cuda" and not args.tiny:
        raise SystemExit("broadway measures a GPU; found none (--tiny tries the script on a CPU)")
    dtype = getattr(torch, args.dtype)
    on_gpu = torch.device(args.device).type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    print(
        f"{device}, torch {torch.__version__}, Python {platform.python_version()}, {args.dtype}, "
        f"{args.frames} frames of {args.size} x {args.size}, {args.steps} steps, {args.preset}",
        flush=True,
    )

    run = Run(animatediff(args, dtype), args, dtype)
    options = BroadWay.from_preset(args.preset, max_map_bytes=args.max_map_bytes)
    guided_steps = options.guided_steps(args.steps)
    results: dict[str, list[dict[str, Any]]] = {"plain": [], "broadway": []}
    for name in results:  # warm-up: algorithms are chosen, memory is reserved
        with options.applied_to(run.pipe) if name == "broadway" else torch.no_grad():
            run(max(2, args.steps // 5))
    records = 0
    for repeat in range(args.repeats):
        # the one that comes first alternates
        for name in sorted(results, reverse=repeat % 2 == 0):
            if name == "plain":
                results[name].append(run.measured())
            else:
                with options.applied_to(run.pipe) as record:
                    results[name].append(run.measured())
                records = len(record.records)
            last = results[name][-1]
            print(f"{name}: {last['seconds']:.3f} s, {last['peak'] / 2**30:.3f} GiB", flush=True)
    plain_steps = run.step_times()
    with options.applied_to(run.pipe):
        broadway_steps = run.step_times()

    figures: dict[str, Any] = {**vars(args), "device": device, "torch": torch.__version__}
    for name, rows in results.items():
        figures[name] = {
            "seconds": median(row["seconds"] for row in rows),
            "peak_gib": max(row["peak"] for row in rows) / 2**30,
        }
    steps = {"plain": plain_steps[:guided_steps], "broadway": broadway_steps[:guided_steps]}
    figures["guided_step_ms"] = {name: 1e3 * median(times) for name, times in steps.items()}
    figures["records"] = records
    first = results["plain"][0]["frames"]
    figures["plain_runs_bit_equal"] = all(
        torch.equal(first, row["frames"]) for row in results["plain"]
    )
    figures["broadway_changes"] = not torch.equal(first, results["broadway"][0]["frames"])
    ratios = {
        "time": figures["broadway"]["seconds"] / figures["plain"]["seconds"],
        "memory": figures["broadway"]["peak_gib"] / figures["plain"]["peak_gib"]
        if on_gpu
        else None,
        "guided step": figures["guided_step_ms"]["broadway"] / figures["guided_step_ms"]["plain"],
    }
    figures["ratios"] = ratios

    print(f"\n{records} guided maps a run in {guided_steps} of {args.steps} steps")
    print(f"plain runs bit-equal, before and after guided ones: {figures['plain_runs_bit_equal']}")
    print("\n| | plain | BroadWay | ratio | aim |\n| --- | ---: | ---: | ---: | ---: |")
    print(
        f"| sampling, s (median of {args.repeats}) | {figures['plain']['seconds']:.3f} "
        f"| {figures['broadway']['seconds']:.3f} | {ratios['time']:.3f} | 1.05 |"
    )
    if ratios["memory"] is not None:
        print(
            f"| peak memory, GiB | {figures['plain']['peak_gib']:.3f} "
            f"| {figures['broadway']['peak_gib']:.3f} | {ratios['memory']:.3f} | 1.10 |"
        )
    print(
        f"| one of the guided steps, ms | {figures['guided_step_ms']['plain']:.1f} "
        f"| {figures['guided_step_ms']['broadway']:.1f} | {ratios['guided step']:.3f} | |"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
