"""Learning rates that fall towards the stem (BEiT, Bao et al. 2022), and what is not decayed.

Layers are read off the order in which a backbone registers its modules, which is that in which they
run:

1. what stands before the first block is the stem;
2. each block is a layer: an entry of ``stages.i.blocks`` (a stage's ``downsample`` belongs to its
   first block), an entry of ``stages`` that has no ``blocks``, or an entry of ``blocks``;
3. what stands behind the last block, such as the last norm and the head, is the last layer.

A network without ``stages`` and ``blocks`` has a layer for each of its children. In
:class:`stvision.models.two_stream.TwoStream` each stream is read so, and the head follows both. The
last layer has the whole learning rate, each layer before it ``decay`` times that of the next.
"""

from typing import Any

from torch import nn

from stvision.models.two_stream import TwoStream

#: endings of names of tables of positions and of tokens of their own
TABLES = ("pos_embed", "temporal_embed", "cls_token", "rpb", "_rel", "position_bias_table")


def _layers(net: nn.Module) -> list[list[str]]:
    """Prefixes of the names in each layer between stem and end, in the order they run."""
    stages, blocks = getattr(net, "stages", None), getattr(net, "blocks", None)
    if isinstance(stages, nn.ModuleList):
        found: list[list[str]] = []
        for i, stage in enumerate(stages):
            inner = getattr(stage, "blocks", None)
            if not isinstance(inner, nn.ModuleList) or not len(inner):
                found.append([f"stages.{i}."])
                continue
            own = [[f"stages.{i}.blocks.{j}."] for j in range(len(inner))]
            own[0].append(f"stages.{i}.downsample.")
            found += own
        return found
    if isinstance(blocks, nn.ModuleList | nn.Sequential):
        return [[f"blocks.{j}."] for j in range(len(blocks))]
    return [[f"{name}."] for name, _ in net.named_children()]


def layer_distances(net: nn.Module) -> dict[str, int]:
    """How many layers lie between each parameter's and the last; see the module's rule.

    Args:
        net: any backbone of ours, a :class:`~stvision.models.two_stream.TwoStream`, or another
            network.

    Returns:
        Name of each parameter -> 0 for the last layer, rising towards the stem.
    """
    if isinstance(net, TwoStream):
        distances = {f"head.{name}": 0 for name, _ in net.head.named_parameters()}
        for stream in ("backbone", "flow_backbone"):
            inner = getattr(net, stream)
            if inner is not None:
                found = layer_distances(inner).items()
                distances |= {f"{stream}.{name}": distance + 1 for name, distance in found}
        return distances
    layers = _layers(net)
    depth: dict[str, int] = {}
    before = True  # no block has come yet
    for name, _ in net.named_parameters():
        inside = [i for i, prefixes in enumerate(layers) if name.startswith(tuple(prefixes))]
        before = before and not inside
        depth[name] = inside[0] if inside else -1 if before else len(layers)
    last = max(depth.values(), default=0)
    return {name: last - value for name, value in depth.items()}


def is_decayed(net: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter of ``net``.

    It does not to those of one axis (biases, norms, factors of branches), to tables of positions and
    tokens (:data:`TABLES`), and to what the network itself excludes by ``no_weight_decay()`` (names)
    or ``no_weight_decay_keywords()`` (parts of names).
    """
    own: Any = getattr(net, "no_weight_decay", set)
    parts: Any = getattr(net, "no_weight_decay_keywords", set)
    excluded = name in own() or any(part in name for part in parts())
    return net.get_parameter(name).ndim > 1 and not name.endswith(TABLES) and not excluded


def layer_decay_groups(net: nn.Module, decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for :meth:`stvision.train.loop.Task.parameter_groups`, the last layers first.

    Args:
        net: the network.
        decay: learning rate of a layer over that of the next, above 0 and at most 1.

    Returns:
        Groups with ``params``, ``lr_scale`` and, where nothing is decayed, ``weight_decay`` 0; each
        parameter that requires a gradient is in one of them.

    Raises:
        ValueError: another decay.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {decay}")
    distances = layer_distances(net)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        distance = distances[name] if decay < 1 else 0
        decayed = is_decayed(net, name)
        fresh: dict[str, Any] = {"params": [], "lr_scale": decay**distance}
        if not decayed:
            fresh["weight_decay"] = 0.0
        groups.setdefault((distance, not decayed), fresh)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
