"""Which frame sizes a model can make, known before any weight is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRules:
    """Which sizes a model can make, known from its configuration alone.

    Args:
        multiple: height and width are multiples of this many pixels.
    """

    multiple: int

    def valid(self, height: int, width: int) -> bool:
        """Whether frames of ``height`` x ``width`` pixels can be made."""
        return min(height, width) > 0 and not (height % self.multiple or width % self.multiple)

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The valid size closest to the one asked for."""
        return self._around(height)[0], self._around(width)[0]

    def check(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest valid values, when a size cannot be made."""
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.multiple:
                nearest = " or ".join(map(str, sorted(self._around(value))))
                raise ValueError(
                    f"{name} must be a multiple of {self.multiple} pixels, got {value}; the "
                    f"nearest valid values are {nearest}"
                )

    def _around(self, value: int) -> list[int]:
        """The multiples on both sides, the nearer one first."""
        below = max(value // self.multiple, 1) * self.multiple
        return sorted({below, below + self.multiple}, key=lambda item: abs(item - value))


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
