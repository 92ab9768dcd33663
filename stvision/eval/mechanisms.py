"""What mechanisms cost and what they reach: measured steps, the results of a comparison, table, plot.

:func:`measure` times the classifier of :mod:`stvision.models.mechanism_classifier` around a mechanism;
:class:`MechanismTable` keeps those times beside the accuracies of trainings in one JSON file, from which
a stopped comparison goes on, and writes them as Markdown and as a picture.
"""

import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from stvision.eval.report import write_figure, write_text
from stvision.models.mechanism_classifier import (
    MECHANISMS,
    STRIDE,
    MechanismClassifier,
    count_parameters,
)
from stvision.optional import require

#: frames, rows and columns of tokens at which mechanisms are timed
SIZES: tuple[tuple[int, int, int], ...] = ((8, 14, 14), (16, 28, 28), (32, 28, 28))
#: the lines of a document between which :meth:`MechanismTable.write_docs` writes
BEGIN, END = "<!-- mechanisms -->", "<!-- end mechanisms -->"
#: names of tasks in the table
TITLES = {
    "metaworld": "Meta-World, task and direction",
    "early-cue": "early cue",
    "metaworld-first-frame": "first frame",
}
OUT_OF_MEMORY = "out of memory"
#: of a name in the picture, in points of type
LABEL_HEIGHT = 8.5


def size_name(size: Sequence[int]) -> str:
    """``(8, 14, 14)`` as ``"8x14x14"``."""
    return "x".join(map(str, size))


def parse_size(text: str) -> tuple[int, int, int]:
    """``"8x14x14"`` as ``(8, 14, 14)``.

    Raises:
        ValueError: anything else.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"sizes must look like 8x14x14 (frames, rows, columns), got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def measure(
    mechanism: str,
    size: tuple[int, int, int],
    *,
    device: torch.device | str,
    batch: int = 4,
    dim: int = 64,
    depth: int = 4,
    heads: int = 2,
    backend: str | None = None,
    warmup: int = 3,
    repeats: int = 10,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Forward and backward of a fresh classifier on random clips.

    On a GPU the forward runs under autocast to bfloat16, and a step is timed as it is, with what the
    host takes, and replayed as a CUDA graph, without.

    Args:
        mechanism: key of :data:`stvision.models.mechanism_classifier.MECHANISMS`.
        size: frames, rows and columns of tokens.
        device: where.
        batch: clips.
        dim: channels of a token.
        depth: blocks.
        heads: attention heads.
        backend: of neighborhood attention; ``None`` to choose.
        warmup: steps before those that count; slow ones stop it after ``seconds``.
        repeats: steps that count; the median is kept.
        seconds: stop repeating after so long; three steps are always measured.

    Returns:
        ``ms``, ``graph_ms`` (``None`` where a step cannot be captured), ``peak_mib`` (what a step takes above what lay on the device before it; ``None`` on the
        CPU), ``parameters``; or ``{"failed": why}``, ``"out of memory"`` among others.
    """
    where = torch.device(device)
    cuda = where.type == "cuda"
    frames, rows, columns = size
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MechanismClassifier(
                mechanism,
                16,
                dim=dim,
                depth=depth,
                heads=heads,
                tokens=frames * rows * columns,
                backend=backend,
            ).to(where)
        shape = (batch, 3, frames, rows * STRIDE, columns * STRIDE)
        clips = torch.randn(shape, device=where)
        parameters = list(model.parameters())

        def compute() -> None:
            with torch.autocast(where.type, torch.bfloat16, enabled=cuda):
                loss = model(clips).float().square().mean()
            torch.autograd.grad(loss, parameters, allow_unused=True)

        def step() -> None:
            compute()
            if cuda:
                torch.cuda.synchronize()

        begin = perf_counter()
        for _ in range(warmup):
            step()
            if perf_counter() - begin > seconds:
                break
        peak = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times: list[float] = []
        begin = perf_counter()
        while len(times) < repeats:
            start = perf_counter()
            step()
            times.append((perf_counter() - start) * 1e3)
            if perf_counter() - begin > seconds and len(times) >= 3:
                break
        return {
            "ms": median(times),
            "graph_ms": _replayed(compute, where, repeats) if cuda else None,
            "peak_mib": peak,
            "parameters": count_parameters(model),
        }
    except torch.OutOfMemoryError:
        return {"failed": OUT_OF_MEMORY}
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        return {"failed": lines[0] if lines else type(error).__name__}
    finally:
        if cuda:
            torch.cuda.empty_cache()


def _replayed(compute: Callable[[], None], device: torch.device, repeats: int) -> float | None:
    """Median milliseconds of ``compute`` as a CUDA graph, ``None`` where it cannot be captured."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                compute()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        times = []
        for _ in range(2 + repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    return median(times[2:])


def device_name(device: torch.device | str) -> str:
    """The device in words, as the table says it."""
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return platform.processor() or platform.machine() or where.type


@dataclass
class MechanismTable:
    """Results of a comparison, kept in one JSON file.

    Args:
        path: the file; ``None`` to keep nothing.
        settings: of all trainings and of the timing: plain data.
        runs: ``mechanism/task/seed`` -> what a training gave.
        times: ``mechanism/size`` -> what :func:`measure` gave.
        facts: device, versions and whatever else a reader needs.
    """

    path: Path | None
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    times: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str] | None, settings: Mapping[str, Any] | None = None
    ) -> "MechanismTable":
        """Read the file where it is there, begin one elsewhere.

        Args:
            path: the file.
            settings: those of this call; ``None`` to take the file's.

        Raises:
            ValueError: the file holds results of other settings, or no results.
            FileNotFoundError: no such file, and no settings.
        """
        plain = None if settings is None else json.loads(json.dumps(dict(settings)))
        if path is None or not Path(path).is_file():
            if plain is None:
                raise FileNotFoundError(f"no results at {str(path)!r}")
            return cls(None if path is None else Path(path), plain)
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            table = cls(Path(path), *(found[k] for k in ("settings", "runs", "times", "facts")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of this benchmark") from error
        if plain is not None:
            differ = {k for k in plain | table.settings if plain.get(k) != table.settings.get(k)}
            if differ and (table.runs or table.times):
                name = min(differ)
                raise ValueError(
                    f"{path} holds results with {name}={table.settings.get(name)!r}, not "
                    f"{plain.get(name)!r}; give another --json or the same {name}"
                )
            table.settings = plain
        return table

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            whole = {
                "settings": self.settings,
                "facts": self.facts,
                "times": self.times,
                "runs": self.runs,
            }
            write_text(self.path, json.dumps(whole, indent=1, allow_nan=False) + "\n")

    def has_run(self, key: str) -> bool:
        """Whether a training is through; one that failed is not."""
        return "accuracy" in self.runs.get(key, {})

    def has_time(self, mechanism: str, size: Sequence[int]) -> bool:
        """Whether a mechanism was timed at a size; one that does not fit counts as timed."""
        found = self.times.get(f"{mechanism}/{size_name(size)}", {})
        return "ms" in found or found.get("failed") == OUT_OF_MEMORY

    @property
    def mechanisms(self) -> list[str]:
        """Mechanisms with a result, in the order of the catalogue."""
        seen = {
            key.split("/")[0]
            for key in (*self.runs, *self.times)
            if "/metaworld-first-frame/" not in key
        }
        return [name for name in MECHANISMS if name in seen]

    @property
    def sizes(self) -> list[str]:
        """Sizes with a time, the smallest first."""
        seen = {key.split("/")[1] for key in self.times}

        def tokens(name: str) -> int:
            a, b, c = parse_size(name)
            return a * b * c

        return sorted(seen, key=tokens)

    def values(self, mechanism: str, task: str, name: str = "accuracy") -> list[float]:
        """A value of each seed that is through."""
        found = []
        for key, run in self.runs.items():
            if key.startswith(f"{mechanism}/{task}/") and run.get(name) is not None:
                found.append(float(run[name]))
        return found

    def _accuracy(self, mechanism: str, task: str, name: str = "accuracy") -> str:
        values = self.values(mechanism, task, name)
        if not values:
            failed = any(k.startswith(f"{mechanism}/{task}/") for k in self.runs)
            return "failed" if failed else ""
        mean = f"{100 * fmean(values):.1f}"
        if len(values) < 2:
            return mean
        return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"

    def _time(self, mechanism: str, size: str) -> str:
        found = self.times.get(f"{mechanism}/{size}")
        if found is None:
            return ""
        if "failed" in found:
            return OUT_OF_MEMORY if found["failed"] == OUT_OF_MEMORY else "failed"
        memory = "" if found["peak_mib"] is None else f", {found['peak_mib'] / 1024:.2f}"
        graph = "" if found.get("graph_ms") is None else f" / {found['graph_ms']:.2f}"
        return f"{found['ms']:.1f}{graph}{memory}"

    def _parameters(self, mechanism: str) -> str:
        counts = [r["parameters"] for k, r in self.times.items() if k.startswith(f"{mechanism}/")]
        counts = [r for r in counts if r]
        return f"{counts[0] / 1e3:.0f}" if counts else ""

    def to_markdown(self) -> str:
        """Table and, below it, what was measured how."""
        tasks = [t for t in ("metaworld", "early-cue") if any(f"/{t}/" in k for k in self.runs)]
        memory = any(found.get("peak_mib") is not None for found in self.times.values())
        head = ["mechanism", "a token sees"]
        for task in tasks:
            head.append(f"{TITLES[task]}, %")
            if task == "metaworld":
                head.append("task alone, %")
        graphs = any(found.get("graph_ms") is not None for found in self.times.values())
        unit = ("ms / as a graph" if graphs else "ms") + (", GiB" if memory else "")
        head += [f"{size.replace('x', ' x ')}: {unit}" for size in self.sizes]
        lines = ["| " + " | ".join(head) + " |"]
        lines.append("| --- | --- |" + " ---: |" * (len(head) - 2))
        for name in self.mechanisms:
            kind = MECHANISMS[name]
            cells = [f"`{name}`", kind.summary + " (control)" * kind.control]
            for task in tasks:
                cells.append(self._accuracy(name, task))
                if task == "metaworld":
                    cells.append(self._accuracy(name, task, "task_accuracy"))
            cells += [self._time(name, size) for size in self.sizes]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {line}" for line in self.notes())]
        return "\n".join(lines) + "\n"

    def notes(self) -> list[str]:
        """Sentences that a reader of the table needs."""
        s, lines = self.settings, []
        if self.runs:
            seeds = {key.split("/")[2] for key in self.runs}
            lines.append(
                f"Accuracy: mean of {len(seeds)} seed(s), least and greatest in brackets; "
                f"{s.get('steps')} steps of {s.get('batch_size')} clips"
                + _where(self.facts.get("trained on"))
            )
        first = self.values("full", "metaworld-first-frame")
        facts = self.facts.get("metaworld")
        if facts:
            blind = 100 * facts["scenes"] / facts["tasks"]
            line = (
                f"Meta-World: {facts['tasks']} tasks in {facts['scenes']} shared scenes, "
                f"{facts['test_clips']} held-out clips, each shown both ways. Guessing among the "
                f"tasks of a scene gives {blind:.0f} % of tasks, blindness to order at most 50 % of "
                "tasks and directions"
            )
            if first:
                line += f"; the first frame alone gave {100 * fmean(first):.1f} % of tasks"
            lines.append(line + ".")
        if any("/early-cue/" in key for key in self.runs):
            lines.append(
                f"Early cue: {s.get('cue_frames')} frames, 4 classes, the cue is over by frame 12, "
                "read at the last frame; guessing gives 25 %."
            )
        if self.times:
            counts = [found["parameters"] for found in self.times.values() if "parameters" in found]
            graphs = any(found.get("graph_ms") is not None for found in self.times.values())
            spread = ""
            if counts:
                spread = f"; {min(counts) / 1e3:.0f} to {max(counts) / 1e3:.0f} thousand parameters"
            lines.append(
                f"Time: median of forward and backward of {s.get('time_batch')} clips at so many "
                "frames, rows and columns of tokens"
                + _where(self.facts.get("timed on"))
                + spread
                + ("; as it is, and replayed as a CUDA graph, where it can be" if graphs else "")
                + "; memory: greatest above what lay on the device before the step."
            )
        failed = [
            f"`{key}`: {found['error']}" for key, found in self.runs.items() if "error" in found
        ]
        failed += [
            f"`{key}`: {found['failed']}"
            for key, found in self.times.items()
            if found.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY
        ]
        if failed:
            lines.append("Failed: " + "; ".join(failed) + ".")
        return lines

    def plot(self, path: str | os.PathLike[str], size: str | None = None) -> None:
        """Accuracy against time, one panel a task.

        Args:
            path: of the picture.
            size: at which size mechanisms were timed; the middle one when None.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was timed, or not at this size.
        """
        figures = require("matplotlib.figure", extra="plot", distribution="matplotlib")
        tickers = require("matplotlib.ticker", extra="plot", distribution="matplotlib")
        sizes = self.sizes
        if size is None and sizes:
            size = sizes[len(sizes) // 2]
        if size not in sizes:
            raise ValueError(f"size must be one of {', '.join(sizes) or 'none yet'}, got {size!r}")
        tasks = [t for t in ("metaworld", "early-cue") if any(f"/{t}/" in k for k in self.runs)]
        if not tasks:
            raise ValueError("nothing was trained yet, so there is no accuracy to plot")
        figure = figures.Figure(figsize=(6.4 * len(tasks), 5.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        points: list[list[tuple[str, float, float, str]]] = []
        for panel, task in zip(panels, tasks, strict=True):
            points.append([])
            for name in self.mechanisms:
                values = self.values(name, task)
                found = self.times.get(f"{name}/{size}", {})
                if not values or "ms" not in found:
                    continue
                mean, x = 100 * fmean(values), found.get("graph_ms") or found["ms"]
                control = MECHANISMS[name].control
                colour = "0.55" if control else f"C{list(MECHANISMS).index(name) % 7}"  # no greys
                ends = [100 * min(values), 100 * max(values)]
                panel.plot([x, x], ends, color=colour, linewidth=1)
                panel.plot([x], [mean], "o", color=colour, markersize=5)
                points[-1].append((name, x, mean, colour))
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(tickers.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            panel.xaxis.set_major_formatter(tickers.FuncFormatter(lambda x, _: f"{x:g}"))
            panel.xaxis.set_minor_formatter(tickers.NullFormatter())
            panel.margins(x=0.12)  # room for the last name
            panel.set_ylim(0, 104)
            panel.set_xlabel(f"forward and backward at {size.replace('x', ' x ')} tokens, ms")
            panel.set_ylabel("accuracy, %")
            panel.set_title(TITLES[task], fontsize=10)
            panel.grid(alpha=0.3)
            panel.axhline({"metaworld": 50, "early-cue": 25}[task], color="0.7", linestyle=":")
        figure.draw_without_rendering()  # where points lie is known from here on
        for panel, named in zip(panels, points, strict=True):
            places = [panel.transData.transform(point[1:3]) * 72 / figure.dpi for point in named]
            top = panel.bbox.y1 * 72 / figure.dpi
            offsets = label_offsets(places, [4.2 * len(point[0]) for point in named], top)
            for (name, x, y, colour), (right, up) in zip(named, offsets, strict=True):
                line = {
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.5,
                    "shrinkA": 0,
                    "shrinkB": 2,
                }
                panel.annotate(
                    name,
                    (x, y),
                    (right, up),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                    va="center",
                    arrowprops=line if up else None,
                )
        write_figure(path, figure, dpi=110)

    def write_docs(self, path: str | os.PathLike[str]) -> None:
        """Put the table, and the plot into ``images`` beside, between the marks of a document.

        Raises:
            ValueError: the document lacks the lines :data:`BEGIN` and :data:`END`.
            FileNotFoundError: there is no document.
        """
        document = Path(path)
        text = document.read_text(encoding="utf-8")
        marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{document} lacks the lines {BEGIN} and {END}")
        body = self.to_markdown()
        if self.times and any("accuracy" in run for run in self.runs.values()):
            picture = document.parent / "images" / "mechanisms.png"
            self.plot(picture)
            body += "\n![accuracy against time](images/mechanisms.png)\n"
        filled = f"{BEGIN}\n{body}{END}"
        write_text(document, marked.sub(lambda _: filled, text, count=1))


def label_offsets(
    points: Sequence[Sequence[float]], widths: Sequence[float], top: float = math.inf
) -> list[tuple[float, float]]:
    """Where to write the names of points so that none covers another.

    Args:
        points: x and y, in points of type.
        widths: of the names, in points of type.
        top: what no name may reach above.

    Returns:
        Per name its distance to the right and upwards from its point: as near as it can be, names of
        points further left first.
    """
    # left end, right end, middle of what is drawn
    taken = [(float(x) - 3, float(x) + 3, float(y)) for x, y in points]
    found = [(0.0, 0.0)] * len(points)
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1])):
        x, y = points[i]
        left, right = x + 5, x + 5 + widths[i]
        for step in range(2 * len(points) + 1):
            up = LABEL_HEIGHT * ((step + 1) // 2) * (1 if step % 2 else -1)
            clear = y + up + LABEL_HEIGHT / 2 <= top and all(
                right < a or b < left or abs(y + up - middle) >= LABEL_HEIGHT
                for a, b, middle in taken
            )
            if clear:
                taken.append((left, right, y + up))
                found[i] = (5.0, float(up))
                break
    return found


def _where(facts: Any) -> str:
    if not facts:
        return ""
    return f", {facts['day']}, {facts['device']}, torch {facts['torch']}, {facts['precision']}"
