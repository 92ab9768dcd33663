"""Which denoising step a U-Net call belongs to, told from the scheduler and the timesteps."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _runs(values: list[float]) -> list[float]:
    """Values without consecutive repetitions: second-order schedulers list a time twice."""
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


class StepCounter:
    """Counts steps by changes of the timestep, so one step may take any number of U-Net calls.

    Args:
        schedule: gives the timesteps of the present sampling run, when they are not told with
            :meth:`start`.
        num_steps: length of a run, for a U-Net without scheduler.
    """

    def __init__(
        self, schedule: Callable[[], Any] | None = None, num_steps: int | None = None
    ) -> None:
        self._schedule = schedule
        self._num_steps = num_steps
        self._times: list[float] | None = None
        #: timesteps where they lie, and their values on the host
        self._told: tuple[Tensor, list[float]] | None = None
        self.index = -1
        self.total = 0
        self.runs = 0
        self._time: float | None = None

    def start(self, timesteps: Any = None) -> None:
        """A sampling run begins, with these timesteps."""
        self._times = None if timesteps is None else self._read(timesteps)
        self._time = None
        self.index = -1

    def _read(self, timesteps: Any) -> list[float]:
        """Values on the host; a tensor is remembered, so that its elements need no reading."""
        if not isinstance(timesteps, Tensor):
            return [float(t) for t in timesteps]
        values = [float(t) for t in timesteps.flatten().tolist()]
        self._told = (timesteps, values) if timesteps.ndim == 1 else None
        return values

    def _value(self, timestep: Any) -> float:
        """A timestep as a number, without waiting for the device where it is one that was told."""
        if not isinstance(timestep, Tensor):
            return float(timestep)
        if self._told is not None:
            told, values = self._told
            same = timestep.dtype == told.dtype and timestep.device == told.device
            if same and timestep.untyped_storage().data_ptr() == told.untyped_storage().data_ptr():
                offset = int(timestep.storage_offset()) - int(told.storage_offset())
                place, rest = divmod(offset, told.stride(0))
                if not rest and 0 <= place < len(values):
                    return values[place]
        return float(timestep.flatten()[0])

    def advance(self, timestep: Any) -> bool:
        """Note a U-Net call at ``timestep``; whether it begins a step.

        Raises:
            RuntimeError: the timestep is not one of the schedule.
        """
        time = self._value(timestep)
        if time == self._time:
            return False
        if self._time is None or time > self._time and self._num_steps is not None:
            self._begin(time)
        elif self._num_steps is None and self.index + 1 >= self.total:
            self._begin(time)  # a pipeline called again without setting its timesteps anew
        else:
            self.index += 1
        self._time = time
        return True

    def _begin(self, time: float) -> None:
        self.index = 0
        self.runs += 1
        if self._num_steps is not None:
            self.total = self._num_steps
            return
        times = self._times
        if times is None and self._schedule is not None:
            found = self._schedule()
            times = None if found is None else self._read(found)
        if not times or time not in times:
            raise RuntimeError(
                f"the U-Net was called at timestep {time:g}, which is not in the pipeline's "
                "schedule, so the share of steps cannot be told"
            )
        # image-to-video and video-to-video start inside the schedule
        self.total = len(_runs(times[times.index(time) :]))


class WatchedSetTimesteps:
    """Stands in for ``scheduler.set_timesteps`` and tells a counter of every run.

    A copy of the scheduler gets a copy of this, bound to itself and telling the same counter: some
    pipelines sample with a copy.
    """

    def __init__(self, scheduler: Any, counter: StepCounter) -> None:
        self.scheduler = scheduler
        self.counter = counter
        # pipelines look here for the arguments a scheduler takes
        self.__signature__ = inspect.signature(type(scheduler).set_timesteps.__get__(scheduler))

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.scheduler).set_timesteps(self.scheduler, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._plain(*args, **kwargs)
        self.counter.start(torch.as_tensor(self.scheduler.timesteps))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "WatchedSetTimesteps":
        return WatchedSetTimesteps(copy.deepcopy(self.scheduler, memo), self.counter)
