"""The prediction benchmark on predictors whose scores are known beforehand."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from stvision.eval.bootstrap import bootstrap_mean, bootstrap_ratio
from stvision.eval.features import ClassifierFeatures
from stvision.eval.metrics import psnr
from stvision.eval.predict import (
    COPY,
    PSNR_CAP,
    Prediction,
    PredictionCase,
    copy_last_frame,
    evaluate_predictions,
    shuffled_task,
    to_unit_float,
)
from stvision.eval.report import REAL
from stvision.models.action import ActionClassifier

#: scene -> tasks; the colour that the clip turns to tells the task
SCENES = {"table": ["red", "green"], "door": ["blue"]}
TASKS = ["red", "green", "blue"]


class ColourReader(ActionClassifier):
    """Names the strongest colour channel of the last frame; a still grey clip is 'red'."""

    def __init__(self) -> None:
        super().__init__(class_names=TASKS, widths=[8], depth=1)

    def forward(self, frames: Tensor) -> Tensor:
        return frames[:, :, -1].mean(dim=(2, 3))

    def features(self, frames: Tensor) -> Tensor:
        return frames[:, :, -1].mean(dim=(2, 3))


def clip(task: str, seed: int, frames: int = 4) -> Tensor:
    """Grey noise in the first frame, then the colour of the task grows."""
    rng = np.random.default_rng(seed)
    base = np.repeat(rng.integers(60, 120, (1, 22, 24, 1)), 3, axis=-1)
    video = np.repeat(base, frames, axis=0)
    video[..., TASKS.index(task)] += 30 * np.arange(frames)[:, None, None]
    return torch.from_numpy(video.astype(np.uint8))


def cases(count: int = 12) -> list[PredictionCase]:
    result = []
    for i in range(count):
        task = TASKS[i % 3]
        scene = next(name for name, tasks in SCENES.items() if task in tasks)
        truth = clip(task, i)
        spoken = shuffled_task(str(i), task, TASKS if scene == "door" else SCENES[scene])
        predictions = {
            "perfect": Prediction(truth.clone()),
            # follows whatever it is told
            "shuffled": Prediction(clip(spoken, i), spoken),
            "darker": Prediction(truth.float() / 255 - 0.1),
        }
        result.append(PredictionCase(f"clip{i}", truth, task, scene, predictions))
    return result


def evaluate(items, **changes):
    settings = {
        "num_reference_frames": 1,
        "scene_tasks": SCENES,
        "classifier": ColourReader(),
        "batch_size": 5,
        "bootstrap_samples": 200,
    }
    return evaluate_predictions(items, **{**settings, **changes})


def test_known_predictors_get_their_known_scores():
    classifier = ColourReader()
    report = evaluate(cases(), extractors=[ClassifierFeatures(classifier, "colours")])
    columns = report.columns
    assert list(columns) == [REAL, "perfect", "shuffled", "darker", COPY]

    perfect = columns["perfect"]
    assert perfect.psnr.value == PSNR_CAP
    assert perfect.ssim.value == pytest.approx(1)
    assert perfect.flicker.value == 0
    assert perfect.accuracy.value == perfect.accuracy_of_real.value == 1
    name = "Fréchet distance (colours, 4 frames, 22x24 not resized)"
    assert perfect.distances[name] == pytest.approx(0, abs=1e-9)

    # told another task of the scene, it shows that one: never right, always obedient
    shuffled = columns["shuffled"]
    assert shuffled.accuracy_shared.value == shuffled.accuracy_in_scene.value == 0
    assert shuffled.obeys.value == shuffled.obeys_shared.value == 1
    assert shuffled.accuracy_shared.count == 8
    assert report.comparisons["accuracy on shared scenes, perfect over shuffled"] is None

    difference = report.comparisons["PSNR (dB), perfect minus darker"]
    assert difference.value == pytest.approx(PSNR_CAP - 20, abs=1e-3)

    # a tenth darker is 20 dB; a clip never goes below black here
    assert columns["darker"].psnr.value == pytest.approx(20, abs=1e-3)
    assert columns["darker"].accuracy.value == 1

    # the still clip ties all channels and goes by 'red': a third of the tasks, half a scene's
    assert columns[COPY].accuracy.value == pytest.approx(1 / 3)
    assert columns[COPY].accuracy_in_scene.value == pytest.approx(1 / 2)
    ratio = report.comparisons[f"accuracy on shared scenes, perfect over {COPY}"]
    assert ratio.value == pytest.approx(2)
    assert perfect.distances[name] < columns[COPY].distances[name]


def test_similarity_counts_predicted_frames_only():
    items = cases(3)
    report = evaluate(items, num_reference_frames=2)
    rows = {(row.key, row.column): row for row in report.rows}
    for item in items:
        truth = to_unit_float(item.truth).permute(0, 3, 1, 2)
        copy = to_unit_float(copy_last_frame(item.truth, 2).frames).permute(0, 3, 1, 2)
        assert torch.equal(copy[2], truth[1]) and torch.equal(copy[3], truth[1])
        expected = psnr(copy[2:], truth[2:]).mean().item()
        assert rows[item.key, COPY].psnr == pytest.approx(expected, abs=1e-4)
    gain = report.columns["darker"].psnr_gain.value
    expected = report.columns["darker"].psnr.value - report.columns[COPY].psnr.value
    assert gain == pytest.approx(expected)


def test_8_bit_and_floating_point_predictions_share_a_batch():
    items = []
    for i in range(4):
        truth = clip("red", i)
        shown = truth if i % 2 else truth.float() / 255
        items.append(PredictionCase(str(i), truth, "red", "table", {"m": Prediction(shown)}))
    report = evaluate(items, batch_size=4)
    assert all(row.psnr == PSNR_CAP for row in report.rows if row.column == "m")


def test_classifying_within_the_scene_ignores_other_tasks():
    # a clip of the red-green scene that turns more blue than green
    truth = clip("green", 0)
    shown = truth.clone()
    shown[-1, ..., 2] += 120
    case = PredictionCase("a", truth, "green", "table", {"model": Prediction(shown)})
    row = next(r for r in evaluate([case]).rows if r.column == "model")
    assert (row.named, row.named_in_scene) == ("blue", "green")


def test_failed_predictions_are_counted_and_wrong():
    items = cases(6)
    broken = {
        0: (Prediction(None, failure="out of memory"), "out of memory"),
        1: (Prediction(items[1].truth[:3]), r"shape (3, 22, 24, 3) instead of (4, 22, 24, 3)"),
        2: (Prediction(torch.full((4, 22, 24, 3), float("nan"))), "not finite"),
    }
    changed = []
    for i, item in enumerate(items):
        prediction = broken[i][0] if i in broken else Prediction(item.truth)
        changed.append(
            PredictionCase(item.key, item.truth, item.task, item.scene, {"model": prediction})
        )
    report = evaluate(changed)
    model = report.columns["model"]
    assert (model.clips, model.failed) == (6, 3)
    assert model.psnr.count == 3 and model.psnr.value == PSNR_CAP
    assert model.accuracy.value == pytest.approx(1 / 2)
    rows = [row for row in report.rows if row.column == "model"]
    for i, (_, reason) in broken.items():
        assert reason in rows[i].failure and rows[i].psnr is None and rows[i].named is None


def test_all_failed_still_gives_a_report():
    item = cases(1)[0]
    case = PredictionCase("a", item.truth, "red", "table", {"model": Prediction(None)})
    classifier = ColourReader()
    report = evaluate([case], extractors=[ClassifierFeatures(classifier)])
    assert report.columns["model"].psnr is None
    assert list(report.columns["model"].distances.values()) == [None]
    assert "1 (1)" in report.to_markdown()


def test_result_does_not_depend_on_the_batch_size():
    items = cases(7)
    one, many = evaluate(items, batch_size=1), evaluate(items, batch_size=64)
    for a, b in zip(
        sorted(one.rows, key=lambda r: (r.column, r.key)),
        sorted(many.rows, key=lambda r: (r.column, r.key)),
        strict=True,
    ):
        assert (a.key, a.column, a.named) == (b.key, b.column, b.named)
        assert a.psnr == pytest.approx(b.psnr, rel=1e-5) if a.psnr is not None else b.psnr is None


def test_worst_clips_come_first():
    items = []
    for i, offset in enumerate([0.02, 0.2, 0.1]):
        truth = torch.full((3, 22, 24, 3), 0.5)
        prediction = Prediction(truth + offset)
        items.append(PredictionCase(f"clip{i}", truth, "red", "table", {"model": prediction}))
    report = evaluate(items, classifier=None)
    for measure in ("psnr", "ssim"):
        keys = [row.key for row in report.worst("model", measure=measure, count=2)]
        assert keys == ["clip1", "clip2"]
    with pytest.raises(ValueError, match="measure must be one of lpips"):
        report.worst("model", measure="fvd")
    with pytest.raises(ValueError, match="no column 'other'"):
        report.worst("other")


def test_report_goes_to_json_and_markdown(tmp_path):
    report = evaluate(cases(6))
    report.write_json(tmp_path / "deep" / "results.json")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["results.json"]
    data = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert data["columns"]["perfect"]["accuracy"]["value"] == 1
    assert len(data["rows"]) == 6 * 5
    assert data["protocol"]["reference frames"] == 1
    text = report.to_markdown()
    assert "| | real | perfect | shuffled | darker | copy last frame |" in text
    assert "| instruction accuracy | 1.000 [1.000, 1.000] | 1.000" in text
    assert "lpips" not in text.lower()


def test_shuffling_stays_in_the_scene_and_repeats():
    drawn = {shuffled_task(str(i), "a", ["a", "b", "c"], seed=1) for i in range(40)}
    assert drawn == {"b", "c"}
    assert shuffled_task("k", "a", ["a", "b", "c"]) == shuffled_task("k", "a", ["c", "b", "a"])
    assert shuffled_task("k", "a", ["a"]) is None


def test_intervals_of_a_mean_cover_it_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        estimate = bootstrap_mean(rng.normal(3, 1, 60), samples=300, seed=trial)
        hits += estimate.low <= 3 <= estimate.high
    assert 180 <= hits <= 198  # 95 % of 200, less what the percentile interval is known to lose
    assert bootstrap_mean([]) is None
    assert bootstrap_mean([2.0, 2.0]).high == 2


def test_paired_ratio_knows_its_pairs():
    rng = np.random.default_rng(1)
    below = rng.uniform(1, 100, 40)
    estimate = bootstrap_ratio(3 * below, below)
    # resampled apart, the interval would be wide
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3, 3))
    assert bootstrap_ratio([1.0, 2.0], [0.0, 0.0]) is None
    rare = bootstrap_ratio([1.0] * 5, [1.0, 0, 0, 0, 0])
    assert rare.value == 5 and rare.high == float("inf")
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        bootstrap_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="level in"):
        bootstrap_mean([1.0], level=95)


def one(**changes) -> PredictionCase:
    settings = {"key": "a", "truth": clip("red", 0), "task": "red", "scene": "table"}
    return PredictionCase(**{**settings, **changes})


@pytest.mark.parametrize(
    ("items", "changes", "message"),
    [
        pytest.param([], {}, "no clips to evaluate", id="none"),
        pytest.param([one(), one()], {}, "'a' comes twice", id="twice"),
        pytest.param(
            [one(), one(key="b", truth=clip("red", 0, 5))], {}, r"'b' has shape \(5, 22", id="shape"
        ),
        pytest.param(
            [one(), one(key="b", predictions={"m": Prediction(None)})], {}, "columns", id="columns"
        ),
        pytest.param([one()], {"num_reference_frames": 4}, "must be 1 to 3", id="references"),
        pytest.param([one()], {"batch_size": 0}, "batch_size must be at least 1", id="batch"),
        pytest.param([one(task="pull")], {}, "does not know the task 'pull'", id="task"),
        pytest.param(
            [one(predictions={REAL: Prediction(None)})], {}, "'real' is used", id="reserved"
        ),
        pytest.param([one(truth=torch.zeros(4, 3, 22))], {}, r"\(T, H, W, 3\)", id="axes"),
    ],
)
def test_bad_cases_are_named(items, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(items, **changes)


def test_units_are_converted_once():
    assert to_unit_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0, 0.2, 1]
    )
    assert to_unit_float(torch.tensor([-0.5, 0.25, 2.0])).tolist() == [0, 0.25, 1]
    with pytest.raises(TypeError, match="int64"):
        to_unit_float(torch.tensor([1]))
