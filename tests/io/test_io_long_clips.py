"""Hours of video in bounded memory: what a process has resident does not grow with the length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stvision.io import Clip, VideoWriter

#: a process that reads a video and prints how many MiB it gained on the way
READ = """
import sys
from stvision.io import open_video

def resident(key):
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

with open_video(sys.argv[1], threads=1) as reader:
    clips = reader.iter_clips(16)
    next(clips), next(clips)
    before, frames = resident("VmHWM"), 32
    for clip in clips:
        frames += len(clip)
    print(frames, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_full_pass_needs_the_memory_of_two_chunks(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    noise = torch.randint(0, 256, (20, 240, 320, 3), dtype=torch.uint8)
    with VideoWriter(path, fps=30, crf=40, preset="ultrafast", threads=1) as writer:
        for _ in range(60):
            writer.write(Clip.from_frames(noise, fps=30).frames)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True
    )
    frames, grown = done.stdout.split()
    assert frames == "1200"
    # the frames come to 264 MiB, one chunk of them to 3.5
    assert float(grown) < 16
