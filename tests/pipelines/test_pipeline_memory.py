"""Counting what a computation needs, against computations whose needs are known."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from stvision.pipelines.memory import (
    activation_bytes,
    decode_frames,
    encode_frames,
    largest_layer_bytes,
    weight_bytes,
)


def tiny_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def test_live_bytes_of_a_chain():
    def chain(zeros):
        x = zeros(1000)
        for _ in range(5):
            x = x + 1  # the old and the new tensor are alive together, never more
        return x

    assert activation_bytes(chain) == 2 * 4000


def test_kept_tensors_add_up_and_views_do_not():
    def keep(zeros):
        x = zeros(1000)
        return [x * 2, x * 3, x.view(10, 100), x[:10]]

    assert activation_bytes(keep) == 3 * 4000

    def in_place(zeros):
        x = zeros(1000)
        for _ in range(5):
            x.add_(1)
        return x

    assert activation_bytes(in_place) == 4000


@contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def doubles_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        nullcontext,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        two_threads,
        doubles_by_default,
    ],
    ids=["plain", "grad", "inference", "autocast", "threads", "doubles"],
)
def test_weights_do_not_count_and_needs_scale_with_the_batch(around):
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))

    def need(batch):
        return activation_bytes(lambda zeros: net(zeros(batch, 64, dtype=torch.float32)))

    with around():
        one, four = need(1), need(4)
    # The input, and the first layer's output before and after the rectifier.
    assert one == 4 * (64 + 2 * 256) and four == 4 * one
    assert next(net.parameters()).device.type == "cpu" and bool(torch.isfinite(net[0].weight).all())
    assert need(1) == one


def test_views_of_weights_do_not_count():
    weight = nn.Parameter(torch.randn(64, 256))

    def run(zeros):
        x = zeros(1, 64)
        views = [weight.t(), weight[:10], weight.view(-1), weight.detach(), weight.transpose(0, 1)]
        return x, views, weight.reshape(128, 128), weight.to(torch.float32)

    assert activation_bytes(run) == 4 * 64
    assert activation_bytes(lambda zeros: weight.double()) == 8 * weight.numel()


def test_weight_bytes():
    net = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    floats = 10 * 20 + 20 + 4 * 20
    assert weight_bytes(net) == 4 * floats + 8  # the batch counter is a long
    assert weight_bytes(net, torch.bfloat16) == 2 * floats + 8
    assert largest_layer_bytes(net) == 4 * 220
    assert weight_bytes(None) == 0


@pytest.mark.parametrize("shift", [None, 0.3])
def test_chunks_of_encoding_and_decoding(shift):
    vae = tiny_vae(shift_factor=shift, scaling_factor=0.5)
    frames = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        flat = frames.transpose(1, 2).flatten(0, 1)
        plain = (vae.encode(flat).latent_dist.mode() - (shift or 0)) * 0.5
        plain = plain.unflatten(0, (2, 5)).transpose(1, 2)
        whole = encode_frames(vae, frames)
        assert torch.equal(whole, plain) or shift is None
        torch.testing.assert_close(whole, plain, atol=0, rtol=1e-6)
        for chunk in (1, 3, 4, 10, 99):
            parts = encode_frames(vae, frames, chunk=chunk)
            torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
            assert chunk < 10 or torch.equal(parts, whole)
        decoded = decode_frames(vae, whole)
        for chunk in (1, 3, 4, 10, 99):
            parts = decode_frames(vae, whole, chunk=chunk)
            torch.testing.assert_close(parts, decoded, atol=1e-5, rtol=0)
            assert chunk < 10 or torch.equal(parts, decoded)


def test_tiling_is_off_again_even_after_an_error():
    vae = tiny_vae()
    with torch.no_grad():
        decode_frames(vae, torch.randn(1, 4, 2, 8, 8), tiling=True)
        assert not vae.use_tiling
        with pytest.raises(RuntimeError):
            decode_frames(vae, torch.randn(1, 5, 2, 8, 8), tiling=True)
        assert not vae.use_tiling
        vae.enable_tiling()  # the user's own switch stays
        decode_frames(vae, torch.randn(1, 4, 2, 8, 8), tiling=True)
        assert vae.use_tiling


def test_tiles_and_chunks_lower_the_count():
    vae = tiny_vae()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 16

    def need(frames, tiling):
        def run(zeros):
            return decode_frames(vae, zeros(1, 4, frames, 16, 16), tiling=tiling)

        return activation_bytes(run)

    assert need(1, True) < need(1, False) / 2 < need(4, False) / 7
