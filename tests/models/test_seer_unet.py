"""The inflated U-Net: the sheet's proofs (a) to (e), and what users rely on."""

import itertools
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stvision.models.seer import SeerUNetModel
from stvision.models.temporal import TemporalTransformer

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
SD2 = {**TINY, "attention_head_dim": (2, 4), "use_linear_projection": True}
DEEP = {
    **TINY,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": (1, 2, 1),
    "transformer_layers_per_block": 2,
    "resnet_time_scale_shift": "scale_shift",
}
PLAIN = {
    **TINY,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}


def image_unet(config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def shaken(model: nn.Module) -> nn.Module:
    """No zero weights: every layer has an effect."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def seer(**options) -> SeerUNetModel:
    return shaken(SeerUNetModel.from_unet2d(image_unet(TINY), **options))


def inputs(batch: int = 2, frames: int = 3, size: tuple[int, int] = (8, 8)) -> tuple:
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, frames, *size, generator=generator)
    text = torch.randn(batch, frames, 5, 12, generator=generator)
    return sample, torch.tensor([10, 700][:batch]), text


@pytest.mark.parametrize("config", [TINY, SD2, DEEP, PLAIN], ids=["sd1", "sd2", "deep", "plain"])
@pytest.mark.parametrize("size", [(8, 8), (13, 9)])
@torch.no_grad()
def test_a_one_frame_is_the_image_unet_bit_for_bit(config, size) -> None:
    image = image_unet(config)
    video = SeerUNetModel.from_unet2d(image)
    sample, time, text = inputs(frames=1, size=size)
    expected = image(sample[:, :, 0], time, text[:, 0]).sample
    assert torch.equal(video(sample, time, text).sample[:, :, 0], expected)


@pytest.mark.parametrize("norm_over_frames", [True, False])
@torch.no_grad()
def test_b_equal_frames_are_the_image_unet(norm_over_frames) -> None:
    image = image_unet(TINY)
    video = SeerUNetModel.from_unet2d(image, norm_over_frames=norm_over_frames)
    sample, time, text = inputs()
    sample = sample[:, :, :1].expand(-1, -1, 4, -1, -1)
    out = video(sample, time, text[:, :1].expand(-1, 4, -1, -1)).sample
    expected = image(sample[:, :, 0], time, text[:, 0]).sample
    for frame in range(4):
        torch.testing.assert_close(out[:, :, frame], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_c_different_frames_are_image_by_image_only_with_norms_per_frame() -> None:
    image = image_unet(TINY)
    sample, time, text = inputs(frames=4)
    frames = [image(sample[:, :, f], time, text[:, f]).sample for f in range(4)]
    expected = torch.stack(frames, dim=2)
    apart = SeerUNetModel.from_unet2d(image, norm_over_frames=False)
    torch.testing.assert_close(apart(sample, time, text).sample, expected, rtol=1e-5, atol=1e-5)
    joint = SeerUNetModel.from_unet2d(image, norm_over_frames=True)
    assert (joint(sample, time, text).sample - expected).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_d_a_fresh_temporal_transformer_is_the_identity(size) -> None:
    module = TemporalTransformer(16, 2, norm_num_groups=4)
    x = torch.randn(6, 16, *size)
    assert torch.equal(module(x, 3), x)
    last = x.contiguous(memory_format=torch.channels_last)
    out = module(last, 3)
    assert torch.equal(out, x) and out.is_contiguous(memory_format=torch.channels_last)
    shaken(module)
    assert (module(x, 3) - x).abs().max() > 1e-2


@torch.no_grad()
def test_e_temporal_transformer_with_norm_per_frame_is_causal_in_windows() -> None:
    """Only the frame norm of the wrapper leaks; frames before the changed one stay."""
    module = shaken(TemporalTransformer(16, 2, norm_num_groups=4))
    x = torch.randn(4, 16, 8, 8)
    moved = x.clone()
    moved[2, :, 5, 6] += torch.randn(16)
    changed = (module(x, 4, norm_frames=1) - module(moved, 4, norm_frames=1)).abs().amax(1) > 1e-6
    assert not changed[:2].any() and changed[2].any()
    assert changed[3, 4:, 4:].all()  # the whole window, later
    joint = (module(x, 4) - module(moved, 4)).abs().amax(1) > 0
    assert joint[0].any()  # statistics over frames see the future


def reference_group_norm(x: Tensor, norm: nn.GroupNorm, frames: int) -> Tensor:
    """(B·T, C, h, w) in float64, statistics over frames."""
    y = x.double().unflatten(0, (-1, frames)).transpose(1, 2)
    y = y.unflatten(1, (norm.num_groups, -1))
    mean = y.mean((2, 3, 4, 5), keepdim=True)
    var = y.var((2, 3, 4, 5), keepdim=True, unbiased=False)
    y = ((y - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
    y = y * norm.weight.double()[:, None, None, None] + norm.bias.double()[:, None, None, None]
    return y.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (9, 5), (4, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("skip", [0, 2])
def test_temporal_transformer_against_its_description(size, layout, skip) -> None:
    frames = 3
    module = shaken(TemporalTransformer(16, 2, norm_num_groups=4))
    block = module.transformer_blocks[0].double()
    x = torch.randn(2 * frames, 16, *size).contiguous(memory_format=layout)
    y = reference_group_norm(x, module.norm, frames).unflatten(0, (2, frames))
    y = y.permute(0, 1, 3, 4, 2)
    y = y @ module.proj_in.weight.double().flatten(1).T + module.proj_in.bias.double()
    y = y + block.attn1(block.norm1(y))
    update = block.ff(block.norm3(y))
    update[:, :skip] = 0
    y = (y + update) @ module.proj_out.weight.double().flatten(1).T + module.proj_out.bias.double()
    expected = x.double() + y.permute(0, 1, 4, 2, 3).flatten(0, 1)
    block.float()
    got = module(x, frames, skip_frames=skip)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_item_alone_equals_the_item_in_a_batch() -> None:
    model = seer()
    sample, time, text = inputs()
    together = model(sample, time, text).sample
    for item in range(2):
        part = slice(item, item + 1)
        alone = model(sample[part], time[part], text[part]).sample
        torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shared_text_is_repeated_and_text_of_frames_matters() -> None:
    model = seer()
    sample, time, text = inputs()
    shared = model(sample, time, text[:, 0]).sample
    repeated = model(sample, time, text[:, :1].expand(-1, 3, -1, -1)).sample
    assert torch.equal(shared, repeated)
    assert (model(sample, time, text).sample - shared).abs().max() > 1e-3


@torch.no_grad()
def test_masked_text_tokens_do_not_count() -> None:
    model = seer()
    sample, time, text = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(2, -1)
    other = text.clone()
    other[:, :, 3:] = torch.randn(2, 3, 2, 12)
    a = model(sample, time, text, encoder_attention_mask=mask).sample
    b = model(sample, time, other, encoder_attention_mask=mask.bool()).sample
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    short = model(sample, time, text[:, :, :3]).sample
    torch.testing.assert_close(a, short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_format_changes_nothing_but_rounding() -> None:
    model = seer()
    sample, time, text = inputs(size=(13, 9))
    expected = model(sample, time, text).sample
    model.to(memory_format=torch.channels_last)
    got = model(sample, time, text).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bfloat16_follows_float32() -> None:
    model = seer()
    sample, time, text = inputs()
    expected = model(sample, time, text).sample
    got = nn.Module.to(model, torch.bfloat16)(sample.bfloat16(), time, text.bfloat16()).sample
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 0.03, error


def gradients(model: nn.Module, sample: Tensor, time: Tensor, text: Tensor, **kwargs) -> list:
    model.zero_grad()
    model(sample, time, text, **kwargs).sample.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model = seer(skip_reference_ff="training").train()
    args = inputs()
    plain = gradients(model, *args, cond_frames=1)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    saved = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *a: calls.append(a[0]) or saved(*a)
    recomputed = gradients(model, *args, cond_frames=1)
    assert len(calls) > 10
    assert len(plain) == len(recomputed) == len(list(model.parameters()))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_skip_reference_ff_modes() -> None:
    sample, time, text = inputs()
    results = {}
    for mode, training in itertools.product(("never", "training", "always"), (False, True)):
        model = seer(skip_reference_ff=mode).train(training)
        results[mode, training] = model(sample, time, text, cond_frames=1).sample
    full, skipped = results["never", False], results["always", False]
    assert (full - skipped).abs().max() > 1e-3
    for key in (("never", True), ("training", False)):
        assert torch.equal(results[key], full)
    for key in (("training", True), ("always", True)):
        assert torch.equal(results[key], skipped)


def test_freezing_leaves_the_temporal_layers() -> None:
    model = seer()
    model.freeze_image_layers()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".temporal_attentions." in name for name in trained)
    assert len(trained) == len(list(model.temporal_parameters()))
    gradients(model, *inputs())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_save_and_load_are_equal(tmp_path) -> None:
    model = seer(attention="full", attention_kwargs={"causal": True}, norm_over_frames=False)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded, info = SeerUNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name in ("attention", "attention_kwargs", "norm_over_frames", "block_out_channels"):
        assert str(loaded.config[name]) == str(model.config[name]) or list(
            loaded.config[name]
        ) == list(model.config[name])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)
    half = SeerUNetModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.conv_in.weight.dtype == torch.float16


@torch.no_grad()
def test_backends_and_processors_agree() -> None:
    model = seer()
    args = inputs()
    expected = model(*args).sample
    model.set_attention_backend("math")
    kinds = {type(p).__name__ for p in model.attn_processors.values()}
    assert kinds == {"AttnProcessor"}
    torch.testing.assert_close(model(*args).sample, expected, rtol=1e-4, atol=1e-5)
    model.set_attention_backend("sdpa")
    assert torch.equal(model(*args).sample, expected)
    with pytest.raises(ValueError, match="attention backend must be one of"):
        model.set_attention_backend("fast")


def test_a_missing_backend_is_told_when_it_is_chosen(monkeypatch) -> None:
    model = seer()
    before = dict(model.attn_processors)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="pip install --no-deps xformers"):
        model.set_attention_backend("xformers")
    assert dict(model.attn_processors) == before


@pytest.mark.parametrize("name", ["seer-window", "full", "temporal", "neighborhood"])
def test_every_mechanism_fits_the_same_weights(name) -> None:
    model = seer(attention=name)
    other = seer()
    model.load_state_dict(other.state_dict())
    assert gradients(model, *inputs())
    with torch.no_grad():
        out = model(*inputs()).sample
        assert out.shape == inputs()[0].shape and out.isfinite().all()
        if name != "seer-window":
            assert (out - other(*inputs()).sample).abs().max() > 1e-4


def test_hooks_on_image_modules_fire() -> None:
    model = seer()
    seen = []
    for module in (model.down_blocks[0].resnets[0], model.down_blocks[0].attentions[0]):
        module.register_forward_hook(lambda m, a, out: seen.append(type(m).__name__))
    with torch.no_grad():
        model(*inputs())
    assert seen == ["FrameResnetBlock", "FrameTransformer"]


def test_lora_on_the_image_part() -> None:
    peft = pytest.importorskip("peft")
    model = seer()
    args = inputs()
    with torch.no_grad():
        before = model(*args).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=r".*\.attentions\..*attn2\.to_q"))
    with torch.no_grad():
        assert torch.equal(model(*args).sample, before)
    grads = [n for n, p in model.named_parameters() if p.requires_grad]
    assert grads and all("lora" in name for name in grads)


def test_compiles_without_breaks_and_without_a_graph_per_length() -> None:
    small = {
        **TINY,
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    model = shaken(SeerUNetModel.from_unet2d(image_unet(small)))
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    with torch.no_grad():
        for frames in (3, 5, 4):
            args = inputs(frames=frames)
            torch._dynamo.maybe_mark_dynamic(args[0], 2)
            torch._dynamo.maybe_mark_dynamic(args[2], 1)
            got, expected = compiled(*args).sample, model(*args).sample
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"sample must be \(B, 4, T, h, w\)"),
        ({"sample": torch.zeros(2, 3, 3, 8, 8)}, r"sample must be \(B, 4, T, h, w\)"),
        ({"text": None}, "encoder_hidden_states is needed"),
        ({"text": torch.zeros(2, 4, 5, 12)}, "B=2 and T=3"),
        ({"time": torch.zeros(3)}, "timestep must be one number or one a clip"),
        ({"cond_frames": 4}, "cond_frames must be between 0 and 3, got 4"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask must be"),
    ],
)
def test_bad_inputs_get_one_sentence(change, message) -> None:
    model = seer()
    sample, time, text = inputs()
    given = {"sample": sample, "time": time, "text": text, **change}
    args = (given.pop("sample"), given.pop("time"), given.pop("text"))
    with pytest.raises(ValueError, match=message):
        model(*args, **given)


def test_what_cannot_be_inflated_is_named() -> None:
    with pytest.raises(ValueError, match="class_embed_type='timestep' cannot be inflated"):
        SeerUNetModel.from_unet2d(image_unet({**TINY, "class_embed_type": "timestep"}))
    down = ("AttnDownBlock2D", "DownBlock2D")
    with pytest.raises(ValueError, match="'AttnDownBlock2D' cannot be inflated"):
        SeerUNetModel.from_unet2d(image_unet({**TINY, "down_block_types": down}))
    with pytest.raises(ValueError, match="attention must be one of 'seer-window'"):
        seer(attention="window")
    with pytest.raises(ValueError, match="skip_reference_ff must be one of"):
        seer(skip_reference_ff="sometimes")
