"""The training loop that all tasks share.

A task says what it trains, how a batch becomes the network's inputs and what is tried out in
validation; the loop owns optimisation, averaging, precision, logs, checkpoints and time. All
randomness of a step is derived from (seed, step, micro-batch, rank), so that a run that was killed
and started again repeats the very steps that it lost.
"""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm.auto import tqdm

from stvision.train.checkpoint import clean, complete_checkpoints
from stvision.train.compilation import compile_networks
from stvision.train.ema import EMA
from stvision.train.folders import replaced_folder
from stvision.train.graphed import GraphedStep
from stvision.train.length import Length
from stvision.train.log import append_line, cut_after, tensorboard_writer
from stvision.train.options import LoopConfig, learning_rate_factor
from stvision.train.state import TrainState, derive_seed

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int, micro: int, generator: torch.Generator) -> Batch:
        """The batch of this process for a micro-batch of a step, on its device."""

    def state_dict(self) -> dict[str, Any]:
        """Position, as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""

    def report(self) -> None:
        """Say in one line what was left out; called when training ends or stops."""


class Task:
    """What is trained. Sub-classes set ``model`` and override what differs.

    ``model(**inputs)`` returns a dict of scalars, among them ``"loss"``; it draws no randomness
    except dropout. Weights that are not trained must come out equal each time the task is built.
    """

    model: nn.Module

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """Arguments of ``model`` for a batch; noise, timesteps and the like are drawn here."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; ``lr_scale`` multiplies the learning rate, ``clip=False`` exempts."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def after_step(self) -> None:
        """Called after each step of the optimizer, before averages are updated."""

    def compile_targets(self) -> list[nn.Module]:
        """Networks inside ``model`` that :attr:`LoopConfig.compile` applies to."""
        return [self.model]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Metrics with the averaged weights, on the main process; pictures go to ``folder``."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the trained model with the averaged weights, as users load it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`fit` ended.

    Args:
        step: optimizer steps made over the whole training.
        finished: False when time or a signal ended it first; the same call continues it.
        metrics: values of the last validation.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The process group, device and precision of a training."""
    return Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.collective_timeout)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def fit(
    task: Task,
    source: Source,
    config: LoopConfig,
    output_dir: str | Path,
    *,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    started: float | None = None,
) -> Outcome:
    """Train a task to its end, or as far as the time allows; call again to continue.

    In ``output_dir`` appear ``checkpoints/``, ``metrics.jsonl``, ``validation.jsonl``,
    ``validation/step_<n>/``, ``tensorboard/``, ``status.json`` and, at the end, ``model/``.

    Args:
        task: what is trained; its model is moved to the device here.
        source: where batches come from.
        config: how.
        output_dir: folder of this training; an existing one is continued.
        seed: of all randomness.
        accelerator: made from ``config`` when None.
        started: ``time.monotonic()`` from which ``max_seconds`` counts; now when None.

    Raises:
        ValueError: a checkpoint of another training lies there, or the loss is not finite.
    """
    return _Run(task, source, config, Path(output_dir), seed, accelerator, started).run()


class _Run:
    """One call of :func:`fit`."""

    def __init__(
        self,
        task: Task,
        source: Source,
        config: LoopConfig,
        output_dir: Path,
        seed: int,
        accelerator: Accelerator | None,
        started: float | None,
    ) -> None:
        self.started = time.monotonic() if started is None else started
        self.task, self.source, self.config, self.seed = task, source, config, seed
        self.accelerator = accelerator or make_accelerator(config)
        self.output_dir = output_dir
        self.checkpoints = output_dir / "checkpoints"
        self.length = Length(config, output_dir, self.accelerator, self.started)
        self.signalled = False
        self.save_seconds = 1.0
        device = self.accelerator.device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)

        model = task.model.to(device).train()
        if config.channels_last:
            # weights alone: convolutions hand the layout on to all that follows
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator = torch.Generator(device)
        self.groups = [group for group in task.parameter_groups() if group["params"]]
        if not self.groups:
            raise ValueError("nothing is trained: every parameter of the model is frozen")
        self.ema = None if config.ema_decay is None else EMA(model, config.ema_decay)
        optimizer = torch.optim.AdamW(
            [{"params": g["params"], **_options(g)} for g in self.groups],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        compiled_graphs = config.compile != "off" and config.compile_mode == "reduce-overhead"
        self.replays_graphs = config.cuda_graphs or compiled_graphs
        compile_networks(task.compile_targets(), config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.state = TrainState(self.accelerator, model, optimizer, self.ema, source)
        if self.replays_graphs:
            # gradients that a CUDA graph writes belong to the graph's own memory; buffers of ours
            # into which they are added survive from one replay to the next
            for group in self.groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        self._forward_backward: Callable[[dict[str, Any]], dict[str, Tensor]]
        self._forward_backward = self._plain_forward_backward
        if config.cuda_graphs:
            if self.accelerator.num_processes > 1:
                raise ValueError(
                    "cuda_graphs=True captures one process; train several with compile='whole'"
                )
            self._forward_backward = GraphedStep(
                lambda **inputs: self.model(**inputs), self._backward, model
            )

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def _plain_forward_backward(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        values = self.model(**inputs)
        self._backward(values["loss"])
        return values

    # -- the story -------------------------------------------------------------------------

    def run(self) -> Outcome:
        self._resume()
        config, state, length = self.config, self.state, self.length
        if length.reached(state.step) and self._finished_before():
            return Outcome(state.step, True, self._last_metrics())
        bar = tqdm(
            total=length.steps,
            initial=state.step,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
            desc="training",
        )
        metrics: dict[str, float] = {}
        main = config.tensorboard and self.accelerator.is_main_process
        folder = self.output_dir / "tensorboard" if main else None
        writer = tensorboard_writer(folder, state.step + 1)
        with writer as self.tensorboard, self._signals(), self._reporting(), bar:
            self.log_time, self.log_step = time.monotonic(), state.step
            while True:
                if self._must_stop():
                    if state.step > self._saved_step():
                        self._save()
                    self._status(finished=False)
                    return Outcome(state.step, False, metrics)
                if self._validation_due():
                    metrics = self._validate()
                if length.reached(state.step):
                    break
                if length.steps is None and 0 < state.step == config.settle_after:
                    self._save()  # its duration counts when the number of steps is settled
                length.before_step(state.step)
                self._step()
                bar.update()
                if length.due(state.step):
                    metrics = self._settle()
                    bar.total = length.steps
                last = length.reached(state.step)
                if state.step % config.log_every == 0 or last:
                    bar.set_postfix(self._log())
                if state.step % config.save_every == 0 or last:
                    self._save()
            self._export()
            self._status(finished=True)
        return Outcome(state.step, True, metrics)

    def _settle(self) -> dict[str, float]:
        """Fix the number of steps by what a step, a checkpoint and a validation took.

        The checkpoint follows the number, so that none from here on lacks it.
        """
        state = self.state
        each = self.length.seconds_per_step(state.step)
        metrics = self._validate()
        self.length.settle(state.step, each, self.save_seconds, state.validation_seconds)
        state.max_steps = self.length.steps
        self._save()
        return metrics

    def _step(self) -> None:
        config, state = self.config, self.state
        accumulation = config.gradient_accumulation_steps
        factor = learning_rate_factor(state.step, config, self.length.steps)
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = config.learning_rate * own.get("lr_scale", 1.0) * factor
        for micro in range(accumulation):
            place = (state.step, micro, self.accelerator.process_index)
            torch.manual_seed(derive_seed(self.seed, 1, *place))  # dropout
            self.generator.manual_seed(derive_seed(self.seed, 2, *place))
            with torch.no_grad():
                batch = self.source.batch(state.step, micro, self.generator)
                inputs = self.task.inputs(batch, self.generator)
            if self.replays_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            last = micro == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                values = self._forward_backward(inputs)
            for name, value in values.items():
                self._add(name, value.detach().float() / accumulation)
        if config.max_grad_norm is not None:
            clipped = [p for g in self.groups if g.get("clip", True) for p in g["params"]]
            norm = self.accelerator.clip_grad_norm_(clipped, config.max_grad_norm)
            if norm is not None:
                self._add("grad_norm", norm.detach().float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replays_graphs)
        self.task.after_step()
        if self.ema is not None:
            self.ema.update()
        state.step += 1
        state.running_steps += 1

    def _add(self, name: str, value: Tensor) -> None:
        running = self.state.running
        if name in running:
            running[name] += value
        else:
            running[name] = value.clone()

    # -- log -------------------------------------------------------------------------------

    def _log(self) -> dict[str, float]:
        """Average the values since the last line, write the line, return it for the bar."""
        state = self.state
        names = sorted(state.running)
        means = torch.stack([state.running[name] for name in names]) / state.running_steps
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        values = dict(zip(names, means.tolist(), strict=True))
        state.running, state.running_steps = {}, 0
        now = time.monotonic()
        seconds = (now - self.log_time) / max(1, state.step - self.log_step)
        self.log_time, self.log_step = now, state.step
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss became {values['loss']} at or before step {state.step}; the last "
                f"checkpoint in {self.checkpoints} is from before"
            )
        if self.accelerator.is_main_process:
            rate = self.optimizer.param_groups[0]["lr"]
            line = {**values, "learning_rate": rate, "seconds_per_step": seconds}
            append_line(self.output_dir / "metrics.jsonl", {"step": state.step, **line})
            if self.tensorboard is not None:
                for name, value in line.items():
                    self.tensorboard.add_scalar(f"train/{name}", value, state.step)
        return {"loss": values["loss"], "s/step": seconds}

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.source.report()

    def _finished_before(self) -> bool:
        status = self.output_dir / "status.json"
        known = json.loads(status.read_text()) if status.is_file() else {}
        done = known.get("finished") and known.get("step") == self.state.step
        return bool(done) and (self.output_dir / "model").is_dir()

    def _last_metrics(self) -> dict[str, float]:
        path = self.output_dir / "validation.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        values = json.loads(lines[-1]) if lines else {}
        return {name: value for name, value in values.items() if name != "step"}

    def _status(self, *, finished: bool) -> None:
        if self.accelerator.is_main_process:
            self.length.write_status(self.state.step, finished=finished)
            if not finished:
                total = "" if self.length.steps is None else f" of {self.length.steps}"
                tqdm.write(
                    f"stopped after step {self.state.step}{total} with a checkpoint; the same "
                    "command continues"
                )

    # -- checkpoints -----------------------------------------------------------------------

    def _resume(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            clean(self.checkpoints, self.config.keep_last)
        self.accelerator.wait_for_everyone()
        found = complete_checkpoints(self.checkpoints)
        if found:
            self.state.load(found[-1])
            if main:
                logger.info("continuing from %s", found[-1])
        self.length.restore(self.state.step, self.state.max_steps)
        self.state.max_steps = self.length.steps
        if main:
            for name in ("metrics.jsonl", "validation.jsonl"):
                cut_after(self.output_dir / name, self.state.step)
        # nothing may be written before every process has read
        self.accelerator.wait_for_everyone()

    def _saved_step(self) -> int:
        found = complete_checkpoints(self.checkpoints)
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def _save(self) -> None:
        begun = time.monotonic()
        self.state.save(self.checkpoints, self.config.keep_last)
        self.save_seconds = time.monotonic() - begun
        self.length.paused += self.save_seconds

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            with self._averaged(), replaced_folder(self.output_dir / "model") as folder:
                self.task.export(folder)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self.state.model.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.applied():
                yield
        finally:
            self.state.model.train()

    # -- validation and time ---------------------------------------------------------------

    def _validation_due(self) -> bool:
        every, step, last = self.config.validate_every, self.state.step, self.state.last_validated
        if self.length.reached(step):
            return last < step
        # a training that settles its length validates there, as one that knows it already must too
        settling = self.config.settling_step
        return (every > 0 and step // every * every > last) or step >= settling > last

    def _validate(self) -> dict[str, float]:
        begun = time.monotonic()
        state = self.state
        metrics: dict[str, float] = {}
        if self.accelerator.is_main_process:
            folder = self.output_dir / "validation" / f"step_{state.step:08d}"
            # other shapes than in training: compiling for them would take longer than they do
            eager = torch.compiler.set_stance("force_eager")
            with eager, self._averaged(), torch.no_grad():
                metrics = self.task.validate(state.step, folder)
            cut_after(self.output_dir / "validation.jsonl", state.step - 1)
            append_line(self.output_dir / "validation.jsonl", {"step": state.step, **metrics})
            if self.tensorboard is not None:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(f"validation/{name}", value, state.step)
        state.last_validated = state.step
        state.validation_seconds = time.monotonic() - begun
        self.log_time += state.validation_seconds
        self.length.paused += state.validation_seconds
        return metrics

    def _must_stop(self) -> bool:
        """Whether time is up or a signal came; all processes get the same answer."""
        limit = self.config.max_seconds
        stop = self.signalled
        if limit is not None:
            needed = self.config.reserve_seconds + 2 * self.save_seconds
            if self._validation_due():
                needed += self.state.validation_seconds
            stop = stop or time.monotonic() - self.started + needed > limit
        if self.accelerator.num_processes == 1:
            return stop
        if self.state.step % min(self.config.log_every, 10):
            return False
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first SIGINT end the training after the present step, with a checkpoint."""

        def handle(number: int, _frame: Any) -> None:
            if self.signalled and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signalled = True

        try:
            before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("weight_decay", "betas") if key in group}
