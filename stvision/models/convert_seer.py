"""Weights that Seer's authors released, into :class:`SeerUNetModel` and :class:`FSTextDecomposer`.

A release is the state that Accelerate saved: ``pytorch_model.bin`` holds the U-Net and
``pytorch_model_1.bin`` the text decomposer.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stvision.layers.rotary import rotary_frequencies
from stvision.models.fstext import FSTextDecomposer
from stvision.models.seer import SeerUNetModel

#: file names of the U-Net and of the text decomposer, in the order in which they are tried
STATE_FILES = (
    ("pytorch_model.bin", "pytorch_model_1.bin"),
    ("model.safetensors", "model_1.safetensors"),
)


def find_release(path: str | Path) -> tuple[Path, Path]:
    """Files of the U-Net and of the text decomposer in a released folder.

    Args:
        path: the Accelerate folder, or a folder with one or more of them inside; of several, the
            one with the highest number in its name (the last training step) is taken.

    Raises:
        FileNotFoundError: no such folder, or it does not hold both files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the released Accelerate folder")

    def number(candidate: Path) -> int:
        numbers = re.findall(r"\d+", candidate.name)
        return int(numbers[-1]) if numbers else -1

    inner = sorted((item for item in folder.iterdir() if item.is_dir()), key=number, reverse=True)
    for candidate in [folder, *inner]:
        for unet, fstext in STATE_FILES:
            if (candidate / unet).is_file() and (candidate / fstext).is_file():
                return candidate / unet, candidate / fstext
    raise FileNotFoundError(
        f"{folder} holds no released Seer: pytorch_model.bin (U-Net) and pytorch_model_1.bin "
        "(text decomposer) are expected side by side"
    )


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` or ``.safetensors`` file, without prefixes of wrappers.

    A pickle is read with ``weights_only=True``: it cannot run code.

    Raises:
        ValueError: the file is no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{path} is not a file of weights: {reason[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a file of weights: it holds something else than tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _named(kind: str, keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} {kind} ({shown})"


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Put ``state`` into ``model``; every key and shape must match.

    Args:
        model: network, may lie on the meta device: the tensors themselves are put in.
        state: tensors by key.
        what: subject of the error sentence, such as "the U-Net in x.bin".

    Raises:
        ValueError: one sentence with the number and first names of missing, unexpected and
            differently shaped keys, or of rotary frequencies that are not the standard ones.
    """
    expected = model.state_dict()
    missing = sorted(set(expected) - set(state))
    extra = sorted(set(state) - set(expected))
    shaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    wrong = [("missing", missing), ("unexpected", extra), ("of another shape", shaped)]
    if any(keys for _, keys in wrong):
        found = "; ".join(_named(kind, keys) for kind, keys in wrong if keys)
        raise ValueError(f"{what} does not fit: {found}")
    for key, value in state.items():
        if key.endswith("rotary_emb.freqs"):
            standard = rotary_frequencies(2 * value.shape[0])
            if not torch.allclose(value.float(), standard, rtol=1e-2):
                raise ValueError(f"{what} does not fit: {key} are not the standard frequencies")
    model.load_state_dict(dict(state), assign=True)


def fstext_config(state: Mapping[str, Tensor], num_heads: int = 8) -> dict[str, Any]:
    """Constructor arguments of :class:`FSTextDecomposer` that fit a state dict.

    Args:
        state: tensors by key.
        num_heads: attention heads, which a state does not tell.

    Raises:
        ValueError: it is not the state of a text decomposer.
    """
    try:
        _, frames, tokens, width = state["pos_embed"].shape
        first = state["trf_blocks.0.transformer_blocks.0.ff.net.2.weight"]
        layers = {key.split(".")[1] for key in state if key.startswith("trf_blocks.")}
        projection = state.get("proj_in.weight")
    except KeyError as error:
        raise ValueError(
            f"the text decomposer does not fit: 1 missing ({error.args[0]})"
        ) from error
    return {
        "dim": width if projection is None else projection.shape[1],
        "inner_dim": None if projection is None else width,
        "num_layers": len(layers),
        "num_heads": num_heads,
        "ff_mult": first.shape[1] // first.shape[0],
        "max_frames": frames,
        "max_tokens": tokens,
    }


def convert_seer(
    path: str | Path, image_config: Mapping[str, Any]
) -> tuple[SeerUNetModel, FSTextDecomposer]:
    """Released weights as models, in the dtype in which they were saved.

    Args:
        path: see :func:`find_release`.
        image_config: configuration of the image U-Net that was inflated (Stable Diffusion 1.5).

    Returns:
        U-Net with norms over frames and Seer's attention, and text decomposer; both in evaluation
        mode.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a file does not fit.
    """
    unet_file, fstext_file = find_release(path)
    with torch.device("meta"):
        unet = SeerUNetModel(**SeerUNetModel.inflated_config(dict(image_config)))
    load_exactly(unet, load_state(unet_file), f"the U-Net in {unet_file}")
    state = load_state(fstext_file)
    with torch.device("meta"):
        fstext = FSTextDecomposer(**fstext_config(state))
    load_exactly(fstext, state, f"the text decomposer in {fstext_file}")
    return unet.eval(), fstext.eval()
