"""Seer: predict the frames that follow one or more reference frames, as a sentence tells.

Gu et al., "Seer: Language Instructed Video Prediction with Latent Diffusion Models" (ICLR 2024).
Beyond the paper: videos longer than the trained window (the last frames of a window are the
reference frames of the next), sentences per time span, and one sentence a call for each video of
a batch.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedModel

from stvision.attention.dispatch import check_backend
from stvision.models.fstext import FSTextDecomposer
from stvision.models.sampling import Seed, denoise, per_sample_generators, text_per_frame
from stvision.models.seer import SeerUNetModel
from stvision.models.text import default_max_length, encode_text, load_text
from stvision.pipelines.common import VideoPipeline, attention_backend_of
from stvision.pipelines.conditioning import as_reference_clips, frames_to_tensor
from stvision.pipelines.folders import resolve_folder
from stvision.pipelines.memory import MemoryPlan
from stvision.pipelines.prompts import (
    Prompt,
    TextStates,
    as_prompts,
    as_sentences,
    check_embeds,
    one_or_each,
)
from stvision.pipelines.results import VideoOutput, check_output_type, convert_frames
from stvision.pipelines.rollout import RollOut, StepEnd, joined
from stvision.pipelines.seer_needs import CallSizes, seer_needs
from stvision.pipelines.sizes import SizeRules, check_at_least

logger = logging.getLogger(__name__)

#: Tensors of a step: name for callers -> name in the denoising loop.
_STEP_TENSORS = {
    "latents": "latents",
    "prompt_embeds": "text",
    "negative_prompt_embeds": "negative_text",
}


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
        text_model: ``"minilm"`` when tokenizer and text encoder come from an installed package, or
            ``"open_clip:MODEL/WEIGHTS"`` for open_clip's: they are then loaded from there if not
            given, and not written by ``save_pretrained`` unless ``save_text=True``.
    """

    model_cpu_offload_seq = "text_encoder->fstext->unet->vae"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar[list[str]] = list(_STEP_TENSORS)

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
        if text_model not in (None, "minilm") and not text_model.startswith("open_clip:"):
            raise ValueError(
                "text_model must be 'minilm', 'open_clip:MODEL/WEIGHTS' or None, got "
                f"{text_model!r}"
            )
        if text_model is not None and (tokenizer is None or text_encoder is None):
            packaged = load_text(text_model, unet.dtype)
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

    def _text_of_window(self, call: RollOut, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Text states per frame of one window: decomposed for the prompt, raw for the negative."""
        length = last - first
        rows = call.text.rows(first, last, call.fps)
        used, index = rows.unique(return_inverse=True)
        decomposed = self.fstext(call.text.states[used], length)  # (U, T, L, D)
        text = decomposed[index, torch.arange(length)]
        negative = call.text.negative
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
        stream: bool = False,
    ) -> Any:
        """Predict the frames that follow ``frames``.

        Args:
            prompt: what happens: a sentence, or sentences by the second from which each holds,
                such as ``{0: "open the drawer", 2.5: "close it"}`` (seconds since the first
                frame); or a list of either. One prompt serves all reference clips, and one clip
                all prompts; otherwise there are as many of one as of the other. A list of P
                prompts gives P * ``num_videos_per_prompt`` videos, those of one prompt in a row.
            frames: reference clip: whatever ``stvision.io.as_clip`` takes (path, clip, array
                or tensor of frames, list of images), an open ``VideoReader``, or an iterator
                of frames, of which no more are taken than used. A list of clips or paths, or a
                five-dimensional array, gives one a video; all have equally many frames, or at
                least ``num_reference_frames``. The first ``num_reference_frames``
                frames are used; to continue the end of a clip, give its last frames.
            image: one reference image instead, or a list with one a video.
            negative_prompt: what shall not happen, for guidance, one for all or one a prompt; the
                empty sentence by default.
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
            stream: True for an iterator over windows, see ``stream``, instead of the whole.
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
        # 1. Check what needs neither a frame nor a network, so that mistakes are told at once.
        usual_height, usual_width, usual_frames = self.default_size()
        height = usual_height if height is None else height
        width = usual_width if width is None else width
        total = usual_frames if num_frames is None else num_frames
        config = self.config
        window = config.num_frames if window is None else window
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        self.rules.check(height, width)
        check_output_type(output_type)
        check_at_least("num_inference_steps", steps, 1)
        check_at_least("num_videos_per_prompt", num_videos_per_prompt, 1)
        check_at_least("num_frames", total, 2)
        check_at_least("window", window, 2)
        if fps is not None and not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if attention_backend is not None:
            check_backend(attention_backend)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both")
        if (frames is None) == (image is None):
            raise ValueError("give either frames (a clip) or image, and not both")

        # 2. Read the reference frames, and give every video its clip, sentence and noise.
        asked: Sequence[Any] = []
        if prompt_embeds is None:
            asked = as_prompts(prompt)
        else:
            check_embeds("prompt_embeds", prompt_embeds)
            asked = list(prompt_embeds)
        clips = as_reference_clips(
            frames, image, num_reference_frames, config.num_reference_frames, fps, config.fps
        )
        batch = max(len(asked), len(clips))
        prompts = one_or_each("prompt", asked, batch, num_videos_per_prompt)
        references = one_or_each("frames", clips, batch, num_videos_per_prompt)
        generators = per_sample_generators(generator, len(references))

        # 3. Plan the windows.
        known = len(references[0])
        call = RollOut(
            references=references,
            num_frames=total,
            window=window,
            overlap=known if overlap is None else overlap,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=scale,
            eta=eta,
            generator=generators,
            latents=latents,
            output_type=output_type,
            fps=[fps or clip.fps or config.fps for clip in references],
            attention_backend=attention_backend,
            callback=callback_on_step_end,
            callback_inputs=tuple(callback_on_step_end_tensor_inputs),
        )
        if latents is not None:
            self._check_latents(call, latents)

        # 4. Encode the sentences.
        if prompt_embeds is None:
            call.text = TextStates.of_prompts(prompts, self.encode_prompt)
        else:
            call.text = TextStates.of_embeds(self._as_states(torch.stack(prompts)))
        if scale > 1:
            if negative_prompt_embeds is None:
                sentences = as_sentences("negative_prompt", negative_prompt)
                negative_prompt_embeds = self.encode_prompt(sentences)
            check_embeds("negative_prompt_embeds", negative_prompt_embeds)
            name = "negative_prompt"
            rows = one_or_each(name, list(negative_prompt_embeds), batch, num_videos_per_prompt)
            call.text.negative = self._as_states(torch.stack(rows))

        # 5. Denoise window by window.
        chunks = self._predict(call)
        if stream:
            return chunks

        # 6. Put the windows together.
        output = joined(list(chunks), output_type)
        return output if return_dict else (output.frames,)

    def stream(
        self, prompt: Prompt | Sequence[Prompt] | None = None, frames: Any = None, **options: Any
    ) -> Iterator[VideoOutput]:
        """Predict window by window and yield each window's new frames when they are done.

        Memory does not grow with ``num_frames``: only the last ``overlap`` latents are kept. The
        first chunk begins with the reference frames. Closing the iterator, or setting
        ``interrupt``, ends the work.

        Args:
            prompt: as in ``__call__``.
            frames: as in ``__call__``.
            options: every other argument of ``__call__``.

        Returns:
            An iterator; arguments are checked before it is returned.
        """
        return self(prompt, frames, **options, stream=True)

    # -- steps ------------------------------------------------------------------------------------

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )

    def _check_latents(self, call: RollOut, latents: Tensor) -> None:
        factor, channels = self.vae_scale_factor, self.unet.config.in_channels
        future = call.num_frames - call.num_references
        sides = (call.height // factor, call.width // factor)
        expected = (len(call.references), channels, future, *sides)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"latents must be noise of the frames to predict, {expected}, got "
                f"{tuple(latents.shape)}"
            )

    def _as_states(self, states: Tensor) -> Tensor:
        return states.to(self._execution_device, self.unet.dtype)

    @torch.no_grad()
    def _predict(self, call: RollOut) -> Iterator[VideoOutput]:
        """Yield the new frames of every window."""
        self._interrupt = False
        self.broadway_run = None
        try:
            with self._memory_measured() as peak:
                # Reference frames are encoded once and stay clean.
                size = (call.height, call.width)
                pixels = torch.stack([frames_to_tensor(clip, *size) for clip in call.references])
                reference = self.encode(pixels)
                self._release(self.vae)
                done = 0
                for first, last in call.windows():
                    noise = call.noise(reference, done, last - first)
                    future = self._denoise(call, reference, noise, first, last)
                    latents = torch.cat([reference.to(future.dtype), future], dim=2)
                    new = latents[:, :, done - first : min(last, call.num_frames) - first]
                    yield self._finish(call, new, done, peak)
                    if self._interrupt:
                        return
                    done += new.shape[2]
                    reference = latents[:, :, -call.overlap :].to(self.unet.dtype)
        finally:
            # also when the caller closes the stream, interrupts it, or a step raises
            self.maybe_free_model_hooks()

    def _denoise(
        self, call: RollOut, reference: Tensor, noise: Tensor, first: int, last: int
    ) -> Tensor:
        """Latents of the frames of one window that follow its reference frames."""

        def after_step(index: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            self._num_timesteps = index + 1
            if call.callback is None:
                return {}
            shown = {name: _STEP_TENSORS[name] for name in call.callback_inputs}
            given = {name: state[inner] for name, inner in shown.items() if inner in state}
            returned = call.callback(self, index, timestep, given) or {}
            return {
                _STEP_TENSORS[name]: value
                for name, value in returned.items()
                if name in _STEP_TENSORS
            }

        with (
            attention_backend_of(call.attention_backend, self.unet, self.fstext),
            self._guided(),
            self.progress_bar(total=call.steps) as bar,
        ):
            self._num_timesteps = 0
            text, negative_text = self._text_of_window(call, first, last)
            latents = denoise(
                self.unet,
                self.scheduler,
                noise,
                reference,
                text,
                negative_text=negative_text,
                guidance_scale=call.guidance_scale,
                num_inference_steps=call.steps,
                generator=call.generator,
                eta=call.eta,
                cond_frames=reference.shape[2],
                batch_guidance=self.batch_guidance,
                callback=after_step,
                interrupted=lambda: self._interrupt,
                progress=bar.update,
            )
        self._release(self.unet)
        return latents

    def _finish(
        self, call: RollOut, latents: Tensor, start: int, peak: Callable[[], int]
    ) -> VideoOutput:
        """Decode finished latents and give them times, rate and drift."""
        drift = None
        frames: Any = latents
        if call.output_type != "latent":
            decoded = self.decode(latents)
            self._release(self.vae)
            if not bool(torch.isfinite(decoded).all()):
                raise ValueError(
                    f"the VAE decoded frames that are not finite, in {self.vae.dtype}; try float32"
                )
            drift = call.drift.update((decoded.float() / 2 + 0.5).clamp(0, 1))
            frames = convert_frames(decoded, call.output_type)
        return VideoOutput(
            frames=frames,
            times=call.times(start, latents.shape[2]),
            fps=call.fps,
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
        length = self.config.max_text_length or 77
        if self.tokenizer is not None and self.config.max_text_length is None:
            length = default_max_length(self.tokenizer)
        sizes = CallSizes(height, width, num_frames, batch_size, length)
        return seer_needs(self.fstext, self.unet, self.vae, plan, sizes, self._counted)


# ---------------------------------------------------------------------------------------------
# Small parts


def _rules(vae_levels: int, unet_levels: int) -> SizeRules:
    return SizeRules(multiple=2 ** (vae_levels - 1) * 2 ** (unet_levels - 1))
