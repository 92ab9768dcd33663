"""Optional dependencies: imported where they are used, named in the error when they are missing."""

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

# Operators declared for torchvision live as long as the library object that declared them.
_DECLARED: list[Any] = []


def require(
    module: str, *, extra: str, distribution: str | None = None, pinned: bool = False
) -> ModuleType:
    """Import ``module``, or say which command installs it.

    Args:
        module: dotted name to import, such as ``"metaworld"``.
        extra: the extra of this project that carries it, such as ``"sim"``.
        distribution: name under which it is installed when it differs from ``module``.
        pinned: advise ``-c constraints.txt``, without which pip replaces torch by another build.

    Raises:
        ImportError: ``module`` is missing or fails to load; the sentence holds the installing
            command and, for a failure other than absence, its cause.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        state = "is not installed" if missing else f"does not load ({error})"
        pins = "-c constraints.txt " if pinned else ""
        raise ImportError(
            f"{distribution or module} {state}; install it with: "
            f"pip install {pins}'stvision[{extra}]'"
        ) from error


@cache
def mend_torchvision() -> str:
    """Make a torchvision of another build than torch importable, or hide it.

    transformers and diffusers use torchvision wherever it is installed, without asking whether it
    works; beside a torch of another build it does not even import, and takes every model and
    pipeline with it. Where its compiled operators do not load, the two that its import needs are
    declared, so that its Python parts work; where it still does not import, it is hidden. Called
    before the first import of diffusers or transformers; only the first call does anything, and
    where torchvision is absent nothing is imported.

    Returns:
        "absent", "whole", "without operators" or "hidden".
    """
    if "torchvision" in sys.modules:
        return "hidden" if sys.modules["torchvision"] is None else "whole"
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return "absent"
    state = "whole"
    if not _operators_load(Path(found.origin).parent):
        import torch

        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(fragment)
        state = "without operators"
    try:
        importlib.import_module("torchvision")
    except Exception:  # noqa: BLE001  a wrong build fails in many ways, also after loading
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # "not installed" to all
        return "hidden"
    return state


def _operators_load(folder: Path) -> bool:
    """Whether the compiled library in torchvision's folder loads beside this torch."""
    import torch

    library = next((p for kind in ("*.so", "*.pyd") for p in folder.glob(f"_C{kind}")), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
