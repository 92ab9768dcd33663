"""The two functions of BroadWay against their formulas written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stvision.guidance import (
    attention_energy,
    band_energies,
    fourier_motion_enhancement,
    high_band,
    motion_gain,
    resize_maps,
    temporal_self_guidance,
)
from stvision.guidance.maps import gather_maps
from stvision.guidance.volume_maps import (
    frame_maps,
    volume_high_band,
    volume_self_guidance,
)


def random_maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)


def written_out(maps, band, gain):
    """Enhancement by a loop over bins: DFT, scaled bins, inverse DFT, all complex128."""
    frames = maps.shape[-1]
    n = torch.arange(frames, dtype=torch.float64)
    spectrum = [
        (maps * torch.exp(-2j * math.pi * k * n / frames)).sum(-1) * (gain if band[k] else 1)
        for k in range(frames)
    ]
    out = sum(
        spectrum[k][..., None] * torch.exp(2j * math.pi * k * n / frames) for k in range(frames)
    )
    assert (out.imag.abs() / frames).max() < 1e-12  # the band is symmetric
    return out.real / frames


def test_high_band_is_that_of_the_paper_for_even_lengths():
    for tau in range(8):
        expected = [abs(k - 8) <= tau for k in range(16)]
        assert high_band(16, tau).tolist() == expected
    assert high_band(15, 7).tolist() == [False] + [True] * 14
    assert not high_band(1, 7).any()


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(2, 17), tau=st.integers(0, 9), seed=st.integers(0, 99))
def test_enhancement_is_the_written_out_transform(frames, tau, seed):
    maps = random_maps(3, 2, frames, frames, seed=seed)
    band = high_band(frames, tau).tolist()
    assert all(band[k] == band[-k] for k in range(1, frames)) and not band[0]
    out = fourier_motion_enhancement(maps, tau, 1.7)
    expected = written_out(maps, band, 1.7 if any(band) else 1.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out.sum(-1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [8, 13, 16])
def test_band_energies_are_those_of_the_spectrum_and_add_up(frames):
    maps = random_maps(5, frames, frames)
    power = torch.fft.fft(maps).abs().square() / frames
    band = high_band(frames, 3)
    high, low = band_energies(maps, 3)
    torch.testing.assert_close(high, power[..., band].sum(-1).mean())
    torch.testing.assert_close(low, power[..., ~band].sum(-1).mean())
    torch.testing.assert_close(high + low, attention_energy(maps))


@pytest.mark.parametrize("frames", [9, 16])
def test_gain_restores_the_energy_or_exceeds_it(frames):
    maps, earlier = random_maps(6, frames, frames), random_maps(6, frames, frames, seed=1)
    energy = attention_energy(maps)
    guided = temporal_self_guidance(maps, earlier, 0.6)
    assert attention_energy(guided) < energy
    restored = fourier_motion_enhancement(guided, 7, 1e-6, energy=energy)
    torch.testing.assert_close(attention_energy(restored), energy)
    stronger = motion_gain(energy, *band_energies(guided, 7), 0) * 1.2
    raised = fourier_motion_enhancement(guided, 7, float(stronger), energy=energy)
    assert attention_energy(raised) > energy


def test_a_uniform_map_has_no_high_band_and_no_division_by_it():
    for dtype in (torch.float64, torch.float32):
        maps = torch.full((2, 16, 16), 1 / 16, dtype=dtype)
        high, low = band_energies(maps, 7)
        assert float(low) == pytest.approx(1 / 16)
        assert motion_gain(torch.tensor(1.0, dtype=dtype), high, low, 1.5) == 1.5
        out = fourier_motion_enhancement(maps, 7, 1.5, energy=torch.tensor(1.0, dtype=dtype))
        torch.testing.assert_close(out, maps)


def test_self_guidance_ends_at_the_map_and_at_the_reference():
    maps, earlier = random_maps(2, 5, 5), random_maps(2, 5, 5, seed=1)
    assert torch.equal(temporal_self_guidance(maps, earlier, 0), maps)
    torch.testing.assert_close(temporal_self_guidance(maps, earlier, 1), earlier)


def test_clamp_leaves_no_negative_weight():
    maps = random_maps(4, 16, 16)
    free = fourier_motion_enhancement(maps, 7, 10)
    clamped = fourier_motion_enhancement(maps, 7, 10, clamp=True)
    assert free.min() < 0 <= clamped.min()
    expected = free.clamp_min(0)
    torch.testing.assert_close(clamped, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    maps = random_maps(2, 16, 16, dtype=dtype)
    out = fourier_motion_enhancement(maps, 7, 1.5)
    assert out.dtype == torch.float32
    expected = fourier_motion_enhancement(maps.double(), 7, 1.5)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(6, 10), (7, 4), (2, 3), (3, 5)])
def test_resizing_is_that_of_images_and_keeps_rows(mode, size):
    maps = random_maps(2, 3, 5, 4, 6, 6)
    out = resize_maps(maps, size, mode)
    options = {} if mode == "nearest" else {"align_corners": False}
    images = maps.flatten(3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(images, size, mode=mode, **options)
    torch.testing.assert_close(out.flatten(3).permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out.sum(-1)))
    some = torch.tensor([size[0] * size[1] - 1, 0, 2])
    torch.testing.assert_close(gather_maps(maps, some, size, mode), out.flatten(1, 2)[:, some])


def random_volume_maps(causal: bool, frames=5, offsets=3, seed=0):
    length = frames * offsets
    scores = random_maps(2, length, length, seed=seed).log()
    if causal:
        hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).view(2, frames, offsets, frames, offsets)


@pytest.mark.parametrize("tau", [1, 7])
def test_volume_band_is_the_transform_of_each_offset_over_its_visible_frames(tau):
    frames, offsets = 5, 3
    maps = random_volume_maps(True)
    high = volume_high_band(maps, tau, causal=True)
    expected = torch.zeros_like(maps)
    for t in range(frames):
        for o in range(offsets):
            for p in range(offsets):
                n = t + 1 if p <= o else t
                if n:
                    band = high_band(n, tau, of=frames)
                    profile = torch.fft.fft(maps[:, t, o, :n, p])
                    expected[:, t, o, :n, p] = torch.fft.ifft(profile * band).real
    torch.testing.assert_close(high, expected, rtol=0, atol=1e-12)
    # hidden keys stay hidden, rows and every offset's share stay, energies add up
    assert not high[maps == 0].any()
    torch.testing.assert_close(high.sum(-2), torch.zeros_like(high.sum(-2)), rtol=0, atol=1e-12)
    energy = high.square().sum() + (maps - high).square().sum()
    torch.testing.assert_close(energy, maps.square().sum())


def test_volume_form_with_one_token_a_frame_is_the_plain_one():
    maps = random_volume_maps(False, frames=8, offsets=1)
    plain = maps[..., 0, :, 0]
    high = volume_high_band(maps, 3, causal=False)[..., 0, :, 0]
    expected = fourier_motion_enhancement(plain, 3, 2.0) - plain
    torch.testing.assert_close(high, expected, rtol=0, atol=1e-12)
    earlier = random_maps(2, 8, 8, seed=4)
    guided = volume_self_guidance(maps, earlier[:, None], 0.4)[..., 0, :, 0]
    torch.testing.assert_close(guided, temporal_self_guidance(plain, earlier, 0.4))


@pytest.mark.parametrize("causal", [True, False])
def test_volume_guidance_gives_frames_what_the_reference_gives(causal):
    maps, other = random_volume_maps(causal), random_volume_maps(causal, seed=3)
    reference = frame_maps(other)
    torch.testing.assert_close(volume_self_guidance(maps, reference, 0), maps)
    torch.testing.assert_close(volume_self_guidance(maps, frame_maps(maps), 0.7), maps)
    full = volume_self_guidance(maps, reference, 1)
    half = volume_self_guidance(maps, reference, 0.5)
    for guided in (half, full):
        assert not guided[maps == 0].any()
        rows = guided.sum((-2, -1))
        torch.testing.assert_close(rows, torch.ones_like(rows))
    torch.testing.assert_close(frame_maps(full), reference)
    torch.testing.assert_close(frame_maps(half), (reference + frame_maps(maps)) / 2)
