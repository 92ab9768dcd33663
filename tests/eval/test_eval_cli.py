"""``stvision eval`` end to end with a tiny real pipeline and clips on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support_seer import tiny_seer_pipeline

from stvision.cli import eval as eval_command
from stvision.cli import predictions
from stvision.cli.main import main
from stvision.eval.choice import choose_clips
from stvision.eval.store import PredictionStore
from stvision.io import Clip, save_clip
from stvision.models.action import ActionClassifier
from stvision.pipelines.seer import SeerPipeline

TASKS = {
    "door-open-v3": "open the door",
    "door-close-v3": "close the door",
    "push-v3": "push the red cup",
}


class Records:
    """Five clips in memory, one of which cannot be read."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        generator = torch.Generator().manual_seed(0)
        self.records = []
        for number in range(5):
            task = list(TASKS)[number % 3]
            self.records.append(
                SimpleNamespace(
                    key=f"{task}/{number}.mp4",
                    text=TASKS[task],
                    frames=torch.randint(
                        0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=generator
                    ),
                    meta={"task": task, "scene": "door" if "door" in task else None},
                )
            )

    @property
    def entries(self) -> list[SimpleNamespace]:
        """What the index says, without frames."""
        return [SimpleNamespace(key=r.key, captions=[r.text], meta=r.meta) for r in self.records]

    def __getitem__(self, number: int) -> SimpleNamespace:
        self.asked.append(number)
        if number == 4:
            raise ValueError("clip 4 is truncated")
        return self.records[number]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A saved tiny pipeline and classifier, and words of a command that uses them."""
    tiny_seer_pipeline().save_pretrained(tmp_path / "pipeline")
    torch.manual_seed(0)
    classifier = ActionClassifier([*TASKS, "reach-v3"], widths=[8], depth=1)
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(predictions, "open_data", lambda command, shape: Records())
    words = ["eval", "predict", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    words += ["--model", tmp_path / "pipeline", "--classifier", tmp_path / "classifier"]
    words += ["--clips", 4, "--batch-size", 3, "--no-lpips", "--device", "cpu", "--worst", 2]
    return tmp_path, [str(word) for word in words]


def test_predict_scores_resumes_and_writes(world, monkeypatch, capsys):
    folder, words = world
    calls = []
    original = predictions.predict_batch
    monkeypatch.setattr(
        predictions,
        "predict_batch",
        lambda *args: (calls.append([item.key for item in args[3]]), original(*args)),
    )
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [len(keys) for keys in calls] == [3, 1, 3, 1]
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results["columns"]) == ["real", "model", "shuffled sentence", "copy last frame"]
    assert printed["columns"] == results["columns"]
    assert results["protocol"]["clips that could not be read"] == 1
    assert results["protocol"]["clips in shared scenes"] == 3
    spoken = {r["key"]: r["spoken"] for r in results["rows"] if r["column"] == "shuffled sentence"}
    assert spoken["door-open-v3/0.mp4"] == spoken["door-open-v3/3.mp4"] == "door-close-v3"
    assert spoken["push-v3/2.mp4"] != "push-v3"
    assert "instruction accuracy" in (folder / "out" / "results.md").read_text()

    # two strips, worst first, truth above prediction
    strips = sorted((folder / "out" / "worst").iterdir())
    rows = [r for r in results["rows"] if r["column"] == "model"]
    worst = min(rows, key=lambda row: row["psnr"])
    assert len(strips) == 2
    assert strips[0].name.startswith("01-" + worst["key"].replace("/", "_"))
    assert Image.open(strips[0]).height > 2 * 16

    # what was predicted is kept; what is gone is made again, equal although its batch differs
    kept = sorted((folder / "out" / "predictions" / "model").glob("*.npy"))
    before = np.load(kept[2])
    kept[2].unlink()
    calls.clear()
    assert main(words) == 0
    assert [len(keys) for keys in calls] == [1]
    assert np.abs(np.load(kept[2]).astype(int) - before).max() <= 1
    again = json.loads((folder / "out" / "results.json").read_text())
    assert again["columns"]["model"]["psnr"]["value"] == pytest.approx(
        results["columns"]["model"]["psnr"]["value"], abs=0.01
    )


def test_results_tell_steps_spacing_and_guidance_of_each_model(world):
    folder, words = world
    words += ["--no-shuffled", "--classifier", "None", "--clips", "2"]

    def told(*changes):
        out = folder / f"told{len(changes)}"
        assert main([*words, "--out", str(out), *changes]) == 0
        protocol = json.loads((out / "results.json").read_text())["protocol"]
        return [protocol[name] for name in ("steps", "spacing of the steps", "guidance scale")]

    model = SeerPipeline.from_pretrained(folder / "pipeline")
    config, spacing = model.config, model.scheduler.config["timestep_spacing"]
    assert told() == [config["num_inference_steps"], spacing, config["guidance_scale"]]

    other = tiny_seer_pipeline(num_inference_steps=config["num_inference_steps"] + 1)
    assert spacing != "linspace"
    other.scheduler.register_to_config(timestep_spacing="linspace")
    other.save_pretrained(folder / "other")
    baseline = ["--baseline", str(folder / "other"), "--baseline-name", "other"]
    assert told(*baseline) == [
        {"model": config["num_inference_steps"], "other": config["num_inference_steps"] + 1},
        {"model": spacing, "other": "linspace"},
        config["guidance_scale"],
    ]
    assert told(*baseline, "--steps", "2", "--guidance", "0")[::2] == [2, 0]


def test_only_clips_that_are_taken_are_decoded():
    data = Records()
    choice = choose_clips(data, 2, 5)
    # one of each task in turn, by name: close (clips 1 and the broken 4), open (0, 3), push (2)
    assert [item.number for item in choice.items] == data.asked == [1, 0]
    assert choice.sentences == {task: [text] for task, text in TASKS.items()}
    assert choice.scene_tasks["door"] == ["door-open-v3", "door-close-v3"]
    assert choice.unreadable == 0
    assert [item.number for item in choose_clips(data, 9, 5).items] == [1, 0, 2, 3]


def test_predictions_of_other_settings_are_not_mixed(world, capsys):
    _, words = world
    assert main([*words, "--no-shuffled", "--classifier", "None"]) == 0
    assert main([*words, "--no-shuffled", "--classifier", "None", "--steps", "2"]) == 2
    assert "num_inference_steps None, now 2" in capsys.readouterr().err


def test_predictions_of_weights_that_have_changed_are_not_reused(world, capsys):
    folder, words = world
    assert main([*words, "--no-shuffled", "--classifier", "None"]) == 0
    changed = tiny_seer_pipeline()
    with torch.no_grad():
        changed.unet.conv_out.bias += 0.5
    changed.save_pretrained(folder / "pipeline")
    assert main([*words, "--no-shuffled", "--classifier", "None"]) == 2
    shown = capsys.readouterr().err
    assert "(weights" in shown and "choose another --out" in shown


def test_a_prediction_that_is_not_finite_counts_as_failed(tmp_path):
    store = PredictionStore(tmp_path, {"seed": 0})
    store.save("a/b", torch.full((2, 4, 4, 3), float("nan")))
    assert store.has("a/b") and not store.has("a_b")
    assert store.load("a/b").frames is None
    assert "not finite" in store.load("a/b").failure


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(["--data", "nowhere"], "no data folder at 'nowhere'", id="data"),
        pytest.param(["--clips", "1"], "--clips must be at least 2, got 1", id="clips"),
        pytest.param(
            ["--classifier", "nowhere"], "no action classifier 'nowhere'", id="classifier"
        ),
        pytest.param(["--i3d", "nowhere.pt"], "no TorchScript file of I3D", id="i3d"),
        pytest.param(["--lpips"], "at least 21 pixels, these have 16x16", id="lpips"),
    ],
)
def test_wrong_words_get_one_sentence(world, capsys, changes, message):
    _, words = world
    assert main([*words, *changes]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error


def test_clips_of_two_folders(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
    for i in range(3):
        # smooth pictures survive H.264
        coarse = torch.rand(4, 3, 4, 4, generator=generator)
        frames = torch.nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")
        clip = Clip.from_frames((frames.permute(0, 2, 3, 1) * 255).byte())
        save_clip(clip, tmp_path / "real" / f"clip{i}.mp4")
        darker = Clip.from_frames((clip.frames * 0.5).byte())
        save_clip(clip if i == 0 else darker, tmp_path / "fake" / f"clip{i}.mp4")
    (tmp_path / "fake" / "clip2.mp4").write_text("no video")
    save_clip(clip, tmp_path / "real" / "alone.mp4")
    words = ["eval", "clips", str(tmp_path / "real"), str(tmp_path / "fake"), "--no-lpips"]
    assert main([*words, "--json", "-o", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["columns"]["clips"]["failed"] == 1
    assert report["protocol"]["files without a partner"] == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    scores = {row["key"]: row["psnr"] for row in rows if row["column"] == "clips"}
    assert scores["clip0"] == 100 and 5 < scores["clip1"] < 20 and scores["clip2"] is None
    assert main(["eval", "clips", str(tmp_path / "real"), str(tmp_path / "none")]) == 2
    assert "no folder of clips" in capsys.readouterr().err


def test_clips_are_read_from_a_folder_with_an_index(tmp_path):
    lines = []
    for number, (task, text) in enumerate(TASKS.items()):
        frames = torch.full((8, 32, 32, 3), 40 * number + 40, dtype=torch.uint8)
        save_clip(Clip.from_frames(frames), tmp_path / f"{number}.mp4")
        line = {"path": f"{number}.mp4", "caption": text, "task": task, "split": "test"}
        lines.append(json.dumps(line))
    lines.append(json.dumps({"path": "0.mp4", "caption": "x", "task": "y", "split": "train"}))
    (tmp_path / "broken.mp4").write_text("no video")
    lines.append(json.dumps({"path": "broken.mp4", "caption": "x", "task": "z", "split": "test"}))
    (tmp_path / "index.jsonl").write_text("\n".join(lines))
    command = eval_command.Predict(data=tmp_path)
    dataset = predictions.open_data(command, predictions.ClipShape(5, 16, 16, 2))
    choice = choose_clips(dataset, 10, 5)
    assert {item.task: item.text for item in choice.items} == TASKS
    assert choice.unreadable == 1
    # the two tasks of the door begin alike in the simulator's own scenes
    doors = choice.scene_tasks[choice.items[0].scene]
    assert sorted(doors) == ["door-close-v3", "door-open-v3"]
    record = dataset[choice.items[1].number]
    assert record.frames.shape == (5, 16, 16, 3) and record.frames.dtype == torch.uint8
