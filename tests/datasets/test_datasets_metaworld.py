"""Meta-World episodes: determinism, shared beginnings, resumption."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stvision.datasets.metaworld import (
    CAPTIONS,
    DEFAULT_TASKS,
    SCENES,
    SHARED_SCENES,
    Settings,
    Simulator,
    choose_gl,
    render,
    split_of,
)


@cache
def _opengl_fault() -> str:
    """What MuJoCo says when it is imported with the chosen OpenGL; empty where it works."""
    done = subprocess.run(
        [sys.executable, "-c", "import mujoco"], check=False, capture_output=True, text=True
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def needs_simulator() -> None:
    """Skip without the simulator; it must not be imported before its OpenGL is chosen."""
    if find_spec("metaworld") is None:
        pytest.skip("needs the 'sim' extra (metaworld)")
    gl = choose_gl()
    if fault := _opengl_fault():
        pytest.skip(f"no OpenGL here with MUJOCO_GL={gl}: {fault}")


@pytest.fixture(scope="module")
def simulators():
    """Two tasks of one scene; skipped without the simulator."""
    needs_simulator()
    settings = Settings(height=32, width=32, num_frames=4)
    return [Simulator(task, settings) for task in ("drawer-open-v3", "drawer-close-v3")]


def test_tables_agree() -> None:
    assert len(DEFAULT_TASKS) >= 24 and set(DEFAULT_TASKS) <= set(CAPTIONS) == set(SCENES)
    assert all(len(set(texts)) >= 4 for texts in CAPTIONS.values())
    for name, scene in SHARED_SCENES.items():
        assert len(scene.tasks) >= 2 and all(SCENES[task] == name for task in scene.tasks)
        spoken = [text for task in scene.tasks for text in CAPTIONS[task]]
        assert len(spoken) == len(set(spoken))  # a sentence must tell the tasks apart


def test_split_depends_on_the_seed_alone() -> None:
    splits = [split_of(seed) for seed in range(1000)]
    assert 45 <= splits.count("test") <= 55 and 45 <= splits.count("validation") <= 55
    assert splits[:100] == [split_of(seed) for seed in range(100)]


def test_episodes_depend_on_the_seed_alone(simulators) -> None:
    opening = simulators[0]
    first = opening.play(5)
    opening.play(6)
    again = opening.play(5)
    assert first.success and len(first.poses) == len(again.poses)
    for ours, theirs in zip(first.poses[-1], again.poses[-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tasks_of_a_scene_begin_alike_and_end_apart(simulators) -> None:
    opened, closed = (simulator.play(3) for simulator in simulators)
    # positions and orientations of all bodies that are drawn; hidden goal marks may differ
    for ours, theirs in zip(opened.poses[0][:2], closed.poses[0][:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(opened.poses[-1][0] - closed.poses[-1][0]).max() > 0.1


def test_a_platform_that_does_not_load_is_named(tmp_path: Path) -> None:
    """MuJoCo's own import raises whatever the missing library left behind."""
    if find_spec("metaworld") is None:
        pytest.skip("needs the 'sim' extra (metaworld)")
    (tmp_path / "mujoco").mkdir()
    fault = "raise AttributeError(\"'NoneType' object has no attribute 'glGetError'\")\n"
    (tmp_path / "mujoco" / "__init__.py").write_text(fault)
    code = (
        "from stvision.datasets.metaworld_simulator import Settings, Simulator\n"
        "try:\n    Simulator('drawer-open-v3', Settings(cameras=('workspace',), height=32, width=32))\n"
        "except RuntimeError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MUJOCO_GL": "osmesa"},
    )
    assert "no OpenGL context with MUJOCO_GL=osmesa ('NoneType' object" in done.stdout


def test_render_resumes_and_indexes(tmp_path: Path) -> None:
    needs_simulator()
    arguments = {
        "tasks": ["handle-press-v3"],
        "size": 32,
        "num_frames": 3,
        "workers": 1,
        "progress": False,
    }
    try:
        first = render(tmp_path, episodes=1, **arguments)
    except RuntimeError as error:
        pytest.skip(f"no OpenGL here: {error}")
    clip = tmp_path / "handle-press-v3" / "workspace-000000.mp4"
    before = clip.stat().st_mtime_ns
    # what a killed process leaves: half a line of the journal, a hidden half-written video
    with (tmp_path / ".episodes.jsonl").open("a") as journal:
        journal.write('{"task": "handle-pr')
    stray = clip.with_name(".workspace-000009.abcd.mp4")
    stray.write_bytes(b"half")
    with (tmp_path / ".episodes.jsonl").open("a") as journal:
        journal.write("\n")
    second = render(tmp_path, episodes=2, **arguments)
    assert (first.rendered, second.rendered, second.clips) == (1, 1, 2)
    assert clip.stat().st_mtime_ns == before and not stray.exists()
    lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert set(lines[0]) >= {"path", "caption", "task", "seed", "camera", "success", "fps", "split"}

    from stvision.datasets.clips import ClipFolder

    record = ClipFolder(tmp_path)[0]
    assert record.frames.shape == (3, 32, 32, 3) and record.frames.float().std() > 10
    assert float(record.times[-1]) == pytest.approx(lines[0]["duration"], abs=1e-4)
    with pytest.raises(ValueError, match="other settings"):
        render(tmp_path, episodes=1, **{**arguments, "num_frames": 4})


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fly-v3'"):
        render(tmp_path, tasks=["fly-v3"])
    with pytest.raises(ValueError, match="cameras: 'moon'"):
        render(tmp_path, cameras=["moon"])
    with pytest.raises(ValueError, match="even"):
        render(tmp_path, size=33)


def test_nothing_is_chosen_at_import() -> None:
    code = (
        "import sys, os, stvision.datasets.metaworld;"
        "print('mujoco' in sys.modules, 'MUJOCO_GL' in os.environ)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=clean
    )
    assert done.stdout.split() == ["False", "False"]


def test_interruption_stops_soon_and_resumes(tmp_path: Path) -> None:
    needs_simulator()
    command = [sys.executable, "-m", "stvision", "data", "metaworld", "--out", str(tmp_path)]
    command += ["--tasks", "handle-press-v3", "drawer-close-v3", "--episodes", "20"]
    command += ["--size", "16", "16", "--frames", "2", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    journal = tmp_path / ".episodes.jsonl"

    def finished() -> int:
        return len(journal.read_text().splitlines()) - 1 if journal.exists() else 0

    deadline = time.monotonic() + 60
    while finished() < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if b"no OpenGL" in errors:
        pytest.skip("no OpenGL here")
    assert process.returncode == 130
    kept = len((tmp_path / "index.jsonl").read_text().splitlines())
    assert 2 <= kept == finished() < 40
    assert not list(tmp_path.rglob(".*.mp4"))
