"""``stvision predict`` and the demo, from file to file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support_seer import tiny_seer_pipeline

from stvision.cli.main import main
from stvision.io import Clip, read_clip, save_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_seer_pipeline(height=16, width=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "real.mp4"
    frames = torch.zeros(12, 24, 32, 3)
    for index in range(12):
        frames[index, 4:16, index : index + 12] = torch.tensor([0.9, 0.3, 0.1])
    save_clip(Clip.from_frames(frames, fps=8.0), path)
    return path


def predict(*words):
    return main(["predict", *map(str, words)])


def test_a_clip_becomes_a_playable_video(model, clip, tmp_path, capsys):
    output = tmp_path / "new" / "out.mp4"
    assert predict(clip, "--prompt", "open the drawer", "--model", model, "-o", output) == 0
    made = read_clip(output)
    assert len(made) == 5 and made.frames.shape[1:3] == (16, 16)
    # The model's clips have 4 frames a second, whatever the source has.
    torch.testing.assert_close(made.times.diff(), torch.full((4,), 0.25).double())
    assert "5 frames of 16 x 16 pixels at 4 frames per second" in capsys.readouterr().out


def test_json_says_what_was_done(model, clip, tmp_path, capsys):
    output = tmp_path / "out.gif"
    status = predict(
        clip, "--prompt", "open the drawer", "--model", model, "-o", output, "--json",
        "--seed", 7, "--steps", 2, "--num-frames", 8, "--size", 8, 12, "--memory", "4GB",
    )  # fmt: skip
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [1, 8, 3, 8, 12] and report["seed"] == 7
    assert report["output"] == str(output) and report["memory_plan"]["offload"] == "none"
    assert Image.open(output).n_frames == 8


def test_seed_sentence_and_start_matter(model, clip, tmp_path):
    def frames(name, *words):
        output = tmp_path / f"{name}.png"
        assert predict(clip, "--model", model, "-o", output, "--quiet", *words) == 0
        return torch.frombuffer(
            bytearray(Image.open(output).convert("RGB").tobytes()), dtype=torch.uint8
        )

    base = frames("base", "--prompt", "open the drawer")
    assert torch.equal(base, frames("again", "--prompt", "open the drawer"))
    for name, words in {
        "seed": ("--prompt", "open the drawer", "--seed", "1"),
        "text": ("--prompt", "push the red cup"),
        "start": ("--prompt", "open the drawer", "--start", "0.8"),
        "guidance": ("--prompt", "open the drawer", "--guidance", "1"),
        "negative": ("--prompt", "open the drawer", "--negative-prompt", "blue"),
    }.items():
        assert not torch.equal(base, frames(name, *words)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "x.avi"], "--output must end in one of"),
        (["--size", "17", "16"], "height must be a multiple of 4 pixels, got 17"),
        (["--model", "./nowhere/at/all"], "no pipeline folder at"),
        (["--start", "-1"], "--start must be at least 0"),
        (["--start", "99"], "past the end of the clip"),
    ],
)
def test_wrong_arguments_are_one_sentence(model, clip, capsys, words, message):
    given = [clip, "--prompt", "open", "--model", model, *words]
    assert predict(*given) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_source_is_named(model, capsys):
    assert predict("absent.mp4", "--prompt", "open", "--model", model) == 2
    assert "no clip or image at 'absent.mp4'" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    assert predict("--help") == 0
    text = capsys.readouterr().out
    for option in ("--prompt", "--guidance", "--steps", "--seed", "--negative-prompt", "--memory"):
        assert option in text


def load_demo():
    path = Path(__file__).parents[2] / "demos" / "predict.py"
    spec = importlib.util.spec_from_file_location("demo_predict", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_writes_three_files(model, clip, tmp_path, monkeypatch):
    demo = load_demo()
    words = ["predict.py", "--clip", clip, "--prompt", "open", "--model", model, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert demo.main() == 0
    assert {item.name for item in tmp_path.iterdir()} == {
        "prediction.mp4", "prediction.gif", "prediction.png",
    }  # fmt: skip


def test_the_demo_without_clips_says_so(tmp_path, monkeypatch, capsys):
    demo = load_demo()
    monkeypatch.setattr(demo, "SAMPLES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["predict.py"])
    assert demo.main() == 2
    assert "no clips ship with this installation" in capsys.readouterr().err
