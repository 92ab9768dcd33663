"""One classifier, any mechanism: equal size, gradients everywhere, order and reach as they should be."""

import pytest
import torch
from torch import Tensor

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
        (("full", 3), {"pool": "first"}, "pool must be 'mean' or 'last', got 'first'"),
        (("full", 0), {}, "num_classes, depth and tokens must be at least 1, got 0"),
        (("full", 3), {"dim": 40}, "dim must be a multiple of 32 that heads divide, got dim=40"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MechanismClassifier(*arguments, **options)


def test_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"x must be \(B, 3, T, H, W\), got \(1, 4, 2, 16, 16\)"):
        MechanismClassifier("none", 2, **SMALL)(torch.zeros(1, 4, 2, 16, 16))
