"""``stvision eval``: scores of predictions against real clips, with a report that says how."""

import json as json_module
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stvision.cli import predictions
from stvision.cli.devices import choose_device
from stvision.cli.eval_broadway import BroadWayTable, run_broadway
from stvision.cli.eval_classify import Classify, run_classify
from stvision.cli.eval_motion import Motion, run_motion
from stvision.cli.options import says_its_defaults, shows_last
from stvision.cli.predictions import PredictionOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stvision.eval.choice import Item
    from stvision.eval.features import FeatureExtractor
    from stvision.eval.predict import PredictionCase
    from stvision.eval.report import PredictionReport
    from stvision.models.action import ActionClassifier

SHUFFLED = "shuffled sentence"


@says_its_defaults
@shows_last(*predictions.LAST)
@dataclass(kw_only=True)
class Predict(PredictionOptions):
    """Predict clips of a data set and score them against the real ones.

    Predictions are kept under OUT/predictions, so a stopped run goes on where it was. Results stand
    in OUT/results.json and OUT/results.md, the worst clips as strips in OUT/worst, truth above
    prediction.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("evaluation")
    """Folder for predictions and results."""

    clips: int = 200
    """How many clips, spread evenly over the split."""

    baseline: str | None = None
    """A second pipeline in a column of its own, such as one trained from scratch."""

    baseline_name: str = "from scratch"
    """Title of that column."""

    shuffled: bool = True
    """Also predict with the sentence of another task, of the same scene where it has several."""

    i3d: Path | None = None
    """TorchScript file of I3D: adds FVD."""

    videomae: str | None = None
    """Folder or hub name of a VideoMAE: adds a Fréchet distance of its features."""

    worst: int = 10
    """How many of the worst clips are written as strips."""

    worst_by: Literal["lpips", "psnr", "ssim", "flicker"] = "lpips"
    """Measure that ranks them (psnr in place of lpips when LPIPS is off)."""

    seed: int = 0
    """Seed of the noise and of the shuffling."""

    dtype: predictions.Precision = "float32"
    """Precision of the pipelines."""


@says_its_defaults
@dataclass
class Clips:
    """Score a folder of clips against a folder of real ones; files match by their names."""

    real: Annotated[Path, tyro.conf.Positional]
    """Folder of real clips."""

    fake: Annotated[Path, tyro.conf.Positional]
    """Folder of clips to score, under the same file names (endings may differ)."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for results.json and results.md (default: print only)."""

    num_frames: int | None = None
    """Frames compared, spread evenly over each clip (default: all, which must then agree)."""

    size: tuple[int, int] | None = None
    """Height and width to compare at (default: that of the first real clip)."""

    num_reference_frames: int = 1
    """Leading frames that are left out of PSNR, SSIM and LPIPS."""

    classifier: str | None = None
    """Folder of an action classifier, or "default": adds a Fréchet distance of its features."""

    lpips: bool = True
    """Score shift-tolerant LPIPS (needs the distribution stlpips-pytorch)."""

    i3d: Path | None = None
    """TorchScript file of I3D: adds FVD."""

    videomae: str | None = None
    """Folder or hub name of a VideoMAE: adds a Fréchet distance of its features."""

    batch_size: int = 32
    """Clips scored at a time."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""

    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass
class Command:
    """Score predictions against real clips, measure the motion of clips, or test a classifier."""

    job: Annotated[
        Annotated[Predict, tyro.conf.subcommand("predict", prefix_name=False)]
        | Annotated[Clips, tyro.conf.subcommand("clips", prefix_name=False)]
        | Annotated[Motion, tyro.conf.subcommand("motion", prefix_name=False)]
        | Annotated[Classify, tyro.conf.subcommand("classify", prefix_name=False)]
        | Annotated[BroadWayTable, tyro.conf.subcommand("broadway", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def run(command: Command) -> int:
    """Run the chosen job."""
    if isinstance(command.job, Motion):
        return run_motion(command.job)
    if isinstance(command.job, Classify):
        return run_classify(command.job)
    if isinstance(command.job, BroadWayTable):
        return run_broadway(command.job)
    return run_predict(command.job) if isinstance(command.job, Predict) else run_clips(command.job)


def _extractors(
    command: Predict | Clips, classifier: "ActionClassifier | None", device: str
) -> "list[FeatureExtractor]":
    from stvision.eval.features import ClassifierFeatures, I3DFeatures, VideoMAEFeatures

    extractors: list[FeatureExtractor] = []
    if classifier is not None:
        named = "stvision ActionClassifier"
        if command.classifier != "default":
            named += f" {Path(str(command.classifier)).name}"
        extractors.append(ClassifierFeatures(classifier, named))
    if command.i3d is not None:
        extractors.append(I3DFeatures(command.i3d, device))
    if command.videomae is not None:
        extractors.append(VideoMAEFeatures(command.videomae, device))
    return extractors


def run_predict(command: Predict) -> int:
    """Predict what is not there yet, score, write, print."""
    predictions.check_options(command)

    from tqdm import tqdm

    from stvision.eval.metrics import ShiftTolerantLPIPS
    from stvision.eval.predict import evaluate_predictions

    device = str(choose_device(command.device))
    # 1. Everything that can be missing is loaded before hours of prediction
    classifier = None
    if command.classifier is not None:
        classifier = predictions.load_classifier(command.classifier).to(device)
    extractors = _extractors(command, classifier, device)
    perceptual = ShiftTolerantLPIPS().to(device) if command.lpips else None
    models = {"model": command.model}
    if command.baseline is not None:
        models[command.baseline_name] = command.baseline
    pipelines, fingerprints = {}, {}
    for column, name in models.items():
        pipelines[column] = predictions.load_pipeline(name, command.dtype)
        fingerprints[column] = predictions.fingerprint(pipelines[column])

    # 2. Clips, at the length and size of the model
    shape = predictions.choose_shape(command, pipelines["model"])
    dataset = predictions.open_data(command, shape)
    choice = predictions.choose_clips(command, dataset, shape)
    items, scene_tasks = choice.items, choice.scene_tasks

    # 3. Predictions, kept on disk
    columns = [(column, column, False) for column in models]
    if command.shuffled:
        columns.insert(1, (SHUFFLED, "model", True))
    stores = {}
    for column, pipeline_name, shuffle in columns:
        store = predictions.open_store(
            command,
            column.replace(" ", "-"),
            model=models[pipeline_name],
            weights=fingerprints[pipeline_name],
            shape=shape,
            shuffled=shuffle,
        )
        stores[column] = store
        spoken = {
            item.key: _other_task(item, scene_tasks, command.seed) if shuffle else item.task
            for item in items
        }
        texts = {
            item.key: _sentence(item, spoken[item.key], choice.sentences, command.seed)
            if shuffle
            else item.text
            for item in items
        }
        store.spoken = spoken
        missing = [item for item in items if not store.has(item.key)]
        if not missing:
            continue
        pipeline = pipelines[pipeline_name].to(device)
        with tqdm(total=len(items), initial=len(items) - len(missing), desc=column) as bar:
            for start in range(0, len(missing), command.batch_size):
                batch = missing[start : start + command.batch_size]
                predictions.predict_batch(
                    command, pipeline, dataset, batch, texts, shape, store.save
                )
                bar.update(len(batch))
        pipeline.to("cpu")

    # 4. Scores
    with tqdm(total=len(items), desc="scoring") as bar:
        report = evaluate_predictions(
            predictions.stored_cases(dataset, items, stores),
            num_reference_frames=shape.num_reference_frames,
            scene_tasks=scene_tasks,
            classifier=classifier,
            lpips=perceptual,
            extractors=extractors,
            batch_size=command.batch_size,
            device=device,
            seed=command.seed,
            progress=bar.update,
        )
    report.protocol.update(
        {
            "data": str(command.data),
            "split": command.split,
            "tasks": len({item.task for item in items}),
            "clips that could not be read": choice.unreadable,
            "clips in shared scenes": sum(len(scene_tasks[item.scene]) > 1 for item in items),
            "models": models,
            "steps": _one_or_each(
                {name: predictions.steps_used(command, p) for name, p in pipelines.items()}
            ),
            "spacing of the steps": _one_or_each(
                {name: predictions.spacing_used(p) for name, p in pipelines.items()}
            ),
            "guidance scale": _one_or_each(
                {name: predictions.guidance_used(command, p) for name, p in pipelines.items()}
            ),
            "seed": command.seed,
            "precision": command.dtype,
        }
    )

    # 5. Results
    _write(report, command.out)
    by_key = {item.key: item for item in items}
    measure: str = command.worst_by
    if measure == "lpips" and not command.lpips:
        measure = "psnr"
    worst = report.worst("model", measure=measure, count=command.worst)
    write_worst(
        command.out / "worst",
        [
            (
                f"{row.key} {measure} {getattr(row, measure):.4g}",
                dataset[by_key[row.key].number].frames,
                stores["model"].load(row.key).frames,
            )
            for row in worst
        ],
    )
    _print(report, command.out, command.json)
    return 0


def _one_or_each(values: Mapping[str, Any]) -> Any:
    """The value that all pipelines share, or each pipeline's own by its name."""
    first, *others = values.values()
    return dict(values) if any(value != first for value in others) else first


def _other_task(item: "Item", scene_tasks: dict[str, list[str]], seed: int) -> str:
    from stvision.eval.predict import shuffled_task

    everything = [task for tasks in scene_tasks.values() for task in tasks]
    other = shuffled_task(item.key, item.task, scene_tasks[item.scene], seed=seed)
    other = other or shuffled_task(item.key, item.task, everything, seed=seed)
    if other is None:
        raise ValueError("a shuffled sentence needs clips of two tasks; give --no-shuffled")
    return other


def _sentence(item: "Item", task: str, sentences: dict[str, list[str]], seed: int) -> str:
    choices = sorted(sentences[task])
    return choices[zlib.crc32(f"{seed}:sentence:{item.key}".encode()) % len(choices)]


def write_worst(folder: Path, clips: "list[tuple[str, Tensor, Tensor | None]]") -> None:
    """Write a strip for each ``(title, truth, prediction)``, truth above prediction, worst first."""
    from stvision.io import write_strip

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]-*.png"):
        old.unlink()
    for rank, (title, truth, prediction) in enumerate(clips, start=1):
        flat = "".join(c if c.isalnum() or c in ".-" else "_" for c in title)
        rows = [truth] if prediction is None else [truth, prediction]
        labels = ["truth", "prediction"][: len(rows)]
        write_strip(rows, folder / f"{rank:02d}-{flat}.png", labels=labels)


def run_clips(command: Clips) -> int:
    """Score two folders of clips."""
    from tqdm import tqdm

    from stvision.eval.metrics import ShiftTolerantLPIPS
    from stvision.eval.predict import Prediction, PredictionCase, evaluate_predictions
    from stvision.io import read_clip

    for folder in (command.real, command.fake):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of clips at {str(folder)!r}")
    real, fake = _by_stem(command.real), _by_stem(command.fake)
    keys = sorted(set(real) & set(fake))
    if not keys:
        raise ValueError(f"no file names are in both {command.real} and {command.fake}")
    alone = len(set(real) ^ set(fake))
    device = str(choose_device(command.device))
    classifier = None
    if command.classifier is not None:
        classifier = predictions.load_classifier(command.classifier).to(device)
    extractors = _extractors(command, classifier, device)
    size = command.size

    def read(path: Path) -> "torch.Tensor":
        return read_clip(path, num_frames=command.num_frames, size=size).to_uint8().frames

    if size is None:
        height, width = read(real[keys[0]]).shape[1:3]
        size = (height, width)

    def cases() -> "Iterator[PredictionCase]":
        for key in keys:
            try:
                prediction = Prediction(read(fake[key]))
            except (ValueError, OSError) as error:
                prediction = Prediction(None, failure=str(error))
            yield PredictionCase(key, read(real[key]), key, key, {"clips": prediction})

    with tqdm(total=len(keys), desc="scoring") as bar:
        report = evaluate_predictions(
            cases(),
            num_reference_frames=command.num_reference_frames,
            scene_tasks={},
            lpips=ShiftTolerantLPIPS().to(device) if command.lpips else None,
            extractors=extractors,
            batch_size=command.batch_size,
            device=device,
            progress=bar.update,
        )
    report.protocol.update(
        {"real": str(command.real), "fake": str(command.fake), "files without a partner": alone}
    )
    if command.out is not None:
        _write(report, command.out)
    _print(report, command.out, command.json)
    return 0


def _by_stem(folder: Path) -> dict[str, Path]:
    """Clips of a folder by name without its ending."""
    suffixes = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"}
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{path} and {found[path.stem]} share one name")
        found[path.stem] = path
    return found


def _write(report: "PredictionReport", folder: Path) -> None:
    from stvision.eval.report import write_text

    report.write_json(folder / "results.json")
    write_text(folder / "results.md", report.to_markdown())


def _print(report: "PredictionReport", folder: Path | None, as_json: bool) -> None:
    if as_json:
        whole = report.to_dict()
        del whole["rows"]
        print(json_module.dumps(whole))
        return
    print(report.to_markdown())
    if folder is not None:
        print(f"written to {folder}")
