"""Fit a pipeline into a byte budget: count what a call needs, pick the least intrusive settings.

Needs are counted, not guessed: the networks run on fake tensors (shapes and dtypes without data),
while every storage that is made and freed is summed. That costs no memory and no arithmetic, works
for any architecture, and is the same on every machine; a real allocator adds some slack, which the
plan allows for.
"""

import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Offload = Literal["none", "model", "sequential"]

#: What an allocator holds beyond the live tensors: rounding, fragments, workspaces of libraries.
ALLOCATOR_SLACK = 1.15


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Settings of a pipeline and the peak that a call with them is expected to reach.

    Args:
        dtype: dtype of the weights.
        offload: ``"none"``; ``"model"``: one network on the accelerator at a time;
            ``"sequential"``: one layer at a time.
        vae_chunk: frames that the VAE takes at once; None for all.
        vae_tiling: whether the VAE works in tiles within a frame.
        batch_guidance: whether both branches of guidance run as one batch.
        peak_bytes: expected peak on the execution device.
    """

    dtype: torch.dtype
    offload: Offload = "none"
    vae_chunk: int | None = None
    vae_tiling: bool = False
    batch_guidance: bool = True
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


class _LiveBytes(TorchDispatchMode):
    """Sums the storages alive among those made inside the mode, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            item.untyped_storage()._cdata
            for item in tree_iter((args, kwargs))
            if isinstance(item, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return result  # a real weight's view is fake, yet nothing new
        for item in tree_iter(result):
            if not isinstance(item, Tensor):
                continue
            storage = item.untyped_storage()
            key = storage._cdata
            if key in inputs or key in self._seen:
                continue
            size = storage.nbytes()
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)
        return result


def activation_bytes(run: Callable[[Callable[..., Tensor]], object]) -> int:
    """Peak bytes of the tensors that a computation makes, its inputs included.

    Args:
        run: called with ``zeros(*shape, dtype=...)``, which makes fake inputs on the CPU; whatever
            it computes with them and with real modules (whose weights are not counted) is summed.

    Neither gradients nor inference mode nor autocast around the call change the count.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext(),
        FakeTensorMode(allow_non_fake_inputs=True),
        _LiveBytes() as counter,
    ):
        run(torch.zeros)
    return counter.peak


def weight_bytes(module: nn.Module | None, dtype: torch.dtype | None = None) -> int:
    """Bytes of a module's parameters and buffers, floating ones counted in ``dtype`` if given."""
    if module is None:
        return 0
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        floating = tensor.is_floating_point() and dtype is not None
        size = torch.empty((), dtype=dtype).element_size() if floating else tensor.element_size()
        total += tensor.numel() * size
    return total


def largest_layer_bytes(module: nn.Module | None, dtype: torch.dtype | None = None) -> int:
    """Bytes of the heaviest layer: what sequential offload holds at a time."""
    if module is None:
        return 0
    leaves = [item for item in module.modules() if not any(True for _ in item.children())]
    return max((weight_bytes(leaf, dtype) for leaf in leaves), default=0)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: allocated bytes on a GPU since the last reset, else resident bytes of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement on a GPU; a process' resident peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# ---------------------------------------------------------------------------------------------
# The VAE, some frames at a time


@contextmanager
def vae_tiles(vae: Any, enabled: bool) -> Iterator[None]:
    """Tile within the ``with`` block only; the VAE's own switch is put back, also on an error."""
    before = getattr(vae, "use_tiling", False)
    if enabled and not before:
        vae.enable_tiling()
    try:
        yield
    finally:
        if enabled and not before:
            vae.disable_tiling()


def encode_frames(
    vae: Any, frames: Tensor, *, chunk: int | None = None, tiling: bool = False
) -> Tensor:
    """Scaled latents of frames, the distribution's mean, a few frames at a time.

    Args:
        vae: ``AutoencoderKL``-like image VAE.
        frames: (B, 3, T, H, W) in [-1, 1].
        chunk: frames encoded at once over the whole batch; all when None.
        tiling: work in tiles within a frame.

    Returns:
        Latents (B, C, T, h, w), shifted and scaled by the VAE's configuration.
    """
    shift, scale = _latent_affine(vae)
    batch = frames.shape[0]
    flat = frames.transpose(1, 2).flatten(0, 1)
    with vae_tiles(vae, tiling):
        parts = [vae.encode(part).latent_dist.mode() for part in flat.split(_step(flat, chunk))]
    latents = (parts[0] if len(parts) == 1 else torch.cat(parts)) - shift
    return (latents * scale).unflatten(0, (batch, -1)).transpose(1, 2)


def decode_frames(
    vae: Any, latents: Tensor, *, chunk: int | None = None, tiling: bool = False
) -> Tensor:
    """Frames of scaled latents, a few frames at a time.

    Args:
        vae: ``AutoencoderKL``-like image VAE.
        latents: (B, C, T, h, w) as ``encode_frames`` makes them.
        chunk: frames decoded at once over the whole batch; all when None.
        tiling: work in tiles within a frame.

    Returns:
        Frames (B, 3, T, H, W), about [-1, 1], not clamped.
    """
    shift, scale = _latent_affine(vae)
    batch = latents.shape[0]
    flat = (latents / scale + shift).transpose(1, 2).flatten(0, 1)
    with vae_tiles(vae, tiling):
        parts = [vae.decode(part).sample for part in flat.split(_step(flat, chunk))]
    frames = parts[0] if len(parts) == 1 else torch.cat(parts)
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def _latent_affine(vae: Any) -> tuple[float, float]:
    shift = getattr(vae.config, "shift_factor", None)
    return (0.0 if shift is None else shift), vae.config.scaling_factor


def _step(flat: Tensor, chunk: int | None) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"vae_chunk must be at least 1 frame or None, got {chunk}")
    return len(flat) if chunk is None else chunk
