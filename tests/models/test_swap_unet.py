"""Inflation by a temporal branch and Swap-CA: the image U-Net when fresh, and what users rely on."""

from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from support_guidance import assert_same, snapshot
from support_seer import tiny_seer_components
from torch import nn

from stvision.attention import SwapAttention
from stvision.config import parse_config
from stvision.guidance import BroadWay
from stvision.models.seer import SeerUNetModel
from stvision.models.swap import SwapTransformer, TemporalBranch
from stvision.pipelines.seer import SeerPipeline
from stvision.train.seer import SeerConfig

TINY = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "sample_size": 8,
}
SWAP = {"temporal": "swap", "temporal_kwargs": {"window": (None, 4, 4), "ff_mult": 2}}


def image_unet(config=TINY):
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def shaken(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


#: one attention block on each side, for what is slow
SMALL = {
    **TINY,
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}


def swapped(**options):
    return shaken(SeerUNetModel.from_unet2d(image_unet(), **{**SWAP, **options}))


def inputs(batch=2, frames=3, size=(8, 8)):
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, frames, *size, generator=generator)
    text = torch.randn(batch, frames, 5, 12, generator=generator)
    return sample, torch.tensor([10, 700][:batch]), text


@pytest.mark.parametrize("size", [(8, 8), (13, 9)])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_fresh_inflation_is_the_image_unet_at_every_frame(size, layers):
    image = image_unet()
    sample, time, text = inputs(frames=4, size=size)
    video = SeerUNetModel.from_unet2d(image, **SWAP, norm_over_frames=False, temporal_layers=layers)
    out = video(sample, time, text).sample
    for frame in range(4):
        expected = image(sample[:, :, frame], time, text[:, frame]).sample
        torch.testing.assert_close(out[:, :, frame], expected, rtol=1e-5, atol=1e-6)
    # with norms over frames: one frame bit for bit
    joint = SeerUNetModel.from_unet2d(image, **SWAP)
    one = joint(sample[:, :, :1], time, text[:, :1]).sample[:, :, 0]
    assert torch.equal(one, image(sample[:, :, 0], time, text[:, 0]).sample)


def test_a_fresh_module_is_the_identity_and_neither_part_doubles_it():
    module = SwapTransformer(16, 2, norm_num_groups=4)
    x = torch.randn(6, 16, 8, 8)
    assert torch.equal(module(x, 3), x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert module(last, 3).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module(last, 3), x)
    shaken(module.swaps[0])  # its zero branch still leaves the spatial one alone
    branch = module.branches[0](x, 3)
    assert not branch.any()
    shaken(module.branches[0])
    assert (module(x, 3) - x).abs().max() > 1e-2
    assert module(x, 3).is_contiguous()


@torch.no_grad()
def test_the_module_is_the_sum_of_its_branches_and_their_exchange():
    torch.manual_seed(0)
    windows = {"window": (2, 4, 4), "shift": [1, 2, 1]}
    module = shaken(SwapTransformer(16, 2, num_layers=2, norm_num_groups=4, **windows))
    x = torch.randn(6, 16, 6, 5)
    y = x
    for number in range(2):
        z_s = y.unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2)
        z_t = module.branches[number](y, 3, 1)
        y = module.swaps[number](z_s, z_t, 1).permute(0, 1, 4, 2, 3).flatten(0, 1)
    assert [swap.query for swap in module.swaps] == ["temporal", "spatial"]
    assert [swap.block.attn.shift for swap in module.swaps] == [(0, 0, 0), (1, 2, 1)]
    torch.testing.assert_close(module(x, 3, 1), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_frames", [3, 1])
@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_the_temporal_branch_is_its_description_pixel_by_pixel(norm_frames, skip):
    torch.manual_seed(0)
    module = shaken(TemporalBranch(16, 2, norm_num_groups=4)).double()
    x = torch.randn(6, 16, 3, 4, dtype=torch.float64)
    clip = x.unflatten(0, (2, 3)).transpose(1, 2)  # (B, C, T, h, w)
    if norm_frames == 3:
        normed = module.norm(clip)
    else:
        normed = module.norm(x).unflatten(0, (2, 3)).transpose(1, 2)
    hidden = torch.nn.functional.silu(normed).permute(0, 3, 4, 1, 2).flatten(0, 2)  # (N, C, T)
    hidden = torch.nn.functional.conv1d(hidden, module.conv.weight, module.conv.bias, padding=1)
    tokens = hidden.transpose(1, 2)
    block = module.block
    attended = block.attn1(block.norm1(tokens)[:, :, None, None])[:, :, 0, 0]
    tokens = tokens + attended
    update = block.ff(block.norm3(tokens))
    update[:, :skip] = 0
    tokens = tokens + update
    tokens = tokens @ module.proj_out.weight.flatten(1).T + module.proj_out.bias
    expected = tokens.unflatten(0, (2, 3, 4)).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(module(x, 3, norm_frames, skip), expected)


def test_roles_alternate_over_the_network():
    model = SeerUNetModel.from_unet2d(image_unet(), **SWAP)
    roles = [m.query for m in model.modules() if isinstance(m, SwapAttention)]
    by_block = [
        [t.swaps[0].query for t in block.temporal_attentions]
        for block in (model.down_blocks[0], model.mid_block, model.up_blocks[1])
    ]
    assert by_block == [["temporal"], ["spatial"], ["temporal", "spatial"]]
    assert len(roles) == 4


def test_parameters_are_within_a_tenth_of_the_default_and_configs_differ_in_it_alone():
    ours, default = (
        parse_config(SeerConfig, ["--config", name], "test")
        for name in ("seer_default_swap", "seer_default")
    )
    for name in vars(default):
        if name not in ("inflation", "output_dir", "loop"):
            assert getattr(ours, name) == getattr(default, name), name
    # as many seconds, so fewer of the slower steps
    assert replace(ours.loop, max_steps=default.loop.max_steps) == default.loop
    assert ours.loop.max_steps < default.loop.max_steps
    image = parse_config(SeerConfig, ["--config", "seer_default_scratch"], "test").unet
    counts = []
    for config in (ours, default):
        with torch.device("meta"):
            model = SeerUNetModel(**SeerUNetModel.inflated_config(image, **config.inflation))
        counts.append(sum(p.numel() for p in model.temporal_parameters()))
    assert 0.9 < counts[0] / counts[1] < 1.1
    text = yaml.safe_load(yaml.safe_dump(ours.inflation))
    assert text["temporal_kwargs"]["window"] == [None, 8, 8]


def gradients(model, sample, time, text, **kwargs):
    model.zero_grad()
    model(sample, time, text, **kwargs).sample.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_equal_gradients():
    model = swapped(skip_reference_ff="training").train()
    plain = gradients(model, *inputs(), cond_frames=1)
    model.enable_gradient_checkpointing()
    kinds = []
    saved = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *a: kinds.append(type(a[0])) or saved(*a)
    recomputed = gradients(model, *inputs(), cond_frames=1)
    assert kinds.count(SwapTransformer) == 4
    assert plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "norm_over_frames"),
    [(SWAP, False), (SWAP, True), ({}, False)],
    ids=["swap", "swap-joint-norms", "transformer"],
)
def test_memory_format_changes_nothing_but_rounding(options, norm_over_frames):
    """Frozen image layers too: the first temporal norm then has an input without gradient."""
    model = SeerUNetModel.from_unet2d(image_unet(), **options, norm_over_frames=norm_over_frames)
    shaken(model).freeze_image_layers()
    args = inputs(size=(13, 9))
    with torch.no_grad():
        expected = model(*args).sample
    plain = gradients(model, *args)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(*args).sample, expected, rtol=1e-4, atol=1e-5)
    last = gradients(model, *args)
    assert set(last) == {n for n, _ in model.named_parameters() if "temporal_attentions." in n}
    for name, value in plain.items():
        torch.testing.assert_close(last[name], value, rtol=1e-3, atol=1e-5 * value.abs().max())


@torch.no_grad()
def test_skipped_reference_frames_leave_both_feed_forwards():
    sample, time, text = inputs()
    results = {}
    for mode in ("never", "always"):
        results[mode] = swapped(skip_reference_ff=mode)(sample, time, text, cond_frames=1).sample
    assert (results["never"] - results["always"]).abs().max() > 1e-3


@torch.no_grad()
def test_an_item_alone_equals_the_item_in_a_batch_and_backends_agree():
    model = swapped()
    sample, time, text = inputs()
    together = model(sample, time, text).sample
    for item in range(2):
        part = slice(item, item + 1)
        alone = model(sample[part], time[part], text[part]).sample
        torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-5)
    model.set_attention_backend("math")
    assert {m.block.attn.backend for m in model.modules() if isinstance(m, SwapAttention)} == {
        "math"
    }
    torch.testing.assert_close(model(sample, time, text).sample, together, rtol=1e-4, atol=1e-5)


def test_save_and_load_are_equal(tmp_path):
    model = swapped(norm_over_frames=False)
    model.save_pretrained(tmp_path)
    loaded, info = SeerUNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.temporal == "swap"
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)


@torch.no_grad()
def test_bfloat16_follows_float32():
    model = swapped()
    sample, time, text = inputs()
    expected = model(sample, time, text).sample
    got = nn.Module.to(model, torch.bfloat16)(sample.bfloat16(), time, text.bfloat16()).sample
    error = (got.float() - expected).norm() / expected.norm()
    assert got.dtype == torch.bfloat16 and error < 0.03, error


def counted_compilation(model, compile_it, calls):
    """Graphs that a compilation makes over some calls, each compared with the plain network."""
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    expected = [model(*args).sample for args in calls]
    compiled = compile_it(counting)
    for args, wanted in zip(calls, expected, strict=True):
        torch.testing.assert_close(compiled(*args).sample, wanted, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    return len(graphs)


@torch.no_grad()
def test_compiles_without_breaks_and_without_a_graph_per_length():
    model = shaken(SeerUNetModel.from_unet2d(image_unet(SMALL), **SWAP))
    calls = [inputs(frames=frames) for frames in (3, 5, 4)]
    for args in calls:
        torch._dynamo.maybe_mark_dynamic(args[0], 2)
        torch._dynamo.maybe_mark_dynamic(args[2], 1)
    made = counted_compilation(
        model, lambda backend: torch.compile(model, fullgraph=True, backend=backend), calls
    )
    assert made == 1


@torch.no_grad()
def test_regional_compilation_takes_both_blocks():
    model = shaken(SeerUNetModel.from_unet2d(image_unet(SMALL), **SWAP))
    regions = {"TemporalBlock", "SwapBlock"}
    assert regions <= set(model._repeated_blocks)

    def compiled(backend):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        kinds = {type(m).__name__ for m in model.modules() if m._compiled_call_impl is not None}
        assert regions <= kinds
        return model

    assert counted_compilation(model, compiled, [inputs()]) > 0


def test_a_pipeline_predicts_saves_and_is_guided(tmp_path):
    parts = tiny_seer_components()
    config = {k: v for k, v in parts["unet"].config.items() if not k.startswith("_")}
    config |= {"temporal": "swap", "temporal_kwargs": {"window": [None, 4, 4]}}
    torch.manual_seed(0)
    parts["unet"] = shaken(SeerUNetModel(**config))
    pipe = SeerPipeline(**parts, num_frames=5, num_reference_frames=2, num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    frames = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))

    def call(pipeline):
        return pipeline("open the door", frames, generator=0, output_type="latent").frames

    plain = call(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = SeerPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), plain)

    before = snapshot(pipe)
    with BroadWay(fraction=1).applied_to(pipe) as run:
        guided = call(pipe)
    assert_same(before, snapshot(pipe))
    assert (guided - plain).abs().max() > 1e-3
    # the attention over frames of each temporal branch in the guided up block, in three steps
    assert len(run.records) == 3 * 2
    assert all(".branches.0.block.attn1" in record.module for record in run.records)
    with BroadWay(alpha=0, beta=1, fraction=1).applied_to(pipe):
        torch.testing.assert_close(call(pipe), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": "both"}, "temporal must be one of 'transformer', 'swap', got 'both'"),
        ({"temporal": "transformer"}, "temporal_kwargs are options of temporal='swap'"),
        ({"attention": "full"}, "choose the mechanism of temporal='transformer'"),
        ({"temporal_kwargs": {"heads": 2}}, "temporal_kwargs may hold causal, .* got 'heads'"),
    ],
)
def test_bad_options_get_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        swapped(**options)
