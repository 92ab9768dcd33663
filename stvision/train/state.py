"""What a checkpoint holds, and putting it back: weights, averages, optimizer, counters, randomness."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stvision.train import checkpoint
from stvision.train.ema import EMA


def derive_seed(seed: int, *numbers: int) -> int:
    """A seed for one place and moment, such as (step, micro-batch, rank); independent of history."""
    text = ",".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_state() -> dict[str, Any]:
    """State of every global random generator of this process, as plain data and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that require gradients, and all persistent buffers, by name."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name in trained or name not in frozen
    }


def frozen_fingerprint(model: nn.Module) -> list[float]:
    """Two sums over the frozen parameters, enough to notice that other weights were loaded."""
    sums = [
        torch.stack([p.detach().double().sum(), p.detach().double().abs().sum()])
        for p in model.parameters()
        if not p.requires_grad
    ]
    return torch.stack(sums).sum(0).tolist() if sums else [0.0, 0.0]


class TrainState:
    """Everything that changes while training.

    Args:
        accelerator: knows rank, device and gradient scaler.
        model: the module as built, not wrapped.
        optimizer: its optimizer.
        ema: its moving average, or None.
        source: where batches come from; ``state_dict`` and ``load_state_dict`` are used.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        source: Any,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.source = source
        self.step = 0
        self.last_validated = 0
        self.validation_seconds = 0.0
        #: steps in all, or None while they are not settled
        self.max_steps: int | None = None
        #: sums of logged values since the last line of the log, and the steps in them
        self.running: dict[str, Tensor] = {}
        self.running_steps = 0

    def save(self, folder: Path, keep_last: int) -> Path:
        """Write a checkpoint; every process calls this at the same step."""
        accelerator = self.accelerator
        temporary = folder / f".step_{self.step:08d}.writing"
        if accelerator.is_main_process:
            temporary = checkpoint.begin(folder, self.step)
            _save_tensors(trained_tensors(self.model), temporary / "model.safetensors")
            if self.ema is not None:
                _save_tensors(self.ema.state_dict(), temporary / "ema.safetensors")
            torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps(self._counters()))
        accelerator.wait_for_everyone()
        local = {
            "random": random_state(),
            "source": self.source.state_dict(),
            "running": {name: value.cpu() for name, value in self.running.items()},
        }
        torch.save(local, temporary / f"process_{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.finish(temporary, folder, self.step)
            checkpoint.clean(folder, keep_last)
        accelerator.wait_for_everyone()
        return checkpoint.checkpoint_path(folder, self.step)

    def _counters(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "max_steps": self.max_steps,
            "last_validated": self.last_validated,
            "validation_seconds": self.validation_seconds,
            "running_steps": self.running_steps,
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "processes": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
            "frozen": frozen_fingerprint(self.model),
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it belongs to another network, another frozen base, or another number of
                processes.
        """
        accelerator = self.accelerator
        counters = json.loads((path / "state.json").read_text())
        if counters["processes"] != accelerator.num_processes:
            raise ValueError(
                f"{path} was written by {counters['processes']} process(es); it continues exactly "
                f"with that number only, not with {accelerator.num_processes}"
            )
        if not np.allclose(frozen_fingerprint(self.model), counters["frozen"], rtol=1e-5):
            raise ValueError(f"{path} was trained on top of other frozen weights than these")
        _load_weights(self.model, load_file(path / "model.safetensors"), path)
        if self.ema is not None:
            if not (path / "ema.safetensors").is_file():
                raise ValueError(f"{path} holds no moving average, but ema_decay is set")
            averages = load_file(path / "ema.safetensors")
            self.ema.load_state_dict(averages, counters["ema_updates"])
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        if accelerator.scaler is not None and counters["scaler"] is not None:
            accelerator.scaler.load_state_dict(counters["scaler"])
        local = torch.load(
            path / f"process_{accelerator.process_index}.pt", map_location="cpu", weights_only=True
        )
        restore_random_state(local["random"])
        self.source.load_state_dict(local["source"])
        device = accelerator.device
        self.running = {name: value.to(device) for name, value in local["running"].items()}
        self.step = counters["step"]
        self.max_steps = counters["max_steps"]
        self.last_validated = counters["last_validated"]
        self.validation_seconds = counters["validation_seconds"]
        self.running_steps = counters["running_steps"]


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


def _load_weights(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    own = trained_tensors(model)
    odd = sorted(set(own) ^ set(stored)) or [
        name for name in own if own[name].shape != stored[name].shape
    ]
    if odd:
        raise ValueError(f"{path} belongs to another network or freezing: {odd[:3]} differ")
    model.load_state_dict(stored, strict=False)
