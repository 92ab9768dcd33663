"""Results of the prediction benchmark: rows, summaries, and how they are written."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stvision.eval.bootstrap import Estimate

#: column that holds the real clips themselves
REAL = "real"


@dataclass
class ClipRow:
    """What was measured on one clip of one column.

    Args:
        key: name of the clip.
        column: whose prediction it is: ``"real"`` for the truth itself.
        task: what the true clip shows.
        scene: clips of one scene look alike in the first frame.
        spoken: task of the sentence that the predictor was given.
        failure: why there is no usable prediction, else ``None``; other figures are then ``None``.
        psnr: dB, mean over the predicted frames.
        ssim: mean over the predicted frames.
        lpips: mean over the predicted frames, when asked for.
        flicker: see :func:`stvision.eval.metrics.flicker`.
        named: class that the classifier sees in the clip.
        named_in_scene: the likeliest of the tasks of the clip's scene.
    """

    key: str
    column: str
    task: str
    scene: str
    spoken: str
    failure: str | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    flicker: float | None = None
    named: str | None = None
    named_in_scene: str | None = None


@dataclass
class ColumnSummary:
    """One column of the table. Accuracies count a failed prediction as wrong.

    Args:
        clips: predictions given, failed ones included.
        failed: predictions that could not be scored.
        psnr: dB, over the predicted frames.
        ssim: over the predicted frames.
        lpips: over the predicted frames.
        flicker: over the whole clip.
        distances: full name of a Fréchet distance -> value.
        accuracy: the classifier names the true task.
        accuracy_of_real: ``accuracy`` over that on the same real clips.
        accuracy_shared: ``accuracy`` on the clips whose scene holds several tasks.
        accuracy_in_scene: same clips, the classifier choosing among the scene's tasks only.
        obeys: the classifier names the task of the sentence given, all clips.
        obeys_shared: the same on clips whose scene holds several tasks.
        psnr_gain: dB above the column that repeats the last frame, clip by clip.
    """

    clips: int
    failed: int
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    lpips: Estimate | None = None
    flicker: Estimate | None = None
    distances: dict[str, float | None] = field(default_factory=dict)
    accuracy: Estimate | None = None
    accuracy_of_real: Estimate | None = None
    accuracy_shared: Estimate | None = None
    accuracy_in_scene: Estimate | None = None
    obeys: Estimate | None = None
    obeys_shared: Estimate | None = None
    psnr_gain: Estimate | None = None


#: rows of the table: attribute, label, printed digits
_ROWS = (
    ("psnr", "PSNR, dB", 2),
    ("psnr_gain", "PSNR above copying, dB", 2),
    ("ssim", "SSIM", 3),
    ("lpips", "LPIPS, shift-tolerant AlexNet (lower is better)", 4),
    ("flicker", "flicker (lower is better)", 4),
    ("accuracy", "instruction accuracy", 3),
    ("accuracy_of_real", "... over that on real clips", 3),
    ("accuracy_shared", "instruction accuracy, shared scenes", 3),
    ("accuracy_in_scene", "... choosing among the scene's tasks", 3),
    ("obeys", "shows the sentence it was given", 3),
    ("obeys_shared", "... in shared scenes", 3),
)


@dataclass
class PredictionReport:
    """Everything the benchmark found.

    Args:
        protocol: what was counted and how: numbers and names that a reader needs to repeat it.
        columns: name of a column -> its summary; ``"real"`` comes first.
        rows: one entry a clip and column.
        comparisons: the first predictor against each other column, clip by clip: differences of
            similarity and ratios of accuracy, ``None`` where the accuracy below is zero.
    """

    protocol: dict[str, Any]
    columns: dict[str, ColumnSummary]
    rows: list[ClipRow]
    comparisons: dict[str, Estimate | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: no number that JSON cannot hold."""
        return _plain(asdict(self))

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict`, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_markdown(self) -> str:
        """The table with its protocol, in Markdown."""
        names = list(self.columns)
        lines = [
            "| | " + " | ".join(names) + " |",
            "| --- |" + " ---: |" * len(names),
            "| clips (failed) | "
            + " | ".join(f"{c.clips} ({c.failed})" for c in self.columns.values())
            + " |",
        ]
        for attribute, label, digits in _ROWS:
            cells = [_cell(getattr(c, attribute), digits) for c in self.columns.values()]
            if any(cells):
                lines.append(f"| {label} | " + " | ".join(cell or "–" for cell in cells) + " |")
        labels = {name: None for column in self.columns.values() for name in column.distances}
        for label in labels:
            values = [c.distances.get(label) for c in self.columns.values()]
            cells = ["–" if v is None else f"{v:.4g}" for v in values]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if self.comparisons:
            lines += ["", "| comparison | value |", "| --- | ---: |"]
            lines += [
                f"| {name} | {_cell(value, 3) or 'not defined'} |"
                for name, value in self.comparisons.items()
            ]
        lines += ["", *(f"- {name}: {value}" for name, value in self.protocol.items())]
        return "\n".join(lines) + "\n"

    def worst(self, column: str, *, measure: str = "lpips", count: int = 10) -> list[ClipRow]:
        """Rows of ``column`` with the worst ``measure``, worst first; failed ones have none.

        Raises:
            ValueError: ``measure`` or ``column`` is not there.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if column not in self.columns:
            raise ValueError(f"no column {column!r}; there are {', '.join(self.columns)}")
        rows = [r for r in self.rows if r.column == column and getattr(r, measure) is not None]
        rows.sort(key=lambda row: MEASURES[measure] * getattr(row, measure), reverse=True)
        return rows[:count]


#: measures by which clips can be ranked -> sign that makes the worst clip the largest
MEASURES = {"lpips": 1, "flicker": 1, "psnr": -1, "ssim": -1}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name and move it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def write_figure(path: str | os.PathLike[str], figure: Any, dpi: int = 120) -> None:
    """Write a picture of matplotlib under a temporary name and move it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # the name's end says which format
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        figure.savefig(temporary, dpi=dpi)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return ""
    value, low, high = (f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
