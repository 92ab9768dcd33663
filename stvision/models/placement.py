"""Where attention blocks go in a convolutional network: slots, rules, and a search with measured time.

Eisenbach et al. 2023 (arXiv 2302.14574) search where a light attention block is worth its time in a
network for re-identification. Their rules are not public, so nothing here takes one place for better
than another: a rule names places, :func:`search_placements` finds the placements that no other one
beats in both accuracy and time, and :func:`slot_effects` says what each place brought in that run.

A slot is the output of a residual block. :func:`attention_slots` finds them in networks of timm, of
torchvision and of this package; :func:`place_attention` adds blocks under a name of their own, so all
weights of the network keep their names.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from stvision.layers.light_attention import LightAttention

#: name of the block inside the module that it follows
ATTACHED = "placed_attention"

#: name of what :func:`attention_slots` puts into modules for its run
_PROBE = "slot_probe"

#: parts of class names of modules that change the grid between blocks and are none themselves
_BETWEEN = ("merg", "downsample", "embed", "stem")

#: norms, which have children where an activation is a part of theirs
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Slot:
    """A place behind a residual block.

    Args:
        name: path of the block in the network.
        stage: number from 0; a stage is a run of blocks whose outputs have one shape.
        dim: channels C there.
        grid: (T, H, W) there, for the input that the slots were found with; T = 1 for images.
        channels_last: whether the output is (B, H, W, C) or (B, T, H, W, C), not channels second.
        image: whether the output has no axis of time.
        chain: whether the module runs its children one after another and gives back what the last
            one gives, as ``nn.Sequential`` does; a block that is added to such a one runs by that.
    """

    name: str
    stage: int
    dim: int
    grid: tuple[int, int, int]
    channels_last: bool
    image: bool
    chain: bool


class _Probe(nn.Module):
    """A child that changes nothing and keeps what the module that it was added to gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran, self.seen = False, None

    def forward(self, x: Any, *_others: Any, **_options: Any) -> Any:
        self.ran, self.seen = True, x
        return x


def _blocks(module: nn.Module, path: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Residual blocks below a module, in the order in which they were added."""
    for key, child in module.named_children():
        name = f"{path}.{key}" if path else key
        kind = type(child).__name__
        if key == ATTACHED or isinstance(child, _NORMS):
            continue
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks(child, name)
        elif any(part in kind.lower() for part in _BETWEEN) or not any(
            True for _ in child.children()
        ):
            continue
        elif isinstance(getattr(child, "blocks", None), nn.Sequential | nn.ModuleList):
            yield from _blocks(cast(nn.Module, child.blocks), f"{name}.blocks")
        elif kind.endswith("Stage"):
            yield from _blocks(child, name)
        elif path or isinstance(module, nn.Sequential | nn.ModuleList):
            # what lies beside lists and stages is a stem or a head
            yield name, child


def _channel_axis(block: nn.Module, shape: Sequence[int], like: Sequence[int]) -> int | None:
    """1 or -1, where the channels of a block's output are; ``None`` where that is not to be told.

    Without the axis of channels the output has the proportions of the input; where that is so for
    both, channels have norms or biases of their size.
    """
    found = []
    for axis, (height, width) in ((1, shape[-2:]), (-1, shape[-3:-1])):
        ratios = (like[0] / height, like[1] / width)
        if max(ratios) / min(ratios) < 1 + 1 / min(height, width):
            found.append(axis)
    if len(found) > 1:
        tensors = [*block.parameters(), *block.buffers()]
        sizes = {t.shape[0] for t in tensors if t.ndim == 1}
        found = [axis for axis in found if shape[axis] in sizes]
    return found[0] if len(found) == 1 else None


def _outputs(
    net: nn.Module, example: Tensor, blocks: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Size], set[str], list[str], Exception | None]:
    """Run a network and look at modules of it.

    Returns:
        Shapes of the grids that the modules give, in the order of running; names of those that run
        their children one after another; of those that run them in another way, which may spoil
        the run; and the error in which it ended, if it did.
    """
    shapes: dict[str, torch.Size] = {}
    chains: set[str] = set()
    probes = {name: _Probe() for name in blocks}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim in (4, 5):
                shapes[name] = out.shape
            if probes[name].ran and probes[name].seen is out:
                chains.add(name)

        return hook

    training = {module: module.training for module in net.modules()}
    handles = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    for name, block in blocks.items():
        block.add_module(_PROBE, probes[name])
    error = None
    try:
        net.eval()(example)
    except Exception as raised:  # noqa: BLE001  the caller raises it where no probe is the cause
        error = raised
    finally:
        for block in blocks.values():
            block._modules.pop(_PROBE, None)
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    odd = [name for name, probe in probes.items() if probe.ran and name not in chains]
    return shapes, chains, odd, error


@torch.no_grad()
def attention_slots(
    net: nn.Module,
    example: Tensor,
    *,
    names: Sequence[str] | None = None,
    channels_last: bool | None = None,
) -> list[Slot]:
    """Residual blocks of a network whose output is a grid, in the order in which they run.

    Blocks are sought in lists and stages. The network runs in evaluation mode: once, and once
    more for each module met that runs its children in a way of its own, as the dense blocks of a
    DenseNet do. Behind such a one nothing can be placed, so it is no slot.

    Args:
        net: a network of timm, of torchvision, of this package or of one's own; its last layers may
            be anything.
        example: images (B, C, H, W) or clips (B, C, T, H, W) that the network takes; rows and
            columns should differ in number where layouts are to be told apart.
        names: paths of the blocks, for a network in which they are not found. A list of blocks that
            run one after another, ``nn.Sequential`` for instance, is a block too.
        channels_last: the layout of all outputs; ``None`` to tell it from sizes.

    Raises:
        ValueError: no block is found, a name does not exist, one gives no grid or runs its children
            in a way of its own, or the layout cannot be told.
    """
    modules = dict(net.named_modules())
    if names is not None:
        for name in names:
            if name not in modules:
                raise ValueError(f"names has {name!r}, which the network does not have")
        blocks = {name: modules[name] for name in names}
    else:  # one that stands in two places is one block
        once: dict[nn.Module, str] = {}
        for name, block in _blocks(net):
            once.setdefault(block, name)
        blocks = {name: block for block, name in once.items()}
    while True:
        shapes, chains, odd, error = _outputs(net, example, blocks)
        if not odd:
            break
        if names is not None:
            raise ValueError(
                f"names has {odd[0]!r}, behind which nothing can be placed, as it runs its children "
                "in a way of its own; name a module around it or one of those inside"
            )
        blocks = {name: block for name, block in blocks.items() if name not in odd}
    if error is not None:
        raise error
    missing = [name for name in names or () if name not in shapes]
    if missing:
        raise ValueError(f"names has {missing[0]!r}, whose output is no grid of 4 or 5 axes")
    if not shapes:
        raise ValueError(
            f"no residual blocks with grids were found in {type(net).__name__}; name them by names="
        )
    slots: list[Slot] = []
    for name, shape in shapes.items():
        axis: int | None = -1 if channels_last else 1
        if channels_last is None:
            axis = _channel_axis(blocks[name], shape, example.shape[-2:])
        if axis is None:
            raise ValueError(
                f"the layout of {name}'s output {tuple(shape)} cannot be told; give channels_last="
            )
        grid = tuple(shape[1:-1] if axis == -1 else shape[2:])
        grid = (1, *grid) if len(grid) == 2 else grid
        last = slots[-1] if slots else None
        same = last is not None and (last.dim, last.grid) == (shape[axis], grid)
        stage = 0 if last is None else last.stage + (not same)
        layout = (axis == -1, len(shape) == 4)
        slots.append(Slot(name, stage, shape[axis], cast(Any, grid), *layout, name in chains))
    return slots


def every_block(slots: Sequence[Slot]) -> list[Slot]:
    """Behind each residual block."""
    return list(slots)


def stage_ends(slots: Sequence[Slot]) -> list[Slot]:
    """Behind the last block of each stage."""
    return list({slot.stage: slot for slot in slots}.values())


def last_stage(slots: Sequence[Slot]) -> list[Slot]:
    """Behind each block of the last stage."""
    return [slot for slot in slots if slot.stage == slots[-1].stage]


def last_block(slots: Sequence[Slot]) -> list[Slot]:
    """Behind the last block alone."""
    return list(slots[-1:])


#: name of a rule -> the slots that it takes
PLACEMENTS: dict[str, Callable[[Sequence[Slot]], list[Slot]]] = {
    "every-block": every_block,
    "stage-ends": stage_ends,
    "last-stage": last_stage,
    "last-block": last_block,
}


def chosen_slots(slots: Sequence[Slot], rule: str | Sequence[int | str]) -> list[Slot]:
    """The slots that a rule takes, in the order of ``slots``.

    Args:
        slots: all slots of a network.
        rule: a name in :data:`PLACEMENTS`; or numbers of stages, from the end where negative, each
            standing for all blocks of its stage, and names of slots, mixed as one likes.

    Raises:
        ValueError: an unknown rule, stage or slot.
    """
    if isinstance(rule, str):
        if rule not in PLACEMENTS:
            known = ", ".join(map(repr, PLACEMENTS))
            raise ValueError(f"rule must be one of {known}, or stages and slots, got {rule!r}")
        return PLACEMENTS[rule](slots)
    count = max((slot.stage for slot in slots), default=-1) + 1
    named = {slot.name for slot in slots}
    stages, names = set(), set()
    for place in rule:
        if isinstance(place, str):
            if place not in named:
                raise ValueError(f"rule has {place!r}, which is no slot of the network")
            names.add(place)
        elif -count <= place < count:
            stages.add(place % count)
        else:
            raise ValueError(
                f"stages of rule must lie between {-count} and {count - 1}, got {place}"
            )
    return [slot for slot in slots if slot.stage in stages or slot.name in names]


def light_attention_for(slot: Slot) -> nn.Module:
    """The gate on channels and places with its defaults, for the layout of a slot."""
    return LightAttention(slot.dim, channels_last=slot.channels_last)


def _rebuilt(base: type[nn.Module]) -> nn.Module:
    """An empty module of the followed form of ``base``, for ``pickle`` and ``copy``."""
    kind = _followed(base)
    return kind.__new__(kind)


#: classes that :func:`_followed` has made
_FOLLOWED: dict[type[nn.Module], type[nn.Module]] = {}


def _followed(base: type[nn.Module]) -> type[nn.Module]:
    """``base`` with the block behind it.

    A class of its own rather than a forward hook: compiled code is shared by modules of one class, and
    the compiler does not look at hooks, so that of the network without blocks would run.
    """
    if base in _FOLLOWED:
        return _FOLLOWED[base]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out = cast(Any, base.forward)(self, *args, **kwargs)
        block = cast(Any, self._modules[ATTACHED])
        if block.channels_last and out.ndim == 4:
            return cast(Tensor, block(out.unsqueeze(1)).squeeze(1))
        return cast(Tensor, block(out))

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuilt, (base,), self.__dict__

    parts: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce_ex}
    parts |= {"_followed_base": base}
    parts |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    _FOLLOWED[base] = type(base.__name__, (base,), parts)
    return _FOLLOWED[base]


def _lift(_block: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    if inputs[0].ndim != 4:
        raise ValueError(
            f"x must be (B, H, W, C), as where the slot was found, got {tuple(inputs[0].shape)}"
        )
    return inputs[0].unsqueeze(1)


def _lower(_block: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
    return out.squeeze(1)


def _drop(hooks: dict[int, Any], ours: Callable[..., Tensor]) -> None:
    for key in [key for key, hook in hooks.items() if hook is ours]:
        del hooks[key]


def place_attention(
    net: nn.Module,
    slots: Sequence[Slot],
    rule: str | Sequence[int | str] = "stage-ends",
    block: Callable[[Slot], nn.Module] = light_attention_for,
) -> list[Slot]:
    """Put attention blocks into a network, in place.

    Each becomes a child :data:`ATTACHED` of the residual block it follows and runs behind it, which
    makes that one of a class of its own, or, where the slot is a chain, as the last of its children.
    Parameters of the network keep their names; what was there before is replaced. A network is
    compiled after its blocks are placed, not before.

    Args:
        net: what the slots were found in.
        slots: from :func:`attention_slots`.
        rule: see :func:`chosen_slots`.
        block: from a slot to a module for grids of its layout with an attribute ``channels_last``,
            as :class:`~stvision.layers.light_attention.LightAttention`,
            :class:`~stvision.layers.non_local.NonLocalBlock` and
            :class:`~stvision.layers.ela.EfficientLocalAttention` have it.

    Returns:
        The slots that were taken.

    Raises:
        ValueError: an unknown rule, stage or slot.
    """
    taken = chosen_slots(slots, rule)
    remove_attention(net)
    for slot in taken:
        module = net.get_submodule(slot.name)
        made = block(slot).train(module.training)
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        module.add_module(ATTACHED, made if like is None else made.to(like.device, like.dtype))
        if not slot.chain:
            module.__class__ = _followed(type(module))
        elif slot.image and cast(Any, made).channels_last:
            _drop(made._forward_pre_hooks, _lift)  # of a block that is behind another slot too
            _drop(made._forward_hooks, _lower)
            made.register_forward_pre_hook(_lift)
            made.register_forward_hook(_lower)
    return taken


def remove_attention(net: nn.Module) -> None:
    """Take out what :func:`place_attention` put in."""
    for module in list(net.modules()):
        block = module._modules.pop(ATTACHED, None)
        if block is not None:
            module.__class__ = module.__class__.__dict__.get("_followed_base", type(module))
            _drop(block._forward_pre_hooks, _lift)
            _drop(block._forward_hooks, _lower)


def measured_latency(
    run: Callable[[], Any], device: str | torch.device = "cpu", *, warmup: int = 20, runs: int = 100
) -> float:
    """Median seconds of a call, the device waited for before and after each.

    Args:
        run: what is measured, for instance a network on one image.
        device: where it computes.
        warmup: calls before, not counted.
        runs: calls that are counted.

    Raises:
        ValueError: ``warmup`` below 0 or ``runs`` below 1.
    """
    if warmup < 0 or runs < 1:
        raise ValueError(
            f"warmup must be at least 0 and runs at least 1, got warmup={warmup}, runs={runs}"
        )
    cuda = torch.device(device).type == "cuda"
    times = []
    for i in range(warmup + runs):
        if cuda:
            torch.cuda.synchronize(device)
        begin = perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        if i >= warmup:
            times.append(perf_counter() - begin)
    return median(times)


@dataclass(frozen=True)
class Placed:
    """A placement and what it gave.

    Args:
        places: the places that got a block, sorted.
        score: accuracy, higher is better.
        latency: seconds, lower is better.
    """

    places: tuple[int, ...]
    score: float
    latency: float


def pareto_front(found: Iterable[Placed]) -> list[Placed]:
    """Those that no other beats in one of score and latency without losing in the other.

    Returns:
        By rising latency; of equal score and latency the fewest, first places remain.
    """
    front: list[Placed] = []
    order = sorted(found, key=lambda p: (p.latency, -p.score, len(p.places), p.places))
    for placed in order:
        if not front or placed.score > front[-1].score:
            front.append(placed)
    return front


def search_placements(
    count: int,
    evaluate: Callable[[tuple[int, ...]], tuple[float, float]],
    *,
    method: str = "exhaustive",
    population: int = 16,
    generations: int = 8,
    seed: int = 0,
) -> list[Placed]:
    """Try placements of blocks.

    Exhaustive search tries all ``2 ** count`` sets of places, which suits the four or so stages of a
    network. Evolutionary search suits its blocks: it starts with no place, every place and random
    sets, and in each generation flips, on average, one place of mixtures of two placements that no
    other one beats.

    Args:
        count: places, at least 1.
        evaluate: from places (sorted, from 0) to score and latency in seconds, after a training that
            is as short as one likes; called once for each set.
        method: "exhaustive" or "evolution".
        population: sets that a generation tries; of "evolution".
        generations: of "evolution", the first included.
        seed: of "evolution"; the same seed tries the same sets.

    Returns:
        All that was tried, in that order; :func:`pareto_front` picks from it and
        :func:`slot_effects` sums it up.

    Raises:
        ValueError: an unknown method or a number out of range.
    """
    if method not in ("exhaustive", "evolution"):
        raise ValueError(f"method must be 'exhaustive' or 'evolution', got {method!r}")
    for name, value, least in (
        ("count", count, 1),
        ("population", population, 2),
        ("generations", generations, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if method == "exhaustive" and count > 16:
        raise ValueError(f"method='exhaustive' takes at most 16 places, got count={count}")
    found: dict[tuple[int, ...], Placed] = {}

    def attempt(places: tuple[int, ...]) -> bool:
        if places in found:
            return False
        score, latency = evaluate(places)
        if not (math.isfinite(score) and math.isfinite(latency)):
            raise ValueError(
                f"evaluate must give finite numbers, got {score} and {latency} for {places}"
            )
        found[places] = Placed(places, score, latency)
        return True

    if method == "exhaustive":
        for size in range(count + 1):
            for places in combinations(range(count), size):
                attempt(places)
        return list(found.values())
    random = torch.Generator().manual_seed(seed)

    def drawn(chance: float) -> Tensor:
        return torch.rand(count, generator=random) < chance

    def places_of(genes: Tensor) -> tuple[int, ...]:
        return tuple(genes.nonzero()[:, 0].tolist())

    attempt(())
    attempt(tuple(range(count)))
    for generation in range(generations):
        tried, parents = 2 * (generation == 0), pareto_front(found.values())
        for _ in range(20 * population):  # sets that were tried before are drawn again
            if tried >= population or len(found) == 2**count:
                break
            genes = drawn(0.5)
            if generation:
                pair = torch.randint(len(parents), (2,), generator=random).tolist()
                one, two = (
                    torch.tensor([i in parents[p].places for i in range(count)]) for p in pair
                )
                genes = torch.where(genes, one, two) ^ drawn(1 / count)
            tried += attempt(places_of(genes))
    return list(found.values())


@dataclass(frozen=True)
class SlotEffect:
    """What a place brought in a search: means of the placements with it less those without it.

    Args:
        place: its number.
        score: difference in score.
        latency: difference in seconds.
        with_it: placements that have it.
        without_it: placements that do not.
    """

    place: int
    score: float
    latency: float
    with_it: int
    without_it: int


def slot_effects(found: Sequence[Placed], count: int) -> list[SlotEffect]:
    """A rule for each place, drawn from a search and valid for what was tried there.

    After an exhaustive search each difference is the average over all surroundings of the place.

    Args:
        found: from :func:`search_placements`.
        count: places.

    Returns:
        One for each place that some placements have and some do not.
    """
    effects = []
    for place in range(count):
        sides = [[p for p in found if (place in p.places) == side] for side in (True, False)]
        if not all(sides):
            continue
        (score, latency), (score0, latency0) = (
            (mean(p.score for p in side), mean(p.latency for p in side)) for side in sides
        )
        effects.append(
            SlotEffect(place, score - score0, latency - latency0, len(sides[0]), len(sides[1]))
        )
    return effects
