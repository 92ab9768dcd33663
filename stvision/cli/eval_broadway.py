"""``stvision eval broadway``: what settings of BroadWay do to a predictor's motion and obedience."""

import json as json_module
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stvision.cli import predictions
from stvision.cli.devices import choose_device
from stvision.cli.options import says_its_defaults, shows_last
from stvision.cli.predictions import PredictionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from stvision.eval.bootstrap import Estimate
    from stvision.eval.motion import MotionReport
    from stvision.eval.report import PredictionReport
    from stvision.guidance import BroadWay

PLAIN = "plain"

#: share of the steps, from the first on, over which energies are compared
MEASURED = 0.2

#: name=options; an option list may begin with a preset
SETTINGS = (
    "animatediff=animatediff",
    "videocrafter2=videocrafter2",
    "gentle=alpha:0.3,beta:1.2",
    "gain only=alpha:0,beta:1.5",
    "self-guidance=alpha:0.6,beta:0.001",
    "far too much=alpha:0.6,beta:30,fraction:1",
)

_OPTIONS = ("alpha", "beta", "tau", "fraction")


@says_its_defaults
@shows_last(*predictions.LAST)
@dataclass(kw_only=True)
class BroadWayTable(PredictionOptions):
    """Predict held-out clips without BroadWay and with several of its settings, and compare.

    Predictions and energies are kept under OUT/predictions, so a stopped run goes on where it was.
    Results stand in OUT/broadway.json and OUT/broadway.md, some pairs (plain on the left) as videos
    in OUT/pairs.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("broadway")
    """Folder for predictions and results."""

    model: str = "default"
    """"default" for the pipeline that ships, a folder, or a hub name."""

    classifier: str | None = "default"
    """Action classifier: "default" for the one that ships, a folder, or None for no accuracy."""

    clips: int = 100
    """How many clips, spread evenly over the tasks."""

    settings: tuple[str, ...] = SETTINGS
    """Settings as NAME=OPTIONS, such as "mine=animatediff,beta:1.2" or "mild=alpha:0.3,beta:1.1";
    options are alpha, beta, tau, fraction."""

    flow: Literal["auto", "farneback", "raft"] = "auto"
    """Optical flow: RAFT when torchvision and its weights are on this machine, else Farneback."""

    pairs: int = 4
    """How many clips of each setting are written beside the plain ones as videos."""


def parse_settings(words: tuple[str, ...]) -> "dict[str, BroadWay]":
    """Settings by name, in order.

    Args:
        words: each ``NAME=OPTIONS``; OPTIONS are ``name:number`` with commas between, the first
            may be a preset.

    Raises:
        ValueError: a word that is none, a name twice, or an option out of range.
    """
    from stvision.guidance import PRESETS, BroadWay

    found: dict[str, BroadWay] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise ValueError(f"a setting is NAME=OPTIONS, got {word!r}")
        if name in found or name in (PLAIN, "real", "copy last frame"):
            raise ValueError(f"the name {name!r} of a setting is taken")
        parts = [part for part in text.split(",") if part]
        preset = parts.pop(0) if parts and parts[0] in PRESETS else None
        changes: dict[str, Any] = {}
        for part in parts:
            option, _, number = part.partition(":")
            if option not in _OPTIONS or not re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", number):
                raise ValueError(
                    f"setting {name!r} may hold a preset ({', '.join(PRESETS)}) and "
                    f"{', '.join(f'{known}:NUMBER' for known in _OPTIONS)}, got {part!r}"
                )
            changes[option] = float(number)
        options = BroadWay() if preset is None else BroadWay.from_preset(preset)
        found[name] = replace(options, **changes)
    if not found:
        raise ValueError("give at least one setting")
    return found


def run_broadway(command: BroadWayTable) -> int:
    """Predict what is not there yet, measure, write, print."""
    predictions.check_options(command)
    settings = parse_settings(command.settings)

    from tqdm import tqdm

    from stvision.eval.metrics import ShiftTolerantLPIPS
    from stvision.eval.motion import choose_flow, measure_motion
    from stvision.eval.predict import evaluate_predictions
    from stvision.guidance import BroadWay

    # 1. Everything that can be missing is loaded before hours of prediction
    device = str(choose_device(command.device))
    flow = choose_flow(command.flow)
    classifier = None
    if command.classifier is not None:
        classifier = predictions.load_classifier(command.classifier).to(device)
    perceptual = ShiftTolerantLPIPS().to(device) if command.lpips else None
    pipeline = predictions.load_pipeline(command.model, command.dtype)
    weights = predictions.fingerprint(pipeline)
    for options in settings.values():
        options.check(pipeline)

    # 2. Clips, at the length and size of the model
    shape = predictions.choose_shape(command, pipeline)
    dataset = predictions.open_data(command, shape)
    choice = predictions.choose_clips(command, dataset, shape)
    items = choice.items
    texts = {item.key: item.text for item in items}

    # 3. Predictions and the energies of their attention, kept on disk
    stores, energies = {}, {}
    pipeline.to(device)
    neutral = BroadWay(alpha=0, beta=1, fraction=MEASURED)
    columns: dict[str, BroadWay | None] = {PLAIN: None, **settings}
    for column, used in columns.items():
        store = predictions.open_store(
            command,
            re.sub(r"[^\w.-]", "-", column),
            model=command.model,
            weights=weights,
            shape=shape,
            broadway=None if used is None else _plain(used),
        )
        stores[column] = store
        energies[column] = _Energies(store.folder / "energies.json")
        missing = [i for i in items if not (store.has(i.key) and i.key in energies[column].values)]
        with tqdm(total=len(items), initial=len(items) - len(missing), desc=column) as bar:
            for start in range(0, len(missing), command.batch_size):
                batch = missing[start : start + command.batch_size]
                keys = [item.key for item in batch]
                # energies of the plain model are taken in a call of their own, without a change
                for call in (None, neutral) if used is None else (used,):
                    if call is None:
                        pipeline.disable_broadway()
                    else:
                        pipeline.enable_broadway(call)
                    save: Callable[[str, Tensor], object]
                    save = _forget if call is neutral else store.save
                    predictions.predict_batch(command, pipeline, dataset, batch, texts, shape, save)
                    if call is not None:
                        energies[column].add(keys, _energy(pipeline, keys))
                bar.update(len(batch))
    pipeline.disable_broadway()
    pipeline.to("cpu")

    # 4. Scores
    with tqdm(total=len(items), desc="scoring") as bar:
        report = evaluate_predictions(
            predictions.stored_cases(dataset, items, stores),
            num_reference_frames=shape.num_reference_frames,
            scene_tasks=choice.scene_tasks,
            classifier=classifier,
            lpips=perceptual,
            batch_size=command.batch_size,
            device=device,
            seed=command.seed,
            copy_baseline=False,
            progress=bar.update,
        )

    # 5. Motion, of clips that every setting has
    whole = [i for i in items if all(s.load(i.key).frames is not None for s in stores.values())]

    def frames_of(column: str) -> "Iterator[tuple[str, Tensor]]":
        for item in whole:
            shown = stores[column].load(item.key).frames
            assert shown is not None
            yield item.key, shown

    if len(whole) < 2:
        raise ValueError("fewer than two clips are finite under every setting; weaken the settings")
    motion = measure_motion(
        {"real": ((i.key, dataset[i.number].frames) for i in whole)}
        | {column: frames_of(column) for column in stores},
        method=flow,
        energies={c: [energies[c].values[i.key] for i in whole] for c in stores},
    )

    # 6. Results
    shared = {item.key for item in items if len(choice.scene_tasks[item.scene]) > 1}
    result = summarise(report, motion, list(settings), shared)
    result["settings"] = {name: _plain(options) for name, options in settings.items()}
    result["protocol"] = {
        "model": command.model,
        "weights": weights,
        "data": str(command.data),
        "split": command.split,
        "clips": len(items),
        "clips in the motion figures": len(whole),
        "frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "steps": predictions.steps_used(command, pipeline),
        "spacing of the steps": predictions.spacing_used(pipeline),
        "guidance scale": predictions.guidance_used(command, pipeline),
        "seed": command.seed,
        "precision": command.dtype,
        "optical flow": flow,
        "energy": f"used maps, mean over guided modules and the first {MEASURED:.0%} of the steps",
        "intervals": "95 %, percentile bootstrap over clips",
    }
    result["prediction"] = report.to_dict()
    result["motion"] = motion.to_dict()
    _write(result, command.out)
    _write_pairs(command, stores, [item.key for item in whole[: command.pairs]], list(settings))
    if command.json:
        for name in ("prediction", "motion"):
            del result[name]["rows"]
        print(json_module.dumps(result, default=asdict))
    else:
        print(to_markdown(result))
        print(f"written to {command.out}")
    return 0


def _plain(options: "BroadWay") -> dict[str, Any]:
    """Options as JSON gives them back."""
    return json_module.loads(json_module.dumps(asdict(options)))


def _forget(key: str, frames: "Tensor") -> None:
    """Keep no prediction: the call was made for its energies."""
    del key, frames


class _Energies:
    """Mean energy of each clip's attention, in a file beside the predictions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, float] = {}
        if path.is_file():
            self.values = json_module.loads(path.read_text())

    def add(self, keys: list[str], values: list[float]) -> None:
        from stvision.eval.report import write_text

        self.values.update(zip(keys, values, strict=True))
        write_text(self.path, json_module.dumps(self.values, indent=1) + "\n")


def _energy(pipeline: Any, keys: list[str]) -> list[float]:
    """Energy of the maps that were used, for each clip of the last call."""
    import torch

    records = pipeline.broadway_run.records
    steps = pipeline.num_timesteps
    limit = -(-round(MEASURED * 1e6) * steps // 1_000_000)  # ceil, without a float's rounding
    measured = [record.after for record in records if record.step < limit]
    values = torch.stack(measured).double().mean(0).tolist()
    if len(values) != len(keys):
        raise RuntimeError(f"energies of {len(values)} clips were recorded for {len(keys)}")
    return values


#: rows of the table: name, title
_ROWS = (
    ("energy", "temporal-attention energy"),
    ("flow", "optical flow, pixels a frame"),
    ("consistency", "consistency along the flow, SSIM"),
    ("flicker", "flicker, mean change of a pixel"),
    ("accuracy", "instruction accuracy"),
    ("accuracy_shared", "instruction accuracy, shared scenes"),
    ("psnr", "PSNR, dB"),
    ("ssim", "SSIM"),
    ("lpips", "LPIPS, shift-tolerant AlexNet"),
)
_MOTION = ("energy", "flow", "consistency", "flicker")


def summarise(
    report: "PredictionReport", motion: "MotionReport", settings: list[str], shared: set[str]
) -> dict[str, Any]:
    """Figures of every column, and of every setting the difference from plain clip by clip.

    Args:
        report: similarity and accuracy.
        motion: energy, flow, consistency and flicker.
        settings: columns to compare with "plain".
        shared: keys of the clips whose scene holds several tasks.

    Returns:
        ``{"figures": {column: {row: Estimate}}, "differences": ..., "failed": {column: count}}``.
    """
    figures: dict[str, dict[str, Estimate | None]] = {}
    moved = motion.summary()
    for column in ("real", PLAIN, *settings):
        summary = report.columns[column]
        figures[column] = {
            name: moved[column][name] if name in _MOTION else getattr(summary, name)
            for name, _ in _ROWS
        }
    rows: dict[str, dict[str, Any]] = {}
    for row in report.rows:
        rows.setdefault(row.column, {})[row.key] = row
    differences = {
        setting: {
            name: motion.difference(PLAIN, setting, name)
            if name in _MOTION
            else _difference(rows[PLAIN], rows[setting], name, shared)
            for name, _ in _ROWS
        }
        for setting in settings
    }
    failed = {column: report.columns[column].failed for column in (PLAIN, *settings)}
    return {"figures": figures, "differences": differences, "failed": failed}


def _difference(
    before: dict[str, Any], after: dict[str, Any], name: str, shared: set[str]
) -> "Estimate | None":
    from stvision.eval.bootstrap import bootstrap_mean

    def value(row: Any) -> float | None:
        if not name.startswith("accuracy"):
            return getattr(row, name)
        return float(row.named == row.task)

    if name.startswith("accuracy") and all(row.named is None for row in before.values()):
        return None
    keys = [key for key in before if name != "accuracy_shared" or key in shared]
    pairs = [(value(before[key]), value(after[key])) for key in keys]
    return bootstrap_mean([b - a for a, b in pairs if a is not None and b is not None])


def to_markdown(result: dict[str, Any]) -> str:
    """Both tables, the settings and the protocol."""
    lines = []
    for title, table in (("", result["figures"]), ("minus plain", result["differences"])):
        columns = list(table)
        lines += [
            f"| {title} | " + " | ".join(columns) + " |",
            "| --- |" + " ---: |" * len(columns),
        ]
        for name, label in _ROWS:
            cells = [table[column][name] for column in columns]
            if any(cell is not None for cell in cells):
                texts = ["–" if cell is None else str(cell) for cell in cells]
                lines.append(f"| {label} | " + " | ".join(texts) + " |")
        lines.append("")
    for name, options in result["settings"].items():
        told = ", ".join(f"{option} {options[option]:g}" for option in _OPTIONS)
        failures = result["failed"][name]
        lines.append(f"- {name}: {told}" + (f"; {failures} clips not finite" if failures else ""))
    lines += [f"- {name}: {value}" for name, value in result["protocol"].items()]
    return "\n".join(lines) + "\n"


def _write(result: dict[str, Any], folder: Path) -> None:
    from stvision.eval.report import write_text

    write_text(
        folder / "broadway.json",
        json_module.dumps(result, indent=1, default=asdict) + "\n",
    )
    write_text(folder / "broadway.md", to_markdown(result))


def _write_pairs(
    command: BroadWayTable, stores: dict[str, Any], keys: list[str], settings: list[str]
) -> None:
    from stvision.eval.motion import side_by_side
    from stvision.io import write_video

    for setting in settings:
        folder = command.out / "pairs" / stores[setting].folder.name
        folder.mkdir(parents=True, exist_ok=True)
        for key in keys:
            pair = side_by_side(stores[PLAIN].load(key).frames, stores[setting].load(key).frames)
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(key).stem)
            write_video(pair, folder / f"{name}.mp4", fps=8.0)
