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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm.auto import tqdm

from stvision.optional import require
from stvision.train.checkpoint import clean, complete_checkpoints
from stvision.train.ema import EMA
from stvision.train.folders import replaced_folder
from stvision.train.state import TrainState, derive_seed

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class LoopConfig:
    """How a network is optimised; the same for every task."""

    max_steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 8
    """Items in one micro-batch of one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in one optimizer step."""
    learning_rate: float = 1e-4
    """Highest learning rate, after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; none means no clipping."""
    ema_decay: float | None = 0.999
    """Decay of the moving average that is validated and exported; none switches it off."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; none follows `accelerate launch --mixed_precision`."""
    compile: Literal["off", "regional", "whole"] = "off"
    """torch.compile for nothing, for the repeated blocks, or for each whole network."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile; "reduce-overhead" replays CUDA graphs."""
    deterministic: bool = False
    """Refuse operators whose result may differ between two runs on a GPU."""
    log_every: int = 20
    """Steps between two lines of the log; in between nothing waits for the device."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    validate_every: int = 0
    """Steps between two validations; 0 validates at the end only."""
    max_seconds: float | None = None
    """Stop with a checkpoint before this much time has passed since the start of the process."""
    reserve_seconds: float = 10.0
    """Time kept free at the end of `max_seconds`, on top of what saving and validating took."""
    collective_timeout: float = 1800.0
    """Seconds after which a process stops waiting for the others."""
    tensorboard: bool = True
    """Write TensorBoard files besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "keep_last"):
            _at_least(name, getattr(self, name), 1)
        for name in ("log_every", "save_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "validate_every", "learning_rate", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.max_seconds is not None and self.max_seconds <= self.reserve_seconds:
            raise ValueError(
                f"max_seconds={self.max_seconds} must exceed reserve_seconds="
                f"{self.reserve_seconds}, or no step would ever be made"
            )


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int, micro: int, generator: torch.Generator) -> Batch:
        """The batch of this process for a micro-batch of a step, on its device."""

    def state_dict(self) -> dict[str, Any]:
        """Position, as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


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


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    """Learning rate of the step with this number (from 0), as a share of the highest one."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    length = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    low = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


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
        self.replays_graphs = config.compile != "off" and config.compile_mode == "reduce-overhead"
        _compile(task, config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.state = TrainState(self.accelerator, model, optimizer, self.ema, source)
        if self.replays_graphs:
            # gradients that a CUDA graph writes belong to the graph's own memory; buffers of ours
            # into which they are added survive from one replay to the next
            for group in self.groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)

    # -- the story -------------------------------------------------------------------------

    def run(self) -> Outcome:
        self._resume()
        config, state = self.config, self.state
        if state.step >= config.max_steps and self._finished_before():
            return Outcome(state.step, True, self._last_metrics())
        bar = tqdm(
            total=config.max_steps,
            initial=state.step,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
            desc="training",
        )
        metrics: dict[str, float] = {}
        with self._writer() as self.tensorboard, self._signals(), bar:
            self.log_time, self.log_step = time.monotonic(), state.step
            while True:
                if self._must_stop():
                    if state.step > self._saved_step():
                        self._save()
                    self._status(finished=False)
                    return Outcome(state.step, False, metrics)
                if self._validation_due():
                    metrics = self._validate()
                if state.step >= config.max_steps:
                    break
                self._step()
                bar.update()
                if state.step % config.log_every == 0 or state.step == config.max_steps:
                    bar.set_postfix(self._log())
                if state.step % config.save_every == 0 or state.step == config.max_steps:
                    self._save()
            self._export()
            self._status(finished=True)
        return Outcome(state.step, True, metrics)

    def _step(self) -> None:
        config, state = self.config, self.state
        accumulation = config.gradient_accumulation_steps
        factor = learning_rate_factor(state.step, config)
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
                values = self.model(**inputs)
                self.accelerator.backward(values["loss"] / accumulation)
            for name, value in values.items():
                self._add(name, value.detach().float() / accumulation)
        if config.max_grad_norm is not None:
            clipped = [p for g in self.groups if g.get("clip", True) for p in g["params"]]
            norm = self.accelerator.clip_grad_norm_(clipped, config.max_grad_norm)
            if norm is not None:
                self._add("grad_norm", norm.detach().float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replays_graphs)
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
            _append(self.output_dir / "metrics.jsonl", {"step": state.step, **line})
            if self.tensorboard is not None:
                for name, value in line.items():
                    self.tensorboard.add_scalar(f"train/{name}", value, state.step)
        return {"loss": values["loss"], "s/step": seconds}

    @contextmanager
    def _writer(self) -> Iterator[Any]:
        if not (self.config.tensorboard and self.accelerator.is_main_process):
            yield None
            return
        require("tensorboard", extra="train")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            str(self.output_dir / "tensorboard"), purge_step=self.state.step + 1, flush_secs=30
        )
        try:
            yield writer
        finally:
            writer.close()

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
            status = {"step": self.state.step, "max_steps": self.config.max_steps}
            _write_json(self.output_dir / "status.json", {**status, "finished": finished})
            if not finished:
                tqdm.write(
                    f"stopped after step {self.state.step} of {self.config.max_steps} with a "
                    "checkpoint; the same command continues"
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
        if main:
            for name in ("metrics.jsonl", "validation.jsonl"):
                _cut_after(self.output_dir / name, self.state.step)
        # nothing may be written before every process has read
        self.accelerator.wait_for_everyone()

    def _saved_step(self) -> int:
        found = complete_checkpoints(self.checkpoints)
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def _save(self) -> None:
        begun = time.monotonic()
        self.state.save(self.checkpoints, self.config.keep_last)
        self.save_seconds = time.monotonic() - begun

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
        every, step = self.config.validate_every, self.state.step
        if step >= self.config.max_steps:
            return self.state.last_validated < step
        return every > 0 and step // every * every > self.state.last_validated

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
            _cut_after(self.output_dir / "validation.jsonl", state.step - 1)
            _append(self.output_dir / "validation.jsonl", {"step": state.step, **metrics})
            if self.tensorboard is not None:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(f"validation/{name}", value, state.step)
        state.last_validated = state.step
        state.validation_seconds = time.monotonic() - begun
        self.log_time += state.validation_seconds
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


def _compile(task: Task, config: LoopConfig) -> None:
    if config.compile == "off":
        return
    mode = None if config.compile_mode == "default" else config.compile_mode
    for target in task.compile_targets():
        regional: Any = getattr(target, "compile_repeated_blocks", None)
        if config.compile == "regional" and regional is not None:
            regional(mode=mode)
        else:
            target.compile(mode=mode)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2))
    os.replace(temporary, path)


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of steps that will be made again, and a last line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
