"""Results of the comparison: kept, continued, written; and the measuring of one step."""

from pathlib import Path

import pytest
import torch

from stvision.eval import mechanisms
from stvision.eval.mechanisms import (
    LABEL_HEIGHT,
    MechanismTable,
    label_offsets,
    measure,
    parse_size,
)
from stvision.models.mechanism_classifier import MechanismClassifier, count_parameters

SETTINGS = {"steps": 5, "batch_size": 2, "time_batch": 3, "cue_frames": 64}


def run(accuracy: float, task: float | None = None) -> dict:
    return {"accuracy": accuracy, "task_accuracy": task, "parameters": 222_000}


def filled(path: Path | None = None) -> MechanismTable:
    table = MechanismTable.open(path, SETTINGS)
    table.runs = {
        "s4/metaworld/0": run(0.5, 0.75),
        "s4/metaworld/1": run(0.75, 0.8),
        "full/metaworld/0": run(0.9, 0.95),
        "full/early-cue/0": run(1.0),
        "s4/early-cue/0": {"error": "no such kernel"},
        "full/metaworld-first-frame/0": run(0.41),
    }
    table.times = {
        "full/16x28x28": {"failed": "out of memory"},
        "full/8x14x14": {"ms": 3.14, "peak_mib": 512.0, "parameters": 223_000},
        "s4/16x28x28": {"ms": 20.0, "graph_ms": 7.126, "peak_mib": 2048.0, "parameters": 224_000},
    }
    table.facts["metaworld"] = {"tasks": 25, "scenes": 11, "train_clips": 9, "test_clips": 400}
    return table


def test_table_says_what_was_found() -> None:
    lines = filled().to_markdown().splitlines()
    assert lines[0] == (
        "| mechanism | a token sees | Meta-World, task and direction, % | task alone, % "
        "| early cue, % | 8 x 14 x 14: ms / as a graph, GiB | 16 x 28 x 28: ms / as a graph, GiB |"
    )
    assert lines[2] == "| `full` | all tokens | 90.0 | 95.0 | 100.0 | 3.1, 0.50 | out of memory |"
    assert lines[3] == (
        "| `s4` | all earlier tokens | 62.5 (50.0 to 75.0) | 77.5 (75.0 to 80.0) | failed "
        "|  | 20.0 / 7.13, 2.00 |"
    )
    notes = "\n".join(lines[4:])
    assert "25 tasks in 11 shared scenes, 400 held-out clips" in notes
    assert "gives 44 % of tasks" in notes and "first frame alone gave 41.0 %" in notes
    assert "`s4/early-cue/0`: no such kernel" in notes
    assert "223 to 224 thousand parameters" in notes


def test_results_are_kept_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    table = filled(path)
    table.save()
    again = MechanismTable.open(path, SETTINGS)
    assert again == table and MechanismTable.open(path) == table
    assert again.has_run("s4/metaworld/1")
    assert not again.has_run("s4/early-cue/0")  # failed, so it is tried again
    assert not again.has_run("s4/metaworld/2")
    assert again.has_time("full", (16, 28, 28)) and again.has_time("s4", (16, 28, 28))
    assert not again.has_time("s4", (8, 14, 14))
    with pytest.raises(ValueError, match="holds results with steps=5, not 6; give another --json"):
        MechanismTable.open(path, SETTINGS | {"steps": 6})


def test_what_is_no_results_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(FileNotFoundError, match="no results at"):
        MechanismTable.open(path)
    for text in ("{", "[]", '{"runs": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no results of this benchmark"):
            MechanismTable.open(path, SETTINGS)


def test_a_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="lacks the lines <!-- mechanisms -->"):
        filled().write_docs(page)
    assert page.read_text() == "nothing here\n"


def test_writing_a_document_twice_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mechanisms -->\n<!-- end mechanisms -->\nb\n")
    filled().write_docs(page)
    first = page.read_text()
    filled().write_docs(page)
    assert page.read_text() == first and "| `full` |" in first


@pytest.mark.parametrize("seed", range(5))
def test_no_name_in_the_plot_covers_another(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    points = (torch.rand(25, 2, generator=g) * torch.tensor([120.0, 60.0])).tolist()
    widths = (torch.rand(25, generator=g) * 60 + 10).tolist()
    offsets = label_offsets(points, widths, top=70.0)
    boxes = [
        (x + right, x + right + w, y + up)
        for (x, y), w, (right, up) in zip(points, widths, offsets, strict=True)
    ]
    for i, (a, b, y) in enumerate(boxes):
        assert y + LABEL_HEIGHT / 2 <= 70
        for c, d, z in boxes[:i]:
            assert b < c or d < a or abs(y - z) >= LABEL_HEIGHT


def test_plot_names_the_size_that_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="size must be one of 8x14x14, 16x28x28, got '1x1x1'"):
        filled().plot(tmp_path / "plot.png", size="1x1x1")
    with pytest.raises(ValueError, match="one of none yet"):
        MechanismTable.open(None, SETTINGS).plot(tmp_path / "plot.png")


def test_a_step_is_measured() -> None:
    options = {"dim": 32, "depth": 1, "heads": 1}
    found = measure("conv", (2, 2, 3), device="cpu", batch=1, repeats=2, warmup=0, **options)
    assert found["ms"] > 0 and found["peak_mib"] is None and found["graph_ms"] is None
    assert found["parameters"] == count_parameters(MechanismClassifier("conv", 16, **options))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), "out of memory"),
        (RuntimeError("no kernel\nfor this"), "no kernel"),
    ],
)
def test_what_does_not_run_is_said(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(mechanisms.MechanismClassifier, "forward", refuse)
    options = {"dim": 32, "depth": 1, "heads": 1}
    assert measure("none", (1, 1, 1), device="cpu", batch=1, **options) == {"failed": said}


def test_sizes_are_read() -> None:
    assert parse_size("8x14x15") == (8, 14, 15)
    for text in ("8x14", "8x0x4", "axbxc", "-1x2x2", ""):
        with pytest.raises(ValueError, match="sizes must look like 8x14x14"):
            parse_size(text)
