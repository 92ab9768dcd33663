"""Benchmark of text-conditioned video prediction.

It is given true clips and, for each, what any number of predictors made of it; it runs no predictor.
Truth and prediction go through one conversion of units. Similarity (PSNR, SSIM, LPIPS) is taken over
the predicted frames alone; Fréchet distances and the classifier see whole clips, the reference frames
as each predictor shows them included. A prediction that is missing, misshapen or not finite is
counted: in the similarity figures it is absent, in the accuracies it is wrong.

Instruction accuracy asks a classifier, trained on real clips only, what a predicted clip shows. In a
shared scene (clips of several tasks that begin alike) only the sentence can tell, so the columns made
with the sentence of another task of the scene show how much of the accuracy is owed to it.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from stvision.eval.bootstrap import Estimate, bootstrap_mean, bootstrap_ratio
from stvision.eval.features import FeatureExtractor, distance_name
from stvision.eval.metrics import (
    FeatureStatistics,
    ShiftTolerantLPIPS,
    flicker,
    frechet_distance_between,
    psnr,
    ssim,
)
from stvision.eval.report import REAL, ClipRow, ColumnSummary, PredictionReport
from stvision.models.action import ActionClassifier

COPY = "copy last frame"
#: equal frames have an infinite PSNR; 8-bit frames that differ at all stay below 100 dB
PSNR_CAP = 100.0


@dataclass(frozen=True)
class Prediction:
    """What a predictor made of one clip.

    Args:
        frames: ``(T, H, W, C)`` as the truth, reference frames included; ``None`` if it failed.
        spoken: task of the sentence it was given; the clip's own task when ``None``.
        failure: why there are no frames.
    """

    frames: Tensor | None
    spoken: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class PredictionCase:
    """One true clip and its predictions.

    Args:
        key: name of the clip.
        truth: ``(T, H, W, C)``, uint8, or floating point in [0, 1].
        task: what it shows, a class name of the classifier.
        scene: group of clips whose first frames look alike; its own task when there is no such
            group.
        predictions: name of a column -> prediction; every case has the same names.
    """

    key: str
    truth: Tensor
    task: str
    scene: str
    predictions: Mapping[str, Prediction] = field(default_factory=dict)


def copy_last_frame(truth: Tensor, num_reference_frames: int) -> Prediction:
    """The baseline that repeats the last reference frame of ``truth`` ``(T, H, W, C)``."""
    last = truth[num_reference_frames - 1 : num_reference_frames]
    rest = last.expand(len(truth) - num_reference_frames, -1, -1, -1)
    return Prediction(torch.cat([truth[:num_reference_frames], rest]))


def shuffled_task(key: str, task: str, scene_tasks: Iterable[str], *, seed: int = 0) -> str | None:
    """Another task of the same scene, drawn by the clip's key; ``None`` when there is no other."""
    others = sorted(set(scene_tasks) - {task})
    if not others:
        return None
    return others[zlib.crc32(f"{seed}:{key}".encode()) % len(others)]


def to_unit_float(frames: Tensor) -> Tensor:
    """Frames as float32 in [0, 1]: 8-bit values over 255, floats clamped.

    Raises:
        TypeError: another dtype.
    """
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if frames.is_floating_point():
        return frames.float().clamp(0, 1)
    raise TypeError(f"frames must be uint8 or floating point in [0, 1], got {frames.dtype}")


def evaluate_predictions(
    cases: Iterable[PredictionCase],
    *,
    num_reference_frames: int,
    scene_tasks: Mapping[str, Sequence[str]],
    classifier: ActionClassifier | None = None,
    lpips: ShiftTolerantLPIPS | None = None,
    extractors: Sequence[FeatureExtractor] = (),
    copy_baseline: bool = True,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    bootstrap_samples: int = 2000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> PredictionReport:
    """Score predictions against true clips.

    Cases are read ``batch_size`` at a time and let go, so thousands fit.

    Args:
        cases: true clips with their predictions, all of one shape.
        num_reference_frames: leading frames that the predictors were given, at least 1.
        scene_tasks: scene -> its tasks; scenes with several are the shared ones. A scene that is
            not in it has only its clip's own task.
        classifier: names what a clip shows; without it there are no accuracies.
        lpips: perceptual distance; without it there is no such row.
        extractors: networks for Fréchet distances between the real and the predicted clips.
        copy_baseline: add the column that repeats the last reference frame.
        batch_size: clips put through the networks at a time.
        device: where the figures are computed; the networks must be there.
        bootstrap_samples: resamplings behind each 95 % interval.
        seed: seed of the resampling.
        progress: called with the number of clips just finished.

    Returns:
        Rows, summaries and comparisons; column ``"real"`` holds the true clips.

    Raises:
        ValueError: no cases, cases whose shapes or columns differ, keys that repeat, tasks that
            the classifier does not know, or a wrong ``num_reference_frames``.
    """
    scorer = _Scorer(
        num_reference_frames, scene_tasks, classifier, lpips, extractors, torch.device(device)
    )
    rows: list[ClipRow] = []
    columns: list[str] | None = None
    seen: set[str] = set()
    shape: tuple[int, ...] | None = None
    for batch in _batches(cases, batch_size):
        for case in batch:
            if columns is None:
                shape = tuple(case.truth.shape)
                columns = list(case.predictions)
                _check_first(case, num_reference_frames, copy_baseline)
            if tuple(case.truth.shape) != shape or list(case.predictions) != columns:
                raise ValueError(
                    f"clip {case.key!r} has shape {tuple(case.truth.shape)} and columns "
                    f"{list(case.predictions)}, the first one {shape} and {columns}"
                )
            if case.key in seen:
                raise ValueError(f"clip {case.key!r} comes twice")
            seen.add(case.key)
        rows += scorer.real(batch)
        assert columns is not None
        for column in columns:
            rows += scorer.column(column, batch, [c.predictions[column] for c in batch])
        if copy_baseline:
            copies = [copy_last_frame(case.truth, num_reference_frames) for case in batch]
            rows += scorer.column(COPY, batch, copies)
        if progress is not None:
            progress(len(batch))
    if shape is None or columns is None:
        raise ValueError("no clips to evaluate")

    names = [REAL, *columns, *([COPY] if copy_baseline else [])]
    summary = _Summary(rows, scene_tasks, bootstrap_samples, seed, classifier is not None)
    summaries = {name: summary.column(name, names) for name in names}
    for extractor in extractors:
        label = distance_name(extractor, *shape[:3])
        for name in names[1:]:
            summaries[name].distances[label] = scorer.distance(extractor, name)
    return PredictionReport(
        protocol=_protocol(
            shape, num_reference_frames, len(seen), scorer, classifier, bootstrap_samples
        ),
        columns=summaries,
        rows=rows,
        comparisons=summary.comparisons(columns),
    )


def _batches(cases: Iterable[PredictionCase], size: int) -> Iterator[list[PredictionCase]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    iterator = iter(cases)
    while batch := list(islice(iterator, size)):
        yield batch


def _check_first(case: PredictionCase, num_reference_frames: int, copy_baseline: bool) -> None:
    if case.truth.ndim != 4 or case.truth.shape[-1] != 3:
        raise ValueError(f"truth must be (T, H, W, 3), got {tuple(case.truth.shape)}")
    if not 1 <= num_reference_frames < len(case.truth):
        raise ValueError(
            f"num_reference_frames must be 1 to {len(case.truth) - 1} for clips of "
            f"{len(case.truth)} frames, got {num_reference_frames}"
        )
    taken = {REAL, *([COPY] if copy_baseline else [])} & set(case.predictions)
    if taken:
        raise ValueError(f"the column name {taken.pop()!r} is used by the benchmark itself")


def _fault(prediction: Prediction, truth: Tensor) -> str | None:
    """Why a prediction cannot be scored."""
    frames = prediction.frames
    if frames is None:
        return prediction.failure or "no frames"
    if frames.shape != truth.shape:
        return f"shape {tuple(frames.shape)} instead of {tuple(truth.shape)}"
    if frames.is_floating_point() and not frames.isfinite().all():
        return "frames hold values that are not finite"
    return None


class _Scorer:
    """Turns batches into rows and gathers features."""

    def __init__(
        self,
        num_reference_frames: int,
        scene_tasks: Mapping[str, Sequence[str]],
        classifier: ActionClassifier | None,
        lpips: ShiftTolerantLPIPS | None,
        extractors: Sequence[FeatureExtractor],
        device: torch.device,
    ) -> None:
        self.start = num_reference_frames
        self.scene_tasks = scene_tasks
        self.classifier = classifier.eval() if classifier is not None else None
        self.lpips = lpips
        self.extractors = extractors
        self.device = device
        self.statistics: dict[tuple[int, str], FeatureStatistics] = {}

    def real(self, batch: list[PredictionCase]) -> list[ClipRow]:
        rows = [ClipRow(c.key, REAL, c.task, c.scene, c.task) for c in batch]
        self._networks(rows, self._load([case.truth for case in batch]))
        return rows

    def column(
        self, name: str, batch: list[PredictionCase], predictions: list[Prediction]
    ) -> list[ClipRow]:
        rows, good, shown = [], [], []
        for case, prediction in zip(batch, predictions, strict=True):
            spoken = prediction.spoken or case.task
            row = ClipRow(case.key, name, case.task, case.scene, spoken)
            row.failure = _fault(prediction, case.truth)
            rows.append(row)
            if row.failure is None:
                assert prediction.frames is not None
                good.append((row, case.truth))
                shown.append(prediction.frames)
        if good:
            scored = [row for row, _ in good]
            clips, truths = self._load(shown), self._load([truth for _, truth in good])
            self._similarity(scored, clips, truths)
            self._networks(scored, clips)
        return rows

    def distance(self, extractor: FeatureExtractor, column: str) -> float | None:
        index = list(self.extractors).index(extractor)
        real, shown = (self.statistics.get((index, name)) for name in (REAL, column))
        if real is None or shown is None or min(real.count, shown.count) < 2:
            return None
        return frechet_distance_between(real, shown)

    def _load(self, clips: list[Tensor]) -> Tensor:
        # [b, t, h, w, c] -> [b, t, c, h, w]
        # units first: stacking 8-bit with floating-point clips would mix 255 with 1
        units = [to_unit_float(clip.to(self.device)) for clip in clips]
        return torch.stack(units).permute(0, 1, 4, 2, 3)

    def _similarity(self, rows: list[ClipRow], clips: Tensor, truths: Tensor) -> None:
        x, y = clips[:, self.start :], truths[:, self.start :]
        figures = {
            "psnr": psnr(x, y, cap=PSNR_CAP).mean(1),
            "ssim": ssim(x, y).mean(1),
            "flicker": flicker(clips, truths),
        }
        if self.lpips is not None:
            figures["lpips"] = self.lpips(x, y).mean(1)
        for name, values in figures.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                setattr(row, name, value)

    @torch.no_grad()
    def _networks(self, rows: list[ClipRow], clips: Tensor) -> None:
        clips = clips.transpose(1, 2)
        for index, extractor in enumerate(self.extractors):
            features = extractor(clips)
            slot = (index, rows[0].column)
            if slot not in self.statistics:
                self.statistics[slot] = FeatureStatistics(features.shape[-1])
            self.statistics[slot].update(features)
        if self.classifier is None:
            return
        names = self.classifier.class_names
        logits = self.classifier(clips * 2 - 1).float().cpu()
        for row, scores in zip(rows, logits, strict=True):
            if row.task not in names:
                raise ValueError(
                    f"the classifier does not know the task {row.task!r} of clip {row.key!r}; "
                    f"it knows {', '.join(names)}"
                )
            row.named = names[int(scores.argmax())]
            known = [t for t in self.scene_tasks.get(row.scene, (row.task,)) if t in names]
            inside = [names.index(task) for task in known]
            row.named_in_scene = names[inside[int(scores[inside].argmax())]] if inside else None


class _Summary:
    """Means over rows with their intervals."""

    def __init__(
        self,
        rows: list[ClipRow],
        scene_tasks: Mapping[str, Sequence[str]],
        samples: int,
        seed: int,
        has_classifier: bool,
    ) -> None:
        self.by_column: dict[str, dict[str, ClipRow]] = {}
        for row in rows:
            self.by_column.setdefault(row.column, {})[row.key] = row
        self.scene_tasks = scene_tasks
        self.samples, self.seed = samples, seed
        self.has_classifier = has_classifier

    def column(self, name: str, names: list[str]) -> ColumnSummary:
        rows = list(self.by_column[name].values())
        summary = ColumnSummary(len(rows), sum(row.failure is not None for row in rows))
        for figure in ("psnr", "ssim", "lpips", "flicker"):
            values = [getattr(row, figure) for row in rows]
            setattr(summary, figure, self._mean([v for v in values if v is not None]))
        if name not in (REAL, COPY) and COPY in names:
            summary.psnr_gain = self._difference(rows, self.by_column[COPY], "psnr")
        if not self.has_classifier:
            return summary
        shared = self._shared(rows)
        summary.accuracy = self._mean([row.named == row.task for row in rows])
        summary.accuracy_shared = self._mean([row.named == row.task for row in shared])
        summary.accuracy_in_scene = self._mean([r.named_in_scene == r.task for r in shared])
        summary.obeys = self._mean([row.named == row.spoken for row in rows])
        summary.obeys_shared = self._mean([row.named == row.spoken for row in shared])
        if name != REAL:
            summary.accuracy_of_real = self._ratio(rows, list(self.by_column[REAL].values()))
        return summary

    def comparisons(self, columns: list[str]) -> dict[str, Estimate | None]:
        """The first column against every other one, clip by clip."""
        if not columns:
            return {}
        main = columns[0]
        rows = list(self.by_column[main].values())
        found: dict[str, Estimate | None] = {}
        for name, others in self.by_column.items():
            if name in (REAL, main):
                continue
            for figure, unit in (("psnr", "PSNR (dB)"), ("ssim", "SSIM"), ("lpips", "LPIPS")):
                difference = self._difference(rows, others, figure)
                if difference is not None:
                    found[f"{unit}, {main} minus {name}"] = difference
            if self.has_classifier:
                ratio = self._ratio(self._shared(rows), list(others.values()))
                found[f"accuracy on shared scenes, {main} over {name}"] = ratio
        return found

    def _difference(
        self, rows: list[ClipRow], others: dict[str, ClipRow], figure: str
    ) -> Estimate | None:
        pairs = [(getattr(row, figure), getattr(others[row.key], figure)) for row in rows]
        return self._mean([a - b for a, b in pairs if a is not None and b is not None])

    def _shared(self, rows: list[ClipRow]) -> list[ClipRow]:
        return [row for row in rows if len(set(self.scene_tasks.get(row.scene, ()))) > 1]

    def _ratio(self, above: list[ClipRow], below: list[ClipRow]) -> Estimate | None:
        other = {row.key: row for row in below}
        return bootstrap_ratio(
            [float(row.named == row.task) for row in above],
            [float(other[row.key].named == row.task) for row in above],
            samples=self.samples,
            seed=self.seed,
        )

    def _mean(self, values: Sequence[float]) -> Estimate | None:
        return bootstrap_mean(values, samples=self.samples, seed=self.seed)


def _protocol(
    shape: tuple[int, ...],
    num_reference_frames: int,
    count: int,
    scorer: _Scorer,
    classifier: ActionClassifier | None,
    samples: int,
) -> dict:
    protocol: dict = {
        "clips": count,
        "frames": shape[0],
        "height": shape[1],
        "width": shape[2],
        "reference frames": num_reference_frames,
        "similarity": "predicted frames only; frame by frame, then mean over frames, over clips",
        "PSNR cap, dB": PSNR_CAP,
        "Fréchet distances and classifier": "whole clips, reference frames included",
        "failed predictions": "absent from similarity and distances, wrong in accuracies",
        "intervals": f"95 %, percentile bootstrap over clips, {samples} resamplings",
    }
    if classifier is not None:
        protocol["classes"] = len(classifier.class_names)
    for index, extractor in enumerate(scorer.extractors):
        statistics = scorer.statistics[(index, REAL)]
        if statistics.count <= statistics.dim:
            protocol[f"note on {extractor.name}"] = (
                f"{statistics.count} clips for {statistics.dim} features: the distance is biased "
                "upwards and compares only with others over as many clips"
            )
    return protocol
