"""stvision: video and multimodal spatiotemporal modelling in PyTorch.

Public names are imported on first use, so that ``import stvision`` stays quick and touches no device.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "Clip": "stvision.io",
    "as_clip": "stvision.io",
    "open_video": "stvision.io",
    "read_clip": "stvision.io",
    "save_clip": "stvision.io",
    "FSTextDecomposer": "stvision.models.fstext",
    "SeerUNetModel": "stvision.models.seer",
    "SeerPipeline": "stvision.pipelines.seer",
    "SeerDDIMScheduler": "stvision.models.sampling",
    "create_backbone": "stvision.models.backbones",
    "na1d": "stvision.kernels.neighborhood",
    "na2d": "stvision.kernels.neighborhood",
    "na3d": "stvision.kernels.neighborhood",
    "NeighborhoodAttention1D": "stvision.attention",
    "NeighborhoodAttention2D": "stvision.attention",
    "NeighborhoodAttention3D": "stvision.attention",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604


#: bases that diffusers looks up in the library which a pipeline's component names; not exports
_DIFFUSERS_BASES = ("ModelMixin", "SchedulerMixin")


def __getattr__(name: str) -> Any:
    if name in _DIFFUSERS_BASES:
        importlib.import_module("stvision.models")  # sees to it that diffusers can be imported
        return getattr(importlib.import_module("diffusers"), name)
    if name not in _EXPORTS:
        raise AttributeError(f"module 'stvision' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
