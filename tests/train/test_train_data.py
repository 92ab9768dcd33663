"""What training reads: shared caches, mixed shapes, clips that cannot be read."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stvision.datasets.clips import ClipFolder
from stvision.datasets.records import Record
from stvision.io import Clip, save_clip
from stvision.train import cache, seer, sources
from stvision.train.data import DataConfig
from stvision.train.encoders import TextConfig
from stvision.train.loop import make_accelerator
from stvision.train.options import LoopConfig

#: name -> (frames, height, width)
CLIPS = {f"wide{n}": (9, 16, 32) for n in range(5)} | {f"tall{n}": (6, 32, 16) for n in range(3)}
UNET = {
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 384,
    "attention_head_dim": 2,
}
BUCKETS = ((8, 16, 32), (5, 24, 16))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two shapes, one too short, one broken, one for validation; and a VAE."""
    root = tmp_path_factory.mktemp("mixed")
    lines = []
    torch.manual_seed(0)
    for name, (frames, height, width) in {
        **CLIPS,
        "short": (3, 16, 32),
        "held": (9, 16, 32),
    }.items():
        pixels = torch.randint(0, 255, (frames, height, width, 3), dtype=torch.uint8)
        save_clip(Clip.from_frames(pixels, fps=8.0), root / f"{name}.mp4")
        split = "validation" if name == "held" else "train"
        lines.append({"path": f"{name}.mp4", "caption": f"move {name[:4]}", "split": split})
    (root / "torn.mp4").write_bytes(b"no video")
    lines.append({"path": "torn.mp4", "caption": "move it", "split": "train"})
    (root / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    vae.save_pretrained(root / "vae")
    return root


def data_config(world: Path, **values: Any) -> DataConfig:
    defaults = {
        "root": str(world),
        "num_frames": 8,
        "height": 16,
        "width": 32,
        "cache_dir": str(world / "cache"),
        "workers": 0,
        "validation_clips": 1,
    }
    return DataConfig(**{**defaults, **values})


def prepared(data: DataConfig, world: Path, batch_size: int = 2, vae: bool = True) -> Any:
    loop = LoopConfig(batch_size=batch_size, mixed_precision="no")
    return sources.prepare(
        data,
        loop,
        make_accelerator(loop),
        seed=3,
        text=TextConfig(max_length=6),
        vae=str(world / "vae") if vae else None,
    )


def take(source: Any, count: int) -> list[dict[str, Tensor]]:
    return [source.batch(step, 0, torch.Generator()) for step in range(count)]


def test_frames_that_are_kept_are_not_decoded_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = str(world / "vae")
    apart = data_config(world, cache_dir=str(tmp_path / "a"), num_frames=5)
    shared = data_config(world, cache_dir=str(tmp_path / "b"), num_frames=5)
    expected = cache.cached_latents(apart, "train", vae, "cpu")
    frames = cache.cached_frames(shared, "train")
    keys = [entry["key"] for entry in frames.entries]
    assert "torn.mp4" not in keys and "short.mp4" not in keys and len(keys) == len(CLIPS)

    def decode(*_: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr(ClipFolder, "_decode", decode)
    found = cache.cached_latents(shared, "train", vae, "cpu")
    assert found.entries == expected.entries
    for name, value in expected.load().items():
        assert torch.equal(found.load()[name], value)
    assert not list((tmp_path / "a").glob("frames-*"))


def test_text_encoder_is_loaded_only_to_compute(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_config(world, cache="frames")
    first = prepared(data, world, vae=False)

    def load(*_: Any) -> Any:
        raise AssertionError("loaded again")

    monkeypatch.setattr(sources, "TextEncoder", load)
    again = prepared(data, world, vae=False)
    one, two = (take(item.source, 1)[0] for item in (first, again))
    assert torch.equal(one["text"], two["text"]) and torch.equal(one["frames"], two["frames"])


@pytest.mark.parametrize("kept", ["off", "latents", "frames"])
def test_every_batch_has_the_shape_of_a_bucket(
    world: Path, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_config(world, cache=kept, resident=False, buckets=BUCKETS, leftover="keep")
    with caplog.at_level(logging.WARNING):
        found = prepared(data, world, vae=kept != "frames")
    assert any(
        "buckets: 8 clips, 2 left out" in line and "1 too short" in line and "1 unreadable" in line
        for line in caplog.messages
    )
    batches = take(found.source, 10)  # two epochs of 3 + 2 batches
    if kept == "frames":
        shapes = [tuple(batch["frames"].shape[1:4]) for batch in batches]
        expected = set(BUCKETS)
    else:
        shapes = [tuple(batch["mean"].shape[2:]) for batch in batches]
        expected = {(frames, height // 2, width // 2) for frames, height, width in BUCKETS}
    assert set(shapes[:5]) == set(shapes[5:]) == expected
    first, second = sorted(expected)
    assert [shapes[:5].count(first), shapes[:5].count(second)] == [2, 3]
    sizes = [len(batch["text"]) for batch in batches[:5]]
    assert sorted(sizes) == [1, 1, 2, 2, 2]


def test_mixed_shapes_train_and_resume_exactly(world: Path, tmp_path: Path) -> None:
    values = {
        "base": None,
        "image_layers": "trained",
        "unet": UNET,
        "fstext": {"inner_dim": 8, "num_layers": 1, "num_heads": 2},
        "fstext_init_steps": 2,
        "sampling_steps": 2,
        "text": {"max_length": 6},
        "vae": str(world / "vae"),
        "data": {
            "root": str(world),
            "num_frames": 8,
            "height": 16,
            "width": 32,
            "cache": "off",
            "cache_dir": str(tmp_path / "cache"),
            "resident": False,
            "workers": 0,
            "validation_clips": 1,
            "buckets": BUCKETS,
            "leftover": "pad",
        },
        "loop": {
            "max_steps": 7,
            "batch_size": 2,
            "log_every": 1,
            "save_every": 3,
            "tensorboard": False,
        },
    }
    logs = []
    for name, stops in (("whole", [7]), ("parts", [4, 7])):
        folder = tmp_path / name
        (tmp_path / "c.json").write_text(json.dumps({**values, "output_dir": str(folder)}))
        for stop in stops:
            words = ["--config", str(tmp_path / "c.json"), "--loop.max-steps", str(stop)]
            assert seer.main([*words, "--loop.schedule", "constant"]) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert len(logs[0]) == 7 and logs[0] == logs[1]
    config = json.loads((tmp_path / "whole/model/fstext/config.json").read_text())
    assert config["max_frames"] == 8


def test_sizes_and_options_that_do_not_suit_are_refused_early(world: Path) -> None:
    with pytest.raises(ValueError, match="16 x 21 pixels .* take 16 x 20 or 16 x 22"):
        prepared(data_config(world, width=21), world)
    with pytest.raises(ValueError, match="set resident to false"):
        DataConfig(buckets=BUCKETS)
    with pytest.raises(ValueError, match="packed clips have one shape"):
        DataConfig(kind="packed", resident=False, buckets=BUCKETS)
    with pytest.raises(ValueError, match="buckets must differ"):
        DataConfig(resident=False, buckets=(BUCKETS[0], BUCKETS[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_clips_are_counted_once_in_one_line(
    world: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    data = data_config(world, cache="off", num_frames=5, resident=False, workers=workers)
    source = prepared(data, world, vae=False).source
    batches = take(source, 15)  # three epochs of ten clips
    assert all(len(batch["frames"]) == 2 for batch in batches)
    with caplog.at_level(logging.WARNING):
        source.report()
    lines = [line for line in caplog.messages if "left out" in line]
    assert len(lines) == 1, lines
    assert "8 clips, 2 left out" in lines[0]
    assert "1 too short (first: short.mp4)" in lines[0]
    assert "1 broken (first: torn.mp4)" in lines[0]


def test_workers_copied_out_of_a_busy_process_decode_all(world: Path) -> None:
    """The parent has a pool of threads, holds a decoder open and logs while it is copied."""
    from stvision.io import open_video

    reader = ClipFolder(world, split="train", num_frames=4, size=16)
    expected = list(reader.iter_items(0, indices=range(len(reader))))
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            logging.getLogger("busy").debug("still here")

    threads = [threading.Thread(target=busy) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(512, 512).matmul(torch.randn(512, 512)).exp().sum()  # starts the pool
    for thread in threads:
        thread.start()
    try:
        with open_video(world / "wide0.mp4") as video:
            video.get([0])
            for _ in range(3):
                found = list(reader.iter_items(2, indices=range(len(reader)), timeout=20))
                assert len(found) == len(expected)
                for one, two in zip(found, expected, strict=True):
                    assert type(one) is type(two)
                    if isinstance(one, Record) and isinstance(two, Record):
                        assert torch.equal(one.frames, two.frames) and one.key == two.key
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)


def test_an_empty_validation_split_is_named() -> None:
    from stvision.train.sources import _check_validation

    config = DataConfig(
        root="clips", split="train", validation_split="held", cache="off", resident=False
    )
    with pytest.raises(
        ValueError, match="no clips of split 'held' in clips.*validation-split train"
    ):
        _check_validation(0, config)
    _check_validation(1, config)
