"""HaloNet against a written-out float64 computation and against timm, in timm's key layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.halonet import (
    HALONET_MODELS,
    HaloNet,
    HaloStage,
    convert_halonet_state_dict,
)
from stvision.optional import mend_torchvision

BLOCK, HALO, HEADS = 4, 1, 2
STAGES = (HaloStage("ch", 16, 1, HEADS), HaloStage("hc", 32, 2, HEADS))
SMALL = {
    "stages": STAGES,
    "stem": (8, 8),
    "bottleneck": 0.5,
    "act": "silu",
    "block_size": BLOCK,
    "halo_size": HALO,
    "last_width": 24,
    "num_classes": 7,
}


def timm_weights(gate: str) -> dict[str, Tensor]:
    """Random weights under timm's keys."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def batch_norm(name: str, dim: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (dim,)

    def conv(name: str, dim: int, out: int, size: int = 1) -> None:
        shapes[name + ".conv.weight"] = (out, dim, size, size)
        batch_norm(name + ".bn", out)

    conv("stem.conv1", 3, 8, 3)
    conv("stem.conv2", 8, 8, 3)
    dim = 8
    for i, stage in enumerate(STAGES):
        for j, kind in enumerate(stage.kinds):
            stem, mid = f"stages.{i}.{j}.", stage.width // 2
            if j == 0:
                conv(stem + "shortcut", dim, stage.width)
            conv(stem + "conv1_1x1", dim, mid)
            if kind == "c":
                conv(stem + "conv2_kxk", mid, mid, 3)
                if gate == "se":
                    shapes[stem + "attn.fc1.weight"] = (8, mid, 1, 1)
                    shapes[stem + "attn.fc1.bias"] = (8,)
                    shapes[stem + "attn.fc2.weight"] = (mid, 8, 1, 1)
                    shapes[stem + "attn.fc2.bias"] = (mid,)
                else:
                    shapes[stem + "attn.conv.weight"] = (1, 1, 3)
            else:
                shapes[stem + "self_attn.q.weight"] = (mid, mid, 1, 1)
                shapes[stem + "self_attn.kv.weight"] = (2 * mid, mid, 1, 1)
                rows = 2 * (BLOCK + 2 * HALO) - 1
                for table in ("height_rel", "width_rel"):
                    shapes[stem + f"self_attn.pos_embed.{table}"] = (rows, mid // HEADS)
                batch_norm(stem + "post_attn", mid)
            conv(stem + "conv3_1x1", mid, stage.width)
            dim = stage.width
    conv("final_conv", dim, 24)
    shapes["head.fc.weight"], shapes["head.fc.bias"] = (7, 24), (7,)
    state = {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.4 for k, s in shapes.items()}
    for key, value in list(state.items()):
        if key.endswith("running_var"):
            state[key] = value.abs() + 0.5
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    return state


def written_out(state: dict[str, Tensor], images: Tensor, gate: str) -> Tensor:
    """Logits from the definition, one query of the attention after the other."""

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[name + ".conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        return batch_norm(x, name + ".bn")

    def channel_gate(x: Tensor, name: str) -> Tensor:
        mean = x.mean((2, 3))
        if gate == "se":
            hidden = mean @ state[name + ".fc1.weight"].flatten(1).T + state[name + ".fc1.bias"]
            mean = hidden.clamp_min(0) @ state[name + ".fc2.weight"].flatten(1).T
            mean = mean + state[name + ".fc2.bias"]
        else:
            taps = state[name + ".conv.weight"].flatten()
            wide = F.pad(mean, (1, 1))
            mean = sum(taps[i] * wide[:, i : i + mean.shape[1]] for i in range(3))
        return x * torch.sigmoid(mean)[:, :, None, None]

    def attention(x: Tensor, name: str, stride: int) -> Tensor:
        q = torch.einsum("bchw,oc->bohw", x, state[name + ".q.weight"].flatten(1))
        kv = torch.einsum("bchw,oc->bohw", x, state[name + ".kv.weight"].flatten(1))
        height, width = x.shape[2:]
        window, d = BLOCK + 2 * HALO, q.shape[1] // HEADS
        kv = F.pad(kv, (HALO, HALO + BLOCK, HALO, HALO + BLOCK))
        tables = [state[f"{name}.pos_embed.{axis}_rel"] for axis in ("height", "width")]
        out = torch.zeros_like(q)[:, :, ::stride, ::stride].clone()
        for y in range(0, height, stride):
            for z in range(0, width, stride):
                first = (y // BLOCK * BLOCK, z // BLOCK * BLOCK)
                part = kv[:, :, first[0] : first[0] + window, first[1] : first[1] + window]
                own = ((y - first[0]) // stride, (z - first[1]) // stride)
                rows, columns = (
                    table[torch.arange(window) - at + window - 1]
                    for table, at in zip(tables, own, strict=True)
                )
                for h in range(HEADS):
                    query = q[:, h * d : (h + 1) * d, y, z]
                    key = part[:, h * 2 * d : h * 2 * d + d]
                    value = part[:, h * 2 * d + d : (h + 1) * 2 * d]
                    scores = torch.einsum("bc,bcij->bij", query, key) / math.sqrt(d)
                    scores = scores + (query @ rows.T)[:, :, None] + (query @ columns.T)[:, None]
                    weights = scores.flatten(1).softmax(-1).view_as(scores)
                    mixed = torch.einsum("bij,bcij->bc", weights, value)
                    out[:, h * d : (h + 1) * d, y // stride, z // stride] = mixed
        return out

    x = silu(conv(images.double(), "stem.conv1", 2))
    x = F.max_pool2d(silu(conv(x, "stem.conv2")), 3, stride=2, padding=1)
    for i, stage in enumerate(STAGES):
        for j, kind in enumerate(stage.kinds):
            name, stride = f"stages.{i}.{j}", stage.stride if j == 0 else 1
            y = silu(conv(x, name + ".conv1_1x1"))
            if kind == "c":
                y = channel_gate(silu(conv(y, name + ".conv2_kxk", stride)), name + ".attn")
            else:
                y = silu(batch_norm(attention(y, name + ".self_attn", stride), name + ".post_attn"))
            short = conv(x, name + ".shortcut", stride) if j == 0 else x
            x = silu(short + conv(y, name + ".conv3_1x1"))
    x = silu(conv(x, "final_conv")).mean((2, 3))
    return x @ state["head.fc.weight"].T + state["head.fc.bias"]


def small(**options: object) -> HaloNet:
    return HaloNet(**(SMALL | options)).double().eval()


def images(height: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("gate", ["se", "eca"])
@pytest.mark.parametrize("size", [(32, 32), (26, 41)], ids=["divides", "odd"])
def test_timm_weights_give_the_written_out_logits(gate: str, size: tuple[int, int]) -> None:
    state, x = timm_weights(gate), images(*size)
    model = small(gate=gate)
    model.load_state_dict(convert_halonet_state_dict(state))
    wanted = written_out(state, x, gate)
    assert (model(x) - wanted).abs().max() < 1e-10
    assert (model.float()(x.float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["halonet26t", "eca_halonext26ts", "haloregnetz_b"])
def test_logits_are_those_of_timm(name: str) -> None:
    mend_torchvision()
    timm = pytest.importorskip("timm", reason="timm (extra `vision`) is missing")
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        for key, p in peer.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1) if key.endswith("weight") else p.uniform_(-0.3, 0.3)
        for key, buffer in peer.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    model = HALONET_MODELS[name](num_classes=7).eval()
    model.load_state_dict(convert_halonet_state_dict(peer.state_dict()))
    x = torch.randn(1, 3, *(2 * [224 if name == "haloregnetz_b" else 256]))
    with torch.no_grad():
        assert (peer(x) - model(x)).abs().max() < 1e-5


def test_equal_frames_give_the_logits_of_their_image() -> None:
    state = convert_halonet_state_dict(timm_weights("se"))
    image, video = small(gate="se"), small(gate="se", frames=4, block_frames=2)
    image.load_state_dict(state)
    fresh = video.load_state_dict(state, strict=False)
    assert not fresh.unexpected_keys
    assert all(key.endswith(".pos_embed.time_rel") for key in fresh.missing_keys)
    x = images(26, 41)
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-10
    moving = clip.clone()
    moving[:, :, 2] += 1
    assert (video(moving) - image(x)).abs().max() > 1e-3


def test_causal_features_do_not_see_later_frames() -> None:
    model = small(gate="se", frames=4, causal=True, halo_frames=2)
    for name, p in model.named_parameters():
        if name.endswith("conv3_1x1.bn.weight"):
            torch.nn.init.ones_(p)
    clip = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    other = clip.clone()
    other[:, :, 2:] += 1
    change = (model.forward_features(clip) - model.forward_features(other)).abs().amax((0, 2, 3, 4))
    assert change[:2].max() < 1e-12 and change[2:].min() > 1e-6


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("halonet_h1", 8_100_056),
        ("halonet26t", 12_480_288),
        ("halonet50ts", 22_733_280),
        ("sehalonet33ts", 13_691_712),
        ("eca_halonext26ts", 10_756_885),
        ("haloregnetz_b", 11_680_072),
    ],
)
def test_parameter_counts_are_those_of_timm(name: str, count: int) -> None:
    with torch.device("meta"):
        model = HALONET_MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == count


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"kinds must be letters 'c' and 'h', got \['cx'\]"):
        small(stages=(HaloStage("cx", 16, 1),))
    with pytest.raises(ValueError, match="gate '', 'se' or 'eca', got 'silu' and 'cbam'"):
        small(gate="cbam")
    with pytest.raises(ValueError, match=r"bottleneck must be one or 2 numbers, got \(0.5,\)"):
        small(bottleneck=(0.5,))


def test_a_fresh_block_without_shortcut_lets_its_input_through() -> None:
    """Where nothing runs past a block, its last norm does not begin at zero."""
    torch.manual_seed(0)
    stages = (HaloStage("ch", 16, 2, HEADS), HaloStage("hc", 32, 2, HEADS))
    sizes = SMALL | {"stages": stages, "linear_out": True, "last_width": 0}
    x = torch.randn(2, 3, 32, 32)
    for shortcut in (True, False):
        model = HaloNet(**(sizes | {"shortcut": shortcut})).train()
        branches = {
            f"{i}.{j}": bool(block.conv3_1x1.bn.weight.any())
            for i, stage in enumerate(model.stages)
            for j, block in enumerate(stage.blocks)
        }
        wanted = {name: not shortcut and name.endswith(".0") for name in branches}
        assert branches == wanted
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        assert model.stem.conv1.conv.weight.grad.abs().max() > 1e-6
