"""Reading video: ours against bare decord, PyAV and torchcodec.

    python benchmarks/video_io.py --json row.json

Four jobs, opening included. On one H.264 file of 900 frames with a keyframe every 250 (x264's default), in 720p and
in 360p: 32 sorted random frames ("random"); one pass over all frames in RGB batches of 32 frames, as
models are fed ("full"); the same pass one frame at a time ("single"). On 200 different files of 12
frames of 64 x 64: all frames of each ("clips"), as a data set is read. Every measurement is a process
of its own, which first warms up on a small file. CPU seconds count all threads; they are the figure
to compare, as wall time depends on what else runs. Memory is the most that the process had resident
("peak"), and how far that lies above what was resident right after the reader's imports ("above
imports"): ours and torchcodec import torch, which is in the first figure only. The tables show
medians and the ratio to bare decord.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# "stvision-1" is ours with one decoding thread: fewer CPU seconds, more wall time. "decoding" is what
# no reader over this FFmpeg can do without: its decoder with one thread, pictures thrown away.
READERS = ("decord", "stvision", "stvision-1", "pyav", "torchcodec", "decoding")
GRAIN = 18  # levels of noise; chosen so that 720p comes to 4 to 6 Mbit/s, which is printed
JOBS = ("random", "full", "single", "clips")
CLIPS = 200
BATCH = 32  # frames a step of the full pass
TARGETS = {("random", "cpu"): 1.05, ("full", "cpu"): 0.6, ("full", "peak"): 0.5}  # at 720p


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


def read_stvision(
    path: str, indices: list[int] | None, batch: int, threads: int | None = None
) -> int:
    from stvision.io import open_video

    with open_video(path, threads=threads) as reader:
        if indices is not None:
            return len(reader.get(indices))
        return sum(map(len, reader.iter_clips(batch)))  # like the others, holds no clip meanwhile


def read_stvision_1(path: str, indices: list[int] | None, batch: int) -> int:
    return read_stvision(path, indices, batch, threads=1)


def read_decoding(path: str, indices: list[int] | None, batch: int) -> int:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


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


def clips(name: str, folder: str) -> int:
    """All frames of every small file, one decoding thread each where the reader lets one say so."""
    name = name.removesuffix("-1")
    total = 0
    for path in sorted(str(p) for p in Path(folder).glob("clip*.mp4")):
        if name == "stvision":
            from stvision.io import read_clip

            total += len(read_clip(path))
        elif name == "decord":
            import decord

            reader = decord.VideoReader(path, num_threads=1)
            total += len(reader.get_batch(range(len(reader))).asnumpy())
        elif name == "pyav":
            import av

            with av.open(path) as container:
                container.streams.video[0].codec_context.thread_count = 1
                frames = container.decode(video=0)
                total += len(np.stack([f.to_ndarray(format="rgb24") for f in frames]))
        else:
            from torchcodec.decoders import VideoDecoder

            decoder = VideoDecoder(path, dimension_order="NHWC", seek_mode="exact")
            total += len(decoder[:])
    return total


def import_reader(name: str) -> None:
    name = name.removesuffix("-1")
    modules = {
        "stvision": "stvision.io",
        "pyav": "av",
        "decoding": "av",
        "torchcodec": "torchcodec.decoders",
    }
    importlib.import_module(modules.get(name, name))
    if name == "stvision":  # what open_video would import
        importlib.import_module("stvision.io.backends.pyav")


def worker(name: str, job: str, path: str, warm: str, count: int) -> dict[str, float]:
    """One measurement: CPU and wall seconds of the job, MiB of memory."""
    read: Callable[[str, list[int] | None, int], int] = globals()[f"read_{name.replace('-', '_')}"]
    batch = 1 if job == "single" else BATCH
    import_reader(name)
    forget_peak()
    imported = resident_mib("VmRSS")
    read(warm, [0, 1], batch)
    read(warm, None, batch)
    length = int(os.environ["STVISION_BENCH_LENGTH"])
    indices = random_indices(length, count) if job == "random" else None
    expected = 12 * CLIPS if job == "clips" else len(indices) if indices is not None else length
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    got = clips(name, path) if job == "clips" else read(path, indices, batch)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert got == expected, (name, job, got)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    peak = resident_mib("VmHWM")
    return {"cpu": cpu, "wall": wall, "peak": peak, "above": peak - imported}


def has_job(name: str, job: str) -> bool:
    """Whether a reader differs from the others in a job, or does it at all."""
    if name == "stvision-1":
        return job != "clips"
    return name != "decoding" or job == "full"


def forget_peak() -> None:
    """Let Linux measure the peak from here on: imports may have needed more than they kept."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_mib(key: str) -> float:
    """Memory resident now (VmRSS) or at its peak (VmHWM), in MiB.

    ``ru_maxrss``, all there is elsewhere, counts what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(li for li in status.read_text().splitlines() if li.startswith(key))
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(
    jobs: Sequence[str], path: Path, warm: Path, length: int, count: int, repeats: int
) -> dict[str, dict[str, float]]:
    usable = ["stvision", "stvision-1", "pyav", "decoding"]
    usable += [name for name in ("decord", "torchcodec") if importlib.util.find_spec(name)]
    environment = os.environ | {"STVISION_BENCH_LENGTH": str(length)}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):  # interleaved, so that a busy minute hits all alike
        for job in jobs:
            for name in (n for n in READERS if n in usable and has_job(n, job)):
                command = [sys.executable, __file__, "--worker", name, job, str(path), str(warm)]
                done = subprocess.run(
                    [*command, "--random", str(count)],
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


COLUMNS = (
    ("cpu", "CPU s", 2),
    ("wall", "wall s", 2),
    ("peak", "peak MiB", 0),
    ("above", "above imports MiB", 0),
)


def table(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Print a Markdown table; give the ratios to decord by "job/reader/figure"."""
    print("| job | reader | " + " | ".join(f"{title} (ratio)" for _, title, _ in COLUMNS) + " |")
    print("| --- | --- |" + " --- |" * len(COLUMNS))
    ratios: dict[str, float] = {}
    for key, row in results.items():
        job, name = key.split("/")
        base = results.get(f"{job}/decord")
        cells = []
        for figure, _, digits in COLUMNS:
            cell = f"{row[figure]:.{digits}f}"
            if base is not None:
                ratios[f"{key}/{figure}"] = row[figure] / base[figure]
                cell += f" ({ratios[f'{key}/{figure}']:.2f})"
            cells.append(cell)
        print(f"| {job} | {name} | " + " | ".join(cells) + " |")
    return ratios


def check_targets(ratios: dict[str, float]) -> None:
    for (job, figure), limit in TARGETS.items():
        ratio = ratios.get(f"{job}/stvision/{figure}")
        if ratio is not None:
            state = "met" if ratio <= limit else "MISSED"
            print(f"target: {job} {figure} at most {limit} of decord: {ratio:.2f}, {state}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=900, help="length of the files")
    parser.add_argument(
        "--heights", type=int, nargs="+", default=[720, 360], help="pixels; width is 16:9"
    )
    parser.add_argument("--random", type=int, default=32, help="random frames to read")
    parser.add_argument("--repeats", type=int, default=3, help="processes a measurement")
    parser.add_argument("--json", type=Path, help="write the figures as one JSON row")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker, arguments.random)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores; medians of {arguments.repeats}; ratios to decord")
    row: dict[str, Any] = {"benchmark": "video_io", "cores": cores, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.mp4"
        make_video(warm, 8, 64, 96)
        for height in arguments.heights:
            path = Path(folder) / f"{height}.mp4"
            width = height * 16 // 9
            make_video(path, arguments.frames, height, width)
            rate = path.stat().st_size * 8 / 1e6 / (arguments.frames / 30)
            title = f"{arguments.frames} frames {width}x{height} H.264, {rate:.1f} Mbit/s"
            print(f"\n{title}\n", flush=True)
            count, repeats = arguments.random, arguments.repeats
            results = measure(JOBS[:3], path, warm, arguments.frames, count, repeats)
            ratios = table(results)
            if height == 720:
                check_targets(ratios)
            row["files"][title] = {"results": results, "ratios": ratios}
        for number in range(CLIPS):
            make_video(Path(folder) / f"clip{number:03}.mp4", 12, 64, 64, seed=number)
        title = f"{CLIPS} files of 12 frames 64x64 H.264"
        print(f"\n{title}\n", flush=True)
        results = measure(JOBS[3:], Path(folder), warm, 12, 1, arguments.repeats)
        row["files"][title] = {"results": results, "ratios": table(results)}
    if arguments.json:
        arguments.json.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
