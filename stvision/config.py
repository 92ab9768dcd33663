"""One typed configuration: a YAML file, then options of the command line, then a frozen dataclass.

Each task keeps its dataclass beside its code; this module knows none of them.
"""

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: folder of the configurations that come with the package
CONFIGS = Path(__file__).resolve().parent / "configs"


def find_config(path: str | Path) -> Path:
    """A configuration file by path, or one of the package's own by name.

    Args:
        path: a file, or a bare name such as ``"seer_default"``.

    Raises:
        FileNotFoundError: neither; the sentence lists the names that exist.
    """
    given = Path(path)
    if given.is_file():
        return given
    packaged = CONFIGS / f"{given.name.removesuffix('.yaml')}.yaml"
    if given.parent in (Path("."), Path("configs")) and packaged.is_file():
        return packaged
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    near = get_close_matches(given.stem, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"packaged ones: {', '.join(names)}"
    raise FileNotFoundError(f"no configuration file {str(path)!r}; {hint}")


def load_config(
    cls: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    prog: str = "",
    *,
    settings: Sequence[str] = (),
    part: bool = False,
) -> T:
    """Read a configuration and apply options of the command line to it.

    Args:
        cls: a dataclass, whose fields may be dataclasses in turn.
        path: YAML file or packaged name (see :func:`find_config`); every field's default when None.
        overrides: words such as ``["--train.max-steps", "10"]``; ``--help`` prints every option
            with its present value and leaves.
        prog: name shown by ``--help``.
        settings: changes to the file such as ``"inflation.attention=full"``, whose values are YAML;
            for what ``overrides`` cannot say, such as the keys of free-form mappings.
        part: leave out the file's top-level keys that ``cls`` has no field for, so that the file of
            a larger configuration can be read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key (the nearest name is offered) or a value of the wrong
            type; the sentence names file, key and value.
    """
    mapping: dict[str, Any] = {}
    origin = "the defaults"
    if path is not None:
        file = find_config(path)
        mapping, origin = _read_yaml(file), str(file)
    if part:
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        mapping = {key: mapping[key] for key in mapping if key in known}
    for setting in settings:
        mapping = _merged(mapping, _parse_setting(setting))
        origin = f"{origin} with --set {setting}"
    loaded = from_mapping(cls, mapping, origin)
    if not overrides:
        return loaded
    import tyro

    return tyro.cli(cls, default=loaded, args=list(overrides), prog=prog or None)


def from_mapping(cls: type[T], mapping: Mapping[str, Any], origin: str = "the mapping") -> T:
    """Build the dataclass ``cls`` from plain data; errors as in :func:`load_config`.

    Args:
        cls: a dataclass.
        mapping: field name -> value, nested as the dataclass is.
        origin: where the data came from, for error sentences.
    """
    from pydantic import TypeAdapter, ValidationError

    _check_keys(cls, mapping, origin, ())
    try:
        return TypeAdapter(cls).validate_python(mapping)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "missing":
            raise ValueError(f"{origin}: {key} is required") from None
        reason = first["msg"].removeprefix("Value error, ")
        value = "" if dataclasses.is_dataclass(first["input"]) else f", got {first['input']!r}"
        raise ValueError(f"{origin}: {key}: {reason}{value}") from None


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain data (dicts, lists, strings, numbers) of a dataclass; inverse of :func:`from_mapping`."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def dump_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML, atomically; :func:`load_config` reads it back to an equal one."""
    import yaml

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True))
    os.replace(temporary, target)


def update_config(path: str | Path, changes: Mapping[str, Any]) -> None:
    """Change single keys of a YAML configuration, atomically.

    Args:
        path: the file.
        changes: nested as the file is; what it does not name stays.
    """
    import yaml

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    data = _merged(_read_yaml(target), changes)
    temporary.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    os.replace(temporary, target)


def parse_config(
    cls: type[T], argv: Sequence[str] | None = None, prog: str = "", *, part: bool = False
) -> T:
    """Configuration of a ``python -m`` entry: ``[--config FILE] [--set KEY=VALUE ...] [OPTIONS]``.

    Args:
        cls: the task's dataclass.
        argv: words of the command line; the process's own when None.
        prog: name shown by ``--help``.
        part: as in :func:`load_config`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    path: str | None = None
    settings: list[str] = []
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        option, equals, value = word.partition("=")
        if option not in {"--config", "--set"}:
            rest.append(word)
            continue
        if not equals:
            value = next(queue, "")
        if option == "--set":
            settings.append(value)
        elif value:
            path = value
        else:
            raise ValueError("--config needs a file or the name of a packaged configuration")
    return load_config(cls, path, rest, prog, settings=settings, part=part)


def _merged(old: Any, new: Any) -> Any:
    """``old`` with the keys of ``new``, nested; what ``new`` does not name stays."""
    if not isinstance(new, Mapping):
        return new
    kept = dict(old) if isinstance(old, Mapping) else {}
    return kept | {key: _merged(kept.get(key), value) for key, value in new.items()}


def _parse_setting(text: str) -> dict[str, Any]:
    """``"a.b=1"`` as ``{"a": {"b": 1}}``."""
    import yaml

    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set takes KEY=VALUE, such as inflation.attention=full, got {text!r}")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not YAML") from error
    for name in reversed(names):
        found = {name: found}
    return dict(found)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = str(error).replace("\n", " ")
        raise ValueError(f"{path} is not a YAML file: {detail}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, got {data!r}")  # noqa: TRY004
    return data


@cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _nested_dataclass(annotation: Any) -> type | None:
    """The dataclass that ``X``, ``X | None`` names; None for anything else."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_nested_dataclass(item) for item in typing.get_args(annotation)]
        kept = [item for item in found if item is not None]
        return kept[0] if len(kept) == 1 else None
    return None


def _check_keys(cls: type, mapping: Any, origin: str, where: tuple[str, ...]) -> None:
    if not isinstance(mapping, Mapping):
        key = ".".join(where) or "the file"
        raise ValueError(f"{origin}: {key} must be a mapping, got {mapping!r}")  # noqa: TRY004
    known = _field_types(cls)
    for key, value in mapping.items():
        name = ".".join((*where, str(key)))
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{origin}: unknown key {name!r}; {hint}")
        inner = _nested_dataclass(known[key])
        if inner is not None and value is not None:
            _check_keys(inner, value, origin, (*where, str(key)))
