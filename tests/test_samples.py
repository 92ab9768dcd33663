"""The clips that ship: readable, described, and of the split that no model is trained on."""

from importlib.resources import files
from pathlib import Path

from stvision.datasets.clips import ClipFolder
from stvision.datasets.metaworld import split_of
from stvision.datasets.metaworld_tasks import CAPTIONS


def test_samples_are_what_their_index_says() -> None:
    root = Path(str(files("stvision"))) / "samples"
    clips = ClipFolder(root, split="test", num_frames=12, size=(64, 64))
    assert len(clips) == len(list(root.glob("*.mp4"))) == 8
    for clip in clips:
        assert clip.frames.shape == (12, 64, 64, 3)
        assert clip.text == CAPTIONS[clip.meta["task"]][0]
        assert split_of(clip.meta["seed"]) == "test"
        # something happens: the last frame is not the first
        assert (clip.frames[-1].float() - clip.frames[0].float()).abs().mean() > 4
        assert abs(float(clip.times[-1] - clip.times[0]) - clip.meta["duration"]) < 0.01
