"""Stride, dilation and what becomes of them in small volumes, of neighborhood attention by name."""

import math

import pytest
import torch
from torch import Tensor

from stvision import na3d
from stvision.attention import ATTENTIONS
from stvision.layers.rotary import apply_rotary

CASES = [
    ((9, 9, 10), {"kernel_size": 3, "dilation": 3}),
    ((7, 9, 10), {"kernel_size": (3, 5, 4), "stride": (1, 5, 2)}),
    ((7, 9, 11), {"kernel_size": (2, 4, 3), "stride": (2, 3, 1), "dilation": (3, 2, 1)}),
    ((6, 8, 8), {"kernel_size": (3, 3, 4), "dilation": 2, "stride": 2, "causal": True}),
    ((6, 8, 5), {"kernel_size": 2, "dilation": (2, 4, 1), "causal": (False, True, True)}),
]


def by_hand(module: torch.nn.Module, x: Tensor, **options: object) -> Tensor:
    """Projections and rotary embeddings of the module around one call of na3d."""
    query, key, value = (
        to(x).unflatten(-1, (module.heads, -1)) for to in (module.to_q, module.to_k, module.to_v)
    )
    grid = x.shape[1:4]
    table = module.rotary_emb.table(math.prod(grid), x).unflatten(0, grid)[..., None, :, :]
    query, key = (apply_rotary(y, table) for y in (query, key))
    return module.to_out[0](na3d(query, key, value, **options).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("grid", "options"), CASES, ids=str)
def test_stride_and_dilation_are_those_of_na3d(grid, options, dtype) -> None:
    module = ATTENTIONS["neighborhood"](24, 2, rotary_dim=8, **options).double()
    x = torch.randn(2, *grid, 24, dtype=torch.float64, requires_grad=True)
    given = {key: value for key, value in options.items() if key != "causal"}
    causal = options.get("causal", False)
    given["is_causal"] = (causal, False, False) if isinstance(causal, bool) else causal
    wanted = by_hand(module, x, **given)
    plain = ATTENTIONS["neighborhood"](24, 2, rotary_dim=8, kernel_size=options["kernel_size"])
    plain.double().load_state_dict(module.state_dict())
    assert (plain(x) - wanted).abs().max() > 1e-3  # the options are no matter of rounding
    if dtype == torch.bfloat16:
        found = module.to(dtype)(x.to(dtype)).double()
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
        return
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-11)
    direction = torch.randn_like(wanted)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(module(x), leaves, direction)
    expected = torch.autograd.grad(by_hand(module, x, **given), leaves, direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def seen(options: dict, grid: tuple[int, int, int], token: tuple[int, int, int]) -> Tensor:
    """(T, H, W) bool: what an output token depends on."""
    module = ATTENTIONS["neighborhood"](8, 1, **options).double()
    x = torch.randn(1, *grid, 8, dtype=torch.float64, requires_grad=True)
    frame, row, column = token
    (grad,) = torch.autograd.grad(module(x)[0, frame, row, column].square().sum(), x)
    return grad[0].abs().amax(-1) > 0


def box(grid: tuple[int, int, int], *axes: list[int]) -> Tensor:
    wanted = torch.zeros(grid, dtype=torch.bool)
    wanted[torch.meshgrid(*map(torch.tensor, axes), indexing="ij")] = True
    return wanted


def test_a_dilated_box_has_gaps() -> None:
    grid = (4, 9, 9)
    options = {"kernel_size": (1, 3, 3), "dilation": (1, 2, 3)}
    assert torch.equal(seen(options, grid, (2, 4, 4)), box(grid, [2], [2, 4, 6], [1, 4, 7]))
    assert torch.equal(seen(options, grid, (2, 1, 0)), box(grid, [2], [1, 3, 5], [0, 3, 6]))


def test_neighbours_of_one_stride_share_a_box() -> None:
    grid, options = (2, 8, 8), {"kernel_size": (1, 4, 4), "stride": (1, 2, 4)}
    first = seen(options, grid, (0, 4, 0))
    for token in ((0, 5, 3), (0, 4, 2)):
        assert torch.equal(seen(options, grid, token), first)
    assert not torch.equal(seen(options, grid, (0, 4, 4)), first)


@pytest.mark.parametrize(
    ("grid", "axes"),
    [
        ((3, 9, 9), ([0], [0, 3, 6], [2, 5, 8])),  # frame 1 has no other at this distance
        ((6, 4, 7), ([0, 2, 4], [0], [2, 5])),
        ((1, 2, 3), ([0], [0], [2])),
    ],
)
def test_a_box_is_cut_to_the_volume_and_keeps_its_distances(grid, axes) -> None:
    options = {"kernel_size": 3, "dilation": (2, 3, 3), "stride": (1, 3, 1)}
    assert torch.equal(seen(options, grid, (0, 0, 2)), box(grid, *axes))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 8}, ValueError, r"stride must be .* at most kernel_size \(5, 7, 7\), got 8"),
        ({"stride": (1, 0, 1)}, ValueError, "stride must be at least 1 .*, got .1, 0, 1."),
        ({"dilation": 0}, ValueError, "dilation must be one or three numbers .*, got 0"),
        ({"dilation": (1, 2)}, ValueError, r"dilation=\(1, 2\) has 2 values, but the grid has 3"),
        ({"dilation": 1.5}, TypeError, "dilation must be int or a tuple, not 1.5"),
    ],
)
def test_wrong_numbers_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ATTENTIONS["neighborhood"](16, 2, **options)


def test_dilation_compiles_as_one_graph() -> None:
    options = {"kernel_size": 3, "dilation": (1, 2, 3), "stride": (1, 2, 1)}
    module = ATTENTIONS["neighborhood"](16, 2, **options).double().eval()
    x = torch.randn(1, 4, 5, 9, 16, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)
    assert (compiled(x) - module(x)).abs().max() < 1e-12
