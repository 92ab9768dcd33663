"""Rotary embedding against complex rotation in float64."""

import pytest
import torch

from stvision.layers.rotary import RotaryEmbedding, apply_rotary, rotary_frequencies, rotary_table


def turned(x: torch.Tensor, positions: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """Pair by pair, written out: (L, D) float64."""
    out = x.clone()
    for row, position in enumerate(positions.tolist()):
        for pair in range(dim // 2):
            angle = torch.tensor(position * theta ** (-2 * pair / dim), dtype=torch.float64)
            a, b = x[row, 2 * pair], x[row, 2 * pair + 1]
            out[row, 2 * pair] = a * angle.cos() - b * angle.sin()
            out[row, 2 * pair + 1] = b * angle.cos() + a * angle.sin()
    return out


@pytest.mark.parametrize(("width", "dim"), [(8, 8), (11, 6), (40, 32)])
def test_rotation_of_pairs(width: int, dim: int) -> None:
    x = torch.randn(7, width, dtype=torch.float64)
    table = rotary_table(7, dim, 1e4, dtype=torch.float64)
    expected = turned(x, torch.arange(7), dim, 1e4)
    torch.testing.assert_close(apply_rotary(x, table), expected, rtol=1e-12, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        got = apply_rotary(x.to(dtype), rotary_table(7, dim))
        assert got.dtype == dtype
        reference = turned(x.to(dtype).double(), torch.arange(7), dim, 1e4)
        torch.testing.assert_close(got.double(), reference, rtol=tolerance, atol=tolerance)


def test_large_positions_keep_float32_accuracy() -> None:
    table = rotary_table(16384, 32)[-1].double()
    angle = 16383 * 1e4 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    torch.testing.assert_close(table[:, 0], angle.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(table[:, 1], angle.sin(), rtol=0, atol=1e-7)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 16, dtype=torch.float64)
    table = rotary_table(50, 16, dtype=torch.float64)
    near = torch.stack([apply_rotary(q, table[i]) @ apply_rotary(k, table[i + 7]) for i in (0, 31)])
    torch.testing.assert_close(near[0], near[1])


def test_tables_do_not_suffer_from_casting_the_module() -> None:
    module = RotaryEmbedding(32).to(torch.bfloat16)
    assert module.freqs.dtype == torch.bfloat16
    exact = RotaryEmbedding(32).table(100, torch.zeros(1))
    assert torch.equal(module.table(100, torch.zeros(1, dtype=torch.bfloat16)), exact)


def test_table_made_in_inference_mode_serves_a_backward() -> None:
    with torch.inference_mode():
        rotary_table(33, 10, 77.0)
    x = torch.randn(33, 10, requires_grad=True)
    apply_rotary(x, rotary_table(33, 10, 77.0)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_odd_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="dim must be an even number"):
        rotary_frequencies(5)


def test_overwriting_happens_only_without_gradients() -> None:
    table = rotary_table(5, 6)
    x = torch.randn(5, 10)
    expected = apply_rotary(x, table)
    kept = x.clone().requires_grad_()
    assert torch.equal(apply_rotary(kept, table, overwrite=True), expected)
    assert torch.equal(kept, x)
    with torch.no_grad():
        assert apply_rotary(x, table, overwrite=True) is x
    assert torch.equal(x, expected)


def test_fake_tensors_do_not_stay_behind() -> None:
    with torch._subclasses.FakeTensorMode():
        rotary_table(40, 14, 55.0)
    assert type(rotary_table(40, 14, 55.0)) is torch.Tensor
