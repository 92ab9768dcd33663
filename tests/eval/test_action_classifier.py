"""The action classifier: order in time matters, items are independent, files are small."""

import pytest
import torch

from stvision.models.action import ActionClassifier, augment_clips


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 2 - 1


def tiny(**changes) -> ActionClassifier:
    torch.manual_seed(0)
    settings = {"class_names": ["open", "close", "push"], "widths": [8, 12], "depth": 1}
    model = ActionClassifier(**{**settings, **changes}).eval()
    # blocks start as their shortcuts; give their branches a voice
    for block in model.blocks:
        torch.nn.init.ones_(block.norm2.weight)
    return model


def moving_square(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of a square that goes right (class 0) or left (class 1): one frame tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    frames = torch.full((count, 3, 6, 16, 16), -1.0)
    for i, label in enumerate(labels.tolist()):
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        for t in range(6):
            column = left + (t if label == 0 else 5 - t)
            frames[i, :, t, top : top + 4, column : column + 3] = 1
    return frames, labels


@pytest.mark.parametrize("shape", [(2, 3, 5, 17, 23), (1, 3, 1, 8, 8)], ids=["odd", "one-frame"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temporal_convolution_is_a_3d_convolution(shape, dtype):
    block = tiny().to(dtype).blocks[0]
    x = torch.randn(shape[0] * shape[2], 8, *shape[3:], dtype=dtype)
    weight = block.time.conv.weight.unsqueeze(-1)  # [out, in, 3, 1] -> [out, in, 3, 1, 1]
    volume = x.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    expected = torch.nn.functional.conv3d(volume, weight, padding=(1, 0, 0))
    actual = block.time(x.contiguous(memory_format=torch.channels_last), shape[2])
    actual = actual.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_logits_are_the_head_on_the_features():
    model = tiny()
    frames = clips(2, 3, 5, 17, 23)
    features = model.features(frames)
    assert features.shape == (2, model.feature_dim)
    torch.testing.assert_close(model(frames), model.head(features))
    best = model(frames).argmax(-1).tolist()
    assert model.classify(frames) == [model.class_names[i] for i in best]


def test_an_item_does_not_depend_on_its_batch():
    model = tiny()
    frames = clips(3, 3, 4, 16, 16)
    torch.testing.assert_close(model(frames)[1:2], model(frames[1:2]), rtol=1e-4, atol=1e-5)


def test_learns_a_direction_that_no_single_frame_shows():
    torch.manual_seed(0)
    model = ActionClassifier(["right", "left"], widths=[12, 16], depth=1, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    frames, labels = moving_square(192, seed=1)
    for step in range(60):
        index = torch.arange(32) + 32 * (step % 6)
        loss = torch.nn.functional.cross_entropy(model(frames[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    frames, labels = moving_square(64, seed=2)
    assert (model(frames).argmax(-1) == labels).float().mean() >= 0.95
    # played backwards, the answers turn round
    assert (model(frames.flip(2)).argmax(-1) == labels).float().mean() <= 0.05


def test_default_size_fits_two_mebibytes_in_half_precision(tmp_path):
    torch.manual_seed(0)
    names = [f"task {i}" for i in range(24)]
    model = ActionClassifier(class_names=names).eval()
    frames = clips(1, 3, 3, 32, 32)
    expected = model(frames)
    model.half().save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 2**20
    again = ActionClassifier.from_pretrained(tmp_path, local_files_only=True).float().eval()
    assert again.class_names == tuple(names)
    torch.testing.assert_close(again(frames), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: ActionClassifier(["a"]), ValueError, "two different", id="one-class"),
        pytest.param(lambda: ActionClassifier(["a", "a"]), ValueError, "two different", id="same"),
        pytest.param(
            lambda: tiny()(torch.zeros(1, 5, 3, 8, 8)), ValueError, r"\(B, 3, T, H, W\)", id="axes"
        ),
        pytest.param(
            lambda: tiny()(torch.zeros(1, 3, 5, 8, 8).byte()), TypeError, "uint8", id="dtype"
        ),
        pytest.param(
            lambda: augment_clips(torch.zeros(3, 5, 8, 8)), ValueError, "frames must be", id="4d"
        ),
        pytest.param(
            lambda: augment_clips(torch.zeros(1, 3, 5, 8, 8), jitter=1.5),
            ValueError,
            "jitter",
            id="jitter",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_augmentation_without_strength_changes_nothing():
    frames = clips(3, 3, 4, 9, 11)
    same = augment_clips(frames, max_shift=0, jitter=0.0, degrade=0.0)
    torch.testing.assert_close(same, frames)


def test_augmentation_shifts_all_frames_of_a_clip_alike():
    frames = clips(6, 1, 4, 9, 11).expand(-1, 3, -1, -1, -1)
    generator = torch.Generator().manual_seed(3)
    shifted = augment_clips(frames, max_shift=2, jitter=0.0, degrade=0.0, generator=generator)
    offsets = set()
    for before, after in zip(frames, shifted, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2), mode="replicate")
        found = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.allclose(padded[..., dy : dy + 9, dx : dx + 11], after, atol=1e-6)
        ]
        assert len(found) == 1
        offsets.update(found)
    assert len(offsets) > 1


def test_augmentation_repeats_with_its_generator_and_stays_in_range():
    frames = clips(4, 3, 4, 9, 11)
    one, two = (augment_clips(frames, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, frames)
    assert one.abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_augments_and_classifies(dtype):
    model = tiny()
    frames = augment_clips(clips(4, 3, 5, 20, 24)).cuda()
    expected = model(frames.cpu())
    tolerance = 5e-3 if dtype == torch.float32 else 0.1
    actual = model.to("cuda", dtype)(frames.to(dtype)).float().cpu()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    generator = torch.Generator("cuda").manual_seed(0)
    changed = augment_clips(frames.to(dtype), generator=generator)
    assert changed.isfinite().all() and changed.dtype == dtype and changed.device == frames.device


def test_compiles_without_a_graph_break():
    model = tiny()
    frames = clips(2, 3, 4, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(frames), model(frames))
