"""Seer: predict the frames that follow one or more reference frames, as a sentence tells.

Gu et al., "Seer: Language Instructed Video Prediction with Latent Diffusion Models" (ICLR 2024).
Beyond the paper: videos longer than the trained window (the last frames of a window are the
reference frames of the next), sentences per time span, and one sentence a call for each video of
a batch.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedModel

from stvision.attention.dispatch import check_backend
from stvision.attention.volume import AttentionProjections
from stvision.io import Clip
from stvision.models.fstext import FSTextDecomposer
from stvision.models.sampling import (
    Seed,
    denoise,
    per_sample_generators,
    randn_per_sample,
    text_per_frame,
)
from stvision.models.seer import SeerUNetModel
from stvision.models.text import default_max_length, encode_text, load_packaged_minilm
from stvision.pipelines.common import (
    DriftMeter,
    SizeRules,
    VideoOutput,
    VideoPipeline,
    check_output_type,
    convert_frames,
    join_frames,
    resolve_folder,
)
from stvision.pipelines.conditioning import as_reference_clips, frames_to_tensor
from stvision.pipelines.memory import MemoryPlan, vae_tiles

logger = logging.getLogger(__name__)

#: A sentence, or sentences by the second from which each holds (the first key is 0).
Prompt = str | Mapping[float, str]

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

#: Text models that a package carries: name in the configuration -> loader.
PACKAGED_TEXT = {"minilm": load_packaged_minilm}


@dataclass
class _Text:
    """Raw text states and who uses which, when."""

    states: Tensor  # (U, L, D), one row a distinct sentence
    spans: list[list[tuple[float, int]]]  # per video: (from second, row)
    negative: Tensor | None  # (B, L, D)

    def rows(self, first: int, last: int, fps: list[float]) -> Tensor:
        """Row of ``states`` that holds for every video and frame of a window: (B, T)."""
        rows = torch.zeros(len(self.spans), last - first, dtype=torch.long)
        for index, spans in enumerate(self.spans):
            seconds = torch.arange(first, last, dtype=torch.float64) / fps[index]
            for start, row in spans:
                rows[index, seconds >= start - 1e-9] = row
        return rows


@dataclass
class _Request:
    """One call, checked and prepared; what the windows have in common."""

    text: _Text
    references: list[Clip]
    num_references: int
    num_frames: int
    window: int
    overlap: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    eta: float
    generator: Seed
    latents: Tensor | None
    output_type: str
    fps: list[float]
    times: Tensor
    attention_backend: str | None
    callback: StepEnd | None
    callback_inputs: Sequence[str]
    drift: DriftMeter = field(default_factory=DriftMeter)

    @property
    def batch(self) -> int:
        return len(self.references)

    def spans(self) -> list[tuple[int, int]]:
        """(first, past the last) frame of every window, its reference frames included."""
        windows = [(0, min(self.window, self.num_frames))]
        while windows[-1][1] < self.num_frames:
            start = windows[-1][1] - self.overlap
            windows.append((start, start + self.window))
        return windows


class SeerPipeline(VideoPipeline):
    """Text-conditioned video prediction, called like a diffusers pipeline.

    Args:
        vae: image VAE; frames are coded one by one.
        unet: the inflated denoiser.
        fstext: decomposes a sentence's states into one sequence a frame.
        scheduler: any diffusers scheduler; see ``stvision.models.sampling.make_scheduler``.
        tokenizer: of the text encoder.
        text_encoder: transformers encoder with token states.
        num_frames: frames of the window that the model was trained on, reference frames included.
        num_reference_frames: reference frames that it was trained on.
        height: default frame height in pixels; the denoiser's ``sample_size`` when None.
        width: default frame width in pixels.
        fps: frames per second of its training clips.
        guidance_scale: default weight of guidance.
        num_inference_steps: default number of denoising steps.
        max_text_length: tokens a sentence; the tokenizer's limit, at most 77, when None.
        text_model: ``"minilm"`` when tokenizer and text encoder come from an installed package:
            they are then loaded from there if not given, and not written by ``save_pretrained``.
    """

    model_cpu_offload_seq = "text_encoder->fstext->unet->vae"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: SeerUNetModel,
        fstext: FSTextDecomposer,
        scheduler: Any,
        tokenizer: Any = None,
        text_encoder: PreTrainedModel | None = None,
        *,
        num_frames: int = 16,
        num_reference_frames: int = 1,
        height: int | None = None,
        width: int | None = None,
        fps: float = 8.0,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 30,
        max_text_length: int | None = None,
        text_model: str | None = None,
    ) -> None:
        super().__init__()
        if text_model is not None and text_model not in PACKAGED_TEXT:
            raise ValueError(
                f"text_model must be one of {sorted(PACKAGED_TEXT)} or None, got {text_model!r}"
            )
        if text_model is not None and (tokenizer is None or text_encoder is None):
            packaged = PACKAGED_TEXT[text_model](unet.dtype)
            tokenizer = packaged[0] if tokenizer is None else tokenizer
            text_encoder = packaged[1] if text_encoder is None else text_encoder
        self.register_modules(
            vae=vae,
            unet=unet,
            fstext=fstext,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
        )
        self.register_to_config(
            num_frames=num_frames,
            num_reference_frames=num_reference_frames,
            height=height,
            width=width,
            fps=fps,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            max_text_length=max_text_length,
            text_model=text_model,
        )

    # -- sizes --------------------------------------------------------------------------------

    @classmethod
    def size_rules(cls, name: str | os.PathLike[str], **hub: Any) -> SizeRules:
        """Which sizes a saved pipeline can make, read from its configuration files alone."""
        folder = resolve_folder(name, **hub)
        levels = {}
        for part in ("vae", "unet"):
            path = Path(folder) / part / "config.json"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{folder} is no Seer pipeline: {part}/config.json is missing"
                )
            levels[part] = len(json.loads(path.read_text())["block_out_channels"])
        return _rules(levels["vae"], levels["unet"])

    @property
    def rules(self) -> SizeRules:
        """Which sizes this pipeline can make."""
        return _rules(
            len(self.vae.config.block_out_channels), len(self.unet.config.block_out_channels)
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def default_size(self) -> tuple[int, int, int]:
        """Height and width in pixels, and frames, of a call that does not name them."""
        sample = self.unet.config.sample_size
        sides = (sample, sample) if isinstance(sample, int) else (sample or (32, 32))
        height, width = (side * self.vae_scale_factor for side in sides)
        config = self.config
        return config.height or height, config.width or width, config.num_frames

    # -- text ---------------------------------------------------------------------------------

    def encode_prompt(self, texts: list[str]) -> Tensor:
        """Raw text states (B, L, D) of sentences; what ``prompt_embeds`` expects."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "this pipeline holds no tokenizer and text encoder; give prompt_embeds and "
                "negative_prompt_embeds instead of sentences"
            )
        length = self.config.max_text_length or default_max_length(self.tokenizer)
        device = self._execution_device
        states = encode_text(self.tokenizer, self.text_encoder, texts, length, device=device)
        return states.to(device=device, dtype=self.unet.dtype)

    def _prepare_text(
        self,
        prompts: list[Prompt] | None,
        negative: list[str],
        prompt_embeds: Tensor | None,
        negative_embeds: Tensor | None,
        guided: bool,
        batch: int,
    ) -> _Text:
        if prompts is None:
            assert prompt_embeds is not None
            states = prompt_embeds.to(self._execution_device, self.unet.dtype)
            spans = [[(0.0, row if len(states) > 1 else 0)] for row in range(batch)]
        else:
            timed = [_timed(prompt) for prompt in prompts]
            distinct = list(dict.fromkeys(text for item in timed for _, text in item))
            states = self.encode_prompt(distinct)
            spans = [[(start, distinct.index(text)) for start, text in item] for item in timed]
        if not guided:
            return _Text(states, spans, None)
        if negative_embeds is None:
            negative_embeds = self.encode_prompt(negative)
        negative_embeds = negative_embeds.to(self._execution_device, self.unet.dtype)
        return _Text(states, spans, negative_embeds.expand(batch, -1, -1))

    def _text_of_window(
        self, request: _Request, first: int, last: int
    ) -> tuple[Tensor, Tensor | None]:
        """Text states per frame of one window: decomposed for the prompt, raw for the negative."""
        length = last - first
        rows = request.text.rows(first, last, request.fps)
        used, index = rows.unique(return_inverse=True)
        decomposed = self.fstext(request.text.states[used], length)  # (U, T, L, D)
        text = decomposed[index, torch.arange(length)]
        negative = request.text.negative
        return text, None if negative is None else text_per_frame(negative, length)

    # -- the call -------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        frames: Any = None,
        *,
        image: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Seed = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_reference_frames: int | None = None,
        window: int | None = None,
        overlap: int | None = None,
        fps: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_backend: str | None = None,
    ) -> Any:
        """Predict the frames that follow ``frames``.

        Args:
            prompt: what happens: a sentence, or sentences by the second from which each holds,
                such as ``{0: "open the drawer", 2.5: "close it"}``; or a list, one a video.
            frames: reference clip: whatever ``stvision.io.as_clip`` takes (path, clip, array
                or tensor of frames, list of images). A list of clips or paths, or a
                five-dimensional array, gives one a video. The first ``num_reference_frames``
                frames are used; to continue the end of a clip, give its last frames.
            image: one reference image instead, or a list with one a video.
            negative_prompt: what shall not happen, for guidance; the empty sentence by default.
            num_frames: length of the video, reference frames included; the trained window by
                default. Longer videos are rolled out window by window.
            height: frame height in pixels; see ``rules``. References are scaled to cover height
                and width, then cut to them around the middle.
            width: frame width in pixels.
            num_inference_steps: denoising steps a window.
            guidance_scale: weight of classifier-free guidance; off at 1 and below.
            num_videos_per_prompt: videos for each prompt, each with its own noise.
            eta: DDIM's eta, 0 (deterministic) to 1.
            generator: where noise comes from: an integer (video ``i`` gets ``generator + i``), a
                ``torch.Generator``, or a list of either, one a video. Video ``i`` does not depend
                on how many others are made with it.
            latents: standard normal noise (B, C, ``num_frames`` - references, h, w) to start
                from.
            prompt_embeds: raw text states (B, L, D) instead of ``prompt``.
            negative_prompt_embeds: raw text states (B, L, D) instead of ``negative_prompt``.
            num_reference_frames: how many frames of ``frames`` are references; as many as the
                model was trained with (or as there are) by default.
            window: frames of one window; the trained number by default.
            overlap: frames of a window that are the references of the next; as many as there
                are references by default.
            fps: frames per second of the result; references of known rate are sampled to it. By
                default the rate of the reference clip, else (arrays, images) that of the model.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; see ``VideoOutput``.
            return_dict: False for a tuple with the frames only.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after
                each step of each window; may return a dict of replacements, and may set
                ``pipeline.interrupt = True``.
            callback_on_step_end_tensor_inputs: which of ``latents``, ``prompt_embeds`` and
                ``negative_prompt_embeds`` (text states per frame) it is given.
            attention_backend: backend of temporal attention for this call, a name in
                ``stvision.attention.BACKENDS``.

        Returns:
            ``VideoOutput``, or a tuple of its frames: the video, reference frames (as the VAE
            shows them) included.

        Raises:
            ValueError: arguments that cannot be met; the sentence names them and what is allowed.
            NonFiniteLatentsError: the network produced NaN or infinity.
        """
        request = self._prepare(
            prompt,
            frames,
            image=image,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_reference_frames=num_reference_frames,
            window=window,
            overlap=overlap,
            fps=fps,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            attention_backend=attention_backend,
        )
        chunks = list(self._windows(request))
        joined = join_frames([chunk.frames for chunk in chunks])
        if not return_dict:
            return (joined,)
        last = chunks[-1]
        return VideoOutput(
            frames=joined,
            times=torch.cat([chunk.times for chunk in chunks if chunk.times is not None], dim=1),
            fps=last.fps,
            drift=last.drift,
            interrupted=last.interrupted,
            peak_memory=last.peak_memory,
        )

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        frames: Any = None,
        **options: Any,
    ) -> Iterator[VideoOutput]:
        """Predict window by window and yield each window's new frames when they are done.

        Memory does not grow with ``num_frames``: only the last ``overlap`` latents are kept. The
        first chunk begins with the reference frames. Closing the iterator, or setting
        ``interrupt``, ends the work.

        Args:
            prompt: as in ``__call__``.
            frames: as in ``__call__``.
            options: every other argument of ``__call__`` but ``return_dict``.

        Returns:
            An iterator; arguments are checked before it is returned.
        """
        return self._windows(self._prepare(prompt, frames, **options))

    # -- steps ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(
        self,
        prompt: Any,
        frames: Any,
        *,
        image: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Seed = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_reference_frames: int | None = None,
        window: int | None = None,
        overlap: int | None = None,
        fps: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_backend: str | None = None,
    ) -> _Request:
        # 1. Check what can be checked without touching a frame or a network.
        size = self.default_size()
        height = size[0] if height is None else height
        width = size[1] if width is None else width
        self.rules.check(height, width)
        config = self.config
        total = size[2] if num_frames is None else num_frames
        window = config.num_frames if window is None else window
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        check_output_type(output_type)
        _check_at_least("num_inference_steps", steps, 1)
        _check_at_least("num_videos_per_prompt", num_videos_per_prompt, 1)
        _check_at_least("num_frames", total, 2)
        _check_at_least("window", window, 2)
        if fps is not None and not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if attention_backend is not None:
            check_backend(attention_backend)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )
        prompts = _as_prompts(prompt, prompt_embeds)
        if (frames is None) == (image is None):
            raise ValueError("give either frames (a clip) or image, and not both")

        # 2. Read the reference frames; one clip a video.
        clips = as_reference_clips(
            frames, image, num_reference_frames, config.num_reference_frames, fps, config.fps
        )
        count = len(prompts) if prompts is not None else len(_embeds(prompt_embeds))
        batch = max(count, len(clips))
        for name, number in (("prompt", count), ("frames", len(clips))):
            if number not in (1, batch):
                raise ValueError(
                    f"{name} holds {number} entries for {batch} videos; give one for all or one each"
                )
        references = len(clips[0])
        overlap = references if overlap is None else overlap
        if total <= references:
            raise ValueError(
                f"num_frames counts the reference frames and must exceed their number "
                f"{references}, got {total}"
            )
        if window <= max(references, overlap) or overlap < 1:
            raise ValueError(
                f"overlap must be at least 1 and window must exceed overlap and reference frames, "
                f"got window {window}, overlap {overlap} and {references} reference frames"
            )
        clips = _repeat(clips, batch, num_videos_per_prompt)
        rates = [fps or clip.fps or config.fps for clip in clips]
        videos = len(clips)
        if latents is not None:
            self._check_latents(latents, videos, total - references, height, width)

        # 3. Encode text.
        guided = scale > 1
        negatives = [""] if negative_prompt is None else _as_list(negative_prompt)
        if len(negatives) not in (1, batch):
            raise ValueError(
                f"negative_prompt holds {len(negatives)} entries for {batch} videos; give one for "
                "all or one each"
            )
        if prompts is not None:
            prompts = _repeat(prompts, batch, num_videos_per_prompt)
        elif prompt_embeds is not None and len(prompt_embeds) > 1:
            prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) > 1:
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(
                num_videos_per_prompt, dim=0
            )
        if len(negatives) > 1:
            negatives = _repeat(negatives, batch, num_videos_per_prompt)
        text = self._prepare_text(
            prompts, negatives, prompt_embeds, negative_prompt_embeds, guided, videos
        )
        return _Request(
            text=text,
            references=clips,
            num_references=references,
            num_frames=total,
            window=window,
            overlap=overlap,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=scale,
            eta=eta,
            generator=per_sample_generators(generator, videos),
            latents=latents,
            output_type=output_type,
            fps=rates,
            times=_all_times(clips, rates, total),
            attention_backend=attention_backend,
            callback=callback_on_step_end,
            callback_inputs=tuple(callback_on_step_end_tensor_inputs),
        )

    def _check_latents(
        self, latents: Tensor, videos: int, future: int, height: int, width: int
    ) -> None:
        factor = self.vae_scale_factor
        channels = self.unet.config.in_channels
        expected = (videos, channels, future, height // factor, width // factor)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"latents must be noise of the frames to predict, {expected}, got "
                f"{tuple(latents.shape)}"
            )

    @torch.no_grad()
    def _windows(self, request: _Request) -> Iterator[VideoOutput]:
        self._interrupt = False
        # 4. Encode the reference frames; they stay clean.
        with self._memory_measured() as peak:
            size = (request.height, request.width)
            pixels = torch.stack([frames_to_tensor(clip, *size) for clip in request.references])
            reference = self.encode(pixels)
            self._release(self.vae)
            done = 0
            for first, last in request.spans():
                # 5. Denoise the rest of the window.
                noise = self._noise(request, reference, done, last - first)
                future = self._denoise(request, reference, noise, first, last)
                latents = torch.cat([reference.to(future.dtype), future], dim=2)
                # 6. Hand over the frames that are new, and keep the last ones as references.
                new = latents[:, :, done - first : min(last, request.num_frames) - first]
                yield self._finish(request, new, done, peak)
                if self._interrupt:
                    return
                done += new.shape[2]
                reference = latents[:, :, -request.overlap :].to(self.unet.dtype)
        self.maybe_free_model_hooks()

    def _noise(self, request: _Request, reference: Tensor, done: int, length: int) -> Tensor:
        """Standard normal noise of one window, float32; what the caller gave comes first."""
        batch, channels, kept = reference.shape[:3]
        shape = (batch, channels, length - kept, *reference.shape[3:])
        noise = randn_per_sample(shape, request.generator, reference.device)
        if request.latents is not None:
            start = max(done - request.num_references, 0)
            given = request.latents[:, :, start : start + shape[2]].to(noise)
            noise[:, :, : given.shape[2]] = given
        return noise

    def _denoise(
        self, request: _Request, reference: Tensor, noise: Tensor, first: int, last: int
    ) -> Tensor:
        names = {"latents": "latents", "prompt_embeds": "text"}
        names["negative_prompt_embeds"] = "negative_text"

        def after_step(index: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            self._num_timesteps = index + 1
            if request.callback is None:
                return {}
            given = {
                name: state[names[name]] for name in request.callback_inputs if names[name] in state
            }
            returned = request.callback(self, index, timestep, given) or {}
            return {names[name]: value for name, value in returned.items() if name in names}

        with (
            _backend(request.attention_backend, self.unet, self.fstext),
            self.progress_bar(total=request.steps) as bar,
        ):
            self._num_timesteps = 0
            text, negative_text = self._text_of_window(request, first, last)
            latents = denoise(
                self.unet,
                self.scheduler,
                noise,
                reference,
                text,
                negative_text=negative_text,
                guidance_scale=request.guidance_scale,
                num_inference_steps=request.steps,
                generator=request.generator,
                eta=request.eta,
                cond_frames=reference.shape[2],
                batch_guidance=self.batch_guidance,
                callback=after_step,
                interrupted=lambda: self._interrupt,
                progress=bar.update,
            )
        self._release(self.unet)
        return latents

    def _finish(
        self, request: _Request, latents: Tensor, start: int, peak: Callable[[], int]
    ) -> VideoOutput:
        times = request.times[:, start : start + latents.shape[2]]
        drift = None
        if request.output_type == "latent":
            frames: Any = latents
        else:
            decoded = self.decode(latents)
            self._release(self.vae)
            if not bool(torch.isfinite(decoded).all()):
                raise ValueError(
                    f"the VAE decoded frames that are not finite, in {self.vae.dtype}; try float32"
                )
            drift = request.drift.update((decoded.float() / 2 + 0.5).clamp(0, 1))
            frames = convert_frames(decoded, request.output_type)
        return VideoOutput(
            frames=frames,
            times=times,
            fps=request.fps,
            drift=drift,
            interrupted=self._interrupt,
            peak_memory=peak(),
        )

    def _release(self, network: nn.Module) -> None:
        """Send an offloaded network back at once rather than when the next one asks for room."""
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is network:
                hook.offload()

    # -- memory -----------------------------------------------------------------------------------

    def activation_needs(
        self, plan: MemoryPlan, *, height: int, width: int, num_frames: int, batch_size: int
    ) -> dict[str, int]:
        """Bytes of activations of the text decomposer, the denoiser and the VAE."""
        self.rules.check(height, width)
        factor = self.vae_scale_factor
        h, w = height // factor, width // factor
        unet, vae, fstext = self.unet, self.vae, self.fstext
        length = self.config.max_text_length or 77
        if self.tokenizer is not None and self.config.max_text_length is None:
            length = default_max_length(self.tokenizer)
        text_dim = fstext.config.dim
        branches = batch_size * (2 if plan.batch_guidance else 1)
        frames = num_frames * batch_size
        chunk = frames if plan.vae_chunk is None else min(plan.vae_chunk, frames)

        def inputs(zeros: Callable[..., Tensor], model: Any, *shape: int) -> Tensor:
            return zeros(*shape, dtype=model.dtype, device=model.device)

        def text(zeros: Callable[..., Tensor]) -> Any:
            states = inputs(zeros, fstext, batch_size, length, text_dim)
            return type(fstext).forward(fstext, states, num_frames)

        def step(zeros: Callable[..., Tensor]) -> Any:
            sample = inputs(zeros, unet, branches, unet.config.in_channels, num_frames, h, w)
            states = inputs(zeros, unet, branches, num_frames, length, text_dim)
            time = zeros((), dtype=torch.long, device=unet.device)
            # The class's own forward: graphs or offload hooks on the instance stay out of it.
            return type(unet).forward(unet, sample, time, states, cond_frames=1)

        def decode(zeros: Callable[..., Tensor]) -> Any:
            latents = inputs(zeros, vae, chunk, vae.config.latent_channels, h, w)
            with vae_tiles(vae, plan.vae_tiling):
                return vae.decode(latents).sample

        # Decoded frames of a window stay while the VAE works on the rest.
        kept = frames * 3 * height * width * torch.empty((), dtype=vae.dtype).element_size()
        return {
            "fstext": self._counted("fstext", text, batch_size, num_frames, length),
            "unet": self._counted("unet", step, branches, num_frames, h, w, length),
            "vae": self._counted("vae", decode, chunk, h, w, plan.vae_tiling) + kept,
        }


# ---------------------------------------------------------------------------------------------
# Small parts


def _rules(vae_levels: int, unet_levels: int) -> SizeRules:
    return SizeRules(multiple=2 ** (vae_levels - 1) * 2 ** (unet_levels - 1))


def _check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Mapping) else list(value)


def _embeds(prompt_embeds: Tensor | None) -> Tensor:
    if prompt_embeds is None or prompt_embeds.ndim != 3:
        shape = None if prompt_embeds is None else tuple(prompt_embeds.shape)
        raise ValueError(f"prompt_embeds must be (B, L, D), got {shape}")
    return prompt_embeds


def _as_prompts(prompt: Any, prompt_embeds: Tensor | None) -> list[Prompt] | None:
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, and not both")
    if prompt is None:
        _embeds(prompt_embeds)
        return None
    prompts = _as_list(prompt)
    if not prompts:
        raise ValueError("prompt must hold at least one sentence, got an empty list")
    for item in prompts:
        _timed(item)
    return prompts


def _timed(prompt: Any) -> list[tuple[float, str]]:
    """A prompt as (from second, sentence), in order."""
    if isinstance(prompt, str):
        return [(0.0, prompt)]
    if isinstance(prompt, Mapping) and all(isinstance(text, str) for text in prompt.values()):
        spans = sorted((float(start), text) for start, text in prompt.items())
        if spans and spans[0][0] == 0:
            return spans
    raise ValueError(
        "a prompt is a sentence or a mapping from seconds to sentences that begins at 0, got "
        f"{prompt!r}"
    )


def _repeat(items: list[Any], batch: int, times: int) -> list[Any]:
    """One entry for all or one each, then each of them ``times`` times in a row."""
    full = items * batch if len(items) == 1 else items
    return [item for item in full for _ in range(times)]


def _all_times(clips: list[Clip], rates: list[float], total: int) -> Tensor:
    """Seconds of every frame (B, T): the references' own, then one frame's duration apart."""
    rows = []
    for clip, fps in zip(clips, rates, strict=True):
        known = clip.times.double()
        later = known[-1] + torch.arange(1, total - len(known) + 1, dtype=torch.float64) / fps
        rows.append(torch.cat([known, later]))
    return torch.stack(rows)


@contextmanager
def _backend(name: str | None, *models: Any) -> Iterator[None]:
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
