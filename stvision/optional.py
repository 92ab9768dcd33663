"""Optional dependencies: imported where they are used, named in the error when they are missing."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str, distribution: str | None = None) -> ModuleType:
    """Import ``module``, or say which command installs it.

    Args:
        module: dotted name to import, such as ``"metaworld"``.
        extra: the extra of this project that carries it, such as ``"sim"``.
        distribution: name under which it is installed when it differs from ``module``.

    Raises:
        ImportError: ``module`` is missing or fails to load; the sentence holds the installing
            command and, for a failure other than absence, its cause.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        state = "is not installed" if missing else f"does not load ({error})"
        raise ImportError(
            f"{distribution or module} {state}; install it with: pip install 'stvision[{extra}]'"
        ) from error
