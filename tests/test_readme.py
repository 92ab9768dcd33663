"""What the README says: its code runs, its commands parse, its links and names exist."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHELL = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
#: commands in running text and tables, without names such as `stvision.io` and `stvision` alone
INLINE = re.findall(r"`((?:stvision|pip install|make) [^`]+)`", TEXT)
COMMANDS = [shlex.split(line, comments=True) for line in [*SHELL, *INLINE]]


def names(block: str) -> str:
    return block.splitlines()[-1][:60]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 10


@pytest.mark.parametrize("block", PYTHON, ids=names)
def test_code_compiles_and_its_imports_exist(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


RUNNABLE = [block for block in PYTHON if "path/to" not in block]


@pytest.mark.parametrize("block", RUNNABLE, ids=names)
def test_short_code_runs_and_prints_what_it_says(block: str, capsys) -> None:
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102  the README is ours
    promised = re.findall(r"print\(.*\)\s+# (.+)$", block, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised


def test_some_code_runs() -> None:
    assert any("ATTENTIONS" in block for block in RUNNABLE)


def parse_stvision(words: list[str]) -> None:
    """Parse the words after ``stvision`` as the command does, without running anything."""
    import tyro

    from stvision.cli import COMMANDS as TABLE

    assert words[0] in TABLE, f"stvision has no command {words[0]!r}"
    module = importlib.import_module(TABLE[words[0]][0])
    if words[0] == "train":
        from stvision.train import TASKS

        given = module.parse(words[1:])
        parse_training(TASKS[given.task][0], list(given.options))
    elif len(words) > 1 or words[0] == "env":
        tyro.cli(module.Command, args=words[1:])


def parse_training(module_name: str, options: list[str]) -> None:
    """Read the configuration of a training with the options of its command line."""
    from stvision.config import parse_config

    module = importlib.import_module(module_name)
    [config] = [
        value
        for name, value in vars(module).items()
        if name.endswith("Config") and value.__module__ == module.__name__
    ]
    parse_config(config, options)


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_parse(words: list[str]) -> None:
    if words[0] == "stvision":
        parse_stvision(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["accelerate", "launch"]:
        at = words.index("-m")
        parse_training(words[at + 1], words[at + 2 :])
    else:
        assert words[:2] == ["pip", "install"], f"unknown command {shlex.join(words)}"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for group in re.findall(r"\[(.+?)\]", shlex.join(words)):
            assert set(group.split(",")) <= set(extras)


def test_links_and_named_files_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose)
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        assert (ROOT / link).exists(), f"README links {link}, which is not there"


def test_named_configurations_exist() -> None:
    for name in re.findall(r"`(\w+_default\w*|\w+_sd15\w*)`", TEXT):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name


def test_public_names_exist() -> None:
    import stvision

    for name in re.findall(r"`(stvision(?:\.\w+)+)`", TEXT):
        importlib.import_module(name)
    assert set(re.findall(r"from stvision import (.+)", TEXT)), "the README shows no import"
    for line in re.findall(r"from stvision import (.+)", TEXT):
        assert set(line.replace(" ", "").split(",")) <= set(stvision.__all__)


def test_it_names_the_licence_of_every_packaged_sample_source() -> None:
    sources = re.findall(
        r"^([\w-]+)==", (ROOT / "requirements-samples.txt").read_text(), re.MULTILINE
    )
    assert sources
    licences = TEXT.split("## Licences")[1]
    for source in sources:
        assert source in licences, f"the licence table does not name {source}"
