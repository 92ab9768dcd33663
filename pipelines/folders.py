"""Where a pipeline's folder is, and how its dtype is asked for."""

import os
from pathlib import Path
from typing import Any

import stvision

#: Weights that ship with the project: name -> folder under ``stvision/weights``.
PACKAGED_WEIGHTS = {"default": "seer-default"}


def resolve_folder(name: str | os.PathLike[str], **hub: Any) -> Path:
    """Folder of a pipeline: a packaged name, a local folder, or a repository of the model hub.

    A hub repository is asked for only when nothing local has that name, through the hub's own
    cache; ``HF_HUB_OFFLINE=1`` and ``local_files_only=True`` keep it off the network.

    Args:
        name: ``"default"``, a path, or ``"owner/name"``.
        hub: ``revision``, ``cache_dir``, ``token``, ``force_download``, ``local_files_only``.

    Raises:
        FileNotFoundError: the packaged weights are absent, or a path leads nowhere.
    """
    if os.path.isdir(name):
        return Path(name)
    text = os.fspath(name)
    if text in PACKAGED_WEIGHTS:
        folder = Path(stvision.__file__).parent / "weights" / PACKAGED_WEIGHTS[text]
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"the weights {text!r} are not part of this installation (looked in {folder})"
            )
        return folder
    is_repository = text.count("/") == 1 and not text.startswith((".", "~", "/"))
    if isinstance(name, os.PathLike) or not is_repository:
        raise FileNotFoundError(
            f"no pipeline folder at {text!r}; give a folder, a hub name 'owner/name' or one of "
            f"{sorted(PACKAGED_WEIGHTS)}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, **hub))
    except OSError as error:  # not there, not allowed, no network, or kept off it
        cause = " ".join(str(error).split())
        raise FileNotFoundError(
            f"no pipeline {text!r}: there is no such folder, and the model hub did not give it "
            f"({cause})"
        ) from error


def dtype_argument(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the dtype under the name that the installed diffusers knows.

    diffusers renamed ``torch_dtype`` to ``dtype``; older releases ignore the new name and newer
    ones warn about the old one. Either is accepted here.

    Raises:
        ValueError: both are given.
    """
    from diffusers.pipelines import pipeline_utils

    given = {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
    if len(given) > 1:
        raise ValueError("dtype and torch_dtype are two names of one argument; give only dtype")
    options = {name: value for name, value in kwargs.items() if name not in given}
    spelled = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    for value in given.values():
        options[spelled] = value
    return options
