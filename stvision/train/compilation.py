"""torch.compile in training: what is compiled, and where the result is kept."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stvision.train.options import LoopConfig


def keep_compiled(folder: str | Path) -> Path:
    """Let compiled code outlive the process, so that a resumed training starts warm.

    ``TORCHINDUCTOR_CACHE_DIR`` is respected when it is set; call before anything is compiled.

    Args:
        folder: where code is kept otherwise.

    Returns:
        The folder in use.
    """
    chosen = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder).absolute()))
    return Path(chosen)


def compile_networks(networks: Sequence[nn.Module], config: LoopConfig) -> None:
    """Apply :attr:`LoopConfig.compile` in place.

    "regional" compiles the classes that a diffusers model names as repeated; a network that names
    none is compiled whole.
    """
    if config.compile == "off":
        return
    mode = None if config.compile_mode == "default" else config.compile_mode
    for network in networks:
        regional: Any = getattr(network, "compile_repeated_blocks", None)
        if config.compile == "regional" and getattr(network, "_repeated_blocks", None):
            regional(mode=mode)
        else:
            network.compile(mode=mode)
