"""``python -m benchmarks``: run the benchmarks that this machine can run, one after the other."""

import subprocess
import sys
from pathlib import Path

import torch

#: module -> does it need a GPU
BENCHMARKS = {
    "video_io": False,
    "neighborhood": False,
    "backbones": False,
    "convs5": False,
    "light_attention": False,
    "seer_step": True,
    "broadway": True,
}


def main() -> int:
    failed = []
    for name, needs_gpu in BENCHMARKS.items():
        if not (Path(__file__).parent / f"{name}.py").exists():
            continue
        if needs_gpu and not torch.cuda.is_available():
            print(f"{name}: skipped, it needs a GPU")
            continue
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
