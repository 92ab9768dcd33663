"""Parse, call, print: the entry of the ``stvision`` command."""

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from stvision import __version__
from stvision.cli import COMMANDS, MEMORY_ADVICE
from stvision.failures import REFUSALS, TRACEBACK, WRONG_INPUT, explain


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"stvision {__version__}: video and multimodal spatiotemporal modelling",
            "",
            "usage: stvision COMMAND [OPTIONS]      stvision COMMAND --help",
            "",
            "commands:",
            *lines,
            "",
            f"{TRACEBACK}=1 in the environment shows where a command failed.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``stvision`` command.

    Args:
        argv: words after ``stvision``; the process's own when ``None``.

    Returns:
        Exit status: 0 success, 1 a failure on the way, such as memory that ran out, 2 a wrong
        argument, a missing file or a missing dependency, 130 interrupted. Failures are one sentence
        on standard error; ``STVISION_TRACEBACK=1`` shows the traceback instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has read enough, such as `| head`
        # what is still buffered must not fail once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0
    if words[0] in {"-V", "--version"}:
        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}"
        print(f"stvision: no command {name!r}{hint}", file=sys.stderr)
        return 2

    module_name, summary = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
        if hasattr(module, "parse"):
            # a command whose options depend on a first word or a file parses for itself
            command = module.parse(rest)
        else:
            import tyro

            command = tyro.cli(
                module.Command, args=rest, prog=f"stvision {name}", description=summary
            )
        return module.run(command) or 0
    except SystemExit as stop:  # the parser has printed its help, or what it did not understand
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("stvision: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (*WRONG_INPUT, *REFUSALS) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"stvision {name}: {explain(error, MEMORY_ADVICE.get(name, ''))}", file=sys.stderr)
        return 2 if isinstance(error, WRONG_INPUT) else 1


if __name__ == "__main__":
    raise SystemExit(main())
