"""Failures of a command as one sentence that says what to do."""

#: environment variable that lets commands show a failure's traceback instead of a sentence
TRACEBACK = "STVISION_TRACEBACK"

#: exceptions that commands turn into a sentence: wrong input, and what the machine refuses
WRONG_INPUT = (ValueError, TypeError, OSError, ImportError)
REFUSALS = (RuntimeError, MemoryError)

_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def explain(error: BaseException, memory_advice: str = "") -> str:
    """What went wrong, in one line.

    Args:
        error: one of :data:`WRONG_INPUT` or :data:`REFUSALS`.
        memory_advice: what helps where memory ran out, such as ``"give a smaller --size"``.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    if isinstance(error, WRONG_INPUT) and not isinstance(error, RuntimeError):
        return " ".join(lines)
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _MEMORY):
        cause = lines[0].rstrip(".")
        said = "out of memory" if isinstance(error, MemoryError) else f"out of memory ({cause})"
        return f"{said}; {memory_advice}" if memory_advice else said
    # a worker process hands its whole traceback on, whose last line says what happened
    line = lines[-1] if "Traceback" in str(error) else lines[0]
    if line.endswith(":") and len(lines) > 1:  # such as "backend='inductor' raised:"
        line = f"{line} {lines[lines.index(line) + 1]}"
    return f"{line.rstrip('.')} ({TRACEBACK}=1 shows where)"
