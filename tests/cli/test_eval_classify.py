"""``stvision eval classify`` end to end, and the scores behind it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stvision.cli.main import main
from stvision.datasets.clips import ClipFolder
from stvision.datasets.packed import pack
from stvision.datasets.views import ViewDataset
from stvision.eval.classify import score_classification
from stvision.io import Clip, save_clip
from stvision.models.classifier import VideoClassifier, load_classifier

OPTIONS = {"depths": [1, 1], "embed_dims": [8, 16], "num_heads": [2, 4], "window_size": 3}
NAMES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of 24 x 40 pixels, one of them broken, and a saved classifier."""
    root = tmp_path_factory.mktemp("world")
    (root / "data").mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(7):
        frames = torch.randint(0, 256, (12, 24, 40, 3), dtype=torch.uint8, generator=generator)
        save_clip(Clip.from_frames(frames, fps=10), root / "data" / f"{number}.mp4")
        line = {"path": f"{number}.mp4", "caption": "noise", "split": "test"}
        lines.append(json.dumps({**line, "colour": NAMES[number % 3]}))
    (root / "data" / "6.mp4").write_bytes(b"cut off")
    (root / "data" / "index.jsonl").write_text("\n".join(lines))
    torch.manual_seed(1)
    reading = {"label": "colour", "kind": "clips", "options": {"sampling": "center"}}
    model = VideoClassifier("davit_tiny", NAMES, 4, (16, 16), options=OPTIONS, reading=reading)
    with torch.no_grad():  # scores that differ by clip
        for p in model.net.parameters():
            p.mul_(2.0)
    model.save(root / "model")
    return root


def words(world: Path, **options: Any) -> list[str]:
    given = {"model": world / "model", "data": world / "data", "split": "test", "workers": 0}
    found = ["eval", "classify", "--device", "cpu"]
    for key, value in {**given, **options}.items():
        values = value if isinstance(value, tuple) else (value,)
        found += [f"--{key.replace('_', '-')}", *map(str, values)]
    return found


def by_hand(world: Path, clips: int, crops: int, sampling: str = "center") -> Tensor:
    model = load_classifier(world / "model")
    reader = ClipFolder(world / "data", split="test", num_frames=4, sampling=sampling)  # type: ignore[arg-type]
    dataset = ViewDataset(reader, (16, 16), clips, crops)
    means = []
    for number in range(6):
        views = dataset[number][1]
        with torch.no_grad():
            each = [model(v.movedim(-1, 0)[None].float() / 127.5 - 1).softmax(-1) for v in views]
        assert len(each) == clips * crops
        means.append(sum(each) / len(each))
    return torch.cat(means)


def test_it_scores_all_views_and_writes(world: Path, tmp_path: Path, capsys) -> None:
    assert main(words(world, clips=2, crops=3, batch_size=7, out=tmp_path / "out")) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    wanted = by_hand(world, 2, 3)
    assert [row["key"] for row in found["rows"]] == [f"{n}.mp4" for n in range(6)]
    for row, probabilities in zip(found["rows"], wanted, strict=True):
        assert row["named"] == NAMES[int(probabilities.argmax())]
        assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    right = [row["named"] == row["label"] for row in found["rows"]]
    assert found["top1"]["value"] == pytest.approx(sum(right) / 6) and found["top1"]["count"] == 6
    assert found["top5"]["value"] == 1.0  # three classes
    assert found["protocol"]["views"] == 6 and found["protocol"]["frames"] == 4
    assert found["protocol"]["clips that could not be read"] == [["6.mp4", "broken"]]
    assert "6 clips of 3 classes, 6 view(s) each" in said and "6.mp4 (broken)" in said
    assert (tmp_path / "out" / "results.md").read_text() in said
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 1000


def test_views_and_options_of_the_reader_matter(world: Path, capsys) -> None:
    def rows(**options: Any) -> dict[str, Any]:
        assert main([*words(world, **options), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    one = rows(clips=1, crops=1)
    assert one["protocol"]["views"] == 1 and "rows" not in one
    spread = by_hand(world, 1, 1, "uniform")
    assert (by_hand(world, 1, 1) - spread).abs().max() > 1e-4
    assert one["protocol"]["reader"] == {"kind": "clips", "sampling": "center"}
    other = rows(clips=1, crops=1, option="sampling=uniform")
    assert other["protocol"]["reader"]["sampling"] == "uniform"
    hits = spread.argmax(1) == torch.arange(6) % 3
    assert other["top1"]["value"] == pytest.approx(float(hits.float().mean()))
    half = rows(clips=1, crops=1, dtype="bfloat16", size=(8, 24))
    assert half["protocol"]["size"] == [8, 24] and half["protocol"]["precision"] == "bfloat16"


def test_packed_clips_keep_their_size(world: Path, tmp_path: Path, capsys) -> None:
    reader = ClipFolder(world / "data", num_frames=8, size=(20, 30))
    pack(reader, tmp_path / "packed", progress=False)
    options = {"data": tmp_path / "packed", "kind": "packed", "clips": 2, "crops": 3}
    # the training's sampling is none of packed clips
    assert main([*words(world, **options), "--option", "caption=first", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"]["count"] == 6 and found["protocol"]["size"] == [16, 16]
    assert found["protocol"]["reader"] == {"kind": "packed", "caption": "first"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "no video classifier at 'nowhere': config.json is not there"),
        ({"data": "nowhere"}, "no data at 'nowhere'"),
        ({"split": "train"}, "no clips of split 'train'"),
        ({"label": "task"}, "has no 'task' in its meta data"),
        ({"label": "caption"}, "caption='noise', which is none of the 3 classes"),
        ({"clips": 0}, "--clips and --batch-size must be at least 1"),
        ({"option": "sampling"}, "--option takes KEY=VALUE"),
        ({"kind": "tapes"}, "kind"),
    ],
)
def test_wrong_input_is_one_sentence(
    world: Path, options: dict[str, Any], message: str, capsys
) -> None:
    assert main(words(world, **options)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stvision eval: ") and message in said, said


def test_scores_are_those_of_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (200,), generator=generator) ** 2 % 7  # unequal classes
    scores = torch.randn(200, 8, generator=generator)
    scores[torch.arange(200), labels] += 1.0
    names = [f"class {i}" for i in range(8)]
    report = score_classification(
        scores.softmax(1), labels, names, keys=[str(i) for i in range(200)]
    )
    order = scores.argsort(1, descending=True)
    first = [int(order[i, 0]) == int(labels[i]) for i in range(200)]
    five = [int(labels[i]) in order[i, :5].tolist() for i in range(200)]
    by_class = {
        k: [hit for hit, label in zip(first, labels.tolist(), strict=True) if label == k]
        for k in set(labels.tolist())
    }
    assert report.top1.value == pytest.approx(sum(first) / 200)
    assert report.top5.value == pytest.approx(sum(five) / 200)
    mean = sum(sum(hits) / len(hits) for hits in by_class.values()) / len(by_class)
    assert report.class_accuracy.value == pytest.approx(mean)
    assert abs(mean - report.top1.value) > 1e-3
    for estimate in (report.top1, report.top5, report.class_accuracy):
        assert estimate.low < estimate.value < estimate.high
        # about two standard errors of a share to either side
        assert 0.02 < estimate.high - estimate.low < 0.25
    assert report.per_class == {names[k]: (sum(v), len(v)) for k, v in sorted(by_class.items())}
    assert [sum(row) for row in report.confusion] == torch.bincount(labels, minlength=8).tolist()
    assert sum(report.confusion[i][i] for i in range(8)) == sum(first)
    a, b, n = report.confused(1)[0]
    assert report.confusion[names.index(a)][names.index(b)] == n > 0
    assert len(report.rows) == 200 and report.rows[3]["label"] == names[labels[3]]
    for bad in (scores[:, :7], scores[:0]):
        with pytest.raises(ValueError, match=r"probabilities must be \(N, 8\)"):
            score_classification(bad, labels, names)
    with pytest.raises(ValueError, match="keys must be as many as labels, got 1 and 200"):
        score_classification(scores, labels, names, keys=["a"])
