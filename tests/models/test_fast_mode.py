"""Fast mode: replays equal the plain pass, and whatever it cannot do goes to the plain pass."""

import copy

import pytest
import torch
from torch import Tensor, nn

from stvision.models.fast import (
    GraphedForward,
    _Capture,
    disable_fast,
    enable_fast,
    fast,
    is_fast,
    plain,
)


class Denoiser(nn.Module):
    """Stands for a U-Net: sample, timestep and text matter, and a flag of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.calls = 0
        self.backend = "sdpa"

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *, double: bool = False):
        self.calls += 1
        out = self.mix(sample) * (timestep + 1) + text.mean(1, keepdim=True)
        out = -out if self.backend == "math" else out
        return (2 * out if double else out,)


def inputs(seed: int, batch: int = 2, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 5, 8, generator=generator).to(device)
    return (
        sample,
        torch.tensor(3.0 + seed),
        torch.randn(batch, 3, 8, generator=generator).to(device),
    )


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        enable_fast(Denoiser())


@pytest.fixture
def pretend_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_off_again_leaves_the_model_as_it_was(pretend_gpu) -> None:
    model = Denoiser()
    with pytest.raises(KeyboardInterrupt), fast(model):
        assert is_fast(model)
        raise KeyboardInterrupt
    assert not is_fast(model) and "forward" not in vars(model)
    disable_fast(model)  # a second time does nothing


def test_tensors_outside_a_gpu_take_the_plain_pass(pretend_gpu) -> None:
    model, arguments = Denoiser().eval(), inputs(0, device="cpu")
    expected = model(*arguments)[0]
    with fast(model), torch.no_grad():
        assert torch.equal(model(*arguments)[0], expected)


@pytest.mark.parametrize("where", ["whole", "layer"])
def test_offload_hooks_are_refused(pretend_gpu, where) -> None:
    model = Denoiser()
    (model if where == "whole" else model.mix)._hf_hook = object()
    with pytest.raises(RuntimeError, match="offload"):
        enable_fast(model)


def test_the_plain_pass_for_a_while(pretend_gpu) -> None:
    model = Denoiser()
    with fast(model):
        kept = model.forward
        with pytest.raises(ValueError, match="inside"), plain(model):
            assert not is_fast(model)
            raise ValueError("inside")
        assert model.forward is kept
    with plain(model):
        assert not is_fast(model)
    assert "forward" not in vars(model)


def test_a_copy_is_fast_by_itself(pretend_gpu) -> None:
    model, arguments = Denoiser().eval(), inputs(0, device="cpu")
    with fast(model), torch.no_grad():
        twin = copy.deepcopy(model)
        assert is_fast(twin) and twin.forward is not model.forward
        twin.mix.weight.zero_()
        assert not torch.equal(twin(*arguments)[0], model(*arguments)[0])
    assert is_fast(twin) and not is_fast(model)


def test_a_capture_belongs_to_shapes_flags_and_the_backend(pretend_gpu) -> None:
    model = Denoiser()
    with fast(model):
        key = model.forward._key

        def of(seed: int, batch: int = 2, **fixed) -> tuple:
            sample, time, text = inputs(seed, batch, "cpu")
            return key({"sample": sample, "timestep": time, "0": text}, fixed)

        assert of(1) == of(2), "other prompts and timesteps need no new capture"
        assert of(1) != of(1, 3) and of(1) != of(1, double=True)
        before = of(1)
        model.backend = "math"
        assert of(1) != before
        model.backend = "sdpa"
        assert of(1) == before


@pytest.mark.gpu
def test_replays_equal_the_plain_pass_for_new_inputs() -> None:
    model = Denoiser().cuda().eval()
    with torch.no_grad(), fast(model):
        kept = []
        for seed in range(4):
            arguments = inputs(seed)
            kept.append((model(*arguments)[0], model.forward.plain(*arguments)[0]))
        # compared after all replays: an output must not be overwritten by later ones
        for replayed, plain in kept:
            torch.testing.assert_close(replayed, plain, rtol=0, atol=0)


@pytest.mark.gpu
def test_one_capture_a_shape_and_flag() -> None:
    model = Denoiser().cuda().eval()
    with torch.no_grad(), fast(model):
        for seed in range(3):
            model(*inputs(seed))
        calls = model.calls
        model(*inputs(9))
        assert model.calls == calls, "a replay runs no Python of the model"
        torch.testing.assert_close(
            model(*inputs(1), double=True)[0], 2 * model(*inputs(1))[0], rtol=0, atol=0
        )
        model(*inputs(0, batch=3))
        assert len(model.forward._captures) == 3


@pytest.mark.gpu
def test_gradients_take_the_plain_pass() -> None:
    model = Denoiser().cuda().eval()
    with fast(model):
        model(*inputs(0))[0].sum().backward()
    assert model.mix.weight.grad is not None


@pytest.mark.gpu
def test_another_backend_and_moved_weights_are_captured_anew() -> None:
    model = Denoiser().cuda().eval()
    with torch.no_grad(), fast(model):
        first = model(*inputs(0))[0]
        model.backend = "math"
        torch.testing.assert_close(model(*inputs(0))[0], -first, rtol=0, atol=0)
        model.cpu()
        model.mix.weight.zero_()
        model.mix.bias.zero_()
        model.cuda()
        arguments = inputs(0)
        expected = model.forward.plain(*arguments)[0]
        torch.testing.assert_close(model(*arguments)[0], expected, rtol=0, atol=0)


def test_weights_that_lie_elsewhere_drop_all_captures(monkeypatch) -> None:
    """On a GPU weights may come back to the very place where they lay; here they do not."""
    made = []

    class Graph:
        def replay(self) -> None:
            pass

    def capture(self, tensors, fixed, num_args) -> _Capture:
        made.append(tensors["sample"].shape)
        copies = {name: value.clone() for name, value in tensors.items()}
        return _Capture(Graph(), copies, (torch.zeros(1),))

    monkeypatch.setattr(GraphedForward, "_replays", lambda self, sample: True)
    monkeypatch.setattr(GraphedForward, "_capture", capture)
    model = Denoiser().eval()
    forward = GraphedForward(model)
    for batch in (2, 3, 2, 3):
        forward(*inputs(0, batch, device="cpu"))
    assert len(made) == len(forward._captures) == 2
    model.mix.weight.data = model.mix.weight.data.clone()
    forward(*inputs(0, device="cpu"))
    assert len(made) == 3 and len(forward._captures) == 1
    forward(*inputs(1, device="cpu"))
    assert len(made) == 3
