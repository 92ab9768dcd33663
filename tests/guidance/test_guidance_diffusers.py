"""BroadWay on every video pipeline of diffusers that has temporal attention, tiny and random."""

import diffusers
import pytest
import torch
from support_diffusers import call_arguments, tiny_video_pipeline
from support_guidance import assert_same, snapshot

from stvision.guidance import BroadWay, disable_broadway, enable_broadway

PIPELINES = (
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "AnimateDiffControlNetPipeline",
    "AnimateDiffSparseControlNetPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "PIAPipeline",
    "TextToVideoSDPipeline",
    "VideoToVideoSDPipeline",
    "I2VGenXLPipeline",
)
NEUTRAL = BroadWay(alpha=0, beta=1, fraction=1)
#: steps that are run of the six asked for: half of a given video, and PIA's own strength of 1
STEPS = 6


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if not hasattr(diffusers, name):
            pytest.skip(f"this diffusers has no {name}")
        if name not in made:
            made[name] = tiny_video_pipeline(name)
        return made[name]

    return get


def call(pipe, frames=4, guidance_scale=5.0, **options):
    name = type(pipe).__name__
    torch.manual_seed(0)  # some encode their pictures with the global generator
    given = {
        **call_arguments(name, frames),
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **options,
    }
    if name == "I2VGenXLPipeline":
        given["clip_skip"] = None  # its own default needs an attribute of older transformers
    return pipe(**given).frames


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("frames", "guidance_scale"), [(4, 5.0), (5, 1.0)])
def test_guided_in_the_first_steps_and_left_as_it_was(pipes, name, frames, guidance_scale):
    pipe = pipes(name)
    plain, before = call(pipe, frames, guidance_scale), snapshot(pipe)
    with BroadWay(fraction=0.4).applied_to(pipe) as run:
        guided = call(pipe, frames, guidance_scale)
    assert_same(before, snapshot(pipe))
    assert torch.equal(call(pipe, frames, guidance_scale), plain)
    # float32 latents of a random network may be large: the change stands out of rounding
    assert (guided - plain).abs().max() > 1e-3 * plain.abs().max()
    assert guided.isfinite().all()
    steps = STEPS // 2 if "VideoToVideo" in name else STEPS
    assert run.calls == steps
    guided_steps = -(-4 * steps // 10)
    assert [r.step for r in run.records] == [i for i in range(guided_steps) for _ in range(8)]
    assert all(record.gain.shape == (1,) for record in run.records)
    with NEUTRAL.applied_to(pipe):
        neutral = call(pipe, frames, guidance_scale)
    torch.testing.assert_close(neutral, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["AnimateDiffPipeline", "I2VGenXLPipeline"])
def test_each_video_of_a_batch_has_its_own_gain(pipes, name):
    """Two prompts, or two videos of one (AnimateDiff's pipelines make one, whatever is asked)."""
    pipe = pipes(name)
    shape = (2, 4, 4, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = BroadWay(beta=0.1, fraction=1)
    texts = ["open the door", "a red cup" if name == "AnimateDiffPipeline" else "open the door"]
    many = {"prompt": texts}
    if name == "I2VGenXLPipeline":
        many = {"prompt": texts[0], "num_videos_per_prompt": 2}
    with options.applied_to(pipe) as run:
        together = call(pipe, latents=latents, **many)
    assert all(record.gain.shape == (2,) for record in run.records)
    # in the reference block itself guidance changes nothing and the restoring gain is 1
    gains = [r.gain for r in run.records if r.module.startswith("up_blocks.2")]
    assert all(abs(gain[0] - gain[1]) > 1e-6 for gain in gains)
    for item in range(2):
        with options.applied_to(pipe) as run:
            alone = call(pipe, prompt=texts[item], latents=latents[item : item + 1])
        assert run.records[0].gain.shape == (1,)
        torch.testing.assert_close(alone[0], together[item], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["AnimateDiffPipeline", "TextToVideoSDPipeline"])
def test_half_precision(name, dtype):
    pipe = tiny_video_pipeline(name)
    latents = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with BroadWay().applied_to(pipe):
        expected = call(pipe, num_inference_steps=2, latents=latents)
    pipe.to(dtype)
    with BroadWay().applied_to(pipe) as run:
        out = call(pipe, num_inference_steps=2, latents=latents.to(dtype))
    assert {record.before.dtype for record in run.records} == {torch.float32}
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (0.01 if dtype == torch.float16 else 0.08), error


@pytest.mark.parametrize("name", ["AnimateDiffPipeline", "I2VGenXLPipeline"])
def test_weights_that_come_and_go(name):
    """Offload of each layer, here from meta tensors to the CPU, changes nothing."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_video_pipeline(name)
    with BroadWay().applied_to(pipe):
        expected = call(pipe)
    plain = call(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert all(p.device.type == "meta" for p in pipe.unet.parameters())
    before = snapshot(pipe)
    with BroadWay().applied_to(pipe) as run:
        assert torch.equal(call(pipe), expected) and run.records
    assert_same(before, snapshot(pipe))
    assert torch.equal(call(pipe), plain)


def test_free_init_samples_again_and_counts_anew(pipes):
    pipe = pipes("AnimateDiffPipeline")
    pipe.enable_free_init(num_iters=2)
    try:
        with BroadWay().applied_to(pipe) as run:
            call(pipe)
    finally:
        pipe.disable_free_init()
    assert run.calls == 2 * STEPS
    assert sorted({(r.run, r.step) for r in run.records}) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_free_noise_is_refused_before_and_during():
    pipe = tiny_video_pipeline("AnimateDiffPipeline")
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(ValueError, match="FreeNoise is on"):
        enable_broadway(pipe)
    pipe.disable_free_noise()
    plain = call(pipe)
    enable_broadway(pipe)
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(ValueError, match=r"call pipe\.disable_free_noise\(\)"):
        call(pipe)
    pipe.disable_free_noise()
    disable_broadway(pipe)
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize("how", ["whole", "in place", "regional"])
def test_compiled_networks_are_refused_in_one_sentence(how):
    pipe = tiny_video_pipeline("AnimateDiffPipeline")
    plain = pipe.unet
    if how == "whole":
        pipe.unet = torch.compile(plain)
    elif how == "in place":
        plain.compile()
    else:
        plain.up_blocks[1].motion_modules[0].compile()
    with pytest.raises(ValueError, match=r"compiled with torch\.compile.*unet\._orig_mod"):
        enable_broadway(pipe)


def test_a_pipeline_without_attention_over_frames_is_refused():
    pipe = tiny_video_pipeline("AnimateDiffPipeline")
    pipe.unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DConditionModel has no temporal attention"):
        enable_broadway(pipe)
