"""Trainings that settle their number of steps by the time they may take."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import support_train
import yaml

from stvision.config import dump_config, load_config
from stvision.train import length as length_module
from stvision.train.options import LoopConfig, learning_rate_factor

AUTO: dict[str, Any] = {
    "max_steps": "auto",
    "target_seconds": 3.0,
    "settle_after": 4,
    "settle_steps": 10,
    "reserve_seconds": 0.1,
    "save_every": 25,
    "validate_every": 0,
    "warmup_steps": 5,
    "learning_rate": 1e-2,
}


@dataclass(frozen=True)
class LoopHolder:
    loop: LoopConfig


class Stop(Exception):
    """Stands for a kill: nothing is saved on the way out."""


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["seconds_per_step"]
    return found


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, float]:
    folder = tmp_path_factory.mktemp("auto")
    dump_config(LoopHolder(LoopConfig(**AUTO)), folder / "config.yaml")
    begun = time.monotonic()
    outcome = support_train.train(str(folder), delay=0.01, **AUTO)
    assert outcome.finished
    return folder, outcome.step, time.monotonic() - begun


def test_number_of_steps_fills_the_time_and_is_written_down(
    settled: tuple[Path, int, float],
) -> None:
    folder, steps, seconds = settled
    # two micro-batches of 0.01 s a step; what else a machine does in the meantime is not timed
    assert 14 < steps <= 150 and seconds < 6
    status = json.loads((folder / "status.json").read_text())
    assert status == {"step": steps, "max_steps": steps, "finished": True, "settled_steps": steps}
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["loop"]["settled_steps"] == steps and kept["loop"]["max_steps"] == "auto"
    config = load_config(LoopHolder, folder / "config.yaml").loop
    assert config.known_steps == steps
    rates = [line["learning_rate"] for line in lines(folder)]
    expected = [learning_rate_factor(step, config) * 1e-2 for step in range(steps)]
    assert expected == pytest.approx(rates)
    assert rates[13] == 1e-2 > rates[15] and rates[-1] < 0.1 * rates[13]


def test_interrupted_before_and_after_settling_the_course_is_the_same(
    settled: tuple[Path, int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps, _ = settled
    monkeypatch.setattr(length_module.Length, "settle", pretend(steps))
    for stop in (6, 30):  # between the checkpoint of step 4 and the settling, and long after it
        with pytest.raises(Stop):
            stopped(tmp_path, stop)
    assert json.loads((tmp_path / "status.json").read_text())["settled_steps"] == steps
    # the machine is another one now: whatever it would measure, the number stays
    monkeypatch.setattr(length_module.Length, "settle", pretend(10**6))
    assert support_train.train(str(tmp_path), **AUTO).step == steps
    assert lines(tmp_path) == lines(whole)
    names = [(f / "validation.jsonl").read_text() for f in (tmp_path, whole)]
    assert names[0] == names[1] and '"step": 14' in names[0]


def stopped(folder: Path, stop: int) -> None:
    def inputs(task: Any, batch: Any, generator: Any) -> Any:
        log = folder / "metrics.jsonl"
        if log.is_file() and len(log.read_text().splitlines()) >= stop:
            raise Stop
        return original(task, batch, generator)

    original = support_train.Denoise.inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support_train.Denoise, "inputs", inputs)
        support_train.train(str(folder), **AUTO)


def pretend(steps: int) -> Any:
    def settle(self: Any, step: int, *seconds: float) -> None:
        self.steps = steps
        self.store(step)

    return settle


def test_time_and_number_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="'auto' needs target_seconds"):
        LoopConfig(max_steps="auto")
    with pytest.raises(ValueError, match="do not go together"):
        LoopConfig(max_steps=100, target_seconds=60)
    with pytest.raises(ValueError, match="must exceed reserve_seconds"):
        LoopConfig(max_steps="auto", target_seconds=5)


def test_estimate_leaves_room_for_checkpoints_and_validations(tmp_path: Path) -> None:
    config = LoopConfig(
        max_steps="auto", target_seconds=1000, reserve_seconds=10, save_every=50, validate_every=100
    )
    accelerator = support_train.make_accelerator(config)
    length = length_module.Length(config, tmp_path, accelerator, time.monotonic() - 90)
    length.settle(120, each=0.5, save=5.0, validate=10.0)
    # 1000 - 90 - 10 - 15 seconds for steps of 0.5 + 5 / 50 + 10 / 100
    assert length.steps == pytest.approx(120 + 885 / 0.7, abs=2)
