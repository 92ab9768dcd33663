"""``stvision convert`` of backbones: published layouts to folders that give the same outputs."""

import json
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stvision.cli.convert import Command
from stvision.cli.main import main
from stvision.models import biformer, convs5, davit, halonet, nat, selective_s4, tvts
from stvision.models.backbones import BACKBONES, create_backbone
from stvision.models.convert_backbone import KINDS, _fits
from stvision.models.convs5 import ConvS5Predictor, convs5_predictor
from stvision.models.two_stream import TWO_STREAM_MODELS

State = dict[str, Tensor]

#: module, name -> sizes that stand for the published ones
SMALL: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    (davit, "davit_tiny", {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 4)}),
    (
        davit,
        "davit_base_fl",
        {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 4), "florence": True},
    ),
    (
        biformer,
        "biformer_tiny",
        {"depths": (1, 1), "embed_dims": (8, 16), "topks": (2,), "n_win": 3, "head_dim": 4},
    ),
    *(
        (
            biformer,
            name,
            {"depths": (1, 1), "embed_dims": (8, 16), "topks": (2,), "n_win": 3, "head_dim": 4}
            | {"layout": "swin"}
            | ({"flavour": "nchw", "lepe_from_value": True} if name.endswith("nchw") else {}),
        )
        for name in ("biformer_stl", "biformer_stl_nchw")
    ),
    (
        halonet,
        "sehalonet33ts",
        {
            "stages": (halonet.HaloStage("ch", 16, 1, 2), halonet.HaloStage("h", 32, 2, 2)),
            "stem": (8, 8),
            "gate": "se",
            "gate_ratio": 0.5,
            "block_size": 4,
        },
    ),
    (selective_s4, "vis4mer_large", {"dim": 16, "depth": 2, "keep_ratio": 1.0, "d_state": 4}),
    (convs5, "convs5_base", {"widths": (4, 6), "dim": 8, "depth": 2, "groups": 2}),
)
NAT_SMALL = {
    "depths": (1, 1),
    "num_heads": (1, 2),
    "embed_dim": 8,
    "mlp_ratio": 2,
    "kernel_size": 3,
}
TVTS_SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "img_size": 48}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few backbones of the catalogue become small; the others keep their published sizes."""
    for module, name, sizes in SMALL:
        monkeypatch.setitem(module._SIZES, name, sizes)
    for name in ("nat_mini", "dinat_mini"):
        options = NAT_SMALL | ({"dilations": [[2], [1]]} if name == "dinat_mini" else {})

        def build(
            pretrained: Any = None, frames: int | None = None, _o: dict = options, **given: Any
        ) -> nn.Module:
            assert frames is None
            return nat._create(pretrained, _o, given)

        monkeypatch.setitem(BACKBONES, name, build)
    monkeypatch.setitem(BACKBONES, "tvts_base", tvts._builder("tvts_base", TVTS_SMALL))


def fresh(name: str, **options: Any) -> nn.Module:
    """A backbone with weights of which none is zero or one by construction."""
    torch.manual_seed(0)
    model = create_backbone(name, **options).eval()
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and not key.endswith((".w", ".log_dt", ".log_step")):
            value.add_(torch.randn_like(value) * 0.05)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def renamed(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    found = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


def davit_authors(state: State) -> State:
    return renamed(
        state,
        (
            (r"^stem\.conv\.", "patch_embeds.0.proj."),
            (r"^stem\.norm\.", "patch_embeds.0.norm."),
            (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
            (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
            (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
            (r"\.cpe1\.", ".cpe.0."),
            (r"\.cpe2\.", ".cpe.1."),
            (r"^head\.norm\.", "norms."),
            (r"^head\.fc\.", "head."),
        ),
    )


def florence(state: State) -> State:
    rules = (
        (r"^stem\.(conv|norm)\.", r"convs.0.\1."),
        (r"^stages\.(\d+)\.downsample\.", r"convs.\1."),
        (r"^(convs\.\d+)\.conv\.", r"\1.proj."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.0\.", r"blocks.\1.\2.spatial_block."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.1\.", r"blocks.\1.\2.channel_block."),
        (r"(spatial_block)\.norm1\.", r"\1.window_attn.norm."),
        (r"(spatial_block)\.attn\.", r"\1.window_attn.fn."),
        (r"(channel_block)\.norm1\.", r"\1.channel_attn.norm."),
        (r"(channel_block)\.attn\.", r"\1.channel_attn.fn."),
        (r"\.norm2\.", ".ffn.norm."),
        (r"\.mlp\.", ".ffn.fn.net."),
        (r"\.cpe1\.proj\.", ".conv1.fn.dw."),
        (r"\.cpe2\.proj\.", ".conv2.fn.dw."),
        (r"^", "vision_tower."),
    )
    kept = {key: x for key, x in state.items() if not key.startswith("head.")}
    return renamed(kept, rules) | {"language_model.x": torch.zeros(2)}


def biformer_authors(state: State, nchw: bool = False) -> State:
    names = (".attn.qkv_linear.", ".attn.output_linear.") if nchw else (".attn.qkv.qkv.", ".wo.")
    routed = r"(stages\.0\.\d+\.attn)"
    found = renamed(
        state,
        (
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
            (r"\.pos_embed\.proj\.", ".pos_embed."),
            (r"\.lepe\.proj\.", ".lepe."),
            (routed + r"\.qkv\.", r"\1." + names[0].removeprefix(".attn.")),
            (routed + r"\.proj\.", r"\1." + names[1].removeprefix(".attn.").removeprefix(".")),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.3."),
            (r"^head\.fc\.", "head."),
        ),
    )
    if nchw:  # the second layer's projections are 1 x 1 convolutions
        for key, value in found.items():
            if re.search(r"_linear\.weight$", key):
                found[key] = value[:, :, None, None]
    return found


def halonet_timm(state: State) -> State:
    found = renamed(state, ((r"^stages\.(\d+)\.blocks\.", r"stages.\1."),))
    for key, value in found.items():
        if re.search(r"\.(self_attn\.q|self_attn\.kv)\.weight$", key):
            found[key] = value[:, :, None, None]
    return found


def nat_authors(state: State) -> State:
    found = {}
    for key, value in state.items():
        match = re.match(r"stages\.(\d+)\.downsample\.(.*)", key)
        if match:
            key = f"levels.{int(match[1]) - 1}.downsample.{match[2]}"
        found[re.sub(r"^head\.fc\.", "head.", re.sub(r"^stages\.", "levels.", key))] = value
    return found


def vis4mer(state: State) -> State:
    kept = {key: x for key, x in state.items() if not key.startswith("patch_embed.")}
    found = renamed(
        kept,
        (
            (r"^stages\.(\d+)\.s4\.(log_dt|w|B|C)$", r"s4_layers.\1.kernel.krylov.\2"),
            (r"^stages\.(\d+)\.s4\.", r"s4_layers.\1."),
            (r"^stages\.(\d+)\.norm\.", r"norms.\1."),
            (r"^stages\.(\d+)\.linear\.", r"linears.\1."),
            (r"^head\.fc\.", "decoder."),
        ),
    )
    for key, value in found.items():
        if key.endswith("output_linear.bias"):
            found[key] = value[:, None]
    return found | {"s4_layers.0.kernel.krylov.z": torch.zeros(3)}


CASES = {
    "davit": ("davit", "davit_tiny", davit_authors, {}),
    "davit in timm's keys": ("davit", "davit_tiny", dict, {}),
    "florence": ("davit", "davit_base_fl", florence, {"num_classes": 0}),
    "biformer": ("biformer", "biformer_tiny", biformer_authors, {}),
    "biformer of the second layer": (
        "biformer",
        "biformer_stl_nchw",
        lambda state: biformer_authors(state, True),
        {},
    ),
    "biformer of Swin's layout": ("biformer", "biformer_stl", biformer_authors, {}),
    "halonet": ("halonet", "sehalonet33ts", halonet_timm, {}),
    "nat": ("nat", "nat_mini", nat_authors, {}),
    "dinat": ("dinat", "dinat_mini", nat_authors, {"layer_scale": 0.3}),
    "tvts": (
        "tvts",
        "tvts_base",
        lambda state: (
            {f"video_model.{key}": x for key, x in state.items()}
            | {"text_model.x": torch.zeros(2), "vid_proj.0.weight": torch.zeros(2, 2)}
        ),
        {"frames": 6},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_published_weights(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, name, layout, options = CASES[case]
    channels = 2 if case == "nat" else 3
    classes = {} if "num_classes" in options or kind == "tvts" else {"num_classes": 7}
    source = fresh(name, in_chans=channels, **(options | classes))
    if case == "florence":  # whose tower ends without a classifier's norm
        source.head.norm.reset_parameters()
    published = layout(source.state_dict())
    if case == "davit in timm's keys":
        file = tmp_path / "model.safetensors"
        save_file(published, file)
    else:
        file = tmp_path / "weights.pth"
        wrapped = {f"module.{key}": x for key, x in published.items()} if kind == "tvts" else None
        torch.save({"model": published} if wrapped is None else {"state_dict": wrapped}, file)
    folder = tmp_path / "a" / "b"
    assert main(["convert", kind, str(file), "-o", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backbone"] == name and report["output"] == str(folder)
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [x.name for x in folder.parent.iterdir()] == ["b"]
    saved = load_file(folder / "model.safetensors")
    assert report["converted_parameters"] == sum(x.numel() for x in saved.values())

    frames = {"frames": 6} if kind == "tvts" else {}
    model = create_backbone(name, folder, **frames).eval()
    size = (37, 42) if kind != "tvts" else (6, 48, 33)
    x = torch.randn(2, channels, *size)
    assert model(x).shape == (2, classes.get("num_classes", model.num_features))
    assert torch.equal(model(x), source(x))
    other = create_backbone(name, folder, in_chans=1, num_classes=3, **frames)
    assert other.get_classifier().out_features == 3
    assert next(m for m in other.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)).in_channels == 1


def test_vis4mer_keeps_the_length_its_layers_were_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fresh("vis4mer_large", num_classes=5, l_max=24)
    torch.save(vis4mer(source.state_dict()), tmp_path / "a.pth")
    folder = tmp_path / "out"
    words = ["convert", "vis4mer", str(tmp_path / "a.pth"), "-o", str(folder), "--l-max", "24"]
    assert main(words) == 0
    assert "vis4mer_large (0.0 M converted parameters)" in capsys.readouterr().out
    tokens = torch.randn(2, 24, 16)
    model = create_backbone("vis4mer_large", folder).eval()
    wanted = source.forward_tokens(tokens)[0]
    assert torch.equal(model.forward_tokens(tokens)[0], wanted)
    longer = create_backbone("vis4mer_large", folder, l_max=48).eval()
    assert not torch.allclose(longer.forward_tokens(tokens)[0], wanted)


def flax(state: State) -> dict[str, np.ndarray]:
    """Arrays in the authors' keys from a predictor's, by the axes that the sheet names."""
    arrays = {"params/action_embeds/embedding": state["action.weight"]}

    def conv(at: str, name: str) -> None:
        for key in ("weight", "bias"):
            if f"{name}.{key}" in state:
                x = state[f"{name}.{key}"]
                x = x.permute(2, 3, 1, 0) if x.ndim == 4 else x.mT if x.ndim == 2 else x
                arrays[f"params/{at}/{'kernel' if key == 'weight' else key}"] = x

    def norm(at: str, name: str) -> None:
        arrays[f"params/{at}/scale"] = state[f"{name}.weight"]
        arrays[f"params/{at}/bias"] = state[f"{name}.bias"]

    def block(at: str, name: str) -> None:
        for i in (1, 2):
            norm(f"{at}/GroupNorm_{i - 1}", f"{name}.norm{i}")
            conv(f"{at}/Conv_{i - 1}", f"{name}.conv{i}")
        conv(f"{at}/skip", f"{name}.skip")

    for part in ("encoder", "decoder"):
        conv(f"{part}/Conv_0", f"{part}.conv")
        for i in range(2):
            block(f"{part}/ResNetBlock_{i}", f"{part}.blocks.{i}")
    norm("decoder/LayerNorm_0", "decoder.norm")
    conv("decoder/Dense_0", "decoder.fc")
    conv("action_conv/Conv_0", "proj")
    arrays["params/action_conv/Conv_0/kernel"] = state["proj.weight"].mT[None, None]
    for i in range(2):
        seq, name = f"params/sequence_model/layers_{i}/seq", f"layers.{i}"
        norm(f"sequence_model/layers_{i}/norm", f"{name}.norm")
        block(f"sequence_model/layers_{i}/seq/C_D_conv", f"{name}.readout")
        arrays[f"{seq}/Lambda_re"] = state[f"{name}.ssm.lambda_re"]
        arrays[f"{seq}/Lambda_im"] = state[f"{name}.ssm.lambda_im"]
        arrays[f"{seq}/log_step"] = state[f"{name}.ssm.log_step"][:, None]
        arrays[f"{seq}/B"] = state[f"{name}.ssm.B"].permute(0, 2, 3, 4, 1).flatten(1, 3)
        arrays[f"{seq}/C"] = state[f"{name}.ssm.C"].permute(3, 4, 1, 0, 2)
    return {key: value.numpy() for key, value in arrays.items()}


@pytest.mark.parametrize("actions", [1, 3])
def test_convs5_gives_its_predictor_and_its_backbone(
    actions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {"widths": (4, 6), "dim": 8, "depth": 2, "groups": 2, "in_chans": 2}
    source = ConvS5Predictor(**sizes, actions=actions, action_dim=3).eval()
    np.savez(tmp_path / "flax.npz", **flax(source.state_dict()))
    folder = tmp_path / "out"
    assert main(["convert", "convs5", str(tmp_path / "flax.npz"), "-o", str(folder)]) == 0
    assert "convs5_base" in capsys.readouterr().out
    x = torch.randn(2, 2, 5, 6, 8)
    for where in (folder, tmp_path / "flax.npz"):
        assert torch.equal(convs5_predictor(where, groups=2).eval()(x), source(x))

    kept: list[Tensor] = []
    source.layers[-1].norm.register_forward_hook(lambda module, given, out: kept.append(out))
    number = torch.full((2, 5), 0 if actions == 1 else actions)
    source.stream(x, number)
    model = create_backbone("convs5_base", folder, frames=5).eval()
    assert (model.forward_features(x) - kept[0]).abs().max() < 1e-5
    assert model(x).shape == (2, 8) and model.in_chans == 2
    with pytest.raises(ValueError, match="holds no weights of a ConvS5Predictor"):
        torch.save(model.state_dict(), tmp_path / "a.pth")
        convs5_predictor(tmp_path / "a.pth")


def test_kinds_are_those_of_the_command() -> None:
    annotated = Command.__dataclass_fields__["kind"].type
    kinds = typing.get_args(typing.get_args(annotated)[0])
    assert set(kinds) == {"seer", *KINDS}
    named = {name for kind in KINDS.values() for name in kind.names({})}
    # none of Selective S4, of the heads over time and of the mechanisms' classifier were published
    unpublished = {"selective_s4_small", "selective_s4_large", *TWO_STREAM_MODELS, "mechanism"}
    assert named == BACKBONES.keys() - unpublished


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vis4mer", "tvts"}))
def test_shapes_tell_the_names_of_published_sizes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the published sizes
    family = KINDS[kind]
    names = family.names({})
    states = {}
    for name in names:
        with torch.device("meta"):
            states[name] = create_backbone(name).state_dict()
    for name in names:
        fitting = [other for other in names if _fits(other, family, states[name])]
        swin = ["biformer_stl", "biformer_stl_nchw"]  # of one shape, told apart by published keys
        assert fitting == (swin if name in swin else [name])


def test_half_precision(tmp_path: Path) -> None:
    torch.save(fresh("davit_tiny").state_dict(), tmp_path / "a.pth")
    words = ["convert", "davit", str(tmp_path / "a.pth"), "-o", str(tmp_path / "out")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}


class Exploit:
    def __reduce__(self) -> tuple:
        return (print, ("ran code",))


def test_one_sentence_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.pth"
    state = fresh("davit_tiny").state_dict()
    torch.save(state, good)
    swin = tmp_path / "swin.pth"
    torch.save(fresh("biformer_stl").state_dict(), swin)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Exploit()}))
    torch.save({key: x for key, x in state.items() if "mlp" not in key}, tmp_path / "part.pth")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    nowhere = str(tmp_path / "out")
    for words, sentence in (
        (["davit", "lost.pth"], "there is no lost.pth"),
        (["davit", str(good), "-o", str(tmp_path / "full")], "exists and is not an empty folder"),
        (["davit", str(tmp_path / "empty.pth")], "holds no state dict"),
        (["davit", str(tmp_path / "text.safetensors")], "is not a file of weights"),
        (["davit", str(tmp_path / "evil.pth")], "is not a file of weights"),
        (["convs5", str(tmp_path / "text.npz")], "is not a file of arrays"),
        (["convs5", str(tmp_path / "other.npz")], "these are no parameters of ConvS5"),
        (["halonet", str(good)], "of none of the backbones of kind halonet: halonet_h1, "),
        (
            ["davit", str(tmp_path / "part.pth")],
            "of none of the backbones of kind davit: davit_tiny, ",
        ),
        (["biformer", str(swin)], "fit biformer_stl and biformer_stl_nchw alike: give the name"),
        (["davit", str(good), "--name", "nat_mini"], "name must be one of davit_tiny, "),
        (["davit", str(good), "--name", "davit_large"], "weights do not fit DaViT: "),
        (["davit", str(good), "--sd", "x"], "--sd is an option of seer, not of davit"),
        (["davit", str(good), "--l-max", "9"], "--l-max is an option of vis4mer, not of davit"),
        (["seer", str(good), "--name", "x"], "--name is an option of backbones, not of seer"),
    ):
        out = [] if "-o" in words else ["-o", nowhere]
        assert main(["convert", *words, *out]) == 2, words
        said = capsys.readouterr()
        assert sentence in said.err and len(said.err.strip().splitlines()) == 1, said.err
        assert "ran code" not in said.out + said.err
        assert not list(tmp_path.glob(".*partial")) and not Path(nowhere).exists()
    assert main(["convert", "biformer", str(swin), "--name", "biformer_stl", "-o", nowhere]) == 0
