"""Motion and consistency of clips: optical flow, steadiness along it, flicker.

No ground truth is needed, so the figures describe and do not rank: a still picture repeated has no
motion and is perfectly consistent. Read them together, and best as pairs, before and after a change.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.eval.bootstrap import Estimate, bootstrap_mean
from stvision.eval.metrics import flicker, ssim
from stvision.eval.report import write_figure, write_text
from stvision.optional import mend_torchvision, require

Method = Literal["auto", "farneback", "raft"]
FlowName = Literal["farneback", "raft"]

#: columns of a report: attribute of ClipMotion -> title
MEASURES = {
    "flow": "optical flow (pixels a frame)",
    "consistency": "consistency along the flow (SSIM)",
    "flicker": "flicker (mean change of a pixel)",
    "energy": "temporal-attention energy",
}


def _check_clip(frames: Tensor) -> Tensor:
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2:
        raise ValueError(
            f"frames must be (T, H, W, 3) of at least two frames, got {tuple(frames.shape)}"
        )
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise TypeError(f"frames must be uint8 or floating point in [0, 1], got {frames.dtype}")
    return frames.float()


def raft_weights() -> Path | None:
    """Weights of torchvision's small RAFT, when torchvision and they are on this machine."""
    mend_torchvision()
    try:
        require("torchvision.models.optical_flow", extra="vision", distribution="torchvision")
    except ImportError:
        return None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next(iter(sorted(folder.glob("raft_small_*.pth"))), None)


def choose_flow(method: Method = "auto") -> FlowName:
    """The method that "auto" stands for: RAFT when its weights are here, else Farneback.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: "raft" without weights; nothing is downloaded.
    """
    if method not in ("auto", "farneback", "raft"):
        raise ValueError(f"flow must be 'auto', 'farneback' or 'raft', got {method!r}")
    if method == "farneback":
        return "farneback"
    if raft_weights() is not None:
        return "raft"
    if method == "raft":
        raise FileNotFoundError(
            "RAFT needs torchvision and a file raft_small_*.pth in "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}; use flow 'farneback'"
        )
    return "farneback"


def _farneback(frames: Tensor) -> Tensor:
    cv2 = require("cv2", extra="plot", distribution="opencv-python-headless")
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = ((frames.cpu() * weights).sum(-1).clamp(0, 1) * 255).round().byte().numpy()
    flows = [
        cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        for first, second in itertools.pairwise(grey)
    ]
    return torch.stack([torch.from_numpy(flow) for flow in flows])


def _raft(frames: Tensor) -> Tensor:
    models = require("torchvision.models.optical_flow", extra="vision", distribution="torchvision")
    weights = raft_weights()
    if weights is None:
        raise FileNotFoundError("RAFT has no weights on this machine")
    model = models.raft_small(weights=None)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model = model.to(frames.device).eval()
    height, width = frames.shape[1:3]
    # the network needs multiples of 8 and at least 128 pixels
    size = [max(128, math.ceil(side / 8) * 8) for side in (height, width)]
    images = 2 * frames.permute(0, 3, 1, 2) - 1
    images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    flows = []
    with torch.no_grad():
        for first, second in itertools.pairwise(images):
            flows.append(model(first[None], second[None])[-1])
    flow = F.interpolate(torch.cat(flows), (height, width), mode="bilinear", align_corners=False)
    scale = torch.tensor([width / size[1], height / size[0]], device=flow.device)
    return flow.permute(0, 2, 3, 1) * scale


def optical_flow(frames: Tensor, method: Method = "auto") -> Tensor:
    """Displacement of every pixel from each frame to the next.

    Args:
        frames: (T, H, W, 3), uint8 or floating point in [0, 1].
        method: "farneback" (OpenCV), "raft" (torchvision's small model, weights on this machine)
            or "auto", see :func:`choose_flow`.

    Returns:
        (T - 1, H, W, 2) float32, columns then rows, in pixels.

    Raises:
        ValueError: the shape is not that of a clip.
        ImportError: the library is not there.
    """
    clip = _check_clip(frames)
    return _raft(clip) if choose_flow(method) == "raft" else _farneback(clip)


def warp(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch each frame's content back along the flow that leads to it.

    Args:
        frames: (N, C, H, W), the later frames.
        flow: (N, H, W, 2) from the earlier frames, pixels.

    Returns:
        (N, C, H, W) and (N, H, W) bool: where the flow stays inside the picture.
    """
    height, width = frames.shape[-2:]
    flow = flow.to(frames)
    y, x = torch.meshgrid(
        torch.arange(height, device=frames.device),
        torch.arange(width, device=frames.device),
        indexing="ij",
    )
    column, row = x + flow[..., 0], y + flow[..., 1]
    inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    grid = torch.stack(
        [2 * column / max(width - 1, 1) - 1, 2 * row / max(height - 1, 1) - 1], dim=-1
    )
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=True), inside


def flow_consistency(frames: Tensor, flow: Tensor) -> float:
    """Mean SSIM of each frame with the next one, fetched back along the flow.

    Pixels whose flow leaves the picture are taken from the earlier frame itself, so a moving camera
    is not punished. 1 for anything that only moves; lower where things change, melt or wobble.

    Args:
        frames: (T, H, W, 3), uint8 or floating point in [0, 1], sides of at least 11 pixels.
        flow: (T - 1, H, W, 2), see :func:`optical_flow`.
    """
    clip = _check_clip(frames).permute(0, 3, 1, 2)
    back, inside = warp(clip[1:], flow)
    back = torch.where(inside[:, None], back, clip[:-1])
    return float(ssim(back, clip[:-1]).mean())


@dataclass
class ClipMotion:
    """What was measured on one clip.

    Args:
        key: name of the clip.
        column: which side of a comparison it is.
        frames: how many.
        flow: mean length of the optical flow, pixels a frame.
        consistency: see :func:`flow_consistency`.
        flicker: mean absolute change of a pixel from frame to frame, values in [0, 1].
        energy: mean energy of temporal attention while the clip was made, when it was recorded.
    """

    key: str
    column: str
    frames: int
    flow: float
    consistency: float
    flicker: float
    energy: float | None = None


def measure_clip(
    frames: Tensor,
    key: str = "clip",
    column: str = "clips",
    *,
    method: Method = "auto",
    energy: float | None = None,
) -> ClipMotion:
    """Measure one clip.

    Args:
        frames: (T, H, W, 3), uint8 or floating point in [0, 1].
        key: name for the report.
        column: side of a comparison.
        method: see :func:`optical_flow`.
        energy: temporal-attention energy recorded while sampling, put in the row as it is.
    """
    clip = _check_clip(frames)
    flow = optical_flow(clip, method)
    images = clip.permute(0, 3, 1, 2)
    return ClipMotion(
        key,
        column,
        len(clip),
        float(flow.norm(dim=-1).mean()),
        flow_consistency(clip, flow),
        float(flicker(images, images[:1].expand_as(images))),
        energy,
    )


@dataclass
class MotionReport:
    """Rows and their means.

    Args:
        rows: one a clip and column.
        protocol: how it was measured.
    """

    rows: list[ClipMotion]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Columns in order of appearance."""
        return list(dict.fromkeys(row.column for row in self.rows))

    def values(self, column: str, measure: str) -> list[float]:
        """One number a clip that has it."""
        found = [getattr(row, measure) for row in self.rows if row.column == column]
        return [value for value in found if value is not None]

    def summary(self) -> dict[str, dict[str, Estimate | None]]:
        """Column -> measure -> mean with its interval."""
        return {
            column: {name: bootstrap_mean(self.values(column, name)) for name in MEASURES}
            for column in self.columns
        }

    def difference(self, before: str, after: str, measure: str) -> Estimate | None:
        """Mean of after minus before, clip by clip, over clips that both columns have."""
        sides: list[dict[str, float]] = []
        for column in (before, after):
            pairs = [(r.key, getattr(r, measure)) for r in self.rows if r.column == column]
            sides.append({key: value for key, value in pairs if value is not None})
        shared = [key for key in sides[0] if key in sides[1]]
        return bootstrap_mean([sides[1][key] - sides[0][key] for key in shared])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        summary = {
            column: {name: None if e is None else asdict(e) for name, e in measures.items()}
            for column, measures in self.summary().items()
        }
        rows = [asdict(row) for row in self.rows]
        return {"protocol": self.protocol, "summary": summary, "rows": rows}

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict`."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_markdown(self) -> str:
        """A table: measures down, columns across, and the paired difference for two columns."""
        columns = self.columns
        summary = self.summary()
        paired = len(columns) == 2
        head = ["measure", *columns, *(["difference, clip by clip"] if paired else [])]
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for name, title in MEASURES.items():
            cells = [summary[column][name] for column in columns]
            if all(cell is None for cell in cells):
                continue
            if paired:
                cells.append(self.difference(columns[0], columns[1], name))
            texts = ["" if cell is None else str(cell) for cell in cells]
            lines.append(f"| {title} | {' | '.join(texts)} |")
        lines.append("")
        lines += [f"- {name}: {value}" for name, value in self.protocol.items()]
        return "\n".join(lines) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw every clip's values, a panel a measure; clips of two columns are joined."""
        matplotlib = require("matplotlib", extra="plot")
        figures = require("matplotlib.figure", extra="plot")
        del matplotlib
        names = [n for n in MEASURES if any(getattr(r, n) is not None for r in self.rows)]
        columns = self.columns
        figure = figures.Figure(figsize=(3.2 * len(names), 3.6), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for panel, name in zip(panels, names, strict=True):
            by_key: dict[str, list[tuple[int, float]]] = {}
            for row in self.rows:
                value = getattr(row, name)
                if value is not None:
                    by_key.setdefault(row.key, []).append((columns.index(row.column), value))
            for points in by_key.values():
                xs, ys = zip(*points, strict=True)
                panel.plot(xs, ys, color="0.6", marker="o", markersize=3, linewidth=0.7)
            for index, column in enumerate(columns):
                values = self.values(column, name)
                if values:
                    mean = sum(values) / len(values)
                    panel.plot([index - 0.2, index + 0.2], [mean, mean], color="C3", linewidth=2)
            panel.set_xticks(range(len(columns)), columns)
            panel.set_xlim(-0.5, len(columns) - 0.5)
            panel.set_title(MEASURES[name], fontsize=9)
        write_figure(path, figure)


def measure_motion(
    clips: Mapping[str, Iterable[tuple[str, Tensor]]],
    *,
    method: Method = "auto",
    energies: Mapping[str, Sequence[float]] | None = None,
) -> MotionReport:
    """Measure columns of clips.

    Args:
        clips: column -> (key, frames (T, H, W, 3)) in any order; clips of one key are paired.
        method: see :func:`optical_flow`.
        energies: column -> temporal-attention energy of each clip, in order.
    """
    chosen = choose_flow(method)
    rows = []
    for column, items in clips.items():
        known = (energies or {}).get(column)
        for index, (key, frames) in enumerate(items):
            energy = None if known is None else float(known[index])
            rows.append(measure_clip(frames, key, column, method=chosen, energy=energy))
    if not rows:
        raise ValueError("there are no clips to measure")
    return MotionReport(rows, {"optical flow": chosen, "clips": len({row.key for row in rows})})


def side_by_side(before: Tensor, after: Tensor, gap: int = 4) -> Tensor:
    """Two clips in one picture, before on the left; the shorter one rests on its last frame.

    Args:
        before: (T, H, W, 3), uint8 or floating point in [0, 1].
        after: the same height; frames and width may differ.
        gap: white pixels between them.

    Returns:
        (T, H, W, 3) uint8; one column is added where an even width needs it (video codecs do).
    """
    clips = [
        (_check_clip(clip) * 255).round().clamp(0, 255).byte().cpu() for clip in (before, after)
    ]
    if clips[0].shape[1] != clips[1].shape[1]:
        raise ValueError(
            f"clips must have one height, got {clips[0].shape[1]} and {clips[1].shape[1]}"
        )
    length = max(map(len, clips))
    clips = [torch.cat([c, c[-1:].expand(length - len(c), -1, -1, -1)]) for c in clips]
    gap += (clips[0].shape[2] + clips[1].shape[2] + gap) % 2
    white = torch.full((length, clips[0].shape[1], gap, 3), 255, dtype=torch.uint8)
    return torch.cat([clips[0], white, clips[1]], dim=2)
