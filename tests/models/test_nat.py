"""NAT and DiNAT against a written-out float64 computation, in the published key layouts."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.backbones import create_backbone
from stvision.models.nat import NAT, NAT_MODELS, convert_nat_state_dict, dinat_mini

DILATIONS = [[1, 3], [2, 1]]
HEADS = (2, 4)
KERNEL = 3
SMALL = {"depths": (2, 2), "num_heads": HEADS, "embed_dim": 16, "mlp_ratio": 2, "num_classes": 7}


def authors_weights(*, scaled: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the keys of the authors' files."""
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.0.weight": (8, 3, 3, 3),
        "patch_embed.proj.0.bias": (8,),
        "patch_embed.proj.1.weight": (16, 8, 3, 3),
        "patch_embed.proj.1.bias": (16,),
        "patch_embed.norm.weight": (16,),
        "patch_embed.norm.bias": (16,),
        "levels.0.downsample.reduction.weight": (32, 16, 3, 3),
        "levels.0.downsample.norm.weight": (32,),
        "levels.0.downsample.norm.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "head.weight": (7, 32),
        "head.bias": (7,),
    }
    for i, heads in enumerate(HEADS):
        c = 16 * 2**i
        for j in range(2):
            stem = f"levels.{i}.blocks.{j}."
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                shapes[stem + name] = (c,)
            shapes[stem + "attn.rpb"] = (heads, 2 * KERNEL - 1, 2 * KERNEL - 1)
            for name, rows, columns in (
                ("attn.qkv", 3 * c, c),
                ("attn.proj", c, c),
                ("mlp.fc1", 2 * c, c),
                ("mlp.fc2", c, 2 * c),
            ):
                shapes[stem + name + ".weight"] = (rows, columns)
                shapes[stem + name + ".bias"] = (rows,)
            if scaled:
                shapes[stem + "gamma1"] = shapes[stem + "gamma2"] = (c,)
    return {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.4 for k, s in shapes.items()}


def written_out(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits of the model, one query after the other."""

    def norm(x: Tensor, stem: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[stem + ".weight"] + state[stem + ".bias"]

    def linear(x: Tensor, stem: str) -> Tensor:
        return x @ state[stem + ".weight"].T + state[stem + ".bias"]

    def window(i: int, length: int, dilation: int) -> list[int]:
        group = list(range(i % dilation, length, dilation))
        start = min(max(i // dilation - KERNEL // 2, 0), len(group) - KERNEL)
        return group[start : start + KERNEL]

    def attention(x: Tensor, stem: str, heads: int, dilation: int) -> Tensor:
        height, width, c = x.shape[1:]
        tall, wide = max(height, KERNEL * dilation), max(width, KERNEL * dilation)
        padded = x.new_zeros(x.shape[0], tall, wide, c)
        padded[:, :height, :width] = x
        q, k, v = linear(padded, stem + ".qkv").split(c, -1)
        out = torch.zeros_like(x)
        d = c // heads
        for y in range(height):
            for z in range(width):
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    places = [
                        (a, b) for a in window(y, tall, dilation) for b in window(z, wide, dilation)
                    ]
                    logits = torch.stack(
                        [
                            (q[:, y, z, part] * k[:, a, b, part]).sum(-1) / math.sqrt(d)
                            + state[stem + ".rpb"][
                                h,
                                (a - y) // dilation + KERNEL - 1,
                                (b - z) // dilation + KERNEL - 1,
                            ]
                            for a, b in places
                        ],
                        -1,
                    )
                    values = torch.stack([v[:, a, b, part] for a, b in places], 1)
                    out[:, y, z, part] = (logits.softmax(-1)[..., None] * values).sum(1)
        return linear(out, stem + ".proj")

    x = images.double()
    for i in range(2):
        x = F.conv2d(
            x,
            state[f"patch_embed.proj.{i}.weight"],
            state[f"patch_embed.proj.{i}.bias"],
            stride=2,
            padding=1,
        )
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    for i, row in enumerate(DILATIONS):
        for j, dilation in enumerate(row):
            stem = f"levels.{i}.blocks.{j}"
            y = attention(norm(x, stem + ".norm1"), stem + ".attn", HEADS[i], dilation)
            x = x + y * state.get(stem + ".gamma1", torch.ones(()).double())
            y = linear(norm(x, stem + ".norm2"), stem + ".mlp.fc1")
            y = linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), stem + ".mlp.fc2")
            x = x + y * state.get(stem + ".gamma2", torch.ones(()).double())
        if i == 0:
            x = x.permute(0, 3, 1, 2)
            x = F.conv2d(x, state["levels.0.downsample.reduction.weight"], stride=2, padding=1)
            x = norm(x.permute(0, 2, 3, 1), "levels.0.downsample.norm")
    return linear(norm(x, "norm").mean((1, 2)), "head")


def small(**options: object) -> NAT:
    return (
        NAT(**(SMALL | {"kernel_size": KERNEL, "dilations": DILATIONS} | options)).double().eval()
    )


def images(height: int = 28, width: int = 35) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)


def huggingface_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the keys of transformers' DinatForImageClassification."""
    found = {}
    for name in ("weight", "bias"):
        for i in range(2):
            old = f"patch_embed.proj.{i}.{name}"
            found[f"dinat.embeddings.patch_embeddings.projection.{i}.{name}"] = state[old]
        found[f"dinat.embeddings.norm.{name}"] = state[f"patch_embed.norm.{name}"]
        found[f"dinat.layernorm.{name}"] = state[f"norm.{name}"]
        found[f"classifier.{name}"] = state[f"head.{name}"]
        old = f"levels.0.downsample.norm.{name}"
        found[f"dinat.encoder.{old}"] = state[old]
    old = "levels.0.downsample.reduction.weight"
    found[f"dinat.encoder.{old}"] = state[old]
    for i in range(2):
        for j in range(2):
            old, new = f"levels.{i}.blocks.{j}.", f"dinat.encoder.levels.{i}.layers.{j}."
            found[new + "attention.self.rpb"] = state[old + "attn.rpb"]
            found[new + "layer_scale_parameters"] = torch.stack(
                [state[old + "gamma1"], state[old + "gamma2"]]
            )
            for name in ("weight", "bias"):
                parts = state[old + f"attn.qkv.{name}"].chunk(3)
                for one, part in zip(("query", "key", "value"), parts, strict=True):
                    found[new + f"attention.self.{one}.{name}"] = part
                for theirs, ours in (
                    ("attention.output.dense", "attn.proj"),
                    ("layernorm_before", "norm1"),
                    ("layernorm_after", "norm2"),
                    ("intermediate.dense", "mlp.fc1"),
                    ("output.dense", "mlp.fc2"),
                ):
                    found[f"{new}{theirs}.{name}"] = state[f"{old}{ours}.{name}"]
    return found


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_are_the_written_out_ones(scaled: bool) -> None:
    """Dilated windows, some larger than the grid (padded), others shifted at its borders."""
    state = authors_weights(scaled=scaled)
    model = small(layer_scale=1e-5 if scaled else None)
    model.load_state_dict(convert_nat_state_dict({"state_dict": state}))
    wanted = written_out(state, images())
    assert (model(images()) - wanted).abs().max() < 1e-10
    assert (model.float()(images().float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_transformers_layout_gives_the_same_model() -> None:
    state = authors_weights(scaled=True)
    found = convert_nat_state_dict(huggingface_weights(state))
    state = convert_nat_state_dict(state)
    assert found.keys() == small(layer_scale=1e-5).state_dict().keys()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert convert_nat_state_dict(state).keys() == state.keys()
    broken = huggingface_weights(authors_weights(scaled=True))
    del broken["dinat.encoder.levels.0.layers.0.attention.self.key.bias"]
    with pytest.raises(ValueError, match="but not .*key.bias"):
        convert_nat_state_dict(broken)


def test_video_of_equal_frames_gives_the_logits_of_its_image() -> None:
    state = authors_weights(scaled=False)
    image, video = small(), small(frame_kernel=3)
    image.load_state_dict(convert_nat_state_dict(state))
    video.load_state_dict(convert_nat_state_dict(state, frame_kernel=3))
    x = images()
    clip = x[:, :, None].expand(-1, -1, 5, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-10
    moving = clip.clone()
    moving[:, :, 2] += 1
    assert (video(moving) - image(x)).abs().max() > 1e-3


def test_intermediates_and_features() -> None:
    model = small()
    x = images()
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    for feature, info in zip(features, model.feature_info, strict=True):
        size = [math.ceil(n / info["reduction"]) for n in x.shape[-2:]]
        assert list(feature.shape) == [2, info["num_chs"], *size]
    normed = model.forward_intermediates(
        x, [-1], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    assert torch.equal(normed[0], last)
    (first,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, features[0])
    assert torch.equal(model.forward_head(last), model(x))
    with pytest.raises(ValueError, match="between -2 and 1"):
        model.forward_intermediates(x, [2])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_checkpointing_changes_no_gradient() -> None:
    model = small().train()
    for block in (block for stage in model.stages for block in stage.blocks):
        block.drop_path.rate = 0.0
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_files_load_with_and_without_the_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {k: x.float() for k, x in authors_weights(scaled=True).items()}
    options = {k: x for k, x in SMALL.items() if k != "num_classes"}
    options |= {"kernel_size": KERNEL, "dilations": DILATIONS}
    torch.save({"model": state}, tmp_path / "authors.pth")
    theirs = {k: x.contiguous() for k, x in huggingface_weights(state).items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    x = images().float()
    first = dinat_mini(tmp_path / "authors.pth", **options, num_classes=7).eval()
    second = dinat_mini(tmp_path / "theirs.safetensors", **options, num_classes=7).eval()
    assert torch.equal(first(x), second(x))
    assert (first(x) - written_out(authors_weights(scaled=True), x)).abs().max() < 1e-4
    other = dinat_mini(tmp_path / "authors.pth", **options, num_classes=3).eval()
    assert other(x).shape == (2, 3)
    assert torch.equal(other.forward_features(x), first.forward_features(x))
    other.reset_classifier(0)
    assert torch.equal(other(x), first.forward_head(first.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nat_mini", 20), ("nat_tiny", 28), ("nat_small", 51), ("nat_base", 90), ("dinat_large", 200)],
)
def test_sizes_are_the_published_ones(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = NAT_MODELS[name]()
    # the table gives whole millions, some rounded down
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="dilation for each block"):
        small(dilations=[[1], [1, 1]])
    with pytest.raises(ValueError, match=r"x must be \(B, 3, T, H, W\), none of them 0, got"):
        small(frame_kernel=3)(images())
    with pytest.raises(ValueError, match="frame_kernel must be None .* or at least 1, got 0"):
        small(frame_kernel=0)
    with pytest.raises(ValueError, match="backend must be None or one of 'sdpa', .*, got 'fast'"):
        small(backend="fast")


def test_video_weights_say_which_windows_they_need(tmp_path: Path) -> None:
    options = {**SMALL, "kernel_size": KERNEL, "dilations": DILATIONS}
    source = dinat_mini(**options, frame_kernel=5).eval()
    torch.save(source.state_dict(), tmp_path / "video.pth")
    for given in (None, 3):
        with pytest.raises(ValueError) as caught:
            dinat_mini(tmp_path / "video.pth", **options, frame_kernel=given)
        assert str(caught.value) == (
            "the weights are a video model's whose windows have 5 frames: pass frame_kernel=5, "
            f"got frame_kernel={given}"
        )
    same = create_backbone(
        "dinat_mini", tmp_path / "video.pth", frames=3, frame_kernel=5, **options
    )
    x = torch.randn(1, 3, 3, 32, 32)
    assert torch.equal(same.eval()(x), source(x))
