"""Options of commands as ``--help`` shows them."""

import dataclasses
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T")


def says_its_defaults(command: type[T]) -> type[T]:
    """Show no "(default: None)" for a dataclass's options that say in words what None means."""
    silent = tyro.conf.arg(help_behavior_hint="")
    for field in dataclasses.fields(command):  # type: ignore[arg-type]
        if field.default is None:
            command.__annotations__[field.name] = Annotated[field.type, silent]
    return command
