"""Options of commands as ``--help`` shows them."""

import dataclasses
from collections.abc import Callable
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


def shows_last(*names: str) -> Callable[[type[T]], type[T]]:
    """Show the options ``names`` of a dataclass at the end of ``--help``, in this order.

    Options of a base class stand before a command's own; those that matter least belong at the end.
    Such a dataclass takes its options by name (``kw_only``), so only the help tells their order.
    """

    def order(command: type[T]) -> type[T]:
        fields = command.__dataclass_fields__  # type: ignore[attr-defined]
        for name in names:
            fields[name] = fields.pop(name)
        return command

    return order
