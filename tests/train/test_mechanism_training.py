"""Trainings of the comparison: what they are trained on, that they learn, and that none is done twice."""

import json
from pathlib import Path

import pytest
import torch

from stvision.cli.main import main
from stvision.train import mechanisms
from stvision.train.mechanisms import (
    Job,
    Problem,
    Settings,
    all_jobs,
    default_workers,
    load_problem,
    metaworld_tasks,
    spread,
    train_jobs,
    train_one,
)

TINY = Settings(
    steps=2,
    batch_size=4,
    dim=32,
    depth=1,
    heads=1,
    cue_clips=16,
    cue_test_clips=8,
    cue_frames=14,
    cue_size=16,
)


def both_ways(count: int = 6, augment: bool = False) -> Problem:
    """Random clips of three classes, shown both ways."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 5, 16, 16, 3)
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    label = torch.arange(count) % 3
    return Problem(frames, label, frames[:4], label[:4], 3, True, augment, "mean")


def test_jobs_come_seed_by_seed_and_one_frame_has_one_row() -> None:
    jobs = all_jobs(["s4", "full"], ["metaworld-first-frame", "early-cue"], 2)
    assert [job.key for job in jobs] == [
        f"{name}/{task}/{seed}"
        for seed in (0, 1)
        for name, task in (
            ("full", "metaworld-first-frame"),
            ("s4", "early-cue"),
            ("full", "early-cue"),
        )
    ]
    with pytest.raises(ValueError, match="mechanisms: 's5' is none of none, space"):
        all_jobs(["s5"], ["early-cue"], 1)
    with pytest.raises(ValueError, match="tasks: 'cue' is none of metaworld, early-cue"):
        all_jobs(["s4"], ["cue"], 1)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        all_jobs(["s4"], ["early-cue"], 0)


def test_a_clip_shown_backwards_is_of_the_other_class() -> None:
    problem = both_ways()
    index = torch.arange(6).repeat(8)
    clips, label = problem.batch(index, torch.Generator().manual_seed(1))
    plain = problem.frames[index].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    turned = label % 2 == 1
    assert 5 < turned.sum() < 43
    assert torch.equal(label // 2, problem.label[index])
    assert torch.equal(clips, torch.where(turned.view(-1, 1, 1, 1, 1), plain.flip(2), plain))
    tested = list(problem.test_batches(3))
    assert [len(label) for _, label in tested] == [3, 3, 1, 1]
    for (ahead, first), (back, second) in zip(tested[::2], tested[1::2], strict=True):
        assert torch.equal(back, ahead.flip(2)) and torch.equal(second, first + 1)
    assert problem.outputs == 6 and problem.tokens == 5 * 2 * 2


def test_training_clips_alone_are_augmented() -> None:
    problem = both_ways(augment=True)
    clips, _ = problem.batch(torch.arange(6), torch.Generator().manual_seed(1))
    plain, _ = both_ways().batch(torch.arange(6), torch.Generator().manual_seed(1))
    assert not torch.equal(clips, plain)
    assert torch.equal(next(problem.test_batches(4))[0], next(both_ways().test_batches(4))[0])


def test_without_order_at_most_half_is_right() -> None:
    problem = both_ways()
    settings = Settings(steps=100, batch_size=8, dim=32, depth=1, heads=1, learning_rate=3e-3)
    result = train_one(Job("none", "metaworld", 0), problem, settings)
    assert result["accuracy"] <= 0.5 < result["task_accuracy"]


def test_accuracies_count_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = both_ways()
    settings = Settings(steps=1, batch_size=4, dim=32, depth=1, heads=1)
    # classes named for the four test clips, first forwards, then backwards
    named = iter([[0, 3, 4, 0], [1, 3, 0, 0]])

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(6))

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            if self.training:
                return self.bias.expand(len(clips), -1)
            return torch.eye(6)[next(named)] + self.bias

    monkeypatch.setattr(mechanisms, "build", lambda *_: Oracle())
    result = train_one(Job("none", "metaworld", 0), problem, settings)
    # labels are 0, 1, 2, 0: classes 0 2 4 0 forwards and 1 3 5 1 backwards
    assert result["accuracy"] == 5 / 8 and result["task_accuracy"] == 7 / 8
    assert result["test_clips"] == 8


def test_tasks_of_one_scene_are_kept_and_others_left_out() -> None:
    names = ["door-open-v3", "door-close-v3", "drawer-open-v3", "dial-turn-v3"]
    entries = [{"meta": {"task": name}} for name in names]
    assert metaworld_tasks(entries) == ["door-close-v3", "door-open-v3"]
    with pytest.raises(ValueError, match="no two Meta-World tasks of one shared scene"):
        metaworld_tasks(entries[1:])


def test_cue_clips_are_split_and_balanced() -> None:
    problem = load_problem("early-cue", TINY, "cpu")
    assert problem.frames.shape == (16, 14, 16, 16, 3) and problem.pool == "last"
    assert problem.label.bincount().tolist() == [4] * 4
    assert problem.test_label.bincount().tolist() == [2] * 4
    assert not any((problem.frames == clip).flatten(1).all(1).any() for clip in problem.test_frames)
    with pytest.raises(ValueError, match="task must be one of metaworld, early-cue"):
        load_problem("late-cue", TINY, "cpu")


@pytest.mark.parametrize("name", ["full", "s4"])
def test_loss_falls(name: str) -> None:
    problem = load_problem("early-cue", TINY, "cpu")
    settings = Settings(steps=60, batch_size=16, dim=32, depth=1, heads=1, learning_rate=5e-3)
    result = train_one(Job(name, "early-cue", 0), problem, settings)
    assert result["last_loss"] < 0.7 * result["first_loss"]


def test_a_seed_gives_one_result() -> None:
    problem = load_problem("early-cue", TINY, "cpu")
    first, again, other = (
        train_one(Job("temporal", "early-cue", seed), problem, TINY)["last_loss"]
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_processes_give_what_one_gives_and_a_failure_leaves_the_others() -> None:
    settings = Settings(**{**vars(TINY), "neighborhood_backend": "nattn"})
    jobs = all_jobs(["none", "temporal", "neighborhood"], ["early-cue"], 1)
    found: list[dict] = [{}, {}]
    for results, workers in zip(found, (1, 2), strict=True):
        assert train_jobs(
            jobs,
            settings,
            device="cpu",
            workers=workers,
            done=lambda job, result, results=results: results.update({job.key: result}),
        )
    for results in found:
        assert set(results) == {job.key for job in jobs}
        said = results["neighborhood/early-cue/0"]["error"]
        assert "must be" in said and "blocked" in said and "'nattn'" in said
    for name in ("none", "temporal"):
        one, other = (results[f"{name}/early-cue/0"] for results in found)
        assert one["accuracy"] == other["accuracy"]
        assert one["last_loss"] == pytest.approx(other["last_loss"], rel=1e-5)


def test_time_that_is_over_leaves_the_rest_undone() -> None:
    jobs = all_jobs(["none"], ["early-cue"], 2)
    seen: list[Job] = []
    through = train_jobs(
        jobs, TINY, device="cpu", max_seconds=0.0, done=lambda job, _: seen.append(job)
    )
    assert not through and not seen
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        train_jobs(jobs, TINY, device="cpu", workers=0, done=lambda job, _: None)


BENCH = [
    "bench",
    "mechanisms",
    "--tasks",
    "early-cue",
    "--mechanisms",
    "none",
    "temporal",
    "--seeds",
    "2",
    "--steps",
    "2",
    "--dim",
    "32",
    "--depth",
    "1",
    "--heads",
    "1",
    "--batch-size",
    "4",
    "--cue-clips",
    "8",
    "--cue-test-clips",
    "8",
    "--cue-frames",
    "14",
    "--device",
    "cpu",
]


def stored(path: Path) -> dict:
    """Results without the seconds that they took."""
    runs = json.loads(path.read_text())["runs"]
    return {
        key: {k: v for k, v in run.items() if k != "seconds"} for key, run in sorted(runs.items())
    }


def test_a_half_finished_comparison_goes_on_to_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, half = tmp_path / "whole.json", tmp_path / "half.json"
    assert main([*BENCH, "--json", str(whole), "--phase", "train"]) == 0
    table = capsys.readouterr().out
    assert "| `temporal` |" in table

    kept = json.loads(whole.read_text())
    kept["runs"] = dict(list(kept["runs"].items())[:1])
    kept["runs"]["none/early-cue/1"] = {"error": "failed the first time"}
    half.write_text(json.dumps(kept))
    trained = []
    plain = train_one

    def counted(job: Job, *args: object, **options: object) -> dict:
        trained.append(job.key)
        return plain(job, *args, **options)

    monkeypatch.setattr(mechanisms, "train_one", counted)
    assert main([*BENCH, "--json", str(half), "--phase", "train"]) == 0
    assert trained == ["temporal/early-cue/0", "none/early-cue/1", "temporal/early-cue/1"]
    assert stored(half) == stored(whole) and capsys.readouterr().out == table
    assert main([*BENCH, "--json", str(half), "--phase", "report"]) == 0
    assert len(trained) == 3 and capsys.readouterr().out == table

    stopped = [*BENCH, "--json", str(tmp_path / "none.json"), "--phase", "train"]
    assert main([*stopped, "--max-seconds", "0"]) == 1
    assert "the same command goes on" in capsys.readouterr().out

    other = [word if word != "2" else "3" for word in BENCH]
    assert main([*other, "--json", str(half)]) == 2
    assert "holds results with steps=2, not 3" in capsys.readouterr().err


def test_the_whole_command_on_a_small_scale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    docs, plot = tmp_path / "page.md", tmp_path / "plots" / "plot.png"
    docs.write_text("above\n<!-- mechanisms -->\nold\n<!-- end mechanisms -->\nbelow\n")
    words = [*BENCH, "--json", str(tmp_path / "all.json"), "--docs", str(docs), "--plot", str(plot)]
    assert main([*words, "--sizes", "2x2x3", "1x2x2", "--repeats", "1", "--time-batch", "1"]) == 0
    table = capsys.readouterr().out
    assert "1 x 2 x 2: ms | 2 x 2 x 3: ms |" in table
    text = docs.read_text()
    assert text.startswith("above\n<!-- mechanisms -->\n| mechanism |") and "old" not in text
    assert text.endswith("<!-- end mechanisms -->\nbelow\n") and table.strip() in text
    assert plot.stat().st_size > 1000
    assert (tmp_path / "images" / "mechanisms.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "s4", "conv-s5", "ts-lstm"])
def test_a_graph_trains_as_plain_steps_do(name: str) -> None:
    problem = load_problem("early-cue", TINY, "cuda")
    plain, captured = (
        train_one(Job(name, "early-cue", 0), problem, TINY, graphs=graphs)
        for graphs in (False, True)
    )
    assert captured["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-2)


def test_processes_are_spread_over_all_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert spread("cuda", 6) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"]
    assert spread("cuda:2", 2) == ["cuda:2"] * 2 and spread("cpu", 2) == ["cpu"] * 2
    assert (default_workers("cuda"), default_workers("cuda:1"), default_workers("cpu")) == (
        24,
        6,
        1,
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert spread("cuda", 2) == ["cuda"] * 2 and default_workers("cuda") == 6
