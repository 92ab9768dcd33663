"""BiFormer against a written-out float64 computation in the authors' key layouts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.biformer import BIFORMER_MODELS, BiFormer, convert_biformer_state_dict

DIMS, DEPTHS, TOPKS, WINDOWS, HEAD = (16, 32, 64), (1, 2, 1), (2, 3), 3, 8
SMALL = {
    "depths": DEPTHS,
    "embed_dims": DIMS,
    "topks": TOPKS,
    "n_win": WINDOWS,
    "head_dim": HEAD,
    "num_classes": 7,
}
LINES = {
    "conv": {"layout": "conv", "flavour": "legacy"},
    "stl": {"layout": "swin", "flavour": "legacy"},
    "stl-nchw": {"layout": "swin", "flavour": "nchw", "lepe_from_value": True},
}


def authors_weights(line: str) -> dict[str, Tensor]:
    """Random weights under the keys and in the shapes of the authors' files."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes[name + ".weight"] = shape
        if bias:
            shapes[name + ".bias"] = shape[:1]

    def batch_norm(name: str, dim: int) -> None:
        add(name, dim)
        shapes[name + ".running_mean"] = shapes[name + ".running_var"] = (dim,)

    nchw = line == "stl-nchw"
    one = (1, 1) if nchw else ()
    if line == "conv":
        add("downsample_layers.0.0", DIMS[0] // 2, 3, 3, 3)
        batch_norm("downsample_layers.0.1", DIMS[0] // 2)
        add("downsample_layers.0.3", DIMS[0], DIMS[0] // 2, 3, 3)
        batch_norm("downsample_layers.0.4", DIMS[0])
    else:
        add("downsample_layers.0.0", DIMS[0], 3, 4, 4)
        batch_norm("downsample_layers.0.1", DIMS[0])
    for i, c in enumerate(DIMS):
        if i and line == "conv":
            add(f"downsample_layers.{i}.0", c, DIMS[i - 1], 3, 3)
            batch_norm(f"downsample_layers.{i}.1", c)
        elif i:
            batch_norm(f"downsample_layers.{i}.0", DIMS[i - 1])
            add(f"downsample_layers.{i}.1", c, DIMS[i - 1], 2, 2)
        for j in range(DEPTHS[i]):
            stem = f"stages.{i}.{j}." if line == "conv" else f"stages.{i}.blocks.{j}."
            if line == "conv":
                add(stem + "pos_embed", c, 1, 3, 3)
            add(stem + "norm1", c)
            add(stem + "norm2", c)
            add(stem + "attn.lepe", c, 1, 5, 5)
            if i < 2:
                add(stem + ("attn.qkv_linear" if nchw else "attn.qkv.qkv"), 3 * c, c, *one)
                add(stem + ("attn.output_linear" if nchw else "attn.wo"), c, c, *one)
            else:
                add(stem + "attn.qkv", 3 * c, c, *one, bias=False)
                add(stem + "attn.proj", c, c, *one)
            add(stem + "mlp.0", 3 * c, c, *one)
            add(stem + ("mlp.3" if line == "conv" else "mlp.2"), c, 3 * c, *one)
    batch_norm("norm", DIMS[-1])
    add("head", 7, DIMS[-1])
    state = {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.3 for k, s in shapes.items()}
    for key, value in list(state.items()):
        if key.endswith("running_var"):
            state[key] = value.abs() + 0.5
            counter = key.replace("running_var", "num_batches_tracked")
            state[counter] = torch.tensor(3)
    return state


def written_out(state: dict[str, Tensor], images: Tensor, line: str) -> Tensor:
    """Logits from the definition, region by region."""

    def layer_norm(x: Tensor, stem: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[stem + ".weight"] + state[stem + ".bias"]

    def batch_norm(x: Tensor, stem: str) -> Tensor:
        x = (x - state[stem + ".running_mean"]) / (state[stem + ".running_var"] + 1e-5).sqrt()
        return x * state[stem + ".weight"] + state[stem + ".bias"]

    def linear(x: Tensor, stem: str) -> Tensor:
        x = x @ state[stem + ".weight"].flatten(1).T
        return x + state[stem + ".bias"] if stem + ".bias" in state else x

    def conv(x: Tensor, stem: str, **options: int) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, state[stem + ".weight"], state[stem + ".bias"], **options)
        return x.permute(0, 2, 3, 1)

    def pad(x: Tensor, multiple: int) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def lepe(x: Tensor, stem: str) -> Tensor:
        return conv(x, stem + ".lepe", padding=2, groups=x.shape[-1])

    def route(x: Tensor, stem: str, topk: int) -> Tensor:
        height, width, c = x.shape[1:]
        legacy = line != "stl-nchw"
        if legacy:
            x = F.pad(x, (0, 0, 0, -width % WINDOWS, 0, -height % WINDOWS))
        q, k, v = linear(x, stem + (".qkv.qkv" if legacy else ".qkv_linear")).split(c, -1)
        extra = lepe(v, stem)
        rows, columns = x.shape[1] // WINDOWS, x.shape[2] // WINDOWS
        full = (-x.shape[1] % rows, -x.shape[2] % columns)
        wide = [F.pad(y, (0, 0, 0, full[1], 0, full[0])) for y in (q, k, v)]
        places = [
            (slice(y, y + rows), slice(z, z + columns))
            for y in range(0, wide[0].shape[1], rows)
            for z in range(0, wide[0].shape[2], columns)
        ]
        out = torch.zeros_like(wide[2])
        for b in range(len(x)):
            # what lies behind the map is cut from the means, not from the attention
            means = [[y[b][place].flatten(0, 1).mean(0) for place in places] for y in (q, k)]
            for n, place in enumerate(places):
                answers = torch.stack([means[0][n] @ mean for mean in means[1]])
                chosen = answers.topk(topk).indices.tolist()
                keys, values = (
                    torch.cat([y[b][places[o]].flatten(0, 1) for o in chosen]) for y in wide[1:]
                )
                query = wide[0][b][place].flatten(0, 1)
                parts = []
                for h in range(c // HEAD):
                    at = slice(h * HEAD, (h + 1) * HEAD)
                    weights = (query[:, at] @ keys[:, at].T / math.sqrt(c)).softmax(-1)
                    parts.append(weights @ values[:, at])
                out[b][place] = torch.cat(parts, -1).unflatten(0, (rows, columns))
        out = out[:, : x.shape[1], : x.shape[2]] + extra
        out = linear(out, stem + (".wo" if legacy else ".output_linear"))
        return out[:, :height, :width]

    def full(x: Tensor, stem: str) -> Tensor:
        c = x.shape[-1]
        q, k, v = linear(x.flatten(1, 2), stem + ".qkv").split(c, -1)
        parts = []
        for h in range(8):
            at = slice(h * c // 8, (h + 1) * c // 8)
            scores = q[..., at] @ k[..., at].mT / math.sqrt(c / 8)
            parts.append(scores.softmax(-1) @ v[..., at])
        source = v.view(x.shape) if line == "stl-nchw" else x
        return linear(torch.cat(parts, -1).view(x.shape) + lepe(source, stem), stem + ".proj")

    x = images.double().permute(0, 2, 3, 1)
    for i in range(3):
        stem = f"downsample_layers.{i}"
        if line == "conv":
            x = batch_norm(conv(x, stem + ".0", stride=2, padding=1), stem + ".1")
            if i == 0:
                x = batch_norm(conv(gelu(x), stem + ".3", stride=2, padding=1), stem + ".4")
        elif i == 0:
            x = batch_norm(conv(pad(x, 4), stem + ".0", stride=4), stem + ".1")
        else:
            x = conv(pad(batch_norm(x, stem + ".0"), 2), stem + ".1", stride=2)
        for j in range(DEPTHS[i]):
            stem = f"stages.{i}.{j}" if line == "conv" else f"stages.{i}.blocks.{j}"
            if line == "conv":
                x = x + conv(x, stem + ".pos_embed", padding=1, groups=x.shape[-1])
            y = layer_norm(x, stem + ".norm1")
            x = x + (route(y, stem + ".attn", TOPKS[i]) if i < 2 else full(y, stem + ".attn"))
            y = gelu(linear(layer_norm(x, stem + ".norm2"), stem + ".mlp.0"))
            x = x + linear(y, stem + (".mlp.3" if line == "conv" else ".mlp.2"))
    return linear(batch_norm(x, "norm").mean((1, 2)), "head")


def small(line: str, **options: object) -> BiFormer:
    return BiFormer(**(SMALL | LINES[line] | options)).double().eval()


def images(height: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("size", [(48, 48), (54, 64)], ids=["divides", "padded"])
@pytest.mark.parametrize("line", LINES)
def test_authors_weights_give_the_written_out_logits(line: str, size: tuple[int, int]) -> None:
    state, x = authors_weights(line), images(*size)
    model = small(line)
    model.load_state_dict(convert_biformer_state_dict({"model": state}))
    wanted = written_out(state, x, line)
    assert (model(x) - wanted).abs().max() < 1e-10
    assert (model.float()(x.float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("line", LINES)
def test_equal_frames_give_the_logits_of_their_image(line: str) -> None:
    state = convert_biformer_state_dict(authors_weights(line))
    image, video = small(line), small(line, frames=4)
    image.load_state_dict(state)
    fresh = video.load_state_dict(state, strict=False)
    assert not fresh.unexpected_keys
    assert all(key.endswith(".time.weight") for key in fresh.missing_keys)
    x = images(56, 64)
    clip = x[:, :, None].expand(-1, -1, 4, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-10
    moving = clip.clone()
    moving[:, :, 2] += 1
    assert (video(moving) - image(x)).abs().max() > 1e-3


def test_regions_of_one_frame_reach_other_frames() -> None:
    """Of k = 3 regions of single frames some lie in other frames, in stages without full attention."""
    model = small("stl", frames=3, region_frames=1)
    clip = torch.randn(1, 3, 3, 48, 48, dtype=torch.float64)
    other = clip.clone()
    other[:, :, 2] += 0.5
    first = [
        m.forward_intermediates(x, [1], intermediates_only=True)[0][:, :, 0]
        for m in (model,)
        for x in (clip, other)
    ]
    assert (first[0] - first[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("biformer_tiny", 13.14),
        ("biformer_small", 25.54),
        ("biformer_base", 56.80),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = BIFORMER_MODELS[name]()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="topks one shorter, got 3, 3 and 1"):
        small("conv", topks=(2,))
    with pytest.raises(ValueError, match="layout must be 'conv' or 'swin', got 'vit'"):
        small("conv", layout="vit")
    with pytest.raises(ValueError, match="head_dim 12 must divide channels, got 16"):
        small("conv", head_dim=12)
    with pytest.raises(ValueError, match="multiple of 8, got 36"):
        small("conv", embed_dims=(16, 32, 36))
