"""Selective S4: the pyramid against its definition, selection and its gradients, LSMCL, learning."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.token_selection import (
    Selection,
    gather_tokens,
    mask_tokens,
    ratio_loss,
    select_exact,
    select_ratio,
)
from stvision.models.backbones import create_backbone
from stvision.models.selective_s4 import (
    LongShortContrast,
    SelectiveS4,
    convert_vis4mer_state_dict,
    grid_positions,
    info_nce,
    momentum_update,
)

SMALL = {"dim": 16, "depth": 2, "patch_size": 4, "l_max": 20, "d_state": 4, "num_classes": 5}


def small(dtype: torch.dtype = torch.float64, **options: object) -> SelectiveS4:
    torch.manual_seed(0)
    return SelectiveS4(**(SMALL | {"frames": 3, "dropout": 0.0} | options)).to(dtype).eval()


def clip(dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 3, 9, 11, generator=g, dtype=torch.float64).to(dtype)


def vis4mer_weights(classes: int = 5) -> dict[str, Tensor]:
    """Random weights in ViS4mer's keys: 16 channels, two layers, states of 4."""
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5

    state = {"encoder.weight": draw(16, 7), "encoder.bias": draw(16)}
    for i, c in enumerate((16, 8)):
        at, kernel = f"s4_layers.{i}.", f"s4_layers.{i}.kernel.krylov."
        state |= {at + "D": draw(c), at + "output_linear.weight": draw(c, c)}
        state |= {at + "output_linear.bias": draw(c, 1)}
        state |= {kernel + "log_dt": draw(c) - 2, kernel + "B": draw(c, 2, 2, 2)}
        state |= {kernel + "C": draw(c, 2, 2, 2), kernel + "nodes": draw(11, 2)}
        state[kernel + "z"] = draw(11, 2)
        state[kernel + "w"] = torch.stack([torch.full((2,), -0.5), draw(2).abs() * 3], -1).double()
        state |= {f"norms.{i}.weight": draw(c), f"norms.{i}.bias": draw(c)}
        state |= {f"linears.{i}.weight": draw(c // 2, c), f"linears.{i}.bias": draw(c // 2)}
    return state | {"decoder.weight": draw(classes, 4), "decoder.bias": draw(classes)}


def written_out(state: dict[str, Tensor], x: Tensor, l_max: int) -> Tensor:
    """ViS4mer with each kernel summed from its resolvent, by dense matrices."""
    for i in range(2):
        at, kernel = f"s4_layers.{i}.", f"s4_layers.{i}.kernel.krylov."
        z = F.layer_norm(x, x.shape[-1:], state[f"norms.{i}.weight"], state[f"norms.{i}.bias"])
        dt = state[kernel + "log_dt"].exp()
        w, b, c = (torch.view_as_complex(state[kernel + name]) for name in "wBC")
        w, b, c = (torch.cat([v, v.conj()], -1) for v in (w, b, c))
        y = torch.zeros_like(z)
        for h in range(z.shape[-1]):
            a = torch.diag(w) - torch.outer(b[h, 1], c[h, 1].conj())
            eye = torch.eye(4, dtype=a.dtype)
            left = torch.linalg.inv(eye - dt[h] / 2 * a)
            a_bar, b_bar = left @ (eye + dt[h] / 2 * a), left @ (dt[h] * b[h, 0])
            nodes = torch.exp(-2j * math.pi * torch.arange(l_max, dtype=torch.float64) / l_max)
            k = [c[h, 0].conj() @ torch.linalg.solve(eye - n * a_bar, b_bar) for n in nodes]
            k = torch.fft.ifft(torch.stack(k)).real
            for t in range(z.shape[1]):
                y[:, t, h] = sum(k[t - s] * z[:, s, h] for s in range(t + 1))
        y = F.gelu(y + z * state[at + "D"])
        y = y @ state[at + "output_linear.weight"].T + state[at + "output_linear.bias"][:, 0]
        x = x + y
        x = (x[:, 0 : x.shape[1] - 1 : 2] + x[:, 1::2]) / 2
        x = F.gelu(x @ state[f"linears.{i}.weight"].T + state[f"linears.{i}.bias"])
        l_max //= 2
    return x.mean(1) @ state["decoder.weight"].T + state["decoder.bias"]


def test_weights_of_vis4mer_give_the_written_out_logits() -> None:
    state = vis4mer_weights()
    model = small(keep_ratio=1.0)
    left = model.load_state_dict(convert_vis4mer_state_dict({"state_dict": state}), strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == {"patch_embed.weight", "patch_embed.bias"}
    tokens = torch.randn(2, 17, 16, dtype=torch.float64)
    wanted = written_out(state, tokens, 20)
    assert (model.forward_tokens(tokens)[0] - wanted).abs().max() < 1e-10
    got = model.float().forward_tokens(tokens.float())[0]
    assert (got - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_catalogue_takes_weights_of_vis4mer(tmp_path) -> None:
    torch.save(vis4mer_weights(), tmp_path / "vis4mer.pth")
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    build = ("vis4mer_large", tmp_path / "vis4mer.pth")
    model = create_backbone(*build, num_classes=5, frames=3, in_chans=2, **sizes)
    assert torch.equal(model.head.fc.weight, vis4mer_weights()["decoder.weight"].float())
    other = create_backbone(*build, num_classes=3, frames=3, **sizes)
    assert other.head.fc.weight.shape == (3, 4)


def test_keeping_everything_is_the_plain_pyramid() -> None:
    plain, selective = small(keep_ratio=1.0), small(keep_ratio=0.5)
    shared = {k: v for k, v in selective.state_dict().items() if k in plain.state_dict()}
    # the layers are made for the tokens they see: bring both to one length
    for a, b in zip(plain.stages, selective.stages, strict=True):
        b.s4.l_max = a.s4.l_max
    plain.load_state_dict(shared)
    selective.keep_ratio = 1.0
    selection = selective.select(selective.tokenize(clip()))
    assert selection.gate.min() == 1
    assert (selective(clip()) - plain(clip())).abs().max() < 1e-12


def test_gathering_is_masking_with_the_dropped_removed() -> None:
    x, logits = torch.randn(3, 14, 5), torch.randn(3, 14, 2)
    selection = select_exact(logits, 6)
    kept = gather_tokens(x, selection)
    for sample in range(3):
        rows = selection.gate[sample].bool()
        assert rows.sum() == 6
        assert torch.equal(mask_tokens(x, selection)[sample][rows], kept[sample])
        assert not mask_tokens(x, selection)[sample][~rows].any()
        odds = logits[sample, :, 0] - logits[sample, :, 1]
        assert odds[rows].min() > odds[~rows].max()
        assert (selection.kept[sample].diff() > 0).all()


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("selection", ["exact", "ratio"])
def test_gradient_of_the_scores_and_of_the_ratio_reaches_the_mask_generator(
    selection: str, gather: bool
) -> None:
    model = small(selection=selection, gather=gather, keep_ratio=0.3).train()
    logits, chosen = model.forward_tokens(model.tokenize(clip()))
    losses = [logits.square().sum()]
    if selection == "ratio":  # of an exact number it is constant
        losses.append(model.selection_loss(chosen))
    weights = list(model.mask_generator.parameters())
    for loss in losses:  # each by itself
        for grad in torch.autograd.grad(loss, weights, retain_graph=True):
            assert grad.abs().max() > 0
    sum(losses).backward()
    assert not list(model.guide.parameters())  # buffers, which a checkpoint holds
    assert all(x.grad is None for x in model.guide.state_dict(keep_vars=True).values())
    assert all(p.grad is not None for name, p in model.named_parameters() if "guide" not in name)


def test_gathering_gives_kept_odds_their_gradient_and_dropped_ones_none() -> None:
    x, weight = torch.randn(2, 3, 9, 5, dtype=torch.float64)
    logits = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    selection = select_exact(logits, 4)
    at = selection.kept[..., None].expand(-1, -1, 5)
    (got,) = torch.autograd.grad((gather_tokens(x, selection) * weight.gather(1, at)).sum(), logits)
    share = (logits[..., 0] - logits[..., 1]).sigmoid().detach()
    slope = share * (1 - share) * (x * weight).sum(-1)
    wanted = torch.zeros_like(slope).scatter(1, selection.kept, slope.gather(1, selection.kept))
    assert (got - torch.stack([wanted, -wanted], -1)).abs().max() < 1e-14


def test_straight_through_gradient_is_that_of_the_probability() -> None:
    logits = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, dtype=torch.float64)
    soft = (logits[..., 0] - logits[..., 1]).sigmoid()
    (wanted,) = torch.autograd.grad((soft * weight).sum(), logits)
    for selection in (select_exact(logits, 3), select_ratio(logits)):
        (got,) = torch.autograd.grad((selection.gate * weight).sum(), logits)
        assert (got - wanted).abs().max() < 1e-14
        assert set(selection.gate.detach().round(decimals=12).unique().tolist()) <= {0.0, 1.0}


def test_noise_draws_with_the_probability() -> None:
    torch.manual_seed(0)
    odds = torch.tensor([-1.0, 0.0, 2.0])
    logits = torch.stack([odds, torch.zeros(3)], -1).expand(20000, -1, -1)
    share = select_ratio(logits, noise=True).gate.mean(0)
    assert (share - odds.sigmoid()).abs().max() < 0.015


def test_ratio_loss() -> None:
    gate = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    assert float(ratio_loss(gate, 0.5)) == pytest.approx(0.125**2)
    with pytest.raises(ValueError, match="ratio must be above 0"):
        ratio_loss(gate, 0.0)


def test_momentum_is_exact_and_without_gradient() -> None:
    model = small()
    before = {k: x.clone() for k, x in model.guide.state_dict().items()}
    assert before
    with torch.no_grad():
        for p in model.stages[0].parameters():
            p.add_(torch.randn_like(p))
    model.update_momentum()
    stage = dict(model.stages[0].named_parameters())
    for name, p in model.guide.state_dict(keep_vars=True).items():
        assert (p - (0.99 * before[name] + 0.01 * stage[name])).abs().max() < 1e-15
        assert not p.requires_grad
    momentum_update(model.guide.s4, model.stages[0].s4, 0.0)
    assert torch.equal(model.guide.s4.C, model.stages[0].s4.C)


def test_token_count_falls_with_the_ratio() -> None:
    for ratio in (0.1, 0.25, 0.5, 0.9):
        model = small(keep_ratio=ratio)
        tokens = model.tokenize(clip())
        chosen = model.apply_selection(tokens, model.select(tokens))
        assert chosen.shape[1] == max(1, round(ratio * tokens.shape[1]))


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Memory that ``call`` keeps for its backward, each storage once, without the weights."""
    own = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x  # held by the graph, so that no other tensor gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    assert out.requires_grad
    return sum(sizes.values())


def test_activation_memory_falls_linearly_with_the_ratio() -> None:
    """That of the pyramid is the ratio's share; choosing adds what does not depend on it."""
    length, ratios = 400, (0.1, 0.25, 0.5, 0.75, 0.9)
    tokens = torch.randn(8, length, 16)

    def measure(ratio: float, gather: bool = True) -> tuple[int, int]:
        model = small(torch.float32, keep_ratio=ratio, l_max=length, gather=gather).train()
        chosen = model.apply_selection(tokens, model.select(tokens)).detach()
        whole = saved_bytes(model, lambda: model.forward_tokens(tokens)[0])
        return whole, saved_bytes(model, lambda: model.forward_head(model._pyramid(chosen)))

    plain, _ = measure(1.0)
    whole, pyramid = zip(*map(measure, ratios), strict=True)
    for ratio, size in zip(ratios, pyramid, strict=True):
        assert abs(size / plain - ratio) < 0.01
    slope = (whole[-1] - whole[0]) / (ratios[-1] - ratios[0])
    for ratio, size in zip(ratios, whole, strict=True):
        assert abs(size - whole[0] - slope * (ratio - ratios[0])) < 0.01 * plain
    # the kept tokens themselves and their odds come on top of the pyramid's share
    assert plain <= slope < 1.15 * plain
    assert measure(0.1, gather=False)[1] >= plain  # zeros in place of tokens save nothing


def test_positions_are_added_before_selection() -> None:
    model = small()
    tokens = model.tokenize(clip())
    assert tokens.shape == (2, 3 * 3 * 3, 16)
    patches = model.patch_embed(clip()[:, :, 1]).permute(0, 2, 3, 1)
    place = grid_positions((3, 3, 3), 16, tokens)
    assert (tokens.view(2, 3, 3, 3, 16)[:, 1] - patches - place[1]).abs().max() < 1e-12
    assert len(place.flatten(0, 2).unique(dim=0)) == 27
    kept = model.select(tokens).kept[0]
    assert torch.equal(model.apply_selection(tokens, model.select(tokens))[0], tokens[0, kept])


def test_identical_views_of_one_video_cost_nothing() -> None:
    torch.manual_seed(0)
    contrast = LongShortContrast(small(torch.float32), mask_ratio=0.0)
    tokens = torch.randn(1, 9, 16)
    assert contrast(tokens, tokens).item() == 0.0
    x = torch.eye(4)
    assert float(info_nce(x, x, 0.01)) < 1e-6
    wanted = -torch.log(torch.tensor(math.e / (math.e + 3)))
    assert float(info_nce(x, x, 1.0)) == pytest.approx(float(wanted))


def test_contrast_is_computed_in_float32_at_least() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 8, generator=g, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(query[:, None], key[None], dim=2) / 0.07
    wanted = torch.nn.functional.cross_entropy(cosines, torch.arange(6))
    assert abs(info_nce(query, key) - wanted) < 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        mixed = info_nce(query.float(), key.float())
    assert mixed.dtype == torch.float32 and abs(mixed - wanted) < 1e-5
    pair = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(info_nce, pair, fast_mode=True)


def test_the_encoder_of_long_clips_drops_no_channel() -> None:
    torch.manual_seed(0)
    contrast = LongShortContrast(small(torch.float32, dropout=0.5), mask_ratio=0.0).train()
    said: dict[str, list[Tensor]] = {"query": [], "key": []}
    for name in said:
        module = contrast.get_submodule(name)
        module.register_forward_hook(lambda *x, at=name: said[at].append(x[2]))
    short, long = torch.randn(3, 8, 16), torch.randn(3, 18, 16)
    for _ in range(2):
        contrast(short, long)
    assert torch.equal(*said["key"]) and not torch.equal(*said["query"])
    assert contrast.key.training


def test_contrast_trains_only_the_query_and_then_guides() -> None:
    torch.manual_seed(0)
    model = small(torch.float32)
    contrast = LongShortContrast(model, symmetric=True).train()
    short, long = torch.randn(3, 8, 16), torch.randn(3, 18, 16)
    optimizer = torch.optim.Adam(contrast.query.parameters(), 1e-2)
    key = [p.clone() for p in contrast.key.parameters()]
    contrast(short, long).backward()
    assert all(p.grad is not None for p in contrast.query.parameters())
    assert all(p.grad is None for p in contrast.key.parameters())
    optimizer.step()
    contrast.update_momentum()
    pairs = zip(key, contrast.key.parameters(), contrast.query.parameters(), strict=True)
    for old, slow, fast in pairs:
        assert torch.allclose(slow, 0.99 * old + 0.01 * fast, atol=1e-7)
    model.load_pretrained_guide(contrast)
    assert torch.equal(model.guide.s4.C, contrast.key.s4.C)
    assert torch.equal(model.stages[0].s4.C, contrast.query.s4.C)
    dropped = contrast.drop(long)
    assert dropped.shape == (3, 9, 16)


def test_surface() -> None:
    model = small()
    last, features = model.forward_intermediates(clip())
    assert torch.equal(last, features[-1]) and torch.equal(last, model.forward_features(clip()))
    assert torch.equal(model.forward_head(last), model(clip()))
    assert [f.shape[-1] for f in features] == [info["num_chs"] for info in model.feature_info]
    (first,) = model.forward_intermediates(
        clip(), [0], stop_early=True, output_fmt="NCL", intermediates_only=True
    )
    assert torch.equal(first.mT, features[0])
    model.reset_classifier(0)
    assert torch.equal(model(clip()), last.mean(1))
    model.reset_classifier(7)
    assert model(clip()).shape == (2, 7) and model.get_classifier().weight.dtype == torch.float64
    decayed = model.no_weight_decay()
    assert {"stages.0.s4.w", "stages.1.s4.log_dt", "stages.1.s4.B"} <= decayed
    assert "stages.0.s4.output_linear.weight" not in decayed


def test_checkpointing_changes_no_gradient() -> None:
    model, grads = small(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(clip()).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*grads, strict=True))


def test_images_are_clips_of_one_frame() -> None:
    model, image = small(), small(frames=None)
    image.load_state_dict(model.state_dict())
    assert torch.equal(image(clip()[:, :, 0]), model(clip()[:, :, :1]))


def test_compiles_and_runs_in_half_precision() -> None:
    model = small()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert (compiled(clip()) - model(clip())).abs().max() < 1e-12
    model = small(torch.float32, keep_ratio=1.0)  # no choice that rounding could turn
    wanted = model(clip(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(clip(torch.float32))
        mixed.float().sum().backward()
    half = model.bfloat16()(clip(torch.bfloat16))
    for got in (mixed, half):
        assert (got.float() - wanted).abs().max() < 0.06 * wanted.abs().max()
    selective = small(torch.bfloat16).train()
    assert selective(clip(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "bfloat16"])
def test_half_precision_ranks_tokens_by_float32_odds(whole: bool) -> None:
    """8 bits would give hundreds of tokens few different odds."""
    model, tokens = small(torch.float32), torch.randn(2, 600, 16)
    tokens, dtype = (tokens.bfloat16(), torch.bfloat16) if whole else (tokens, torch.float32)
    model = model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        logits = model.mask_generator(model.guide(tokens))
        chosen = model.select(tokens)
    assert logits.dtype == chosen.gate.dtype == torch.float32
    odds = (logits[..., 0] - logits[..., 1]).detach()
    assert all(len(row.unique()) > 550 for row in odds)
    for row, kept in zip(odds, chosen.kept, strict=True):
        dropped = torch.ones_like(row, dtype=torch.bool).scatter(0, kept, False)
        assert row[kept].min() > row[dropped].max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 18}, "dim must be at least 6 and a multiple of 4 for depth 2"),
        ({"keep_ratio": 0.0}, "keep_ratio must be above 0 and at most 1, got 0.0"),
        ({"selection": "soft"}, "selection must be 'exact' or 'ratio', got 'soft'"),
        ({"frames": 0}, "frames must be None"),
        ({"momentum": 2.0}, "momentum must be 0 to 1"),
        ({"l_max": 0}, "l_max must be a whole number of at least 1, got 0"),
        ({"in_chans": 2.5}, "in_chans must be a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_bad_input() -> None:
    model, logits = small(), torch.zeros(2, 5, 2)
    calls = [
        (lambda: model(clip()[:, :2]), r"x must be \(B, 3, T, H, W\)"),
        (lambda: model(clip()[:, :, :0]), r"x must be .* none of them 0, got \(\d, 3, 0, "),
        (lambda: model.forward_tokens(torch.zeros(2, 4, 8)), r"tokens must be \(B, L, 16\)"),
        (lambda: select_exact(logits, 6), "keep must be 1 to 5 tokens, got 6"),
        (lambda: select_exact(logits[..., 0], 1), r"logits must be \(B, L, 2\)"),
        (lambda: select_ratio(logits, temperature=0.0), "temperature must be above 0"),
        (lambda: gather_tokens(logits, Selection(logits[..., 0], None)), "exactly K tokens"),
        (lambda: info_nce(torch.zeros(2, 3), torch.zeros(3, 3)), r"both be \(B, D\)"),
        (
            lambda: LongShortContrast(model)(torch.zeros(2, 5, 15), torch.zeros(2, 9, 15)),
            r"short and long must be \(B, L, 16\) of one B .*, got \(2, 5, 15\) and \(2, 9, 15\)",
        ),
        (
            lambda: LongShortContrast(model)(torch.zeros(2, 5, 16), torch.zeros(3, 9, 16)),
            r"of one B with L at least 1, got \(2, 5, 16\) and \(3, 9, 16\)",
        ),
        (lambda: LongShortContrast(model, mask_ratio=1.0), "mask_ratio must be at least 0"),
        (lambda: model.reset_classifier(3, "max"), "global_pool must be 'avg'"),
        (lambda: grid_positions((1, 1, 1), 5, logits), "dim must be at least 6, got 5"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_gradients_of_the_pyramid_are_those_of_differences() -> None:
    model, x = small(keep_ratio=1.0), clip()[:1].requires_grad_()
    names, values = zip(*model.named_parameters(), strict=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), atol=1e-6, fast_mode=True)


def test_contrast_compiles_as_one_graph() -> None:
    contrast = LongShortContrast(small(), mask_ratio=0.0, symmetric=True).double().train()
    short, long = torch.randn(2, 8, 16).double(), torch.randn(2, 18, 16).double()
    torch.compiler.reset()
    compiled = torch.compile(contrast, fullgraph=True, backend="aot_eager", dynamic=False)
    losses = [run(short, long) for run in (contrast, compiled)]
    assert abs(losses[0] - losses[1]) < 1e-10
    grads = [torch.autograd.grad(loss, list(contrast.query.parameters())) for loss in losses]
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*grads, strict=True))
    assert contrast.key.training


@pytest.mark.slow
def test_selection_finds_marked_tokens() -> None:
    """Four tokens with a mark among 512 say the class; a tenth of the tokens is kept."""
    torch.manual_seed(0)
    classes, dim, length, steps = 4, 32, 516, 1400
    mark = F.normalize(torch.randn(dim), dim=0) * 6
    codes = F.normalize(torch.randn(classes, dim), dim=1) * 3

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = torch.randn(n, length, dim), torch.randint(classes, (n,))
        at = torch.rand(n, length).topk(4, dim=1).indices
        marked = torch.zeros(n, length, dtype=torch.bool).scatter(1, at, True)
        return x + marked[..., None] * (codes[y][:, None] + mark), y, marked

    def accuracy(random: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        model = SelectiveS4(
            dim, 1, 4, length, 8, keep_ratio=0.1, num_classes=classes, frames=1, dropout=0.0
        )
        if random:
            model.select = lambda x: select_exact(torch.randn(*x.shape[:2], 2), model.kept(length))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, 4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
        for _ in range(steps):
            x, y, _ = batch(16)
            optimizer.zero_grad()
            F.cross_entropy(model.forward_tokens(x)[0], y).backward()
            optimizer.step()
            schedule.step()
            model.update_momentum()
        x, y, marked = batch(256)
        with torch.no_grad():
            logits, selection = model.eval().forward_tokens(x)
        found = (selection.gate.bool() & marked).sum() / marked.sum()
        return float((logits.argmax(1) == y).float().mean()), float(found)

    chosen, found = accuracy(random=False)
    blind, _ = accuracy(random=True)
    assert found >= 0.9, found
    assert chosen >= blind + 0.2, (chosen, blind)
