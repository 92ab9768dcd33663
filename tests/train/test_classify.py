"""Training of video classifiers: mixtures, cuts, rates by layer, resumption, the folder it writes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support_labelled import tiny_video
from torch import Tensor, nn

import stvision
from stvision.attention import ATTENTIONS
from stvision.config import find_config, load_config
from stvision.datasets.packed import pack
from stvision.datasets.records import ClipDataset, Record
from stvision.layers import LAYERS
from stvision.models.backbones import BACKBONES, backbone_options, create_backbone
from stvision.models.classifier import (
    VideoClassifier,
    build_network,
    load_classifier,
    set_drop_path,
    view_probabilities,
)
from stvision.models.mechanism_classifier import MECHANISMS
from stvision.models.two_stream import TwoStream
from stvision.train import classify
from stvision.train.classify import ClassifyConfig
from stvision.train.crops import crop_clips, draw_crops, fit_clips, flip_clips
from stvision.train.layer_decay import is_decayed, layer_decay_groups, layer_distances
from stvision.train.loop import make_accelerator
from stvision.train.mixup import (
    MixConfig,
    cut_boxes,
    cutmix,
    draw_beta,
    mix_clips,
    mixup,
    soft_targets,
)
from stvision.train.sources import Held, prepare

SAMPLES = Path(stvision.__file__).parent / "samples"

#: family -> name of a backbone and options that make it small
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "nat": (
        "nat_mini",
        {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 8, "mlp_ratio": 2, "kernel_size": 3},
    ),
    "davit": (
        "davit_tiny",
        {"depths": [1, 2], "embed_dims": [8, 16], "num_heads": [2, 4], "window_size": 3},
    ),
    "biformer": (
        "biformer_tiny",
        {"depths": [2, 1], "embed_dims": [8, 16], "topks": [2], "n_win": 2, "head_dim": 4},
    ),
    "halonet": (
        "halonet26t",
        {"stages": [["ch", 16, 1, 2], ["hc", 32, 2, 2]], "stem": [8, 8], "block_size": 4}
        | {"halo_size": 1, "last_width": 16},
    ),
    "selective_s4": (
        "selective_s4_small",
        {"dim": 24, "depth": 2, "patch_size": 8, "l_max": 16, "d_state": 4},
    ),
    "convs5": ("convs5_small", {"widths": [4, 8], "dim": 8, "depth": 2, "groups": 2}),
    "tvts": (
        "tvts_base",
        {"dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 16},
    ),
    "mechanism": ("mechanism", {"mechanism": "ela", "dim": 32, "depth": 2, "heads": 1}),
}


def net(family: str, classes: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    name, small = SMALL[family]
    return build_network(name, classes, 4, {**small, **options})


class Squares(ClipDataset):
    """A square that moves right or down, 10 clips to train on and 5 to validate with."""

    def __init__(self) -> None:
        super().__init__("squares", [], num_frames=4, size=16)

    def __len__(self) -> int:
        return 15

    def fingerprint(self) -> str:
        return "squares"

    def iter_items(self, workers: int = 0, *, indices: Any, timeout: float = 0) -> Iterator[Any]:
        for index in indices:
            frames = torch.full((4, 16, 16, 3), 40, dtype=torch.uint8)
            for step in range(4):
                row, column = (2, 2 + 3 * step) if index % 2 else (2 + 3 * step, 2)
                frames[step, row : row + 4, column : column + 4] = 60 + 20 * (index % 7)
            side = "right" if index % 2 else "down"
            split = "train" if index < 10 else "validation"
            meta = {"label": side, "split": split, "number": index % 2, "lost": "up"}
            meta["lost"] = side if split == "train" else "up"
            yield Record(frames, torch.arange(4.0).double(), side, f"clip{index}", meta)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    assert pack(Squares(), root / "data", progress=False).kept == 15
    return root


def config(root: Path, name: str, family: str = "davit", **values: Any) -> Path:
    """A configuration file of a training on the squares."""
    backbone, options = SMALL[family]
    loop = {"max_steps": 6, "batch_size": 4, "log_every": 1, "save_every": 3, "tensorboard": False}
    data = {"kind": "packed", "root": str(root / "data"), "cache_dir": str(root / "cache")}
    data |= {"num_frames": 4, "height": 16, "width": 16, "workers": 0, "cache": "frames"}
    whole = {"output_dir": str(root / name), "backbone": backbone, "options": options}
    whole |= {key: value for key, value in values.items() if key not in {"loop", "data"}}
    whole["loop"] = loop | values.get("loop", {})
    whole["data"] = data | values.get("data", {})
    path = root / f"{name}.yaml"
    path.write_text(json.dumps(whole))  # JSON is YAML
    return path


def train(root: Path, name: str, family: str = "davit", **values: Any) -> Path:
    assert classify.main(["--config", str(config(root, name, family, **values))]) == 0
    return root / name


def log(folder: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


#: everything that draws
FULL: dict[str, Any] = {
    "crop_scale": [0.5, 1.0],
    "flip": True,
    "mix": {"mixup": 0.8, "cutmix": 1.0, "probability": 0.8},
    "drop_path": 0.3,
    "layer_decay": 0.7,
}


# -- mixtures ---------------------------------------------------------------------------------


def test_soft_targets_are_smoothed_labels() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([3, 0, 6, 6, 2])
    target = soft_targets(labels, 7, 0.2, torch.float64)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert abs(F.cross_entropy(logits, target) - wanted) < 1e-14
    with pytest.raises(ValueError, match="label smoothing must be at least 0 and below 1, got 1"):
        soft_targets(labels, 7, 1.0)


def test_mixup_is_its_formula() -> None:
    x = torch.randn(5, 3, 2, 7, 6, dtype=torch.float64)
    y = torch.rand(5, 4, dtype=torch.float64)
    partner = torch.tensor([2, 2, 0, 4, 3])
    lam = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    mixed, target = mixup(x, y, partner, lam)
    for i in range(5):
        a, j = float(lam[i]), int(partner[i])
        assert (mixed[i] - (a * x[i] + (1 - a) * x[j])).abs().max() < 1e-14
        assert (target[i] - (a * y[i] + (1 - a) * y[j])).abs().max() < 1e-14
    assert torch.equal(mixed[4], x[4]) and torch.equal(mixed[0], x[2])


def test_cutmix_is_its_formula() -> None:
    """Boxes of Yun et al., section 3.1: sides by the root of what is taken, cut off at borders."""
    height, width = 9, 14
    x = torch.randn(40, 3, 2, height, width, dtype=torch.float64)
    y = torch.rand(40, 4, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    partner = torch.randperm(40, generator=g)
    lam, centre = torch.rand(40, generator=g), torch.rand(40, 2, generator=g)
    lam[0], lam[1] = 1.0, 0.0
    boxes = cut_boxes(lam, centre, height, width)
    mixed, target = cutmix(x, y, partner, boxes)
    cut = 0
    for i in range(40):
        side = math.sqrt(1 - float(lam[i]))
        rows, columns = int(height * side), int(width * side)
        row, column = int(height * float(centre[i, 0])), int(width * float(centre[i, 1]))
        top, bottom = max(row - rows // 2, 0), min(row + rows // 2, height)
        left, right = max(column - columns // 2, 0), min(column + columns // 2, width)
        assert boxes[i].tolist() == [top, bottom, left, right]
        wanted = x[i].clone()
        wanted[..., top:bottom, left:right] = x[partner[i]][..., top:bottom, left:right]
        assert torch.equal(mixed[i], wanted)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        assert (target[i] - (kept * y[i] + (1 - kept) * y[partner[i]])).abs().max() < 1e-14
        cut += kept < 1
    assert torch.equal(mixed[0], x[0]) and cut > 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_targets_tell_the_share_of_each_clip(dtype: torch.dtype) -> None:
    """In clips of one value each, a mixture's mean is that of the values under its target."""
    count = 256
    values = torch.arange(count) % 8
    frames = values.to(dtype).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 16, 16).contiguous()
    wide = soft_targets(torch.arange(count), count, dtype=torch.float64)
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    for how, mixed_share in (
        (MixConfig(mixup=0.8, cutmix=1.0, probability=0.75), 0.75),
        (MixConfig(mixup=0.8), 1.0),
        (MixConfig(cutmix=1.0), 1.0),
    ):
        x, y = mix_clips(frames, wide, how, torch.Generator().manual_seed(1))
        assert x.dtype == dtype and (y.sum(1) - 1).abs().max() < 1e-12
        assert (x.double().mean((1, 2, 3, 4)) - y @ values.double()).abs().max() < tolerance
        touched = float((y.max(1).values < 1).double().mean())
        assert abs(touched - mixed_share) < 0.12
        boxed = float((x.double().amax((1, 2, 3, 4)) - x.double().amin((1, 2, 3, 4)) > 0).sum())
        assert (boxed > 60) == (how.cutmix > 0) and (boxed < 140) == (how.mixup > 0)
        again, _ = mix_clips(frames, wide, how, torch.Generator().manual_seed(1))
        assert torch.equal(again, x)
    # whether a clip is mixed, and by which of the two, are draws of their own
    how = MixConfig(mixup=0.8, cutmix=1.0, probability=0.5, switch=0.5)
    x, y = mix_clips(frames, wide, how, torch.Generator().manual_seed(2))
    flat = x.double().amax((1, 2, 3, 4)) == x.double().amin((1, 2, 3, 4))
    blended = flat & (y.max(1).values < 1)
    assert abs(float(blended.double().mean()) - 0.25) < 0.08
    same, y = mix_clips(frames, wide, MixConfig(mixup=1.0, probability=0.0))
    assert same is frames and y is wide
    for values, message in (
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"cutmix": 1.0, "probability": 1.5}, "probability must be 0 to 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            MixConfig(**values)


def test_shares_follow_the_beta_distribution() -> None:
    for alpha in (0.2, 1.0, 3.0):
        lam = draw_beta(alpha, 40000, torch.Generator().manual_seed(0), torch.device("cpu"))
        assert abs(lam.mean() - 0.5) < 0.01
        assert abs(lam.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


# -- cuts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (5, 13), (31, 40)])
def test_a_cut_is_the_resized_box(size: tuple[int, int]) -> None:
    x = torch.randn(6, 3, 2, 21, 34, dtype=torch.float64)
    boxes = draw_crops(6, 21, 34, (0.2, 1.0), (0.5, 2.0), torch.Generator().manual_seed(3))
    boxes[0] = torch.tensor([0, 21, 0, 34])
    found = crop_clips(x, boxes, size)
    for clip, (top, rows, left, columns), got in zip(x, boxes.tolist(), found, strict=True):
        box = clip[..., top : top + rows, left : left + columns]
        wanted = F.interpolate(box, size, mode="bilinear", antialias=True)
        assert (got - wanted).abs().max() < 1e-12
    assert (crop_clips(x.float(), boxes, size) - found).abs().max() < 1e-5


def test_drawn_boxes_fit_and_have_the_asked_shares() -> None:
    boxes = draw_crops(4000, 40, 60, (0.25, 0.5), (0.8, 1.25), torch.Generator().manual_seed(0))
    top, rows, left, columns = boxes.double().unbind(1)
    assert (boxes >= 0).all() and (top + rows <= 40).all() and (left + columns <= 60).all()
    area = rows * columns / 2400
    assert area.min() > 0.23 and area.max() < 0.53 and abs(area.mean() - 0.375) < 0.01
    shape = columns / rows
    assert shape.min() > 0.75 and shape.max() < 1.32 and abs(shape.log().mean()) < 0.02
    room = left / (60 - columns)
    assert abs(room.mean() - 0.5) < 0.03 and room.max() == 1 and room.min() == 0
    for scale, ratio in (((0.0, 1.0), (1, 1)), ((0.5, 1.1), (1, 1)), ((0.5, 1.0), (2, 1))):
        with pytest.raises(ValueError, match="crop_scale must be two rising shares"):
            draw_crops(1, 8, 8, scale, ratio)


def test_a_clip_is_mirrored_as_a_whole() -> None:
    x = torch.randn(200, 3, 2, 4, 5)
    y = flip_clips(x, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(x, y, strict=True)]
    kept = [torch.equal(b, a) for a, b in zip(x, y, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 70 < sum(mirrored) < 130


# -- rates by layer ---------------------------------------------------------------------------


def check_groups(model: nn.Module, decay: float = 0.5) -> dict[str, tuple[float, bool]]:
    """Each trainable parameter is in one group; name -> (scale, decayed)."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, bool]] = {}
    for group in layer_decay_groups(model, decay):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr_scale"], group.get("weight_decay") != 0.0)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


#: family -> first names of the parameters of each layer, from stem to head
ORDER = {
    "nat": ["patch_embed.", "stages.0.blocks.0.", "stages.1.(downsample|blocks.0).", "stages.1.blocks.1.", "(norm|head)."],
    "davit": ["stem.", "stages.0.blocks.0.", "stages.1.(downsample|blocks.0).", "stages.1.blocks.1.", "head."],
    "biformer": ["stem.", "stages.0.blocks.0.", "stages.0.blocks.1.", "stages.1.(downsample|blocks.0).", "(norm|head)."],
    "halonet": ["stem.", "stages.0.blocks.0.", "stages.0.blocks.1.", "stages.1.blocks.0.", "stages.1.blocks.1.", "(final_conv|head)."],
    "selective_s4": ["patch_embed.", "stages.0.", "stages.1.", "(mask_generator|head)."],
    "convs5": ["(encoder|proj).", "stages.0.blocks.0.", "stages.0.blocks.1.", "head."],
    "tvts": ["(cls_token|pos_embed|temporal_embed|patch_embed.)", "blocks.0.", "blocks.1.", "blocks.2.", "(norm|head)."],
    "mechanism": ["stem.", "blocks.0.", "blocks.1.", "(norm|head)."],
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_layers_follow_the_order_in_which_they_run(family: str) -> None:
    model = net(family)
    found = check_groups(model)
    patterns = ORDER[family]
    used = set()
    for name, (scale, _) in found.items():
        matches = [i for i, p in enumerate(patterns) if re.match(p.replace(".", r"\."), name)]
        assert len(matches) == 1, name
        assert scale == 0.5 ** (len(patterns) - 1 - matches[0]), name
        used.add(matches[0])
    assert used == set(range(len(patterns)))
    # the same order as that of the computation: what runs last reaches its weights first
    rates = [group["lr_scale"] for group in layer_decay_groups(model, 0.5)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1.0
    flat = layer_decay_groups(model, 1.0)
    assert {group["lr_scale"] for group in flat} == {1.0} and len(flat) == 2


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_of_the_catalogue_has_layers(name: str) -> None:
    # the default of these is a network of timm, which is optional
    options = {"backbone": "stvision:halonet26t"} if name.startswith("two_stream") else {}
    with torch.device("meta"):
        model = create_backbone(name, num_classes=3, frames=24, **options)
    found = check_groups(model)
    blocks = list(layer_distances(model).values())
    assert len(set(blocks)) >= 4 and min(blocks) == 0
    assert set(blocks) == set(range(max(blocks) + 1))  # no layer is empty
    assert found["head.fc.weight"] == (1.0, True)
    for key, (_, decayed) in found.items():
        if key.endswith((".bias", "pos_embed", "cls_token", "temporal_embed", "rpb", "_rel")):
            assert not decayed, key
        if ".norm" in key or ".bn." in key:
            assert not decayed, key
    assert any(decayed for _, decayed in found.values())


def test_streams_end_before_their_head() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    flow = nn.Sequential(nn.Linear(4, 2))
    model = TwoStream(body, num_classes=3, flow_backbone=flow, dim=4, frozen=False, hidden=4)
    found = check_groups(model)
    assert {v[0] for k, v in found.items() if k.startswith("head.")} == {1.0}
    assert {v[0] for k, v in found.items() if k.startswith(("backbone.2", "flow_backbone.0"))} == {
        0.5
    }
    # a child without parameters is a layer too: what matters is the order
    assert found["backbone.0.weight"][0] < 0.5
    frozen = TwoStream(body, num_classes=3, dim=2, frozen=True, hidden=4)
    assert all(name.startswith("head.") for name in check_groups(frozen))
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got 0"):
        layer_decay_groups(model, 0.0)


def test_what_the_network_excludes_is_not_decayed() -> None:
    s4, nat = net("selective_s4"), net("nat")
    mixed = net("mechanism", mechanism="s4")
    assert {n for n, p in mixed.named_parameters() if p.ndim > 1 and not is_decayed(mixed, n)} == {
        f"blocks.{i}.mixer.{x}" for i in range(2) for x in ("w", "B", "C")
    }
    assert {n for n, p in s4.named_parameters() if p.ndim > 1 and not is_decayed(s4, n)} == {
        f"stages.{i}.s4.{x}" for i in range(2) for x in ("w", "B", "C")
    } & dict(s4.named_parameters()).keys()
    assert not is_decayed(nat, "stages.0.blocks.0.attn.rpb")
    assert is_decayed(nat, "stages.0.blocks.0.attn.qkv.weight")


# -- the classifier ---------------------------------------------------------------------------


def test_probabilities_are_averaged_over_views() -> None:
    model = VideoClassifier(SMALL["davit"][0], ["a", "b", "c"], 4, options=SMALL["davit"][1])
    model = model.double().eval()
    views = torch.randint(0, 256, (3, 6, 4, 16, 16, 3), dtype=torch.uint8)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.double())

    found = view_probabilities(Wide(), views, batch_size=4)
    mean, std = torch.tensor(model.mean).double(), torch.tensor(model.std).double()
    for clip, got in zip(views, found, strict=True):
        total = torch.zeros(3, dtype=torch.float64)
        for view in clip:
            colours = (view.double() / 255 - mean) / std
            scores = model.net(colours.permute(3, 0, 1, 2)[None])[0]
            total += scores.exp() / scores.exp().sum()
        assert (got - total / 6).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"views must be \(B, V, T, H, W, C\)"):
        view_probabilities(model, views[0])


def test_drop_path_is_that_of_the_constructor() -> None:
    for family in ("davit", "nat", "biformer", "halonet", "tvts"):
        built, later = net(family, drop_path_rate=0.4), net(family, drop_path_rate=0.0)
        set_drop_path(later, 0.4)
        rates = [[m.rate for m in x.modules() if hasattr(m, "rate")] for x in (built, later)]
        assert rates[0] == rates[1] and max(rates[0]) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="ConvS5Backbone has no branches to drop"):
        set_drop_path(net("convs5"), 0.1)
    with pytest.raises(ValueError, match="drop path rate must be at least 0"):
        set_drop_path(net("davit"), 1.0)


@pytest.mark.parametrize("family", SMALL)
def test_a_saved_classifier_loads_in_one_call(family: str, tmp_path: Path) -> None:
    name, options = SMALL[family]
    torch.manual_seed(0)
    model = VideoClassifier(
        name, ["up", "down"], 4, (16, 16), options=options, reading={"label": "task"}
    )
    model.save(tmp_path / "m")
    loaded = load_classifier(tmp_path / "m")
    x = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    assert torch.equal(loaded(x), model.eval()(x)) and not loaded.training
    assert loaded.class_names == ("up", "down") and loaded.size == (16, 16)
    assert loaded.reading == {"label": "task"} and loaded.frames == 4
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_folder_is_whole_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = SMALL["davit"]
    model = VideoClassifier(name, ["up", "down"], 4, options=options)
    model.save(tmp_path / "m")

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no video classifier .*config.json is not there"):
        load_classifier(tmp_path / "m")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    name, options = SMALL["davit"]
    model = VideoClassifier(name, ["up", "down"], 4, options=options)
    model.save(tmp_path)
    path = tmp_path / "config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "class_names": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="does not fit its config.json: size mismatch for head.fc"):
        load_classifier(tmp_path)
    path.write_text(json.dumps({**known, "kind": "other"}))
    with pytest.raises(ValueError, match="does not describe a video classifier"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "davit"}, "backbone must be one of .*davit_tiny.*two-stream, got 'davit'"),
        ({"options": {"depths": 3}}, r"options of 'davit_tiny' \(depths\) do not fit: .*'int'"),
        ({"options": {"depth": 3}}, "backbone 'davit_tiny' must be among .*depths, .*, got depth$"),
        ({"options": {"num_classes": 3}}, "'davit_tiny' must be among .*, got num_classes$"),
        (
            {"backbone": "two-stream", "options": {"head": "ts-lstm", "taps": [5]}},
            "backbone 'two-stream' must be among .*segments.*, got taps$",
        ),
        (
            {"backbone": "two-stream", "options": {"flow_backbone": "timm:resnet18"}},
            "options.flow_backbone must be none, .* frames alone; got 'timm:resnet18'",
        ),
        ({"class_names": ["a", "a"]}, "class_names must be at least two different names, got 2, 1"),
        ({"std": (1, 0, 1)}, "mean and std must be three numbers, std above 0"),
        ({"backbone": "two-stream", "pretrained": "x"}, "options.pretrained, those of its image"),
    ],
)
def test_wrong_classifiers_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    values = {"backbone": "davit_tiny", "class_names": ["a", "b"], "frames": 4}
    with pytest.raises(ValueError, match=message):
        VideoClassifier(**{**values, **changes})


def test_wrong_clips_are_one_sentence() -> None:
    model = VideoClassifier(SMALL["davit"][0], ["a", "b"], 4, options=SMALL["davit"][1])
    with pytest.raises(ValueError, match=r"frames must be \(B, 3, T, H, W\), got \(2, 4, 16, 16\)"):
        model(torch.zeros(2, 4, 16, 16))
    with pytest.raises(TypeError, match="floating point in .-1, 1., got torch.uint8"):
        model(torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8))


# -- whole trainings --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["davit", "selective_s4", "biformer"])
def test_a_training_that_lost_steps_repeats_them_exactly(world: Path, family: str) -> None:
    """With every draw on, dropout, a momentum copy (Selective S4) and running means (BiFormer)."""
    values = {**FULL, "loop": {"ema_decay": 0.9, "gradient_accumulation_steps": 2}}
    if family == "selective_s4":
        del values["drop_path"]
    whole = train(world, f"whole_{family}", family, **values)
    parts = train(world, f"parts_{family}", family, **values)
    shutil.rmtree(parts / "checkpoints" / "step_00000006")
    (parts / "status.json").unlink()
    shutil.rmtree(parts / "model")
    train(world, f"parts_{family}", family, **values)
    assert log(parts) == log(whole)
    ours, theirs = weights(parts), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if family == "selective_s4":  # the copy has moved, and away from what it follows
        fresh = net("selective_s4", 2).state_dict()
        moved = [n for n in theirs if n.startswith("guide.s4.C")]
        assert moved and all(not torch.equal(theirs[n], fresh[n]) for n in moved)


def test_a_killed_training_continues_exactly(world: Path) -> None:
    """SIGKILL while clips are decoded anew for each batch by a loader."""
    loop = {"max_steps": 40, "save_every": 2, "ema_decay": 0.9}
    data = {"cache": "off", "resident": False}
    whole = train(world, "unkilled", loop=loop, data=data, test_clips=0, **FULL)
    path = config(world, "killed", loop=loop, data=data, test_clips=0, **FULL)
    process = subprocess.Popen(
        [sys.executable, "-m", "stvision.train.classify", "--config", str(path)],
        # sums of as many parts as here
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "ACCELERATE_USE_CPU": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    lines, until = world / "killed" / "metrics.jsonl", time.monotonic() + 90
    while not (lines.is_file() and len(lines.read_text().splitlines()) >= 5):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (world / "killed" / "model").exists()
    killed = train(world, "killed", loop=loop, data=data, test_clips=0, **FULL)
    assert log(killed) == log(whole)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cached_and_decoded_clips_have_the_same_classes(world: Path) -> None:
    """Labels of both ways of reading belong to the frames beside them."""
    for name, data in (("cached", {}), ("decoded", {"cache": "off", "resident": False})):
        found = load_config(ClassifyConfig, config(world, f"labels_{name}", data=data))
        prepared = prepare(
            found.data,
            found.loop,
            make_accelerator(found.loop),
            seed=0,
            text=None,
            labels="all",
            label_key="label",
        )
        assert prepared.labels == ["down", "right"]
        batches = [prepared.source.batch(i, 0, torch.Generator()) for i in range(4)]
        for batch in [*batches, prepared.held.tensors]:
            moved = (batch["frames"][:, 3, 2:6, 11:15].float() > 41).all((1, 2, 3)).long()
            assert torch.equal(batch["label"], moved)  # 1, "right": the square is at the right


@pytest.mark.parametrize("family", ["davit", "tvts"])
def test_eight_clips_are_learnt_by_heart(family: str, tmp_path: Path) -> None:
    """The packaged samples: frames decoded from videos, classes by task, test over six views."""
    options = {
        "davit": {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [2, 4], "window_size": 4},
        "tvts": {"dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32},
    }[family]
    data = {"kind": "clips", "root": str(SAMPLES), "split": "test", "validation_split": "test"}
    data |= {"num_frames": 6, "height": 32, "width": 32}
    loop = {"max_steps": 60, "batch_size": 8, "learning_rate": 3e-3, "log_every": 20}
    loop |= {"save_every": 60, "warmup_steps": 5, "ema_decay": 0.9, "weight_decay": 0.0}
    folder = train(
        tmp_path,
        "samples",
        family,
        label="task",
        options=options,
        data=data,
        loop=loop,
        jitter=0.05,
        test_clips=2,
        test_crops=3,
    )
    scores = json.loads((folder / "validation.jsonl").read_text())
    assert scores["accuracy"] == scores["class_accuracy"] == 1.0
    tested = json.loads((folder / "test.json").read_text())
    assert tested["scores"] == {"test_accuracy": 1.0, "test_top5": 1.0, "test_class_accuracy": 1.0}
    assert tested["tested"] == 8 and tested["left_out"] == 0
    model = load_classifier(folder / "model")
    assert len(model.class_names) == 8 and "push-v3" in model.class_names
    # a finished training tests its model once
    before = (folder / "test.json").stat().st_mtime_ns
    assert classify.main(["--config", str(tmp_path / "samples.yaml")]) == 0
    assert (folder / "test.json").stat().st_mtime_ns == before


def test_a_published_collection_is_trained_and_tested_on(tmp_path: Path) -> None:
    """UCF-101's folders and lists: validation held out of training, the test list scored."""
    lists, videos = tmp_path / "data" / "ucfTrainTestlist", tmp_path / "data" / "UCF-101"
    lists.mkdir(parents=True)
    kinds = {"Archery": 40, "Diving": 200}
    (lists / "classInd.txt").write_text("1 Archery\n2 Diving\n")
    listed: dict[str, list[str]] = {"train": [], "test": []}
    for number, (kind, grey) in enumerate(kinds.items(), 1):
        for group in range(1, 7):
            name = f"{kind}/v_{kind}_g{group:02d}_c01.avi"
            tiny_video(videos / name, shade=grey, frames=9)
            split = "test" if group < 3 else "train"
            listed[split].append(f"{name} {number}" if split == "train" else name)
    for split, lines in listed.items():
        (lists / f"{split}list01.txt").write_text("\n".join(lines) + "\n")
    data = {"kind": "ucf101", "root": str(tmp_path / "data"), "cache": "off", "resident": False}
    data |= {"options": {"fold": 1, "validation": 0.3, "sampling": "segments"}}
    data |= {"height": 16, "width": 24}
    folder = train(
        tmp_path,
        "ucf",
        data=data,
        size=[16, 16],
        crop_scale=[0.5, 1.0],
        loop={"max_steps": 30, "learning_rate": 5e-3, "save_every": 30, "ema_decay": 0.8},
        test_split="test",
        test_clips=2,
        test_crops=3,
    )
    tested = json.loads((folder / "test.json").read_text())
    assert tested["tested"] == 4 and tested["scores"]["test_accuracy"] == 1.0
    model = load_classifier(folder / "model")
    assert model.class_names == ("Archery", "Diving")
    assert model.reading == {"label": "label", "kind": "ucf101", "options": data["options"]}


def test_recomputed_blocks_change_no_step(world: Path) -> None:
    plain = train(world, "kept", test_clips=0, **FULL)
    again = train(world, "recomputed", gradient_checkpointing=True, test_clips=0, **FULL)
    assert log(again) == pytest.approx(log(plain), rel=1e-5)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """accelerate keeps the first precision of a process; this test has another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_half_precision_trains(world: Path, own_precision: None) -> None:
    plain = train(world, "full", test_clips=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train(world, "half", test_clips=0, loop={"mixed_precision": "bf16"})
    assert log(half) == pytest.approx(log(plain), rel=0.05) and log(half) != log(plain)


@pytest.mark.parametrize("size", [(12, 8), (16, 16), (9, 16), (40, 24)])
def test_training_without_cuts_sees_what_a_test_sees(world: Path, size: tuple[int, int]) -> None:
    from stvision.datasets.views import spatial_crops

    frames = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    path = config(world, "cut", size=list(size), jitter=0.0, label_smoothing=0.0)
    given = load_config(ClassifyConfig, path)
    held = Held({"frames": frames, "label": torch.tensor([0, 1])}, None, None, [])
    task = classify.ClassifyTask(given, held, ["a", "b"], torch.device("cpu"))
    inputs = task.inputs({"frames": frames, "label": torch.tensor([0, 1])}, torch.Generator())
    shown = (inputs["frames"].permute(0, 2, 3, 4, 1) + 1) * 127.5
    seen = torch.cat([spatial_crops(clip, size) for clip in frames]).float()
    assert shown.shape == (2, 4, *size, 3) and (shown - seen).abs().max() < 0.502  # rounding
    assert inputs["target"].tolist() == [[1, 0], [0, 1]]
    tall = fit_clips(inputs["frames"], (5, 3))
    assert tall.shape[-2:] == (5, 3)


def test_inputs_are_drawn_from_the_generator_alone(world: Path) -> None:
    given = load_config(ClassifyConfig, config(world, "draws", **FULL))
    task = classify.ClassifyTask(given, Held({}, None, None, []), ["a", "b"], torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 4, 16, 16, 3), dtype=torch.uint8, generator=g)
    batch = {"frames": frames, "label": torch.arange(8) % 2}
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        found.append(task.inputs(batch, torch.Generator().manual_seed(seed)))
    for name in ("frames", "target"):
        assert torch.equal(found[0][name], found[1][name])
        assert not torch.equal(found[0][name], found[2][name])


def test_selection_by_ratio_adds_its_loss(world: Path) -> None:
    name, options = SMALL["selective_s4"]
    options = {**options, "selection": "ratio", "keep_ratio": 0.3, "dropout": 0.0}
    given = load_config(
        ClassifyConfig, config(world, "ratio", "selective_s4", backbone=name, options=options)
    )
    task = classify.ClassifyTask(given, Held({}, None, None, []), ["a", "b"], torch.device("cpu"))
    task.model.train()
    x = torch.rand(4, 3, 4, 16, 16) * 2 - 1
    target = soft_targets(torch.tensor([0, 1, 0, 1]), 2)
    torch.manual_seed(3)
    found = task.model(x, target)["loss"]
    torch.manual_seed(3)
    s4: Any = task.classifier.net
    logits, selection = s4.forward_tokens(s4.tokenize(task.classifier.prepare(x)))
    wanted = F.cross_entropy(logits, target) + s4.selection_loss(selection)
    assert abs(found - wanted) < 1e-6 and s4.selection_loss(selection) > 0
    guide = {k: v.clone() for k, v in s4.guide.state_dict().items()}
    with torch.no_grad():
        s4.stages[0].s4.C.add_(1.0)
    task.after_step()
    assert not torch.equal(s4.guide.state_dict()["s4.C"], guide["s4.C"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": "lost"}, "'up', which is none of the 2 classes that are trained: down, right"),
        ({"label": "verb"}, "has no 'verb' in its meta data, .*there is .*label"),
        ({"class_names": ["up", "down"]}, "label='right', which is none of the 2 classes"),
        ({"data": {"cache": "latents"}}, "set data.cache to 'frames' or 'off'"),
        (
            {"data": {"options": {"sampling": "segments"}}},
            "'segments' draws other frames each time",
        ),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"crop_scale": [0.9, 0.5]}, "crop_scale must be two rising shares"),
        ({"crop_ratio": [2, 1]}, "crop_ratio must be two rising numbers"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"jitter": 1.0}, "jitter must be at least 0 and below 1"),
        ({"size": [0, 8]}, "size must be at least 1 pixel"),
        ({"test_clips": -1}, "test_clips must be at least 0"),
        ({"test_crops": 2}, "test_crops"),
        ({"mix": {"mixup": -1}}, "mixup must be at least 0"),
        ({"drop_path": 0.1, "family": "convs5"}, "has no branches to drop; leave drop_path out"),
        (
            {"gradient_checkpointing": True, "loop": {"cuda_graphs": True}},
            "cuda_graphs and gradient_checkpointing exclude each other",
        ),
    ],
)
def test_wrong_configurations_are_one_sentence(
    values: dict[str, Any], message: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = values.get("family", "davit")
    path = config(world, "wrong", family, **{k: v for k, v in values.items() if k != "family"})
    assert classify.main(["--config", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stvision train: ") and re.search(message, said), said


def test_uncached_classes_are_checked_too(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"cache": "off", "resident": False}
    path = config(world, "wrong_uncached", label="lost", data=data)
    assert classify.main(["--config", str(path)]) == 2
    assert "'up', which is none of the 2 classes" in capsys.readouterr().err
    # numbers are classes too
    folder = train(world, "numbered", label="number", data=data, loop={"max_steps": 1})
    assert load_classifier(folder / "model").class_names == ("0", "1")


@pytest.mark.parametrize("family", [*SMALL, "two_stream"])
def test_unknown_options_end_a_training_before_it_begins(
    family: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options = SMALL.get(family, ("two_stream_ts_lstm", {"segments": 2}))
    path = config(world, "unknown", backbone=name, options={**options, "colour": 3})
    assert classify.main(["--config", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    allowed = ", ".join(backbone_options(name))
    assert said.endswith(f"options of backbone {name!r} must be among {allowed}, got colour")
    assert not list(world.glob("unknown/checkpoints/*"))


@pytest.mark.parametrize("backbone", ["two-stream", "two_stream_ts_lstm"])
def test_a_two_stream_model_trains_its_head(backbone: str, world: Path) -> None:
    """Frames alone; the image backbone is frozen, not in checkpoints, and exported with the head."""
    options = {"backbone": "stvision:convs5_small", "hidden": 8, "segments": 2}
    values = {"backbone": backbone, "options": options, "layer_decay": 0.5}
    folder = train(world, backbone, loop={"max_steps": 2, "save_every": 1}, **values)
    saved = load_file(max((folder / "checkpoints").glob("step_*")) / "model.safetensors")
    assert saved and all(name.startswith("classifier.net.head.") for name in saved)
    loaded: Any = load_classifier(folder / "model").net
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh: Any = build_network(backbone, 2, 4, options)
    key = "encoder.conv.weight"
    assert torch.equal(loaded.backbone.state_dict()[key], fresh.backbone.state_dict()[key])
    assert not torch.equal(loaded.head.fc.weight, fresh.head.fc.weight)


@pytest.mark.parametrize("name", ["classify_mechanism", "classify_metaworld", "classify_ucf101"])
def test_packaged_configurations_build_their_models(name: str) -> None:
    given = load_config(ClassifyConfig, find_config(name))
    with torch.device("meta"):
        model = build_network(
            given.backbone, 31, given.data.num_frames, given.options, pretrained=None
        )
    assert check_groups(model, given.layer_decay)
    assert given.test_clips > 1 and given.network_size[0] % 16 == 0


@pytest.mark.parametrize("mechanism", ["neighborhood", "conv-s5"])
def test_a_mechanism_is_trained_by_its_name_in_a_configuration(mechanism: str, world: Path) -> None:
    """The packaged file, made small: one of the attentions by name, and one of the other layers."""
    folder = world / f"by_name_{mechanism}"
    words = ["--config", "classify_mechanism", "--set", f"options.mechanism={mechanism}"]
    changes = {"options.dim": 32, "options.heads": 1, "options.depth": 2, "label": "label"}
    changes |= {"data.kind": "packed", "data.root": world / "data", "output_dir": folder}
    changes |= {"data.cache_dir": world / "cache", "data.num_frames": 4, "data.workers": 0}
    changes |= {"data.height": 16, "data.width": 16, "loop.max_steps": 3, "loop.batch_size": 4}
    changes |= {"loop.mixed_precision": "'no'", "loop.cuda_graphs": "false", "loop.log_every": 1}
    changes |= {"loop.warmup_steps": 0, "loop.tensorboard": "false", "test_clips": 1}
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"]
    assert classify.main(words) == 0
    assert all(math.isfinite(loss) for loss in log(folder)) and len(log(folder)) == 3
    loaded: Any = load_classifier(folder / "model").net
    wanted = LAYERS["conv-s5"] if mechanism == "conv-s5" else ATTENTIONS[mechanism]
    for block in loaded.blocks:
        assert any(type(module) is wanted for module in block.mixer.modules())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = build_network("mechanism", 2, 4, load_classifier(folder / "model").options)
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(loaded.get_parameter(name), parameter), name


def test_a_wrong_mechanism_ends_a_training_with_those_that_there_are(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(world, "wrong", "mechanism", options={"mechanism": "elaa"})
    assert classify.main(["--config", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(f"mechanism must be one of {', '.join(MECHANISMS)}, got 'elaa'")


class Wheel(Squares):
    """A square that moves left, right, up or down around a torus: no frame alone tells which."""

    def __len__(self) -> int:
        return 448

    def fingerprint(self) -> str:
        return "wheel"

    def iter_items(self, workers: int = 0, *, indices: Any, timeout: float = 0) -> Iterator[Any]:
        ways = {"left": (0, -2), "right": (0, 2), "up": (-2, 0), "down": (2, 0)}
        for index in indices:
            g = torch.Generator().manual_seed(index)
            place = torch.randint(0, 16, (2,), generator=g).tolist()
            grey = int(torch.randint(120, 255, (), generator=g))
            label = list(ways)[index % 4]
            frames = torch.full((4, 16, 16, 3), 40, dtype=torch.uint8)
            frames[:, :5, :5] = grey
            for step in range(4):
                shift = tuple(p + step * w for p, w in zip(place, ways[label], strict=True))
                frames[step] = frames[step].roll(shift, (0, 1))
            meta = {"label": label, "split": "train" if index < 384 else "validation"}
            yield Record(frames, torch.arange(4.0).double(), label, f"clip{index}", meta)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convs5", "tvts"])
def test_directions_are_told_apart_unless_clips_are_mirrored(family: str, tmp_path: Path) -> None:
    """The whole recipe on clips that only motion tells apart, judged on unseen ones."""
    pack(Wheel(), tmp_path / "data", progress=False)
    options = {
        "convs5": {"widths": [8, 16], "dim": 16},
        "tvts": {"dim": 48, "depth": 2, "num_heads": 4, "patch_size": 4, "temporal_std": 0.5},
    }[family]
    values: dict[str, Any] = {"options": {**SMALL[family][1], **options}, "layer_decay": 0.8}
    values |= {"mix": {"mixup": 0.2, "cutmix": 1.0, "probability": 0.3}}
    values |= {"crop_scale": [0.8, 1.0], "crop_ratio": [0.9, 1.1], "data": {"validation_clips": 64}}
    loop = {"max_steps": 250, "batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 50}
    loop |= {"ema_decay": 0.95, "weight_decay": 0.02, "log_every": 50, "save_every": 250}
    found = {}
    for flip in (False, True):
        name = f"flip_{flip}"
        train(tmp_path, name, family, loop=loop, flip=flip, **values)
        tested = json.loads((tmp_path / name / "test.json").read_text())
        assert tested["tested"] == 64
        found[flip] = tested["scores"]["test_accuracy"]
    assert found[False] >= 0.95
    assert found[True] <= 0.85  # left and right are one class to it


#: draws inside of the network begin elsewhere behind the passes before a capture
STILL = {**FULL, "test_clips": 0, "drop_path": 0.0}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["davit", "nat", "biformer"])
def test_captured_steps_equal_plain_ones(world: Path, family: str) -> None:
    """One CUDA graph a step, with drawn cuts, mixtures and rates by layer."""
    plain = train(world, f"gpu_plain_{family}", family, **STILL)
    captured = train(world, f"gpu_captured_{family}", family, loop={"cuda_graphs": True}, **STILL)
    assert log(captured) == pytest.approx(log(plain), rel=1e-2)


@pytest.mark.gpu
def test_a_captured_step_may_draw(world: Path) -> None:
    """Selective S4 draws which tokens it keeps, and its momentum copy moves between steps."""
    values = {key: value for key, value in STILL.items() if key != "drop_path"}
    values["loop"] = {"cuda_graphs": True, "max_steps": 30, "learning_rate": 3e-3}
    losses = log(train(world, "gpu_selective", "selective_s4", **values))
    assert all(math.isfinite(x) for x in losses) and len(set(losses)) == 30


@pytest.mark.gpu
def test_compiled_steps_equal_plain_ones(world: Path) -> None:
    plain = train(world, "gpu_eager", **STILL)
    compiled = train(world, "gpu_compiled", loop={"compile": "whole"}, **STILL)
    assert log(compiled) == pytest.approx(log(plain), rel=1e-2)
