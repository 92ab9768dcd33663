"""FlexAttention stays compiled for more problems than the compiler's own limit."""

import pytest
import torch

from stvision.kernels.neighborhood import flex


def test_many_problems_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(counted, dynamic=False, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    before = torch._dynamo.config.recompile_limit
    for size in range(2, 2 + before + 4):
        assert flex.compiled_flex(torch.zeros(size)).sum() == size
    assert len(traced) == before + 4 and all(traced)
    assert torch._dynamo.config.recompile_limit == before
    torch._dynamo.reset()
