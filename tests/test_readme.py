"""What README.md shows exists: files, commands, options, imports, and snippets that run."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from stvision.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every ``stvision ...`` of the page, as words."""
    joined = TEXT.replace("\\\n", " ")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", joined, flags=re.DOTALL))
    found = re.findall(r"^stvision .*$", blocks, flags=re.MULTILINE)
    found += re.findall(r"`(stvision [^`]+)`", joined)
    return [shlex.split(line) for line in found]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 3 and len(commands()) >= 6


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:\s=]+)\)", TEXT))))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_import_what_exists(number: int) -> None:
    for node in ast.walk(ast.parse(PYTHON[number])):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize(
    "number", [n for n, block in enumerate(PYTHON) if "from_pretrained" not in block]
)
def test_python_blocks_that_need_no_weights_run(number: int) -> None:
    code = compile(PYTHON[number], f"README block {number}", "exec")
    exec(code, {})  # noqa: S102  it is this repository's own page


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist_with_their_options(words: list[str], capsys) -> None:
    from stvision.cli.main import main

    assert words[1] in COMMANDS
    plain = [word for word in words[1:3] if not word.startswith("-")]
    main([*plain, "--help"] if words[1] in {"train", "data", "eval"} else [words[1], "--help"])
    shown = capsys.readouterr().out
    options = [w for w in words if w.startswith("--") and words[1] != "train"]
    assert all(option in shown for option in options), options


@pytest.mark.parametrize("name", sorted(set(re.findall(r"--config (\w+)", TEXT))))
def test_configurations_exist(name: str) -> None:
    assert (ROOT / "configs" / f"{name}.yaml").is_file()
