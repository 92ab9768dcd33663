"""What ``stvision eval predict`` and ``stvision eval broadway`` share: options and predicting."""

import json as json_module
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from stvision.eval.choice import Choice, Item
    from stvision.eval.predict import PredictionCase
    from stvision.eval.store import PredictionStore
    from stvision.models.action import ActionClassifier

Precision = Literal["float32", "float16", "bfloat16"]

#: shared options that stand after a command's own in its help
LAST = ("batch_size", "seed", "device", "dtype", "json")


@dataclass(kw_only=True)
class PredictionOptions:
    """Options of a command that predicts clips of a data set and scores them.

    A command declares again what it has another default or another explanation for.
    """

    data: Path
    """Folder of clips with an index (path, caption, task, scene, split ...)."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for predictions and results."""

    model: str = "default"
    """Pipeline to score: "default" for the one that ships, a folder, or a hub name."""

    classifier: str | None = "default"
    """Action classifier, trained on real clips: "default" for the one that ships, a folder, or None
    for no instruction accuracy."""

    index: str | None = None
    """Index file inside the data folder (default: the reader's own)."""

    split: str | None = "test"
    """Split to take clips from; None for all."""

    clips: int
    """How many clips, spread evenly over the tasks."""

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

    lpips: bool = True
    """Score shift-tolerant LPIPS (needs the distribution stlpips-pytorch)."""

    batch_size: int = 32
    """Clips predicted at a time."""

    seed: int = 0
    """Seed of the noise."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""

    dtype: Precision = "float32"
    """Precision of the pipeline."""

    json: bool = False
    """Print the summary as one JSON object instead of the table."""


def check_options(command: PredictionOptions) -> None:
    """Say what is wrong with the words themselves, before anything is loaded.

    Raises:
        ValueError: fewer than two clips.
        FileNotFoundError: no data folder.
    """
    if command.clips < 2:
        raise ValueError(f"--clips must be at least 2, got {command.clips}")
    if not command.data.is_dir():
        raise FileNotFoundError(f"no data folder at {str(command.data)!r}")


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


def load_pipeline(name: str, dtype: Precision) -> Any:
    """The Seer pipeline called ``name``, on the CPU and without progress bars of its own.

    Args:
        name: ``"default"`` for the one that ships, a folder, or a hub name.
        dtype: precision of its networks.
    """
    import torch

    from stvision.pipelines.seer import SeerPipeline

    pipeline = SeerPipeline.from_pretrained(name, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fingerprint(pipeline: Any) -> str:
    """Checksum of what a pipeline predicts with: its networks' weights and its noise schedule.

    A folder that was trained anew under the same name has another one.

    Args:
        pipeline: has ``unet``, ``fstext``, ``vae`` and ``scheduler``.

    Returns:
        Eight hexadecimal digits.
    """
    import torch

    found = zlib.crc32(json_module.dumps(dict(pipeline.scheduler.config), default=str).encode())
    for name in ("unet", "fstext", "vae"):
        for tensor in getattr(pipeline, name).state_dict().values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(data.numpy(), found)
    return f"{found:08x}"


@dataclass(frozen=True)
class ClipShape:
    """Length and size at which clips are predicted and scored.

    Args:
        num_frames: frames of a clip, reference frames included.
        height: rows of pixels.
        width: columns of pixels.
        num_reference_frames: leading frames that the model is given.
    """

    num_frames: int
    height: int
    width: int
    num_reference_frames: int


def choose_shape(command: PredictionOptions, pipeline: Any) -> ClipShape:
    """The shape that the command asks for, and where it does not, that of the pipeline's training.

    Raises:
        ValueError: frames are too small for LPIPS, which is asked for.
    """
    from stvision.eval.metrics.lpips import MIN_SIDE

    height, width, length = pipeline.default_size()
    length = command.num_frames or length
    height, width = command.size or (height, width)
    if command.lpips and min(height, width) < MIN_SIDE:
        raise ValueError(
            f"LPIPS needs frames of at least {MIN_SIDE} pixels, these have {height}x{width}; "
            "give --no-lpips"
        )
    references = command.num_reference_frames or pipeline.config["num_reference_frames"]
    return ClipShape(length, height, width, references)


def open_data(command: PredictionOptions, shape: ClipShape) -> Any:
    """The clips of ``command.data``, cut to length and size, as training reads them."""
    from stvision.datasets.clips import ClipFolder

    options: dict[str, Any] = {} if command.index is None else {"index": command.index}
    return ClipFolder(
        command.data,
        split=command.split,
        num_frames=shape.num_frames,
        size=(shape.height, shape.width),
        **options,
    )


def choose_clips(command: PredictionOptions, dataset: Any, shape: ClipShape) -> "Choice":
    """The clips that are evaluated, while a bar shows how many have been read.

    Raises:
        ValueError: a clip without a task, or no readable clip.
    """
    from tqdm import tqdm

    from stvision.eval.choice import choose_clips

    with tqdm(total=min(command.clips, len(dataset.entries)), desc="reading") as bar:
        return choose_clips(dataset, command.clips, shape.num_frames, progress=bar.update)


def steps_used(command: PredictionOptions, pipeline: Any) -> int:
    """Denoising steps that the pipeline takes: those asked for, or its own."""
    return command.num_inference_steps or pipeline.config["num_inference_steps"]


def spacing_used(pipeline: Any) -> str:
    """How the pipeline's scheduler spreads steps over the noise levels, such as "trailing"."""
    # a scheduler of another kind may have one way only, which it does not name
    return pipeline.scheduler.config.get("timestep_spacing", "the scheduler's own")


def guidance_used(command: PredictionOptions, pipeline: Any) -> float:
    """Weight of guidance that the pipeline takes: the one asked for, which may be 0, or its own."""
    asked = command.guidance_scale
    return pipeline.config["guidance_scale"] if asked is None else asked


def open_store(
    command: PredictionOptions,
    column: str,
    *,
    model: str,
    weights: str,
    shape: ClipShape,
    **own: Any,
) -> "PredictionStore":
    """Predictions of one column, in a folder of OUT/predictions.

    Args:
        command: where, and how clips are predicted.
        column: name of the folder.
        model: name of the pipeline that predicts.
        weights: its :func:`fingerprint`.
        shape: length and size of the clips.
        own: further settings, by which this column differs from others, as JSON gives them back.

    Raises:
        ValueError: the folder holds predictions made with other settings.
    """
    from stvision.eval.store import PredictionStore

    return PredictionStore(
        command.out / "predictions" / column,
        {
            "model": model,
            "weights": weights,
            "data": str(command.data),
            "num_frames": shape.num_frames,
            "size": [shape.height, shape.width],
            "num_reference_frames": shape.num_reference_frames,
            "num_inference_steps": command.num_inference_steps,
            "guidance_scale": command.guidance_scale,
            "seed": command.seed,
            "dtype": command.dtype,
            **own,
        },
    )


def predict_batch(
    command: PredictionOptions,
    pipeline: Any,
    dataset: Any,
    batch: "Sequence[Item]",
    texts: Mapping[str, str],
    shape: ClipShape,
    save: "Callable[[str, Tensor], object]",
) -> None:
    """Predict clips in one call, each from noise that only its name and the seed decide.

    Args:
        command: steps, guidance and seed.
        pipeline: on its device.
        dataset: gives the record with the true ``frames`` ``(T, H, W, C)`` by an item's number.
        batch: the clips.
        texts: key of a clip -> the sentence it is predicted with.
        shape: length and reference frames; height and width are those of the true frames.
        save: takes each clip's key and its frames, ``(T, H, W, C)`` float32 in [0, 1].
    """
    import torch

    truths = [dataset[item.number].frames for item in batch]
    height, width = truths[0].shape[1:3]
    references = shape.num_reference_frames
    result = pipeline(
        [texts[item.key] for item in batch],
        torch.stack([frames[:references] for frames in truths]),
        num_frames=shape.num_frames,
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
        save(item.key, clip)


def stored_cases(
    dataset: Any, items: "Sequence[Item]", stores: "Mapping[str, PredictionStore]"
) -> "Iterator[PredictionCase]":
    """Each clip with its predictions, read from disk when its turn comes.

    Args:
        dataset: gives the record with the true ``frames`` ``(T, H, W, C)`` by an item's number.
        items: the clips.
        stores: name of a column -> its predictions, one of every clip.
    """
    from stvision.eval.predict import PredictionCase

    for item in items:
        shown = {name: store.load(item.key) for name, store in stores.items()}
        yield PredictionCase(item.key, dataset[item.number].frames, item.task, item.scene, shown)
