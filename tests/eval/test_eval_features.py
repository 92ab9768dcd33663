"""Feature extractors: what they feed their network, and the names of the distances."""

import pytest
import torch

from stvision.eval.features import (
    ClassifierFeatures,
    FeatureExtractor,
    I3DFeatures,
    VideoMAEFeatures,
    distance_name,
    fit_clips,
)
from stvision.models.action import ActionClassifier


class Published(torch.nn.Module):
    """The arguments of the I3D file that is passed around for FVD."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        return x.mean(dim=(2, 3, 4))


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 224
        return x.mean(dim=(2, 3, 4), keepdim=True)


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_i3d_with_the_published_arguments_gets_8_bit_values(tmp_path):
    torch.jit.script(Published()).save(str(tmp_path / "i3d.pt"))
    extractor = I3DFeatures(tmp_path / "i3d.pt")
    x = clips(2, 3, 4, 16, 20)
    torch.testing.assert_close(extractor(x), x.mean(dim=(2, 3, 4)) * 255)
    assert isinstance(extractor, FeatureExtractor)
    name = distance_name(extractor, 12, 64, 64)
    assert name == "FVD (I3D i3d.pt, 12 frames, 64x64 resized to 224x224 bilinear)"


def test_i3d_without_them_gets_resized_values_around_zero(tmp_path):
    torch.jit.script(Plain()).save(str(tmp_path / "other.pt"))
    flat = torch.full((1, 3, 2, 16, 16), 0.75)
    torch.testing.assert_close(I3DFeatures(tmp_path / "other.pt")(flat), torch.full((1, 3), 0.5))


def test_i3d_files_that_are_not_there_or_not_networks(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TorchScript file of I3D at .*none.pt"):
        I3DFeatures(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ValueError, match="text.pt is not a TorchScript file"):
        I3DFeatures(tmp_path / "text.pt")


def test_videomae_from_a_folder(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    VideoMAEModel(config).save_pretrained(tmp_path / "mae-tiny")
    extractor = VideoMAEFeatures(str(tmp_path / "mae-tiny"), local_files_only=True)
    x = clips(2, 3, 4, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((x.permute(0, 2, 3, 4, 1) - mean) / std).permute(0, 1, 4, 2, 3)
    expected = extractor.network(pixel_values=pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(extractor(x), expected)
    # another length and size is brought to the network's, and the name says so
    assert extractor(clips(1, 3, 7, 20, 12)).shape == (1, 16)
    name = distance_name(extractor, 7, 20, 12)
    assert name == (
        "Fréchet distance (VideoMAE mae-tiny, 7 frames resampled to 4, "
        "20x12 resized to 16x16 bilinear)"
    )
    assert "FVD" not in name


def test_own_classifier_never_goes_as_fvd():
    torch.manual_seed(0)
    model = ActionClassifier(["a", "b"], widths=[8], depth=1).eval()
    extractor = ClassifierFeatures(model, "ours")
    x = clips(2, 3, 4, 9, 11)
    torch.testing.assert_close(extractor(x), model.features(x * 2 - 1))
    name = distance_name(extractor, 12, 64, 64)
    assert name == "Fréchet distance (ours, 12 frames, 64x64 not resized)"


def test_fitting_keeps_first_and_last_frame():
    x = clips(1, 3, 7, 8, 8)
    fitted = fit_clips(x, 4, (8, 8))
    assert torch.equal(fitted, x[:, :, [0, 2, 4, 6]])
    assert torch.equal(fit_clips(x, 9, None)[:, :, [0, -1]], x[:, :, [0, -1]])
    assert torch.equal(fit_clips(x, None, None), x)
    with pytest.raises(ValueError, match="floating point"):
        fit_clips((x * 255).byte(), None, None)
