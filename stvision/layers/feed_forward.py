"""Feed-forward layers on tokens (..., C)."""

from torch import Tensor, nn
from torch.nn import functional as F


class GatedFeedForward(nn.Module):
    """``W_2 (a · gelu(b))`` with ``a, b = W_1 x`` (GEGLU; Shazeer 2020), both with bias.

    Args:
        dim: channels C of the input and the output.
        mult: width of ``a`` and of ``b`` over C.
    """

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        if mult < 1:
            raise ValueError(f"mult must be at least 1, got {mult}")
        self.proj = nn.Linear(dim, 2 * mult * dim)
        self.out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))
