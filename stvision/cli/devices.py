"""The device that a command computes on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_device(name: str | None) -> "torch.device":
    """The device called ``name``, or a GPU where there is one and the CPU elsewhere when None.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 ..., got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        found = f"{count} of them" if count else "none"
        raise ValueError(
            f"--device {name} asks for a GPU, and torch {torch.__version__} finds {found} here"
        )
    return device
