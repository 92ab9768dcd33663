"""Imports go down through the doors of the house and never up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: rooms from the top floor to the ground; rooms of one floor do not know each other
FLOORS: tuple[tuple[str, ...], ...] = (
    ("demos", "benchmarks"),
    ("stvision.cli",),
    ("stvision.pipelines",),
    ("stvision.train", "stvision.guidance", "stvision.eval"),
    ("stvision.datasets", "stvision.models"),
    ("stvision.attention",),
    ("stvision.layers", "stvision.kernels"),
    ("stvision.io",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room a dotted module lies in; ``None`` for root modules and foreign packages."""
    parts = module.split(".")
    if parts[0] in {"demos", "benchmarks"}:
        return parts[0]
    room = ".".join(parts[:2])
    return room if room in FLOOR else None


def sources() -> Iterator[tuple[str, Path]]:
    for folder in ("demos", "benchmarks", "pipelines", "datasets", "kernels", "configs"):
        prefix = "" if folder in {"demos", "benchmarks"} else "stvision."
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in sorted((ROOT / "stvision").rglob("*.py")):
        relative = path.relative_to(ROOT)
        if not (ROOT / "stvision" / relative.parts[1]).is_symlink():
            yield ".".join(relative.with_suffix("").parts), path


def imported(module: str, path: Path) -> Iterator[tuple[int, str]]:
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, origin
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def may_import(importer: str, imported_module: str) -> bool:
    origin, target = room_of(importer), room_of(imported_module)
    if target is None:
        return True
    if origin is None:
        # root modules serve every room, so they know none; the package's exports are strings
        return False
    if origin == target:
        if origin != "stvision.kernels":
            return True
        mine, other = importer.split(".")[2:3], imported_module.split(".")[2:3]
        return mine == other or other == ["common"] or not other
    return FLOOR[origin] < FLOOR[target]


def test_imports_only_go_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} may not import {target}"
        for module, path in sources()
        if module != "stvision.__main__"
        for line, target in imported(module, path)
        if not may_import(module, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_seen() -> None:
    seen = {room_of(module) for module, _ in sources()}
    assert {"stvision.io", "stvision.models", "stvision.pipelines", "stvision.kernels"} <= seen


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("stvision.pipelines.seer", "stvision.models.seer", True),
        ("stvision.models.seer", "stvision.pipelines.seer", False),
        ("stvision.datasets.clips", "stvision.models.seer", False),
        ("stvision.train.seer", "stvision.eval.psnr", False),
        ("stvision.kernels.a.api", "stvision.kernels.b.api", False),
        ("stvision.kernels.a.api", "stvision.kernels.common.tiles", True),
        ("stvision.optional", "stvision.io", False),
        ("stvision.io.clip", "stvision.optional", True),
        ("demos.app", "stvision.pipelines.seer", True),
    ],
)
def test_the_rule_itself(importer: str, target: str, allowed: bool) -> None:
    assert may_import(importer, target) is allowed
