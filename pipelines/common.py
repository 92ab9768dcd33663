"""What every video pipeline shares: loading and saving, switches, memory, cancelling."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

import stvision
from stvision.attention.volume import AttentionProjections
from stvision.guidance import BroadWay, BroadWayRun
from stvision.models.fast import disable_fast, enable_fast, is_fast, is_offloaded
from stvision.pipelines.budget import (
    as_gib,
    candidate_plans,
    describe,
    first_that_fits,
    parse_bytes,
    with_peak,
)
from stvision.pipelines.folders import dtype_argument, resolve_folder
from stvision.pipelines.memory import (
    MemoryPlan,
    activation_bytes,
    decode_frames,
    encode_frames,
    peak_memory_bytes,
    reset_peak_memory,
)

logger = logging.getLogger(__name__)


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
    #: What BroadWay did in the last call; None before any.
    broadway_run: BroadWayRun | None = None
    _broadway: BroadWay | None = None
    vae: Any
    unet: Any
    config: Any  # type: ignore[assignment]

    # -- loading and saving -------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a pipeline folder.

        Args:
            name: ``"default"`` for the weights that ship with the project, a local folder, or a
                hub repository ``"owner/name"``.
            kwargs: as for diffusers' ``DiffusionPipeline.from_pretrained``: ``dtype`` (or its
                older name ``torch_dtype``), ``variant``, ``local_files_only``, components that
                replace those of the folder, ...

        Raises:
            FileNotFoundError: there is no such folder.
        """
        hub_names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
        hub = {key: kwargs.pop(key) for key in hub_names if key in kwargs}
        folder = resolve_folder(name, **hub)
        if not (folder / cls.config_name).is_file():
            raise FileNotFoundError(f"{folder} is no pipeline folder: it has no {cls.config_name}")
        options = dtype_argument(kwargs)
        pipeline = super().from_pretrained(str(folder), local_files_only=True, **options)
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
        """Write our own classes as ``["stvision", name]``, which survives moves between files."""
        for key, value in kwargs.items():
            if not isinstance(value, tuple | list) or len(value) != 2:
                continue
            if str(value[0]).startswith("stvision.") and value[1] in stvision.__all__:
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
        """Keep only the running network on the accelerator; does nothing where there is none.

        Raises:
            RuntimeError: fast mode is on.
        """
        if self._may_offload(device):
            super().enable_model_cpu_offload(gpu_id=gpu_id, device=device)  # type: ignore[arg-type]

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep only the running layer on the accelerator; does nothing where there is none.

        Raises:
            RuntimeError: fast mode is on.
        """
        if self._may_offload(device):
            super().enable_sequential_cpu_offload(gpu_id=gpu_id, device=device)  # type: ignore[arg-type]

    def _may_offload(self, device: torch.device | str | None) -> bool:
        if self.is_fast:
            raise RuntimeError(
                "CPU offload and fast mode exclude each other; call disable_fast() first"
            )
        if device is None and _accelerator() is None:
            logger.info("no accelerator: models stay where they are")
            return False
        return True

    # -- fast mode ----------------------------------------------------------------------------

    @property
    def _denoiser(self) -> nn.Module:
        """The network that runs at every step."""
        return self.unet

    @property
    def is_fast(self) -> bool:
        """Whether ``enable_fast`` is in force."""
        return is_fast(self._denoiser)

    def enable_fast(self, compile: bool = False) -> None:
        """Replay every denoising step as a CUDA graph from now on.

        At small frame sizes a step waits for the host to launch kernels; a graph launches them
        all at once. The first step of a call with new sizes (frames, height, width, videos at
        once) runs a few times longer, to capture; all further steps, prompts, seeds and step
        counts replay it. Results equal the plain ones. Another ``attention_backend`` and weights
        moved or converted by ``to`` are captured anew by themselves; after adding or scaling
        adapters, call this again. Each capture holds its activations' memory; the last four stay.

        Args:
            compile: also fuse with ``torch.compile`` before capturing: faster again, for one
                compilation (minutes for a large network) for each size.

        Raises:
            RuntimeError: the pipeline is not on a CUDA device, or CPU offload is on.
        """
        networks = self._networks().values()
        if any(is_offloaded(network) for network in networks):
            raise RuntimeError(
                "fast mode and CPU offload exclude each other: captures read weights by address; "
                "load the pipeline without offload and move it with to('cuda')"
            )
        device = next(self._denoiser.parameters()).device
        if device.type != "cuda":
            raise RuntimeError(
                "fast mode replays CUDA graphs and needs the pipeline on a CUDA device; it is on "
                f"{str(device)!r}"
            )
        enable_fast(self._denoiser, compile=compile)

    def disable_fast(self) -> None:
        """Run steps plainly again and free the captures; does nothing when not fast."""
        disable_fast(self._denoiser)

    # -- guidance -----------------------------------------------------------------------------

    def enable_broadway(self, options: BroadWay | str = "animatediff", **changes: Any) -> None:
        """Guide temporal attention in the first steps of every call: steadier, more motion.

        The network is changed during the denoising of a call only, so offload, fast mode and
        everything else may be switched at any time. Fast mode rests in the guided steps and
        replays the others (a compiled one rests throughout a guided call). ``broadway_run`` tells
        what the last call did. Guided steps hold up to ``max_map_bytes`` more than others, which
        ``fit_memory`` does not count.

        Args:
            options: a :class:`stvision.guidance.BroadWay`, or the name of a preset.
            changes: options of the preset that are to be different, such as ``beta=1.2``.

        Raises:
            ValueError: an unknown preset or option, or a network that cannot be guided.
            TypeError: options of another kind.
        """
        if isinstance(options, str):
            chosen = BroadWay.from_preset(options, **changes)
        elif isinstance(options, BroadWay):
            chosen = replace(options, **changes)
        else:
            raise TypeError(
                f"options must be a BroadWay or the name of a preset, got {type(options).__name__}"
            )
        chosen.check(self)
        self._broadway = chosen

    def disable_broadway(self) -> None:
        """Sample as before; does nothing when BroadWay is not on."""
        self._broadway = None

    @contextmanager
    def _guided(self) -> Iterator[None]:
        """BroadWay inside the ``with`` block, when it is on."""
        if self._broadway is None:
            yield
            return
        if self.broadway_run is None:
            self.broadway_run = BroadWayRun()
        with self._broadway.applied_to(self, record=self.broadway_run):
            yield

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
        the device at a time, VAE tiles, one layer at a time. In fast mode none of them offloads.

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
        plans = candidate_plans(
            self.vae.dtype,
            target,
            keep_precision=keep_precision,
            may_offload=not self.is_fast,
        )
        networks = self._networks()
        counted = (with_peak(plan, networks, self.activation_needs(plan, **size)) for plan in plans)
        plan, needed = first_that_fits(counted, limit)
        if plan is None:
            raise ValueError(
                f"a budget of {as_gib(limit)} is too small for {size['num_frames']} frames of "
                f"{size['height']} x {size['width']} pixels, batch {batch_size}: the most frugal "
                f"settings need about {as_gib(needed)}"
            )
        self._apply_plan(plan, target)
        self.report_memory = verbose
        if verbose:
            given = as_gib(limit)
            print(f"memory: {given} given, about {as_gib(needed)} needed: {describe(plan)}")
        return plan

    def _networks(self) -> dict[str, nn.Module]:
        return {k: v for k, v in self.components.items() if isinstance(v, nn.Module)}

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
            print(f"peak memory: {as_gib(peak_memory_bytes(device))} {kind}")


def _accelerator() -> str | None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else accelerator.type


@contextmanager
def attention_backend_of(name: str | None, *models: Any) -> Iterator[None]:
    """Attention of ``models`` through backend ``name`` inside the ``with`` block."""
    if name is None:
        yield
        return
    modules = [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, AttentionProjections)
    ]
    backends = [module.backend for module in modules]
    processors = [(model, dict(getattr(model, "attn_processors", {}))) for model in models]
    try:
        for model in models:
            model.set_attention_backend(name)
        yield
    finally:
        for module, before in zip(modules, backends, strict=True):
            module.backend = before
        for model, kept in processors:
            if kept:
                model.set_attn_processor(kept)
