"""Reading video: ours against bare decord, PyAV and torchcodec.

    python benchmarks/video_io.py --json row.json

Three jobs on one 720p H.264 file with a keyframe every 250 frames, opening included: 32 sorted
random frames ("random"); one pass over all frames in RGB batches of 32 frames, as models are fed
("full"); the same pass one frame at a time ("single"). Every measurement is a process of its own, which
first warms up on a small file. CPU seconds count all threads; they are the figure to compare, as wall
time depends on what else runs. The table shows medians and the ratio to bare decord.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

READERS = ("decord", "stvision", "pyav", "torchcodec")
GRAIN = 14  # levels; gives about 5 Mbit/s at 720p, as footage has
JOBS = ("random", "full", "single")
BATCH = 32  # frames a step of the full pass
TARGETS = {("random", "cpu"): 1.05, ("full", "cpu"): 0.6, ("full", "peak"): 0.5}


def make_video(path: Path, frames: int, height: int, width: int, seed: int = 0) -> None:
    """A textured scene under a moving camera, with two objects and film grain."""
    import torch
    from torch.nn import functional as F

    from stvision.io import VideoWriter

    generator = torch.Generator().manual_seed(seed)
    scene = torch.zeros(3, height + 256, width + 256)
    for scale in (4, 16, 64):
        coarse = torch.rand(1, 3, height // scale + 2, width // scale + 2, generator=generator)
        scene += F.interpolate(coarse, scene.shape[1:], mode="bilinear")[0] * scale / 84
    scene = (scene * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    random = np.random.default_rng(seed)
    grain = random.integers(0, GRAIN, (16, height, width, 1), dtype=np.uint8)
    with VideoWriter(path, fps=30, crf=23, preset="veryfast") as writer:
        for t in range(frames):
            y, x = int(128 + 100 * np.sin(t / 40)), int(128 + 100 * np.cos(t / 55))
            picture = scene[y : y + height, x : x + width] // 2 + np.roll(grain[t % 16], 5 * t, 1)
            for k, color in enumerate(((250, 40, 30), (30, 60, 240))):
                top = int((height - 80) * (0.5 + 0.5 * np.sin(t / 23 + k)))
                left = int((width - 80) * (0.5 + 0.5 * np.cos(t / 31 + 2 * k)))
                picture[top : top + 80, left : left + 80] = color
            writer.write(picture[None])


def random_indices(length: int, count: int, seed: int = 1) -> list[int]:
    """Sorted distinct frame numbers."""
    picks = np.random.default_rng(seed).choice(length, min(count, length), replace=False)
    return sorted(int(i) for i in picks)


def read_stvision(path: str, indices: list[int] | None, batch: int) -> int:
    from stvision.io import open_video

    with open_video(path) as reader:
        if indices is not None:
            return len(reader.get(indices))
        return sum(len(clip) for clip in reader.iter_clips(batch))


def read_decord(path: str, indices: list[int] | None, batch: int) -> int:
    import decord

    reader = decord.VideoReader(path)
    if indices is not None:
        return len(reader.get_batch(indices).asnumpy())
    if batch == 1:
        return sum(len(reader[i].asnumpy()[None]) for i in range(len(reader)))
    parts = (range(i, min(i + batch, len(reader))) for i in range(0, len(reader), batch))
    return sum(len(reader.get_batch(part).asnumpy()) for part in parts)


def read_pyav(path: str, indices: list[int] | None, batch: int) -> int:
    """As one writes it by hand: seek to each wanted second and decode up to it."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames: list[np.ndarray] = []
        if indices is None:
            count = 0
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == batch:
                    count += len(np.stack(frames))
                    frames = []
            return count + len(frames)
        ticks = 1 / (stream.average_rate * stream.time_base)
        for index in indices:
            container.seek(int(index * ticks), stream=stream)
            for frame in container.decode(stream):
                if frame.pts >= index * ticks:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    break
        return len(np.stack(frames))


def read_torchcodec(path: str, indices: list[int] | None, batch: int) -> int:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", seek_mode="exact")
    if indices is not None:
        return len(decoder.get_frames_at(indices).data)
    if batch == 1:
        return sum(len(frame[None]) for frame in decoder)
    starts = range(0, len(decoder), batch)
    ends = (min(start + batch, len(decoder)) for start in starts)
    return sum(
        len(decoder.get_frames_in_range(start, end).data)
        for start, end in zip(starts, ends, strict=True)
    )


def worker(name: str, job: str, path: str, warm: str, count: int) -> dict[str, float]:
    """One measurement: CPU and wall seconds of the job, peak resident MiB of the process."""
    read: Callable[[str, list[int] | None, int], int] = globals()[f"read_{name}"]
    batch = 1 if job == "single" else BATCH
    read(warm, [0, 1], batch)
    read(warm, None, batch)
    length = int(os.environ["STVISION_BENCH_LENGTH"])
    indices = random_indices(length, count) if job == "random" else None
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    got = read(path, indices, batch)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert got == (len(indices) if indices is not None else length), (name, job, got)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu": cpu, "wall": wall, "peak": peak_mib()}


def peak_mib() -> float:
    """Most memory this process has had resident, in MiB.

    ``ru_maxrss`` would count what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(li for li in status.read_text().splitlines() if li.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(arguments: argparse.Namespace, path: Path, warm: Path) -> dict[str, Any]:
    usable = ["stvision", "pyav"]
    usable += [name for name in ("decord", "torchcodec") if importlib.util.find_spec(name)]
    environment = os.environ | {"STVISION_BENCH_LENGTH": str(arguments.frames)}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):  # interleaved, so that a busy minute hits all alike
        for job in JOBS:
            for name in (n for n in READERS if n in usable):
                command = [sys.executable, __file__, "--worker", name, job, str(path), str(warm)]
                done = subprocess.run(
                    [*command, "--random", str(arguments.random)],
                    check=False,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=600,
                )
                if done.returncode:
                    print(f"{name} {job}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                runs.setdefault((job, name), []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        f"{job}/{name}": {k: statistics.median(r[k] for r in rows) for k in rows[0]}
        for (job, name), rows in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=900, help="length of the file")
    parser.add_argument("--height", type=int, default=720, help="pixels")
    parser.add_argument("--width", type=int, default=1280, help="pixels")
    parser.add_argument("--random", type=int, default=32, help="random frames to read")
    parser.add_argument("--repeats", type=int, default=3, help="processes a measurement")
    parser.add_argument("--json", type=Path, help="write the figures as one JSON row")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker, arguments.random)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path, warm = Path(folder) / "video.mp4", Path(folder) / "warm.mp4"
        make_video(path, arguments.frames, arguments.height, arguments.width)
        make_video(warm, 8, 64, 96)
        size = path.stat().st_size / 2**20
        results = measure(arguments, path, warm)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    title = f"{arguments.frames} frames {arguments.width}x{arguments.height} H.264, {size:.1f} MiB"
    print(f"{title}; {platform.machine()}, {cores} cores; medians of {arguments.repeats}")
    print(
        f"{'job':8}{'reader':12}{'CPU s':>8}{'ratio':>7}{'wall s':>8}{'ratio':>7}{'MiB':>8}{'ratio':>7}"
    )
    ratios: dict[str, float] = {}
    for job in JOBS:
        base = results.get(f"{job}/decord")
        for name in READERS:
            row = results.get(f"{job}/{name}")
            if row is None:
                continue
            line = f"{job:8}{name:12}"
            for key, digits in (("cpu", 2), ("wall", 2), ("peak", 0)):
                ratio = row[key] / base[key] if base else float("nan")
                ratios[f"{job}/{name}/{key}"] = ratio
                line += f"{row[key]:8.{digits}f}{ratio:7.2f}"
            print(line)
    for (job, key), limit in TARGETS.items():
        ratio = ratios.get(f"{job}/stvision/{key}")
        if ratio is not None and not np.isnan(ratio):
            state = "met" if ratio <= limit else "MISSED"
            print(f"target: {job} {key} at most {limit} of decord: {ratio:.2f}, {state}")
    if arguments.json:
        row = {"benchmark": "video_io", "file": title, "cores": cores, "results": results}
        arguments.json.write_text(json.dumps(row | {"ratios": ratios}) + "\n")


if __name__ == "__main__":
    main()
