"""How a network is optimised: the options that every task shares, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoopConfig:
    """How a network is optimised; the same for every task."""

    max_steps: int | Literal["auto"] = 1000
    """Optimizer steps in all; "auto" takes as many as fit into `target_seconds`."""
    target_seconds: float | None = None
    """With max_steps "auto": seconds from the start of the process to the end of the training."""
    settle_after: int = 20
    """With max_steps "auto": steps before the timed ones, in which networks are compiled."""
    settle_steps: int = 100
    """With max_steps "auto": steps that are timed, once, before the number is settled for good."""
    settled_steps: int | None = None
    """What "auto" was settled to; the training writes it into its own config.yaml."""
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
    """torch.compile for nothing, for the repeated blocks, or for each whole network. Blocks are
    ready sooner, whole networks make faster steps."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile; "reduce-overhead" replays CUDA graphs."""
    cuda_graphs: bool = False
    """Replay forward and backward of a step as one CUDA graph: for small networks on a large GPU,
    which wait for the host otherwise. Ready after a few steps; one process, one shape of batch."""
    channels_last: bool = False
    """Keep images with their channels innermost, as a GPU's half-precision convolutions want them."""
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
    """Time kept free at the end of `max_seconds` or `target_seconds`, on top of what saving and
    validating took."""
    collective_timeout: float = 1800.0
    """Seconds after which a process stops waiting for the others."""
    tensorboard: bool = True
    """Write TensorBoard files besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "keep_last", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_every", "settle_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "validate_every", "learning_rate", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        _at_least("settle_after", self.settle_after, 0)
        if self.max_steps != "auto":
            _at_least("max_steps", self.max_steps, 1)
        if (self.max_steps == "auto") != (self.target_seconds is not None):
            raise ValueError(
                f"max_steps={self.max_steps!r} and target_seconds={self.target_seconds} do not go "
                "together: 'auto' needs target_seconds, and a number leaves it out"
            )
        if self.target_seconds is not None and self.target_seconds <= self.reserve_seconds:
            raise ValueError(
                f"target_seconds={self.target_seconds} must exceed reserve_seconds="
                f"{self.reserve_seconds}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.cuda_graphs and self.compile != "off" and self.compile_mode == "reduce-overhead":
            raise ValueError(
                "cuda_graphs=True and compile_mode='reduce-overhead' both capture graphs: choose one"
            )
        if self.max_seconds is not None and self.max_seconds <= self.reserve_seconds:
            raise ValueError(
                f"max_seconds={self.max_seconds} must exceed reserve_seconds="
                f"{self.reserve_seconds}, or no step would ever be made"
            )

    @property
    def known_steps(self) -> int | None:
        """Steps in all, or None while "auto" is not settled."""
        return self.settled_steps if self.max_steps == "auto" else self.max_steps

    @property
    def settling_step(self) -> int:
        """Steps after which "auto" is settled; 0 when there is nothing to settle."""
        return self.settle_after + self.settle_steps if self.max_steps == "auto" else 0


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def learning_rate_factor(step: int, config: LoopConfig, max_steps: int | None = None) -> float:
    """Learning rate of the step with this number (from 0), as a share of the highest one.

    With ``max_steps="auto"`` the cosine begins after the timed steps, so that no rate depends on a
    number that is not known yet.

    Args:
        step: number of the step.
        config: schedule, and steps in all.
        max_steps: steps in all that "auto" was settled to; the configuration's when None.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    total = config.known_steps if max_steps is None else max_steps
    start = max(config.warmup_steps, config.settling_step)
    if config.schedule == "constant" or step < start:
        return 1.0
    if total is None:
        raise ValueError(f"step {step} needs the number of steps in all, which is not settled")
    progress = min(1.0, (step - start) / max(1, total - start))
    low = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
