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
