"""``stvision eval classify``: scores of a trained video classifier over several views of each clip."""

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stvision.cli.devices import choose_device
from stvision.cli.options import says_its_defaults


@says_its_defaults
@dataclass
class Classify:
    """Test a classifier of `stvision train classify` on a split of a data set.

    Probabilities are averaged over all views of a clip. Results stand in OUT/results.json,
    OUT/results.md and OUT/confusion.png.
    """

    model: Path
    """Folder of the classifier: the sub-folder `model` of its training."""

    data: Path
    """Folder of the data set."""

    kind: str | None = None
    """Format of the data set (default: that of the training)."""

    split: str = "validation"
    """Split that is tested."""

    label: str | None = None
    """Key of a clip's meta data that holds its class (default: that of the training)."""

    clips: int = 5
    """Views in time of each clip."""

    crops: Literal[1, 3] = 3
    """Views in space of each clip: the middle, or three along the longer side."""

    size: tuple[int, int] | None = None
    """Rows and columns of the views (default: those of the training)."""

    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE, an argument of the reader, such as index=test.jsonl, on top of those of the training;
    may be repeated."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for results (default: print only)."""

    workers: int = 4
    """Processes that decode."""

    batch_size: int = 32
    """Views computed at a time."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the network."""

    json: bool = False
    """Print one JSON object instead of the table."""


def _reader_options(words: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--option takes KEY=VALUE, such as index=test.jsonl, got {word!r}")
        found[key] = yaml.safe_load(value)
    return found


def run_classify(command: Classify) -> int:
    """Predict, score, write, print."""
    import torch
    from tqdm import tqdm

    from stvision.config import from_mapping
    from stvision.datasets.packed import PackedFolder
    from stvision.eval.classify import score_classification
    from stvision.eval.report import write_text
    from stvision.models.classifier import load_classifier
    from stvision.train.data import DataConfig, open_reader
    from stvision.train.multiview import predict_split

    if command.clips < 1 or command.batch_size < 1 or command.workers < 0:
        raise ValueError(
            "--clips and --batch-size must be at least 1 and --workers at least 0, got "
            f"{command.clips}, {command.batch_size} and {command.workers}"
        )
    device = choose_device(command.device)
    model = load_classifier(command.model).to(device)
    if not command.data.exists():
        raise FileNotFoundError(f"no data at {str(command.data)!r}")
    model.size = command.size or model.size
    kind = command.kind or str(model.reading.get("kind", "clips"))
    if model.size is None:
        raise ValueError(f"{command.model} names no size of its clips: give --size HEIGHT WIDTH")
    height, width = model.size
    if kind == "packed":  # these have the one size that they were packed at
        height, width = PackedFolder(command.data).size
    label = command.label or str(model.reading.get("label", "label"))
    options = dict(model.reading.get("options", {}))
    if kind != model.reading.get("kind", kind):  # only what every reader of files takes
        options = {k: options[k] for k in ("sampling", "fps") if k in options and kind != "packed"}
    data = from_mapping(
        DataConfig,
        {
            "kind": kind,
            "root": str(command.data),
            "num_frames": model.frames,
            "height": height,
            "width": width,
            "options": options | _reader_options(command.option),
            "cache": "off",
            "resident": False,
            "workers": command.workers,
        },
        "--kind, --data and --option",
    )
    total = len(open_reader(data, command.split))
    with tqdm(total=total, unit="clip", desc="testing", dynamic_ncols=True) as bar:
        found = predict_split(
            model,
            data,
            command.split,
            label,
            clips=command.clips,
            crops=command.crops,
            batch_size=command.batch_size,
            dtype=None if command.dtype == "float32" else getattr(torch, command.dtype),
            progress=bar.update,
        )
    report = score_classification(
        found.probabilities, found.labels, model.class_names, keys=found.keys
    )
    report.protocol = {
        "model": str(command.model),
        "backbone": model.backbone,
        "data": str(command.data),
        "split": command.split,
        "reader": {"kind": kind, **data.options},
        "clips": command.clips,
        "crops": command.crops,
        "views": command.clips * command.crops,
        "frames": model.frames,
        "size": list(model.size),
        "precision": command.dtype,
        "clips that could not be read": [list(item) for item in found.skipped],
    }
    if command.out is not None:
        report.write_json(command.out / "results.json")
        write_text(command.out / "results.md", report.to_markdown())
        try:
            report.plot(command.out / "confusion.png")
        except ImportError as error:  # the scores stand without the picture
            print(f"no confusion.png: {error}", file=sys.stderr)
    if command.json:
        whole = report.to_dict()
        del whole["rows"], whole["confusion"]
        print(json_module.dumps(whole))
        return 0
    print(report.to_markdown(), end="")
    if found.skipped:
        key, reason = found.skipped[0]
        print(f"left out: {len(found.skipped)} that could not be read, the first {key} ({reason})")
    if command.out is not None:
        print(f"written to {command.out}")
    return 0
