"""The denoising loop against closed forms, and noise that does not know the batch size."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from stvision.models.sampling import (
    NonFiniteLatentsError,
    denoise,
    make_scheduler,
    per_sample_generators,
    randn_per_sample,
    text_per_frame,
)


class Oracle(nn.Module):
    """Knows the clean future, so it predicts the exact noise; records what it was shown."""

    def __init__(self, clean, scheduler):
        super().__init__()
        self.clean, self.scheduler, self.seen = clean, scheduler, []

    def forward(self, sample, timestep, encoder_hidden_states, cond_frames=0):
        self.seen.append((sample.clone(), encoder_hidden_states.clone(), int(timestep)))
        references = sample.shape[2] - self.clean.shape[2]
        alpha = self.scheduler.alphas_cumprod[int(timestep)]
        noise = (sample[:, :, references:] - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        return torch.cat([torch.full_like(sample[:, :, :references], 7.0), noise], dim=2)


class Linear(nn.Module):
    """Prediction = a times the sample + mean of this frame's text; its answers are known."""

    def __init__(self, slope=0.1):
        super().__init__()
        self.slope = slope
        self.layer = nn.Identity()

    def forward(self, sample, timestep, encoder_hidden_states, cond_frames=0):
        text = encoder_hidden_states.mean((-2, -1))[:, None, :, None, None]
        return self.layer(self.slope * sample + text)


def case(batch=2, references=2, future=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 4, future, 3, 5, generator=generator)
    reference = torch.randn(batch, 4, references, 3, 5, generator=generator)
    text = torch.randn(batch, references + future, 7, 6, generator=generator)
    negative = torch.randn(batch, references + future, 7, 6, generator=generator)
    return noise, reference, text, negative


def test_ddim_with_exact_noise_lands_on_the_clean_frames():
    noise, reference, text, _ = case()
    scheduler = make_scheduler("sd")
    clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    oracle = Oracle(clean, scheduler)
    result = denoise(oracle, scheduler, noise, reference, text, num_inference_steps=10)
    # DDIM ends at t = 0, whose alpha is not quite one: x = sqrt(a) clean + sqrt(1 - a) epsilon.
    last = scheduler.alphas_cumprod[0]
    epsilon_share = float((1 - last).sqrt())
    assert (result - last.sqrt() * clean).abs().max() < epsilon_share * 8
    assert all(torch.equal(sample[:, :, :2], reference) for sample, _, _ in oracle.seen)
    assert torch.equal(oracle.seen[0][0][:, :, 2:], noise)
    assert len(oracle.seen) == 10 and scheduler.num_inference_steps is None


def test_guidance_is_the_formula_and_reads_the_raw_empty_text():
    noise, reference, text, negative = case()
    scheduler = make_scheduler("sd")
    both = denoise(
        Linear(), scheduler, noise, reference, text,
        negative_text=negative, guidance_scale=3.0, num_inference_steps=4,
    )  # fmt: skip
    # The network is affine in the text, so guidance equals extrapolated text.
    extrapolated = negative + 3.0 * (text - negative)
    alone = denoise(Linear(), scheduler, noise, reference, extrapolated, num_inference_steps=4)
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
    apart = denoise(
        Linear(), scheduler, noise, reference, text,
        negative_text=negative, guidance_scale=3.0, num_inference_steps=4, batch_guidance=False,
    )  # fmt: skip
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-5)


def test_no_guidance_makes_one_evaluation_a_step():
    noise, reference, text, negative = case()
    scheduler = make_scheduler("sd")
    oracle = Oracle(noise, scheduler)
    denoise(
        oracle, scheduler, noise, reference, text,
        negative_text=negative, guidance_scale=1.0, num_inference_steps=3,
    )  # fmt: skip
    assert [sample.shape[0] for sample, _, _ in oracle.seen] == [2, 2, 2]
    assert torch.equal(oracle.seen[0][1], text)


def test_the_authors_schedule():
    scheduler = make_scheduler("authors")
    scheduler.set_timesteps(30)
    assert scheduler.timesteps.tolist() == list(range(991, 0, -33))
    assert len(scheduler.timesteps) == 31

    def log_snr(preset):
        alpha = float(make_scheduler(preset).alphas_cumprod[100])
        return math.log(alpha / (1 - alpha))

    assert log_snr("authors") == pytest.approx(3.52, abs=0.01)
    assert log_snr("sd") == pytest.approx(2.13, abs=0.01)
    with pytest.raises(ValueError, match="authors"):
        make_scheduler("cosine")


@pytest.mark.parametrize(
    "kind",
    [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, DDIMScheduler],
)
def test_any_scheduler_reaches_the_same_frames(kind):
    """With a linear Gaussian model the solvers agree on the answer of the probability flow."""
    noise, reference, text, _ = case()
    scheduler = kind.from_config(make_scheduler("sd").config)
    clean = torch.zeros_like(noise)

    class Shrink(nn.Module):  # data = N(0, 1): the exact score is known, the flow is the identity
        def forward(self, sample, timestep, encoder_hidden_states, cond_frames=0):
            alpha = make_scheduler("sd").alphas_cumprod[round(float(timestep))]
            return (1 - alpha).sqrt() * sample

    result = denoise(Shrink(), scheduler, noise, reference, text, num_inference_steps=60)
    assert result.shape == clean.shape
    assert (result - noise).abs().mean() < 0.06


@pytest.mark.parametrize(
    "seed",
    [3, None, "generator", [11, 12, 13], "generators"],
)
def test_noise_of_an_item_does_not_know_the_batch_size(seed):
    def make(count):
        torch.manual_seed(4)
        if seed == "generator":
            return torch.Generator().manual_seed(9)
        if seed == "generators":
            return [torch.Generator().manual_seed(i) for i in range(count)]
        return seed[:count] if isinstance(seed, list) else seed

    three = randn_per_sample((3, 2, 5, 7), make(3))
    for count in (1, 2):
        assert torch.equal(randn_per_sample((count, 2, 5, 7), make(count)), three[:count])
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])
    half = randn_per_sample((3, 2, 5, 7), make(3), dtype=torch.float16)
    assert torch.equal(half, three.half())


def test_an_integer_counts_up_over_the_batch_and_one_generator_equals_a_list_of_it():
    assert torch.equal(randn_per_sample((3, 9), 5)[2], randn_per_sample((1, 9), 7)[0])
    single = torch.Generator().manual_seed(1)
    listed = torch.Generator().manual_seed(1)
    assert torch.equal(randn_per_sample((1, 9), single), randn_per_sample((1, 9), [listed]))
    # A generator moves on: the next draw differs, for every item.
    again = randn_per_sample((2, 9), single)
    assert not torch.equal(again, randn_per_sample((2, 9), single))
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        per_sample_generators([1, 2], 3)
    with pytest.raises(TypeError, match="Generator"):
        per_sample_generators("seed", 1)


@pytest.mark.parametrize("kind", ["eta", "ancestral"])
def test_stochastic_steps_are_independent_of_the_batch_too(kind):
    noise, reference, text, _ = case(batch=3)
    scheduler, eta = make_scheduler("sd"), 1.0
    if kind == "ancestral":
        scheduler, eta = EulerAncestralDiscreteScheduler.from_config(scheduler.config), 0.0
    options = {"num_inference_steps": 5, "eta": eta}
    together = denoise(Linear(), scheduler, noise, reference, text, generator=8, **options)
    alone = denoise(Linear(), scheduler, noise[:1], reference[:1], text[:1], generator=8, **options)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)
    other = denoise(Linear(), scheduler, noise, reference, text, generator=80, **options)
    assert not torch.allclose(together, other, atol=1e-2)


def test_callback_replaces_latents_and_interrupt_stops():
    noise, reference, text, _ = case()
    seen, ticks = [], []

    def callback(index, timestep, state):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(state["latents"])} if index == 3 else None

    result = denoise(
        Oracle(noise, make_scheduler("sd")), make_scheduler("sd"), noise, reference, text,
        num_inference_steps=10, callback=callback,
        interrupted=lambda: len(seen) == 4, progress=lambda: ticks.append(1),
    )  # fmt: skip
    assert [index for index, _ in seen] == [0, 1, 2, 3] and len(ticks) == 4
    assert seen[0][1] == 901 and not result.any()


def test_callback_may_change_the_text_too():
    noise, reference, text, _ = case()
    scheduler = make_scheduler("sd")
    oracle = Oracle(noise, scheduler)
    denoise(
        oracle, scheduler, noise, reference, text, num_inference_steps=3,
        callback=lambda index, timestep, state: {"text": state["text"] + 1},
    )  # fmt: skip
    shown = [seen for _, seen, _ in oracle.seen]
    assert torch.equal(shown[0], text) and torch.equal(shown[1], text + 1)


def test_non_finite_latents_name_step_and_layer():
    noise, reference, text, _ = case()

    class Breaks(Linear):
        def forward(self, sample, timestep, encoder_hidden_states, cond_frames=0):
            value = float("inf") if int(timestep) < 700 else 1.0
            return self.layer(sample * value)

    with pytest.raises(NonFiniteLatentsError, match=r"after step 2 \(timestep 626\).*'layer'"):
        denoise(Breaks(), make_scheduler("sd"), noise, reference, text, num_inference_steps=8)


def test_shapes_that_do_not_fit_are_named():
    noise, reference, text, _ = case()
    scheduler = make_scheduler("sd")
    with pytest.raises(ValueError, match=r"text must be \(B=2, T=5, L, D\)"):
        denoise(Linear(), scheduler, noise, reference, text[:, :3])
    with pytest.raises(ValueError, match="differ in more than"):
        denoise(Linear(), scheduler, noise, reference[..., :2], text)
    assert text_per_frame(text[:, 0], 5).shape == text.shape
