"""A torchvision of another build than torch neither stops this project nor costs it anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from stvision.optional import require

#: what torchvision does when it is imported, as far as its operators matter
DECLARES = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return scores

# names that image processors take from the part written in Python
import sys
from unittest.mock import MagicMock

for part in ("io", "transforms", "transforms.v2", "transforms.functional", "transforms.v2.functional"):
    sys.modules[f"torchvision.{part}"] = MagicMock(name=part)
"""
#: as when torch and torchvision were built for different CUDA versions
REFUSES = "raise RuntimeError('compiled with different CUDA major versions')"


def fake(folder: Path, code: str) -> Path:
    """A package called torchvision whose compiled part does not load."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"no library of this machine")
    (package / "__init__.py").write_text(f"__version__ = '0.0.0'\n{code}")
    about = folder / "torchvision-0.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.0\n")
    return folder


def python(code: str, path: Path) -> subprocess.CompletedProcess:
    command = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", command], check=False, capture_output=True, text=True
    )


def test_the_fake_fails_as_the_real_one_does(tmp_path: Path) -> None:
    done = python("import torchvision", fake(tmp_path, DECLARES))
    assert done.returncode and "torchvision::nms does not exist" in done.stderr


@pytest.mark.parametrize("module", ["pipelines.seer", "models.seer", "train.encoders", "guidance"])
def test_every_room_imports_beside_a_mismatched_torchvision(tmp_path: Path, module: str) -> None:
    done = python(f"import stvision.{module}", fake(tmp_path, DECLARES))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("code", "state"), [(DECLARES, "without operators"), (REFUSES, "hidden")])
def test_models_of_both_libraries_load(tmp_path: Path, code: str, state: str) -> None:
    wanted = (
        "from stvision.optional import mend_torchvision;"
        f"assert mend_torchvision() == {state!r}, mend_torchvision();"
        "from transformers import CLIPTextModel;"
        "from diffusers import UNet2DConditionModel;"
        "import importlib.util as u;"
        f"assert (u.find_spec('torchvision') is None) == ({state!r} == 'hidden')"
    )
    done = python(wanted, fake(tmp_path, code))
    assert done.returncode == 0, done.stderr[-2000:]


def test_where_there_is_none_nothing_is_imported() -> None:
    code = (
        "import importlib.util;"
        "from stvision.optional import mend_torchvision;"
        "importlib.util.find_spec = lambda name: None;"
        "assert mend_torchvision() == 'absent'; assert 'torch' not in sys.modules"
    )
    done = python(code, Path("."))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_library_names_its_command() -> None:
    with pytest.raises(ImportError, match=r"install it with: pip install 'stvision\[vision\]'"):
        require("no_such_library", extra="vision")
    with pytest.raises(ImportError, match=r"pip install -c constraints.txt 'stvision\[vision\]'"):
        require("no_such_library", extra="vision", pinned=True)
