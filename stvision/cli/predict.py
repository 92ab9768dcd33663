"""``stvision predict``: the frames that follow a picture, as a sentence tells."""

import json as json_module
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stvision.cli.devices import choose_device
from stvision.cli.options import says_its_defaults
from stvision.cli.outputs import check_output, opened_output


@says_its_defaults
@dataclass
class Command:
    """Predict a video from one or more frames and a sentence."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLIP_OR_IMAGE")]
    """Video, GIF, folder of frames or single image that the prediction starts from."""

    prompt: str
    """What shall happen, such as "open the drawer"."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("prediction.mp4")
    """File to write; its ending chooses the kind: .mp4, .gif, .png/.jpg for a strip, or none for a
    folder of PNG frames."""

    model: str = "default"
    """"default" for the model that ships, a pipeline folder, or a hub name "owner/name"."""

    negative_prompt: str | None = None
    """What shall not happen."""

    num_frames: int | None = None
    """Length of the video, start frames included (default: as trained; longer is rolled out)."""

    num_reference_frames: int | None = None
    """How many frames of the source to start from (default: as trained)."""

    start: float = 0.0
    """Second of the source clip at which the reference frames begin."""

    size: tuple[int, int] | None = None
    """Height and width in pixels (default: as trained)."""

    fps: float | None = None
    """Frames per second of the result (default: as trained)."""

    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps (default: the model's own)."""

    guidance_scale: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"])] = None
    """How strongly the sentence guides; 1 switches guidance off (default: the model's own)."""

    seed: int = 0
    """Seed of the noise; the same seed gives the same video."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks."""

    memory: str | None = None
    """Memory that may be used, such as "8GB"; picks offload, chunk sizes and precision."""

    fast: bool = False
    """Replay steps as CUDA graphs: worth it for long videos and small frames (GPU only)."""

    broadway: str | None = None
    """Guide temporal attention for steadier structure and more motion, without training: name of a
    preset, "animatediff" or "videocrafter2"."""

    broadway_alpha: float | None = None
    """Strength of BroadWay's self-guidance, 0 to 1 (default: the preset's)."""

    broadway_beta: float | None = None
    """Smallest gain of the fast part of motion (default: the preset's)."""

    broadway_tau: float | None = None
    """Half width of the band that is amplified, in bins (default: the preset's)."""

    broadway_fraction: float | None = None
    """Share of the denoising steps that are guided (default: 0.2)."""

    local_files_only: bool = False
    """Never ask the network for a model."""

    json: bool = False
    """Print one JSON object about the result instead of a sentence."""

    quiet: bool = False
    """No progress bars."""


def run(command: Command) -> int:
    """Check, load, predict, write, and say what was written."""
    check_output(command.output)
    if not command.source.exists():
        raise FileNotFoundError(f"no clip or image at {str(command.source)!r}")
    if command.start < 0:
        raise ValueError(f"--start must be at least 0 seconds, got {command.start}")

    changes = {
        name: getattr(command, f"broadway_{name}")
        for name in ("alpha", "beta", "tau", "fraction")
        if getattr(command, f"broadway_{name}") is not None
    }
    if changes and command.broadway is None:
        raise ValueError(f"--broadway-{next(iter(changes))} needs --broadway PRESET")

    for name, least in (
        ("num_frames", 2),
        ("num_reference_frames", 1),
        ("num_inference_steps", 1),
    ):
        value = getattr(command, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}, got {value}")
    if command.fps is not None and not command.fps > 0:
        raise ValueError(f"--fps must be above 0, got {command.fps}")

    import torch
    from tqdm import tqdm

    device = choose_device(command.device)
    if command.fast and device.type != "cuda":
        raise ValueError(f"--fast replays CUDA graphs and needs a CUDA device; this is {device}")

    from stvision.guidance import BroadWay
    from stvision.pipelines.budget import parse_bytes
    from stvision.pipelines.conditioning import source_clip
    from stvision.pipelines.seer import SeerPipeline

    guidance = None
    if command.broadway is not None:
        guidance = BroadWay.from_preset(command.broadway, **changes)

    # Sizes, budget and source are checked before any weight is loaded.
    hub = {"local_files_only": True} if command.local_files_only else {}
    if command.size is not None:
        SeerPipeline.size_rules(command.model, **hub).check(*command.size)

    if command.memory is not None:
        parse_bytes(command.memory)
    source_clip(command.source, 1, start=command.start)

    began = time.perf_counter()
    with progress_bars(shown=not (command.quiet or command.json)):
        pipeline = SeerPipeline.from_pretrained(
            command.model, dtype=getattr(torch, command.dtype), **hub
        )
    pipeline.set_progress_bar_config(disable=command.quiet or command.json)
    if guidance is not None:
        pipeline.enable_broadway(guidance)
    if command.fast:
        pipeline.to(device)
        pipeline.enable_fast()
    if command.memory is not None:
        plan = pipeline.fit_memory(command.memory, device=device, verbose=not command.json)
    else:
        plan = None
        pipeline.to(device)
    loaded = time.perf_counter()

    fps = pipeline.config.fps if command.fps is None else command.fps
    wanted = command.num_reference_frames or pipeline.config.num_reference_frames
    references = source_clip(command.source, wanted, fps=fps, start=command.start)
    height, width = command.size or (None, None)
    chunks = pipeline.stream(
        command.prompt,
        references,
        negative_prompt=command.negative_prompt,
        num_frames=command.num_frames,
        height=height,
        width=width,
        num_inference_steps=command.num_inference_steps,
        guidance_scale=command.guidance_scale,
        num_reference_frames=command.num_reference_frames,
        fps=fps,
        generator=command.seed,
        output_type="pt",
    )
    # Finished frames leave at once: a video of any length needs the memory of one window.
    total = command.num_frames or pipeline.config.num_frames
    result: dict[str, Any] = {}
    stopped = False
    hidden = command.quiet or command.json or total <= pipeline.config.num_frames
    with (
        opened_output(command.output) as write,
        tqdm(total=total, unit="frame", disable=hidden) as bar,
    ):
        try:
            for chunk in chunks:
                write(chunk.clips()[0])
                result = _added(result, chunk.to_dict())
                bar.update(chunk.frames.shape[1])
        except KeyboardInterrupt:
            if not result:
                raise
            stopped = result["interrupted"] = True
    seconds = {"load": loaded - began, "predict": time.perf_counter() - loaded}
    if command.json:
        report = {
            "output": str(command.output),
            "prompt": command.prompt,
            "model": command.model,
            "seed": command.seed,
            "device": str(device),
            "fast": command.fast,
            "broadway": None if guidance is None else asdict(guidance),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "memory_plan": None if plan is None else plan.to_dict(),
            **result,
        }
        print(json_module.dumps(report))
    else:
        count, _, height, width = result["shape"][1:]
        print(
            f"{'interrupted; ' if stopped else ''}wrote {command.output}: {count} frames of "
            f"{height} x {width} pixels at {fps:g} frames per second, predicted in "
            f"{seconds['predict']:.1f} s on {device}"
        )
    return 130 if stopped else 0


def _added(whole: dict[str, Any], chunk: dict[str, Any]) -> dict[str, Any]:
    """What is known of a video after one more chunk of its frames."""
    if not whole:
        return chunk
    times = [
        [*first, *second] for first, second in zip(whole["times"], chunk["times"], strict=True)
    ]
    return {**chunk, "times": times, "shape": [1, len(times[0]), *chunk["shape"][2:]]}


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Let diffusers and transformers load without their bars, where they are not wanted."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [
        library
        for library in (diffusers_logging, transformers_logging)
        if not shown and library.is_progress_bar_enabled()
    ]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
