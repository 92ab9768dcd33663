"""The text decomposer against its description in float64, and proof (f)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.models.fstext import FSTextDecomposer, identity_loss


def tiny(shake: bool = True, **options) -> FSTextDecomposer:
    torch.manual_seed(3)
    config = {"dim": 24, "num_layers": 2, "num_heads": 2, "max_frames": 4, "max_tokens": 9}
    model = FSTextDecomposer(**{**config, **options}).eval()
    if shake:
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)
    return model


def attention(weights: dict, prefix: str, x: Tensor, source: Tensor, time: bool) -> Tensor:
    """(N, L, C) to (N, L, C), two heads, float64, written out."""
    q, k, v = (
        (y @ weights[f"{prefix}.to_{n}.weight"].T).unflatten(-1, (2, -1)).transpose(1, 2)
        for n, y in (("q", x), ("k", source), ("v", source))
    )
    if time:
        dim = q.shape[-1]
        angle = torch.arange(q.shape[2]).double()[:, None] * 1e4 ** (
            -torch.arange(0, dim, 2).double() / dim
        )
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for y in (q, k)
        )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if time:
        scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    return out @ weights[f"{prefix}.to_out.0.weight"].T + weights[f"{prefix}.to_out.0.bias"]


def described(model: FSTextDecomposer, text: Tensor, frames: int) -> Tensor:
    w = {key: value.double() for key, value in model.state_dict().items()}
    text = text.double()
    batch, length, width = text.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[name + ".weight"], w[name + ".bias"])

    def feed_forward(x: Tensor, name: str) -> Tensor:
        value, gate = (x @ w[name + ".net.0.proj.weight"].T + w[name + ".net.0.proj.bias"]).chunk(
            2, -1
        )
        return (value * F.gelu(gate)) @ w[name + ".net.2.weight"].T + w[name + ".net.2.bias"]

    rows = [index * w["pos_embed"].shape[1] // frames for index in range(frames)]
    x = (w["learnable_query"] + w["pos_embed"][:, rows, :length]).repeat(batch, 1, 1, 1)
    for layer in range(2):
        name = f"trf_blocks.{layer}.transformer_blocks.0"
        for item in range(batch):
            for frame in range(frames):
                y = norm(x[item, frame][None], name + ".norm1")
                x[item, frame] += attention(w, name + ".attn1", y, y, False)[0]
        y = norm(x, name + ".norm2").flatten(1, 2)
        x = x + attention(w, name + ".attn2", y, text, False).reshape(x.shape)
        x = x + feed_forward(norm(x, name + ".norm3"), name + ".ff")
        name = f"trf_blocks.{layer}.transformer_blocks.1"
        for token in range(length):
            y = norm(x[:, :, token], name + ".norm1")
            x[:, :, token] += attention(w, name + ".attn1", y, y, True)
        x = x + feed_forward(norm(x, name + ".norm3"), name + ".ff")
    return norm(x, "norm")


@pytest.mark.parametrize("frames", [4, 3, 7, 1])
@torch.no_grad()
def test_follows_its_description(frames) -> None:
    model = tiny()
    text = torch.randn(2, 5, 24)
    torch.testing.assert_close(
        model(text, frames).double(), described(model, text, frames), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("frames", [4, 6])
@torch.no_grad()
def test_f_fresh_decomposer_gives_equal_states_for_all_frames(frames) -> None:
    text = torch.randn(2, 5, 24)
    out = tiny(shake=False)(text, frames)
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-5, atol=1e-6)
    assert (out[0] - out[1]).abs().max() > 1e-3
    moved = tiny()(text, frames)
    assert (moved - moved[:, :1]).abs().max() > 1e-2


@torch.no_grad()
def test_frames_are_causal_where_text_is_not_shared_between_them() -> None:
    model = tiny()
    before = model(torch.ones(1, 3, 24), 4)
    model.pos_embed[:, 3] += torch.randn_like(model.pos_embed[:, 3])
    after = model(torch.ones(1, 3, 24), 4)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-6, atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3


def test_small_models_project(tmp_path) -> None:
    model = tiny(inner_dim=16, ff_mult=2)
    out = model(torch.randn(2, 5, 24), 3)
    assert out.shape == (2, 3, 5, 24)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = FSTextDecomposer.from_pretrained(tmp_path)
    text = torch.randn(1, 2, 24)
    assert torch.equal(loaded(text, 5), model(text, 5))


def test_identity_loss_falls_and_leaves_the_text_alone() -> None:
    model = tiny(shake=False).train()
    text = torch.randn(2, 4, 24, requires_grad=True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = identity_loss(model(text, 3), text)
        assert loss.ndim == 0
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=list(model.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    out = torch.randn(2, 3, 4, 24)
    expected = (out.double().mean(1) - text.detach().double()).square().mean()
    torch.testing.assert_close(identity_loss(out, text).double(), expected, rtol=1e-5, atol=1e-6)
    assert not identity_loss(out, text).requires_grad


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model = tiny().train()
    text = torch.randn(1, 3, 24)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(text, 4).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bad_inputs_get_one_sentence() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"text_states must be \(B, L, 24\)"):
        model(torch.randn(2, 5, 23), 3)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        model(torch.randn(2, 5, 24), 0)
    with pytest.raises(ValueError, match="hold 10 tokens, but max_tokens is 9"):
        model(torch.randn(2, 10, 24), 3)
