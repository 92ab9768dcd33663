"""One classifier, any mechanism: equal size, gradients everywhere, order and reach as they should be.

And the same by name, with timm's surface.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stvision.models.backbones import create_backbone
from stvision.models.mechanism_classifier import (
    MECHANISMS,
    MechanismClassifier,
    count_parameters,
    matched_hidden,
)

SMALL = {"dim": 32, "depth": 2, "heads": 1}


def stirred(name: str, seed: int = 0, **options: object) -> MechanismClassifier:
    """A classifier in float64 whose parameters are all random, also those that begin at zero."""
    torch.manual_seed(seed)
    model = MechanismClassifier(name, 5, **(SMALL | {"compiled": False} | options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def clips(frames: int, size: int = 32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, frames, size, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("sizes", [{}, SMALL, {"dim": 96, "depth": 3, "heads": 3}], ids=str)
@pytest.mark.parametrize("name", MECHANISMS)
def test_all_are_equally_large(name: str, sizes: dict) -> None:
    wanted = count_parameters(MechanismClassifier("full", 50, **sizes))
    found = count_parameters(MechanismClassifier(name, 50, **sizes))
    assert abs(found - wanted) <= 0.1 * wanted


def test_full_attention_has_mlps_of_four_times_the_channels() -> None:
    assert matched_hidden("full", 64, 4, 2) == 256


def test_building_takes_the_same_draws_whether_the_width_is_given() -> None:
    torch.manual_seed(3)
    matched_hidden.cache_clear()
    first = MechanismClassifier("conv", 2, **SMALL).state_dict()
    hidden = matched_hidden("conv", *SMALL.values())
    torch.manual_seed(3)
    second = MechanismClassifier("conv", 2, hidden=hidden, **SMALL).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", MECHANISMS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = stirred(name)
    out = model(clips(12))
    assert out.shape == (2, 5)
    (out * torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    without = [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    # the softmax over keys does not see what is added to all of them
    assert without == [key for key in without if key.endswith("key.bias")]


@pytest.mark.parametrize("name", MECHANISMS)
def test_order_of_frames_counts_where_it_must(name: str) -> None:
    x = clips(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    changes = []
    for seed in range(2):
        model = stirred(name, seed)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # statistics of these clips, so that no ReLU stays closed
        with torch.no_grad():
            model(x)
            model.eval()
            wanted = model(x)
            changes.append(
                [float((model(y) - wanted).abs().max()) for y in (x.flip(2), x[:, :, order])]
            )
    backwards, shuffled = map(max, zip(*changes, strict=True))
    if MECHANISMS[name].order:
        assert min(backwards, shuffled) > 1e-6
    else:
        assert max(backwards, shuffled) < 1e-12


#: whose layers together see a few frames
NEAR = {"none", "space", "conv", "neighborhood", "halo"}


@pytest.mark.parametrize("name", [n for n, m in MECHANISMS.items() if m.head is None])
def test_what_the_last_frame_knows_of_the_first_ones(name: str) -> None:
    torch.manual_seed(0)
    # all regions, so that the test does not hang on which ones are picked
    model = stirred(name, pool="last").eval()
    for module in model.modules():
        if hasattr(module, "topk"):
            module.topk = 1000
    x = clips(40, 16, 1).requires_grad_()
    model(x).square().sum().backward()
    early = x.grad[:, :, :10].abs().amax()
    if name in NEAR:
        assert early == 0
    elif name != "selective-s4":  # which frames it keeps depends on its weights
        assert early > 0


@pytest.mark.parametrize("name", MECHANISMS)
def test_other_lengths_and_odd_sizes_run(name: str) -> None:
    model = stirred(name, tokens=50).eval()
    with torch.no_grad():
        assert torch.isfinite(model(clips(7, 43, 1))).all()


@pytest.mark.parametrize("name", MECHANISMS)
def test_half_precision_stays_close(name: str) -> None:
    model = stirred(name).float().eval()
    x = clips(12).float()
    with torch.no_grad():
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    if name == "selective-s4":  # rounding may swap which tokens are kept
        assert torch.isfinite(found).all()
    else:
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("fulll", 3), {}, "mechanism must be one of none, space, .*got 'fulll'"),
        ((["ela"], 3), {}, "mechanism must be one of none, space, .*got .'ela'."),
        (("full", 3), {"pool": "first"}, "pool must be 'mean' or 'last', got 'first'"),
        (("full", -1), {}, "num_classes must be a whole number of at least 0, got -1"),
        (("ts-lstm", -1), {}, "num_classes at least 0, got 32 and -1"),
        (("full", 3), {"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        (("full", 3), {"depth": 2.5}, "depth must be a whole number of at least 1, got 2.5"),
        (("full", 3), {"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        (("full", 3), {"heads": "2"}, "heads must be a whole number of at least 1, got '2'"),
        (("full", 3), {"hidden": 0}, "hidden must be a whole number of at least 1, got 0"),
        (("ts-lstm", 3), {"frames": None}, "frames of mechanism 'ts-lstm' must be at least 3"),
        (("full", 3), {"in_chans": 0}, "in_chans must be a whole number of at least 1, got 0"),
        (("full", 3), {"dim": 40}, "dim must be a multiple of 32 that heads divide, got dim=40"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MechanismClassifier(*arguments, **(SMALL | options))


def test_another_shape_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"x must be \(B, 3, T, H, W\), .* got \(1, 4, 2, 16, 16\)"
    ):
        MechanismClassifier("none", 2, **SMALL)(torch.zeros(1, 4, 2, 16, 16))


# -- by name, with timm's surface ---------------------------------------------------------------


def by_name(name: str, **options: object) -> nn.Module:
    """The same from the catalogue, stirred, for clips of two channels."""
    torch.manual_seed(0)
    given = SMALL | {"num_classes": 5, "frames": 6, "in_chans": 2, "compiled": False} | options
    model = create_backbone("mechanism", mechanism=name, **given).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pixels(frames: int = 6, size: tuple[int, int] = (19, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, frames, *size, dtype=torch.float64, generator=generator)


def test_the_catalogue_builds_what_the_comparison_builds() -> None:
    torch.manual_seed(3)
    named = create_backbone("mechanism", mechanism="ela", num_classes=7, frames=12, **SMALL)
    torch.manual_seed(3)
    plain = MechanismClassifier("ela", 7, **SMALL)
    found, wanted = named.state_dict(), plain.state_dict()
    assert list(found) == list(wanted) and found.keys() >= {"stem.conv1.weight", "head.fc.weight"}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert create_backbone("mechanism", num_classes=2, frames=4).mechanism == "divided"
    for wrong in ("elaa", None, 3):
        with pytest.raises(ValueError) as caught:
            create_backbone("mechanism", mechanism=wrong, frames=12)
        known = ", ".join(MECHANISMS)
        assert str(caught.value) == f"mechanism must be one of {known}, got {wrong!r}"


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_intermediates_features_and_head_agree(name: str, pool: str) -> None:
    model, x = by_name(name, pool=pool).eval(), pixels()
    with torch.no_grad():
        last, features = model.forward_intermediates(x, norm=True)
        assert torch.equal(last, model.forward_features(x))
        assert torch.equal(features[-1].movedim(1, -1), last) and len(features) == 2
        assert torch.equal(model.forward_head(last), model(x))
        before = model.forward_head(last, pre_logits=True)
        assert torch.equal(model.get_classifier()(before), model(x))
        stopped, (first,) = model.forward_intermediates(x, [0], stop_early=True, output_fmt="NHWC")
        assert torch.equal(stopped, first)
        # the first block by hand, and what the second makes of it
        assert torch.equal(model.blocks[0](model.embed(x.movedim(1, -1))), first)
        assert torch.equal(model.norm(model.blocks[1](first)), last)
    for index, info in enumerate(model.feature_info):
        assert model.get_submodule(info["module"]) is model.blocks[index]
        size = (2, info["num_chs"], 6, -(-19 // info["reduction"]), -(-24 // info["reduction"]))
        assert features[index].shape == size
    with pytest.raises(ValueError, match="indices=9 must lie between 1 and 2"):
        model.forward_intermediates(x, 9)


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_head_is_reset(name: str) -> None:
    model, x = by_name(name).eval(), pixels()
    with torch.no_grad():
        features = model.forward_features(x)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3) and model.num_classes == 3
        assert model.get_classifier().weight.dtype == torch.float64
        assert torch.equal(model.forward_features(x), features)
        model.reset_classifier(0)
        assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
        assert model(x).shape == (2, model.num_features)
    assert by_name(name, num_classes=0).eval()(x).shape == (2, 32)
    with pytest.raises(ValueError, match="num_classes must be .*at least 0, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool must be 'avg' or None, got 'max'"):
        model.reset_classifier(3, "max")
    model = by_name(name, pool="last")
    with pytest.raises(ValueError, match="global_pool must be None where the last frame or"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("name", MECHANISMS)
def test_checkpointing_recomputes_each_block_and_changes_no_gradient(name: str) -> None:
    model = by_name(name).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    runs: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        runs.clear()
        torch.manual_seed(5)  # what is drawn inside
        model(pixels()).square().sum().backward()
        assert len(runs) == (4 if enable else 2)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "ts-lstm"])
def test_an_image_is_a_clip_of_one_frame(name: str) -> None:
    video, image = by_name(name).eval(), by_name(name, frames=None).eval()
    x = pixels(1)
    with torch.no_grad():
        assert torch.equal(image(x[:, :, 0]), video(x))
        features = image.forward_features(x[:, :, 0])
        assert torch.equal(features, video.forward_features(x)[:, 0])
        assert torch.equal(image.forward_head(features), video(x))


@pytest.mark.parametrize("name", ["non-local", "ts-lstm"])
def test_weights_come_from_a_file(name: str, tmp_path: Path) -> None:
    source = by_name(name).float().eval()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    options = SMALL | {"mechanism": name, "frames": 6, "compiled": False}
    x = pixels().float()
    same = create_backbone("mechanism", tmp_path / "a.pth", 2, 5, **options).eval()
    assert torch.equal(same(x), source(x))
    other = create_backbone("mechanism", tmp_path / "a.pth", 2, 4, **options).eval()
    assert other(x).shape == (2, 4)
    assert torch.equal(other.forward_features(x), source.forward_features(x))
    grey = create_backbone("mechanism", tmp_path / "a.pth", 1, 5, **options).eval()
    equal = x[:, :1]
    torch.testing.assert_close(grey(equal), source(equal.expand(-1, 2, -1, -1, -1)))
    with pytest.raises(ValueError, match="weights do not fit MechanismClassifier"):
        create_backbone("mechanism", tmp_path / "a.pth", 2, 5, **(options | {"mechanism": "s4"}))


@pytest.mark.parametrize("name", ["seer-window", "selective-s4", "conv-s5", "ela", "ts-lstm"])
def test_compiles_as_one_graph(name: str) -> None:
    model, x = by_name(name).eval(), pixels()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        assert (compiled(x) - model(x)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["temporal", "halo", "non-local", "temporal-inception"])
def test_weights_in_half_precision_run(name: str) -> None:
    model, x = by_name(name).float().eval(), pixels().float()
    with torch.no_grad():
        wanted = model(x)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 0.06 * wanted.abs().max()


def test_state_spaces_are_not_decayed() -> None:
    found = {name: by_name(name).no_weight_decay() for name in MECHANISMS}
    s4 = {f"blocks.{i}.mixer.{key}" for i in (0, 1) for key in ("D", "log_dt", "w", "B", "C")}
    assert found["s4"] == s4
    assert found["selective-s4"] == {key.replace("mixer", "mixer.s4") for key in s4}
    ends = ("lambda_re", "lambda_im", "log_step")
    assert {key.rsplit(".", 1)[1] for key in found["conv-s5"]} == set(ends)
    assert len(found["conv-s5"]) == 6
    assert not any(found[name] for name in found.keys() - {"s4", "selective-s4", "conv-s5"})
