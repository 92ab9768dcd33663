"""Train the same small video classifier around each mechanism, on data that only motion tells apart.

Two tasks. ``metaworld``: clips of robot tasks that share a scene, so that their first frames are equal
pixel by pixel, shown forwards or backwards; a class is a task and a direction. The frames of a clip say
nothing of the direction, so a network that does not see their order is right half of the time at most.
``early-cue``: :class:`stvision.datasets.early_cue.EarlyCue`, read at the last frame.
``metaworld-first-frame`` is the control that sees the first frame alone and names the task.

Jobs are short and small, so several processes train side by side on one GPU, each with its clips on the
device and its forward and backward as one CUDA graph.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.datasets.early_cue import EarlyCue
from stvision.datasets.metaworld_tasks import SCENES, SHARED_SCENES
from stvision.models.action import augment_clips
from stvision.models.mechanism_classifier import (
    MECHANISMS,
    STRIDE,
    MechanismClassifier,
    count_parameters,
)
from stvision.train.cache import cached_frames
from stvision.train.data import DataConfig, to_network_range
from stvision.train.graphed import GraphedStep
from stvision.train.store import Store

logger = logging.getLogger(__name__)

TASKS = ("metaworld", "early-cue", "metaworld-first-frame")


@dataclass(frozen=True)
class Settings:
    """What all trainings of a table share.

    Args:
        steps: of the optimizer.
        batch_size: clips of a step.
        learning_rate: greatest rate; it rises over a tenth of the steps and falls as a cosine.
        weight_decay: of weights of two axes and more.
        dim: channels of a token.
        depth: blocks.
        heads: attention heads.
        neighborhood_backend: of neighborhood attention; ``None`` to choose.
        data: folder of Meta-World clips.
        cache_dir: folder of decoded frames.
        num_frames: frames of a Meta-World clip.
        cue_clips: training clips of ``early-cue``.
        cue_test_clips: its test clips.
        cue_frames: its frames.
        cue_size: its rows and columns.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dim: int = 64
    depth: int = 4
    heads: int = 2
    neighborhood_backend: str | None = None
    data: str = "data/metaworld"
    cache_dir: str = "cache"
    num_frames: int = 12
    cue_clips: int = 8192
    cue_test_clips: int = 1024
    cue_frames: int = 64
    cue_size: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "cue_clips", "cue_test_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        mechanism: key of :data:`stvision.models.mechanism_classifier.MECHANISMS`.
        task: one of :data:`TASKS`.
        seed: of weights, order and augmentation.
    """

    mechanism: str
    task: str
    seed: int

    @property
    def key(self) -> str:
        """Its name among results."""
        return f"{self.mechanism}/{self.task}/{self.seed}"


def all_jobs(mechanisms: Sequence[str], tasks: Sequence[str], seeds: int) -> list[Job]:
    """Every training of a table, seed by seed, so that a part of them is a table already.

    Raises:
        ValueError: an unknown mechanism or task, or no seed.
    """
    for name in mechanisms:
        if name not in MECHANISMS:
            raise ValueError(f"mechanisms: {name!r} is none of {', '.join(MECHANISMS)}")
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: {name!r} is none of {', '.join(TASKS)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    jobs = []
    for seed in range(seeds):
        for task in tasks:
            # one frame has no motion: of all mechanisms only the one that sees all of it
            rows = ("full",) if task == "metaworld-first-frame" else mechanisms
            jobs += [Job(name, task, seed) for name in rows]
    return jobs


@dataclass
class Problem:
    """Clips of a task on the device.

    Args:
        frames: (N, T, H, W, 3) uint8, to train on.
        label: (N,) their classes, without a direction.
        test_frames: held-out clips.
        test_label: their classes.
        classes: number of classes, without a direction.
        directions: clips are shown both ways, and a class is twice the label plus 1 if backwards.
        augment: shift and tint training clips.
        pool: what the classifier reads.
    """

    frames: Tensor
    label: Tensor
    test_frames: Tensor
    test_label: Tensor
    classes: int
    directions: bool
    augment: bool
    pool: str

    @property
    def outputs(self) -> int:
        """Classes that the classifier names."""
        return self.classes * (1 + self.directions)

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        frames, height, width = self.frames.shape[1:4]
        return frames * -(-height // STRIDE) * -(-width // STRIDE)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training clips (B, 3, T, H, W) in [-1, 1] and their classes (B,)."""
        frames, label = self.frames[index], self.label[index]
        if self.directions:
            turned = torch.rand(len(index), generator=generator, device=index.device) < 0.5
            frames = torch.where(turned[:, None, None, None, None], frames.flip(1), frames)
            label = 2 * label + turned
        clips = to_network_range(frames)
        if self.augment:
            clips = augment_clips(clips, degrade=0.0, generator=generator)
        return clips, label

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out clips and their classes, both ways where directions count."""
        for frames, label in zip(
            self.test_frames.split(size), self.test_label.split(size), strict=True
        ):
            clips = to_network_range(frames)
            if self.directions:
                yield clips, 2 * label
                yield clips.flip(2), 2 * label + 1
            else:
                yield clips, label


def metaworld_tasks(found: Sequence[dict[str, Any]]) -> list[str]:
    """Tasks among entries that share their scene with another one there, sorted.

    Raises:
        ValueError: there are none.
    """
    present = {str(entry["meta"].get("task")) for entry in found}
    names = []
    for scene in SHARED_SCENES.values():
        together = [task for task in scene.tasks if task in present]
        names += together if len(together) > 1 else []
    if not names:
        raise ValueError(
            "the data holds no two Meta-World tasks of one shared scene; render them with: "
            "stvision data metaworld --out FOLDER"
        )
    return sorted(names)


def _stores(settings: Settings) -> dict[str, Store]:
    """Decoded frames by split; made where they are missing."""
    config = DataConfig(
        root=settings.data,
        num_frames=settings.num_frames,
        cache="frames",
        cache_dir=settings.cache_dir,
        workers=min(16, os.cpu_count() or 1),
    )
    found = {}
    for split in ("train", "validation", "test"):
        try:
            found[split] = cached_frames(config, split)
        except ValueError:
            if split == "train":  # few seeds may leave a held-out split empty
                raise
    if len(found) == 1:
        raise ValueError(f"{settings.data} holds no clips of split 'validation' or 'test'")
    return found


def prepare_metaworld(settings: Settings) -> dict[str, int]:
    """Decode what is not decoded yet.

    Returns:
        ``tasks``, ``scenes`` that they share, ``train_clips`` and ``test_clips``.

    Raises:
        FileNotFoundError: no Meta-World clips.
        ValueError: none of shared scenes, or none held out.
    """
    stores = _stores(settings)
    names = metaworld_tasks(stores["train"].entries)

    def count(*splits: str) -> int:
        entries = [entry for split in splits if split in stores for entry in stores[split].entries]
        return sum(str(entry["meta"].get("task")) in names for entry in entries)

    return {
        "tasks": len(names),
        "scenes": len({SCENES[name] for name in names}),
        "train_clips": count("train"),
        "test_clips": count("validation", "test"),
    }


def _metaworld(settings: Settings, device: torch.device, first_frame: bool) -> Problem:
    stores = _stores(settings)
    parts = {split: (store.load()["frames"], store.entries) for split, store in stores.items()}
    names = metaworld_tasks(parts["train"][1])
    number = {name: place for place, name in enumerate(names)}

    def gather(*splits: str) -> tuple[Tensor, Tensor]:
        frames, labels = [], []
        for split in splits:
            if split in parts:
                every, entries = parts[split]
                task = [number.get(str(entry["meta"].get("task")), -1) for entry in entries]
                label = torch.tensor(task)
                frames.append(every[label >= 0])
                labels.append(label[label >= 0])
        joined = torch.cat(frames)
        joined = joined[:, :1] if first_frame else joined
        return joined.contiguous().to(device), torch.cat(labels).to(device)

    # what is held out depends on the seed alone, so one scene's tasks are on one side
    return Problem(
        *gather("train"),
        *gather("validation", "test"),
        classes=len(names),
        directions=not first_frame,
        augment=True,
        pool="mean",
    )


def _early_cue(settings: Settings, device: torch.device) -> Problem:
    def made(split: str, count: int) -> tuple[Tensor, Tensor]:
        clips = EarlyCue(
            count,
            settings.cue_frames,
            size=settings.cue_size,
            split="train" if split == "train" else "test",
        )
        parts = [
            clips.batch(range(first, min(first + 128, count)), device=device)
            for first in range(0, count, 128)
        ]
        labels = [clips.label(index) for index in range(count)]
        return torch.cat(parts), torch.tensor(labels, device=device)

    return Problem(
        *made("train", settings.cue_clips),
        *made("test", settings.cue_test_clips),
        classes=len(EarlyCue.classes),
        directions=False,
        augment=False,
        pool="last",
    )


def load_problem(task: str, settings: Settings, device: torch.device | str) -> Problem:
    """Clips of a task, decoded or made, on the device.

    Raises:
        ValueError: an unknown task, or data without what it needs.
        FileNotFoundError: no Meta-World clips.
    """
    where = torch.device(device)
    if task == "early-cue":
        return _early_cue(settings, where)
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return _metaworld(settings, where, task == "metaworld-first-frame")


def _rate(step: int, settings: Settings) -> float:
    warm = max(1, settings.steps // 10)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights of linear layers and convolutions are decayed, all other parameters are not."""
    decayed: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            decayed.append(module.weight)
    known = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def build(job: Job, problem: Problem, settings: Settings) -> MechanismClassifier:
    """The classifier of a training, with fresh weights of the job's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return MechanismClassifier(
            job.mechanism,
            problem.outputs,
            dim=settings.dim,
            depth=settings.depth,
            heads=settings.heads,
            tokens=problem.tokens,
            pool=problem.pool,
            compiled=False,
            backend=settings.neighborhood_backend,
        )


def train_one(
    job: Job, problem: Problem, settings: Settings, *, graphs: bool = True
) -> dict[str, Any]:
    """Train a classifier and test it on held-out clips.

    Args:
        job: which.
        problem: its clips.
        settings: of the training.
        graphs: on a GPU, replay forward and backward as one CUDA graph.

    Returns:
        ``accuracy``, ``task_accuracy`` (with directions: the task of the named class is right,
        whichever its direction; else None),
        ``first_loss`` and ``last_loss`` (means over a tenth of the steps), ``parameters``,
        ``seconds``, ``graphs``.
    """
    begin = time.perf_counter()
    device = problem.frames.device
    cuda = device.type == "cuda"
    model = build(job, problem, settings).to(device)
    torch.manual_seed(job.seed)
    generator = torch.Generator(device).manual_seed(job.seed)
    optimizer = torch.optim.AdamW(
        _groups(model, settings.weight_decay), betas=(0.9, 0.98), fused=cuda
    )
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def forward(clips: Tensor, label: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            scores = model(clips)
        return {"loss": F.cross_entropy(scores.float(), label)}

    run: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    if cuda and graphs:
        run = GraphedStep(forward, lambda loss: loss.backward(), model)
    else:

        def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            values = forward(**inputs)
            values["loss"].backward()
            return values

    count = len(problem.frames)
    losses: list[Tensor] = []
    for step in range(settings.steps):
        index = torch.randint(count, (settings.batch_size,), generator=generator, device=device)
        clips, label = problem.batch(index, generator)
        values = run({"clips": clips, "label": label})
        losses.append(values["loss"].detach().clone())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    model.eval()
    right, right_task, seen = 0, 0, 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=cuda):
        for clips, label in problem.test_batches(settings.batch_size):
            named = model(clips).argmax(1)
            right += int((named == label).sum())
            right_task += int((named // 2 == label // 2).sum())
            seen += len(label)
    course = torch.stack(losses).tolist()
    tenth = max(1, len(course) // 10)
    return {
        "accuracy": right / seen,
        "task_accuracy": right_task / seen if problem.directions else None,
        "first_loss": fmean(course[:tenth]),
        "last_loss": fmean(course[-tenth:]),
        "test_clips": seen,
        "parameters": count_parameters(model),
        "seconds": time.perf_counter() - begin,
        "graphs": cuda and graphs,
    }


class _Problems:
    """Problems of a process, loaded when first asked for."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, device
        self.loaded: dict[str, Problem] = {}

    def __call__(self, task: str) -> Problem:
        if task not in self.loaded:
            self.loaded[task] = load_problem(task, self.settings, self.device)
        return self.loaded[task]


def _sentence(error: Exception) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _work(settings: Settings, device: str, threads: int, pipe: Any) -> None:
    """A process that trains what it is told until it is told nothing more."""
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # streams and captures are made on the present device
    problems = _Problems(settings, device)
    while (order := pipe.recv()) is not None:
        job, graphs = order
        try:
            result = train_one(job, problems(job.task), settings, graphs=graphs)
        except Exception as error:  # noqa: BLE001  told to the parent, which decides
            pipe.send({"error": _sentence(error)})
            return  # whatever a failed capture left behind goes with the process
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # the graph is gone, its memory serves the next one
        pipe.send(result)


class _Worker:
    """A process and what it is at work on."""

    def __init__(self, settings: Settings, device: str, threads: int) -> None:
        self.device = device
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=_work, args=(settings, device, threads, other), daemon=True
        )
        self.process.start()
        other.close()
        self.job: Job | None = None
        self.graphs = True

    def give(self, job: Job, graphs: bool) -> None:
        self.job, self.graphs = job, graphs
        self.pipe.send((job, graphs))

    def take(self) -> dict[str, Any]:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return {"error": f"its process ended with status {self.process.exitcode}"}

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def default_workers(device: str) -> int:
    """Processes that keep the GPUs of ``device`` busy with such small networks; 1 elsewhere."""
    if not device.startswith("cuda"):
        return 1
    return 6 * (max(1, torch.cuda.device_count()) if device == "cuda" else 1)


def spread(device: str, count: int) -> list[str]:
    """Devices of ``count`` processes: in turn all GPUs there are for ``"cuda"``, else ``device``."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i % gpus}" for i in range(count)] if gpus > 1 else [device] * count


def train_jobs(
    jobs: Sequence[Job],
    settings: Settings,
    *,
    device: str,
    workers: int = 1,
    graphs: bool = True,
    max_seconds: float | None = None,
    done: Callable[[Job, dict[str, Any]], None],
) -> bool:
    """Train many classifiers and hand each result over as it comes.

    A training that fails with a CUDA graph is tried again without; one that fails then is handed
    over as ``{"error": sentence}``.

    Args:
        jobs: what to train, in this order. Call :func:`prepare_metaworld` before, so that not every
            process decodes.
        settings: of all of them.
        device: ``"cuda"``, ``"cpu"`` and so on; processes of ``"cuda"`` share all GPUs there are.
        workers: processes side by side; with 1, this process trains, one after another.
        graphs: see :func:`train_one`.
        max_seconds: when so much time is over, what runs is dropped; with one worker, after the
            training that runs.
        done: called with each finished job and its result.

    Returns:
        Whether all jobs are through.

    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    end = math.inf if max_seconds is None else time.monotonic() + max_seconds
    uncaptured = set() if graphs and device.startswith("cuda") else set(MECHANISMS)
    if workers == 1:
        return _train_here(jobs, settings, device, uncaptured, end, done)
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting = list(jobs)
    places = spread(device, min(workers, len(jobs)))
    pool = [_Worker(settings, place, threads) for place in places]
    try:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if worker.job is None and waiting:
                    job = waiting.pop(0)
                    worker.give(job, job.mechanism not in uncaptured)
            left = end - time.monotonic()
            if left <= 0:
                return False
            busy = {worker.pipe: worker for worker in pool if worker.job is not None}
            for pipe in connection.wait(list(busy), timeout=None if left == math.inf else left):
                worker = busy[pipe]  # type: ignore[index]
                result, job = worker.take(), cast(Job, worker.job)
                worker.job = None
                if "error" in result:
                    worker.stop()
                    pool.remove(worker)
                    if worker.graphs:
                        logger.warning("%s: %s; again without a graph", job.key, result["error"])
                        uncaptured.add(job.mechanism)
                        waiting.insert(0, job)
                    else:
                        done(job, result)
                    if waiting:
                        pool.append(_Worker(settings, worker.device, threads))
                else:
                    done(job, result)
    finally:
        for worker in pool:
            worker.stop()
    return True


def _train_here(
    jobs: Sequence[Job],
    settings: Settings,
    device: str,
    uncaptured: set[str],
    end: float,
    done: Callable[[Job, dict[str, Any]], None],
) -> bool:
    """:func:`train_jobs` in this process; ``uncaptured`` are mechanisms to train without a graph."""
    problems = _Problems(settings, device)
    for job in jobs:
        if time.monotonic() >= end:
            return False
        problem = problems(job.task)
        try:
            graphs = job.mechanism not in uncaptured
            try:
                result = train_one(job, problem, settings, graphs=graphs)
            except Exception as error:
                if not graphs:
                    raise
                logger.warning("%s: %s; again without a graph", job.key, _sentence(error))
                uncaptured.add(job.mechanism)
                result = train_one(job, problem, settings, graphs=False)
        except Exception as error:  # noqa: BLE001  one row that fails leaves the others
            result = {"error": _sentence(error)}
        done(job, result)
    return True
