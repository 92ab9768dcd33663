"""ConvS5 networks: the authors' keys against a written-out computation, generation, loss, learning."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.datasets.moving_mnist import bounce
from stvision.layers.conv_s5 import ConvS5
from stvision.models.backbones import create_backbone
from stvision.models.convs5 import (
    ConvS5Backbone,
    ConvS5Predictor,
    convert_convs5_flax,
    frame_loss,
    read_flax_npz,
)

SMALL = {"in_chans": 2, "widths": (4, 6), "dim": 8, "state_dim": 10, "depth": 2, "groups": 2}


def predictor(dtype: torch.dtype = torch.float64, **options: object) -> ConvS5Predictor:
    torch.manual_seed(0)
    return ConvS5Predictor(**(SMALL | options)).to(dtype).eval()


def clip(frames: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.rand(2, 2, frames, 6, 8, generator=g, dtype=torch.float64) * 2 - 1).to(dtype)


def flax_layer(draw, at: str, readout: str) -> dict[str, np.ndarray]:
    """A layer of 8 channels and 5 complex states in the authors' keys."""
    seq = f"{at}/seq"
    arrays = {
        f"{at}/norm/scale": draw(8),
        f"{at}/norm/bias": draw(8),
        f"{seq}/Lambda_re": -np.abs(draw(5)),
        f"{seq}/Lambda_im": draw(5) * 4,
        f"{seq}/log_step": draw(5, 1) - 2,
        f"{seq}/B": draw(5, 8 * 9, 2),
        f"{seq}/C": draw(3, 3, 5, 8, 2),
    }
    out = f"{seq}/C_D_conv"
    convs = {"resnet": 2, "standard": 1, "half_glu": 0}[readout]
    for i in range(convs):
        arrays |= {f"{out}/GroupNorm_{i}/scale": draw(8), f"{out}/GroupNorm_{i}/bias": draw(8)}
        arrays |= {f"{out}/Conv_{i}/kernel": draw(3, 3, 8, 8), f"{out}/Conv_{i}/bias": draw(8)}
    if readout == "half_glu":
        arrays |= {f"{out}/norm/scale": draw(8), f"{out}/norm/bias": draw(8)}
        arrays |= {f"{out}/Dense_0/kernel": draw(8, 8), f"{out}/Dense_0/bias": draw(8)}
    return arrays


def flax_weights(readout: str = "resnet") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) * 0.3

    def block(at: str, a: int, b: int) -> dict[str, np.ndarray]:
        arrays = {}
        for i, (c, d) in enumerate(((a, b), (b, b))):
            arrays |= {f"{at}/GroupNorm_{i}/scale": draw(c), f"{at}/GroupNorm_{i}/bias": draw(c)}
            arrays[f"{at}/Conv_{i}/kernel"] = draw(3, 3, c, d)
        arrays |= {f"{at}/Conv_0/bias": draw(b), f"{at}/AddBias_0/bias": draw(b)}
        return arrays | ({f"{at}/skip/kernel": draw(1, 1, a, b)} if a != b else {})

    arrays = {
        "action_embeds/embedding": draw(4, 3),
        "action_conv/Conv_0/kernel": draw(1, 1, 6 + 3, 8),
        "action_conv/Conv_0/bias": draw(8),
        "encoder/Conv_0/kernel": draw(3, 3, 2, 4),
        "encoder/Conv_0/bias": draw(4),
        "decoder/Conv_0/kernel": draw(3, 3, 8, 4),
        "decoder/Conv_0/bias": draw(4),
        "decoder/LayerNorm_0/scale": draw(4),
        "decoder/LayerNorm_0/bias": draw(4),
        "decoder/Dense_0/kernel": draw(4, 2),
        "decoder/Dense_0/bias": draw(2),
    }
    arrays |= block("encoder/ResNetBlock_0", 4, 4) | block("encoder/ResNetBlock_1", 4, 6)
    arrays |= block("decoder/ResNetBlock_0", 4, 6) | block("decoder/ResNetBlock_1", 6, 4)
    for i in range(2):
        arrays |= flax_layer(draw, f"sequence_model/layers_{i}", readout)
    return {f"params/{key}": value for key, value in arrays.items()}


class WrittenOut:
    """The authors' model on channels-last frames, frame by frame, from its equations."""

    def __init__(self, arrays: dict[str, np.ndarray], readout: str = "resnet") -> None:
        self.w = {k.removeprefix("params/"): torch.from_numpy(v) for k, v in arrays.items()}
        self.readout = readout

    def norm(self, x: Tensor, at: str, groups: int = 0) -> Tensor:
        dims = -1
        shape = x.shape
        if groups:
            x, dims = x.reshape(*shape[:-1], groups, -1), (1, 2, 4)
        mean = x.mean(dims, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + 1e-6).sqrt()
        return x.reshape(shape) * self.w[at + "/scale"] + self.w[at + "/bias"]

    def correlate(self, x: Tensor, kernel: Tensor) -> Tensor:
        """SAME cross-correlation, a sum over shifts."""
        k = kernel.shape[0] // 2
        padded = torch.zeros(
            x.shape[0], x.shape[1] + 2 * k, x.shape[2] + 2 * k, x.shape[3], dtype=x.dtype
        )
        padded[:, k : k + x.shape[1], k : k + x.shape[2]] = x
        out = torch.zeros((), dtype=torch.promote_types(x.dtype, kernel.dtype))
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                piece = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
                out = out + piece.to(out.dtype) @ kernel[i, j].to(out.dtype)
        return out

    def conv(self, x: Tensor, at: str) -> Tensor:
        y = self.correlate(x, self.w[at + "/kernel"])
        return y + self.w[at + "/bias"] if at + "/bias" in self.w else y

    def block(self, x: Tensor, at: str) -> Tensor:
        y = self.conv(F.elu(self.norm(x, at + "/GroupNorm_0", 2)), at + "/Conv_0")
        y = self.conv(F.elu(self.norm(y, at + "/GroupNorm_1", 2)), at + "/Conv_1")
        y = y + self.w[at + "/AddBias_0/bias"]
        return (self.conv(x, at + "/skip") if at + "/skip/kernel" in self.w else x) + 0.1 * y

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def layer(self, u: Tensor, i: int) -> Tensor:
        at = f"sequence_model/layers_{i}"
        seq, out = at + "/seq", at + "/seq/C_D_conv"
        rate = torch.complex(
            self.w[seq + "/Lambda_re"].clamp(max=-1e-4), self.w[seq + "/Lambda_im"]
        )
        step = self.w[seq + "/log_step"][:, 0].exp()
        a = torch.exp(rate * step)
        b = torch.view_as_complex(self.w[seq + "/B"]) * ((a - 1) / rate)[:, None]
        kernel = torch.zeros(3, 3, 8, 5, dtype=b.dtype)
        for channel in range(8):
            for y in range(3):
                for x in range(3):
                    kernel[y, x, channel] = b[:, channel * 9 + y * 3 + x]
        c = torch.view_as_complex(self.w[seq + "/C"])
        state, frames = torch.zeros((), dtype=b.dtype), []
        for t in range(u.shape[1]):
            state = a * state + self.correlate(u[:, t], kernel)
            y = 2 * self.correlate(state, c).real
            if self.readout == "resnet":
                z = self.conv(self.gelu(self.norm(y, out + "/GroupNorm_0", 2)), out + "/Conv_0")
                z = self.conv(self.gelu(self.norm(z, out + "/GroupNorm_1", 2)), out + "/Conv_1")
                y = self.gelu(y + z)
            elif self.readout == "standard":
                y = y + self.conv(u[:, t], out + "/Conv_0")
                y = self.gelu(self.norm(y, out + "/GroupNorm_0", 2))
            else:
                y = self.gelu(self.norm(y, out + "/norm"))
                gate = y @ self.w[out + "/Dense_0/kernel"] + self.w[out + "/Dense_0/bias"]
                y = y * torch.sigmoid(gate)
            frames.append(self.norm(u[:, t] + y, at + "/norm"))
        return torch.stack(frames, 1)

    def __call__(self, video: Tensor, actions: Tensor) -> Tensor:
        """(B, T, H, W, C) and (B, T) to predictions of frames 2 to T."""
        inputs = []
        for t in range(video.shape[1] - 1):
            x = self.block(self.conv(video[:, t], "encoder/Conv_0"), "encoder/ResNetBlock_0")
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
            x = self.block(x, "encoder/ResNetBlock_1")
            action = self.w["action_embeds/embedding"][actions[:, t + 1]][:, None, None]
            x = torch.cat([x, action.expand(*x.shape[:-1], -1)], -1)
            inputs.append(self.conv(x, "action_conv/Conv_0"))
        h = self.layer(self.layer(torch.stack(inputs, 1), 0), 1)
        out = []
        for t in range(h.shape[1]):
            x = self.block(self.conv(h[:, t], "decoder/Conv_0"), "decoder/ResNetBlock_0")
            x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            x = self.norm(self.block(x, "decoder/ResNetBlock_1"), "decoder/LayerNorm_0")
            x = x @ self.w["decoder/Dense_0/kernel"] + self.w["decoder/Dense_0/bias"]
            out.append(x.tanh())
        return torch.stack(out, 1)


@pytest.mark.parametrize("readout", ["resnet", "standard", "half_glu"])
def test_flax_parameters_give_the_written_out_frames(readout: str, tmp_path: Path) -> None:
    arrays = flax_weights(readout)
    np.savez(tmp_path / "model.npz", **arrays)
    model = predictor(actions=3, action_dim=3, readout=readout)
    model.load_state_dict(read_flax_npz(tmp_path / "model.npz"))
    actions = torch.tensor([[0, 3, 1, 2, 0], [2, 2, 0, 1, 3]])
    wanted = WrittenOut(arrays, readout)(clip().permute(0, 2, 3, 4, 1), actions)
    wanted = wanted.permute(0, 4, 1, 2, 3)
    assert (model(clip(), actions) - wanted).abs().max() < 1e-11
    assert (model.float()(clip().float(), actions) - wanted).abs().max() < 1e-5


def test_sequence_layers_alone_are_converted() -> None:
    arrays = {k: v for k, v in flax_weights().items() if "sequence_model" in k}
    state = convert_convs5_flax({k.split("sequence_model/")[1]: v for k, v in arrays.items()})
    model = predictor(actions=3, action_dim=3)
    assert set(state) == {k for k in model.state_dict() if k.startswith("layers.")}
    with pytest.raises(ValueError, match="hold no layers_0/seq/B"):
        convert_convs5_flax({"a": np.zeros(3)})
    arrays["params/sequence_model/layers_0/seq/B"] = np.zeros((5, 8 * 25, 2))
    with pytest.raises(ValueError, match="of one size, got 5 and 3 rows"):
        convert_convs5_flax(arrays)


def test_size_of_the_published_sequence_model() -> None:
    with torch.device("meta"):
        model = ConvS5Predictor()
    count = sum(p.numel() for p in model.layers.parameters())
    assert count == pytest.approx(18.9e6, rel=0.005)


@pytest.mark.parametrize("frames", [1, 4])
def test_generation_equals_predicting_its_own_clip(frames: int) -> None:
    model = predictor(actions=3)
    actions = torch.randint(4, (2, 5 + frames))
    made = model.generate(clip(), frames, actions)
    whole = torch.cat([clip(), made], 2)
    assert (model(whole, actions)[:, :, 4:] - made).abs().max() < 1e-12


def test_streaming_equals_parallel() -> None:
    model, x = predictor(), clip(6)
    first, states = model.stream(x[:, :, :2])
    second, states = model.stream(x[:, :, 2:3], states=states)
    third, _ = model.stream(x[:, :, 3:], states=states)
    whole, _ = model.stream(x)
    assert (torch.cat([first, second, third], 2) - whole).abs().max() < 1e-12


def test_loss_sums_rows_and_averages_the_rest() -> None:
    a, b = clip(), clip().flip(0)
    d = (a - b).permute(0, 2, 3, 4, 1)  # (B, T, H, W, C)
    wanted = 0.3 * d.square().sum((-2, -1)).mean() + 0.7 * d.abs().sum((-2, -1)).mean()
    assert (frame_loss(a, b, 0.3) - wanted).abs() < 1e-13
    assert frame_loss(a, a) == 0


def test_predictor_compiles_and_runs_in_half_precision() -> None:
    model = predictor()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(clip()) - model(clip())).abs().max() < 1e-12
    model = predictor(torch.float32)
    wanted = model(clip(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(clip(dtype=torch.float32))
        mixed.float().sum().backward()
    half = model.bfloat16()(clip(dtype=torch.bfloat16))
    for got in (mixed, half):
        error = (got.float() - wanted).square().mean() / wanted.square().mean()
        assert error.sqrt() < 0.05


def test_gradient_of_the_predictor() -> None:
    model, x = predictor(depth=1), clip(4).requires_grad_()
    leaves = [x, *model.parameters()]
    directions = [torch.randn_like(leaf) * 0.1 for leaf in leaves]
    grads = torch.autograd.grad(frame_loss(model(x), clip(3), 1.0), leaves)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=step)
            ends.append(frame_loss(model(x), clip(3), 1.0))
    assert abs((ends[0] - ends[1]) / 2e-6 - slope) < 1e-5 * max(1.0, abs(slope))


def backbone(frames: int | None = 3) -> ConvS5Backbone:
    torch.manual_seed(0)
    sizes = {"widths": (4, 6), "dim": 8, "depth": 2, "groups": 2, "num_classes": 5}
    return ConvS5Backbone(**sizes, frames=frames).double().eval()


def test_backbone_surface() -> None:
    model, x = backbone(), torch.randn(2, 3, 3, 7, 9, dtype=torch.float64)
    last, (feature,) = model.forward_intermediates(x)
    assert torch.equal(last.movedim(-1, 1), feature) and feature.shape == (2, 8, 3, 4, 5)
    assert torch.equal(model.forward_head(last), model(x))
    changed = x.clone()
    changed[:, :, 2] += 1
    assert (model.forward_features(changed)[:, :2] - last[:, :2]).abs().max() < 1e-12
    image = backbone(frames=None)
    assert (image(x[:, :, 0]) - model(x[:, :, :1])).abs().max() < 1e-13
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))
    assert "stages.0.blocks.1.ssm.log_step" in model.no_weight_decay()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(x) - model(x)).abs().max() < 1e-12


def test_backbone_loads_its_weights(tmp_path: Path) -> None:
    sizes = {"widths": (4, 6), "dim": 8, "depth": 2, "groups": 2}
    torch.save(backbone().float().state_dict(), tmp_path / "a.pth")
    model = create_backbone("convs5_base", tmp_path / "a.pth", num_classes=3, frames=3, **sizes)
    assert torch.equal(
        model.stages[0].blocks[1].ssm.B, backbone().float().stages[0].blocks[1].ssm.B
    )
    assert isinstance(model.stages[0].blocks[0], ConvS5) and model.head.fc.out_features == 3


def test_bad_input() -> None:
    model = predictor()
    calls = [
        (lambda: model(clip()[:, :1]), r"x must be \(B, 2, T, H, W\)"),
        (lambda: model(clip(1)), "at least 2 frames to predict one, got 1"),
        (lambda: model(clip()[..., :7]), "must be multiples of 2, got 6 x 7"),
        (lambda: model(clip(), torch.zeros(2, 4)), r"actions must be \(2, 5\), got \(2, 4\)"),
        (lambda: model.generate(clip(), 0), "frames must be at least 1, got 0"),
        (lambda: model.generate(clip(), 2, torch.zeros(2, 6)), r"actions must be \(2, 7\)"),
        (lambda: model.stream(clip(), states=[]), "states must be 2 tensors, got 0"),
        (lambda: frame_loss(clip(), clip(4)), "predicted and target must both be"),
        (lambda: frame_loss(clip(), clip(), 2.0), "weight must be 0 to 1, got 2.0"),
        (lambda: predictor(widths=(4, 5)), "groups must divide 4 and 5 channels, got 2"),
        (lambda: predictor(depth=0), "must be at least 1 and widths not empty"),
        (lambda: ConvS5Backbone(()), r"widths not empty, got 256, 8 and \(\)"),
        (lambda: ConvS5Backbone(depth=0), "dim and depth must be at least 1"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_learns_a_bouncing_square() -> None:
    """One step ahead at under a tenth of the error of the last frame, stable for four times longer."""

    def squares(count: int, frames: int) -> Tensor:
        """A square of 4 pixels in a field of 16, one or two whole pixels a frame on each axis."""
        start = torch.randint(13, (count, 2))
        step = torch.randint(1, 3, (count, 2)) * (torch.randint(2, (count, 2)) * 2 - 1)
        places = bounce(start, step, frames, torch.tensor([12, 12]))  # (T, N, 2)
        line = torch.arange(16)
        inside = (line >= places[..., None]) & (line < places[..., None] + 4)
        pixels = inside[:, :, 0, :, None] & inside[:, :, 1, None]
        return pixels.transpose(0, 1)[:, None] * 2.0 - 1

    torch.manual_seed(0)
    model = ConvS5Predictor(1, (16, 32), 32, depth=2, groups=8, dt_min=0.02, dt_max=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, 1000, pct_start=0.1)
    for _ in range(1000):
        x = squares(4, 16)
        optimizer.zero_grad()
        frame_loss(model(x), x[:, :, 1:]).backward()
        optimizer.step()
        schedule.step()
    x = squares(16, 80)
    model.eval()
    with torch.no_grad():
        error = (model(x[:, :, :16]) - x[:, :, 1:16]).square().mean()
        rolled = model.generate(x[:, :, :16], 64)
    # of all frames, also the second, which the first alone does not tell
    copied = (x[:, :, :15] - x[:, :, 1:16]).square().mean()
    assert error < 0.1 * copied, (float(error), float(copied))
    # a square as bright as the true one is still there at the end
    light = (rolled[:, :, -8:] + 1).sum((1, 3, 4)) / 2
    assert ((light > 8) & (light < 32)).float().mean() > 0.9, light
