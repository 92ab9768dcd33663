"""Which text encoder a training reads: that of its base, a named one, or the packaged one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support_seer import tiny_stable_diffusion

from stvision.io import Clip, write_video
from stvision.pipelines.seer import SeerPipeline
from stvision.train import cache, seer
from stvision.train.encoders import TextConfig, TextEncoder, check_text, text_digest

IMAGE = {
    "sample_size": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("base") / "sd", IMAGE)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    lines = []
    for number in range(6):
        frames = torch.rand(4, 8, 8, 3).mul(255).byte()
        write_video(Clip.from_frames(frames, fps=4), root / f"{number}.mp4")
        split = "train" if number < 4 else "validation"
        lines.append(json.dumps({"path": f"{number}.mp4", "caption": "o p", "split": split}))
    (root / "index.jsonl").write_text("\n".join(lines))
    return root


def train(folder: Path, base: Path, clips: Path, *more: str) -> int:
    values = {
        "output_dir": folder / "out",
        "base": base,
        "vae": base,
        "data.root": clips,
        "data.cache_dir": folder / "cache",
        "data.num_frames": 4,
        "data.height": 8,
        "data.width": 8,
        "data.workers": 0,
        "data.validation_clips": 2,
        "loop.max_steps": 2,
        "loop.batch_size": 2,
        "sampling_steps": 2,
        "fstext_init_steps": 0,
    }
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    small = folder.parent / f"{folder.name}.yaml"
    small.write_text("fstext: {inner_dim: 8, num_layers: 1, num_heads: 2}")
    return seer.main(["--config", str(small), *words, "--loop.no-tensorboard", *more])


def test_a_base_brings_its_own_text_encoder(tmp_path: Path, base: Path, clips: Path) -> None:
    assert train(tmp_path, base, clips) == 0
    index = json.loads((tmp_path / "out/model/model_index.json").read_text())
    assert index["text_model"] is None and index["text_encoder"][1] == "CLIPTextModel"
    pipe = SeerPipeline.from_pretrained(tmp_path / "out/model")
    expected = TextEncoder(TextConfig(str(base)))(["o p"])
    torch.testing.assert_close(pipe.encode_prompt(["o p"]).float(), expected, atol=5e-3, rtol=0)


def test_another_width_is_said_before_anything_is_made(
    tmp_path: Path, base: Path, clips: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(tmp_path, base, clips, "--text.encoder", "minilm") == 2
    said = capsys.readouterr().err
    assert "width 16, but those of text.encoder 'minilm' have 384" in said
    assert f"give --text.encoder {base}" in said and len(said.strip().splitlines()) == 1
    assert train(tmp_path, base, clips, "--text.encoder", "weights/nowhere") == 2
    said = capsys.readouterr().err
    assert "weights/nowhere must hold" in said and f"give --text.encoder {base}" in said
    assert not list(tmp_path.iterdir())


def test_auto_is_the_packaged_encoder_beside_a_base_without_one(base: Path) -> None:
    assert TextConfig().chosen(str(base / "unet")).encoder == "minilm"
    assert TextConfig().chosen(None).encoder == "minilm"
    assert TextConfig().chosen(str(base)).encoder == str(base)
    assert TextConfig("minilm").chosen(str(base)).encoder == "minilm"


def test_the_cache_command_fills_what_a_training_reads(
    tmp_path: Path, base: Path, clips: Path, capsys: pytest.CaptureFixture
) -> None:
    """From the training's own configuration file, with the text encoder of its base."""
    values = {
        "output_dir": str(tmp_path / "out"),
        "base": str(base),
        "vae": str(base),
        "cond_frames": 1,
        "data": {
            "root": str(clips),
            "num_frames": 4,
            "height": 8,
            "width": 8,
            "workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    config = tmp_path / "training.yaml"
    config.write_text(json.dumps(values))  # JSON is YAML
    assert cache.main(["--config", str(config), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "train: 4 clips\nvalidation: 2 clips\n"
    made = sorted(item.name for item in (tmp_path / "cache").iterdir())
    assert {name.split("-")[0] for name in made} == {"latents", "text"}
    assert train(tmp_path, base, clips) == 0
    assert sorted(item.name for item in (tmp_path / "cache").iterdir()) == made
    assert cache.main(["--config", str(config), "--data.cache", "off", "--data.no-resident"]) == 2
    assert "nothing to compute" in capsys.readouterr().err


def test_states_of_another_encoder_are_kept_apart(tmp_path: Path, base: Path) -> None:
    weights = tmp_path / "clip.pt"
    found: set[Any] = {text_digest(TextConfig(str(base)))}
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        found.add(text_digest(TextConfig(f"open_clip:RN50/{weights}")))
    found.add(text_digest(TextConfig("open_clip:RN50/openai")))
    assert len(found) == 4


def test_an_absent_open_clip_is_said_early(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="open_clip_torch is not installed"):
        check_text(TextConfig("open_clip:RN50/openai"), 512, "the U-Net", None)
    with pytest.raises(ValueError, match="must be open_clip:MODEL/WEIGHTS"):
        check_text(TextConfig("open_clip:RN50"), 512, "the U-Net", None)
