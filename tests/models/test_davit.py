"""DaViT against a written-out float64 computation and against timm, in the published key layouts."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.davit import DAVIT_MODELS, DaViT, convert_davit_state_dict
from stvision.optional import mend_torchvision

DIMS, HEADS, DEPTHS, WINDOW = (8, 16), (2, 4), (1, 2), 3
SMALL = {
    "depths": DEPTHS,
    "embed_dims": DIMS,
    "num_heads": HEADS,
    "window_size": WINDOW,
    "num_classes": 7,
}


def authors_weights(overlap: bool = False) -> dict[str, Tensor]:
    """Random weights under the keys of the authors' files."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embeds.0.proj.weight": (8, 3, 7, 7),
        "patch_embeds.0.proj.bias": (8,),
        "patch_embeds.0.norm.weight": (8,),
        "patch_embeds.0.norm.bias": (8,),
        "patch_embeds.1.proj.weight": (16, 8, 3, 3) if overlap else (16, 8, 2, 2),
        "patch_embeds.1.proj.bias": (16,),
        "patch_embeds.1.norm.weight": (8,),
        "patch_embeds.1.norm.bias": (8,),
        "norms.weight": (16,),
        "norms.bias": (16,),
        "head.weight": (7, 16),
        "head.bias": (7,),
    }
    for i, c in enumerate(DIMS):
        for stem in (f"main_blocks.{i}.{j}.{k}." for j in range(DEPTHS[i]) for k in range(2)):
            for name, size in (
                ("cpe.0.proj", (c, 1, 3, 3)),
                ("cpe.1.proj", (c, 1, 3, 3)),
                ("norm1", (c,)),
                ("norm2", (c,)),
                ("attn.qkv", (3 * c, c)),
                ("attn.proj", (c, c)),
                ("mlp.fc1", (4 * c, c)),
                ("mlp.fc2", (c, 4 * c)),
            ):
                shapes[f"{stem}{name}.weight"] = size
                shapes[f"{stem}{name}.bias"] = size[:1]
    return {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.4 for k, s in shapes.items()}


def written_out(state: dict[str, Tensor], images: Tensor, florence: bool = False) -> Tensor:
    """Logits of the model from its definition, window by window and group by group."""

    def norm(x: Tensor, stem: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[stem + ".weight"] + state[stem + ".bias"]

    def linear(x: Tensor, stem: str) -> Tensor:
        return x @ state[stem + ".weight"].T + state[stem + ".bias"]

    def conv(x: Tensor, stem: str, **options: int) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, state[stem + ".weight"], state[stem + ".bias"], **options)
        return x.permute(0, 2, 3, 1)

    def pad(x: Tensor, multiple: int) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))

    def spatial(x: Tensor, stem: str, heads: int) -> Tensor:
        height, width, c = x.shape[1:]
        padded = pad(x, WINDOW)
        out = torch.zeros_like(padded)
        for y in range(0, padded.shape[1], WINDOW):
            for z in range(0, padded.shape[2], WINDOW):
                tile = padded[:, y : y + WINDOW, z : z + WINDOW].flatten(1, 2)
                q, k, v = linear(tile, stem + ".qkv").split(c, -1)
                parts = []
                for h in range(heads):
                    at = slice(h * c // heads, (h + 1) * c // heads)
                    scores = q[..., at] @ k[..., at].mT / math.sqrt(c / heads)
                    parts.append(scores.softmax(-1) @ v[..., at])
                done = torch.cat(parts, -1).unflatten(1, (WINDOW, WINDOW))
                out[:, y : y + WINDOW, z : z + WINDOW] = done
        return linear(out, stem + ".proj")[:, :height, :width]

    def channel(x: Tensor, stem: str, heads: int) -> Tensor:
        c = x.shape[-1]
        q, k, v = linear(x.flatten(1, 2), stem + ".qkv").split(c, -1)
        parts = []
        for h in range(heads):
            at = slice(h * c // heads, (h + 1) * c // heads)
            if florence:
                scores = q[..., at].mT @ k[..., at] / math.sqrt(q.shape[1])
                parts.append((scores.softmax(-1) @ v[..., at].mT).mT)
            else:
                scores = k[..., at].mT @ v[..., at] / math.sqrt(c / heads)
                parts.append((scores.softmax(-1) @ q[..., at].mT).mT)
        return linear(torch.cat(parts, -1), stem + ".proj").view(x.shape)

    x = pad(images.double().permute(0, 2, 3, 1), 4)
    x = norm(conv(x, "patch_embeds.0.proj", stride=4, padding=3), "patch_embeds.0.norm")
    for i, heads in enumerate(HEADS):
        if i:
            x = norm(x, f"patch_embeds.{i}.norm")
            x = x if florence else pad(x, 2)
            x = conv(x, f"patch_embeds.{i}.proj", stride=2, padding=int(florence))
        for j in range(DEPTHS[i]):
            for k, attend in enumerate((spatial, channel)):
                stem = f"main_blocks.{i}.{j}.{k}"
                x = x + conv(x, stem + ".cpe.0.proj", padding=1, groups=x.shape[-1])
                x = x + attend(norm(x, stem + ".norm1"), stem + ".attn", heads)
                x = x + conv(x, stem + ".cpe.1.proj", padding=1, groups=x.shape[-1])
                y = linear(norm(x, stem + ".norm2"), stem + ".mlp.fc1")
                x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), stem + ".mlp.fc2")
    return linear(norm(x.mean((1, 2)), "norms"), "head")


def florence_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the keys of a whole Florence-2."""
    found = {"language_model.lm_head.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        new = key.replace("patch_embeds.", "convs.").replace("main_blocks.", "blocks.")
        for k, name in enumerate(("window_attn", "channel_attn")):
            new = new.replace(f".{k}.norm1.", f".{name[:-5]}_block.{name}.norm.")
            new = new.replace(f".{k}.attn.", f".{name[:-5]}_block.{name}.fn.")
            for old in ("cpe.0.proj", "cpe.1.proj", "norm2", "mlp."):
                new = new.replace(f".{k}.{old}", f".{name[:-5]}_block.{old}")
        new = new.replace("window_block", "spatial_block")
        new = new.replace("cpe.0.proj", "conv1.fn.dw").replace("cpe.1.proj", "conv2.fn.dw")
        new = new.replace(".norm2.", ".ffn.norm.").replace(".mlp.", ".ffn.fn.net.")
        found["vision_tower." + new] = value
    return found


def small(**options: object) -> DaViT:
    return DaViT(**(SMALL | options)).double().eval()


def images(height: int = 26, width: int = 37) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("size", [(26, 37), (48, 48)], ids=["padded everywhere", "divides"])
def test_authors_weights_give_the_written_out_logits(size: tuple[int, int]) -> None:
    state = authors_weights()
    model = small()
    model.load_state_dict(convert_davit_state_dict({"state_dict": state}))
    x, wanted = images(*size), written_out(state, images(*size))
    assert (model(x) - wanted).abs().max() < 1e-10
    assert (model.float()(x.float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_florence_tower_gives_the_written_out_logits() -> None:
    state = authors_weights(overlap=True)
    model = small(florence=True)
    model.load_state_dict(convert_davit_state_dict(florence_layout(state)))
    assert (model(images()) - written_out(state, images(), florence=True)).abs().max() < 1e-10


def test_a_tower_is_taken_out_of_its_file(tmp_path: Path) -> None:
    state = authors_weights(overlap=True)
    for key in ("norms.weight", "norms.bias", "head.weight", "head.bias"):
        del state[key]  # as in Florence-2's files
    torch.save(florence_layout(state), tmp_path / "florence.bin")
    sizes = {key: value for key, value in SMALL.items() if key != "num_classes"}
    sizes |= {"window_size": WINDOW}
    model = DAVIT_MODELS["davit_base_fl"](tmp_path / "florence.bin", **sizes)
    taken = model.state_dict()
    assert all(torch.equal(taken[k], v.float()) for k, v in convert_davit_state_dict(state).items())
    assert isinstance(model.get_classifier(), torch.nn.Identity)


@pytest.mark.parametrize("florence", [False, True])
def test_logits_are_those_of_timm(florence: bool) -> None:
    mend_torchvision()
    davit = pytest.importorskip("timm.models.davit", reason="timm (extra `vision`) is missing")
    sizes = {"depths": (1, 2), "embed_dims": (32, 64), "num_heads": (2, 4), "num_classes": 5}
    options = {"down_kernel_size": 3, "channel_attn_v2": True, "named_blocks": True}
    peer = davit.DaVit(**sizes, **(options if florence else {})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
    model = DaViT(**sizes, florence=florence).eval()
    model.load_state_dict(convert_davit_state_dict(peer.state_dict()))
    for size in ((64, 96), (90, 61)):
        x = torch.randn(1, 3, *size, generator=g)
        with torch.no_grad():
            theirs, ours = peer(x), model(x)
            features = peer.forward_intermediates(x, intermediates_only=True)
            own = model.forward_intermediates(x, intermediates_only=True)
        assert (theirs - ours).abs().max() < 1e-5
        for a, b in zip(features, own, strict=True):
            assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize("channel_tokens", ["space", "space-time"])
@pytest.mark.parametrize("florence", [False, True])
def test_equal_frames_give_the_logits_of_their_image(channel_tokens: str, florence: bool) -> None:
    state = convert_davit_state_dict(authors_weights(overlap=florence))
    image, video = (
        small(florence=florence, **options)
        for options in ({}, {"frames": 5, "channel_tokens": channel_tokens})
    )
    image.load_state_dict(state)
    fresh = video.load_state_dict(state, strict=False)
    assert not fresh.unexpected_keys
    assert all(key.endswith(".time.weight") for key in fresh.missing_keys)
    x = images()
    clip = x[:, :, None].expand(-1, -1, 5, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-10


def test_channel_tokens_say_whether_frames_meet() -> None:
    """With the convolutions over frames at zero only channel tokens of all frames tell of others."""
    clip = torch.randn(1, 3, 4, 24, 24, dtype=torch.float64)
    other = clip.clone()
    other[:, :, 3] += 1
    for channel_tokens, meets in (("space", False), ("space-time", True)):
        model = small(frames=4, channel_tokens=channel_tokens)
        change = model.forward_features(clip) - model.forward_features(other)
        change = change.abs().amax((0, 2, 3, 4))
        assert bool(change[0] > 1e-8) == meets and change[3] > 1e-3


def test_order_of_frames_matters_once_the_frame_kernels_are_trained() -> None:
    clip = torch.randn(1, 3, 4, 24, 24, dtype=torch.float64)
    model = small(frames=4)
    assert (model(clip) - model(clip.flip(2))).abs().max() < 1e-12
    for name, p in model.named_parameters():
        if name.endswith(".time.weight"):
            torch.nn.init.normal_(p, std=0.3)
    assert (model(clip) - model(clip.flip(2))).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("davit_tiny", 28_360_168),
        ("davit_small", 49_745_896),
        ("davit_base", 87_954_408),
        ("davit_large", 196_811_752),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        model = DAVIT_MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == count


def test_drop_path_grows_over_both_blocks_of_a_layer() -> None:
    model = small(drop_path_rate=0.5)
    blocks = [block for stage in model.stages for layer in stage.blocks for block in layer]
    assert [round(block.drop_path.rate, 3) for block in blocks] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="of one length, got 2, 2 and 1"):
        small(num_heads=(2,))
    with pytest.raises(ValueError, match="num_heads must divide dim 16, got 3"):
        small(num_heads=(2, 3))
    with pytest.raises(ValueError, match="'space' or 'space-time', got 'time'"):
        small(frames=2, channel_tokens="time")
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        small(frames=2, frame_kernel=2)
