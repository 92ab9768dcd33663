"""``stvision tune``: find the fastest shapes of the neighborhood kernels for a problem, keep them."""

from collections.abc import Sequence


def parse(words: Sequence[str]) -> list[str]:
    """The options are those of :mod:`stvision.kernels.neighborhood.tune`, which reads them."""
    return list(words)


def run(words: list[str]) -> int:
    from stvision.kernels.neighborhood import tune

    return tune.main(words)
