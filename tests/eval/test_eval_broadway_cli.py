"""``stvision eval broadway`` end to end with a tiny real pipeline and clips in memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support_seer import tiny_seer_pipeline

from stvision.cli import predictions
from stvision.cli.eval_broadway import SETTINGS, parse_settings
from stvision.cli.main import main
from stvision.eval.choice import choose_clips
from stvision.guidance import PRESETS, BroadWay
from stvision.io import read_clip
from stvision.models.action import ActionClassifier
from stvision.pipelines.seer import SeerPipeline

TASKS = {"door-open-v3": "open the door", "door-close-v3": "close the door", "push-v3": "push"}


class Records:
    """Four clips in memory, two of which begin in one scene."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.records = []
        for number in range(4):
            task = list(TASKS)[number % 3]
            shape = (5, 16, 16, 3)
            self.records.append(
                SimpleNamespace(
                    key=f"{task}/{number}.mp4",
                    text=TASKS[task],
                    frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                    meta={"task": task, "scene": "door" if "door" in task else None},
                )
            )

    @property
    def entries(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(key=r.key, captions=[r.text], meta=r.meta) for r in self.records]

    def __getitem__(self, number: int) -> SimpleNamespace:
        return self.records[number]


@pytest.fixture
def world(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    tiny_seer_pipeline(num_inference_steps=6).save_pretrained(tmp_path / "pipeline")
    torch.manual_seed(0)
    classifier = ActionClassifier([*TASKS, "reach-v3"], widths=[8], depth=1)
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(predictions, "open_data", lambda command, shape: Records())
    words = ["eval", "broadway", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    words += ["--model", tmp_path / "pipeline", "--classifier", tmp_path / "classifier"]
    words += ["--clips", 4, "--batch-size", 3, "--no-lpips", "--device", "cpu", "--pairs", 1]
    words += ["--flow", "farneback", "--settings", "mine=animatediff,beta:1.3", "too much=beta:40"]
    return tmp_path, [str(word) for word in words]


def test_table_of_settings_resumes_and_holds_what_was_measured(world, monkeypatch, capsys):
    folder, words = world
    calls = []
    original = predictions.predict_batch

    def counted(command, pipeline, dataset, batch, *rest):
        calls.append((len(batch), pipeline._broadway))
        return original(command, pipeline, dataset, batch, *rest)

    monkeypatch.setattr(predictions, "predict_batch", counted)
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    # the plain model twice (prediction, energies), each setting once, in batches of 3 and 1
    assert [size for size, _ in calls] == [3, 3, 1, 1, 3, 1, 3, 1]
    assert calls[0][1] is None and calls[1][1] == BroadWay(alpha=0, beta=1)
    assert calls[4][1] == BroadWay.from_preset("animatediff", beta=1.3)

    held = json.loads((folder / "out" / "broadway.json").read_text())
    assert held["figures"] == printed["figures"] and held["settings"]["too much"]["beta"] == 40
    assert list(held["figures"]) == ["real", "plain", "mine", "too much"]
    assert held["figures"]["real"]["energy"] is None
    rows = held["motion"]["rows"]
    by = {(r["column"], r["key"]): r for r in rows}
    gain = held["differences"]["mine"]["energy"]
    expected = np.mean([by["mine", k]["energy"] - by["plain", k]["energy"] for _, k in by if ("mine", k) in by])  # fmt: skip
    assert gain["value"] == pytest.approx(expected) and gain["count"] == 4
    assert held["figures"]["too much"]["energy"]["value"] > 2 * by["plain", rows[0]["key"]]["energy"]  # fmt: skip
    named = {(r["column"], r["key"]): r["named"] == r["task"] for r in held["prediction"]["rows"]}
    keys = [key for column, key in named if column == "plain"]
    change = np.mean([named["mine", k] - float(named["plain", k]) for k in keys])
    assert held["differences"]["mine"]["accuracy"]["value"] == pytest.approx(change)
    assert held["differences"]["mine"]["accuracy_shared"]["count"] == 3
    text = (folder / "out" / "broadway.md").read_text()
    assert "minus plain" in text and "- too much: alpha 0.6, beta 40, tau 7, fraction 0.2" in text

    # energies are the mean over modules and the first fifth of six steps, of the call itself
    pipe = SeerPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_broadway("animatediff", beta=1.3)
    monkeypatch.setattr(predictions, "predict_batch", original)
    choice = choose_clips(Records(), 4, 5)
    command = SimpleNamespace(num_inference_steps=None, guidance_scale=None, seed=0)
    item = choice.items[2]
    shape = predictions.ClipShape(5, 16, 16, 2)
    texts = {item.key: item.text}
    original(command, pipe, Records(), [item], texts, shape, lambda key, frames: None)
    records = pipe.broadway_run.records
    assert {r.step for r in records} == {0, 1}
    energy = np.mean([float(r.after) for r in records])
    assert by["mine", item.key]["energy"] == pytest.approx(energy, rel=1e-4)

    pair = read_clip(next((folder / "out" / "pairs" / "mine").glob("*.mp4")))
    assert pair.frames.shape[1:3] == (16, 16 + 4 + 16)

    # what is there is not made again; what is gone is
    monkeypatch.setattr(predictions, "predict_batch", counted)
    calls.clear()
    next((folder / "out" / "predictions" / "too-much").glob("*.npy")).unlink()
    assert main(words) == 0
    assert [size for size, _ in calls] == [1] and calls[0][1].beta == 40
    assert "| temporal-attention energy |" in capsys.readouterr().out
    assert main([*words[:-1], "too much=beta:50"]) == 2
    assert "made with other settings (broadway" in capsys.readouterr().err


def test_settings_are_read_or_refused():
    made = parse_settings(SETTINGS)
    assert made["animatediff"] == BroadWay.from_preset("animatediff")
    assert made["videocrafter2"].beta == PRESETS["videocrafter2"]["beta"]
    assert parse_settings(("x=videocrafter2,tau:3,fraction:0.5",))["x"] == BroadWay(
        alpha=0.1, beta=10, tau=3, fraction=0.5
    )
    for words, message in (
        (("x",), "NAME=OPTIONS"),
        (("plain=alpha:1",), "is taken"),
        (("x=alpha:1", "x=beta:2"), "is taken"),
        (("x=gamma:1",), "got 'gamma:1'"),
        (("x=alpha:much",), "got 'alpha:much'"),
        (("x=alpha:2",), "alpha must be between 0 and 1"),
        ((), "at least one setting"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_settings(words)


def test_wrong_words_get_one_sentence(world, capsys):
    _, words = world
    for changes, message in (
        (["--data", "nowhere"], "no data folder at 'nowhere'"),
        (["--clips", "1"], "--clips must be at least 2, got 1"),
        (["--lpips"], "at least 21 pixels, these have 16x16"),
        (["--settings", "x=blocks:1"], "got 'blocks:1'"),
    ):
        assert main([*words, *changes]) == 2
        assert message in capsys.readouterr().err
