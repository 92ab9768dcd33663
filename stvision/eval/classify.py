"""Scores of a video classifier: top-1, top-5, mean over classes, with intervals, and confusions."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.eval.bootstrap import Estimate, bootstrap_mean, bootstrap_ratio
from stvision.models.classifier import top_hits
from stvision.optional import require

#: up to so many classes the picture of confusions names them
NAMED_CLASSES = 60


@dataclass
class ClassificationReport:
    """How well a classifier names the clips of a split.

    Args:
        class_names: in the order of rows and columns of ``confusion``.
        top1: share of clips whose class is the likeliest.
        top5: share of clips whose class is among the five likeliest (all, where there are fewer).
        class_accuracy: mean over the classes that occur of the share of their clips named right.
        confusion: (classes, classes) clips of the class of the row named as that of the column.
        protocol: how it was measured.
        rows: of each clip its ``key``, ``label``, what it was ``named`` and how likely that is.
    """

    class_names: list[str]
    top1: Estimate
    top5: Estimate
    class_accuracy: Estimate
    confusion: list[list[int]]
    protocol: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def per_class(self) -> dict[str, tuple[int, int]]:
        """Class -> (clips named right, clips), of the classes that occur."""
        found = {}
        for number, (name, row) in enumerate(zip(self.class_names, self.confusion, strict=True)):
            if sum(row):
                found[name] = (row[number], sum(row))
        return found

    def confused(self, count: int = 5) -> list[tuple[str, str, int]]:
        """The most frequent errors: true class, named class, clips."""
        pairs = [
            (self.class_names[i], self.class_names[j], clips)
            for i, row in enumerate(self.confusion)
            for j, clips in enumerate(row)
            if i != j and clips
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: all fields and what is right of each class."""
        return {
            **asdict(self),
            "per_class": {
                name: {"right": right, "clips": clips}
                for name, (right, clips) in self.per_class.items()
            },
        }

    def to_markdown(self) -> str:
        """A table of the scores in percent, the worst classes and the most frequent errors."""
        views = self.protocol.get("views", 1)
        lines = [
            f"{self.top1.count} clips of {len(self.per_class)} classes, {views} view(s) each",
            "",
            "| score | percent | 95 % interval |",
            "| --- | --- | --- |",
        ]
        for title, value in (
            ("top-1", self.top1),
            ("top-5", self.top5),
            ("mean over classes", self.class_accuracy),
        ):
            interval = f"{100 * value.low:.1f} to {100 * value.high:.1f}"
            lines.append(f"| {title} | {100 * value.value:.1f} | {interval} |")
        wrong = [(name, r, n) for name, (r, n) in self.per_class.items() if r < n]
        if wrong:
            worst = sorted(wrong, key=lambda row: row[1] / row[2])[:5]
            lines += ["", "worst: " + ", ".join(f"{name} {r}/{n}" for name, r, n in worst)]
            errors = (f"{a} as {b} ({n})" for a, b, n in self.confused())
            lines += ["most frequent errors: " + ", ".join(errors)]
        return "\n".join(lines) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the confusions, each row as shares of its clips.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figures = require("matplotlib.figure", extra="plot", distribution="matplotlib")
        counts = np.asarray(self.confusion, dtype=np.float64)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        count = len(self.class_names)
        side = 4 + 0.18 * min(count, NAMED_CLASSES)
        figure = figures.Figure(figsize=(side, side), layout="constrained")
        panel = figure.subplots()
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        panel.set_xlabel("named")
        panel.set_ylabel("true class")
        if count <= NAMED_CLASSES:
            panel.set_xticks(range(count), self.class_names, rotation=90, fontsize=7)
            panel.set_yticks(range(count), self.class_names, fontsize=7)
        figure.colorbar(image, shrink=0.7, label="share of the class's clips")
        from stvision.eval.report import write_figure

        write_figure(path, figure)

    def write_json(self, path: Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        from stvision.eval.report import write_text

        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def score_classification(
    probabilities: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    keys: Sequence[str] = (),
    samples: int = 2000,
    seed: int = 0,
) -> ClassificationReport:
    """Score predictions of clips.

    Intervals resample clips. That of the mean over classes weighs each clip by what its class counts
    (the classes' sizes are taken as given).

    Args:
        probabilities: (N, classes).
        labels: (N,) int64, the true classes.
        class_names: of the classes.
        keys: names of the clips, for the rows; none when empty.
        samples: resamplings.
        seed: of the resampling.

    Raises:
        ValueError: shapes that do not fit, or no clip.
    """
    count = len(class_names)
    if not len(labels) or probabilities.shape != (len(labels), count):
        raise ValueError(
            f"probabilities must be (N, {count}) and labels (N,) with N at least 1, got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    if keys and len(keys) != len(labels):
        raise ValueError(f"keys must be as many as labels, got {len(keys)} and {len(labels)}")
    hits = top_hits(probabilities, labels).double()
    best = top_hits(probabilities, labels, 5).double()
    weight = 1 / torch.bincount(labels, minlength=count)[labels].double()
    named = probabilities.argmax(1)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    confusion.index_put_((labels, named), torch.ones_like(labels), accumulate=True)
    how = {"samples": samples, "seed": seed}
    top1, top5 = bootstrap_mean(hits.tolist(), **how), bootstrap_mean(best.tolist(), **how)  # type: ignore[arg-type]
    over = bootstrap_ratio((hits * weight).tolist(), weight.tolist(), **how)  # type: ignore[arg-type]
    assert top1 is not None and top5 is not None and over is not None  # there are clips
    likely = probabilities.max(1).values
    rows = [
        {
            "key": key,
            "label": class_names[int(label)],
            "named": class_names[int(found)],
            "probability": float(value),
        }
        for key, label, found, value in zip(keys, labels, named, likely, strict=bool(keys))
    ]
    return ClassificationReport(list(class_names), top1, top5, over, confusion.tolist(), rows=rows)
