"""A training so small that its whole course can be compared, run as a process of its own."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stvision.train.data import ResidentSource
from stvision.train.loop import LoopConfig, Task, fit, make_accelerator


class Net(nn.Module):
    def __init__(self, delay: float) -> None:
        super().__init__()
        self.delay = delay
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        time.sleep(self.delay)
        return {"loss": (self.body(x + noise) - x).square().mean()}


class Denoise(Task):
    def __init__(self, delay: float = 0.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Net(delay)

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        x = batch["x"]
        return {"x": x, "noise": torch.randn(x.shape, generator=generator, device=x.device)}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return {"weight": float(self.model.body[0].weight.sum())}

    def export(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "model.pt")


def train(folder: str, delay: float = 0.0, **options: Any):
    defaults = {
        "max_steps": 40,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "log_every": 1,
        "save_every": 7,
        "validate_every": 10,
        "tensorboard": False,
    }
    config = LoopConfig(**{**defaults, **options})
    accelerator = make_accelerator(config)
    data = torch.randn(23, 4, generator=torch.Generator().manual_seed(1))
    source = ResidentSource(
        {"x": data},
        config.batch_size,
        config.gradient_accumulation_steps,
        seed=5,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )
    return fit(Denoise(delay), source, config, folder, seed=5, accelerator=accelerator)


if __name__ == "__main__":
    extra = dict(word.split("=") for word in sys.argv[2:])
    train(sys.argv[1], **{name: int(v) if v.isdigit() else float(v) for name, v in extra.items()})
