"""Marks that depend on the machine: GPU tests skip without CUDA, slow ones unless asked for."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from stvision.optional import mend_torchvision

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _older(distribution: str, than: tuple[int, int]) -> bool:
    try:
        major, minor = version(distribution).split(".")[:2]
    except PackageNotFoundError:
        return True
    return (int(major), int(minor)) < than


# Triton kernels run through the interpreter where there is no GPU. It has to be chosen here, since
# the parts of Triton's own language are made when anything imports it first, as torch may. The
# interpreter before 3.7 takes arrays of one element for numbers, which NumPy 2.4 refuses.
if not torch.cuda.is_available() and not (_older("triton", (3, 7)) and not _older("numpy", (2, 4))):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Some tests import diffusers or transformers before this project, and a torchvision of another build
# than torch would take those with it.
mend_torchvision()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m") or ""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="learning check of minutes; run with -m slow"))
