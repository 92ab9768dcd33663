"""Backbones and their layers on a GPU against float64 on the CPU, and compiled there as one graph.

The same functions run on the CPU with smaller networks, so that they are known to work. On a GPU the
smallest published member of each family runs, on sizes that nothing divides.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stvision.layers.conv_s5 import ConvS5
from stvision.layers.ela import EfficientLocalAttention
from stvision.layers.state_space import S4
from stvision.models.backbones import create_backbone
from stvision.models.halonet import HaloStage

#: family -> name in the catalogue, options that every run gets, options that make it small
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "davit": (
        "davit_tiny",
        {},
        {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "window_size": 3},
    ),
    # all regions are picked: which ones are best is no question of precision then, and the fused
    # path has a test of its own
    "biformer": (
        "biformer_tiny",
        {"implementation": "blocked", "n_win": 3, "topks": (9, 9, 9)},
        {"depths": (1, 1), "embed_dims": (16, 32), "topks": (9,), "head_dim": 16},
    ),
    "halonet": (
        "halonet26t",
        {"ela": "base"},
        {"stages": (HaloStage("c", 32, 1), HaloStage("hh", 64, 2, 2)), "stem": (16,)},
    ),
    "nat": (
        "nat_mini",
        {},
        {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 32, "kernel_size": 3},
    ),
    "dinat": (
        "dinat_mini",
        {"depths": (2, 2, 2, 2), "dilations": ((1, 2), (1, 2), (1, 1), (1, 1)), "kernel_size": 3},
        {"depths": (2,), "num_heads": (2,), "embed_dim": 32, "dilations": ((1, 2),)},
    ),
    "convs5": ("convs5_small", {}, {"widths": (32, 32), "dim": 32, "depth": 2}),
}

LAYERS: dict[str, Any] = {
    "conv-s5": lambda: ConvS5(48, 32, groups=6),
    "conv-s5 half-glu": lambda: ConvS5(48, 32, groups=6, readout="half_glu", prenorm=True),
    "s4": lambda: S4(48, l_max=5 * 7 * 11, d_state=16),
    "s4 beyond its length": lambda: S4(48, l_max=100, d_state=16),
    "ela": lambda: EfficientLocalAttention(48, "base"),
    "ela over time": lambda: EfficientLocalAttention(48, "large", over_time=True),
    "ela causal": lambda: EfficientLocalAttention(48, "small", over_time=True, causal=True),
}

CASES = [(name, frames) for name in FAMILIES for frames in (None, 3)]
CASES += [(name, 5) for name in LAYERS]
IDS = [f"{name}-{'image' if frames is None else 'clip'}" for name, frames in CASES]

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without_kinks(model: nn.Module) -> None:
    """Smooth in place of ReLU and max pooling.

    Where a value lies on a kink to the last bit, two devices may take two sides, and a gradient
    then differs by far more than a rounding.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                # padded by itself: in channels last on a GPU, average pooling with padding has wrong
                # gradients in torch 2.11 (pytorch issue 188344)
                pad, pool = (
                    nn.ZeroPad2d(child.padding),
                    nn.AvgPool2d(child.kernel_size, child.stride),
                )
                setattr(parent, name, nn.Sequential(pad, pool))


@functools.lru_cache(maxsize=1)
def problem(name: str, frames: int | None, device: str) -> tuple[nn.Module, Tensor]:
    """A module in float64 with float32 weights, and an input of odd size, on the CPU."""
    torch.manual_seed(0)
    if name in LAYERS:
        return LAYERS[name]().eval().double(), draw(2, 5, 7, 11, 48)
    known, always, small = FAMILIES[name]
    options = always | (small if device == "cpu" else {})
    model = create_backbone(known, num_classes=7, frames=frames, **options).eval()
    without_kinks(model)
    for key, p in model.named_parameters():  # what starts at zero, as after training
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1)
        elif key.endswith("conv3_1x1.bn.weight"):
            nn.init.constant_(p, 0.5)
    size = (37, 43) if device == "cpu" else (61, 75)
    return model.double(), draw(2, 3, *(() if frames is None else (frames,)), *size)


def results(module: Any, parameters: list[nn.Parameter], x: Tensor, mixed: bool) -> list[Tensor]:
    """Output, and gradients of input and weights of its sum with random factors."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
        y = module(x)
    loss = (y * draw(*y.shape, seed=2).to(y)).sum()
    grads = torch.autograd.grad(loss, [x, *parameters])
    return [z.detach().double().cpu() for z in (y, *grads)]


def on(device: str, module: nn.Module, x: Tensor, mixed: bool) -> list[Tensor]:
    module = copy.deepcopy(module).float().to(device)
    return results(module, list(module.parameters()), x.float().to(device), mixed)


def error(got: list[Tensor], wanted: list[Tensor]) -> tuple[float, float, str]:
    """Relative differences of outputs and of the worst gradient, and the worst ones by number.

    A gradient that is small because terms cancel is measured against a hundredth of the largest.
    Number 0 is the gradient of the input, those of the weights follow in their order.
    """
    largest = max(float(w.norm()) for w in wanted[1:])
    scale = [float(wanted[0].norm()), *(float(w.norm()) + 1e-2 * largest for w in wanted[1:])]
    off = [float((g - w).norm()) / s for g, w, s in zip(got, wanted, scale, strict=True)]
    order = sorted(range(len(off) - 1), key=lambda i: -off[i + 1])[:5]
    listed = ", ".join(f"{i} {off[i + 1]:.2g} {tuple(wanted[i + 1].shape)}" for i in order)
    return off[0], max(off[1:]), listed


@functools.lru_cache(maxsize=1)
def reference(name: str, frames: int | None, device: str) -> list[Tensor]:
    module, x = problem(name, frames, device)
    return results(module, list(module.parameters()), x, False)


@devices
@pytest.mark.parametrize(("name", "frames"), CASES, ids=IDS)
def test_is_float64_on_the_cpu(name: str, frames: int | None, device: str) -> None:
    wanted = reference(name, frames, device)
    module, x = problem(name, frames, device)
    output, gradient, worst = error(on(device, module, x, False), wanted)
    assert output < 1e-5 and gradient < 1e-4, worst
    output, gradient, worst = error(on(device, module, x, True), wanted)
    # the CPU's layer norm sums the gradient of its bias in bfloat16
    assert output < 0.02 and (device == "cpu" or gradient < 0.25), worst


#: family -> the block that is compiled, its grid
BLOCKS: dict[str, Any] = {
    "davit": lambda net: net.stages[-1].blocks[-1],
    "biformer": lambda net: net.stages[0].blocks[-1],
    "halonet": lambda net: net.stages[-1].blocks[-1],
    "nat": lambda net: net.stages[-1].blocks[-1],
    "conv-s5": None,
    "s4": None,
    "ela over time": None,
}


@devices
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_as_one_graph(name: str, device: str) -> None:
    module, x = problem(name, 3 if name in FAMILIES else 5, device)
    if name in FAMILIES:
        net, module = module, BLOCKS[name](module)
        stage = 0 if name == "biformer" else -1
        x = draw(2, 3, 7, 9, net.feature_info[stage]["num_chs"])
    module = copy.deepcopy(module).float().to(device)
    if name == "biformer" and device == "cuda":
        module.attn.implementation = "triton"  # the fused path
    parameters, x = list(module.parameters()), x.float().to(device)
    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=False)
    wanted = results(module, parameters, x, False)
    output, gradient, worst = error(results(compiled, parameters, x, False), wanted)
    assert output < 1e-5 and gradient < 1e-4, worst
