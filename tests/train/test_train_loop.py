import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support_train
import torch

from stvision.train import checkpoint
from stvision.train.ema import EMA
from stvision.train.loop import LoopConfig, learning_rate_factor

SCRIPT = Path(support_train.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def start(folder: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), str(folder), *options],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def kill_at(process: subprocess.Popen, folder: Path, step: int) -> None:
    """SIGKILL to the whole group once the log shows a step."""
    log = folder / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    support_train.train(str(folder))
    return folder


def test_sigkill_and_restart_repeat_the_loss_sequence(whole: Path, tmp_path: Path) -> None:
    for step in (3, 24):
        kill_at(start(tmp_path, "delay=0.01"), tmp_path, step)
        assert not (tmp_path / "model").exists()
    # remains of an interrupted write and strangers in the folder
    (tmp_path / "checkpoints" / ".step_00000099.writing").mkdir()
    (tmp_path / "checkpoints" / "step_00000098").mkdir()
    (tmp_path / "checkpoints" / "step_final-copy").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert support_train.train(str(tmp_path)).finished

    assert losses(tmp_path) == losses(whole)
    ours, theirs = (torch.load(f / "model/model.pt", weights_only=True) for f in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    validated = [(f / "validation.jsonl").read_text() for f in (tmp_path, whole)]
    assert validated[0] == validated[1]
    left = {entry.name for entry in (tmp_path / "checkpoints").iterdir()}
    assert left == {
        "step_00000035",
        "step_00000040",
        "step_00000098",
        "step_final-copy",
        "notes.txt",
    }


def test_two_processes_resume_exactly_and_see_different_items(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    running = start(a, processes=2)
    kill_at(start(b, "delay=0.02", processes=2), b, 9)
    finish(running)
    finish(start(b, processes=2))
    assert losses(a) == losses(b)


def test_two_processes_are_one_with_the_double_batch(tmp_path: Path) -> None:
    from stvision.train.data import ResidentSource

    data = {"x": torch.arange(23.0)}
    generator = torch.Generator()
    for step in range(9):
        parts = [
            ResidentSource(data, 3, 2, seed=1, rank=rank, world=2).batch(step, 1, generator)["x"]
            for rank in range(2)
        ]
        joint = ResidentSource(data, 6, 2, seed=1).batch(step, 1, generator)["x"]
        assert torch.equal(torch.cat(parts), joint)
        assert len(joint.unique()) == 6


def test_time_budget_stops_with_a_checkpoint_and_continues(whole: Path, tmp_path: Path) -> None:
    first = support_train.train(
        str(tmp_path), delay=0.02, save_every=1000, max_seconds=2.5, reserve_seconds=0.2
    )
    assert not first.finished and 0 < first.step < 40
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "step": first.step,
        "max_steps": 40,
        "finished": False,
    }
    assert support_train.train(str(tmp_path)).finished
    assert losses(tmp_path) == losses(whole)


def test_sigterm_stops_with_a_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, "delay=0.05", "save_every=1000")
    while not (tmp_path / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert len(checkpoint.complete_checkpoints(tmp_path / "checkpoints")) == 1


def test_a_finished_training_is_not_repeated(whole: Path) -> None:
    before = (whole / "metrics.jsonl").stat().st_mtime_ns, (whole / "model").stat().st_mtime_ns
    outcome = support_train.train(str(whole))
    assert outcome.finished and "weight" in outcome.metrics
    assert (whole / "model").stat().st_mtime_ns == before[1]


def test_log_between_lines_is_carried_over_a_kill(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    support_train.train(str(a), log_every=10)
    # killed after step 10, so it continues from 7 or 14 and averages steps of both parts
    kill_at(start(b, "delay=0.01", "log_every=10"), b, 1)
    support_train.train(str(b), log_every=10)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (a, b)]
    seen = [[(json.loads(x)["step"], json.loads(x)["loss"]) for x in part] for part in lines]
    assert [step for step, _ in seen[0]] == [10, 20, 30, 40]
    assert seen[0] == seen[1]


def test_checkpoint_of_other_process_count_or_network_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    state = whole / "checkpoints" / "step_00000040" / "state.json"
    original = state.read_text()
    marker = whole / "checkpoints" / "step_00000040" / checkpoint.MARKER
    kept = marker.read_text()
    try:
        changed = original.replace('"processes": 1', '"processes": 4')
        state.write_text(changed)
        with pytest.raises(ValueError, match="4 process"):
            support_train.train(str(whole), max_steps=41)
    finally:
        state.write_text(original)
        assert marker.read_text() == kept


def test_truncated_checkpoint_is_not_picked_up(tmp_path: Path) -> None:
    for step in (1, 2):
        temporary = checkpoint.begin(tmp_path, step)
        (temporary / "model.bin").write_bytes(b"x" * 10)
        checkpoint.finish(temporary, tmp_path, step)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == [
        "step_00000001",
        "step_00000002",
    ]
    (tmp_path / "step_00000002" / "model.bin").write_bytes(b"x" * 9)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step_00000001"]
    (tmp_path / "step_00000001" / checkpoint.MARKER).unlink()
    assert checkpoint.complete_checkpoints(tmp_path) == []


def test_average_follows_its_formula_and_is_taken_back() -> None:
    module = torch.nn.Linear(3, 2).double()
    ema = EMA(module, 0.9)
    expected = module.weight.detach().clone()
    for update in range(1, 30):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    live = module.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.weight, live)


def test_learning_rate_rises_then_follows_the_cosine() -> None:
    config = LoopConfig(max_steps=110, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.2)
    factors = [learning_rate_factor(step, config) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0) and factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_non_finite_loss_ends_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loss became nan"):
        support_train.train(str(tmp_path), learning_rate=1e30, max_grad_norm=None, warmup_steps=0)
