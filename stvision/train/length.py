"""How many steps a training makes when it is told how long it may take."""

import json
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from stvision.config import update_config
from stvision.train.log import write_json
from stvision.train.options import LoopConfig

logger = logging.getLogger(__name__)


class Length:
    """The number of steps in all: fixed, or settled once by timing steps.

    Once settled, the number lies in status.json, in config.yaml and in every checkpoint, and a
    continued training takes it from there whatever its own speed is.

    Args:
        config: of the loop.
        folder: of the training.
        accelerator: knows rank and device.
        started: ``time.monotonic()`` from which ``target_seconds`` counts.
    """

    def __init__(
        self, config: LoopConfig, folder: Path, accelerator: Accelerator, started: float
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.started = started
        self.steps = config.known_steps
        #: seconds that went into checkpoints and validations while steps were timed
        self.paused = 0.0
        self._begun: float | None = None
        self._first = 0

    def restore(self, step: int, stored: int | None) -> None:
        """Take over what was settled before: by the checkpoint, or by status.json.

        Args:
            step: steps made before this process.
            stored: what the checkpoint says.
        """
        # a process that continues before the number is settled has to compile again
        begin = step + self.config.settle_after
        self._first = max(0, min(begin, self.config.settling_step - 1))
        if self.config.max_steps != "auto":
            return
        if stored is None:
            status = self.folder / "status.json"
            known = json.loads(status.read_text()) if status.is_file() else {}
            stored = known.get("settled_steps")
        self.steps = stored or self.steps

    def reached(self, step: int) -> bool:
        """Whether all steps are made."""
        return self.steps is not None and step >= self.steps

    def before_step(self, step: int) -> None:
        """Start the clock where the timed steps begin."""
        if self.steps is None and step == self._first:
            self._begun, self.paused = self._now(), 0.0

    def due(self, step: int) -> bool:
        """Whether the number is to be settled after this many steps."""
        return self.steps is None and step >= self.config.settling_step

    def seconds_per_step(self, step: int) -> float:
        """Mean over the timed steps, without checkpoints and validations."""
        assert self._begun is not None
        return (self._now() - self._begun - self.paused) / (step - self._first)

    def settle(self, step: int, each: float, save: float, validate: float) -> None:
        """Settle the number; every process gets that of the main one.

        Args:
            step: steps made.
            each: seconds of a step.
            save: seconds of a checkpoint.
            validate: seconds of a validation.
        """
        config = self.config
        assert config.target_seconds is not None
        left = config.target_seconds - (time.monotonic() - self.started) - config.reserve_seconds
        each += save / config.save_every
        if config.validate_every:
            each += validate / config.validate_every
        count = step + max(0, int((left - save - validate) / each))
        found = torch.tensor(count, device=self.accelerator.device)
        self.steps = int(broadcast(found)) if self.accelerator.num_processes > 1 else count
        if self.accelerator.is_main_process:
            self.store(step)
            logger.info("%d steps of %.4f s fit into %g s", self.steps, each, config.target_seconds)

    def store(self, step: int) -> None:
        """Write the number beside the training, for a process that continues it."""
        self.write_status(step, finished=False)
        kept = self.folder / "config.yaml"
        if kept.is_file():
            update_config(kept, {"loop": {"settled_steps": self.steps}})

    def write_status(self, step: int, *, finished: bool) -> None:
        """Write status.json."""
        status = {"step": step, "max_steps": self.steps, "finished": finished}
        if self.config.max_steps == "auto":
            status["settled_steps"] = self.steps
        write_json(self.folder / "status.json", status)

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.monotonic()
