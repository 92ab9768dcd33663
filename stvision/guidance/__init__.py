"""Training-free guidance: methods that change a model while it runs and leave it as it was."""

import stvision.models  # noqa: F401  before diffusers: sees to it that it can be imported
from stvision.guidance.broadway import (
    PRESETS,
    BroadWay,
    BroadWayRun,
    disable_broadway,
    enable_broadway,
    measure_energy,
)
from stvision.guidance.maps import (
    attention_energy,
    band_energies,
    fourier_motion_enhancement,
    high_band,
    motion_gain,
    resize_maps,
    temporal_self_guidance,
)

__all__ = [
    "PRESETS",
    "BroadWay",
    "BroadWayRun",
    "attention_energy",
    "band_energies",
    "disable_broadway",
    "enable_broadway",
    "fourier_motion_enhancement",
    "high_band",
    "measure_energy",
    "motion_gain",
    "resize_maps",
    "temporal_self_guidance",
]
