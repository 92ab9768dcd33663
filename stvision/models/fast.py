"""Fast mode: replay a denoiser's forward pass as a CUDA graph, optionally compiled first.

At 256 x 256 pixels a video U-Net is bound by kernel launches, not by arithmetic: the host needs
longer to issue a step than the GPU to compute it. A graph issues the whole step at once. Inputs are
copied into fixed buffers, so any number of steps, any prompt and any timestep reuse one capture;
only another shape, dtype, number of reference frames or attention backend makes a new one. A capture
reads the weights where they lay when it was made: moved or converted weights are noticed and
captured anew; after a change of the network itself (an adapter added or scaled), call
:func:`enable_fast` again.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

#: captures kept for one model, least recently used out first: each holds its activations' memory
MAX_GRAPHS = 4
#: eager passes before a capture, so that lazily made handles and autotuned choices exist
WARMUP_PASSES = 2


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: Any


class GraphedForward:
    """Callable that stands in for ``module.forward`` and replays captures of it.

    Gradients, training mode and tensors outside a GPU go to the plain forward, so the model stays
    usable for everything else while fast mode is on.

    Args:
        module: the denoiser; its parameters must stay where they are (no offload while fast).
        compile: fuse operations with ``torch.compile`` before the capture. Costs one compilation
            a shape (a minute for an SD-sized network) and saves most of the small kernels.
    """

    def __init__(self, module: nn.Module, *, compile: bool = False) -> None:
        self.plain: Callable[..., Any] = type(module).forward.__get__(module)
        self.module = module
        self.compiled = compile
        #: True sends calls to the plain forward, for work that changes the network for a while
        self.paused = False
        self._target = torch.compile(self.plain, dynamic=False) if compile else self.plain
        self._captures: OrderedDict[tuple, _Capture] = OrderedDict()
        self._pool: Any = None
        self._addresses: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        """A copied model is fast too, with captures of its own."""
        return GraphedForward(copy.deepcopy(self.module, memo), compile=self.compiled)

    # Found at the first call: walking all modules at each would cost more than a replay saves.
    @cached_property
    def _weights(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    @cached_property
    def _switched(self) -> list[nn.Module]:
        return [item for item in self.module.modules() if _switches(item) != (None, None)]

    def clear(self) -> None:
        """Free all captures; the next call makes a new one."""
        self._captures.clear()
        self._pool = None

    def _replays(self, sample: Tensor) -> bool:
        plain = self.paused or torch.is_grad_enabled() or self.module.training
        return sample.is_cuda and not plain

    def __call__(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any):
        if not self._replays(sample):
            return self.plain(sample, timestep, *args, **kwargs)
        timestep = torch.as_tensor(timestep, device=sample.device)
        tensors: dict[str, Tensor] = {"sample": sample, "timestep": timestep}
        fixed: dict[str, Any] = {}
        for name, value in [*((f"{i}", v) for i, v in enumerate(args)), *kwargs.items()]:
            (tensors if isinstance(value, Tensor) else fixed)[name] = value

        addresses = tuple(weight.data_ptr() for weight in self._weights)
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses
        key = self._key(tensors, fixed)
        capture = self._captures.get(key)
        if capture is None:
            capture = self._captures[key] = self._capture(tensors, fixed, len(args))
            if len(self._captures) > MAX_GRAPHS:
                self._captures.popitem(last=False)
        self._captures.move_to_end(key)
        for name, value in tensors.items():
            capture.inputs[name].copy_(value)
        capture.graph.replay()
        # the buffer is overwritten by the next replay; the caller keeps what it was given
        return _cloned(capture.output)

    def _key(self, tensors: dict[str, Tensor], fixed: dict[str, Any]) -> tuple:
        """What one capture is good for."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return (
            *((n, tuple(t.shape), t.dtype, t.device) for n, t in tensors.items()),
            *((name, repr(value)) for name, value in fixed.items()),
            autocast,
            *map(_switches, self._switched),
        )

    def _capture(
        self, tensors: dict[str, Tensor], fixed: dict[str, Any], num_args: int
    ) -> _Capture:
        inputs = {name: value.detach().clone() for name, value in tensors.items()}

        def call() -> Any:
            values = {**inputs, **fixed}
            args = [values.pop(str(i)) for i in range(num_args)]
            return self._target(values.pop("sample"), values.pop("timestep"), *args, **values)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_PASSES):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = call()
        # captures never run at the same time, so they may share their scratch memory
        self._pool = self._pool or graph.pool()
        return _Capture(graph, inputs, output)


def _switches(module: nn.Module) -> tuple[Any, Any]:
    """How an attention module computes: the backend's name and the kind of processor, or None."""
    processor = getattr(module, "processor", None)
    return getattr(module, "backend", None), None if processor is None else type(processor)


def _cloned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(_cloned(item) for item in output)
    # diffusers' output classes are ordered dictionaries whose fields are also attributes
    return type(output)(**{name: _cloned(value) for name, value in output.items()})


def enable_fast(module: nn.Module, *, compile: bool = False) -> None:
    """Replay ``module``'s forward pass as CUDA graphs from now on.

    Args:
        module: a denoiser called as ``module(sample, timestep, ...)`` on a GPU, such as
            :class:`~stvision.models.seer.SeerUNetModel` or diffusers' ``UNetMotionModel``.
        compile: also fuse with ``torch.compile`` before capturing.

    Raises:
        RuntimeError: there is no CUDA device, or ``module`` carries offload hooks, which move
            the parameters that a capture has recorded by address.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("fast mode replays CUDA graphs and needs a CUDA device; found none")
    if is_offloaded(module):
        raise RuntimeError(
            "fast mode and CPU offload exclude each other: captures read weights by address; turn "
            "offload off first"
        )
    module.forward = GraphedForward(module, compile=compile)  # type: ignore[method-assign]


def disable_fast(module: nn.Module) -> None:
    """Return ``module`` to its plain forward pass and free the captures; a no-op when not fast."""
    if is_fast(module):
        del module.forward


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module, or a layer of it, carries hooks that move its weights."""
    return any(hasattr(item, "_hf_hook") for item in module.modules())


def is_fast(module: nn.Module) -> bool:
    """Whether :func:`enable_fast` is in force for ``module``."""
    return isinstance(vars(module).get("forward"), GraphedForward)


@contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """The plain forward pass inside a ``with`` block; captures are kept for afterwards."""
    forward = vars(module).get("forward")
    disable_fast(module)
    try:
        yield
    finally:
        if isinstance(forward, GraphedForward):
            module.forward = forward  # type: ignore[method-assign]


@contextmanager
def fast(module: nn.Module, *, compile: bool = False) -> Iterator[None]:
    """Fast mode inside a ``with`` block; see :func:`enable_fast`."""
    enable_fast(module, compile=compile)
    try:
        yield
    finally:
        disable_fast(module)
