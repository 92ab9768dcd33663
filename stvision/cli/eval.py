"""``stvision eval``: scores of predictions against real clips, with a report that says how."""

import json as json_module
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stvision.cli.devices import choose_device
from stvision.cli.eval_broadway import BroadWayTable, run_broadway
from stvision.cli.eval_motion import Motion, run_motion
from stvision.cli.options import says_its_defaults

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stvision.eval.features import FeatureExtractor
    from stvision.eval.predict import Prediction, PredictionCase
    from stvision.eval.report import PredictionReport
    from stvision.models.action import ActionClassifier

SHUFFLED = "shuffled sentence"


@says_its_defaults
@dataclass
class Predict:
    """Predict clips of a data set and score them against the real ones.

    Predictions are kept under OUT/predictions, so a stopped run goes on where it was. Results stand
    in OUT/results.json and OUT/results.md, the worst clips as strips in OUT/worst, truth above
    prediction.
    """

    data: Path
    """Folder of clips with an index (path, caption, task, scene, split ...)."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("evaluation")
    """Folder for predictions and results."""

    model: str = "default"
    """Pipeline to score: "default" for the one that ships, a folder, or a hub name."""

    baseline: str | None = None
    """A second pipeline in a column of its own, such as one trained from scratch."""

    baseline_name: str = "from scratch"
    """Title of that column."""

    classifier: str | None = "default"
    """Action classifier, trained on real clips: "default" for the one that ships, a folder, or None
    for no instruction accuracy."""

    index: str | None = None
    """Index file inside the data folder (default: the reader's own)."""

    split: str | None = "test"
    """Split to take clips from; None for all."""

    clips: int = 200
    """How many clips, spread evenly over the split."""

    num_frames: int | None = None
    """Length of the clips, reference frames included (default: as the model was trained)."""

    num_reference_frames: int | None = None
    """Leading frames given to the model (default: as it was trained)."""

    size: tuple[int, int] | None = None
    """Height and width in pixels (default: as the model was trained)."""

    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps (default: the model's own)."""

    guidance_scale: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"])] = None
    """Weight of guidance by the sentence (default: the model's own)."""

    shuffled: bool = True
    """Also predict with the sentence of another task, of the same scene where it has several."""

    lpips: bool = True
    """Score shift-tolerant LPIPS (needs the distribution stlpips-pytorch)."""

    i3d: Path | None = None
    """TorchScript file of I3D: adds FVD."""

    videomae: str | None = None
    """Folder or hub name of a VideoMAE: adds a Fréchet distance of its features."""

    batch_size: int = 32
    """Clips predicted at a time."""

    seed: int = 0
    """Seed of the noise and of the shuffling."""

    worst: int = 10
    """How many of the worst clips are written as strips."""

    worst_by: Literal["lpips", "psnr", "ssim", "flicker"] = "lpips"
    """Measure that ranks them (psnr in place of lpips when LPIPS is off)."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipelines."""

    json: bool = False
    """Print the summary as one JSON object instead of the table."""


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
    """Score predictions against real clips, or measure the motion of clips."""

    job: Annotated[
        Annotated[Predict, tyro.conf.subcommand("predict", prefix_name=False)]
        | Annotated[Clips, tyro.conf.subcommand("clips", prefix_name=False)]
        | Annotated[Motion, tyro.conf.subcommand("motion", prefix_name=False)]
        | Annotated[BroadWayTable, tyro.conf.subcommand("broadway", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def run(command: Command) -> int:
    """Run the chosen job."""
    if isinstance(command.job, Motion):
        return run_motion(command.job)
    if isinstance(command.job, BroadWayTable):
        return run_broadway(command.job)
    return run_predict(command.job) if isinstance(command.job, Predict) else run_clips(command.job)


def load_classifier(name: str) -> "ActionClassifier":
    """The action classifier called ``name``: ``"default"`` or a folder, in float32.

    Raises:
        FileNotFoundError: there is none.
    """
    import stvision
    from stvision.models.action import ActionClassifier

    packaged = Path(stvision.__file__).parent / "weights" / "action-classifier"
    folder = packaged if name == "default" else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no action classifier {name!r} at {folder}; train one with "
            "'python -m stvision.train.action', or give --classifier None"
        )
    return ActionClassifier.from_pretrained(folder, local_files_only=True).float().eval()


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


def _device(name: str | None) -> str:
    return str(choose_device(name))


def _fingerprint(pipeline: Any) -> str:
    """Checksum of what a pipeline predicts with: its networks' weights and its noise schedule.

    A folder that was trained anew under the same name has another one.
    """
    import torch

    found = zlib.crc32(json_module.dumps(dict(pipeline.scheduler.config), default=str).encode())
    for name in ("unet", "fstext", "vae"):
        for tensor in getattr(pipeline, name).state_dict().values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(data.numpy(), found)
    return f"{found:08x}"


@dataclass(frozen=True)
class _Item:
    """One clip of the data set that is evaluated."""

    number: int
    key: str
    text: str
    task: str
    scene: str


def run_predict(command: Predict) -> int:
    """Predict what is not there yet, score, write, print."""
    if command.clips < 2:
        raise ValueError(f"--clips must be at least 2, got {command.clips}")
    if not command.data.is_dir():
        raise FileNotFoundError(f"no data folder at {str(command.data)!r}")

    import torch
    from tqdm import tqdm

    from stvision.eval.metrics import ShiftTolerantLPIPS
    from stvision.eval.metrics.lpips import MIN_SIDE
    from stvision.eval.predict import PredictionCase, evaluate_predictions
    from stvision.pipelines.seer import SeerPipeline

    device = _device(command.device)
    # 1. Everything that can be missing is loaded before hours of prediction
    classifier = None
    if command.classifier is not None:
        classifier = load_classifier(command.classifier).to(device)
    extractors = _extractors(command, classifier, device)
    perceptual = ShiftTolerantLPIPS().to(device) if command.lpips else None
    models = {"model": command.model}
    if command.baseline is not None:
        models[command.baseline_name] = command.baseline
    pipelines, fingerprints = {}, {}
    for column, name in models.items():
        pipelines[column] = SeerPipeline.from_pretrained(name, dtype=getattr(torch, command.dtype))
        pipelines[column].set_progress_bar_config(disable=True)
        fingerprints[column] = _fingerprint(pipelines[column])

    # 2. Clips, at the length and size of the model
    height, width, length = pipelines["model"].default_size()
    length = command.num_frames or length
    height, width = command.size or (height, width)
    references = command.num_reference_frames or pipelines["model"].config["num_reference_frames"]
    if command.lpips and min(height, width) < MIN_SIDE:
        raise ValueError(
            f"LPIPS needs frames of at least {MIN_SIDE} pixels, these have {height}x{width}; "
            "give --no-lpips"
        )
    dataset = open_data(command, length, (height, width))
    choice = _choose(dataset, command.clips, length)
    items, scene_tasks = choice.items, choice.scene_tasks

    # 3. Predictions, kept on disk
    columns = [(column, column, False) for column in models]
    if command.shuffled:
        columns.insert(1, (SHUFFLED, "model", True))
    stores = {}
    for column, pipeline_name, shuffle in columns:
        store = _Store(
            command.out / "predictions" / column.replace(" ", "-"),
            {
                "model": models[pipeline_name],
                "weights": fingerprints[pipeline_name],
                "data": str(command.data),
                "num_frames": length,
                "size": [height, width],
                "num_reference_frames": references,
                "num_inference_steps": command.num_inference_steps,
                "guidance_scale": command.guidance_scale,
                "seed": command.seed,
                "dtype": command.dtype,
                "shuffled": shuffle,
            },
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
                _predict(pipeline, dataset, batch, texts, store, command, references, length)
                bar.update(len(batch))
        pipeline.to("cpu")

    # 4. Scores
    def cases() -> "Iterator[PredictionCase]":
        for item in items:
            predictions = {name: store.load(item.key) for name, store in stores.items()}
            truth = dataset[item.number].frames
            yield PredictionCase(item.key, truth, item.task, item.scene, predictions)

    with tqdm(total=len(items), desc="scoring") as bar:
        report = evaluate_predictions(
            cases(),
            num_reference_frames=references,
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
            "steps": command.num_inference_steps or "the model's own",
            "guidance scale": "the model's own"
            if command.guidance_scale is None
            else command.guidance_scale,
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


def open_data(command: Predict | BroadWayTable, num_frames: int, size: tuple[int, int]) -> Any:
    """The clips of ``command.data``, cut to length and size, as training reads them."""
    from stvision.datasets.clips import ClipFolder

    options: dict[str, Any] = {} if command.index is None else {"index": command.index}
    return ClipFolder(
        command.data, split=command.split, num_frames=num_frames, size=size, **options
    )


@dataclass
class _Choice:
    """Which clips are evaluated, and what the index says of the whole split.

    Args:
        items: the clips.
        sentences: task -> the sentences that the split has for it.
        scene_tasks: scene -> its tasks.
        unreadable: clips that would have been taken, but could not be read.
    """

    items: list[_Item]
    sentences: dict[str, list[str]]
    scene_tasks: dict[str, list[str]]
    unreadable: int = 0


def _choose(dataset: Any, count: int, num_frames: int) -> _Choice:
    """Take clips of each task in turn until there are ``count``; only those taken are decoded."""
    from tqdm import tqdm

    from stvision.datasets.metaworld import SCENES

    by_task: dict[str, list[_Item]] = {}
    choice = _Choice([], {}, {})
    for number, entry in enumerate(dataset.entries):
        task = entry.meta.get("task")
        if not task:
            raise ValueError(
                f"clip {entry.key!r} has no 'task' in the index, by which clips are chosen and "
                "their predictions judged"
            )
        text = entry.captions[0]
        scene = entry.meta.get("scene") or SCENES.get(task, task)
        by_task.setdefault(task, []).append(_Item(number, entry.key, text, task, scene))
        for found, value in (
            (choice.sentences.setdefault(task, []), text),
            (choice.scene_tasks.setdefault(scene, []), task),
        ):
            if value not in found:
                found.append(value)

    def readable(items: list[_Item]) -> "Iterator[_Item]":
        for item in items:
            try:
                whole = len(dataset[item.number].frames) == num_frames
            except (ValueError, OSError):
                whole = False
            if whole:
                yield item
            else:
                choice.unreadable += 1

    waiting = [readable(items) for _, items in sorted(by_task.items())]
    with tqdm(total=min(count, len(dataset.entries)), desc="reading") as bar:
        while waiting and len(choice.items) < count:
            for items in list(waiting):
                item = next(items, None)
                if item is None:
                    waiting.remove(items)
                    continue
                choice.items.append(item)
                bar.update()
                if len(choice.items) == count:
                    break
    if not choice.items:
        raise ValueError("the data set has no readable clips in this split")
    return choice


def _other_task(item: _Item, scene_tasks: dict[str, list[str]], seed: int) -> str:
    from stvision.eval.predict import shuffled_task

    everything = [task for tasks in scene_tasks.values() for task in tasks]
    other = shuffled_task(item.key, item.task, scene_tasks[item.scene], seed=seed)
    other = other or shuffled_task(item.key, item.task, everything, seed=seed)
    if other is None:
        raise ValueError("a shuffled sentence needs clips of two tasks; give --no-shuffled")
    return other


def _sentence(item: _Item, task: str, sentences: dict[str, list[str]], seed: int) -> str:
    choices = sorted(sentences[task])
    return choices[zlib.crc32(f"{seed}:sentence:{item.key}".encode()) % len(choices)]


def _predict(
    pipeline: Any,
    dataset: Any,
    batch: list[_Item],
    texts: dict[str, str],
    store: Any,
    command: Predict | BroadWayTable,
    references: int,
    length: int,
) -> None:
    import torch

    truths = [dataset[item.number].frames for item in batch]
    height, width = truths[0].shape[1:3]
    result = pipeline(
        [texts[item.key] for item in batch],
        torch.stack([frames[:references] for frames in truths]),
        num_frames=length,
        height=height,
        width=width,
        num_reference_frames=references,
        num_inference_steps=command.num_inference_steps,
        guidance_scale=command.guidance_scale,
        # noise by the clip's name: the same whatever the batch and the other clips
        generator=[zlib.crc32(f"{command.seed}:{item.key}".encode()) for item in batch],
        output_type="pt",
    )
    # [b, t, c, h, w] -> [b, t, h, w, c]
    frames = result.frames.float().permute(0, 1, 3, 4, 2)
    for item, clip in zip(batch, frames, strict=True):
        store.save(item.key, clip)


class _Store:
    """Predictions of one column on disk, one 8-bit array a clip, made with one set of settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.spoken: dict[str, str] = {}
        path = folder / "settings.json"
        if path.is_file():
            found = json_module.loads(path.read_text())
            if found != settings:
                changed = ", ".join(
                    f"{name} {found.get(name)!r}, now {settings.get(name)!r}"
                    for name in sorted(set(found) | set(settings))
                    if found.get(name) != settings.get(name)
                )
                raise ValueError(
                    f"{folder} holds predictions made with other settings ({changed}); "
                    "choose another --out or remove that folder"
                )
        else:
            from stvision.eval.report import write_text

            write_text(path, json_module.dumps(settings, indent=1) + "\n")

    def _path(self, key: str) -> Path:
        # names of clips may hold folders; the checksum keeps the flattened name unique
        flat = "".join(c if c.isalnum() or c in "._-" else "_" for c in key)[-80:]
        return self.folder / f"{flat}.{zlib.crc32(key.encode()):08x}.npy"

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def save(self, key: str, frames: "Tensor") -> None:
        import numpy as np

        # a clip that is not finite is kept as an empty array: a failure, not to be tried again
        finite = bool(frames.isfinite().all())
        array = (frames.clamp(0, 1) * 255).round().to("cpu").byte().numpy() if finite else None
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with temporary.open("wb") as file:
            np.save(file, np.zeros(0, np.uint8) if array is None else array)
        os.replace(temporary, path)

    def load(self, key: str) -> "Prediction":
        import numpy as np
        import torch

        from stvision.eval.predict import Prediction

        array = np.load(self._path(key), allow_pickle=False)
        spoken = self.spoken.get(key)
        if not array.size:
            return Prediction(None, spoken, "frames that are not finite")
        return Prediction(torch.from_numpy(array), spoken)


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
    device = _device(command.device)
    classifier = None
    if command.classifier is not None:
        classifier = load_classifier(command.classifier).to(device)
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
