"""``stvision predict`` and the demo, from file to file."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support_seer import tiny_seer_pipeline

from stvision.cli.main import main
from stvision.io import Clip, VideoWriter, read_clip, save_clip
from stvision.pipelines.seer import SeerPipeline


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
        "--broadway", "animatediff", "--broadway-beta", 1.25,
    )  # fmt: skip
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [1, 8, 3, 8, 12] and report["seed"] == 7
    assert (report["broadway"]["alpha"], report["broadway"]["beta"]) == (0.6, 1.25)
    assert report["output"] == str(output) and report["memory_plan"]["offload"] == "none"
    assert Image.open(output).n_frames == 8


@pytest.mark.gpu
def test_fast_mode_writes_the_same_pictures(model, clip, tmp_path):
    made = []
    for name, words in {"plain": (), "fast": ("--fast", "--memory", "8GB")}.items():
        output = tmp_path / f"{name}.png"
        given = ("--prompt", "open the drawer", "--model", model, "--device", "cuda")
        assert predict(clip, *given, "-o", output, "--quiet", "--num-frames", 8, *words) == 0
        made.append(pixels(output))
    assert abs(made[0] - made[1]).max() <= 1


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
        "broadway": ("--prompt", "open the drawer", "--broadway", "videocrafter2"),
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
        (["--broadway", "wan"], "preset must be one of 'animatediff', 'videocrafter2', got 'wan'"),
        (["--broadway", "animatediff", "--broadway-alpha", "2"], "alpha must be between 0 and 1"),
        (["--broadway-beta", "2"], "--broadway-beta needs --broadway PRESET"),
        (["--fast", "--device", "cpu"], "--fast replays CUDA graphs and needs a CUDA device"),
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
    for option in (
        "--prompt",
        "--guidance",
        "--steps",
        "--seed",
        "--negative-prompt",
        "--memory",
        "--fast",
        "--broadway",
    ):
        assert option in text


def load_demo():
    path = Path(__file__).parents[2] / "demos" / "predict.py"
    spec = importlib.util.spec_from_file_location("demo_predict", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(model, tmp_path, monkeypatch):
    """Call the demo with the tiny model and two shipped clips; its files go to ``tmp_path/new``."""
    module = load_demo()
    samples = tmp_path / "samples"
    samples.mkdir()
    lines = []
    for name, color in (("first", 0.2), ("second", 0.8)):
        frames = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(1)) * color
        save_clip(Clip.from_frames(frames, fps=12.5), samples / f"{name}.mp4")
        lines.append(json.dumps({"path": f"{name}.mp4", "caption": "open the drawer", "fps": 12.5}))
    (samples / "index.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(module, "SAMPLES", samples)

    def call(*words, known=True):
        given = ["predict.py", "--out", tmp_path / "new", "--device", "cpu", *words]
        given += ["--model", model] if known else []
        monkeypatch.setattr(sys, "argv", [str(word) for word in given])
        return module.main()

    call.module, call.out = module, tmp_path / "new"
    return call


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_demo_writes_film_picture_and_strip(demo, capsys):
    assert demo() == 0
    assert {item.name for item in demo.out.iterdir()} == {
        "predict.mp4", "predict.gif", "predict_strip.png",
    }  # fmt: skip
    made = read_clip(demo.out / "predict.mp4")
    assert len(made) == 5 and made.fps == pytest.approx(12.5)
    said = capsys.readouterr().out
    assert "predicted in" in said and str(demo.out / "predict_strip.png") in said
    assert "first.mp4: 'open the drawer'" in said


def test_the_strip_shows_the_truth_above_the_prediction(demo):
    assert demo() == 0
    strip = pixels(demo.out / "predict_strip.png")
    truth = read_clip(demo.module.SAMPLES / "first.mp4").frames.numpy().astype(int)
    # Frames of 16 pixels with gaps of 2, the last one at the right edge.
    for frame in range(5):
        right = strip.shape[1] - 2 - (4 - frame) * 18
        shown = strip[2:18, right - 16 : right]
        assert abs(shown - truth[frame]).max() <= 1
    pipe = tiny_seer_pipeline(height=16, width=16)
    made = pipe("open the drawer", truth.astype(np.uint8)[:2], generator=0, output_type="np").frames
    below = strip[20:36, -18:-2]
    assert abs(below - made[0, 4] * 255).max() < 2


def test_the_demo_takes_other_clips_and_sentences(demo, clip, capsys):
    assert demo("--clip", 2) == 0
    second = pixels(demo.out / "predict_strip.png")
    assert demo("--clip", 1) == 0
    assert abs(second - pixels(demo.out / "predict_strip.png")).max() > 20
    capsys.readouterr()
    # A file of the user's: its frames are spread over the model's window.
    assert demo("--clip", clip, "--prompt", "push the red cup") == 0
    assert "real.mp4: 'push the red cup', 5 frames of 16 x 16" in capsys.readouterr().out
    assert demo("--clip", clip) == 2
    assert "give one with --prompt" in capsys.readouterr().err
    assert demo("--clip", 3) == 2
    assert "1 first.mp4, 2 second.mp4; got 3" in capsys.readouterr().err
    assert demo("--clip", "absent.mp4") == 2
    assert "no clip at 'absent.mp4'" in capsys.readouterr().err


def test_the_demo_shows_all_clips_in_one_gallery(demo, capsys):
    assert demo("--all") == 0
    names = sorted(item.name for item in demo.out.iterdir())
    assert names == ["predict_gallery.gif", "predict_gallery.png"]
    wall = read_clip(demo.out / "predict_gallery.gif").frames[0].numpy().astype(int)
    first = read_clip(demo.module.SAMPLES / "first.mp4").frames[0].numpy().astype(int)
    assert wall.shape == (2 * 2 * 16, 4 * 2 * 16, 3)
    assert abs(wall[:32:2, :32:2] - first).mean() < 12  # of 256 colours for all
    assert (wall[:, 64:] == 255).all()  # two of four places are taken
    gallery = pixels(demo.out / "predict_gallery.png")
    assert gallery.shape[0] == 4 * 18 + 2
    assert demo("--all", "--clip", 1) == 2
    assert "leave out --clip" in capsys.readouterr().err
    assert demo("--clip", 2) == 0  # its rows of the gallery are those of its own strip
    own = pixels(demo.out / "predict_strip.png")
    assert (gallery[38:, -80:] == own[2:, -80:]).all()


def test_the_demo_without_clips_or_weights_says_so(demo, tmp_path, monkeypatch, capsys):
    import stvision

    monkeypatch.setattr(stvision, "__file__", str(tmp_path / "__init__.py"))
    assert demo(known=False) == 2
    error = capsys.readouterr().err
    assert "'default' are not part of this installation" in error and "Traceback" not in error
    monkeypatch.setattr(demo.module, "SAMPLES", tmp_path / "nowhere")
    assert demo() == 2
    assert "no clips ship with this installation" in capsys.readouterr().err
    assert not demo.out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", 0], "--num-inference-steps must be at least 1, got 0"),
        (["--num-frames", 1], "--num-frames must be at least 2, got 1"),
        (["--fps", 0], "--fps must be above 0, got 0.0"),
        (["--memory", "lots"], "a byte budget is a number or text such as '8GB'"),
        (["--device", "nope"], "--device must be cpu, cuda, cuda:1 ..., got 'nope'"),
        (["--device", "cuda:99"], "--device cuda:99 asks for a GPU, and torch"),
        (["--start", 99], "start 99.0 s is past the end of the clip"),
    ],
)
def test_wrong_words_are_said_before_weights_are_loaded(
    model, clip, monkeypatch, capsys, words, said
):
    monkeypatch.setattr(SeerPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert predict(clip, "--prompt", "push", "--model", model, *words) == 2
    shown = capsys.readouterr().err.strip()
    assert said in shown and len(shown.splitlines()) == 1


def test_a_source_that_is_no_clip_is_said_before_weights_are_loaded(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SeerPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "text.mp4").write_text("no video")
    assert predict(tmp_path / "text.mp4", "--prompt", "push", "--model", model) == 2
    assert "not a video file" in capsys.readouterr().err


def test_quiet_shows_no_bar_of_any_library(model, clip, tmp_path, capsys):
    given = ("--prompt", "push", "--model", model, "-o", tmp_path / "out.png", "--steps", 1)
    assert predict(clip, *given, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert predict(clip, *given) == 0
    assert "Loading" in capsys.readouterr().err


def test_a_long_video_is_written_window_by_window(model, clip, tmp_path, monkeypatch, capsys):
    """The frames are those of the pipeline, and none waits for the end of the prediction."""
    events = []
    write = VideoWriter.write
    monkeypatch.setattr(
        VideoWriter, "write", lambda *args: (events.append(len(args[1])), write(*args))
    )
    given = ("--prompt", "push", "--model", model, "--steps", 1, "--num-frames", 12)
    assert predict(clip, *given, "-o", tmp_path / "long.mp4") == 0
    assert events == [5, 3, 3, 1] and len(read_clip(tmp_path / "long.mp4")) == 12
    assert "12 frames of 16 x 16" in capsys.readouterr().out
    assert predict(clip, *given, "-o", tmp_path / "frames", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [1, 12, 3, 16, 16] and len(report["times"][0]) == 12
    pictures = sorted((tmp_path / "frames").iterdir())
    assert [item.name for item in pictures] == [f"{number:06d}.png" for number in range(12)]
    pipe = SeerPipeline.from_pretrained(model)
    whole = pipe("push", clip, num_frames=12, num_inference_steps=1, fps=4.0, generator=0)
    for picture, expected in zip(pictures, whole.frames[0], strict=True):
        np.testing.assert_allclose(
            np.asarray(Image.open(picture), int), np.asarray(expected, int), atol=1
        )
    assert predict(clip, *given, "-o", tmp_path / "frames") == 2
    assert "is a folder that is not empty" in capsys.readouterr().err


def test_an_interrupted_prediction_keeps_its_finished_frames(
    model, clip, tmp_path, monkeypatch, capsys
):
    stream = SeerPipeline.stream

    def stopped(self, *args, **options):
        chunks = stream(self, *args, **options)
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(SeerPipeline, "stream", stopped)
    given = ("--prompt", "push", "--model", model, "--steps", 1, "--num-frames", 12)
    assert predict(clip, *given, "-o", tmp_path / "out.mp4") == 130
    assert len(read_clip(tmp_path / "out.mp4")) == 5
    assert "interrupted; wrote" in capsys.readouterr().out
