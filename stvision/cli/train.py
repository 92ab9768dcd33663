"""``stvision train TASK --config FILE [OPTIONS]``: the same as ``python -m stvision.train.TASK``."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass
class Command:
    """Train a model from a configuration file."""

    task: str
    """What is trained."""
    options: tuple[str, ...] = ()
    """`--config FILE` and options that override it; `--help` lists them."""


def parse(words: Sequence[str]) -> Command:
    """Take the task's name; its own module parses the rest.

    Raises:
        ValueError: no such task.
    """
    from stvision.train import TASKS

    if not words or words[0] in {"-h", "--help"}:
        return Command("")
    if words[0] not in TASKS:
        near = get_close_matches(words[0], TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}"
        raise ValueError(f"no task {words[0]!r}; {hint}")
    return Command(words[0], tuple(words[1:]))


def run(command: Command) -> int:
    """Train in this process; several processes are started by ``accelerate launch``."""
    from stvision.train import TASKS

    if not command.task:
        print(
            "usage: stvision train TASK [--config FILE] [--set KEY=VALUE ...] [OPTIONS]\n\ntasks:"
        )
        for name, (_, summary) in TASKS.items():
            print(f"  {name:<8} {summary}")
        print(
            "\n--set changes any key of the configuration, such as --set inflation.attention=full;"
        )
        print("stvision train TASK --help lists the other options")
        print("\non several GPUs: accelerate launch -m stvision.train.TASK --config FILE")
        return 0
    module = importlib.import_module(TASKS[command.task][0])
    return module.main(list(command.options)) or 0
