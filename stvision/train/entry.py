"""What the command-line entries of all tasks share."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stvision.config import dump_config
from stvision.failures import REFUSALS, TRACEBACK, WRONG_INPUT, explain
from stvision.train.compilation import keep_compiled
from stvision.train.loop import Outcome

MEMORY_ADVICE = (
    "give a smaller --loop.batch-size with more --loop.gradient-accumulation-steps, "
    "--loop.mixed-precision bf16, or --gradient-checkpointing where the task has it; the same "
    "command then continues from the last checkpoint"
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global randomness starts at ``seed`` in the block and is untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def announce(config: Any) -> float:
    """Keep the configuration beside the training; the time from which its budget counts."""
    started = time.monotonic()
    if int(os.environ.get("RANK", "0")) == 0:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        dump_config(config, folder / "config.yaml")
    if config.loop.compile != "off":
        keep_compiled(Path(config.data.cache_dir) / "compiled")
    return started


def attempt(job: Callable[[], None]) -> int:
    """Run a job; its exit status.

    Wrong input becomes one sentence and status 2, a failure on the way one and status 1.
    """
    try:
        job()
    except (*WRONG_INPUT, *REFUSALS) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"stvision train: {explain(error, MEMORY_ADVICE)}", file=sys.stderr)
        return 2 if isinstance(error, WRONG_INPUT) else 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def report(run: Callable[[Any], Outcome], parse: Callable[[], Any]) -> int:
    """Run a task and print how it ended; failures as in :func:`attempt`."""

    def job() -> None:
        outcome = run(parse())
        if int(os.environ.get("RANK", "0")) == 0:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
            state = "finished" if outcome.finished else "stopped; the same command continues"
            print(f"step {outcome.step}: {state}{'; ' + numbers if numbers else ''}")

    return attempt(job)
