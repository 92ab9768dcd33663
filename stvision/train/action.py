"""Train the small video classifier that names the task a clip shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.config import parse_config
from stvision.models.action import ActionClassifier, augment_clips
from stvision.train.data import DataConfig, to_network_range
from stvision.train.entry import report, seeded
from stvision.train.loop import Batch, LoopConfig, Outcome, Task
from stvision.train.run import Run
from stvision.train.sources import Held


@dataclass(frozen=True)
class ActionConfig:
    """One training of the action classifier."""

    output_dir: str = "runs/action"
    """Folder of this training; the result is its sub-folder `model`."""
    seed: int = 0
    """Of all randomness."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(cache="frames", validation_clips=512)
    )
    """Clips, kept as frames."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; sorted from the data when empty."""
    label: str = "task"
    """Key of a clip's meta data that holds its class."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ActionClassifier."""
    max_shift: int = 4
    """Clips are shifted by up to so many pixels, their border repeated."""
    jitter: float = 0.2
    """Brightness, contrast and saturation change by up to this share."""
    degrade: float = 0.5
    """Share of clips that are blurred, and of those that are given noise."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""


class _Network(nn.Module):
    """Classify and compare."""

    def __init__(self, classifier: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.smoothing = smoothing

    def forward(self, frames: Tensor, label: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(frames)
        loss = F.cross_entropy(logits.float(), label, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == label).float().mean()}


class ActionTask(Task):
    """See the module docstring.

    Args:
        config: of this training.
        held: validation clips with ``frames`` and ``label``.
        class_names: in the order of the labels.
        device: where it trains.
    """

    def __init__(
        self, config: ActionConfig, held: Held, class_names: Sequence[str], device: torch.device
    ) -> None:
        self.config, self.held, self.device = config, held, device
        options = {"num_frames": config.data.num_frames, "sample_size": config.data.height}
        with seeded(config.seed):
            self.classifier = ActionClassifier(
                class_names=list(class_names), **{**options, **config.model}
            )
        self.model = _Network(self.classifier, config.label_smoothing)

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """Frames (B, C, T, H, W), augmented at random, one way for a whole clip."""
        frames = augment_clips(
            to_network_range(batch["frames"]),
            max_shift=self.config.max_shift,
            jitter=self.config.jitter,
            degrade=self.config.degrade,
            generator=generator,
        )
        return {"frames": frames, "label": batch["label"]}

    def compile_targets(self) -> list[nn.Module]:
        """The classifier."""
        return [self.classifier]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Accuracy on held-out clips, over all and as the mean over classes."""
        hits = []
        labels = self.held.tensors["label"]
        for frames, label in zip(
            self.held.tensors["frames"].split(32), labels.split(32), strict=True
        ):
            logits = self.classifier(to_network_range(frames.to(self.device)))
            hits.append((logits.argmax(1).cpu() == label).float())
        right = torch.cat(hits)
        classes = [float(right[labels == value].mean()) for value in labels.unique()]
        return {"accuracy": float(right.mean()), "class_accuracy": sum(classes) / len(classes)}

    def export(self, folder: Path) -> None:
        """Write the classifier as a diffusers model folder."""
        self.classifier.save_pretrained(folder)


def run(config: ActionConfig) -> Outcome:
    """Train, or continue."""
    if config.data.cache != "frames":
        raise ValueError("the action classifier is trained on frames: set data.cache to 'frames'")
    training = Run.begin(
        config, text=None, labels=list(config.class_names) or "all", label_key=config.label
    )
    prepared = training.prepared
    return training.train(
        ActionTask(config, prepared.held, prepared.labels, training.accelerator.device)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.action`` and of ``accelerate launch -m``."""
    return report(run, lambda: parse_config(ActionConfig, argv, "stvision train action"))


if __name__ == "__main__":
    raise SystemExit(main())
