"""What uses complex numbers or Fourier transforms: no graph for the compiler holds a complex tensor.

Torch's compiler generates no kernels for complex numbers. A single one that is copied, padded or
multiplied ends a compilation for a GPU, which a CPU does not show; so the graphs are looked at.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree

from stvision.guidance.maps import band_energies
from stvision.layers.conv_s5 import READOUTS, ConvS5
from stvision.layers.linear_scan import linear_scan
from stvision.layers.rotary import apply_rotary, rotary_table
from stvision.layers.state_space import S4
from stvision.models.backbones import create_backbone
from stvision.models.convs5 import ConvS5Predictor
from stvision.models.mechanism_classifier import SelectiveS4Mix


class Streamed(nn.Module):
    """A layer in two chunks, the second of one frame."""

    def __init__(self, layer: S4 | ConvS5) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer.stream(x[:, :-1])
        last, state = self.layer.stream(x[:, -1:], state)
        return torch.cat([y, last], 1).sum() + state.square().sum()


class Scan(nn.Module):
    """A learned recurrence over pairs."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.a, self.frames = nn.Parameter(torch.rand(4, 2) / 2), frames

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (4, 2))
        return linear_scan(pairs[:, 1 : 1 + self.frames], self.a, pairs[:, 0])


class Call(nn.Module):
    """A function without weights."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def selective() -> nn.Module:
    sizes = {"dim": 16, "depth": 1, "patch_size": 4, "l_max": 9, "d_state": 4, "num_classes": 5}
    return create_backbone("selective_s4_small", frames=3, dropout=0.1, **sizes)


CLIP, IMAGES = (2, 4, 3, 5, 8), (2, 3, 4, 8, 12)

#: what is compiled, and the size of its input
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        f"conv-s5 {readout}": (
            lambda readout=readout: ConvS5(8, 6, readout=readout, groups=2, clip_eigs=True),
            CLIP,
        )
        for readout in READOUTS
    },
    "conv-s5 on one frame": (lambda: ConvS5(8, 6, groups=2), (2, 1, 3, 5, 8)),
    "conv-s5 streamed": (lambda: Streamed(ConvS5(8, 6, groups=2, prenorm=True)), CLIP),
    "convs5 backbone": (
        lambda: create_backbone(
            "convs5_small", frames=4, num_classes=5, widths=(4, 6), dim=8, depth=1, groups=2
        ),
        IMAGES,
    ),
    "convs5 predictor": (lambda: ConvS5Predictor(3, (4, 6), 8, depth=1, groups=2), IMAGES),
    "linear scan": (lambda: Scan(3), CLIP),
    "linear scan on one frame": (lambda: Scan(1), CLIP),
    "s4": (lambda: S4(8, 60, d_state=4, dropout=0.1), CLIP),
    "s4 shorter than made for": (lambda: S4(8, 77, d_state=4), CLIP),
    "s4 beyond its length": (lambda: S4(8, 13, d_state=4), CLIP),
    "s4 streamed": (lambda: Streamed(S4(8, 60, d_state=4)), CLIP),
    "selective s4": (selective, IMAGES),
    "selective s4 layer": (lambda: SelectiveS4Mix(8, 60), CLIP),
    "rotary": (lambda: Call(lambda x: apply_rotary(x, rotary_table(5, 4))), CLIP),
    "high band of maps": (lambda: Call(lambda x: band_energies(x, 1.5)[0]), (3, 2, 8, 8)),
}


class Graphs:
    """A compiler that notes which nodes of its graphs hold complex tensors, and runs them."""

    def __init__(self) -> None:
        self.count = 0
        self.found: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Any:
        self.count += 1
        for node in graph.graph.nodes:
            values = pytree.tree_leaves(node.meta.get("val"))
            if any(isinstance(x, Tensor) and x.is_complex() for x in values):
                self.found.append(node.format_node() or node.name)
        return make_boxed_func(graph.forward)

    def compile(self, module: Any) -> Any:
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=self, bw_compiler=self)
        return torch.compile(module, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.parametrize("name", MODULES)
def test_forward_and_backward(name: str) -> None:
    build, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape).requires_grad_()
    graphs = Graphs()
    compiled = graphs.compile(module)
    compiled(x).float().sum().backward()
    assert graphs.count == 2  # forward and backward
    with torch.no_grad():
        compiled(x)
        module.eval()
        wanted, got = module(x), compiled(x)
    assert (got - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert not graphs.found, graphs.found


def test_complex_numbers_would_be_found() -> None:
    def blurred(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        return torch.fft.irfft(spectrum * spectrum.abs(), n=8).sum()

    graphs = Graphs()
    graphs.compile(blurred)(torch.randn(3, 8).requires_grad_()).backward()
    assert len(graphs.found) > 4
