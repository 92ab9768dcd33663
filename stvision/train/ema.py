"""Exponential moving average of trained parameters, updated by a handful of fused launches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of the parameters of a module that require gradients.

    Running statistics of normalisations (floating-point buffers that are saved) are averaged too.
    Kept in float32 on the parameters' device. The decay rises as (1 + n) / (10 + n) towards
    ``decay`` over the n updates made, so that the first steps do not keep the random start.

    Args:
        module: its parameters with ``requires_grad`` at this moment are averaged.
        decay: weight of the old average, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        saved = module.state_dict(keep_vars=True)
        named: list[tuple[str, Tensor]] = [
            (name, p) for name, p in module.named_parameters() if p.requires_grad
        ]
        named += [
            (name, buffer)
            for name, buffer in module.named_buffers()
            if name in saved and buffer.is_floating_point()
        ]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._averages = [p.detach().clone().float() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters; call after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._averages:
            current = [parameter.detach() for parameter in self._parameters]
            if any(parameter.dtype != torch.float32 for parameter in current):
                current = [parameter.float() for parameter in current]
            torch._foreach_lerp_(self._averages, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module computes with the averages; afterwards as before."""
        with torch.no_grad():
            kept = [parameter.detach().clone() for parameter in self._parameters]
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Take over averages written by :meth:`state_dict`.

        Raises:
            ValueError: other names than this module's.
        """
        if set(state) != set(self._names):
            odd = sorted(set(state) ^ set(self._names))[:3]
            raise ValueError(f"the stored average belongs to another set of parameters: {odd}")
        with torch.no_grad():
            for name, average in zip(self._names, self._averages, strict=True):
                average.copy_(state[name])
        self.updates = updates
