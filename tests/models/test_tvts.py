"""TVTS against its definition in the authors' key layout, against timm, and its tasks."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.models.backbones import create_backbone
from stvision.models.tvts import (
    TVTS,
    TVTS_MODELS,
    TranscriptSorter,
    TVTSPretraining,
    alignment_loss,
    convert_tvts_pretraining_state_dict,
    convert_tvts_state_dict,
    draw_window,
    gather_rows,
    keep_patches,
    sort_loss,
    space_positions,
    time_positions,
    tvts_pretraining,
    words_within,
)
from stvision.optional import mend_torchvision

DIM, HEADS, DEPTH, PATCH, SIDE = 24, 3, 2, 4, 3
SMALL = {
    "dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "patch_size": PATCH,
    "img_size": SIDE * PATCH,
    "frames": 8,
}


def small(trained: bool = True, **options: object) -> TVTS:
    torch.manual_seed(0)
    model = TVTS(**(SMALL | options)).double().eval()
    if trained:
        scatter(model)
    return model


def scatter(model: nn.Module, seed: int = 3) -> None:
    """Random values for all parameters, as after training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3
            p.copy_(noise + (1.0 if p.ndim == 1 else 0.0))


def clip(frames: int = 8, height: int = 12, width: int = 12, batch: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, frames, height, width, generator=g, dtype=torch.float64)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=40, dim=DIM, n_layers=1, n_heads=2, hidden_dim=32)
    return DistilBertModel(config).double().eval()


def pretraining(trained: bool = True, **options: object) -> TVTSPretraining:
    torch.manual_seed(0)
    model = TVTSPretraining(small(trained, **options), distilbert(), 7, 4, 2, 4).double().eval()
    if trained:
        scatter(model)
    return model


def transcripts() -> tuple[Tensor, Tensor]:
    """Token ids (2, 4, 5), and the mask of their padding."""
    g = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 4, 5, dtype=torch.int64)
    mask[0, 1, 3:] = mask[1, 2, 2:] = 0
    return torch.randint(1, 40, (2, 4, 5), generator=g), mask


def authors_weights() -> dict[str, Tensor]:
    """Random weights in the authors' keys, of everything but the text model."""
    g = torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {
        "video_model.cls_token": (1, 1, DIM),
        "video_model.pos_embed": (1, 1 + SIDE**2, DIM),
        "video_model.temporal_embed": (1, 4, DIM),
        "video_model.patch_embed.proj.weight": (DIM, 3, 2, PATCH, PATCH),
        "video_model.patch_embed.proj.bias": (DIM,),
        "txt_proj.1.weight": (7, DIM),
        "txt_proj.1.bias": (7,),
        "vid_proj.0.weight": (7, DIM),
        "vid_proj.0.bias": (7,),
        "pred_model.type_embed": (1, 2, DIM),
        "pred_model.head.weight": (4, DIM),
        "pred_model.head.bias": (4,),
    }
    for part, depth in (("video_model.", DEPTH), ("pred_model.", 2)):
        shapes |= {f"{part}norm.weight": (DIM,), f"{part}norm.bias": (DIM,)}
        for i in range(depth):
            at = f"{part}blocks.{i}."
            for name, size in (
                ("norm1", (DIM,)),
                ("attn.qkv", (3 * DIM, DIM)),
                ("attn.proj", (DIM, DIM)),
                ("norm2", (DIM,)),
                ("mlp.fc1", (4 * DIM, DIM)),
                ("mlp.fc2", (DIM, 4 * DIM)),
            ):
                shapes |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[:1]}
    return {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.4 for k, s in shapes.items()}


def written_blocks(state: dict[str, Tensor], x: Tensor, part: str, heads: int) -> Tensor:
    """Blocks and last norm from their definition, head by head."""

    def norm(x: Tensor, stem: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[stem + ".weight"] + state[stem + ".bias"]

    def linear(x: Tensor, stem: str) -> Tensor:
        return x @ state[stem + ".weight"].T + state[stem + ".bias"]

    i = 0
    while f"{part}blocks.{i}.norm1.weight" in state:
        at = f"{part}blocks.{i}."
        q, k, v = linear(norm(x, at + "norm1"), at + "attn.qkv").split(DIM, -1)
        parts = []
        for h in range(heads):
            own = slice(h * DIM // heads, (h + 1) * DIM // heads)
            scores = q[..., own] @ k[..., own].mT / math.sqrt(DIM / heads)
            parts.append(scores.softmax(-1) @ v[..., own])
        x = x + linear(torch.cat(parts, -1), at + "attn.proj")
        y = linear(norm(x, at + "norm2"), at + "mlp.fc1")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), at + "mlp.fc2")
        i += 1
    return norm(x, part + "norm")


def written_tokens(state: dict[str, Tensor], x: Tensor, keep: Tensor | None) -> Tensor:
    """Tokens of the encoder, each patch of each pair of frames on its own."""
    part = "video_model."
    kernel = state[part + "patch_embed.proj.weight"]
    place, time = state[part + "pos_embed"][0], state[part + "temporal_embed"][0]
    clips = []
    for b in range(len(x)):
        tokens = [state[part + "cls_token"][0, 0] + place[0]]
        for t in range(x.shape[2] // 2):
            places = range(SIDE**2) if keep is None else keep[b, t].tolist()
            for p in places:
                row, column = p // SIDE * PATCH, p % SIDE * PATCH
                box = x[b, :, 2 * t : 2 * t + 2, row : row + PATCH, column : column + PATCH]
                patch = (kernel * box).sum((1, 2, 3, 4)) + state[part + "patch_embed.proj.bias"]
                tokens.append(patch + place[1 + p] + time[t])
        clips.append(torch.stack(tokens))
    return written_blocks(state, torch.stack(clips), part, HEADS)


def written_loss(
    state: dict[str, Tensor], texts: Tensor, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the sorter and the whole loss, its cross-entropies summed one by one."""
    count, (first, second) = tokens.shape[1], state["pred_model.type_embed"][0]
    x = written_blocks(state, torch.cat([tokens + first, texts + second], 1), "pred_model.", 4)
    logits = x[:, count:] @ state["pred_model.head.weight"].T + state["pred_model.head.bias"]
    video = tokens[:, 0] @ state["vid_proj.0.weight"].T + state["vid_proj.0.bias"]
    text = texts.clamp_min(0) @ state["txt_proj.1.weight"].T + state["txt_proj.1.bias"]
    video, text = (y / y.norm(dim=1, keepdim=True) for y in (video, text.mean(1)))
    cosines = video @ text.T / 0.05
    align = sum(2 * cosines[i, i] - cosines[i].logsumexp(0) for i in range(len(cosines)))
    align = align - sum(cosines[:, i].logsumexp(0) for i in range(len(cosines)))
    right = [
        logits[b, k, labels[b, k]] - logits[b, k].logsumexp(0)
        for b in range(labels.shape[0])
        for k in range(labels.shape[1])
    ]
    return logits, -align / len(cosines) - 2 * sum(right) / len(right)


@pytest.mark.parametrize(("frames", "kept"), [(8, None), (8, 2), (4, 2)])
def test_authors_weights_give_the_written_out_tokens(frames: int, kept: int | None) -> None:
    """Also for fewer frames, for which kept places and embeddings of time are cut."""
    state, x = authors_weights(), clip(frames)
    g = torch.Generator().manual_seed(5)
    keep = None if kept is None else torch.rand(2, 4, 9, generator=g).argsort(-1)[..., :kept]
    model = small()
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    model.load_state_dict(convert_tvts_state_dict(wrapped))
    wanted = written_tokens(state, x, keep)
    assert (model.forward_features(x, keep) - wanted).abs().max() < 1e-10
    assert torch.equal(model(x, keep), model.forward_features(x, keep)[:, 0])
    single = model.float().forward_features(x.float(), keep)
    assert (single - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_authors_weights_give_the_written_out_logits_and_loss() -> None:
    model, x, keep = pretraining(), clip(), keep_patches(2, 4, 9, 0.5)
    own, text = authors_weights(), {}
    for key, value in model.text_model.state_dict().items():
        text[f"text_model.{key}"] = value.clone()
    scatter(model, 9)
    old = {"text_model.embeddings.position_ids": torch.arange(5)[None]}
    checkpoint = {"state_dict": {f"module.{k}": v for k, v in (own | text | old).items()}}
    model.load_state_dict(convert_tvts_pretraining_state_dict(checkpoint))
    ids, mask = transcripts()
    peer = distilbert()
    peer.load_state_dict({key.removeprefix("text_model."): v for key, v in text.items()})
    texts = torch.stack(
        [
            torch.stack(
                [peer(ids[b, k, :n][None]).last_hidden_state[0, 0] for k, n in enumerate(lengths)]
            )
            for b, lengths in enumerate(mask.sum(-1).tolist())
        ]
    )
    labels = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]])
    logits, loss = written_loss(own, texts, written_tokens(own, x, keep), labels)
    output = model(x, ids, mask, keep)
    assert (output.order - logits).abs().max() < 1e-9 * logits.abs().max().clamp_min(1)
    assert abs(model.loss(output, labels) - loss) < 1e-10 * abs(loss)
    single = model.float()(x.float(), ids, mask, keep)
    assert (single.order - logits).abs().max() < 1e-5 * logits.abs().max()
    assert abs(model.loss(single, labels) - loss) < 1e-5 * abs(loss)


def test_an_images_kernel_at_both_frames_gives_twice_its_response() -> None:
    kernel, images = torch.randn(DIM, 3, PATCH, PATCH, dtype=torch.float64), clip(1)[:, :, 0]
    model, x = small(frames=None), images[:, :, None].repeat(1, 1, 2, 1, 1)
    state = convert_tvts_state_dict({"patch_embed.proj.weight": kernel})
    model.load_state_dict(state, strict=False)
    conv = model.patch_embed["proj"]
    twice = conv(x)[:, :, 0] - conv.bias[:, None, None]
    assert (twice - 2 * F.conv2d(images, kernel, stride=PATCH)).abs().max() < 1e-12


def test_an_image_transformers_weights_give_timms_tokens() -> None:
    mend_torchvision()
    timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is missing")
    sizes = {"img_size": 12, "patch_size": PATCH, "embed_dim": DIM, "depth": 2, "num_heads": HEADS}
    peer = timm.VisionTransformer(**sizes, num_classes=5).double().eval()
    scatter(peer)
    mae = peer.state_dict() | {"mask_token": torch.zeros(1), "decoder_norm.bias": torch.zeros(1)}
    model = small(False, num_classes=5, frames=None)
    missing = model.load_state_dict(convert_tvts_state_dict(mae), strict=False)
    assert missing.missing_keys == ["temporal_embed"] and not missing.unexpected_keys
    images = clip(1)[:, :, 0]
    with torch.no_grad():
        peer.patch_embed.proj.weight.mul_(2)
        assert (model.forward_features(images) - peer.forward_features(images)).abs().max() < 1e-10
        assert (model(images) - peer(images)).abs().max() < 1e-10
        theirs = peer.forward_intermediates(images, intermediates_only=True)
    for a, b in zip(theirs, model.forward_intermediates(images)[1], strict=True):
        assert (a - b).abs().max() < 1e-10


def test_an_image_is_a_clip_of_one_frame_and_of_that_frame_twice() -> None:
    image, video = small(frames=None), small(frames=16)
    video.load_state_dict(image.state_dict())
    x = clip(1)
    for frames in (1, 2):
        still = x.repeat(1, 1, frames, 1, 1)
        assert (video(still) - image(x[:, :, 0])).abs().max() < 1e-12


def test_positions_of_other_sizes() -> None:
    table = torch.randn(1, 9, DIM, dtype=torch.float64)
    assert space_positions(table, (3, 3)) is table
    timm = pytest.importorskip("timm.layers.pos_embed", reason="timm is missing")
    for grid in ((2, 5), (4, 4), (1, 3)):
        theirs = timm.resample_abs_pos_embed(table.float(), grid, (3, 3), num_prefix_tokens=0)
        assert (space_positions(table.float(), grid) - theirs).abs().max() < 1e-5
    times = torch.tensor([0.0, 1.0, 2.0])[None, :, None].double()
    assert torch.equal(time_positions(times, 2), times[:, :2])
    wanted = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2]).double()
    assert torch.allclose(time_positions(times, 6)[0, :, 0], wanted)


@pytest.mark.parametrize(("height", "width", "frames"), [(9, 11, 7), (13, 5, 3), (12, 12, 19)])
def test_odd_sizes_are_padded(height: int, width: int, frames: int) -> None:
    """With zeros right and below, and by the last frame."""
    model, x = small(), clip(frames, height, width)
    padded = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
    padded = torch.cat([padded, padded[:, :, -1:]], 2)
    assert (model.forward_features(x) - model.forward_features(padded)).abs().max() < 1e-12
    grid = [(frames + 1) // 2, math.ceil(height / PATCH), math.ceil(width / PATCH)]
    tokens, features = model.forward_intermediates(x, [-1], norm=True, output_fmt="NHWC")
    assert list(features[0].shape[1:4]) == grid
    assert torch.equal(tokens[:, 1:], features[0].flatten(1, 3))


def test_kept_patches_are_drawn_for_each_pair() -> None:
    g = torch.Generator().manual_seed(0)
    keep = keep_patches(3, 8, 196, generator=g)
    assert keep.shape == (3, 8, 49) and keep.min() >= 0 and keep.max() < 196
    rows = keep.flatten(0, 1).sort(-1).values
    assert all(len(set(row.tolist())) == 49 for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 24
    counts = keep_patches(500, 8, 12, 0.5, generator=g).flatten().bincount(minlength=12)
    assert (counts / 4000 - 0.5).abs().max() < 0.04
    assert keep_patches(1, 1, 2, 0.75).shape == (1, 1, 1)


def test_windows_hold_stretches_of_one_length_a_second_apart() -> None:
    g = torch.Generator().manual_seed(0)
    lengths, firsts = set(), []
    for _ in range(300):
        stretches, times = draw_window(60.0, generator=g)
        length = (stretches[:, 1] - stretches[:, 0]).round(decimals=9)
        assert length.unique().numel() == 1
        assert torch.allclose(stretches[1:, 0] - stretches[:-1, 1], torch.ones(3).double())
        first, last = stretches[0, 0], stretches[-1, 1]
        part = ((times - first) / (last - first) * 16).floor()
        assert torch.equal(part, torch.arange(16).double())  # one in each part
        assert first >= 0 and last <= 60
        lengths.add(float(length[0]))
        firsts.append(float(first / (60 - (last - first))))
    assert lengths == {3.0, 4.0, 5.0}
    assert abs(sum(firsts) / 300 - 0.5) < 0.06 and min(firsts) < 0.05 and max(firsts) > 0.95
    stretches, times = draw_window(11.0, generator=g)  # too short: all of it
    assert torch.allclose(stretches[:, 0], torch.tensor([0.0, 3.0, 6.0, 9.0]).double())
    assert torch.allclose(stretches[:, 1], torch.tensor([2.0, 5.0, 8.0, 11.0]).double())
    assert 0 <= times.min() and times.max() < 11
    with pytest.raises(ValueError, match="duration must be above the 3.0 seconds of gaps, got 3"):
        draw_window(3)
    with pytest.raises(
        ValueError, match=r"must be at least 1 and gap at least 0, got 4, 16, \(5, 3"
    ):
        draw_window(60, seconds=(5, 3))


def test_transcripts_are_the_words_of_their_stretch() -> None:
    stretches = torch.tensor([[0.0, 2.0], [3.0, 5.0], [6.0, 8.0]]).double()
    words, times = ["a", "b", "gap", "c", "edge"], [0.5, 1.0, 2.5, 3.5, 5.0]
    assert words_within(words, times, stretches) == ["a b", "c", ""]
    with pytest.raises(ValueError, match="words and times must be as many, got 5 and 4"):
        words_within(words, times[1:], stretches)
    with pytest.raises(ValueError, match=r"stretches must be \(K, 2\), got \(3,\)"):
        words_within(words, times, stretches[:, 0])


def test_order_of_kept_patches_does_not_matter_but_their_pair_does() -> None:
    model, x, keep = small(), clip(), keep_patches(2, 4, 9, 0.5)
    wanted = model(x, keep)
    assert (model(x, keep.flip(2)) - wanted).abs().max() < 1e-12
    assert (model(x, keep.flip(1)) - wanted).abs().max() > 1e-4
    everything = torch.arange(9).expand(2, 4, 9)
    assert torch.equal(model(x, everything), model(x))


def test_order_of_transcripts_orders_the_logits() -> None:
    torch.manual_seed(0)
    sorter = TranscriptSorter(DIM, 4, 2, 4).double()
    scatter(sorter)
    texts, tokens = torch.randn(2, 4, DIM).double(), torch.randn(2, 10, DIM).double()
    logits = sorter(texts, tokens)
    order = torch.tensor([2, 0, 3, 1])
    assert (sorter(texts[:, order], tokens) - logits[:, order]).abs().max() < 1e-12
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3  # not for want of any difference
    labels = torch.arange(4).expand(2, -1)
    assert abs(sort_loss(logits[:, order], labels[:, order]) - sort_loss(logits)) < 1e-12


def test_without_embeddings_of_time_order_cannot_be_told() -> None:
    """Shuffled pairs of frames give one class token and one set of logits: at best log 4 is lost."""
    x, (ids, mask) = clip(), transcripts()
    model = pretraining()
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    for std in (0.0, 1.0):
        with torch.no_grad():
            nn.init.normal_(model.video_model.temporal_embed, std=std)
            texts, pairs = model.encode_transcripts(ids, mask), x.unflatten(2, (4, 2))
            class_tokens, logits = [], []
            for order in orders:
                tokens = model.video_model.forward_features(pairs[:, :, order].flatten(2, 3))
                class_tokens.append(tokens[:, 0])
                logits.append(model.pred_model(texts, tokens))
            spread = max((y - class_tokens[0]).abs().max() for y in class_tokens)
            assert spread < 1e-11 if std == 0 else spread > 1e-3
            if std == 0:
                assert all((y - logits[0]).abs().max() < 1e-10 for y in logits)
                # transcript order[i] is told at place i
                losses = [
                    sort_loss(y, order.argsort().expand(2, -1))
                    for y, order in zip(logits, orders, strict=True)
                ]
                assert sum(losses) / 24 >= 2 * math.log(4)
    assert abs(sort_loss(torch.zeros(3, 4, 4)) - 2 * math.log(4)) < 1e-6


def test_alignment_is_the_sum_of_both_directions() -> None:
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(2, 5, 8, generator=g)
    cosines = F.cosine_similarity(video[:, None], text[None], dim=2).double() / 0.05
    wanted = F.cross_entropy(cosines, torch.arange(5)) + F.cross_entropy(cosines.T, torch.arange(5))
    assert abs(alignment_loss(video, text) - wanted) < 1e-5 * wanted
    assert abs(alignment_loss(text, video) - wanted) < 1e-5 * wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(alignment_loss(video, text) - wanted) < 1e-5 * wanted


def test_sorting_sends_no_gradient_into_the_text_model() -> None:
    model, (ids, mask) = pretraining(), transcripts()
    output = model(clip(), ids, mask)
    sort_loss(output.order).backward(retain_graph=True)
    assert all(p.grad is None for p in model.text_model.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.pred_model.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.video_model.parameters())
    alignment_loss(output.video, output.text).backward()
    assert all(
        p.grad.abs().max() > 0
        for name, p in model.text_model.named_parameters()
        if "k_lin.bias" not in name and "position" not in name
    )
    assert model.pred_model.head.weight.grad is not None


def test_a_single_text_is_aligned_but_not_sorted() -> None:
    model, (ids, mask) = pretraining(), transcripts()
    output = model(clip(2), ids[:, :1], mask[:, :1])
    assert output.order is None
    assert torch.equal(model.loss(output), alignment_loss(output.video, output.text))


@pytest.mark.parametrize("frames", [None, 8])
def test_surface(frames: int | None) -> None:
    model = small(frames=frames, num_classes=5)
    x = clip()[:, :, 0] if frames is None else clip()
    last, features = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(features[-1].flatten(2).mT, last[:, 1:])
    assert torch.equal(model.forward_head(last), model(x))
    for info in model.feature_info:
        assert info["num_chs"] == DIM and info["reduction"] == PATCH
        assert isinstance(model.get_submodule(info["module"]), nn.Module)
    features = model.forward_intermediates(x, intermediates_only=True)
    stopped, (one,) = model.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(one, features[0]) and torch.equal(stopped[:, 1:], one.flatten(2).mT)
    assert len(model.forward_intermediates(x, 1, intermediates_only=True)) == 1
    tokens = model.forward_features(x)
    model.reset_classifier(0, "token")
    assert torch.equal(model(x), model.forward_head(tokens, pre_logits=True))
    model.reset_classifier(2)
    assert model(x).dtype == model.get_classifier().weight.dtype == torch.float64
    assert model.num_classes == 2 and model(x).shape == (2, 2)
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        model.reset_classifier(3, "avg")
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_checkpointing_changes_no_gradient() -> None:
    model, (ids, mask), keep = pretraining(), transcripts(), keep_patches(2, 4, 9, 0.5)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        saved = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal saved
            saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.loss(model(clip(), ids, mask, keep))
        loss.backward()
        grads.append((saved, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert grads[1][0] < 0.6 * grads[0][0]
    assert all(
        torch.allclose(a, b, rtol=1e-9) for a, b in zip(grads[0][1], grads[1][1], strict=True)
    )


def test_gradients_are_those_of_differences() -> None:
    """Along random directions of clip and weights, through encoder, sorter and its loss."""
    model, sorter = small(), TranscriptSorter(DIM, 4, 2, 4).double()
    scatter(sorter)
    x, keep = clip(7, 9, 11).requires_grad_(), keep_patches(2, 4, 9, 0.5)
    texts = torch.randn(2, 4, DIM, dtype=torch.float64)
    leaves = [x, *(p for n, p in model.named_parameters()), *sorter.parameters()]
    directions = [torch.randn_like(leaf) * 0.1 for leaf in leaves]

    def loss() -> Tensor:
        return sort_loss(sorter(texts, model.forward_features(x, keep)))

    grads = torch.autograd.grad(loss(), leaves)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=step)
            ends.append(loss())
    assert abs((ends[0] - ends[1]) / 2e-5 - slope) < 1e-5 * max(1.0, abs(slope))


@pytest.mark.parametrize("size", [(8, 12, 12), (7, 9, 11)])
def test_compiles_as_one_graph(size: tuple[int, int, int]) -> None:
    model, x, keep = pretraining(), clip(*size), keep_patches(2, 4, 9, 0.5)
    texts = torch.randn(2, 4, DIM, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        tokens = model.video_model.forward_features(x, keep)
        video, text = model.vid_proj(tokens[:, 0]), model.txt_proj(texts).mean(1)
        return alignment_loss(video, text) + sort_loss(model.pred_model(texts, tokens))

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=False)
    assert abs(compiled(x) - loss(x)) < 1e-5


@pytest.mark.parametrize("size", [(8, 12, 12), (7, 9, 11)])
def test_half_precision_and_autocast(size: tuple[int, int, int]) -> None:
    model, x, (ids, mask) = pretraining().float(), clip(*size).float(), transcripts()
    wanted = model(x, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, ids, mask)
        model.loss(mixed).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    half = model.bfloat16()(x.bfloat16(), ids, mask)
    assert half.video.dtype == half.order.dtype == torch.bfloat16
    assert model.loss(half).dtype == torch.float32
    for got in (mixed, half):
        for name in ("video", "text", "order"):
            a, b = getattr(got, name).float(), getattr(wanted, name)
            assert (a - b).abs().max() < 0.06 * b.abs().max(), name


def test_the_catalogues_model_is_the_published_one(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = create_backbone("tvts_base", frames=16)
        keys = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    # ViT-B/16 without its classifier, a second tap of the patch kernel, 8 embeddings of time
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + 768 * 768 + 8 * 768
    assert keys["pos_embed"] == (1, 197, 768) and keys["temporal_embed"] == (1, 8, 768)
    state = authors_weights()
    torch.save({"state_dict": state}, tmp_path / "tvts.pth")
    build, sizes = TVTS_MODELS["tvts_base"], {k: v for k, v in SMALL.items() if k != "frames"}
    own = build(tmp_path / "tvts.pth", **sizes, frames=8).state_dict()
    assert all(
        torch.equal(own[key], x.float()) for key, x in convert_tvts_state_dict(state).items()
    )
    # another size, length, head and number of channels
    options = {"img_size": 20, "frames": 12, "num_classes": 3, "in_chans": 1}
    other = build(tmp_path / "tvts.pth", **(sizes | options))
    wanted = build(tmp_path / "tvts.pth", **sizes, frames=8)
    x = clip(12, 20, 20)[:, :1].float()
    assert other(x).shape == (2, 3) and other.pos_embed.shape[1] == 26
    got = other.forward_features(x)
    rgb = wanted.forward_features(x.repeat(1, 3, 1, 1, 1))
    assert (got - rgb).abs().max() < 1e-4 * rgb.abs().max()


def test_the_whole_model_is_built_and_read(tmp_path: Path) -> None:
    with torch.device("meta"):
        keys = tvts_pretraining().state_dict().keys()
    assert "text_model.transformer.layer.5.attention.q_lin.weight" in keys
    parts = {"text_model", "video_model", "txt_proj", "vid_proj", "pred_model"}
    assert {key.split(".")[0] for key in keys} == parts
    assert {"video_model.norm.weight", "txt_proj.1.weight", "vid_proj.0.bias"} <= keys
    sizes = {key: value for key, value in SMALL.items() if key != "frames"}
    saved = tvts_pretraining(text_model=distilbert(), **sizes, frames=8)
    scatter(saved)
    state = {f"module.{key}": value for key, value in saved.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "whole.pth")
    whole = tvts_pretraining(tmp_path / "whole.pth", distilbert(), **sizes, frames=8)
    assert all(torch.equal(x, whole.state_dict()[key]) for key, x in saved.state_dict().items())
    other = tvts_pretraining(tmp_path / "whole.pth", distilbert(), **(sizes | {"img_size": 20}))
    assert other.video_model.pos_embed.shape[1] == 26
    assert torch.equal(other.pred_model.head.weight, saved.pred_model.head.weight)
    torch.save(authors_weights(), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"the checkpoint holds no text_model\.\*"):
        tvts_pretraining(tmp_path / "part.pth", distilbert(), **sizes)


def test_rows_of_all_processes_are_aligned(tmp_path: Path) -> None:
    """In two processes: loss of the whole batch, gradients of the own rows."""
    script = f"""
import sys, torch
import torch.distributed as dist
from stvision.models.tvts import alignment_loss, gather_rows
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
video, text = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
whole = alignment_loss(video, text)
wanted = torch.autograd.grad(whole, [video, text])
own = slice(3 * rank, 3 * rank + 3)
parts = [x.detach()[own].clone().requires_grad_() for x in (video, text)]
loss = alignment_loss(*(gather_rows(x) for x in parts))
assert abs(loss - whole) < 1e-6
for got, full in zip(torch.autograd.grad(loss, parts), wanted):
    assert (got - full[own]).abs().max() < 1e-6
dist.destroy_process_group()
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in (0, 1)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    x = torch.randn(2, 3)
    assert gather_rows(x) is x


def test_bad_input_gets_one_sentence() -> None:
    for options, message in (
        ({"num_heads": 5}, "num_heads must divide dim 24, got 5"),
        ({"img_size": 13}, "img_size must be a multiple of 4, got 13"),
        ({"frames": 0}, "frames must be None .* or at least 1, got 0"),
        ({"in_chans": 0}, "in_chans must be a whole number of at least 1, got 0"),
        ({"in_chans": 2.5}, "in_chans must be a whole number of at least 1, got 2.5"),
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"temporal_std": -1.0}, "temporal_std must be at least 0, got -1.0"),
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    model, x = small(), clip()
    for bad in (x[:, :2], x[..., 0], x[:, :, :0]):
        with pytest.raises(ValueError, match=r"x must be \(B, 3, T, H, W\), none of them 0"):
            model(bad)
    with pytest.raises(ValueError, match=r"keep must be \(2, at least 4, K\), got \(2, 3, 5\)"):
        model(x, torch.zeros(2, 3, 5, dtype=torch.int64))
    patches = 9
    with pytest.raises(
        ValueError, match=r"keep must name patches 0 to 8 of the 3 x 3 there are, got -1 to 9"
    ):
        model.tokenize(x, torch.tensor([-1, 0, patches]).expand(2, 4, 3))
    with pytest.raises(ValueError, match="keep must be int64, got torch.float32"):
        model.tokenize(x, torch.zeros(2, 4, 3))
    beyond = torch.full((2, 5, 3), patches)  # its fifth pair is left out
    beyond[:, :4] = patches - 1
    assert model.tokenize(x, beyond)[0].shape[1] == 1 + 4 * 3
    for options, message in (
        ({"indices": [9]}, "indices=.9. must lie between"),
        ({"output_fmt": "NLC"}, "output_fmt must be 'NCHW' or 'NHWC'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **options)
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, got 1"):
        keep_patches(1, 1, 4, 1.0)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 1 and 4"):
        keep_patches(0, 1, 4)
    with pytest.raises(ValueError, match=r"labels must be \(2, 4\) as logits has it, got \(2, 3\)"):
        sort_loss(torch.zeros(2, 4, 4), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at most as many transcripts K as places, got \(2, 5, 4"):
        sort_loss(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="places must be at least 2, got 1"):
        TranscriptSorter(DIM, 1, 2, 4)
    with pytest.raises(ValueError, match=r"texts and tokens must be \(B, K, 24\)"):
        TranscriptSorter(DIM, 4, 2, 4)(torch.zeros(2, 4, 23), torch.zeros(2, 4, 24))
    with pytest.raises(ValueError, match="text_model must have the video model's width 12, got 24"):
        TVTSPretraining(small(False, dim=12), distilbert())
    whole, (ids, mask) = pretraining(), transcripts()
    with pytest.raises(ValueError, match=r"input_ids must be \(B, K, L\), got \(2, 4\)"):
        whole(x, ids[..., 0])
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 4, 5\) as input_ids"):
        whole(x, ids, mask[:, :2])
    with pytest.raises(ValueError, match="must hold as many clips, got 1, 2"):
        whole(x[:1], ids)
    with pytest.raises(ValueError, match=r"the checkpoint holds no text_model\.\*"):
        convert_tvts_pretraining_state_dict(authors_weights())


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips of four stretches of two frames, each of one of 16 patterns; clips and patterns."""
    g = torch.Generator().manual_seed(7)
    patterns = torch.randn(16, 3, 8, 8, generator=g)
    g = torch.Generator().manual_seed(seed)
    which = torch.rand(count, 16, generator=g).argsort(1)[:, :4]
    clips = patterns[which].repeat_interleave(2, 1).transpose(1, 2)
    return clips + 0.1 * torch.randn(clips.shape, generator=g), which


def sorted_right(std: float, steps: int, held: bool = False) -> float:
    """Share of transcripts of unseen clips that are put right after training by sorting alone.

    ``held`` keeps the embeddings of time as they are at the start.
    """
    torch.manual_seed(0)
    video = TVTS(32, 2, 4, 4, img_size=8, temporal_std=std, frames=8)
    video.temporal_embed.requires_grad_(not held)
    sorter, words = TranscriptSorter(32, 4, 2, 4), torch.randn(16, 32)
    params = [p for p in (*video.parameters(), *sorter.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 3e-4, weight_decay=0)
    for step in range(steps):
        clips, which = textures(32, 100 + step)
        loss = sort_loss(sorter(words[which], video.forward_features(clips)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, which = textures(1000, 1)
    with torch.no_grad():
        said = sorter(words[which], video.forward_features(clips)).argmax(-1)
    return float((said == torch.arange(4)).float().mean())


@pytest.mark.slow
def test_sorting_is_learned_where_time_has_embeddings() -> None:
    assert sorted_right(0.5, 250) == 1


@pytest.mark.slow
def test_sorting_is_not_learned_from_embeddings_of_zero() -> None:
    """In the steps in which the others sort everything; held at zero never, for nothing tells order.

    Left free they do grow in so small a task, and sort all of it too after 400 to 600 steps.
    """
    assert abs(sorted_right(0.0, 250) - 0.25) < 0.05
    assert abs(sorted_right(0.0, 600, held=True) - 0.25) < 0.05
