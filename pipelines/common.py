"""What every video pipeline shares: size rules, results, loading and saving, memory, cancelling."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.pipelines import pipeline_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn

import stvision
from stvision.io import Clip
from stvision.pipelines.memory import (
    ALLOCATOR_SLACK,
    MemoryPlan,
    Offload,
    activation_bytes,
    decode_frames,
    encode_frames,
    largest_layer_bytes,
    peak_memory_bytes,
    reset_peak_memory,
    weight_bytes,
)

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

#: Weights that ship with the project: name -> folder under ``stvision/weights``.
PACKAGED_WEIGHTS = {"default": "seer-default"}

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


# ---------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class SizeRules:
    """Which sizes a model can make, known from its configuration alone.

    Args:
        multiple: height and width are multiples of this many pixels.
    """

    multiple: int

    def valid(self, height: int, width: int) -> bool:
        """Whether frames of ``height`` x ``width`` pixels can be made."""
        return min(height, width) > 0 and not (height % self.multiple or width % self.multiple)

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The valid size closest to the one asked for."""
        return self._around(height)[0], self._around(width)[0]

    def check(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest valid values, when a size cannot be made."""
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.multiple:
                nearest = " or ".join(map(str, sorted(self._around(value))))
                raise ValueError(
                    f"{name} must be a multiple of {self.multiple} pixels, got {value}; the "
                    f"nearest valid values are {nearest}"
                )

    def _around(self, value: int) -> list[int]:
        """The multiples on both sides, the nearer one first."""
        below = max(value // self.multiple, 1) * self.multiple
        return sorted({below, below + self.multiple}, key=lambda item: abs(item - value))


def check_output_type(output_type: str) -> None:
    """Raise ValueError unless ``output_type`` is one that every pipeline knows."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}")


def parse_bytes(budget: float | str) -> int:
    """Bytes of ``8_000_000_000``, ``"8GB"`` (powers of ten) or ``"7.5 GiB"`` (powers of two)."""
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        value = float(budget)
    else:
        text = str(budget).strip().lower()
        number = text.rstrip("bgikm ")
        unit = text[len(number) :].strip()
        try:
            value = float(number) * _UNITS["" if unit == "b" else unit]
        except (KeyError, ValueError):
            raise ValueError(
                f"a byte budget is a number or text such as '8GB' or '7.5GiB', got {budget!r}"
            ) from None
    if not value > 0:
        raise ValueError(f"a byte budget must be positive, got {budget!r}")
    return int(value)


# ---------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class Drift:
    """How far the last frame's average colour is from the first frame's.

    Args:
        brightness: difference of mean luma (Rec. 709), from -1 (darker) to 1 (brighter).
        colour: length of the difference of mean chroma (Cb, Cr), 0 for none.
    """

    brightness: float
    colour: float


class DriftMeter:
    """Follows brightness and colour over the chunks of a stream; remembers two averages a clip."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def update(self, frames: Tensor) -> list[Drift]:
        """Add frames (B, 3, T, H, W) in [0, 1] and return the drift of each clip so far."""
        means = frames.double().mean((-2, -1)).cpu()
        red, green, blue = means.unbind(1)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        ycc = torch.stack([luma, (blue - luma) / 1.8556, (red - luma) / 1.5748], dim=1)
        if self._first is None:
            self._first = ycc[:, :, 0]
        self._last = ycc[:, :, -1]
        change = self._last - self._first
        return [Drift(float(item[0]), float(item[1:].norm())) for item in change]


@dataclass
class VideoOutput(BaseOutput):
    """What a video pipeline returns; also readable as a dict or, by index, as a tuple.

    Args:
        frames: by ``output_type``: ``"pil"``: list of lists of images; ``"np"``: float32
            (B, T, H, W, 3) in [0, 1]; ``"pt"``: float (B, T, 3, H, W) in [0, 1]; ``"latent"``:
            scaled latents (B, C, T, h, w).
        times: seconds of every frame, float64 (B, T).
        fps: frames per second of each clip.
        drift: brightness and colour drift of each clip; None for latents.
        interrupted: whether the call was stopped before its end.
        peak_memory: peak bytes: allocated during the call on a GPU, else resident in the process
            since its start.
    """

    frames: Any
    times: Tensor | None = None
    fps: list[float] | None = None
    drift: list[Drift] | None = None
    interrupted: bool = False
    peak_memory: int | None = None

    def clips(self) -> list[Clip]:
        """The videos as clips that carry their times, ready for ``stvision.io.save_clip``."""
        if isinstance(self.frames, Tensor) and self.frames.shape[2] != 3:
            raise ValueError("latents are no pictures; ask the pipeline for another output_type")
        clips = []
        for index, video in enumerate(self.frames):
            if isinstance(video, Tensor):
                pixels = video.movedim(1, -1).float().cpu()
            elif isinstance(video, np.ndarray):
                pixels = torch.from_numpy(video)
            else:
                pixels = torch.from_numpy(np.stack([np.asarray(image) for image in video]))
            fps = 8.0 if self.fps is None else self.fps[index]
            times = torch.arange(len(pixels), dtype=torch.float64) / fps
            if self.times is not None:
                times = self.times[index]
            clips.append(Clip(frames=pixels, times=times, fps=fps, audio=None))
        return clips

    def to_dict(self) -> dict[str, Any]:
        """Plain values without pixels, for JSON."""
        shape = list(getattr(self.frames, "shape", ()))
        if not shape and len(self.frames):
            first: Image.Image = self.frames[0][0]
            shape = [len(self.frames), len(self.frames[0]), first.height, first.width, 3]
        return {
            "shape": shape,
            "times": None if self.times is None else self.times.tolist(),
            "fps": self.fps,
            "drift": None if self.drift is None else [asdict(item) for item in self.drift],
            "interrupted": self.interrupted,
            "peak_memory": self.peak_memory,
        }


def convert_frames(frames: Tensor, output_type: str) -> Any:
    """Decoded frames (B, 3, T, H, W), about [-1, 1], as ``output_type`` asks (see VideoOutput)."""
    return VideoProcessor().postprocess_video(frames.float(), output_type=output_type)


def join_frames(parts: list[Any]) -> Any:
    """Put chunks of one kind of output together along time."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts, dim=2 if first.shape[2] != 3 else 1)
    if isinstance(first, np.ndarray):
        return np.concatenate(parts, axis=1)
    return [[image for part in parts for image in part[index]] for index in range(len(first))]


# ---------------------------------------------------------------------------------------------
# Finding folders


def resolve_folder(name: str | os.PathLike[str], **hub: Any) -> Path:
    """Folder of a pipeline: a packaged name, a local folder, or a repository of the model hub.

    A hub repository is asked for only when nothing local has that name, through the hub's own
    cache; ``HF_HUB_OFFLINE=1`` and ``local_files_only=True`` keep it off the network.

    Args:
        name: ``"default"``, a path, or ``"owner/name"``.
        hub: ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only``.

    Raises:
        FileNotFoundError: the packaged weights are absent, or a path leads nowhere.
    """
    if os.path.isdir(name):
        return Path(name)
    text = os.fspath(name)
    if text in PACKAGED_WEIGHTS:
        folder = Path(stvision.__file__).parent / "weights" / PACKAGED_WEIGHTS[text]
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"the weights {text!r} are not part of this installation (looked in {folder})"
            )
        return folder
    is_repository = text.count("/") == 1 and not text.startswith((".", "~", "/"))
    if isinstance(name, os.PathLike) or not is_repository:
        raise FileNotFoundError(
            f"no pipeline folder at {text!r}; give a folder, a hub name 'owner/name' or one of "
            f"{sorted(PACKAGED_WEIGHTS)}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return Path(snapshot_download(text, allow_patterns=patterns, **hub))


# ---------------------------------------------------------------------------------------------
# The base of all pipelines


class VideoPipeline(DiffusionPipeline):
    """A diffusers pipeline that makes videos: what is the same whatever the model.

    Subclasses implement ``__call__`` and ``activation_needs``; they encode and decode through
    ``self.encode`` and ``self.decode``.
    """

    _optional_components = ["tokenizer", "text_encoder"]  # noqa: RUF012
    _interrupt: bool = False
    _num_timesteps: int = 0
    #: Frames that the VAE takes at once; None for all. ``fit_memory`` sets it.
    vae_chunk: int | None = None
    #: Whether the VAE works in tiles during calls of this pipeline. ``fit_memory`` sets it.
    vae_tiling: bool = False
    #: Whether both branches of guidance run as one batch. ``fit_memory`` sets it.
    batch_guidance: bool = True
    #: Print the peak memory of each call.
    report_memory: bool = False
    vae: Any
    config: Any  # type: ignore[assignment]

    # -- loading and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a pipeline folder.

        Args:
            name: ``"default"`` for the weights that ship with the project, a local folder, or a
                hub repository ``"owner/name"``.
            kwargs: as for diffusers' ``DiffusionPipeline.from_pretrained``: ``dtype``,
                ``variant``, ``local_files_only``, components that replace those of the folder, ...

        Raises:
            FileNotFoundError: there is no such folder.
        """
        hub_names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
        hub = {key: kwargs.pop(key) for key in hub_names if key in kwargs}
        folder = resolve_folder(name, **hub)
        if not (folder / cls.config_name).is_file():
            raise FileNotFoundError(f"{folder} is no pipeline folder: it has no {cls.config_name}")
        # diffusers renamed the argument; either name works here, with any version.
        spelled = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
        for name_of_dtype in ("dtype", "torch_dtype"):
            if name_of_dtype in kwargs:
                kwargs[spelled] = kwargs.pop(name_of_dtype)
        pipeline = super().from_pretrained(str(folder), local_files_only=True, **kwargs)
        pipeline.register_to_config(_name_or_path=os.fspath(name))
        return pipeline

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Write the folder beside its final place, then move it there.

        Components that come from an installed package (``text_model`` in the configuration) are
        referred to, not written; ``save_text=True`` writes them too. Everything else is as in
        diffusers.
        """
        save_text = kwargs.pop("save_text", None)
        if kwargs.get("push_to_hub"):
            return super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        target = Path(save_directory)
        if target.is_file():
            raise FileExistsError(f"{target} is a file; save_pretrained needs a folder")
        target.mkdir(parents=True, exist_ok=True)
        packaged = getattr(self.config, "text_model", None) is not None
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            with self._without_text(packaged and not save_text):
                super().save_pretrained(str(staging), *args, **kwargs)
            # Lets diffusers' own DiffusionPipeline.from_pretrained find the class, when it is
            # called with custom_pipeline="pipeline", trust_remote_code=True.
            name = type(self).__name__
            (staging / "pipeline.py").write_text(f"from stvision import {name}  # noqa: F401\n")
            entries = sorted(staging.iterdir(), key=lambda item: item.name == self.config_name)
            for entry in entries:
                place = target / entry.name
                if place.is_dir():
                    shutil.rmtree(place)
                os.replace(entry, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _without_text(self, active: bool) -> Iterator[None]:
        if not active:
            yield
            return
        kept = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        self.register_modules(tokenizer=None, text_encoder=None)
        try:
            yield
        finally:
            self.register_modules(**kept)

    def register_to_config(self, **kwargs: Any) -> None:
        """Write our own classes as ``["stvision", name]``, which survives moves between files.

        diffusers compares a class with the bases that it finds in the named library; where
        ``stvision`` does not show them, the full module path stays, which diffusers resolves too.
        """
        for key, value in kwargs.items():
            if not isinstance(value, tuple | list) or len(value) != 2:
                continue
            ours = str(value[0]).startswith("stvision.") and value[1] in stvision.__all__
            if ours and hasattr(stvision, "ModelMixin") and hasattr(stvision, "SchedulerMixin"):
                kwargs[key] = ("stvision", value[1])
        super().register_to_config(**kwargs)

    # -- switches -----------------------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        """Set True, from a callback or another thread, to stop the present call soon."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = bool(value)

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last call."""
        return self._num_timesteps

    def enable_vae_slicing(self) -> None:
        """Decode one frame at a time."""
        self.vae_chunk = 1

    def disable_vae_slicing(self) -> None:
        """Decode all frames of a window at once."""
        self.vae_chunk = None

    def enable_vae_tiling(self) -> None:
        """Work in tiles within a frame, during calls of this pipeline."""
        self.vae_tiling = True

    def disable_vae_tiling(self) -> None:
        """Take whole frames."""
        self.vae_tiling = False

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep only the running network on the accelerator; does nothing where there is none."""
        if device is None and _accelerator() is None:
            logger.info("no accelerator: models stay where they are")
            return
        super().enable_model_cpu_offload(gpu_id=gpu_id, device=device)  # type: ignore[arg-type]

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep only the running layer on the accelerator; does nothing where there is none."""
        if device is None and _accelerator() is None:
            logger.info("no accelerator: models stay where they are")
            return
        super().enable_sequential_cpu_offload(gpu_id=gpu_id, device=device)  # type: ignore[arg-type]

    # -- frames and latents ---------------------------------------------------------------------

    def encode(self, frames: Tensor) -> Tensor:
        """Scaled latents (B, C, T, h, w) of frames (B, 3, T, H, W) in [-1, 1]."""
        frames = frames.to(device=self._execution_device, dtype=self.vae.dtype)
        return encode_frames(self.vae, frames, chunk=self.vae_chunk, tiling=self.vae_tiling)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W), about [-1, 1], of scaled latents (B, C, T, h, w)."""
        latents = latents.to(self.vae.dtype)
        return decode_frames(self.vae, latents, chunk=self.vae_chunk, tiling=self.vae_tiling)

    # -- memory -------------------------------------------------------------------------------

    def activation_needs(
        self, plan: MemoryPlan, *, height: int, width: int, num_frames: int, batch_size: int
    ) -> dict[str, int]:
        """Component name -> bytes of activations of its heaviest evaluation, in its own dtype."""
        raise NotImplementedError

    def default_size(self) -> tuple[int, int, int]:
        """Height, width (pixels) and frames of a call that does not name them."""
        raise NotImplementedError

    def fit_memory(
        self,
        budget: float | str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        keep_precision: bool = False,
        verbose: bool = True,
    ) -> MemoryPlan:
        """Choose offload, chunk sizes and precision so that a call fits, and apply the choice.

        Settings are tried from the least to the most intrusive: fewer frames at once in the VAE,
        guidance in two passes, half precision (bfloat16 where the device has it), one network on
        the device at a time, VAE tiles, one layer at a time.

        Args:
            budget: bytes for weights and activations on the device, or text such as ``"8GB"``.
            height: frame height in pixels of the calls to come; the default size when None.
            width: frame width in pixels.
            num_frames: frames of one window.
            batch_size: videos made at once.
            device: where calls will run; a GPU when there is one.
            keep_precision: leave the weights in the dtype that they have.
            verbose: print the plan, and the peak memory of every call from now on.

        Returns:
            The plan, with its expected peak.

        Raises:
            ValueError: not even the most frugal settings fit; says how much they need. The
                pipeline is left as it was.
        """
        limit = parse_bytes(budget)
        default = self.default_size()
        size = {
            "height": default[0] if height is None else height,
            "width": default[1] if width is None else width,
            "num_frames": default[2] if num_frames is None else num_frames,
            "batch_size": batch_size,
        }
        target = torch.device(device or _accelerator() or "cpu")
        best: MemoryPlan | None = None
        for plan in self._plans(target, keep_precision):
            plan = self._with_peak(plan, size)
            if best is None or plan.peak_bytes < best.peak_bytes:
                best = plan
            if plan.peak_bytes <= limit:
                self._apply_plan(plan, target)
                self.report_memory = verbose
                if verbose:
                    needed = _gib(plan.peak_bytes)
                    print(f"memory: {_gib(limit)} given, about {needed} needed: {_say(plan)}")
                return plan
        assert best is not None
        raise ValueError(
            f"a budget of {_gib(limit)} is too small for {size['num_frames']} frames of "
            f"{size['height']} x {size['width']} pixels, batch {batch_size}: the most frugal "
            f"settings need about {_gib(best.peak_bytes)}"
        )

    def _networks(self) -> dict[str, nn.Module]:
        return {k: v for k, v in self.components.items() if isinstance(v, nn.Module)}

    def _plans(self, device: torch.device, keep_precision: bool) -> Iterator[MemoryPlan]:
        dtypes = [self.vae.dtype]
        if not keep_precision and dtypes[0] == torch.float32:
            bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
            dtypes.append(torch.bfloat16 if bf16 else torch.float16)
        offloads: list[Offload] = ["none"]
        if device.type != "cpu":
            offloads += ["model", "sequential"]
        for offload in offloads:
            for dtype in dtypes:
                for batched in (True, False):
                    for chunk in (None, 8, 4, 2, 1):
                        yield MemoryPlan(
                            dtype=dtype, offload=offload, vae_chunk=chunk, batch_guidance=batched
                        )
                yield MemoryPlan(
                    dtype=dtype,
                    offload=offload,
                    vae_chunk=1,
                    batch_guidance=False,
                    vae_tiling=True,
                )

    def _with_peak(self, plan: MemoryPlan, size: dict[str, int]) -> MemoryPlan:
        networks: dict[str, Any] = self._networks()
        wanted = torch.empty((), dtype=plan.dtype).element_size()
        needs = dict.fromkeys(networks, 0)
        for name, count in self.activation_needs(plan, **size).items():
            present = torch.empty((), dtype=networks[name].dtype).element_size()
            needs[name] = count * wanted // present
        if plan.offload == "none":
            weights = sum(weight_bytes(item, plan.dtype) for item in networks.values())
            peak = weights + max(needs.values())
        else:
            hold = weight_bytes if plan.offload == "model" else largest_layer_bytes
            peak = max(hold(item, plan.dtype) + needs[name] for name, item in networks.items())
        values = {key: getattr(plan, key) for key in plan.__dataclass_fields__}
        return MemoryPlan(**{**values, "peak_bytes": int(peak * ALLOCATOR_SLACK)})

    def _counted(self, part: str, run: Callable[..., object], *settings: Any) -> int:
        """``activation_bytes`` of ``run``, remembered by what it depends on."""
        key = (part, getattr(self, part).dtype, *settings)
        cache: dict[Any, int] = self.__dict__.setdefault("_needs", {})
        if key not in cache:
            cache[key] = activation_bytes(run)
        return cache[key]

    def _apply_plan(self, plan: MemoryPlan, device: torch.device) -> None:
        self.remove_all_hooks()
        self.vae_chunk, self.vae_tiling = plan.vae_chunk, plan.vae_tiling
        self.batch_guidance = plan.batch_guidance
        if self.vae.dtype != plan.dtype:
            self.to(dtype=plan.dtype)
        if plan.offload == "none":
            self.to(device)
        elif plan.offload == "model":
            self.enable_model_cpu_offload(device=device)
        else:
            self.enable_sequential_cpu_offload(device=device)

    @contextmanager
    def _memory_measured(self) -> Iterator[Callable[[], int]]:
        """Peak bytes of what runs inside, as a function to call at its end."""
        device = self._execution_device
        reset_peak_memory(device)
        yield lambda: peak_memory_bytes(device)
        if self.report_memory:
            kind = "allocated on the GPU" if device.type == "cuda" else "resident in the process"
            print(f"peak memory: {_gib(peak_memory_bytes(device))} {kind}")


def _accelerator() -> str | None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else accelerator.type


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _say(plan: MemoryPlan) -> str:
    chunk = "all frames" if plan.vae_chunk is None else f"{plan.vae_chunk} frames"
    return (
        f"{str(plan.dtype).removeprefix('torch.')}, offload {plan.offload}, VAE {chunk} at once"
        f"{' in tiles' if plan.vae_tiling else ''}, guidance "
        f"{'batched' if plan.batch_guidance else 'in two passes'}"
    )
