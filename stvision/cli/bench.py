"""``stvision bench``: what parts of the library cost and reach on this machine."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from stvision.cli.devices import choose_device
from stvision.cli.options import says_its_defaults

if TYPE_CHECKING:
    import torch

    from stvision.eval.mechanisms import MechanismTable


@says_its_defaults
@dataclass(kw_only=True)
class Command:
    """Every mechanism in the same small video classifier: accuracy, time and memory.

    Trains it on Meta-World clips that only motion tells apart and on clips whose class a cue near the
    beginning decides, and times a step at three sizes. A stopped comparison goes on from its --json.
    """

    what: tyro.conf.Positional[Literal["mechanisms"]]
    """The comparison."""

    json: Path = Path("mechanisms.json")
    """Results; what stands there is not computed again."""

    phase: Literal["all", "train", "time", "report"] = "all"
    """Train, time, or only print what the file holds."""

    data: str = "data/metaworld"
    """Folder of `stvision data metaworld`."""

    cache_dir: str = "cache"
    """Folder of decoded frames."""

    mechanisms: tuple[str, ...] = ()
    """Names of rows, such as full or s4; all when none are given."""

    tasks: tuple[str, ...] = ("metaworld-first-frame", "metaworld", "early-cue")
    """What is trained; the first is the control that sees one frame."""

    seeds: int = 3
    """Trainings of each mechanism and task."""

    steps: int = 1000
    """Of each training."""

    batch_size: int = 64
    """Clips of a step."""

    learning_rate: float = 1e-3
    """Greatest learning rate."""

    dim: int = 64
    """Channels of a token."""

    depth: int = 4
    """Blocks of the classifier."""

    heads: int = 2
    """Attention heads."""

    neighborhood_backend: str | None = None
    """Of neighborhood attention, such as triton; the library chooses when not given."""

    cue_clips: int = 8192
    """Training clips of early-cue."""

    cue_test_clips: int = 1024
    """Its test clips."""

    cue_frames: int = 64
    """Frames of its clips."""

    workers: int | None = None
    """Processes that train side by side, spread over all GPUs; 6 for each GPU and 1 elsewhere when
    not given."""

    graphs: bool = True
    """Train with CUDA graphs where a mechanism can be captured."""

    max_seconds: float | None = None
    """Drop what is still being trained after so long; the same command goes on."""

    sizes: tuple[str, ...] = ("8x14x14", "16x28x28", "32x28x28")
    """Frames, rows and columns of tokens at which a step is timed."""

    time_batch: int = 4
    """Clips of a timed step."""

    repeats: int = 10
    """Timed steps, of which the median counts."""

    plot: Path | None = None
    """Picture of accuracy against time (needs matplotlib)."""

    docs: Path | None = None
    """Document whose marked place gets table and picture, such as docs/mechanisms.md."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" ... (default: a GPU when there is one)."""


def run(job: Command) -> int:
    """Train, time, write, print; 1 when --max-seconds left something undone."""
    from stvision.eval.mechanisms import MechanismTable, parse_size
    from stvision.models.mechanism_classifier import MECHANISMS
    from stvision.train.mechanisms import Settings, all_jobs

    sizes = [parse_size(text) for text in job.sizes]
    names = list(job.mechanisms) or list(MECHANISMS)
    jobs = all_jobs(names, job.tasks, job.seeds)
    if job.phase == "report":
        table = MechanismTable.open(job.json)
        _finish(table, job)
        return 0
    settings = Settings(
        steps=job.steps,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        dim=job.dim,
        depth=job.depth,
        heads=job.heads,
        neighborhood_backend=job.neighborhood_backend,
        data=job.data,
        cache_dir=job.cache_dir,
        cue_clips=job.cue_clips,
        cue_test_clips=job.cue_test_clips,
        cue_frames=job.cue_frames,
    )
    plain = {**asdict(settings), "time_batch": job.time_batch}
    for place in ("data", "cache_dir"):  # where clips lie changes no number
        del plain[place]
    table = MechanismTable.open(job.json, plain)
    device = choose_device(job.device)

    complete = True
    if job.phase in ("all", "train"):
        complete = _train(table, jobs, settings, device, job)
    if job.phase in ("all", "time"):
        _time(table, names, sizes, device, job)
    _finish(table, job)
    if not complete:
        print("not everything is trained yet: the same command goes on")
    return 0 if complete else 1


def _facts(device: "torch.device", precision: str) -> dict[str, Any]:
    from datetime import date

    import torch

    from stvision.eval.mechanisms import device_name

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": precision,
        "day": date.today().isoformat(),
    }


def _precision(device: "torch.device") -> str:
    return "autocast to bfloat16" if device.type == "cuda" else "float32"


def _train(
    table: "MechanismTable", jobs: list[Any], settings: Any, device: "torch.device", job: Command
) -> bool:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from stvision.train.mechanisms import default_workers, prepare_metaworld, train_jobs

    missing = [one for one in jobs if not table.has_run(one.key)]
    if not missing:
        return True
    if any(one.task.startswith("metaworld") for one in missing):
        table.facts["metaworld"] = prepare_metaworld(settings)
    table.facts["trained on"] = _facts(device, _precision(device))
    workers = job.workers or default_workers(str(device))
    done = len(jobs) - len(missing)
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(jobs), initial=done, desc="training", dynamic_ncols=True) as bar,
    ):

        def keep(one: Any, result: dict[str, Any]) -> None:
            table.runs[one.key] = result
            table.save()
            found = result.get("accuracy")
            said = result.get("error", "") if found is None else f"{100 * found:.1f} %"
            bar.set_postfix_str(f"{one.key} {said}")
            bar.update()

        return train_jobs(
            missing,
            settings,
            device=str(device),
            workers=workers,
            graphs=job.graphs,
            max_seconds=job.max_seconds,
            done=keep,
        )


def _time(
    table: "MechanismTable",
    names: list[str],
    sizes: list[tuple[int, int, int]],
    device: "torch.device",
    job: Command,
) -> None:
    from tqdm import tqdm

    from stvision.eval.mechanisms import measure, size_name

    cells = [(name, size) for size in sizes for name in names if not table.has_time(name, size)]
    if not cells:
        return
    table.facts["timed on"] = _facts(device, _precision(device))
    with tqdm(cells, desc="timing", dynamic_ncols=True) as bar:
        for name, size in bar:
            bar.set_postfix_str(f"{name} {size_name(size)}")
            table.times[f"{name}/{size_name(size)}"] = measure(
                name,
                size,
                device=device,
                batch=job.time_batch,
                dim=job.dim,
                depth=job.depth,
                heads=job.heads,
                backend=job.neighborhood_backend,
                repeats=job.repeats,
            )
            table.save()


def _finish(table: "MechanismTable", job: Command) -> None:
    print(table.to_markdown())
    if job.plot is not None:
        table.plot(job.plot)
    if job.docs is not None:
        table.write_docs(job.docs)
