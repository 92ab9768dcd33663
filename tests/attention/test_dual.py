"""Dual attention against written-out sums in float64 and the identities of its definition."""

import pytest
import torch

from stvision.attention.dual import (
    ChannelGroupAttention,
    SpatialWindowAttention,
    channel_group_attention,
)


def test_channel_attention_equals_written_out_sums() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    out = channel_group_attention(q, k, v)
    for head in range(2):
        a = (k[:, head].T @ v[:, head] * 3**-0.5).softmax(-1)
        torch.testing.assert_close(out[:, head], (a @ q[:, head].T).T)


def test_channel_attention_of_single_channels_returns_query() -> None:
    q, k, v = torch.randn(3, 5, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(channel_group_attention(q, k, v), q)


def test_channel_attention_commutes_with_permutation() -> None:
    m = ChannelGroupAttention(8, 2, over_time=True).double()
    x = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    p = torch.randperm(30)
    permuted = x.flatten(1, 3)[:, p].view(x.shape)
    torch.testing.assert_close(m(permuted).flatten(1, 3), m(x).flatten(1, 3)[:, p])


def _full(m: SpatialWindowAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x.flatten(2, 3)).unflatten(-1, (3, m.num_heads, -1)).unbind(-3)
    a = (torch.einsum("btihd,btjhd->bthij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return m.proj(torch.einsum("bthij,btjhd->btihd", a, v).flatten(-2)).view(x.shape)


@pytest.mark.parametrize("window", [5, 7])
def test_window_as_large_as_the_map_is_full_attention(window: int) -> None:
    m = SpatialWindowAttention(8, 2, window, mask_padding=True).double()
    x = torch.randn(2, 2, 5, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x), _full(m, x))


def test_padded_tokens_take_part_unless_masked() -> None:
    m = SpatialWindowAttention(8, 2, 4).double()
    x = torch.randn(1, 2, 3, 2, 8, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 1))
    torch.testing.assert_close(m(x), _full(m, padded)[:, :, :3, :2])


def test_change_stays_in_its_window() -> None:
    m = SpatialWindowAttention(8, 2, 3).double()
    x = torch.randn(1, 2, 7, 5, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 0, :3, :3] += 1
    changed = (m(x) - m(y)).abs().amax((0, -1)) > 1e-12
    assert changed[0, :3, :3].all() and changed.sum() == 9


@pytest.mark.parametrize("cls", [ChannelGroupAttention, SpatialWindowAttention])
def test_gradients_compile_and_bad_input(cls: type) -> None:
    m = cls(4, 2).double()
    x = torch.randn(1, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="eager")(x), m(x))
    with pytest.raises(ValueError, match="x must be"):
        m(x[0])
    with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 4\) with at least one frame"):
        m(x[:, :0])
    with pytest.raises(ValueError, match="num_heads"):
        cls(4, 3)
