"""Train a video classifier: any backbone by name, fresh or from image weights, on any labelled clips.

The recipe is VideoMAE's for finetuning (Tong et al. 2022): random resized crops, mixup and CutMix,
label smoothing, dropped branches, learning rates that fall towards the stem, and a test over several
views of each clip. All of it is off or mild by default and stands in the configuration.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.config import parse_config
from stvision.datasets.views import spatial_crops
from stvision.models.action import jitter_colours
from stvision.models.classifier import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoClassifier,
    class_mean,
    load_classifier,
    set_drop_path,
    top_hits,
    view_probabilities,
)
from stvision.models.selective_s4 import SelectiveS4
from stvision.train.crops import crop_clips, draw_crops, fit_clips, flip_clips
from stvision.train.data import DataConfig, to_network_range
from stvision.train.entry import report, seeded
from stvision.train.layer_decay import layer_decay_groups
from stvision.train.loop import Batch, LoopConfig, Outcome, Task
from stvision.train.mixup import MixConfig, mix_clips, soft_targets
from stvision.train.multiview import predict_split
from stvision.train.run import Run
from stvision.train.sources import Held


@dataclass(frozen=True)
class ClassifyConfig:
    """One training of a video classifier."""

    output_dir: str = "runs/classify"
    """Folder of this training; the result is its sub-folder `model`."""
    seed: int = 0
    """Of all randomness."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(cache="frames", validation_clips=512)
    )
    """Clips: kept as frames, or decoded anew each time with cache "off"."""
    label: str = "label"
    """Key of a clip's meta data that holds its class; `task` for Meta-World."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the scores; sorted from the training split when empty."""
    backbone: str = "davit_tiny"
    """Name of a backbone of `create_backbone`, or `two-stream` for a head over time on an image
    backbone whose name and weights are among `options`."""
    pretrained: str | None = None
    """Image weights that the backbone starts from: a file, a folder or owner/name of a hub
    repository."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the backbone's class, such as `depths`."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Red, green and blue in [0, 1] that the backbone sees as 0."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of red, green and blue that the backbone sees as 1."""
    size: tuple[int, int] | None = None
    """Rows and columns that the network sees; those of `data` when none."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of a frame's area that is cut at random and scaled to `size`; (0.5, 1) is VideoMAE's. At
    (1, 1) nothing is cut."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of such cuts."""
    flip: bool = False
    """Mirror half of the clips; not where classes differ by left and right."""
    jitter: float = 0.2
    """Brightness, contrast and saturation change by up to this share."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixup and CutMix."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    drop_path: float | None = None
    """Chance to drop a branch of the last block, growing from 0; the backbone's own when none."""
    layer_decay: float = 1.0
    """Learning rate of a layer over that of the next; 0.75 is VideoMAE's, 1 is one rate for all."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more time."""
    test_split: str | None = None
    """Split that the finished model is tested on; the validation split when none."""
    test_clips: int = 1
    """Views in time of each clip in that test; 0 for no test."""
    test_crops: Literal[1, 3] = 1
    """Views in space of each clip in that test."""

    def __post_init__(self) -> None:
        if self.data.cache == "latents":
            raise ValueError(
                "a classifier is trained on frames: set data.cache to 'frames' or 'off'"
            )
        sampling = self.data.options.get("sampling", "uniform")
        if self.data.cache == "frames" and sampling in ("random", "segments"):
            raise ValueError(
                f"data.options.sampling={sampling!r} draws other frames each time, which a cache "
                "cannot keep: set data.cache to 'off' and data.resident to false"
            )
        if self.data.buckets:
            raise ValueError("a classifier takes clips of one shape: leave data.buckets empty")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {self.jitter}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be two rising shares above 0 and at most 1, got {self.crop_scale}"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(
                f"crop_ratio must be two rising numbers above 0, got {self.crop_ratio}"
            )
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.test_clips < 0:
            raise ValueError(f"test_clips must be at least 0, got {self.test_clips}")
        if self.loop.cuda_graphs and self.gradient_checkpointing:
            raise ValueError(
                "loop.cuda_graphs and gradient_checkpointing exclude each other: recomputing reads "
                "the state of random draws, which a captured step must not"
            )

    @property
    def network_size(self) -> tuple[int, int]:
        """Rows and columns that the network sees."""
        return self.size or (self.data.height, self.data.width)


class _Network(nn.Module):
    """Classify and compare."""

    def __init__(self, classifier: VideoClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, frames: Tensor, target: Tensor) -> dict[str, Tensor]:
        net = self.classifier.net
        extra: Tensor | None = None
        if isinstance(net, SelectiveS4) and net.guide is not None and net.selection == "ratio":
            tokens = net.tokenize(self.classifier.prepare(frames))
            logits, selection = net.forward_tokens(tokens)
            extra = net.selection_loss(selection)
        else:
            logits = self.classifier(frames)
        loss = F.cross_entropy(logits.float(), target)
        if extra is not None:
            loss = loss + extra
        right = logits.argmax(1) == target.argmax(1)
        return {"loss": loss, "accuracy": right.float().mean()}


class ClassifyTask(Task):
    """See the module docstring.

    Args:
        config: of this training.
        held: validation clips with ``frames`` (N, T, H, W, 3) uint8 and ``label`` (N,).
        class_names: in the order of the labels.
        device: where it trains.

    Raises:
        ValueError: a backbone, options or weights that do not fit.
    """

    def __init__(
        self, config: ClassifyConfig, held: Held, class_names: Sequence[str], device: torch.device
    ) -> None:
        self.config, self.held, self.device = config, held, device
        options = dict(config.data.options)
        reading = {"label": config.label, "kind": config.data.kind, "options": options}
        with seeded(config.seed):
            self.classifier = VideoClassifier(
                config.backbone,
                class_names,
                config.data.num_frames,
                config.network_size,
                options=config.options,
                pretrained=config.pretrained,
                mean=config.mean,
                std=config.std,
                reading=reading,
            )
        net = self.classifier.net
        if config.drop_path is not None:
            set_drop_path(net, config.drop_path)
        if config.gradient_checkpointing:
            cast(Any, net).set_grad_checkpointing(True)
        self.model = _Network(self.classifier)

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """Frames (B, 3, T, H, W), one random cut and colour for a whole clip, and soft targets."""
        config = self.config
        frames = to_network_range(batch["frames"])
        height, width = frames.shape[-2:]
        size = config.network_size
        if config.crop_scale[0] < 1:
            shares, shapes = config.crop_scale, config.crop_ratio
            boxes = draw_crops(len(frames), height, width, shares, shapes, generator, frames.device)
            frames = crop_clips(frames, boxes, size)
        else:
            frames = fit_clips(frames, size)
        if config.flip:
            frames = flip_clips(frames, generator)
        if config.jitter:
            frames = jitter_colours(frames, config.jitter, generator).clamp(-1, 1)
        classes = len(self.classifier.class_names)
        target = soft_targets(batch["label"], classes, config.label_smoothing)
        frames, target = mix_clips(frames, target, config.mix, generator)
        return {"frames": frames, "target": target}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """By layer and by whether weights are decayed; see :mod:`stvision.train.layer_decay`."""
        return layer_decay_groups(self.classifier.net, self.config.layer_decay)

    def after_step(self) -> None:
        """Move what follows the weights by a momentum of its own."""
        if isinstance(self.classifier.net, SelectiveS4):
            self.classifier.net.update_momentum()

    def compile_targets(self) -> list[nn.Module]:
        """The backbone."""
        return [self.classifier.net]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Scores on held-out clips from one view of each."""
        labels = self.held.tensors["label"]
        parts = []
        for clips in self.held.tensors["frames"].split(32):
            views = torch.stack([spatial_crops(clip, self.config.network_size) for clip in clips])
            parts.append(view_probabilities(self.classifier, views).cpu())
        return scores(torch.cat(parts), labels)

    def export(self, folder: Path) -> None:
        """Write what :func:`stvision.models.classifier.load_classifier` reads."""
        self.classifier.save(folder)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of clips whose class is the likeliest or among the five likeliest, and its class mean.

    Args:
        probabilities: (N, classes).
        labels: (N,) int64.
    """
    hits = top_hits(probabilities, labels)
    return {
        "accuracy": float(hits.double().mean()),
        "top5": float(top_hits(probabilities, labels, 5).double().mean()),
        "class_accuracy": class_mean(hits, labels),
    }


def score_model(config: ClassifyConfig, step: int, device: torch.device) -> dict[str, float]:
    """Score the exported model on a whole split over all views, once; kept in ``test.json``.

    Args:
        config: of the finished training.
        step: of the model.
        device: that computes.

    Returns:
        See :func:`scores`; names begin with ``test_``.
    """
    folder = Path(config.output_dir)
    split = config.test_split or config.data.validation_split
    views = {"clips": config.test_clips, "crops": config.test_crops}
    settings = {"step": step, "split": split, "data": asdict(config.data), **views}
    settings = json.loads(json.dumps(settings))
    path = folder / "test.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.get("settings") == settings:
            return cast(dict[str, float], known["scores"])
    model = load_classifier(folder / "model").to(device)
    found = predict_split(
        model, config.data, split, config.label, clips=config.test_clips, crops=config.test_crops
    )
    values = {
        f"test_{name}": value for name, value in scores(found.probabilities, found.labels).items()
    }
    counts = {"tested": len(found.keys), "left_out": len(found.skipped)}
    text = json.dumps({"scores": values, **counts, "settings": settings}, indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return values


def run(config: ClassifyConfig) -> Outcome:
    """Train, or continue; then test the model that was written."""
    training = Run.begin(
        config, text=None, labels=list(config.class_names) or "all", label_key=config.label
    )
    prepared, accelerator = training.prepared, training.accelerator
    task = ClassifyTask(config, prepared.held, prepared.labels, accelerator.device)
    outcome = training.train(task)
    if not (outcome.finished and config.test_clips and accelerator.is_main_process):
        return outcome
    tested = score_model(config, outcome.step, accelerator.device)
    return replace(outcome, metrics={**outcome.metrics, **tested})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.classify`` and of ``accelerate launch -m``."""
    return report(run, lambda: parse_config(ClassifyConfig, argv, "stvision train classify"))


if __name__ == "__main__":
    raise SystemExit(main())
