"""Neighborhood attention layers against the kernels' float64 definition."""

import pytest
import torch
import torch.nn.functional as F

from stvision.attention.neighborhood_modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from stvision.kernels.neighborhood.problem import build_axes
from stvision.kernels.neighborhood.reference import dense_attention

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
GRIDS = {1: (13,), 2: (7, 9), 3: (4, 5, 7)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("rpb", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_the_definition_between_two_projections(rank: int, rpb: bool) -> None:
    window = {"kernel_size": (3, 4, 5)[:rank], "is_causal": (not rpb, False, False)[:rank]}
    module = MODULES[rank](12, 3, qk_scale=0.7, rpb=rpb, **window).double()
    x = draw(2, *GRIDS[rank], 12)
    state = {
        name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(module.named_parameters(), 1)
    }
    module.load_state_dict(state)
    flat = x @ state["qkv.weight"].T + state["qkv.bias"]
    q, k, v = (part.unflatten(-1, (3, 4)) for part in flat.chunk(3, -1))
    axes, _ = build_axes(GRIDS[rank], GRIDS[rank], **window)
    out, _ = dense_attention(q, k, v, axes=axes, rpb=state.get("rpb"), scale=0.7)
    wanted = out.flatten(-2) @ state["proj.weight"].T + state["proj.bias"]
    assert (module(x) - wanted).abs().max() < 1e-10


def test_parameters_are_named_as_nattens() -> None:
    names = {
        name: tuple(p.shape) for name, p in NeighborhoodAttention2D(8, 2, 3).named_parameters()
    }
    assert names == {
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    older = NeighborhoodAttention2D(8, 2, (3, 5), rpb=True, qkv_bias=False)
    assert older.state_dict()["rpb"].shape == (2, 5, 9)
    assert "qkv.bias" not in older.state_dict()


def test_options_reach_the_kernel() -> None:
    x = draw(2, 6, 7, 8)
    module = NeighborhoodAttention2D(8, 2, 3, border="valid", backend="reference").double()
    whole = NeighborhoodAttention2D(8, 2, 3).double()
    whole.load_state_dict(module.state_dict())
    assert torch.allclose(module(x), whole(x)[:, 1:-1, 1:-1], atol=1e-12)
    mask = torch.ones(2, 6, 7, dtype=torch.bool)
    mask[:, 4:] = False
    other = x.clone()
    other[:, 4:] += 1
    assert torch.equal(whole(x, key_mask=mask)[:, :4], whole(other, key_mask=mask)[:, :4])
    assert not torch.equal(whole(x)[:, :4], whole(other)[:, :4])


def test_zero_pad_lets_the_padding_take_part() -> None:
    module = NeighborhoodAttention2D(8, 2, 3, dilation=(1, 3), rpb=True, zero_pad=True).double()
    plain = NeighborhoodAttention2D(8, 2, 3, dilation=(1, 3), rpb=True).double()
    plain.load_state_dict(module.state_dict())
    x = draw(2, 2, 7, 8)
    wanted = plain(F.pad(x, (0, 0, 0, 2, 0, 1)))[:, :2, :7]
    assert torch.allclose(module(x), wanted, atol=1e-12)
    with pytest.raises(ValueError, match="larger than axis 0"):
        plain(x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_match_finite_differences(rank: int) -> None:
    module = MODULES[rank](4, 2, 2, rpb=True).double()
    names, values = zip(*module.named_parameters(), strict=True)
    x = draw(1, *(2, 3, 2)[:rank], 4).requires_grad_()

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_compiles_as_one_graph() -> None:
    module = NeighborhoodAttention3D(8, 2, 3, rpb=True)
    x = draw(1, 3, 4, 5, 8).float()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)


def test_bad_arguments_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=8"):
        NeighborhoodAttention1D(8, 3, 3)
    with pytest.raises(ValueError, match="kernel_size must be at least 1 on each axis, got 0"):
        NeighborhoodAttention2D(8, 2, 0, rpb=True)
    with pytest.raises(ValueError, match="has 2 values"):
        NeighborhoodAttention3D(8, 2, (3, 3))
    for wrong in ({"query_map": "center"}, {"return_lse": True}, {"window": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} cannot be given to the module"):
            NeighborhoodAttention1D(8, 2, 3, **wrong)
        with pytest.raises(ValueError, match="cannot be given with a call; key_mask, additional"):
            NeighborhoodAttention1D(8, 2, 3)(torch.zeros(1, 4, 8), **wrong)
    with pytest.raises(ValueError, match="stride must be between 1 and kernel_size on each axis"):
        NeighborhoodAttention2D(8, 2, 3, stride=(1, 4))
    with pytest.raises(ValueError, match="dilation must be at least 1 on each axis, got 0"):
        NeighborhoodAttention2D(8, 2, 3, dilation=0)
    with pytest.raises(ValueError, match="takes .batch, 2 grid axes, 8."):
        NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 4, 8))
