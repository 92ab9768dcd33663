"""Which settings of a pipeline fit a byte budget: the candidates, their peaks, how they are said."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from stvision.pipelines.memory import (
    ALLOCATOR_SLACK,
    MemoryPlan,
    Offload,
    largest_layer_bytes,
    weight_bytes,
)

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(budget: float | str) -> int:
    """Bytes of ``8_000_000_000``, ``"8GB"`` (powers of ten) or ``"7.5 GiB"`` (powers of two)."""
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        value = float(budget)
    else:
        text = str(budget).strip().lower()
        number = text.rstrip("bgikm ")
        unit = text[len(number) :].strip()
        try:
            value = float(number) * _UNITS["" if unit == "b" else unit]
        except (KeyError, ValueError):
            raise ValueError(
                f"a byte budget is a number or text such as '8GB' or '7.5GiB', got {budget!r}"
            ) from None
    if not value > 0:
        raise ValueError(f"a byte budget must be positive, got {budget!r}")
    return int(value)


def candidate_plans(
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep_precision: bool = False,
    may_offload: bool = True,
) -> Iterator[MemoryPlan]:
    """Settings from the least to the most intrusive, without their peaks.

    Args:
        dtype: dtype that the weights have.
        device: where calls will run.
        keep_precision: no plan changes ``dtype``.
        may_offload: plans may move networks between host and device during a call.
    """
    dtypes = [dtype]
    if not keep_precision and dtype == torch.float32:
        bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
        dtypes.append(torch.bfloat16 if bf16 else torch.float16)
    offloads: list[Offload] = ["none"]
    if device.type != "cpu" and may_offload:
        offloads += ["model", "sequential"]
    for offload in offloads:
        for kind in dtypes:
            plan = MemoryPlan(dtype=kind, offload=offload)
            for batched in (True, False):
                for chunk in (None, 8, 4, 2, 1):
                    yield replace(plan, vae_chunk=chunk, batch_guidance=batched)
            yield replace(plan, vae_chunk=1, batch_guidance=False, vae_tiling=True)


def with_peak(
    plan: MemoryPlan, networks: Mapping[str, nn.Module], needs: Mapping[str, int]
) -> MemoryPlan:
    """The plan with the peak that it is expected to reach on the execution device.

    Args:
        plan: settings.
        networks: name -> network.
        needs: name -> bytes of activations of its heaviest evaluation, in its present dtype;
            networks that are not named need none.
    """
    wanted = plan.dtype.itemsize
    scaled = {
        name: needs.get(name, 0) * wanted // _dtype_of(network).itemsize
        for name, network in networks.items()
    }
    if plan.offload == "none":
        weights = sum(weight_bytes(network, plan.dtype) for network in networks.values())
        peak = weights + max(scaled.values())
    else:
        hold = weight_bytes if plan.offload == "model" else largest_layer_bytes
        peak = max(hold(item, plan.dtype) + scaled[name] for name, item in networks.items())
    return replace(plan, peak_bytes=int(peak * ALLOCATOR_SLACK))


def first_that_fits(plans: Iterable[MemoryPlan], limit: int) -> tuple[MemoryPlan | None, int]:
    """The first plan whose peak is at most ``limit`` bytes, else None; and the least peak seen."""
    least: int | None = None
    for plan in plans:
        if plan.peak_bytes <= limit:
            return plan, plan.peak_bytes
        least = plan.peak_bytes if least is None else min(least, plan.peak_bytes)
    if least is None:
        raise ValueError("there is no plan to choose from")
    return None, least


def _dtype_of(network: nn.Module) -> torch.dtype:
    return next((item.dtype for item in network.parameters() if item.is_floating_point()),
                torch.float32)  # fmt: skip


def as_gib(count: int) -> str:
    """Bytes as text, in GiB or, below half of one, in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def describe(plan: MemoryPlan) -> str:
    """A plan's settings in words."""
    chunk = "all frames" if plan.vae_chunk is None else f"{plan.vae_chunk} frames"
    return (
        f"{str(plan.dtype).removeprefix('torch.')}, offload {plan.offload}, VAE {chunk} at once"
        f"{' in tiles' if plan.vae_tiling else ''}, guidance "
        f"{'batched' if plan.batch_guidance else 'in two passes'}"
    )
