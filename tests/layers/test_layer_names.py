"""Every layer that is chosen by name: batches and clips of nothing, and clips of one place."""

import pytest
import torch

from stvision.layers import LAYERS

#: arguments beside the channels
ARGUMENTS = {"s4": (20,)}


def layer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name](32, *ARGUMENTS.get(name, ())).double().eval()


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_runs_and_an_empty_clip_is_refused(name: str) -> None:
    module = layer(name)
    x = torch.zeros(0, 3, 5, 7, 32, dtype=torch.float64, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    letter = "u" if name == "conv-s5" else "x"
    for shape in ((2, 0, 5, 7, 32), (2, 3, 0, 7, 32), (2, 3, 5, 0, 32)):
        with pytest.raises(ValueError) as caught:
            module(torch.zeros(shape, dtype=torch.float64))
        assert str(caught.value) == (
            f"{letter} must be (B, T, H, W, 32) with at least one frame, row and column, "
            f"got {shape}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_one_place_is_what_it_is_in_a_batch_of_two(name: str) -> None:
    module, x = layer(name), torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    assert (module(x)[:1] - module(x[:1])).abs().max() < 1e-12
