"""What the document of collections says: every reader, its file, its options, its commands."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from test_readme import parse_stvision

from stvision.train.data import READERS, DataConfig, open_reader

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip(" `") for cell in line.split("|")[1:-1]]
    for line in TEXT.splitlines()
    if "`stvision/datasets/" in line
]


def test_the_table_is_the_catalogue() -> None:
    assert {row[1] for row in ROWS} == set(READERS)
    for _, kind, file, *_ in ROWS:
        module = READERS[kind].split(":")[0]
        assert file == f"{module.replace('.', '/')}.py" and (ROOT / file).is_file()


def test_named_options_are_those_of_the_readers() -> None:
    parameters = {
        kind: set(inspect.signature(getattr(importlib.import_module(m), c)).parameters)
        for kind, (m, c) in ((kind, path.split(":")) for kind, path in READERS.items())
    }
    by_name = {
        "fold": {"ucf101", "hmdb51", "breakfast"},
        "validation": {"ucf101", "hmdb51", "coin", "breakfast"},
        "level": {"coin", "breakfast"},
        "region": {"coin"},
        "test_people": {"breakfast"},
        "classes": {"kinetics"},
    }
    for option, kinds in by_name.items():
        assert f"`{option}" in TEXT
        assert all(option in parameters[kind] for kind in kinds), option


@pytest.mark.parametrize("kind", sorted(READERS))
def test_options_of_other_readers_are_refused_before_anything_is_read(kind: str) -> None:
    config = DataConfig(kind=kind, root="absent", options={"nowhere_known": 1, "size": 3})
    with pytest.raises(ValueError, match="data.options has nowhere_known, size; of kind") as error:
        open_reader(config, "train")
    allowed = str(error.value).split("allowed are ")[1].split(", ")
    module, name = READERS[kind].split(":")
    own = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(own) - {"root", "split", "options", "num_frames", "size"} <= set(allowed)
    # the options of every reader of clips are handed on, and nothing else is allowed
    assert ("on_error" in allowed) == (kind != "packed")
    with pytest.raises(FileNotFoundError):
        open_reader(DataConfig(kind=kind, root="absent", options={"caption": "random"}), "train")


def test_commands_parse() -> None:
    lines = re.findall(r"^stvision .+$", TEXT, re.MULTILINE)
    assert lines
    for line in lines:
        parse_stvision(shlex.split(line)[1:])
