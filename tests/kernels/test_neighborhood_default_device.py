"""Under another default device the tables of a call still lie where they belong."""

import importlib.util

import pytest
import torch

from stvision.kernels.neighborhood import na1d, na2d, na3d, neighborhood_attention_generic
from stvision.kernels.neighborhood.choice import interpreted
from stvision.kernels.neighborhood.reference import dense_attention

TRITON = importlib.util.find_spec("triton") is not None and interpreted()


@pytest.mark.parametrize("backend", ["blocked", "reference", *(["triton"] if TRITON else [])])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": (3, 4), "stride": (2, 1), "is_causal": (False, True)},
        {"kernel_size": (3, 3), "dilation": (2, 3)},
        {"kernel_size": (4, 5), "border": "valid"},
    ],
)
def test_gradients_under_another_default_device(backend: str, window: dict) -> None:
    # sizes that no other test has, so that no table lies ready
    sizes = {"blocked": (11, 17), "reference": (13, 17), "triton": (11, 19)}[backend]
    q, k, v = (torch.randn(1, *sizes, 2, 16).requires_grad_() for _ in range(3))
    with torch.device("meta"):
        out = neighborhood_attention_generic(q, k, v, backend=backend, **window)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = neighborhood_attention_generic(
        *(x.detach().double().requires_grad_() for x in (q, k, v)), backend="reference", **window
    )
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    assert all(x.device.type == "cpu" and x.isfinite().all() for x in grads)


@pytest.mark.parametrize("function", [na1d, na2d, na3d])
def test_flex_under_another_default_device(function) -> None:
    rank = {"na1d": 1, "na2d": 2, "na3d": 3}[function.__name__]
    grid = (23, 9, 6)[:rank]
    q, k, v = (torch.randn(1, *grid, 2, 16) for _ in range(3))
    with torch.device("meta"):
        out = function(q, k, v, 3, backend="flex")
    assert (out - function(q, k, v, 3, backend="reference")).abs().max() < 1e-5


def test_the_definition_under_another_default_device() -> None:
    from stvision.kernels.neighborhood.problem import build_axes

    axes, _ = build_axes((29,), (29,), kernel_size=7, stride=3)
    x = torch.randn(1, 29, 1, 8)
    with torch.device("meta"):
        out, lse = dense_attention(x, x, x, axes=axes)
    assert out.isfinite().all() and lse.isfinite().all()
