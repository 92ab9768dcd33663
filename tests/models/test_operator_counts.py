"""Backbones record no more operators than timm's, which decides the time of small batches on a GPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stvision.models.backbones import create_backbone
from stvision.models.davit import convert_davit_state_dict
from stvision.models.halonet import convert_halonet_state_dict
from stvision.optional import mend_torchvision

#: operators that neither compute nor copy
FREE = {
    *(
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "empty",
        "expand",
        "permute",
    ),
    *("promote_types", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
    *("unbind", "unfold", "unsqueeze", "view"),
}


class Recorded(TorchDispatchMode):
    """Names of what ran, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def recorded(model: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Operators of the forward and of the backward."""
    with Recorded() as forward:
        out = model(x).square().mean()
    with Recorded() as backward:
        torch.autograd.grad(out, list(model.parameters()))
    return forward.names, backward.names


def test_davit_pads_nothing_where_windows_and_strides_divide_and_does_where_not() -> None:
    model = create_backbone("davit_tiny", embed_dims=(8, 8, 8, 8), num_heads=(2, 2, 2, 2)).eval()
    for size, pads in ((56, False), (60, True)):
        for names in recorded(model, torch.randn(1, 3, 4 * size, 4 * size)):
            assert bool(names["constant_pad_nd"]) is pads


@pytest.mark.parametrize(
    ("name", "convert", "size"),
    [
        ("davit_tiny", convert_davit_state_dict, 224),
        ("halonet26t", convert_halonet_state_dict, 256),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_more_kernels_than_timm_records(name: str, convert, size: int, memory_format) -> None:
    mend_torchvision()
    timm = pytest.importorskip("timm", reason="timm (extra `vision`) is missing")
    peer = timm.create_model(name, num_classes=10).eval()
    ours = create_backbone(name, num_classes=10).eval()
    ours.load_state_dict(convert(peer.state_dict()))
    x = torch.randn(1, 3, size, size).contiguous(memory_format=memory_format)
    for got, wanted in zip(recorded(ours, x), recorded(peer, x), strict=True):
        kernels, theirs = (
            sum(count for key, count in names.items() if key not in FREE) for names in (got, wanted)
        )
        assert kernels < theirs
