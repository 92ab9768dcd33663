"""Video episodes of a simulated robot arm: Meta-World tasks, solved by its scripted policies.

:func:`render` plays episodes of chosen tasks in parallel processes and writes one small video for
each camera and one index for all, which :class:`stvision.datasets.clips.ClipFolder` reads. Tasks,
sentences and shared scenes stand in :mod:`stvision.datasets.metaworld_tasks`, cameras in
:mod:`stvision.datasets.metaworld_simulator`.

Source: Yu et al., "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement
Learning", CoRL 2019 (distribution ``metaworld``, version 3 environments, MuJoCo physics).
"""

import json
import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from stvision.datasets.metaworld_simulator import (
    MODEL_CAMERAS,
    VIEWS,
    Settings,
    Simulator,
    View,
    choose_gl,
)
from stvision.datasets.metaworld_tasks import (
    CAPTIONS,
    DEFAULT_TASKS,
    SCENES,
    SHARED_SCENES,
    SharedScene,
)
from stvision.optional import require

__all__ = [
    "CAPTIONS",
    "DEFAULT_TASKS",
    "MODEL_CAMERAS",
    "SCENES",
    "SHARED_SCENES",
    "VIEWS",
    "RenderSummary",
    "Settings",
    "SharedScene",
    "Simulator",
    "View",
    "choose_gl",
    "render",
    "split_of",
]

INDEX_NAME = "index.jsonl"
#: finished episodes, one line each, written by the workers as they go
JOURNAL_NAME = ".episodes.jsonl"

#: simulators (and OpenGL contexts) that a worker keeps
_KEPT_SIMULATORS = 4


def split_of(seed: int, validation: float = 0.05, test: float = 0.05) -> str:
    """The split to which all episodes of one seed belong, whatever the number of episodes.

    Seeds are spread evenly by multiples of the golden ratio, so that any run of consecutive seeds
    holds about the shares asked for.

    Args:
        seed: of the episode.
        validation: share of seeds in "validation".
        test: share of seeds in "test".

    Returns:
        "train", "validation" or "test".
    """
    place = (seed * 0.6180339887498949) % 1.0
    if place >= 1.0 - test:
        return "test"
    return "validation" if place >= 1.0 - test - validation else "train"


@dataclass
class RenderSummary:
    """What a call of :func:`render` left behind.

    Args:
        index: path of the JSON-lines index.
        episodes: solved episodes in the folder, earlier calls included.
        clips: lines of the index (one an episode and camera).
        failed: task -> seeds that the policy did not solve, which have no clip.
        rendered: episodes played by this call.
        seconds: wall time of this call.
    """

    index: Path
    episodes: int
    clips: int
    failed: dict[str, list[int]] = field(default_factory=dict)
    rendered: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        dropped = sum(map(len, self.failed.values()))
        text = (
            f"{self.episodes} episodes in {self.clips} clips, "
            f"{self.rendered} of them played now in {self.seconds:.1f} s"
        )
        if dropped:
            tasks = ", ".join(f"{task} {len(seeds)}" for task, seeds in self.failed.items())
            text += f"; {dropped} failed and were dropped ({tasks})"
        return f"{text}; index {self.index}"


def render(
    root: str | os.PathLike[str],
    *,
    tasks: Sequence[str] = DEFAULT_TASKS,
    episodes: int = 100,
    first_seed: int = 0,
    cameras: Sequence[str] = ("workspace",),
    size: int | tuple[int, int] = 64,
    num_frames: int = 16,
    same_start: bool = True,
    tail: int = 16,
    max_steps: int = 250,
    crf: int = 12,
    lossless: bool = False,
    validation: float = 0.05,
    test: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> RenderSummary:
    """Render episodes of Meta-World tasks into a folder of clips with one index.

    Every task is played for the seeds ``first_seed`` to ``first_seed + episodes - 1``. An episode
    ends ``tail`` steps after its success; ``num_frames`` frames are taken evenly over it, with
    their true times in seconds. Episodes whose policy fails are dropped and counted. A call that
    was interrupted goes on where it stopped, and a call with more tasks or episodes adds them.

    The index ``index.jsonl`` has one line a clip: path (relative to the folder), caption, captions
    (all phrasings), task, scene, seed, camera, success, fps, split, num_frames, duration (seconds
    from the first to the last frame).

    Args:
        root: folder to write to.
        tasks: Meta-World task names; see :data:`DEFAULT_TASKS` and :data:`CAPTIONS`.
        episodes: seeds played a task.
        first_seed: the first of them.
        cameras: names out of :data:`VIEWS` (framed for small pictures) and :data:`MODEL_CAMERAS`.
        size: pixels: side of a square or (height, width), even.
        num_frames: frames kept of an episode.
        same_start: tasks that share a scene begin with the same picture for the same seed, so that
            only the sentence tells them apart; otherwise as Meta-World begins them.
        tail: steps of 12.5 ms after success.
        max_steps: steps after which an episode has failed.
        crf: quality of the H.264 encoder, 0 to 51; lower is better.
        lossless: keep every value of the pictures.
        validation: share of seeds in the "validation" split.
        test: share of seeds in the "test" split.
        workers: processes; by default the cores that this process may use.
        progress: show a progress bar.

    Returns:
        What lies in the folder now.

    Raises:
        ValueError: an unknown task or camera, a size out of range, or a folder that holds episodes
            of other settings.
        ImportError: ``metaworld`` is not installed.
        RuntimeError: no OpenGL context could be made, or a worker died.
    """
    height, width = (size, size) if isinstance(size, int) else size
    settings = Settings(
        cameras=tuple(cameras),
        height=height,
        width=width,
        num_frames=num_frames,
        tail=tail,
        max_steps=max_steps,
        same_start=same_start,
        crf=crf,
        lossless=lossless,
    )
    for name in tasks:
        if name not in CAPTIONS:
            raise ValueError(f"tasks: {name!r} is none of {', '.join(CAPTIONS)}")
    if len(set(tasks)) != len(tasks) or not tasks:
        raise ValueError(f"tasks: need distinct names, got {list(tasks)}")
    if episodes < 1 or first_seed < 0:
        raise ValueError(
            f"episodes must be at least 1 and first_seed 0, got {episodes} and {first_seed}"
        )
    if min(validation, test) < 0 or validation + test > 1:
        raise ValueError(f"validation {validation} and test {test} are shares of at most 1 in all")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    _check_installed()

    from time import perf_counter

    began = perf_counter()
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    journal = _Journal(folder, settings)
    wanted = [
        (task, seed)
        for task in tasks
        for seed in range(first_seed, first_seed + episodes)
        if (task, seed) not in journal.done
    ]
    for task in tasks:
        for leftover in (folder / task).glob(".*.mp4"):
            leftover.unlink()  # of a process that was killed while it wrote
    try:
        if wanted:
            _play_all(folder, settings, wanted, workers or _cores(), progress)
    finally:
        # also after an interruption: what is finished can be read
        journal = _Journal(folder, settings)
        clips = _write_index(folder, journal, settings, validation, test)
    failed: dict[str, list[int]] = {}
    for (task, seed), entry in sorted(journal.done.items()):
        if not entry["success"]:
            failed.setdefault(task, []).append(seed)
    solved = sum(bool(entry["success"]) for entry in journal.done.values())
    return RenderSummary(
        folder / INDEX_NAME, solved, clips, failed, len(wanted), perf_counter() - began
    )


def _check_installed() -> None:
    # found, not imported: mujoco must not be loaded before its OpenGL platform is chosen
    from importlib.util import find_spec

    if find_spec("metaworld") is None or find_spec("mujoco") is None:
        require("metaworld", extra="sim")


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Journal:
    """Finished episodes of a folder: a first line with the settings, then one line each."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.path = folder / JOURNAL_NAME
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        mine = json.loads(json.dumps(asdict(settings)))
        if not self.path.exists():
            _append_line(self.path, {"settings": mine})
            return
        for entry in _read_lines(self.path):
            if "settings" in entry:
                theirs = entry["settings"]
                differing = [
                    f"{name} is {theirs.get(name)!r} there and {value!r} here"
                    for name, value in mine.items()
                    if theirs.get(name) != value
                ]
                if differing:
                    raise ValueError(
                        f"{folder} holds episodes of other settings ({'; '.join(differing)}); "
                        "choose another folder"
                    )
            elif all((folder / clip["path"]).exists() for clip in entry["clips"]):
                self.done[entry["task"], entry["seed"]] = entry


def _append_line(path: Path, entry: dict[str, Any]) -> None:
    # one write in append mode: lines of several processes never mix
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(entry) + "\n").encode())
    finally:
        os.close(descriptor)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the end of a write that was killed
            if isinstance(entry, dict):
                yield entry


def _play_all(
    folder: Path,
    settings: Settings,
    wanted: list[tuple[str, int]],
    workers: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    chosen = choose_gl()
    workers = min(workers, len(wanted))
    with tqdm(total=len(wanted), unit="episode", disable=not progress, desc="render") as bar:
        if workers == 1:
            for task, seed in wanted:
                _play_one(folder, settings, task, seed)
                bar.update()
            _close_simulators()
            return
        # pieces of one task, so that a worker makes few simulators; small enough to share evenly
        length = max(1, min(32, len(wanted) // (workers * 8)))
        pieces: list[tuple[str, list[int]]] = []
        for task, seed in wanted:
            if pieces and pieces[-1][0] == task and len(pieces[-1][1]) < length:
                pieces[-1][1].append(seed)
            else:
                pieces.append((task, [seed]))
        pool = ProcessPoolExecutor(
            workers,
            # a forked process would share the OpenGL and thread state of this one
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(chosen, list(sys.path)),
        )
        running: set[Future[int]] = {
            pool.submit(_play_piece, str(folder), settings, task, seeds) for task, seeds in pieces
        }
        try:
            with _deferred_interrupt() as interrupted:
                while running and not interrupted:
                    finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        bar.update(future.result())
                # an interruption lets every worker end the episode that it is playing
                _stop_workers(pool, running, at_once=bool(interrupted))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a rendering process died (out of memory, or a crash in the OpenGL driver with "
                f"MUJOCO_GL={chosen}); finished episodes are kept, run the same command again"
            ) from error
        finally:
            _stop_workers(pool, running, at_once=True)
        if interrupted:
            raise KeyboardInterrupt


def _stop_workers(pool: ProcessPoolExecutor, running: set[Future[int]], at_once: bool) -> None:
    processes = list((getattr(pool, "_processes", None) or {}).values())
    for future in running:
        future.cancel()
    if at_once:
        for process in processes:
            process.terminate()  # caught by the worker, which ends its episode first
    pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list: raised inside the pool's own locks it would leave them held."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(gl: str, path: list[str]) -> None:
    # Ctrl-C is the parent's business; it asks by SIGTERM to stop after the present episode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_soon)
    os.environ["MUJOCO_GL"] = gl
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)


#: in a worker: whether it is playing an episode, and whether it was asked to stop after it
_worker = {"playing": False, "stop": False}


def _stop_soon(number: int, frame: object) -> None:
    _worker["stop"] = True
    if not _worker["playing"]:
        os._exit(0)


def _play_piece(folder: str, settings: Settings, task: str, seeds: list[int]) -> int:
    for seed in seeds:
        _worker["playing"] = True
        _play_one(Path(folder), settings, task, seed)
        _worker["playing"] = False
        if _worker["stop"]:
            os._exit(0)
    return len(seeds)


_simulators: OrderedDict[tuple[str, Settings], Simulator] = OrderedDict()


def _simulator(task: str, settings: Settings) -> Simulator:
    key = (task, settings)
    if key not in _simulators:
        _simulators[key] = Simulator(task, settings)
        while len(_simulators) > _KEPT_SIMULATORS:
            _simulators.popitem(last=False)[1].close()
    _simulators.move_to_end(key)
    return _simulators[key]


def _close_simulators() -> None:
    while _simulators:
        _simulators.popitem()[1].close()


def _play_one(folder: Path, settings: Settings, task: str, seed: int) -> None:
    """Play one episode, write its clips, then its line of the journal."""
    import torch

    from stvision.io import Clip, VideoWriter

    simulator = _simulator(task, settings)
    episode = simulator.play(seed)
    entry: dict[str, Any] = {"task": task, "seed": seed, "success": episode.success, "clips": []}
    if episode.success:
        last = len(episode.poses) - 1
        steps = np.round(np.linspace(0, last, settings.num_frames)).astype(int)
        times = torch.from_numpy(steps * episode.dt)
        fps = (settings.num_frames - 1) / (last * episode.dt)
        for camera in settings.cameras:
            frames = torch.from_numpy(simulator.picture(episode, steps.tolist(), camera))
            path = Path(task) / f"{camera}-{seed:06d}.mp4"
            (folder / path).parent.mkdir(exist_ok=True)
            with VideoWriter(
                folder / path, crf=settings.crf, lossless=settings.lossless, threads=1
            ) as writer:
                writer.write(Clip(frames, times, fps))
            entry["clips"].append(
                {
                    "path": path.as_posix(),
                    "camera": camera,
                    "fps": fps,
                    "num_frames": settings.num_frames,
                    "duration": last * episode.dt,
                }
            )
    _append_line(folder / JOURNAL_NAME, entry)


def _write_index(
    folder: Path, journal: _Journal, settings: Settings, validation: float, test: float
) -> int:
    lines = []
    for (task, seed), entry in sorted(journal.done.items()):
        captions = CAPTIONS[task]
        if task == "push-back-v3" and not settings.same_start:
            # Meta-World's own mark of that goal is green; the shared scene has a green one already
            captions = tuple(caption.replace("yellow", "green") for caption in captions)
        for clip in entry["clips"]:
            line = {
                "path": clip["path"],
                "caption": captions[seed % len(captions)],
                "captions": list(captions),
                "task": task,
                "scene": SCENES[task],
                "seed": seed,
                "camera": clip["camera"],
                "success": True,
                "fps": clip["fps"],
                "split": split_of(seed, validation, test),
                "num_frames": clip["num_frames"],
                "duration": clip["duration"],
            }
            lines.append(json.dumps(line))
    temporary = folder / f".{INDEX_NAME}.{os.getpid()}"
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, folder / INDEX_NAME)
    return len(lines)
