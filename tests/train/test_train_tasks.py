"""Every task on a data set of a few tiny clips, through its command-line entry."""

import importlib
import importlib.metadata
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from stvision.cli.main import main as cli
from stvision.datasets.packed import pack
from stvision.datasets.records import ClipDataset, Record
from stvision.models.fstext import FSTextDecomposer
from stvision.models.seer import SeerUNetModel
from stvision.train import action, image, seer, vae
from stvision.train.data import READERS

UNET = {
    "sample_size": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 384,
    "attention_head_dim": 2,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOOP = {"max_steps": 6, "batch_size": 2, "log_every": 1, "save_every": 3, "warmup_steps": 1}


class Squares(ClipDataset):
    """A square that moves right or down, 10 clips to train on and 4 to validate with."""

    def __init__(self) -> None:
        super().__init__("squares", [], num_frames=4, size=16)

    def __len__(self) -> int:
        return 14

    def fingerprint(self) -> str:
        return "squares"

    def iter_items(self, workers: int = 0, *, indices: Any, timeout: float = 0) -> Iterator[Any]:
        for index in indices:
            frames = torch.full((4, 16, 16, 3), 40, dtype=torch.uint8)
            for time in range(4):
                row, column = (2, 2 + 3 * time) if index % 2 else (2 + 3 * time, 2)
                frames[time, row : row + 4, column : column + 4] = 60 + 20 * (index % 7)
            side = "right" if index % 2 else "down"
            captions = [f"move {side}", f"push it {side}"]
            split = "train" if index < 10 else "validation"
            meta = {"task": side, "split": split, "captions": captions}
            yield Record(frames, torch.arange(4.0).double(), captions[0], f"clip{index}", meta)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed clips of two classes (a square goes right, or down), and a trained VAE."""
    root = tmp_path_factory.mktemp("world")

    assert pack(Squares(), root / "data", progress=False).kept == 14
    assert (
        vae.main(
            [
                *words(root, "vae", cache="frames"),
                "--block-out-channels",
                "8",
                "8",
                "8",
                "--norm-num-groups",
                "4",
            ]
        )
        == 0
    )
    return root


def distribution_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def words(root: Path, name: str, cache: str = "latents", **loop: Any) -> list[str]:
    """Options that every task shares."""
    options = {f"loop.{key}": value for key, value in {**LOOP, **loop}.items()}
    options |= {
        "output_dir": root / name,
        "data.kind": "packed",
        "data.root": root / "data",
        "data.cache_dir": root / "cache",
        "data.num_frames": 4,
        "data.height": 16,
        "data.width": 16,
        "data.workers": 0,
        "data.cache": cache,
        "data.validation_clips": 3,
    }
    flags = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return [*flags, "--loop.no-tensorboard"]


def write(root: Path, name: str, **values: Any) -> list[str]:
    """A configuration file with what the command line cannot say."""
    path = root / f"{name}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    config = write(world, "image", unet=UNET, vae=str(world / "vae/model"))
    options = ["--text.max-length", "8", "--sampling-steps", "2"]
    assert image.main([*config, *words(world, "image"), *options]) == 0
    return world / "image" / "model"


def train_seer(world: Path, name: str, values: dict[str, Any], **loop: Any) -> Path:
    shared = {
        "vae": str(world / "vae/model"),
        "base": str(world / "image/model"),
        "fstext": {"inner_dim": 8, "num_layers": 1, "num_heads": 2, "ff_mult": 1},
        "fstext_init_steps": 3,
        "sampling_steps": 2,
        "text": {"max_length": 8},
        "diffusion": {"text_dropout": 0.3},
    }
    config = write(world, name, **{**shared, **values})
    assert seer.main([*config, *words(world, name, **loop)]) == 0
    return world / name


def log(folder: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_vae_stores_the_scaling_factor_of_its_latents(world: Path) -> None:
    model = AutoencoderKL.from_pretrained(world / "vae" / "model")
    frames = torch.from_numpy(np.load(world / "data" / "frames.npy")[10:])
    flat = (frames.flatten(0, 1).float() / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = model.encode(flat).latent_dist
    deviation = float((posterior.mean + posterior.std * torch.randn_like(posterior.mean)).std())
    assert model.config.scaling_factor == pytest.approx(1 / deviation, rel=0.15)
    assert (world / "vae/validation/step_00000006/reconstruction.png").is_file()


def test_image_model_is_a_diffusers_folder(base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    assert unet.config.cross_attention_dim == 384
    validation = json.loads((base.parent / "validation.jsonl").read_text())
    assert validation["step"] == 6 and validation["loss"] > 0


def test_inflation_trains_temporal_layers_only_and_exports_a_pipeline(
    world: Path, base: Path
) -> None:
    folder = train_seer(world, "seer", {})
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    unet = SeerUNetModel.from_pretrained(folder / "model" / "unet")
    state = unet.state_dict()
    for name, value in stored.items():
        assert torch.equal(state[name], value.half().float()), name
    moved = [name for name in state if "temporal_attentions" in name and "proj_out" in name]
    assert moved and all(state[name].abs().sum() > 0 for name in moved)
    index = json.loads((folder / "model" / "model_index.json").read_text())
    assert index["text_model"] == "minilm" and index["num_frames"] == 4
    assert not (folder / "model" / "text_encoder").exists()
    metrics = json.loads((folder / "validation.jsonl").read_text())
    assert {"loss", "psnr", "psnr_copy"} <= set(metrics)
    assert (folder / "validation/step_00000006/clip_0.gif").is_file()


def test_the_other_inflation_trains_its_branches_and_exports(world: Path, base: Path) -> None:
    options = {"temporal": "swap", "temporal_kwargs": {"window": [None, 4, 4], "ff_mult": 1}}
    folder = train_seer(world, "swap", {"inflation": options})
    unet = SeerUNetModel.from_pretrained(folder / "model" / "unet")
    assert (
        unet.config.temporal == "swap" and unet.config.temporal_kwargs == options["temporal_kwargs"]
    )
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    state = unet.state_dict()
    for name, value in stored.items():
        assert torch.equal(state[name], value.half().float()), name
    moved = [name for name in state if ".temporal_attentions." in name and "proj_out" in name]
    assert any(".swaps." in name for name in moved) and any(".branches." in n for n in moved)
    assert all(state[name].abs().sum() > 0 for name in moved)


def test_exported_folder_predicts_with_the_pipeline(world: Path, base: Path) -> None:
    from stvision.pipelines.seer import SeerPipeline

    folder = world / "seer" / "model"
    pipe = SeerPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    frame = torch.rand(1, 16, 16, 3)
    out = pipe("move right", frames=frame, num_inference_steps=2, generator=0, output_type="pt")
    assert torch.isfinite(torch.as_tensor(out.frames[0])).all()


def test_loader_gives_another_order_of_the_same_and_resumes(world: Path, base: Path) -> None:
    """Without resident data the position of the loader is part of a checkpoint."""
    options = {"data": {"resident": False}, "fstext_init_steps": 0}
    whole = train_seer(world, "loader_whole", options, max_steps=7)
    parts = world / "loader_parts"
    train_seer(world, "loader_parts", options, max_steps=7, log_every=1)
    newest = max((parts / "checkpoints").glob("step_*"))
    assert newest.name == "step_00000007"
    # back to the checkpoint of step 6, in the middle of the second epoch
    shutil.rmtree(newest)
    (parts / "status.json").unlink()
    train_seer(world, "loader_parts", options, max_steps=7)
    assert log(parts) == log(whole)


def test_moments_are_drawn_anew_and_samples_are_not(world: Path, base: Path) -> None:
    drawn = train_seer(world, "sampled", {"data": {"latents": "sampled"}}, max_steps=2)
    assert len(log(drawn)) == 2
    caches = {folder.name.split("-")[0]: folder for folder in (world / "cache").iterdir()}
    names = [
        set(load_file(next(folder.glob("shard*.safetensors"))))
        for folder in (world / "cache").glob("latents-train-*")
    ]
    assert sorted(map(sorted, names)) == [["latents"], ["mean", "std"]] and "text" in caches


def test_adapters_merge_into_the_exported_weights(world: Path, base: Path) -> None:
    folder = train_seer(world, "lora", {"image_layers": "lora", "lora": {"rank": 2}})
    stored = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    state = SeerUNetModel.from_pretrained(folder / "model" / "unet").state_dict()
    changed = {n for n, v in stored.items() if not torch.equal(state[n], v.half().float())}
    assert changed and all(".attn" in name and "temporal" not in name for name in changed)
    assert any((folder / "model" / "unet_lora").glob("*.safetensors"))


def test_adapters_resume_exactly_whatever_else_lies_in_the_folder(world: Path, base: Path) -> None:
    options = {"image_layers": "lora", "lora": {"rank": 2}, "fstext_init_steps": 0}
    whole = train_seer(world, "lora_whole", options)
    parts = train_seer(world, "lora_parts", options)
    checkpoints = parts / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000006")
    (parts / "status.json").unlink()
    # what editors, copies and older tools leave behind
    (checkpoints / "step_99999999").mkdir()
    (checkpoints / "step_last").mkdir()
    (checkpoints / "step_00000003 (copy)").mkdir()
    (checkpoints / "checkpoint-7").mkdir()
    (checkpoints / "notes.txt").write_text("step_00000050")
    train_seer(world, "lora_parts", options)
    assert log(parts) == log(whole)
    final = [load_file(f / "model" / "unet" / WEIGHTS) for f in (whole, parts)]
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())


def test_channels_last_trains_the_same(world: Path, base: Path) -> None:
    """The layout of the weights changes what is fast, not what is computed."""
    plain = train_seer(world, "layout_plain", {})
    inner = train_seer(world, "layout_inner", {"loop": {"channels_last": True}})
    assert log(inner) == pytest.approx(log(plain), rel=1e-4)
    states = [load_file(next((f / "model" / "unet").glob("*.safetensors"))) for f in (plain, inner)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_captured_seer_steps_equal_plain_ones(world: Path, base: Path) -> None:
    """A CUDA graph of the real task, with text dropout, clipping and the layout of convolutions."""
    plain = train_seer(world, "gpu_plain", {})
    options = {"cuda_graphs": True, "channels_last": True}
    captured = train_seer(world, "gpu_captured", {"loop": options})
    assert log(captured) == pytest.approx(log(plain), rel=1e-2)


def test_from_scratch_trains_everything(world: Path) -> None:
    values = {"base": None, "image_layers": "trained", "unet": UNET}
    folder = train_seer(world, "scratch", values)
    weights = max((folder / "checkpoints").glob("step_*")) / "model.safetensors"
    trained = set(load_file(weights))
    unet = SeerUNetModel.from_pretrained(folder / "model" / "unet")
    assert {f"unet.{name}" for name, _ in unet.named_parameters()} <= trained


def test_uncached_training_encodes_on_the_way(world: Path, base: Path) -> None:
    options = {"data": {"resident": False}, "fstext_init_steps": 0}
    config = write(
        world,
        "uncached",
        vae=str(world / "vae/model"),
        base=str(base),
        fstext={"inner_dim": 8, "num_layers": 1, "num_heads": 2},
        sampling_steps=2,
        text={"max_length": 8},
        **options,
    )
    flags = words(world, "uncached", cache="off", max_steps=2)
    assert seer.main([*config, *flags]) == 0
    assert len(log(world / "uncached")) == 2


@pytest.mark.parametrize("kind", sorted(READERS))
def test_readers_named_in_configurations_exist(kind: str) -> None:
    module, name = READERS[kind].split(":")
    reader = getattr(importlib.import_module(module), name)
    assert {"split"} <= set(inspect.signature(reader).parameters)


def test_action_classifier_learns_its_classes(world: Path) -> None:
    config = write(world, "action", model={"widths": [8, 8], "depth": 1})
    flags = words(world, "action", cache="frames", max_steps=60, learning_rate=0.01, save_every=60)
    assert action.main([*config, *flags, "--max-shift", "0"]) == 0
    metrics = json.loads((world / "action" / "validation.jsonl").read_text())
    assert metrics["accuracy"] == 1.0
    from stvision.models.action import ActionClassifier

    model = ActionClassifier.from_pretrained(world / "action" / "model")
    assert list(model.config.class_names) == ["down", "right"]


def test_pre_initialisation_hands_on_the_sentence(world: Path, base: Path) -> None:
    folder = world / "seer" / "fstext_init"
    values = log(folder)
    assert values[-1] < values[0]
    assert FSTextDecomposer.from_pretrained(folder / "model").config.dim == 384


def test_command_lists_tasks_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train"]) == 0
    assert "accelerate launch -m stvision.train.TASK" in capsys.readouterr().out
    assert cli(["train", "seeer"]) == 2
    assert "did you mean 'seer'" in capsys.readouterr().err
    assert cli(["train", "vae", "--config", "nowhere.yaml"]) == 2
    assert "no configuration file 'nowhere.yaml'" in capsys.readouterr().err


def test_perceptual_loss_has_the_gradient_of_the_metric() -> None:
    if not distribution_installed("stlpips-pytorch"):
        pytest.skip("the distribution stlpips-pytorch, which carries the weights, is absent")
    device = torch.device("cpu")
    loss = vae.load_perceptual("stvision.eval.metrics:ShiftTolerantLPIPS", device)
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 32, 32)
    x.requires_grad_(True)
    value = loss(x, y).sum()
    (gradient,) = torch.autograd.grad(value, x)
    step = 0.05 / gradient.norm()
    moved = loss((x - step * gradient).detach(), y).sum()
    assert moved.item() < value.item()
    with pytest.raises(ValueError, match="cannot be made"):
        vae.load_perceptual("stvision.eval.metrics:Nothing", device)
