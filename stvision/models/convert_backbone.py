"""Published weights of backbones, into folders that :func:`create_backbone` loads by name.

A folder holds ``model.safetensors`` in this package's keys and ``config.json`` with the name of the
backbone and the arguments that the weights were made for.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stvision import __version__
from stvision.layers.vision import FRAME_WEIGHTS
from stvision.models.backbones import BACKBONES, create_backbone
from stvision.models.biformer import BIFORMER_MODELS, convert_biformer_state_dict
from stvision.models.convs5 import (
    CONVS5_MODELS,
    convert_convs5_flax,
    convert_convs5_predictor,
)
from stvision.models.davit import DAVIT_MODELS, convert_davit_state_dict
from stvision.models.halonet import HALONET_MODELS, convert_halonet_state_dict
from stvision.models.nat import NAT_MODELS, convert_nat_state_dict
from stvision.models.selective_s4 import convert_vis4mer_state_dict
from stvision.models.tvts import TUBELET, TVTS_MODELS, convert_tvts_state_dict
from stvision.models.weights import BACKBONE_KIND, CONFIG, read_weights

State = Mapping[str, Tensor]


def _nothing(state: State) -> dict[str, Any]:
    return {}


def _same(state: State) -> dict[str, Tensor]:
    return dict(state)


def _nat_options(state: State) -> dict[str, Any]:
    """The factors of the branches exist or not by release."""
    return {"layer_scale": 1e-5 if any(key.endswith(".gamma1") for key in state) else None}


def _tvts_options(state: State) -> dict[str, Any]:
    found = {}
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        patch = state["patch_embed.proj.weight"].shape[-1]
        found = {
            "patch_size": patch,
            "img_size": patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
        }
    if "temporal_embed" in state:
        found["frames"] = TUBELET * state["temporal_embed"].shape[1]
    return found


def _biformer_names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """The two lines of Swin's layout have equal shapes, but not equal keys."""
    if any(".attn.qkv_linear." in key for key in published):
        return ("biformer_stl_nchw",)
    if any(".attn.qkv.qkv." in key for key in published):
        return tuple(name for name in BIFORMER_MODELS if name != "biformer_stl_nchw")
    return tuple(BIFORMER_MODELS)


@dataclass(frozen=True)
class Kind:
    """A family of published weights.

    Attributes:
        names: backbones of the catalogue that they may be of; given the published keys.
        convert: published keys to this package's.
        first_conv: name of the first convolution.
        options: further arguments that shapes tell of.
        as_backbone: what is written, in the keys of the backbone.
        fresh: endings of parameters that published weights lack.
    """

    names: Callable[[Mapping[str, Any]], tuple[str, ...]]
    convert: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    first_conv: str
    options: Callable[[State], dict[str, Any]] = _nothing
    as_backbone: Callable[[State], dict[str, Tensor]] = _same
    fresh: tuple[str, ...] = ()


def _of(*names: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda published: names


#: name in ``stvision convert`` -> what it is
KINDS: dict[str, Kind] = {
    "nat": Kind(
        _of(*(name for name in NAT_MODELS if name.startswith("nat"))),
        convert_nat_state_dict,
        "patch_embed.proj.0",
        _nat_options,
    ),
    "dinat": Kind(
        _of(*(name for name in NAT_MODELS if name.startswith("dinat"))),
        convert_nat_state_dict,
        "patch_embed.proj.0",
        _nat_options,
    ),
    "davit": Kind(
        _of(*DAVIT_MODELS),
        convert_davit_state_dict,
        "stem.conv",
        fresh=("head.norm.weight", "head.norm.bias"),
    ),
    "biformer": Kind(_biformer_names, convert_biformer_state_dict, "stem.0"),
    "halonet": Kind(_of(*HALONET_MODELS), convert_halonet_state_dict, "stem.conv1.conv"),
    "tvts": Kind(
        _of(*TVTS_MODELS),
        convert_tvts_state_dict,
        "patch_embed.proj",
        _tvts_options,
        fresh=("temporal_embed",),
    ),
    "vis4mer": Kind(
        _of("vis4mer_large"),
        convert_vis4mer_state_dict,
        "patch_embed",
        fresh=("patch_embed.weight", "patch_embed.bias"),
    ),
    "convs5": Kind(
        _of(*CONVS5_MODELS),
        convert_convs5_flax,
        "encoder.conv",
        as_backbone=convert_convs5_predictor,
        fresh=("head.norm.weight", "head.norm.bias"),
    ),
}


def _options(kind: Kind, state: State) -> dict[str, Any]:
    """Arguments of the backbone that the shapes of its weights tell."""
    head, conv = state.get("head.fc.weight"), state.get(f"{kind.first_conv}.weight")
    found: dict[str, Any] = {"num_classes": 0 if head is None else head.shape[0]}
    if conv is not None:
        found["in_chans"] = conv.shape[1]
    return found | kind.options(state)


def _fits(name: str, kind: Kind, state: State) -> bool:
    """Whether these are all weights of the backbone, by keys and shapes."""
    options = _options(kind, state)
    with torch.device("meta"):
        own = BACKBONES[name](**options).state_dict()
    fresh = kind.fresh + FRAME_WEIGHTS
    missing = [key for key in own.keys() - state.keys() if not key.endswith(fresh)]
    shared = own.keys() & state.keys()
    same = all(own[key].shape == state[key].shape for key in shared)
    return not missing and same and not state.keys() - own.keys()


def infer_name(kind: str, published: Mapping[str, Any], state: State) -> str:
    """The backbone that weights are of.

    Args:
        kind: a key of :data:`KINDS`.
        published: the weights as they came.
        state: the same in the keys of the backbone.

    Raises:
        ValueError: they fit none, or several alike.
    """
    names = KINDS[kind].names(published)
    fitting = [name for name in names if _fits(name, KINDS[kind], state)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"the weights fit {' and '.join(fitting)} alike: give the name of the one they are of"
        )
    raise ValueError(
        f"the weights have the shapes of none of the backbones of kind {kind}: {', '.join(names)}"
    )


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".npz":
        return read_weights(path)
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a file of arrays: {error}") from error


def convert_backbone(
    kind: str,
    path: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Convert published weights and write the folder that :func:`create_backbone` loads.

    The folder appears only once the backbone has been built from it.

    Args:
        kind: a key of :data:`KINDS`.
        path: a .safetensors file, a file of ``torch.save`` (read without running code), an .npz
            file, or a folder with one of :data:`stvision.models.weights.FILES`.
        output: folder to write; must not exist, or be empty.
        name: the backbone; ``None`` to tell it from shapes.
        dtype: of the written weights.
        options: arguments of the backbone that shapes do not tell, such as ViS4mer's ``l_max``.

    Returns:
        What ``config.json`` holds, and ``parameters``, how many numbers were written.

    Raises:
        ValueError: an unknown kind or name, or weights that do not fit.
        FileNotFoundError: nothing is there to read.
        FileExistsError: ``output`` holds something.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    path, output = Path(path), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    published = _read(path)
    family = KINDS[kind]
    try:
        written = family.convert(published)
        state = family.as_backbone(written)
    except KeyError as error:
        raise ValueError(f"{path} holds no weights of kind {kind}: it lacks {error}") from error
    if name is None:
        name = infer_name(kind, published, state)
    elif name not in family.names({}):
        raise ValueError(f"name must be one of {', '.join(family.names({}))}, got {name!r}")
    config = {
        "kind": BACKBONE_KIND,
        "backbone": name,
        "options": _options(family, state) | options,
        "converted_from": kind,
        "stvision": __version__,
    }

    from safetensors.torch import save_file

    tensors = {
        key: (x.to(dtype) if x.is_floating_point() else x).clone(
            memory_format=torch.contiguous_format
        )
        for key, x in written.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        create_backbone(name, partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config | {"parameters": sum(x.numel() for x in tensors.values())}
