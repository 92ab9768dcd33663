"""Forward and backward of a training step as one CUDA graph.

A small network on a large GPU waits for the host: a step of a few thousand short kernels takes as
long as their launches. A capture issues them all at once and, unlike ``torch.compile``, is ready
after a few steps.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: plain passes before the capture: lazily made handles and choices of algorithms come first
WARMUP_PASSES = 3


class GraphedStep:
    """Replays ``backward(forward(**inputs)["loss"])`` for inputs of one shape.

    Gradients are added to ``parameter.grad``, which must exist and stay where it is: zero it with
    ``zero_grad(set_to_none=False)``. The passes before the capture leave gradients and buffers as
    they were. Random draws inside the network follow ``torch.manual_seed`` as without a graph.

    Args:
        forward: returns a dict of scalars, among them ``"loss"``.
        backward: accumulates gradients of a loss.
        model: whose gradients and buffers are touched.

    Raises:
        ValueError: there is no CUDA device, or a trained parameter has no gradient buffer.
    """

    def __init__(
        self,
        forward: Callable[..., Mapping[str, Tensor]],
        backward: Callable[[Tensor], None],
        model: nn.Module,
    ) -> None:
        if not torch.cuda.is_available():
            raise ValueError("cuda_graphs=True needs a CUDA device; found none")
        self.forward, self.backward, self.model = forward, backward, model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run a step; the values live in fixed buffers that the next step overwrites.

        Args:
            inputs: tensors, in every step of the same names, shapes and dtypes.

        Raises:
            ValueError: an input that is no tensor, or that changed its shape or dtype.
        """
        if self._graph is None:
            self._capture(inputs)
        for name, buffer in self._inputs.items():
            given = inputs.get(name)
            if given is None or given.shape != buffer.shape or given.dtype != buffer.dtype:
                found = None if given is None else (tuple(given.shape), given.dtype)
                raise ValueError(
                    f"a captured step takes {name!r} as {(tuple(buffer.shape), buffer.dtype)} in "
                    f"every step, got {found}; train with cuda_graphs=False on varying shapes"
                )
            buffer.copy_(given)
        self._graph.replay()  # type: ignore[union-attr]
        return self._values

    def _step(self) -> dict[str, Tensor]:
        values = self.forward(**self._inputs)
        self.backward(values["loss"])
        return {name: value.detach() for name, value in values.items()}

    def _capture(self, inputs: Mapping[str, Any]) -> None:
        odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
        if odd:
            raise ValueError(f"a captured step takes tensors only, but {odd[0]!r} is none")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if any(p.grad is None for p in trained):
            raise ValueError("a captured step adds to gradient buffers that must exist before it")
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        gradients = [p.grad.clone() for p in trained if p.grad is not None]
        buffers = [buffer.clone() for buffer in self.model.buffers()]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_PASSES):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._values = self._step()
        self._graph = graph

        with torch.no_grad():
            _restore((p.grad for p in trained if p.grad is not None), gradients)
            _restore(self.model.buffers(), buffers)


def _restore(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
