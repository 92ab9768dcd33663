"""Every mechanism that is chosen by name: clips of any size, alone and inside a U-Net's block."""

import pytest
import torch
from torch import nn

from stvision.attention import ATTENTIONS
from stvision.models.temporal import TemporalTransformer

#: options that let a mechanism work on small grids
OPTIONS = {
    "routing": {"n_win": 2, "topk": 2},
    "halo": {"block_size": 4, "halo_size": 1, "halo_frames": 1},
    "spatial-window": {"window_size": 3},
    "channel-group": {"over_time": True},
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("grid", [(1, 4, 4), (3, 5, 7)], ids=["image", "clip"])
def test_samples_of_a_batch_do_not_meet(name: str, grid: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    module = ATTENTIONS[name](16, 2, **OPTIONS.get(name, {})).double()
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    out = module(x)
    assert out.shape == x.shape
    assert (out[1:] - module(x[1:])).abs().max() < 1e-12


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_empty_batch_runs_and_an_empty_volume_is_refused(name: str) -> None:
    torch.manual_seed(0)
    module = ATTENTIONS[name](16, 2, **OPTIONS.get(name, {}))
    x = torch.zeros(0, 3, 5, 7, 16, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    for shape in ((2, 0, 5, 7, 16), (2, 3, 0, 7, 16), (2, 3, 5, 0, 16), (2, 5, 7, 16)):
        with pytest.raises(ValueError) as caught:
            module(torch.zeros(shape))
        assert str(caught.value) == (
            f"x must be (B, T, H, W, 16) with at least one frame, row and column, got {shape}"
        )


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("routing", "implementation", "'triton', 'flex', 'blocked', 'gather'"),
        ("halo", "implementation", "'neighborhood', 'windows'"),
        ("neighborhood", "kernel", "'sdpa', 'triton', 'flex', 'blocked', 'reference'"),
    ],
)
def test_a_misspelt_implementation_is_refused_at_once(name: str, option: str, known: str) -> None:
    with pytest.raises(ValueError) as caught:
        ATTENTIONS[name](16, 2, **{option: "fast"})
    assert str(caught.value) == f"{option} must be None or one of {known}, got 'fast'"


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_temporal_transformer_takes_every_name(name: str) -> None:
    torch.manual_seed(0)
    block = TemporalTransformer(
        16, 2, attention=name, attention_kwargs=OPTIONS.get(name, {}), norm_num_groups=4
    ).double()
    x = torch.randn(2 * 3, 16, 4, 6, dtype=torch.float64)
    assert torch.equal(block(x, 3), x)  # fresh, it is the identity
    nn.init.normal_(block.proj_out.weight)
    out = block(x, 3)
    assert out.shape == x.shape and (out - x).abs().max() > 1e-3
    assert (block(x[3:], 3) - out[3:]).abs().max() < 1e-10
    out.square().sum().backward()
    assert all(p.grad is not None for p in block.transformer_blocks[0].attn1.parameters())
