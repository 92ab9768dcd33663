"""A captured training step equals the plain one, step by step."""

import pytest
import torch
from torch import Tensor, nn

from stvision.train.graphed import GraphedStep


class Network(nn.Module):
    """A loss with normalisation statistics, so that a surplus pass would be noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        error = (self.body(x) - target).square().mean()
        return {"loss": error, "twice": 2 * error}


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(16, 6, generator=generator).cuda() for name in ("x", "target")}
        for _ in range(count)
    ]


def train(captured: bool, steps: list[dict[str, Tensor]]) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = Network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = GraphedStep(model, lambda loss: loss.backward(), model)
    losses = []
    for inputs in steps:
        if captured:
            values = step(inputs)
        else:
            values = model(**inputs)
            values["loss"].backward()
        losses.append(float(values["loss"]))
        assert float(values["twice"]) == pytest.approx(2 * losses[-1])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return losses, model


@pytest.mark.gpu
def test_captured_steps_equal_plain_ones() -> None:
    steps = batches(6)
    plain, one = train(False, steps)
    captured, other = train(True, steps)
    assert captured == pytest.approx(plain, rel=1e-5)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.gpu
def test_another_shape_is_refused_by_name() -> None:
    model = Network().cuda()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = GraphedStep(model, lambda loss: loss.backward(), model)
    (inputs,) = batches(1)
    step(inputs)
    with pytest.raises(ValueError, match="'x'.*varying shapes"):
        step({**inputs, "x": inputs["x"][:4]})


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        GraphedStep(Network(), lambda loss: None, Network())
