"""The repository's shape: the linked folders, and that they hide nobody else's package."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("configs", "datasets", "kernels", "pipelines")


@pytest.mark.parametrize("name", LINKED)
def test_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "stvision" / name
    assert link.is_symlink(), "a checkout without symbolic links cannot be used"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["datasets", "kernels"])
def test_folder_never_hides_the_package_of_the_same_name(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert not found.startswith(str(ROOT / name))


def test_test_folders_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_module_is_found_under_the_package_name() -> None:
    for name in LINKED:
        for path in sorted((ROOT / name).rglob("*.py")):
            dotted = ".".join(("stvision", *path.relative_to(ROOT).with_suffix("").parts))
            assert importlib.util.find_spec(dotted.removesuffix(".__init__")) is not None, dotted


def test_import_of_the_package_is_light() -> None:
    """``import stvision`` and the command's help load neither torch nor the model libraries."""
    code = (
        "import sys, stvision, stvision.cli.main as m; m.main(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'gradio'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
