"""Weights of image backbones: reading them, and fitting them to another head, input or to video."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

#: names under which a folder or a hub repository holds its weights, in the order they are tried
FILES = ("model.safetensors", "pytorch_model.bin", "model.bin", "model.pth")

_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".pkl"})

#: file beside them that says which arguments a backbone takes
CONFIG = "config.json"
BACKBONE_KIND = "stvision backbone"

#: entries under which checkpoints of trainings hold the weights
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        source: a .safetensors file, a file of ``torch.save``, a folder that holds one of
            :data:`FILES`, or ``owner/name`` of a repository on the Hugging Face hub, with or
            without ``hf-hub:`` before it.

    Returns:
        Name to tensor, on the CPU; what wraps it in a checkpoint of a training is taken off.

    Raises:
        FileNotFoundError: neither a path nor the name of a repository, or nothing inside it.
        ValueError: the file holds no state dict.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(FILES)}")
        path = found[0]
    elif not path.is_file():
        path = _download(str(source).removeprefix("hf-hub:"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # both readers raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is not a file of weights: {reason[0]}") from error
    return unwrap(state, str(path))


def read_options(source: str | Path) -> dict[str, Any]:
    """Arguments of the backbone that stand beside its weights, where ``stvision convert`` wrote them.

    Args:
        source: as for :func:`read_weights`.

    Returns:
        The arguments; none for files and for folders or repositories of other origin.
    """
    folder = Path(source)
    if folder.is_file():
        return {}
    if folder.is_dir():
        path = folder / CONFIG if (folder / CONFIG).is_file() else None
    else:
        path = _from_hub(str(source).removeprefix("hf-hub:"), (CONFIG,))
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    ours = isinstance(config, dict) and config.get("kind") == BACKBONE_KIND
    return dict(config.get("options") or {}) if ours else {}


def unwrap(state: Any, name: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict inside a checkpoint; ValueError when there is none."""
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not any(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{name} holds no state dict: a mapping from names to tensors")
    return {
        str(key).removeprefix("module."): x for key, x in state.items() if isinstance(x, Tensor)
    }


def _download(name: str) -> Path:
    path = _from_hub(name, FILES, required=True)
    if path is None:
        raise FileNotFoundError(f"hub repository {name} holds none of {', '.join(FILES)}")
    return path


def _from_hub(name: str, files: Sequence[str], required: bool = False) -> Path | None:
    """The first of the files that a hub repository or its copy in the cache has; else ``None``.

    ``required``: where there is neither network nor copy, say so.
    """
    a_file = Path(name).suffix in _SUFFIXES  # of which no repository is named
    if a_file or name.count("/") != 1 or name.startswith((".", "/")) or name.endswith("/"):
        raise FileNotFoundError(
            f"pretrained={name!r} is neither a file, a folder nor owner/name of a hub repository"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missed: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # no network, and not in the cache
            missed = error
        except EntryNotFoundError:
            continue
        except OSError as error:
            missed = error
            break
    if missed is not None and required:
        raise FileNotFoundError(
            f"pretrained={name!r} is no path here, and the hub does not give it ({missed})"
        ) from missed
    return None


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Kernel of a first convolution for another number of input channels.

    One channel gets the sum over the old ones; more repeat them in turn, scaled so that an input
    of equal channels gives the same response.

    Args:
        weight: (out, old, *kernel).
        channels: new input channels.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    repeats = -(-channels // old)
    out = weight.repeat(1, repeats, *(1,) * (weight.ndim - 2))[:, :channels]
    if channels < old:
        out = weight.sum(1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels
        return out.contiguous()
    # copies of a channel share its weight
    counts = torch.tensor(
        [len(range(i % old, channels, old)) for i in range(channels)],
        dtype=weight.dtype,
        device=weight.device,
    )
    return out / counts.view(1, -1, *(1,) * (weight.ndim - 2))


def load_backbone(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    first_conv: str,
    head: str = "head.fc",
    fresh: tuple[str, ...] = (),
) -> None:
    """Load converted weights into a backbone that may differ in head, input channels and time.

    Args:
        model: the backbone.
        state: weights under the keys of ``model``.
        first_conv: name of the first convolution, fitted by :func:`adapt_input_channels`.
        head: name of the classifier, which keeps its fresh weights where its size differs.
        fresh: endings of parameters that image weights lack and that keep their first values.

    Raises:
        ValueError: keys that are missing, left over or of another shape.
    """
    own = model.state_dict()
    state = dict(state)
    kernel = f"{first_conv}.weight"
    if kernel in state and kernel in own:
        state[kernel] = adapt_input_channels(state[kernel], own[kernel].shape[1])
    weight = f"{head}.weight"
    if weight not in own or (weight in state and state[weight].shape != own[weight].shape):
        state = {key: x for key, x in state.items() if not key.startswith(f"{head}.")}
    if weight not in state:
        state |= {key: x for key, x in own.items() if key.startswith(f"{head}.")}
    for key, value in own.items():
        if key not in state and key.endswith(fresh or ("\0",)):
            state[key] = value
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    wrong = [
        f"{kind} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("left over", left), ("other shape", shapes))
        if names
    ]
    if wrong:
        raise ValueError(f"weights do not fit {type(model).__name__}: {'; '.join(wrong)}")
    cast(Any, model).load_state_dict(state)
