"""One training from its configuration to its outcome; what differs between tasks is the task."""

from dataclasses import dataclass
from typing import Any, Self

from accelerate import Accelerator

from stvision.train.entry import announce
from stvision.train.loop import LoopConfig, Outcome, Task, fit, make_accelerator
from stvision.train.sources import Prepared, prepare


@dataclass
class Run:
    """A training whose data is ready.

    Args:
        config: of the task; has ``output_dir``, ``seed``, ``loop`` and ``data``.
        accelerator: devices and processes.
        prepared: batches, and clips for validation.
        started: when it began, on the monotonic clock.
    """

    config: Any
    accelerator: Accelerator
    prepared: Prepared
    started: float

    @classmethod
    def begin(cls, config: Any, **reads: Any) -> Self:
        """Keep the configuration, find the devices, and make or open what the task reads.

        Args:
            config: see the class.
            reads: further arguments of :func:`~stvision.train.sources.prepare`, at least ``text``.
        """
        started = announce(config)
        accelerator = make_accelerator(config.loop)
        prepared = prepare(config.data, config.loop, accelerator, seed=config.seed, **reads)
        return cls(config, accelerator, prepared, started)

    def train(
        self,
        task: Task,
        *,
        loop: LoopConfig | None = None,
        output_dir: str | None = None,
        seed: int | None = None,
    ) -> Outcome:
        """Train, or continue; by the configuration where nothing else is said."""
        config = self.config
        return fit(
            task,
            self.prepared.source,
            config.loop if loop is None else loop,
            config.output_dir if output_dir is None else output_dir,
            seed=config.seed if seed is None else seed,
            accelerator=self.accelerator,
            started=self.started,
        )
