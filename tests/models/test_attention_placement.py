"""Attention blocks placed in networks: slots, rules, names of weights, and the search."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stvision import create_backbone
from stvision.layers.ela import EfficientLocalAttention
from stvision.layers.light_attention import LightAttention
from stvision.layers.non_local import NonLocalBlock
from stvision.models.placement import (
    ATTACHED,
    PLACEMENTS,
    Placed,
    attention_slots,
    chosen_slots,
    light_attention_for,
    measured_latency,
    pareto_front,
    place_attention,
    remove_attention,
    search_placements,
    slot_effects,
)
from stvision.optional import mend_torchvision


class Residual(nn.Module):
    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.short = nn.Sequential()
        if stride > 1 or dim != out:
            self.short = nn.Sequential(nn.Conv2d(dim, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm(self.conv(x))).relu()


class Net(nn.Module):
    """A small network of one's own: a stem, three stages of 2, 1 and 2 blocks, a head.

    The last two stages have grids of one size, as in networks for re-identification.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.layer1 = nn.Sequential(Residual(8, 8, 1), Residual(8, 8, 1))
        self.layer2 = nn.Sequential(Residual(8, 16, 2))
        self.layer3 = nn.Sequential(Residual(16, 24, 1), Residual(24, 24, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(2, 3, 33, 17, generator=torch.Generator().manual_seed(0))
NAMES = ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer3.1"]


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    made(IMAGES)
    return made.eval()


def opened(model: nn.Module) -> None:
    """Weights that are zero in fresh blocks get values."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ATTACHED in name:
            nn.init.normal_(parameter, std=0.5)


def test_slots_are_the_residual_blocks_with_their_stages() -> None:
    slots = attention_slots(net(), IMAGES)
    assert [slot.name for slot in slots] == NAMES
    assert [slot.stage for slot in slots] == [0, 0, 1, 2, 2]
    assert [slot.dim for slot in slots] == [8, 8, 16, 24, 24]
    assert [slot.grid for slot in slots] == [(1, 17, 9)] * 2 + [(1, 9, 5)] * 3
    assert not any(slot.channels_last for slot in slots)


def test_finding_slots_leaves_the_network_alone() -> None:
    model = net().train()
    model.layer2.eval()
    before = copy.deepcopy(model.state_dict())
    attention_slots(model, IMAGES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and model.layer1.training and not model.layer2[0].training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_block_can_be_named() -> None:
    slots = attention_slots(net(), IMAGES, names=["stem", "layer3"], channels_last=False)
    assert [(slot.name, slot.dim) for slot in slots] == [("stem", 8), ("layer3", 24)]


def test_rules() -> None:
    slots = attention_slots(net(), IMAGES)
    wanted = {
        "every-block": NAMES,
        "stage-ends": ["layer1.1", "layer2.0", "layer3.1"],
        "last-stage": ["layer3.0", "layer3.1"],
        "last-block": ["layer3.1"],
    }
    assert set(wanted) == set(PLACEMENTS)
    for rule, names in wanted.items():
        assert [slot.name for slot in chosen_slots(slots, rule)] == names
    assert [slot.name for slot in chosen_slots(slots, [-1, "layer1.0"])] == [NAMES[0], *NAMES[3:]]
    assert chosen_slots(slots, []) == []


@pytest.mark.parametrize("rule", [*PLACEMENTS, (0, 2)])
@pytest.mark.parametrize(
    "block",
    [light_attention_for, lambda slot: NonLocalBlock(slot.dim, channels_last=slot.channels_last)],
)
def test_fresh_blocks_leave_features_bit_identical_and_names_as_they_were(rule, block) -> None:
    model = net()
    plain, keys = model(IMAGES), set(model.state_dict())
    taken = place_attention(model, attention_slots(model, IMAGES), rule, block)
    assert torch.equal(model(IMAGES), plain)
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert {key.split(f".{ATTACHED}.")[0] for key in added} == {slot.name for slot in taken}
    opened(model)
    assert (model(IMAGES) - plain).abs().max() > 1e-4
    remove_attention(model)
    assert set(model.state_dict()) == keys and torch.equal(model(IMAGES), plain)


def test_the_block_gates_the_output_of_the_residual_block() -> None:
    model = net()
    place_attention(model, attention_slots(model, IMAGES), ["layer2.0"])
    opened(model)
    inside = model.layer1(model.stem(IMAGES))
    got = model.layer2(inside)
    block = getattr(model.layer2[0], ATTACHED)
    assert torch.equal(got, block(Residual.forward(model.layer2[0], inside)))


class Loop(nn.Module):
    """Runs its children one after another and is no ``nn.Sequential``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"b{i}", block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Dense(nn.ModuleDict):
    """A dense block: each child gets all maps so far as a list."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__({f"b{i}": block for i, block in enumerate(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for block in self.values():
            maps.append(block(maps))
        return torch.cat(maps, 1)


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, 8, 3, 1, 1), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.body(torch.cat(maps, 1))


class Around(nn.Sequential):
    """A chain with something of its own after it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Sum(nn.Module):
    """Children side by side."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.one, self.two = blocks

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.children()]).sum(0)


class Keyed(nn.Module):
    """Two blocks in a dictionary, which the network reads itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.steps = nn.ModuleDict({"a": Residual(dim, dim, 1), "b": Residual(dim, dim, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.steps["b"](self.steps["a"](x))


class Rows(nn.Module):
    """A block on (B, H, W, C) or (B, T, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x)).tanh()


class Affine(nn.Module):
    """Far from the identity, and not its own square; counts its calls."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last, self.calls = channels_last, 0
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 5 or not self.channels_last
        self.calls += 1
        return self.scale * x + 1


def nested() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(Residual(3, 8, 1), Residual(8, 8, 2)),
        Loop(Residual(8, 8, 1), Residual(8, 8, 1)),
        nn.Sequential(nn.Sequential(Residual(8, 8, 1))),
        Keyed(8),
        nn.Sequential(Residual(8, 8, 1), nn.Conv2d(8, 8, 1)),
    ).eval()


PLACES = ["0", "0.1", "1", "1.b0", "1.b1", "2", "2.0", "2.0.0", "3", "3.steps.a", "3.steps.b", "4"]
PLACES += ["4.0", "4.1", ""]  # of a leaf and of the whole, too


@pytest.mark.parametrize("place", PLACES)
def test_a_placed_block_runs_once_wherever_its_slot_is(place: str) -> None:
    """Against the output of the slot, taken out of the run and put back by hand."""
    model = nested()
    plain, keys = model(IMAGES), set(model.state_dict())
    (slot,) = attention_slots(model, IMAGES, names=[place])
    assert slot.chain == (place in {"0", "1", "2", "2.0", "4", ""}) and slot.image
    place_attention(model, [slot], "every-block", lambda slot: Affine(slot.channels_last))
    block = getattr(model.get_submodule(place), ATTACHED)
    got = model(IMAGES)
    assert block.calls == 1
    added = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict())
    assert added == {f"{place}.{ATTACHED}.scale".removeprefix(".")}

    peer = nested()
    hook = peer.get_submodule(place).register_forward_hook(lambda _m, _i, out: 3 * out + 1)
    assert torch.equal(got, peer(IMAGES)) and not torch.allclose(got, plain)
    hook.remove()

    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    for other in (copy.deepcopy(model), torch.load(held, weights_only=False)):
        twin = getattr(other.get_submodule(place), ATTACHED)
        assert twin is not block and torch.equal(other(IMAGES), got) and twin.calls == 2
    again = nested()
    place_attention(again, [slot], "every-block", lambda slot: Affine(slot.channels_last))
    with torch.no_grad():
        getattr(again.get_submodule(place), ATTACHED).scale.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), got)
    place_attention(again, [slot], "every-block", lambda slot: Affine(slot.channels_last))
    assert torch.equal(again(IMAGES), got)
    remove_attention(again)
    assert set(again.state_dict()) == keys and torch.equal(again(IMAGES), plain)


def test_a_chain_and_blocks_inside_it_take_one_block_each_and_compile() -> None:
    model = nested()
    names = ["0", "0.1", "1", "1.b1", "3.steps.a", "4"]
    slots = attention_slots(model, IMAGES, names=names)
    assert [slot.name for slot in slots] == ["0.1", "0", "1.b1", "1", "3.steps.a", "4"]
    plain = model(IMAGES)
    place_attention(model, slots, "every-block")
    assert torch.equal(model(IMAGES), plain)
    opened(model)
    calls = {name: 0 for name in names}
    for name in names:

        def count(*_: object, name: str = name) -> None:
            calls[name] += 1

        getattr(model.get_submodule(name), ATTACHED).register_forward_hook(count)
    out = model(IMAGES)
    assert set(calls.values()) == {1} and not torch.allclose(out, plain)
    # what was placed is no slot itself, and slots are the same with it
    assert attention_slots(model, IMAGES, names=names) == slots
    assert not any(ATTACHED in slot.name for slot in attention_slots(model, IMAGES))
    place_attention(model, slots, "every-block")
    opened(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)
    model(IMAGES).sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ATTACHED in n)


@pytest.mark.parametrize("frames", [None, 1, 2])
def test_chains_with_channels_last_take_images_and_clips(frames: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Rows(6), Rows(6)), Rows(6)).eval()
    x = torch.randn(2, *([frames] if frames else []), 9, 4, 6)
    slots = attention_slots(model, x, names=["0", "0.0", "1"], channels_last=True)
    assert [slot.name for slot in slots] == ["0.0", "0", "1"]
    assert all(slot.image == (frames is None) for slot in slots)
    assert [slot.grid for slot in slots] == [(frames or 1, 9, 4)] * 3
    inside = model[0][1](model[0][0](x))
    place_attention(model, slots, ["0"], lambda slot: Affine(True))
    place_attention(model, slots, ["0"], lambda slot: Affine(True))
    assert torch.equal(model(x), model[1](3 * inside + 1))
    assert getattr(model[0], ATTACHED).calls == 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.compiler.reset()
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    place_attention(model, slots, "every-block")
    opened(model)
    assert model(x).shape == x.shape
    if frames is None:
        with pytest.raises(ValueError, match=r"x must be \(B, H, W, C\), as where .*, got \(2, 3"):
            model(torch.randn(2, 3, 9, 4, 6))


def test_one_block_behind_two_chains_and_placed_anew_keeps_shapes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Rows(6)), nn.Sequential(Rows(6))).eval()
    x, block = torch.randn(2, 1, 4, 6), Affine(True)
    slots = attention_slots(model, x, names=["0", "1"], channels_last=True)
    wanted = 3 * model[1](3 * model[0](x) + 1) + 1
    for _ in range(2):
        place_attention(model, slots, "every-block", lambda slot: block)
        assert torch.equal(model(x), wanted)
    remove_attention(model)
    assert torch.equal(block(x[:, None]), 3 * x[:, None] + 1)  # as it was before


def test_a_block_that_stands_in_two_places_is_one_slot() -> None:
    torch.manual_seed(0)
    shared = Residual(8, 8, 1)
    model = nn.Sequential(nn.Sequential(Residual(3, 8, 1), shared), nn.Sequential(shared)).eval()
    slots = attention_slots(model, IMAGES)
    assert [slot.name for slot in slots] == ["0.0", "0.1"]
    first = model[0][0](IMAGES)
    once = 3 * shared(first) + 1
    wanted = 3 * shared(once) + 1
    place_attention(model, slots, ["0.1"], lambda slot: Affine(slot.channels_last))
    assert torch.equal(model(IMAGES), wanted) and getattr(shared, ATTACHED).calls == 2


def odd(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = {
        "dense": lambda: Dense(Layer(8), Layer(16)),
        "around": lambda: Around(Residual(8, 8, 1), Residual(8, 24, 1)),
        "sum": lambda: Sum(Residual(8, 24, 1), Residual(8, 24, 1)),
    }[kind]()
    blocks = nn.Sequential(Residual(3, 8, 2), made, Residual(24, 8, 1))
    return nn.Sequential(blocks, nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize("kind", ["dense", "around", "sum"])
def test_modules_with_a_way_of_their_own_are_no_slots(kind: str) -> None:
    model = odd(kind)
    plain, before = model(IMAGES), [name for name, _ in model.named_modules()]
    slots = attention_slots(model, IMAGES)
    inside = ["0.1.0", "0.1.1"] if kind == "around" else []
    assert [slot.name for slot in slots] == ["0.0", *inside, "0.2"]
    with pytest.raises(
        ValueError, match=r"names has '0.1', behind which nothing can be placed, as"
    ):
        attention_slots(model, IMAGES, names=["0.0", "0.1"])
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_hooks for module in model.modules())
    place_attention(model, slots, "every-block")
    assert torch.equal(model(IMAGES), plain)
    # the module around it can be a slot
    (slot,) = attention_slots(model, IMAGES, names=["0"])
    remove_attention(model)
    wanted = model[1](3 * model[0](IMAGES) + 1)
    place_attention(model, [slot], "every-block", lambda slot: Affine(slot.channels_last))
    assert torch.equal(model(IMAGES), wanted) and getattr(model[0], ATTACHED).calls == 1


def test_norms_with_an_activation_inside_are_no_slots() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Sequential(Residual(3, 8, 1), NormAct(8)), Residual(8, 8, 1))
    assert [slot.name for slot in attention_slots(model, IMAGES)] == ["0.0", "1"]
    assert attention_slots(model, IMAGES, names=["0.1"])[0].dim == 8


def test_the_error_of_a_network_is_its_own() -> None:
    model = nested()
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        attention_slots(model, torch.randn(1, 4, 9, 5))
    assert not any("probe" in name for name, _ in model.named_modules())
    assert not any(module._forward_hooks for module in model.modules())


STAGES = {
    ("torchvision", "resnet18"): ("layer3", "layer4"),
    ("torchvision", "densenet121"): ("features.transition1", "features.transition2"),
    ("torchvision", "swin_t"): ("features.1", "features.3"),
    ("timm", "regnety_002"): ("s3", "s4"),
    ("timm", "swin_tiny_patch4_window7_224"): ("layers.0.blocks", "layers.1.blocks"),
    ("timm", "efficientnet_b0"): ("blocks.1", "blocks.3"),
}


@pytest.mark.parametrize(("library", "name"), STAGES)
def test_stages_of_libraries_by_name(library: str, name: str) -> None:
    mend_torchvision()
    made = pytest.importorskip(library, reason=f"{library} (extra `vision`) is missing")
    torch.manual_seed(0)
    model = (made.create_model if library == "timm" else made.models.get_model)(name).eval()
    x = torch.randn(1, 3, *((224, 224) if name.startswith("swin_tiny") else (64, 96)))
    names, last = STAGES[library, name], "swin" in name
    slots = attention_slots(model, x, names=names, channels_last=last)
    assert [slot.name for slot in slots] == list(names) and all(slot.chain for slot in slots)
    with torch.no_grad():
        plain = model(x)
        place_attention(model, slots, "every-block")
        assert torch.equal(model(x), plain)
        place_attention(model, slots, "every-block", lambda slot: Affine(slot.channels_last))
        blocks = [getattr(model.get_submodule(place), ATTACHED) for place in names]
        got = model(x)
        assert [block.calls for block in blocks] == [1, 1]
        remove_attention(model)
        assert torch.equal(model(x), plain)
        for place in names:
            model.get_submodule(place).register_forward_hook(lambda _m, _i, out: 3 * out + 1)
        assert torch.equal(model(x), got) and not torch.allclose(got, plain)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_dense_blocks_of_libraries_are_one_sentence(library: str) -> None:
    mend_torchvision()
    made = pytest.importorskip(library, reason=f"{library} (extra `vision`) is missing")
    model = (made.create_model if library == "timm" else made.models.get_model)("densenet121")
    x = torch.randn(1, 3, 64, 32)
    with pytest.raises(ValueError, match="no residual blocks with grids were found in DenseNet; "):
        attention_slots(model, x)
    with pytest.raises(ValueError, match="names has 'features.denseblock2', behind which nothing"):
        attention_slots(model, x, names=["features.denseblock2"])


def test_placing_again_replaces() -> None:
    model = net()
    slots = attention_slots(model, IMAGES)
    place_attention(model, slots, "every-block")
    place_attention(model, slots, "last-block")
    assert [n for n, _ in model.named_modules() if n.endswith(ATTACHED)] == [f"layer3.1.{ATTACHED}"]
    opened(model)
    once = getattr(model.layer3[1], ATTACHED)
    grid = model.layer3[0](model.layer2(model.layer1(model.stem(IMAGES))))
    assert torch.equal(model.layer3[1](grid), once(Residual.forward(model.layer3[1], grid)))


def test_compiled_networks_with_and_without_blocks_do_not_share_code() -> None:
    """The compiler keeps code by class, and a network without blocks has the same classes."""
    plain = net()
    placed = copy.deepcopy(plain)
    place_attention(placed, attention_slots(placed, IMAGES), "every-block")
    opened(placed)
    wanted = [model(IMAGES) for model in (plain, placed)]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    torch.compiler.reset()
    for model, found in ((plain, wanted[0]), (placed, wanted[1]), (plain, wanted[0])):
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(IMAGES), found)
    remove_attention(placed)
    assert type(placed.layer3[1]) is Residual
    assert torch.equal(torch.compile(placed, backend="eager")(IMAGES), wanted[0])


def test_blocks_take_dtype_mode_and_are_copied_loaded_and_compiled() -> None:
    model = net().double()
    slots = attention_slots(model, IMAGES.double())
    place_attention(model, slots)
    opened(model)
    x = IMAGES.double()
    out = model(x)
    assert out.dtype == torch.float64 and not getattr(model.layer3[1], ATTACHED).training
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), out)
    nn.init.zeros_(getattr(copied.layer3[1], ATTACHED).spatial.weight)
    assert not torch.equal(copied(x), out) and torch.equal(model(x), out)
    other = net().double()
    place_attention(other, slots)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), out)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - out).abs().max() < 1e-12
    model(x).sum().backward()
    placed = [p for name, p in model.named_parameters() if ATTACHED in name]
    assert len(placed) == 6 and all(p.grad.abs().max() > 0 for p in placed)
    assert torch.autograd.gradcheck(model, (x[:1].requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("frames", [None, 2])
@pytest.mark.parametrize("name", ["davit_tiny", "halonet26t"])
def test_backbones_of_this_package(name: str, frames: int | None) -> None:
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=4, frames=frames).eval()
    shape = (1, 3, 64, 32) if frames is None else (1, 3, 2, 64, 32)
    x = torch.randn(shape)
    slots = attention_slots(model, x)
    assert all(slot.channels_last for slot in slots)
    assert [slot.dim for slot in chosen_slots(slots, "stage-ends")] == [
        info["num_chs"] for info in model.feature_info
    ]
    assert {slot.grid[0] for slot in slots} == {frames or 1}
    with torch.no_grad():
        plain = model(x)
        place_attention(model, slots)
        assert torch.equal(model(x), plain)
        opened(model)
        assert (model(x) - plain).abs().max() > 1e-4


PEERS = {
    "torchvision": {
        "resnet50": (16, [3, 4, 6, 3]),
        "convnext_tiny": (18, [3, 3, 9, 3]),
        "swin_t": (12, [2, 2, 6, 2]),
        "mobilenet_v2": (17, [1, 2, 3, 4, 3, 3, 1]),
        "regnet_y_400mf": (16, [1, 3, 6, 6]),
    },
    "timm": {
        "resnet50": (16, [3, 4, 6, 3]),
        "resnetv2_50": (16, [3, 4, 6, 3]),
        "convnext_tiny": (18, [3, 3, 9, 3]),
        "efficientnet_b0": (16, [1, 2, 2, 3, 3, 4, 1]),
        "regnety_004": (16, [1, 3, 6, 6]),
    },
}


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library, names in PEERS.items() for name in names]
)
def test_networks_of_libraries(library: str, name: str) -> None:
    mend_torchvision()
    made = pytest.importorskip(library, reason=f"{library} (extra `vision`) is missing")
    torch.manual_seed(0)
    build = made.create_model if library == "timm" else made.models.get_model
    model = build(name).eval()
    x = torch.randn(1, 3, 256, 128)
    slots = attention_slots(model, x)
    count, stages = PEERS[library][name]
    assert len(slots) == count
    assert [sum(s.stage == i for s in slots) for i in range(len(stages))] == stages
    with torch.no_grad():
        plain = model(x)
        parameters = sum(p.numel() for p in model.parameters())
        place_attention(model, slots, "every-block")
        assert torch.equal(model(x), plain)
        added = sum(p.numel() for p in model.parameters()) - parameters
        assert 0 < added < 0.01 * parameters
        opened(model)
        assert not torch.equal(model(x), plain)


def test_a_resnet_50_pays_less_than_a_hundredth() -> None:
    """Parameters and multiplications behind all 16 blocks, and less than a quarter of non-local."""
    from torch.utils.flop_counter import FlopCounterMode

    widths = [(256, 64)] * 3 + [(512, 32)] * 4 + [(1024, 16)] * 6 + [(2048, 16)] * 3
    parameters, flops = 25_557_032, 8_110_637_056  # torchvision's, 256 x 128, last stride 1
    light = heavy = added = 0
    with torch.device("meta"):
        for dim, rows in widths:
            x = torch.empty(1, dim, rows, rows // 2)
            blocks = [block(dim, channels_last=False) for block in (LightAttention, NonLocalBlock)]
            counts = []
            for block in blocks:
                with FlopCounterMode(display=False) as counter:
                    block(x)
                counts.append(counter.get_total_flops())
            added += sum(p.numel() for p in blocks[0].parameters())
            light, heavy = light + counts[0], heavy + counts[1]
    assert added < 0.01 * parameters and light < 0.01 * flops and light < heavy / 4


def test_ela_fits_the_slots_too() -> None:
    model = net()
    place_attention(
        model,
        attention_slots(model, IMAGES),
        [1, 2],
        lambda slot: EfficientLocalAttention(slot.dim, channels_last=slot.channels_last),
    )
    assert model(IMAGES).isfinite().all()


def test_latency_is_a_median_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("stvision.models.placement.perf_counter", lambda: clock[0])
    lengths = iter([50.0, 40.0, 60.0, 5.0, 1.0, 9.0, 2.0, 3.0])

    def run() -> None:
        clock[0] += next(lengths)

    assert measured_latency(run, warmup=3, runs=5) == 3
    assert next(lengths, None) is None


GAINS = [0.5, 3.0, 2.0, -1.0, 1.5, 0.2]
COSTS = [4.0, 1.0, 2.0, 0.5, 1.5, 3.0]


def additive(places: tuple[int, ...]) -> tuple[float, float]:
    """Score and latency that add up over places."""
    return sum(GAINS[i] for i in places), 10 + sum(COSTS[i] for i in places)


def test_exhaustive_search_tries_each_set_once() -> None:
    tried = []

    def evaluate(places: tuple[int, ...]) -> tuple[float, float]:
        tried.append(places)
        return additive(places)

    found = search_placements(4, evaluate)
    assert len(tried) == len(set(tried)) == len(found) == 16
    assert [p.places for p in found] == tried and found[0].places == ()


def test_the_front_is_that_of_comparing_all_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.randint(0, 6, (12, 2), generator=g).tolist()
        found = [Placed((i,), float(s), float(t)) for i, (s, t) in enumerate(numbers)]
        wanted = {
            (p.score, p.latency)
            for p in found
            if not any(
                q.score >= p.score
                and q.latency <= p.latency
                and (q.score, q.latency) != (p.score, p.latency)
                for q in found
            )
        }
        front = pareto_front(found)
        assert {(p.score, p.latency) for p in front} == wanted and len(front) == len(wanted)
        assert all(a.latency < b.latency for a, b in itertools.pairwise(front))


def test_evolution_finds_the_front_with_fewer_trials() -> None:
    """Of 4096 sets of 12 places, most of which only cost."""
    gains = [0.0, 1, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0]

    def at(places: tuple[int, ...]) -> list[float]:
        return [gains[i] for i in places]

    def evaluate(places: tuple[int, ...]) -> tuple[float, float]:
        return sum(at(places)), 1.0 + 0.1 * len(places)

    options = {"method": "evolution", "population": 24, "generations": 25}
    found = search_placements(12, evaluate, **options)
    assert len(found) <= 24 * 25 and len({p.places for p in found}) == len(found)
    front = [p.places for p in pareto_front(found)]
    assert front == [(), (8,), (4, 8), (1, 4, 8)]
    assert found == search_placements(12, evaluate, **options)
    assert found != search_placements(12, evaluate, **options, seed=1)
    # with two sets to start from, places that neither differs in are reached by flips alone
    options |= {"population": 2, "generations": 120}
    found = search_placements(12, lambda p: (sum(g or -1 for g in at(p)), len(p)), **options)
    assert pareto_front(found)[-1].places == (1, 4, 8)
    few = search_placements(2, evaluate, method="evolution")
    assert len(few) == 4  # it ends where all sets are tried


def test_effects_of_an_additive_objective_are_its_terms() -> None:
    effects = slot_effects(search_placements(6, additive), 6)
    for effect, gain, cost in zip(effects, GAINS, COSTS, strict=True):
        assert abs(effect.score - gain) < 1e-12 and abs(effect.latency - cost) < 1e-12
        assert effect.with_it == effect.without_it == 32
    assert slot_effects([Placed((0,), 1.0, 1.0)], 2) == []


def test_bad_input_gets_one_sentence() -> None:
    model = net()
    slots = attention_slots(model, IMAGES)
    for rule, message in (
        ("late", "rule must be one of 'every-block', .*, or stages and slots, got 'late'"),
        ([3], "stages of rule must lie between -3 and 2, got 3"),
        (["layer9"], "rule has 'layer9', which is no slot of the network"),
    ):
        with pytest.raises(ValueError, match=message):
            place_attention(model, slots, rule)
    with pytest.raises(ValueError, match="names has 'layer9', which the network does not have"):
        attention_slots(model, IMAGES, names=["layer9"])
    with pytest.raises(ValueError, match="names has 'head', whose output is no grid"):
        attention_slots(model, IMAGES, names=["head"])
    with pytest.raises(ValueError, match="no residual blocks with grids were found in Linear"):
        attention_slots(nn.Linear(17, 3), IMAGES)
    blocks = nn.Sequential(nn.Sequential(Residual(3, 8, 1)))
    with pytest.raises(ValueError, match=r"the layout of 0.0's output \(1, 8, 8, 8\) cannot be"):
        attention_slots(blocks, torch.randn(1, 3, 8, 8))
    assert attention_slots(blocks, torch.randn(1, 3, 8, 8), channels_last=False)[0].dim == 8
    with pytest.raises(ValueError, match="warmup must be at least 0 and runs at least 1, got"):
        measured_latency(lambda: None, runs=0)
    for options, message in (
        ({"method": "grid"}, "method must be 'exhaustive' or 'evolution', got 'grid'"),
        ({"population": 1}, "population must be at least 2, got 1"),
        ({"generations": 0}, "generations must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            search_placements(3, additive, **options)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        search_placements(0, additive)
    with pytest.raises(ValueError, match="takes at most 16 places, got count=17"):
        search_placements(17, additive)
    with pytest.raises(ValueError, match="evaluate must give finite numbers, got nan"):
        search_placements(1, lambda places: (math.nan, 1.0))
