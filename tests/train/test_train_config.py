import importlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from stvision.config import (
    CONFIGS,
    dump_config,
    find_config,
    from_mapping,
    load_config,
    parse_config,
)
from stvision.train import TASKS

#: configuration -> (task, class)
FILES = {
    "seer_default_vae": ("vae", "VAEConfig"),
    "seer_default_image": ("image", "ImageConfig"),
    "seer_default": ("seer", "SeerConfig"),
    "seer_default_scratch": ("seer", "SeerConfig"),
    "seer_default_swap": ("seer", "SeerConfig"),
    "seer_sd15_ssv2": ("seer", "SeerConfig"),
    "seer_sd15_bridge": ("seer", "SeerConfig"),
    "seer_sd15_epic": ("seer", "SeerConfig"),
    "action_default": ("action", "ActionConfig"),
    "classify_mechanism": ("classify", "ClassifyConfig"),
    "classify_metaworld": ("classify", "ClassifyConfig"),
    "classify_ucf101": ("classify", "ClassifyConfig"),
}


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    """The rate."""
    mode: Literal["a", "b"] = "a"
    """The mode."""


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    extra: dict[str, Any] = field(default_factory=dict)
    name: str | None = None


def load(name: str) -> Any:
    task, cls = FILES[name]
    return load_config(getattr(importlib.import_module(TASKS[task][0]), cls), name)


def test_set_reaches_every_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: {rate: 1e-4, mode: b}\nextra: {heads: [4, 5], width: 8}\n")
    words = ["--config", str(path), "--set", "extra.heads=[2, 3]", "--set=extra.deep.on=true"]
    changed = parse_config(Outer, [*words, "--set", "inner.rate=2", "--name", "x"])
    extra = {"heads": [2, 3], "width": 8, "deep": {"on": True}}
    assert changed == Outer(Inner(2.0, "b"), (1, 2), extra, "x")
    assert parse_config(Outer, ["--set", "sizes=[7]"]) == Outer(sizes=(7,))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("inner.rat=1", "unknown key 'inner.rat'; did you mean 'rate'"),
        ("inner.rate=fast", "with --set inner.rate=fast: inner.rate"),
        ("inner.rate", "--set takes KEY=VALUE"),
        ("=3", "--set takes KEY=VALUE"),
        ("extra.a=[1", "the value is not YAML"),
    ],
)
def test_wrong_settings_are_one_sentence(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_config(Outer, ["--set", setting])


def test_file_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: {rate: 1e-4}\nsizes: [3, 4, 5]\nextra: {heads: [4, 5]}\n")
    loaded = load_config(Outer, path)
    assert loaded == Outer(Inner(1e-4), (3, 4, 5), {"heads": [4, 5]})
    assert isinstance(loaded.inner.rate, float)
    changed = parse_config(Outer, ["--inner.mode", "b", "--config", str(path), "--name", "x"])
    assert changed == replace(loaded, inner=Inner(1e-4, "b"), name="x")


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    original = Outer(Inner(3e-7, "b"), (7,), {"deep": {"a": [1, 2.5, None]}}, "name: tricky")
    dump_config(original, tmp_path / "b.yaml")
    assert load_config(Outer, tmp_path / "b.yaml") == original


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inner: {rte: 1}", "unknown key 'inner.rte'; did you mean 'rate'"),
        ("zzz: 1", "unknown key 'zzz'; there are inner, sizes, extra, name"),
        ("inner: {rate: fast}", r"inner\.rate: .*got 'fast'"),
        ("inner: {mode: c}", r"inner\.mode: .*'a' or 'b'"),
        ("inner: 3", "inner must be a mapping"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_config(Outer, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_offers_the_nearest_name() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'seer_default"):
        find_config("seer_defualt.yaml")


def test_every_packaged_configuration_is_listed_here() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_packaged_configuration_loads_and_builds(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        if FILES[name][0] == "seer":
            from stvision.models.fstext import FSTextDecomposer
            from stvision.models.seer import SeerUNetModel

            fstext = FSTextDecomposer(**{"dim": 768 if "sd15" in name else 384, **config.fstext})
            assert config.text.max_length is not None
            assert config.text.max_length <= fstext.config.max_tokens
            unet = SeerUNetModel(**config.unet, **config.inflation)
            assert next(unet.temporal_parameters()).numel()
        elif FILES[name][0] == "image":
            from diffusers import UNet2DConditionModel

            assert UNet2DConditionModel(**config.unet).config.cross_attention_dim == 384
        elif FILES[name][0] == "action":
            from stvision.models.action import ActionClassifier

            ActionClassifier(class_names=("a", "b"), **config.model)
        elif FILES[name][0] == "classify":
            from stvision.models.classifier import build_network

            net = build_network(config.backbone, 3, config.data.num_frames, config.options)
            assert count(net) > 100_000
        else:
            assert default_vae_parameters() > 0


def default_vae_parameters() -> int:
    from diffusers import AutoencoderKL

    config = load("seer_default_vae")
    levels = len(config.block_out_channels)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            latent_channels=config.latent_channels,
        )
    return count(vae)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_model_fits_its_share_of_the_package() -> None:
    """All files in float16 within 18 MiB, with room for JSON; most of it used."""
    from diffusers import UNet2DConditionModel

    from stvision.models.fstext import FSTextDecomposer
    from stvision.models.seer import SeerUNetModel

    seer, image = load("seer_default"), load("seer_default_image")
    with torch.device("meta"):
        unet = SeerUNetModel.from_unet2d(UNet2DConditionModel(**image.unet), **seer.inflation)
        sizes = {"dim": 384, "max_frames": 12, "max_tokens": seer.text.max_length}
        fstext = FSTextDecomposer(**{**sizes, **seer.fstext})
    total = default_vae_parameters() + count(unet) + count(fstext)
    assert 8.8e6 < total <= 9.3e6
    temporal = sum(parameter.numel() for parameter in unet.temporal_parameters())
    assert temporal > 0.3 * count(unet)


def test_baseline_differs_from_the_default_in_its_start_only() -> None:
    ours, scratch, image = (
        load(name) for name in ("seer_default", "seer_default_scratch", "seer_default_image")
    )
    assert scratch.unet == image.unet
    assert ours == replace(
        scratch,
        output_dir=ours.output_dir,
        base=ours.base,
        image_layers="frozen",
        unet={},
        # as many seconds, which are fewer steps where everything is trained
        loop=replace(scratch.loop, max_steps=ours.loop.max_steps),
    )
    assert scratch.loop.max_steps < ours.loop.max_steps


def test_published_settings_of_the_large_configurations() -> None:
    for name, steps, frames, references in (
        ("ssv2", 200_000, 12, 2),
        ("bridge", 80_000, 16, 1),
        ("epic", 80_000, 16, 1),
    ):
        config = load(f"seer_sd15_{name}")
        assert (config.loop.max_steps, config.data.num_frames) == (steps, frames)
        assert config.cond_frames == references
        assert config.loop.learning_rate == pytest.approx(1.28e-5 * 2 * 1 * 4)
        assert (config.loop.max_grad_norm, config.clip_fstext) == (0.3, False)


def test_spacing_of_the_sampler_reaches_its_schedule() -> None:
    from stvision.train.diffusion import DiffusionConfig, Noising

    given = load("seer_default").diffusion
    scheduler = Noising(given, "cpu").scheduler
    scheduler.set_timesteps(20)
    assert int(scheduler.timesteps[0]) == 999
    with pytest.raises(ValueError, match="'trailing' does not go with schedule='authors'"):
        Noising(DiffusionConfig("authors", timestep_spacing="trailing"), "cpu")


def test_contradictory_settings_are_refused() -> None:
    from stvision.train.seer import SeerConfig

    with pytest.raises(ValueError, match="cond_frames must be between 1 and 11"):
        from_mapping(SeerConfig, {"cond_frames": 12})
    with pytest.raises(ValueError, match="without a base it must be 'trained'"):
        from_mapping(SeerConfig, {"base": None})
    with pytest.raises(ValueError, match="needs a cache"):
        from_mapping(SeerConfig, {"data": {"cache": "off"}})
