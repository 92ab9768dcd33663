"""TS-LSTM and Temporal-Inception: their definitions written out, orders, lengths, learning."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers import TEMPORAL_HEADS
from stvision.layers.temporal_heads import TSLSTM, TemporalInception, segment_max


def settle(head: nn.Module) -> nn.Module:
    """Running statistics as after training."""
    g = torch.Generator().manual_seed(3)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=g)
            module.running_var = torch.rand(module.num_features, generator=g) + 0.5
    return head.double().eval()


def ts_lstm(segments: int = 3, **options: object) -> TSLSTM:
    torch.manual_seed(0)
    return settle(TSLSTM(6, 5, segments, 7, **options))


def inception(**options: object) -> TemporalInception:
    torch.manual_seed(0)
    return settle(TemporalInception(6, 5, hidden=9, **options))


def features(steps: int = 25) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, steps, 6, generator=g, dtype=torch.float64)


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """On (B, C)."""
    x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    return x * norm.weight + norm.bias


def lstm(x: Tensor, cell: nn.Module) -> Tensor:
    """Last output of an LSTM on (B, T, D), gate by gate."""
    h = c = torch.zeros(x.shape[0], cell.hidden_size, dtype=x.dtype)
    for t in range(x.shape[1]):
        gates = x[:, t] @ cell.weight_ih_l0.T + cell.bias_ih_l0
        gates = gates + h @ cell.weight_hh_l0.T + cell.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


@pytest.mark.parametrize(("steps", "segments"), [(25, 3), (3, 3), (8, 1), (11, 4)])
def test_ts_lstm_is_its_definition(steps: int, segments: int) -> None:
    head, x = ts_lstm(segments), features(steps)
    length = steps // segments
    pooled = []
    for s in range(segments):
        parts = [batch_norm(x[:, s * length + t], head.norms[s]) for t in range(length)]
        pooled.append(torch.stack(parts).max(0).values)
    out = batch_norm(lstm(torch.stack(pooled, 1), head.lstm), head.norm)
    wanted = out @ head.fc.weight.T + head.fc.bias
    assert (head(x) - wanted).abs().max() < 1e-12
    assert (head.float()(x.float()) - wanted).abs().max() < 1e-5


def test_the_lstm_is_torchs() -> None:
    """Same keys, same beginnings from the same draws, same last output and gradients."""
    torch.manual_seed(0)
    theirs = nn.LSTM(6, 7, batch_first=True).double()
    torch.manual_seed(0)
    ours = TSLSTM(6, 5, 3, 7, init_range=None).lstm.double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    x = features(9).requires_grad_()
    outs = ours(x), theirs(x)[0][:, -1]
    assert (outs[0] - outs[1]).abs().max() < 1e-13
    grads = [
        torch.autograd.grad(out.sin().sum(), [x, *net.parameters()])
        for out, net in zip(outs, (ours, theirs), strict=True)
    ]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


def test_norm_of_a_segment_sees_one_step_at_a_time_in_training() -> None:
    head, x = ts_lstm().train(), features()
    part = x[:, 8:16]
    mean, var = part.mean(0, keepdim=True), part.var(0, keepdim=True, unbiased=False)
    normed = (part - mean) / (var + 1e-5).sqrt() * head.norms[1].weight + head.norms[1].bias
    assert (head.pool(x)[:, 1] - normed.amax(1)).abs().max() < 1e-12
    assert head.norms[1].num_batches_tracked == 8


def test_pooling_a_constant_clip_gives_its_vector_after_the_norm() -> None:
    head, x = ts_lstm(), features(1).expand(-1, 25, -1)
    for s in range(3):
        assert (head.pool(x)[:, s] - batch_norm(x[:, 0], head.norms[s])).abs().max() < 1e-13


def test_order_counts_between_segments_only() -> None:
    head, x = ts_lstm(init_range=0.8), features(24)
    inside = torch.cat([torch.randperm(8) + 8 * s for s in range(3)])
    assert torch.equal(head(x[:, inside]), head(x))
    across = torch.cat([torch.arange(8) + 8 * s for s in (1, 0, 2)])
    assert (head(x[:, across]) - head(x)).abs().max() > 1e-3
    assert torch.equal(head(torch.cat([x, x[:, :1] * 9], 1)), head(x))  # the 25th is left out


def test_segment_max_is_no_mean() -> None:
    x = features(7)
    wanted = torch.stack([x[:, :3].max(1).values, x[:, 3:6].max(1).values], 1)
    assert torch.equal(segment_max(x, 2), wanted)


def inception_written_out(head: TemporalInception, x: Tensor) -> Tensor:
    maps = [x.mT]  # one (B, D, T) for each channel

    def norm(y: Tensor, bn: nn.Module, c: int) -> Tensor:
        y = (y - bn.running_mean[c]) / (bn.running_var[c] + 1e-5).sqrt()
        return (y * bn.weight[c] + bn.bias[c]).clamp(min=0)

    for module, pool in zip(head.branches, (2, 2, 2, 3), strict=True):
        out = []
        for branch in module:
            w, taps = branch.conv.weight[:, :, 0], branch.conv.kernel_size[1]
            for c in range(w.shape[0]):
                y = branch.conv.bias[c].expand_as(maps[0])
                for channel, m in enumerate(maps):
                    padded = F.pad(m, (taps // 2, taps // 2))
                    for k in range(taps):
                        y = y + w[c, channel, k] * padded[..., k : k + m.shape[-1]]
                y = norm(y, branch.norm, c)
                out.append(y[..., : y.shape[-1] // pool * pool].unflatten(-1, (-1, pool)).amax(-1))
        maps = out
    for conv, bn in zip(head.reduce[0::3], head.reduce[1::3], strict=True):
        w = conv.weight[:, :, 0, 0]
        mixed = [sum(w[c, i] * m for i, m in enumerate(maps)) + conv.bias[c] for c in range(len(w))]
        maps = [norm(m, bn, c) for c, m in enumerate(mixed)]
    assert len(maps) == 1 and maps[0].shape[-1] == 1
    hidden = maps[0][..., 0] @ head.fc1.weight.T + head.fc1.bias
    hidden = batch_norm(hidden, head.norm).clamp(min=0)
    return hidden @ head.fc.weight.T + head.fc.bias


@pytest.mark.parametrize("options", [{}, {"taps": (5,), "grow": False}], ids=["inception", "vgg"])
@pytest.mark.parametrize("steps", [24, 25, 31])
def test_inception_is_its_definition(options: dict, steps: int) -> None:
    head, x = inception(**options), features(steps)
    wanted = inception_written_out(head, x)
    assert (head(x) - wanted).abs().max() < 1e-12
    assert (head.float()(x.float()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_inception_comes_down_to_one_step_or_says_so() -> None:
    head = inception()
    for steps in range(24, 48):
        assert head(features(steps)).shape == (4, 5)
    for steps in (1, 23, 48):
        with pytest.raises(ValueError, match=f"24 to 47 steps, got {steps}"):
            head(features(steps))


def test_filters_of_inception_are_few_and_shared_by_features() -> None:
    head = TemporalInception(2048, 101)
    count = sum(p.numel() for part in (head.branches, head.reduce) for p in part.parameters())
    assert count == 1205
    small, x = inception(), features()
    swapped = inception()
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    with torch.no_grad():
        swapped.fc1.weight.copy_(small.fc1.weight[:, order])
    assert (swapped(x[..., order]) - small(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", TEMPORAL_HEADS)
def test_gradients_dtypes_and_compilation(name: str) -> None:
    head = {"ts-lstm": ts_lstm, "temporal-inception": inception}[name]()
    x = features(24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(x), (x,), fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=False)
    leaves = [x, *head.parameters()]
    outs = compiled(x), head(x)
    assert (outs[0] - outs[1]).abs().max() < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*grads, strict=True))
    assert torch.equal(head.fc(head(x, pre_logits=True)), head(x))
    head = head.float()
    wanted = head(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(x.float())
    half = head.bfloat16()(x.bfloat16())
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_all_parameters_of_ts_lstm_begin_uniform() -> None:
    torch.manual_seed(0)
    head = TSLSTM(64, 5, hidden=32)
    every = torch.cat([p.detach().flatten() for p in head.parameters()])
    assert every.abs().max() <= 0.1 and abs(every.std() - 0.1 / 3**0.5) < 1e-3
    assert head.norms[0].weight.abs().max() <= 0.1
    assert torch.equal(TSLSTM(4, 5, init_range=None).norms[0].weight, torch.ones(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TSLSTM(0, 5), "dim must be at least 1 and num_classes at least 0, got 0 and 5"),
        (lambda: TSLSTM(4, 5, segments=0), "segments and hidden must be at least 1"),
        (lambda: TemporalInception(4, 5, taps=(4,)), r"taps must be odd .* got \(4,\)"),
        (lambda: TemporalInception(4, 5, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: ts_lstm()(features(2)), r"at least segments=3 .* got \(4, 2, 6\)"),
        (lambda: ts_lstm()(features()[..., :5]), r"x must be \(B, T, 6\)"),
        (lambda: inception()(features()[0]), r"x must be \(B, T, 6\)"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class _OrderBlind(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.amax(1))


@pytest.mark.slow
def test_heads_learn_the_order_of_segments() -> None:
    """Six classes are the orders of three prototypes under unit noise; maximum over all is blind."""
    torch.manual_seed(0)
    prototypes = torch.randn(3, 64)
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])

    def batch(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(6, (n,))
        x = prototypes[orders[y]].repeat_interleave(8, 1)
        return torch.cat([x, x[:, -1:]], 1) + torch.randn(n, 25, 64), y

    scores = {}
    for name, build in (*TEMPORAL_HEADS.items(), ("blind", _OrderBlind)):
        torch.manual_seed(1)
        head = build(64, 6)
        optimizer = torch.optim.Adam(head.parameters(), 1e-3)
        for _ in range(400):
            x, y = batch(64)
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()
        x, y = batch(512)
        with torch.no_grad():
            scores[name] = float((head.eval()(x).argmax(1) == y).float().mean())
    assert scores["ts-lstm"] > 0.98 and scores["temporal-inception"] > 0.98, scores
    assert scores["blind"] < 0.3, scores
