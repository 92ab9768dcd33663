"""The ``stvision`` command itself: help, unknown words, failures as one sentence, the report."""

import json
import subprocess
import sys

import pytest
import torch

from stvision.cli import COMMANDS, MEMORY_ADVICE, env
from stvision.cli.main import main
from stvision.failures import explain
from stvision.train.entry import report


def test_help_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and summary in shown for name, (_, summary) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_unknown_command_suggests_the_near_one(capsys: pytest.CaptureFixture) -> None:
    assert main(["predcit"]) == 2
    assert "did you mean 'predict'" in capsys.readouterr().err


def test_a_missing_file_is_one_sentence(tmp_path, capsys: pytest.CaptureFixture) -> None:
    missing = tmp_path / "nothing.mp4"
    assert main(["predict", str(missing), "--prompt", "push the puck"]) == 2
    shown = capsys.readouterr().err.strip()
    assert str(missing) in shown and len(shown.splitlines()) == 1


def test_env_reports_absence_and_the_installing_command(monkeypatch) -> None:
    monkeypatch.setitem(env.OPTIONAL, "no-such-part", (lambda: "", "pip install no-such-part"))
    probe = env.probe_optional("no-such-part")
    assert (probe.state, probe.version, probe.install) == (
        "absent",
        None,
        "pip install no-such-part",
    )


def test_env_reports_what_a_broken_part_said(monkeypatch) -> None:
    def broken() -> str:
        raise OSError("libnothing.so.1: cannot open shared object file")

    monkeypatch.setitem(env.OPTIONAL, "pytest", (broken, "pip install pytest"))
    probe = env.probe_optional("pytest")
    assert probe.state == "broken" and "libnothing.so.1" in probe.detail


def test_env_looks_for_the_weights_of_the_perceptual_distance(monkeypatch) -> None:
    monkeypatch.setattr("stvision.eval.metrics.lpips.WEIGHTS", "no-such-file.pth")
    monkeypatch.setattr(env, "_version", lambda name: "0.0.2")
    probe = env.probe_optional("stlpips-pytorch")
    assert probe.state == "broken" and "stlpips" in probe.detail


def test_env_json_is_one_object(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    # one cheap optional part stands for all: each is tried in a process of its own
    monkeypatch.setattr(env, "OPTIONAL", {"peft": env.OPTIONAL["peft"]})
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["required"]["torch"] and report["optional"][0]["name"] == "peft"


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")
HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
WORKER = RuntimeError(
    "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "  File 'x.py', line 1\nOSError: clip.mp4 is a folder"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GPU, "out of memory (CUDA out of memory. Tried to allocate 9.00 GiB"),
        (HOST, "out of memory ([enforce fail]"),
        (MemoryError(), "out of memory; give --memory"),
        (WORKER, "OSError: clip.mp4 is a folder (STVISION_TRACEBACK=1 shows where)"),
        (RuntimeError("no kernel"), "no kernel (STVISION_TRACEBACK=1 shows where)"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(
    error: Exception, said: str, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    from stvision.cli import predict

    def run(command) -> int:
        raise error

    monkeypatch.setattr(predict, "run", run)
    monkeypatch.delenv("STVISION_TRACEBACK", raising=False)
    words = ["predict", "a.png", "--prompt", "push"]
    assert main(words) == 1
    shown = capsys.readouterr().err.strip()
    assert said in shown and len(shown.splitlines()) == 1
    assert (MEMORY_ADVICE["predict"] in shown) == ("out of memory" in said)
    monkeypatch.setenv("STVISION_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(words)


def test_a_training_out_of_memory_says_what_to_change(
    monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    def run(config) -> None:
        raise GPU

    monkeypatch.delenv("STVISION_TRACEBACK", raising=False)
    assert report(run, lambda: None) == 1
    assert "--loop.batch-size" in capsys.readouterr().err


def test_advice_names_options_that_exist(capsys: pytest.CaptureFixture) -> None:
    for name, advice in MEMORY_ADVICE.items():
        words = [word.strip(",;") for word in advice.split() if word.startswith("--")]
        inner = {"eval": ["predict"], "data": ["metaworld"]}.get(name, [])
        main([name, *inner, "--help"])
        shown = capsys.readouterr().out
        assert words and all(word in shown for word in words), name


def test_wrong_input_of_several_lines_stays_one() -> None:
    assert explain(ValueError("first\n\n  second")) == "first second"
    compiler = RuntimeError(
        "backend='inductor' raised:\nKeyError: 'x'\n\nSet TORCHDYNAMO_VERBOSE=1"
    )
    assert explain(compiler).startswith("backend='inductor' raised: KeyError: 'x' (")


@pytest.mark.parametrize(
    "words",
    ["predict", "convert", "eval predict", "eval clips", "eval motion", "data metaworld"],
)
def test_help_says_defaults_in_words(words: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*words.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in shown and "(default: False)" in shown


def test_a_reader_that_stops_early_is_no_failure() -> None:
    words = [sys.executable, "-u", "-m", "stvision", "predict", "--help"]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait() == 0
