"""Two-stream model: features beside one another, frozen backbones, flow stacks, averaged scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stvision.layers import TSLSTM, TemporalInception
from stvision.models.backbones import create_backbone
from stvision.models.two_stream import TWO_STREAM_MODELS, TwoStream, image_features, stack_flow
from stvision.models.weights import adapt_input_channels
from stvision.optional import mend_torchvision


class Pool(nn.Module):
    """Mean colours through a linear layer and a batch norm: (N, C, H, W) to (N, D)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(channels, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x.mean((2, 3))))


def model(head: str = "ts-lstm", flow: bool = True, **options: object) -> TwoStream:
    torch.manual_seed(0)
    return TwoStream(
        Pool(3, 4),
        head,
        5,
        flow_backbone=Pool(6, 3) if flow else None,
        flow_chans=6,
        dim=7 if flow else 4,
        **options,
    ).eval()


def clips(frames: int = 25) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    sizes = ((2, 3, frames, 6, 5), (2, 6, frames, 4, 4))
    return tuple(torch.randn(s, generator=g) for s in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("head", ["ts-lstm", "temporal-inception"])
def test_features_of_both_streams_stand_side_by_side(head: str) -> None:
    net, (x, flow) = model(head), clips()
    features = net.forward_features(x, flow)
    for t in (0, 17):
        wanted = torch.cat([net.backbone(x[:, :, t]), net.flow_backbone(flow[:, :, t])], 1)
        assert torch.allclose(features[:, t], wanted, atol=1e-6)
    assert torch.equal(net(x, flow), net.head(features))
    assert model(head, flow=False)(x).shape == (2, 5)


def test_frozen_backbones_learn_nothing_and_keep_their_statistics() -> None:
    net, (x, flow) = model().train(), clips()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(x, flow).square().sum().backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None for p in net.head.parameters())
    after = net.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if "backbone" in k)
    free = model(frozen=False).train()
    free(x, flow).square().sum().backward()
    assert all(p.grad is not None for p in free.parameters())
    assert int(free.backbone.norm.num_batches_tracked) == 1


def test_flow_is_stacked_from_each_frame_on() -> None:
    flow = torch.randn(2, 2, 5, 3, 4)
    stacked = stack_flow(flow, 3)
    for t in range(5):
        for k in range(3):
            wanted = flow[:, :, min(t + k, 4)]
            assert torch.equal(stacked[:, 2 * k : 2 * k + 2, t], wanted)
    with pytest.raises(ValueError, match=r"flow must be \(B, 2, T, H, W\)"):
        stack_flow(flow[:, :1])


def test_scores_are_averaged_over_clips() -> None:
    net, (x, flow) = model(), clips()
    wanted = (net(x, flow).softmax(-1) + net(x.flip(-1), -flow).softmax(-1)) / 2
    got = net.predict([x, x.flip(-1)], [flow, -flow])
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(2))


def test_classifier_is_replaced() -> None:
    net, (x, flow) = model().double(), clips()
    net.reset_classifier(3)
    assert net(x.double(), flow.double()).shape == (2, 3) and net.num_classes == 3
    net.reset_classifier(0)
    assert net(x.double(), flow.double()).shape == (2, net.head_hidden_size)


@pytest.mark.parametrize("head", ["ts-lstm", "temporal-inception"])
def test_surface(head: str) -> None:
    net, (x, flow) = model(head), clips()
    last, (features,) = net.forward_intermediates(x, flow=flow)
    assert torch.equal(last, net.forward_features(x, flow)) and torch.equal(last, features)
    assert features.shape == (2, 25, net.feature_info[0]["num_chs"])
    options = {"indices": [-1], "output_fmt": "NCL", "intermediates_only": True, "flow": flow}
    assert torch.equal(net.forward_intermediates(x, **options)[0], features.mT)
    hidden = net.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, net.head_hidden_size)
    assert torch.equal(net.get_classifier()(hidden), net(x, flow))
    net.reset_classifier(0)
    assert torch.equal(net(x, flow), hidden)


def test_backbone_of_this_project() -> None:
    sizes = "stvision:davit_tiny"
    net, dim = image_features(sizes, in_chans=2)
    assert dim == 768 and net.get_classifier() is not None
    with torch.no_grad():
        assert net(torch.randn(1, 2, 32, 32)).shape == (1, 768)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("mobilenetv3_small_050", 1024)])
@pytest.mark.parametrize("channels", [3, 20])
def test_backbones_of_timm(name: str, width: int, channels: int) -> None:
    """The second widens what it has pooled."""
    pytest.importorskip("timm", reason="timm (extra `vision`) is missing")
    net, dim = image_features(f"timm:{name}", in_chans=channels)
    with torch.no_grad():
        assert net.eval()(torch.randn(1, channels, 40, 40)).shape == (1, dim) == (1, width)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_backbones_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing")
    torch.manual_seed(0)
    peer = models.get_model(name).eval()
    torch.manual_seed(0)
    net, dim = image_features(f"torchvision:{name}")
    last = [m for m in peer.modules() if isinstance(m, nn.Linear)][-1]
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        features = net.eval()(x)
        assert features.shape == (1, dim)
        assert torch.allclose(last(features), peer(x), atol=1e-5)
    wide, _ = image_features(f"torchvision:{name}", in_chans=20)
    with torch.no_grad():
        assert wide.eval()(torch.randn(1, 20, 40, 40)).shape == (1, dim)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "quantized_googlenet"])
def test_classifiers_in_the_middle_are_left_out(name: str, tmp_path: Path) -> None:
    """Features are those before the last layer in training too, also from a file that has them all."""
    mend_torchvision()
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing")
    torch.manual_seed(0)
    full = models.get_model(name, init_weights=False, aux_logits=True, num_classes=7)
    torch.save(full.state_dict(), tmp_path / "image.pth")
    assert any(key.split(".")[0] in {"aux1", "AuxLogits"} for key in full.state_dict())
    options = {"backbone": f"torchvision:{name}", "frames": 3, "num_classes": 5, "hidden": 8}
    made: Any = create_backbone(
        "two_stream_ts_lstm", tmp_path / "image.pth", frozen=False, **options
    ).train()
    assert not any("aux" in key.lower() for key in made.state_dict())
    for net in (made.backbone, full):  # what training draws and counts is not compared
        for module in net.modules():
            if isinstance(module, nn.Dropout | nn.BatchNorm2d):
                module.eval()
    size = 64 if "google" in name else 96
    x = torch.randn(1, 3, 3, size, size)
    with torch.no_grad():
        full.eval()
        last = [m for m in full.children() if isinstance(m, nn.Linear)][-1]
        wanted = full(x[0].transpose(0, 1))
        assert torch.allclose(last(made.forward_features(x)[0]), wanted, atol=1e-5)
    made.train()
    made(torch.cat([x, x.flip(-1)])).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "fcn_resnet50",
        "lraspp_mobilenet_v3_large",
        "fasterrcnn_resnet50_fpn",
        "ssd300_vgg16",
        "raft_small",
        "r3d_18",
        "swin3d_t",
        "R3D_18",
    ],
)
def test_networks_for_clips_boxes_and_masks_are_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend_torchvision()
    pytest.importorskip("torchvision.models", reason="torchvision is missing")
    fetched: list[object] = []
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetched.append)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: fetched.append(a))
    message = (
        "a backbone of torchvision must be a network that classifies images, one of "
        rf"torchvision.models.list_models\(.*\), got 'torchvision:{name}'"
    )
    for flow in (False, True):
        places = {"flow_backbone": f"torchvision:{name}"} if flow else {}
        backbone = "stvision:convs5_small" if flow else f"torchvision:{name}"
        with pytest.raises(ValueError, match=message):
            create_backbone("two_stream_ts_lstm", frames=3, backbone=backbone, **places)
    assert not fetched


def test_networks_of_torchvision_fetch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mend_torchvision()
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing")

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    # those that can be built without numbers and end in a linear layer
    others = ["squeezenet*", "googlenet", "inception*", "regnet*"]
    with torch.device("meta"):
        for name in models.list_models(module=models, exclude=others):
            assert image_features(f"torchvision:{name}")[1] > 0
    with pytest.raises(AssertionError, match="fetched"):  # where it was asked for
        image_features("torchvision:alexnet", True)


def peer(source: str) -> tuple[str, nn.Module, Any]:
    """Name of a backbone, a network of it with a classifier, and its pooled features of images."""
    torch.manual_seed(0)
    if source == "stvision":
        net: Any = create_backbone("convs5_small", num_classes=7)

        def pooled(x: Tensor) -> Tensor:
            return net.forward_head(net.forward_features(x), pre_logits=True)

        return "stvision:convs5_small", net.eval(), pooled
    if source == "timm":
        timm = pytest.importorskip("timm", reason="timm (extra `vision`) is missing")
        net = timm.create_model("resnet18", num_classes=7)
    else:
        models = pytest.importorskip("torchvision.models", reason="torchvision is missing")
        net = models.resnet18(num_classes=7)
    for module in net.modules():  # as after training
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    body = nn.Sequential(*list(net.eval().children())[:-1], nn.Flatten())  # all but fc
    return f"{source}:resnet18", net, body


@pytest.mark.parametrize("source", ["stvision", "timm", "torchvision"])
def test_image_weights_start_both_streams_by_name(source: str, tmp_path: Path) -> None:
    name, net, pooled = peer(source)
    path = tmp_path / "image.pth"
    torch.save({"state_dict": net.state_dict()}, path)
    options = {"backbone": name, "frames": 3, "num_classes": 5, "hidden": 8}
    made: Any = create_backbone("two_stream_ts_lstm", path, flow_backbone=name, **options).eval()
    x, flow = torch.randn(2, 3, 3, 32, 32), torch.randn(2, 20, 3, 32, 32)
    with torch.no_grad():
        features = made.forward_features(x, flow)
        wanted = torch.stack([pooled(frame) for frame in x.unbind(2)], 1)
        assert (features[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-5
        assert made(x, flow).shape == (2, 5)
    for stream, chans in ((made.backbone, 3), (made.flow_backbone, 20)):
        ours, theirs = next(p for p in stream.parameters() if p.ndim == 4), net.state_dict()
        first = next(p for p in net.parameters() if p.ndim == 4)
        assert torch.equal(ours, adapt_input_channels(first, chans)) and not ours.requires_grad
        rest = {k: v for k, v in stream.state_dict().items() if v.shape != ours.shape}
        assert all(torch.equal(v, theirs[k]) for k, v in rest.items())
    grey: Any = create_backbone("two_stream_ts_lstm", path, in_chans=1, **options).eval()
    with torch.no_grad():
        same = grey.forward_features(x[:, :1])
        wanted = pooled(x[:, :1, 0].expand(-1, 3, -1, -1))
    assert (same[:, 0] - wanted).abs().max() < 1e-4

    torch.save(dict(list(net.state_dict().items())[4:]), path)
    with pytest.raises(ValueError, match="weights do not fit .*: missing"):
        create_backbone("two_stream_ts_lstm", path, **options)


@pytest.mark.parametrize("name", TWO_STREAM_MODELS)
def test_whole_models_are_read_back_by_name(name: str, tmp_path: Path) -> None:
    options = {"backbone": "stvision:convs5_small", "frames": 25, "hidden": 8}
    source: Any = create_backbone(name, num_classes=5, **options).eval()
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    x = torch.randn(1, 3, 25, 16, 16)
    again: Any = create_backbone(name, tmp_path / "whole.pth", num_classes=5, **options).eval()
    with torch.no_grad():
        assert torch.equal(again(x), source(x))
        other: Any = create_backbone(name, tmp_path / "whole.pth", num_classes=4, **options).eval()
        features = source.forward_features(x)
        assert torch.equal(other.forward_head(features, True), source.forward_head(features, True))
        assert other(x).shape == (1, 4)
        grey: Any = create_backbone(
            name, tmp_path / "whole.pth", in_chans=1, num_classes=5, **options
        )
        same = source(x[:, :1].expand(-1, 3, -1, -1, -1))
        assert (grey.eval()(x[:, :1]) - same).abs().max() < 1e-4 * same.abs().max().clamp_min(1)
    with pytest.raises(ValueError, match="weights do not fit TwoStream: .*missing flow_backbone"):
        flow = {"flow_backbone": "stvision:convs5_small"}
        create_backbone(name, tmp_path / "whole.pth", num_classes=5, **flow, **options)


def test_names_take_modules_and_their_own_frames(tmp_path: Path) -> None:
    made: Any = create_backbone("two_stream_ts_lstm", frames=3, backbone=Pool(3, 4), dim=4)
    assert made.num_classes == 101 and made.num_features == 4  # UCF-101's
    assert isinstance(made.head, TSLSTM)
    made = create_backbone("two_stream_temporal_inception", frames=24, backbone=Pool(3, 4), dim=4)
    assert isinstance(made.head, TemporalInception) and made.head.pools == (2, 2, 2, 3)
    assert create_backbone("two_stream_ts_lstm", frames=2, segments=2, backbone=Pool(3, 4), dim=4)
    torch.save(Pool(3, 4).state_dict(), tmp_path / "pool.pth")
    calls = [
        ("ts_lstm", {}, "frames of two_stream_ts_lstm, .* clips, must be at least 3, got None"),
        ("ts_lstm", {"frames": 4, "segments": 5}, "must be at least 5, got 4"),
        ("temporal_inception", {"frames": 23}, "must be 24 to 47, got 23"),
        ("temporal_inception", {"frames": 48}, "must be 24 to 47, got 48"),
        ("ts_lstm", {"frames": 4, "pretrained": tmp_path / "pool.pth"}, "hold the whole model"),
        ("ts_lstm", {"frames": 4, "head": "ts-lstm"}, "must be among .*, got head"),
    ]
    for name, options, message in calls:
        with pytest.raises(ValueError, match=message):
            create_backbone(f"two_stream_{name}", backbone=Pool(3, 4), dim=4, **options)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_unknown_networks_of_libraries_are_one_sentence(source: str) -> None:
    pytest.importorskip(source, reason=f"{source} (extra `vision`) is missing")
    with pytest.raises(ValueError, match=f"'{source}:resnet1' is no network that {source}"):
        create_backbone("two_stream_ts_lstm", frames=3, backbone=f"{source}:resnet1")


@pytest.mark.parametrize("head", ["ts-lstm", "temporal-inception"])
def test_compiles_and_autocasts(head: str) -> None:
    net, (x, flow) = model(head), clips()
    wanted = net(x, flow)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(x, flow), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x, flow).float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_bad_input() -> None:
    net, (x, flow) = model(), clips()

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean((2, 3)), x

    pairs, maps = (TwoStream(made, num_classes=5, dim=3) for made in (Pair(), nn.Identity()))
    calls = [
        (lambda: net(x), "this model needs flow"),
        (lambda: model(flow=False)(x, flow), "this model takes no flow"),
        (lambda: net(x[:, :2], flow), r"x must be \(B, 3, T, H, W\)"),
        (lambda: net(x, flow[:, :, :9]), "one batch and number of frames"),
        (lambda: net.predict([]), "clips must not be empty"),
        (lambda: pairs(x), r"the backbone must give \(N, D\), got tuple"),
        (lambda: maps(x), r"the backbone must give \(N, D\), got \(50, 3, 6, 5\)"),
        (lambda: TwoStream(Pool(3, 4)), "dim must be the backbones' features"),
        (lambda: TwoStream(Pool(3, 4), "lstm", dim=4), "head must be one of .*ts-lstm"),
        (lambda: image_features("resnet18"), "backbone must be one of stvision:NAME"),
        (lambda: image_features("stvision:davit_tiny", True), "must name its weights"),
        (lambda: net.reset_classifier(-1), "num_classes must be at least 0"),
        (lambda: net.reset_classifier(3, "avg"), "global_pool must be None, got 'avg'"),
        (lambda: net.forward_intermediates(x, [1], flow=flow), "must lie between -1 and 0"),
        (lambda: net.forward_intermediates(x, output_fmt="NCHW"), "output_fmt must be 'NLC'"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
