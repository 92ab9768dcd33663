"""What all backbones have in common: the catalogue, timm's surface, gradients, dtypes, compilation."""

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stvision.models import biformer, davit, halonet, nat
from stvision.models.backbones import _CLASSES, BACKBONES, backbone_options, create_backbone
from stvision.models.surface import Head
from stvision.models.weights import adapt_input_channels, read_weights

#: family -> class, arguments that make it small
SMALL: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    "davit": (
        davit.DaViT,
        {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 4), "window_size": 3},
    ),
    "biformer": (
        biformer.BiFormer,
        {"depths": (1, 1), "embed_dims": (8, 16), "topks": (2,), "n_win": 3, "head_dim": 4},
    ),
    "biformer_nchw": (
        biformer.BiFormer,
        {"depths": (1, 1), "embed_dims": (8, 16), "topks": (2,), "n_win": 3, "head_dim": 4}
        | {"layout": "swin", "flavour": "nchw", "lepe_from_value": True},
    ),
    "halonet": (
        halonet.HaloNet,
        {
            "stages": (halonet.HaloStage("ch", 16, 1, 2), halonet.HaloStage("hc", 32, 2, 2)),
            "stem": (8, 8),
            "bottleneck": 0.5,
            "gate": "se",
            "act": "silu",
            "block_size": 4,
            "halo_size": 1,
            "last_width": 16,
        },
    ),
    "halonet_ela": (
        halonet.HaloNet,
        {
            "stages": (halonet.HaloStage("c", 16, 1), halonet.HaloStage("h", 32, 2, 2)),
            "stem": (8,),
            "bottleneck": 0.5,
            "gate": "eca",
            "act": "silu",  # smooth, for differences
            "ela": "small",
            "block_size": 3,
            "halo_size": 1,
        },
    ),
}


def video_nat(frames: int | None, **options: object) -> nat.NAT:
    return nat.NAT(frame_kernel=frames, **options)


SMALL["nat"] = (
    video_nat,
    {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "mlp_ratio": 2, "kernel_size": 3},
)
KINDS = [
    pytest.param(name, frames, id=f"{name}-{'image' if frames is None else 'clip'}")
    for name in SMALL
    for frames in (None, 3)
]


def small(name: str, frames: int | None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    cls, defaults = SMALL[name]
    model = cls(**(defaults | {"num_classes": 5, "frames": frames} | options))
    for key, p in model.named_parameters():  # as after training
        if key.endswith((".time.weight", ".time_rel")):
            nn.init.normal_(p, std=0.3)
        elif key.endswith("conv3_1x1.bn.weight"):
            nn.init.ones_(p)
    return model


def pixels(frames: int | None, dtype: torch.dtype = torch.float32, in_chans: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    size = (2, in_chans, 37, 42) if frames is None else (2, in_chans, frames, 37, 42)
    return torch.randn(size, generator=g, dtype=dtype)


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_intermediates_features_and_head_agree(name: str, frames: int | None) -> None:
    model, x = small(name, frames).eval(), pixels(frames)
    last, features = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(features[-1].movedim(1, -1), last)
    assert torch.equal(model.forward_head(last), model(x))
    lead = [] if frames is None else [frames]
    features = model.forward_intermediates(x, intermediates_only=True)
    for feature, info in zip(features, model.feature_info, strict=True):
        size = [math.ceil(n / info["reduction"]) for n in x.shape[-2:]]
        assert list(feature.shape) == [2, info["num_chs"], *lead, *size]
        assert isinstance(model.get_submodule(info["module"]), nn.Module)
    (one,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(one, features[0])
    stopped, _ = model.forward_intermediates(x, [0], stop_early=True, output_fmt="NHWC")
    assert torch.equal(stopped.movedim(-1, 1), features[0])
    assert len(model.forward_intermediates(x, 1, intermediates_only=True)) == 1
    for options, message in (
        ({"indices": [9]}, "indices=.9. must lie between"),
        ({"indices": 9}, "indices=9 must lie between 1"),
        ({"output_fmt": "NLC"}, "output_fmt must be 'NCHW' or 'NHWC'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **options)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, "):
        model(x[:, :2])
    with pytest.raises(ValueError, match=r"x must be \(B, 3, "):
        model(x[..., 0])
    with pytest.raises(ValueError, match=r"x must be \(B, 3, .* none of them 0, got"):
        model(x[..., :0])


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_an_empty_batch_runs(name: str, frames: int | None) -> None:
    model, x = small(name, frames).eval(), pixels(frames)[:0].requires_grad_()
    out = model(x)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["selective_s4_small", "tvts_base", "convs5_small"])
@pytest.mark.parametrize("frames", [None, 3])
def test_an_empty_batch_runs_through_sequences_too(name: str, frames: int | None) -> None:
    options = {"convs5_small": {"dim": 32}}.get(name, {"dim": 24, "depth": 1})
    options |= {"num_heads": 2} if name.startswith("tvts") else {}
    model = create_backbone(name, num_classes=5, frames=frames, **options).eval()
    x = pixels(frames)[:0].requires_grad_()
    out = model(x)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad is not None


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_reset_classifier(name: str, frames: int | None) -> None:
    model, x = small(name, frames).double().eval(), pixels(frames, torch.float64)
    features = model.forward_features(x)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    assert model.get_classifier().weight.dtype == torch.float64
    assert torch.equal(model.forward_features(x), features)
    model.reset_classifier(0, "avg")
    assert model(x).shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(2)  # with no old layer to take the dtype from
    assert model(x).dtype == model.get_classifier().weight.dtype == torch.float64
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_checkpointing_changes_no_gradient(name: str, frames: int | None) -> None:
    model = small(name, frames, drop_path_rate=0.0).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(pixels(frames, torch.float64)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_gradients_are_those_of_differences(name: str, frames: int | None) -> None:
    """Along random directions of input and of weights, in float64."""
    model, x = small(name, frames).double().eval(), pixels(frames, torch.float64)
    x.requires_grad_()
    leaves = [x, *model.parameters()]
    directions = [torch.randn_like(leaf) * 0.1 for leaf in leaves]
    weight = torch.randn(2, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(x) * weight).sum()

    grads = torch.autograd.grad(loss(), leaves)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=step)
            ends.append(loss())
    assert abs((ends[0] - ends[1]) / 2e-5 - slope) < 1e-5 * max(1.0, abs(slope))


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_compiles_as_one_graph_forward_and_backward(name: str, frames: int | None) -> None:
    model, x = small(name, frames).double().eval(), pixels(frames, torch.float64)
    weight = torch.randn(2, 5, dtype=torch.float64)

    def outcome(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = run(x)
        grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()))
        return [out.detach(), *grads]

    wanted = outcome(model)
    torch.compiler.reset()
    found = outcome(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("name", "frames"), KINDS)
def test_half_precision_and_autocast(name: str, frames: int | None) -> None:
    model, x = small(name, frames).eval(), pixels(frames)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
        mixed.float().sum().backward()
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.06 * wanted.abs().max()


def test_catalogue_builds_by_name() -> None:
    for name, build in BACKBONES.items():
        # its default is a network of timm, which is optional
        options = {"backbone": "stvision:halonet26t"} if name.startswith("two_stream") else {}
        with torch.device("meta"):
            model = create_backbone(name, in_chans=2, num_classes=3, frames=24, **options)
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
        assert first.in_channels == 2
        assert model.get_classifier().out_features == model.num_classes == 3
        assert build.__doc__
    assert {"davit_tiny", "davit_small", "davit_base", "davit_large"} <= BACKBONES.keys()
    with pytest.raises(ValueError, match="backbone must be one of .*davit_tiny.*, got 'davit'"):
        create_backbone("davit")
    for frames in (0, 2.5, True, "4"):
        with pytest.raises(ValueError, match=f"frames must be None .* at least 1, got {frames!r}"):
            create_backbone("davit_tiny", frames=frames)
    for options in ({"in_chans": 0}, {"in_chans": 2.5}, {"num_classes": "a"}, {"num_classes": 2.5}):
        ((name, value),) = options.items()
        wanted = f"{name} must be a whole number of at least [01], got {value!r}"
        with pytest.raises(ValueError, match=wanted):
            create_backbone("davit_tiny", **options)


@pytest.mark.parametrize("name", BACKBONES)
def test_unknown_options_are_one_sentence(name: str) -> None:
    allowed = backbone_options(name)
    with pytest.raises(ValueError) as caught:
        create_backbone(name, frames=24, depht=3, **{allowed[0]: None, "fraems": 2})
    assert str(caught.value) == (
        f"options of backbone {name!r} must be among {', '.join(allowed)}, got depht, fraems"
    )


@pytest.mark.parametrize("name", {classes: name for name, classes in _CLASSES.items()}.values())
def test_all_options_that_are_allowed_are_taken(name: str) -> None:
    """Of one backbone of each family, all at once, each with the value that its class has for it."""
    defaults: dict[str, object] = {}
    for cls in reversed(_CLASSES[name]):
        parameters = inspect.signature(cls).parameters.items()
        defaults |= {key: p.default for key, p in parameters if p.default is not p.empty}
    options = {key: defaults[key] for key in backbone_options(name) if key in defaults}
    if name.startswith("two_stream"):
        options["backbone"] = "stvision:halonet26t"
    with torch.device("meta"):
        model = create_backbone(name, num_classes=3, frames=24, **options)
    assert model.num_classes == 3 and len(options) >= len(backbone_options(name)) - 4


def test_the_documents_table_is_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs/backbones.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if "`stvision/models/" in line]
    assert all((root / row[3].strip(" `")).is_file() for row in rows)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[4])]
    assert sorted(names) == sorted(BACKBONES)
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    exec(compile(code, "backbones.md", "exec"), {})  # noqa: S102  the document is ours
    assert capsys.readouterr().out.splitlines() == re.findall(r"# (torch.+)$", code, re.MULTILINE)


@pytest.mark.parametrize(("frames", "kernel"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (16, 5)])
def test_windows_of_nat_fit_the_frames(frames: int, kernel: int) -> None:
    with torch.device("meta"):
        assert create_backbone("nat_mini", frames=frames).frame_kernel == kernel


def test_weights_come_from_files_and_folders(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sizes = SMALL["davit"][1]
    source = davit.DaViT(**sizes, num_classes=5).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    x = pixels(None)
    for path in (tmp_path / "a.pth", tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        model = create_backbone("davit_tiny", path, num_classes=5, **sizes).eval()
        assert torch.equal(model(x), source(x))
    other = create_backbone("davit_tiny", tmp_path, num_classes=4, frames=3, **sizes).eval()
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    assert other(clip).shape == (2, 4)
    close = (other.forward_features(clip)[:, 1] - source.forward_features(x)).abs().max()
    assert close < 1e-4
    grey = create_backbone("davit_tiny", tmp_path, in_chans=1, num_classes=5, **sizes).eval()
    same = x[:, :1]
    assert (grey(same) - source(same.expand(-1, 3, -1, -1))).abs().max() < 1e-5
    with pytest.raises(ValueError, match="do not fit DaViT: missing .*; left over"):
        create_backbone("davit_tiny", tmp_path, **(sizes | {"depths": (2, 0)}))
    with pytest.raises(ValueError, match="other shape .* for .* and more"):
        create_backbone("davit_tiny", tmp_path, **(sizes | {"embed_dims": (4, 8)}))
    for lost in (tmp_path / "lost.pth", "weights/lost.pth"):  # the second looks like a repository
        with pytest.raises(FileNotFoundError, match="neither a file, a folder nor owner/name"):
            read_weights(lost)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        read_weights(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no state dict"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "published"),
    [("davit", "davit_tiny"), ("biformer", "biformer_tiny"), ("biformer_nchw", "biformer_tiny")]
    + [("halonet", "halonet26t")],
)
def test_a_file_of_image_weights_makes_a_video_model(
    name: str, published: str, tmp_path: Path
) -> None:
    """What only clips have starts where a clip of equal frames gives the logits of its image."""
    image, x = small(name, None).eval(), pixels(None)
    torch.save(image.state_dict(), tmp_path / "image.pth")
    options = SMALL[name][1] | {"num_classes": 5, "frames": 3}
    video = create_backbone(published, tmp_path / "image.pth", **options).eval()
    assert len(video.state_dict()) > len(image.state_dict())
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    assert (video(clip) - image(x)).abs().max() < 1e-4 * image(x).abs().max().clamp_min(1)


def test_dropout_of_the_head_stands_behind_its_norm() -> None:
    head = Head(64, 0, nn.LayerNorm(64), drop_rate=0.5).train()
    x = torch.randn(200, 64)
    dropped, whole = head(x), head.eval()(x)
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6
    assert torch.allclose(dropped, torch.where(zero, 0.0, 2 * whole))


def test_image_weights_of_nat_become_video_weights(tmp_path: Path) -> None:
    sizes = {
        "depths": (1, 1),
        "num_heads": (1, 2),
        "embed_dim": 16,
        "mlp_ratio": 2,
        "kernel_size": 3,
    }
    sizes["dilations"] = [[1], [1]]
    source = nat.NAT(**sizes, num_classes=5).eval()
    torch.save(source.state_dict(), tmp_path / "nat.pth")
    video = create_backbone(
        "nat_mini", tmp_path / "nat.pth", num_classes=5, frames=3, **sizes
    ).eval()
    x = pixels(None)
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    assert (video(clip) - source(x)).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_input_channels_keep_the_response_to_equal_channels(channels: int) -> None:
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    adapted = adapt_input_channels(weight, channels)
    assert adapted.shape == (5, channels, 2, 2)
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))
