"""Denoising of future frames behind clean reference frames, as plain functions.

One loop serves the pipeline and the trainer's validation. Source: Gu et al., "Seer: Language
Instructed Video Prediction with Latent Diffusion Models" (2023): reference latents stand without
noise before the noisy future ones, all frames share the timestep, and the prediction for the
reference frames is dropped. In classifier-free guidance (Ho and Salimans 2022) the unconditional
branch reads the raw text states of the empty sentence, repeated over frames; they do not pass
through the text decomposer.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from stvision.models.fast import plain

#: What chooses noise: a generator, an integer seed, one of either per sample, or nothing.
Seed = torch.Generator | int | Sequence[torch.Generator | int] | None

#: ``callback(step index, timestep, state) -> replacements or None``; the state holds ``"latents"``,
#: ``"text"`` and, under guidance, ``"negative_text"``; returned entries take their places.
StepCallback = Callable[[int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class NonFiniteLatentsError(ValueError):
    """Latents became NaN or infinite; the message names the step and the first layer at fault."""


# ---------------------------------------------------------------------------------------------
# Noise


def per_sample_generators(generator: Seed, batch_size: int) -> list[torch.Generator]:
    """One random generator a sample, so that sample ``i`` does not depend on the batch size.

    Args:
        generator: an integer seeds sample ``i`` with ``generator + i``; a list gives each sample
            its own integer or generator; one ``torch.Generator`` serves sample 0 itself and seeds
            the generators of the others from a copy of its state; None takes seeds from torch's
            global state (so ``torch.manual_seed`` counts).
        batch_size: number of samples.

    Raises:
        ValueError: a list whose length is not ``batch_size``.
        TypeError: anything else.
    """
    if isinstance(generator, bool | str):
        raise TypeError(f"generator must be a torch.Generator, int or list, got {generator!r}")
    if generator is None:
        return [_seeded(int(torch.randint(2**62, ()))) for _ in range(batch_size)]
    if isinstance(generator, int | np.integer):
        return [_seeded(int(generator) + index) for index in range(batch_size)]
    if isinstance(generator, torch.Generator):
        twin = torch.Generator(generator.device)
        twin.set_state(generator.get_state())
        seeds = [
            int(torch.randint(2**62, (), generator=twin, device=twin.device))
            for _ in range(batch_size - 1)
        ]
        return [generator, *(_seeded(seed, generator.device) for seed in seeds)]
    if isinstance(generator, Sequence):
        if len(generator) != batch_size:
            raise ValueError(
                f"generator holds {len(generator)} entries for a batch of {batch_size}; give one "
                "per sample"
            )
        return [per_sample_generators(item, 1)[0] for item in generator]
    raise TypeError(f"generator must be a torch.Generator, int or list, got {type(generator)}")


def _seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def randn_per_sample(
    shape: Sequence[int],
    generator: Seed = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, drawn sample by sample in float32 on the generator's device.

    Drawing on the CPU (the default) gives the same noise on every machine; drawing in float32
    gives the same noise for every ``dtype`` up to rounding.

    Args:
        shape: (B, ...), B samples.
        generator: see ``per_sample_generators``.
        device: device of the result.
        dtype: floating dtype of the result.
    """
    generators = per_sample_generators(generator, shape[0])
    samples = [
        torch.randn(tuple(shape[1:]), generator=item, device=item.device) for item in generators
    ]
    return torch.stack([sample.to(device=device, dtype=dtype) for sample in samples])


# ---------------------------------------------------------------------------------------------
# Schedules


class SeerDDIMScheduler(DDIMScheduler):
    """DDIM with the step grid of Seer's authors: every ``T // n``-th timestep up to the end.

    Asking for 30 of 1000 steps gives 31: 991, 958, ..., 34, 1. diffusers' "leading" grid would
    stop at 958 and so start from a state that the noise does not match.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set ``timesteps``, in falling order, on ``device``."""
        super().set_timesteps(num_inference_steps, device)
        config: Any = self.config
        total = config.num_train_timesteps
        step = total // num_inference_steps
        grid = np.arange(0, total, step, dtype=np.int64) + config.steps_offset
        grid = grid[grid < total]
        self.timesteps = torch.from_numpy(grid[::-1].copy()).to(device)


def make_scheduler(name: str = "sd") -> DDIMScheduler:
    """A DDIM scheduler by name.

    Args:
        name: ``"sd"``: the noise schedule of Stable Diffusion 1.x, with which Seer was trained
            (square roots of the betas linear from 0.00085 to 0.012; log-SNR 2.13 at t = 100).
            ``"authors"``: what the released sampler of Seer does instead: betas from 1e-4 to 2e-2
            on the same law (log-SNR 3.52 at t = 100) and timesteps 1, 34, ..., 991 for "30" steps.

    Raises:
        ValueError: an unknown name.
    """
    shared: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    if name == "sd":
        return DDIMScheduler(beta_start=0.00085, beta_end=0.012, **shared)
    if name == "authors":
        return SeerDDIMScheduler(beta_start=1e-4, beta_end=2e-2, **shared)
    raise ValueError(f"unknown schedule {name!r}; choose one of ['sd', 'authors']")


# ---------------------------------------------------------------------------------------------
# The loop


def text_per_frame(states: Tensor, num_frames: int) -> Tensor:
    """Repeat raw text states over frames: (B, L, D) -> (B, T, L, D)."""
    return states[:, None].expand(-1, num_frames, -1, -1)


@torch.no_grad()
def denoise(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    noise: Tensor,
    reference: Tensor,
    text: Tensor,
    *,
    negative_text: Tensor | None = None,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 30,
    generator: Seed = None,
    eta: float = 0.0,
    cond_frames: int = 0,
    batch_guidance: bool = True,
    callback: StepCallback | None = None,
    interrupted: Callable[[], bool] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Turn noise into the latents of the frames that follow the reference frames.

    The scheduler is copied first, so the caller's is left as it was.

    Args:
        unet: ``unet(sample (B, C, T, h, w), timestep, encoder_hidden_states=(B, T, L, D),
            cond_frames=...)`` returning an object with ``.sample`` or a tensor of the same shape.
        scheduler: any diffusers scheduler with ``set_timesteps`` and ``step``.
        noise: standard normal (B, C, T - R, h, w); ``init_noise_sigma`` is applied here.
        reference: clean latents (B, C, R, h, w) of the R reference frames, R >= 0.
        text: conditional text states per frame (B, T, L, D).
        negative_text: unconditional text states (B, T, L, D); needed when guidance is on.
        guidance_scale: weight of guidance; off (one evaluation a step) when at most 1 or when
            ``negative_text`` is None.
        num_inference_steps: asked of the scheduler; some schedules make one more.
        generator: noise of stochastic schedulers (DDIM with ``eta`` > 0, ancestral ones), per
            sample as in ``per_sample_generators``.
        eta: DDIM's eta, from 0 (deterministic) to 1; ignored by schedulers that do not know it.
        cond_frames: passed on to the network.
        batch_guidance: evaluate both branches of guidance as one batch (faster) rather than one
            after the other (half the activations).
        callback: called after every step as ``callback(index, timestep, state)``; see
            ``StepCallback``.
        interrupted: asked before every step; True ends the loop with the latents as they are.
        progress: called after every step.

    Returns:
        Latents (B, C, T - R, h, w) in the dtype of ``noise``.

    Raises:
        ValueError: shapes that do not fit together.
        NonFiniteLatentsError: a step gave NaN or infinity.
    """
    guided = guidance_scale > 1 and negative_text is not None
    _check_shapes(noise, reference, text, negative_text if guided else None)
    solver: Any = copy.deepcopy(scheduler)
    solver.set_timesteps(num_inference_steps, device=noise.device)
    options = _step_options(solver, generator, eta, noise.shape[0])
    latents = noise * solver.init_noise_sigma
    num_references = reference.shape[2]
    state = {"latents": latents, "text": text}
    if guided and negative_text is not None:
        state["negative_text"] = negative_text

    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        contexts = [state[name] for name in ("negative_text", "text") if name in state]
        if guided and batch_guidance:
            doubled = _evaluate(
                unet, torch.cat([sample, sample]), timestep, torch.cat(contexts), cond_frames
            )
            outputs = list(doubled.chunk(2))
        else:
            outputs = [_evaluate(unet, sample, timestep, item, cond_frames) for item in contexts]
        if not guided:
            return outputs[0]
        unconditional, conditional = outputs
        return unconditional + guidance_scale * (conditional - unconditional)

    for index, timestep in enumerate(solver.timesteps):
        if interrupted is not None and interrupted():
            break
        scaled = solver.scale_model_input(latents, timestep).to(reference.dtype)
        sample = torch.cat([reference, scaled], dim=2)
        predicted = network(sample, timestep)[:, :, num_references:]
        latents = solver.step(predicted, timestep, latents, **options, return_dict=False)[0]
        latents = latents.to(noise.dtype)
        if not bool(torch.isfinite(latents).all()):
            layer = _first_bad_layer(unet, partial(network, sample, timestep))
            raise NonFiniteLatentsError(
                f"latents are not finite after step {index} (timestep {float(timestep):g}); {layer}"
            )
        if callback is not None:
            state["latents"] = latents
            state.update(callback(index, timestep, dict(state)) or {})
            latents = state["latents"]
        if progress is not None:
            progress()
    return latents


def _evaluate(
    unet: nn.Module, sample: Tensor, timestep: Tensor, text: Tensor, cond_frames: int
) -> Tensor:
    output = unet(sample, timestep, encoder_hidden_states=text, cond_frames=cond_frames)
    return output if isinstance(output, Tensor) else output.sample


def _check_shapes(
    noise: Tensor, reference: Tensor, text: Tensor, negative_text: Tensor | None
) -> None:
    if noise.ndim != 5 or reference.ndim != 5:
        raise ValueError(
            "noise and reference must be (B, C, T, h, w), got "
            f"{tuple(noise.shape)} and {tuple(reference.shape)}"
        )
    total = noise.shape[2] + reference.shape[2]
    if noise.shape[:2] != reference.shape[:2] or noise.shape[3:] != reference.shape[3:]:
        raise ValueError(
            f"noise {tuple(noise.shape)} and reference {tuple(reference.shape)} differ in more "
            "than their number of frames"
        )
    for name, states in (("text", text), ("negative_text", negative_text)):
        if states is None:
            continue
        if states.ndim != 4 or states.shape[0] != noise.shape[0] or states.shape[1] != total:
            raise ValueError(
                f"{name} must be (B={noise.shape[0]}, T={total}, L, D), got {tuple(states.shape)}"
            )


def _step_options(scheduler: Any, generator: Seed, eta: float, batch: int) -> dict[str, Any]:
    """Arguments of ``scheduler.step`` beyond the common three, as far as it knows them."""
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "eta" in known:
        options["eta"] = eta
    if "generator" in known:
        options["generator"] = per_sample_generators(generator, batch)
    return options


def _first_bad_layer(model: nn.Module, again: Callable[[], object]) -> str:
    """Run once more with hooks and name the first module whose output is not finite."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    try:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(watch(name)))
        with plain(model):  # hooks do not run while a graph is replayed
            again()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "no layer of the network gives such a value by itself; it arose in the scheduler"
    return f"the first layer with such an output is {found[0]!r}"
