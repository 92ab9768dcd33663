"""TVTS: a video transformer that learns by sorting transcripts (Zeng et al. 2023, arXiv 2209.15280).

A clip becomes tokens of two frames and 16 x 16 pixels, which with a class token attend to each other
in space and time at once. For pre-training most of each pair of frames is dropped; from what is left,
a small transformer says for each of a narrated clip's transcripts which place in time it has, and
mean text and clip are drawn together.

Keys are those of the authors' first version, timm's but for the embedding of time. Weights of an image
transformer (MAE) start it: their patch kernel stands at both frames, unhalved, as the authors train
it. So a clip of equal frames has twice the patch response of its image in such a model; an image here
is a clip of that frame twice.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvision.attention.dispatch import dispatch_attention
from stvision.layers.checks import check_whole, may_read
from stvision.layers.vision import DropPath, Mlp, drop_path_rates
from stvision.models.selective_s4 import info_nce
from stvision.models.surface import Head, asked_stages
from stvision.models.weights import load_backbone, read_weights, unwrap

#: frames of a token
TUBELET = 2
#: eps of every LayerNorm
EPS = 1e-6


def space_positions(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Embeddings of rows and columns for a grid of any size.

    Args:
        table: (1, P, D) of a square grid in row order.
        grid: rows and columns wanted.

    Returns:
        (1, rows * columns, D), bicubic with antialiasing where the grid is another.
    """
    side = math.isqrt(table.shape[1])
    rows, columns = grid
    if (rows, columns) == (side, side):
        return table
    wide = torch.promote_types(table.dtype, torch.float32)
    image = table.to(wide).mT.unflatten(2, (side, side))
    image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=True)
    return image.flatten(2).mT.to(table.dtype)


def time_positions(table: Tensor, count: int) -> Tensor:
    """Embeddings of ``count`` pairs of frames.

    Args:
        table: (1, N, D).
        count: how many are wanted.

    Returns:
        (1, count, D): the first ones of a longer table; a shorter one is stretched linearly.
    """
    if count <= table.shape[1]:
        return table[:, :count]
    wide = torch.promote_types(table.dtype, torch.float32)
    return F.interpolate(table.to(wide).mT, size=count, mode="linear").mT.to(table.dtype)


def keep_patches(
    batch: int,
    pairs: int,
    patches: int,
    mask_ratio: float = 0.75,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which patches of each pair of frames are kept, drawn for each pair alone.

    Args:
        batch: clips B.
        pairs: pairs of frames in a clip.
        patches: patches of a pair of frames.
        mask_ratio: share that is dropped, at least 0 and below 1.
        generator: source of the draw, on ``device``.
        device: of the result.

    Returns:
        (B, pairs, kept), int64, distinct places 0 to patches - 1 in random order; at least one.

    Raises:
        ValueError: a number below 1, or another share.
    """
    if min(batch, pairs, patches) < 1:
        raise ValueError(
            f"batch, pairs and patches must be at least 1, got {batch}, {pairs} and {patches}"
        )
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
    scores = torch.rand(batch, pairs, patches, generator=generator, device=device)
    return scores.argsort(-1)[..., : max(1, int(patches * (1 - mask_ratio)))]


def draw_window(
    duration: float,
    transcripts: int = 4,
    frames: int = 16,
    seconds: tuple[int, int] = (3, 5),
    gap: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Where in a narrated video a clip and its transcripts are taken.

    The window is a row of stretches of one length with gaps between, at a random place; a video too
    short for it is taken whole, with shorter stretches. Frames are drawn one from each of equal parts
    of the whole window, gaps too, as the authors' loader does.

    Args:
        duration: of the video, in seconds.
        transcripts: stretches K.
        frames: T.
        seconds: least and greatest length of a stretch, whole seconds, both possible.
        gap: seconds between stretches.
        generator: source of the draw, on the CPU.

    Returns:
        (K, 2) first and last second of each stretch, and (T,) rising times of the frames in seconds,
        both float64.

    Raises:
        ValueError: numbers that leave no stretch.
    """
    if min(transcripts, frames) < 1 or not 1 <= seconds[0] <= seconds[1] or gap < 0:
        raise ValueError(
            "transcripts, frames and seconds must be at least 1 and gap at least 0, got "
            f"{transcripts}, {frames}, {seconds} and {gap}"
        )
    gaps = gap * (transcripts - 1)
    if not duration > gaps:
        raise ValueError(f"duration must be above the {gaps} seconds of gaps, got {duration}")
    length = int(torch.randint(seconds[0], seconds[1] + 1, (), generator=generator))
    place, within = torch.rand((), generator=generator), torch.rand(frames, generator=generator)
    whole = min(float(duration), length * transcripts + gaps)
    first = float(place) * (duration - whole)
    stretch = (whole - gaps) / transcripts
    starts = first + torch.arange(transcripts, dtype=torch.float64) * (stretch + gap)
    parts = torch.arange(frames, dtype=torch.float64) + within
    return torch.stack([starts, starts + stretch], 1), first + parts * (whole / frames)


def words_within(words: Sequence[str], times: Sequence[float], stretches: Tensor) -> list[str]:
    """The transcript of each stretch of time.

    Args:
        words: of the speech, in order.
        times: second at which each word is said.
        stretches: (K, 2), first and last second of each.

    Returns:
        K sentences; empty where nothing is said.

    Raises:
        ValueError: words and times of unequal number, or another shape.
    """
    if len(words) != len(times):
        raise ValueError(f"words and times must be as many, got {len(words)} and {len(times)}")
    if stretches.ndim != 2 or stretches.shape[1] != 2:
        raise ValueError(f"stretches must be (K, 2), got {tuple(stretches.shape)}")
    said = list(zip(words, times, strict=True))
    return [
        " ".join(word for word, time in said if start < time < end)
        for start, end in stretches.tolist()
    ]


class TokenAttention(nn.Module):
    """Attention among all tokens (B, N, D), keys ``qkv`` and ``proj``.

    Args:
        dim: channels D.
        heads: divides ``dim``.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, D)."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        return cast(Tensor, self.proj(dispatch_attention(query, key, value).flatten(2)))


class TokenBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside the identity.

    Args:
        dim: channels D.
        heads: divides ``dim``.
        mlp_ratio: hidden over outer channels of the MLP.
        drop_path: chance to drop a branch.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = TokenAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _run(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, x, use_reentrant=False))
    return cast(Tensor, block(x))


class TVTS(nn.Module):
    """The video encoder, a vision transformer on pairs of frames.

    Height and width are padded with zeros right and below to whole patches, an odd number of frames
    by its last one. Clips of any size and length run: see :func:`space_positions` and
    :func:`time_positions`.

    Args:
        dim: channels D of the tokens.
        depth: blocks.
        num_heads: heads, divide ``dim``.
        patch_size: rows and columns of a patch.
        mlp_ratio: hidden over outer channels of the MLPs.
        img_size: rows and columns that the embeddings of places are made for, a multiple of
            ``patch_size``.
        temporal_std: of the embeddings of time at the start. At 0, the published value, nothing tells
            of order before training has moved them; 0.5 sorts sooner.
        in_chans: channels of images or frames.
        num_classes: outputs of the head on the class token; 0 for none.
        frames: ``None`` for images (B, C, H, W), a number for clips (B, C, T, H, W); the embeddings
            of time are made for it, of images for the published 16.
        drop_rate: dropout before the head.
        drop_path_rate: chance to drop a branch of the last block, growing linearly from 0.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        img_size: int = 224,
        temporal_std: float = 0.0,
        *,
        in_chans: int = 3,
        num_classes: int = 0,
        frames: int | None = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole(1, in_chans=in_chans, patch_size=patch_size, depth=depth)
        if img_size < 1 or img_size % patch_size:
            raise ValueError(f"img_size must be a multiple of {patch_size}, got {img_size}")
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be None (images) or at least 1, got {frames}")
        if temporal_std < 0:
            raise ValueError(f"temporal_std must be at least 0, got {temporal_std}")
        self.dim, self.patch_size, self.grad_checkpointing = dim, patch_size, False
        self.in_chans, self.num_classes, self.frames = in_chans, num_classes, frames
        self.num_features = self.head_hidden_size = dim
        pairs = -(-(16 if frames is None else frames) // TUBELET)
        kernel = (TUBELET, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(in_chans, dim, kernel, stride=kernel)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, dim))
        self.temporal_embed = nn.Parameter(torch.zeros(1, pairs, dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(TokenBlock(dim, num_heads, mlp_ratio, r) for r in rates)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = Head(dim, num_classes, drop_rate=drop_rate)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if temporal_std:
            nn.init.normal_(self.temporal_embed, std=temporal_std)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside those of one axis."""
        return {"pos_embed", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number, or a pooling other than the class token.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool must be 'token' or None, got {global_pool!r}")
        self.head.reset(num_classes)
        self.head.to(self.cls_token)  # its own fresh layer knows no dtype
        self.num_classes = num_classes

    def tokenize(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[int]]:
        """Images or clips to tokens with their positions, and the grid they stand in.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for a model of clips.
            keep: (B, pairs, K), int64, as :func:`keep_patches` gives it; pairs of frames beyond the
                clip's are left out. ``None`` for all. Numbers on a GPU are not looked at.

        Returns:
            (B, 1 + L, D) with the class token first, and [pairs, rows, columns].

        Raises:
            ValueError: another shape, or a patch to keep that does not exist.
        """
        rank = 4 if self.frames is None else 5
        if x.ndim != rank or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            axes = "H, W" if self.frames is None else "T, H, W"
            raise ValueError(
                f"x must be (B, {self.in_chans}, {axes}), none of them 0, got {tuple(x.shape)}"
            )
        x = x.unsqueeze(2) if self.frames is None else x
        if x.shape[2] % TUBELET:
            x = torch.cat([x, x[:, :, -1:]], 2)
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.patch_embed["proj"](x)
        grid = list(x.shape[2:])
        place = space_positions(self.pos_embed[:, 1:], grid[1:])
        time = time_positions(self.temporal_embed, grid[0])
        tokens = x.flatten(3).permute(0, 2, 3, 1) + (place[:, None] + time[:, :, None])
        if keep is not None:
            if keep.ndim != 3 or keep.shape[0] != len(x) or keep.shape[1] < grid[0]:
                raise ValueError(
                    f"keep must be ({len(x)}, at least {grid[0]}, K), got {tuple(keep.shape)}"
                )
            if keep.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"keep must be int64, got {keep.dtype}")
            keep, places = keep[:, : grid[0]], tokens.shape[2]
            if may_read(keep) and ((keep < 0) | (keep >= places)).any():
                raise ValueError(
                    f"keep must name patches 0 to {places - 1} of the {grid[1]} x {grid[2]} there "
                    f"are, got {int(keep.min())} to {int(keep.max())}"
                )
            index = keep[..., None].expand(-1, -1, -1, self.dim)
            tokens = tokens.gather(2, index)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens.flatten(1, 2)], 1), grid

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images or clips to tokens (B, 1 + L, D) behind the last norm, the class token first.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for a model of clips.
            keep: see :meth:`tokenize`.

        Raises:
            ValueError: another shape.
        """
        tokens, _ = self.tokenize(x, keep)
        for block in self.blocks:
            tokens = _run(block, tokens, self.grad_checkpointing)
        return cast(Tensor, self.norm(tokens))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What the blocks give, in the grid of the patches and without the class token.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for a model of clips.
            indices: blocks to return; a number n for the last n, ``None`` for all.
            norm: apply the last norm to each.
            stop_early: do not compute past the last asked block.
            output_fmt: ``"NCHW"`` (channels second) or ``"NHWC"`` (last).
            intermediates_only: return only the list.

        Returns:
            (result of :meth:`forward_features`, list of (B, D, H', W') or (B, D, T', H', W')), or
            the list. With ``stop_early`` the first is the tokens where the computation stopped.

        Raises:
            ValueError: a block that does not exist, an unknown format, or another shape of ``x``.
        """
        count = len(self.blocks)
        if output_fmt not in {"NCHW", "NHWC"}:
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        asked = asked_stages(indices, count)
        last = max(asked, default=count - 1) if stop_early else count - 1
        found: dict[int, Tensor] = {}
        tokens, grid = self.tokenize(x)
        for i, block in enumerate(self.blocks):
            if i > last:
                break
            tokens = _run(block, tokens, self.grad_checkpointing)
            if i in asked:
                y = (self.norm(tokens) if norm else tokens)[:, 1:].unflatten(1, grid)
                y = y[:, 0] if self.frames is None else y
                found[i] = y.movedim(-1, 1) if output_fmt == "NCHW" else y
        features = [found[i] for i in asked]
        if intermediates_only:
            return features
        return self.norm(tokens) if last == count - 1 else tokens, features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token of (B, 1 + L, D), then the head; ``pre_logits`` leaves that layer out."""
        return cast(Tensor, self.head(x[:, 0], pre_logits=pre_logits))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), or clips (B, C, T, H, W), to (B, classes), or (B, D) without a head."""
        return self.forward_head(self.forward_features(x, keep))


def sort_loss(logits: Tensor, labels: Tensor | None = None, weight: float = 2.0) -> Tensor:
    """Weighted cross-entropy of the place that is said of each transcript.

    Args:
        logits: (B, K, places), of transcript and place.
        labels: (B, K), int64, place of each transcript; ``None`` for transcripts in their order.
        weight: 2 as published.

    Returns:
        A number, in at least float32; ``weight * log K`` where nothing is known of the order.

    Raises:
        ValueError: other shapes.
    """
    if logits.ndim != 3 or (labels is None and logits.shape[1] > logits.shape[2]):
        raise ValueError(
            "logits must be (B, K, places), without labels of at most as many transcripts K as "
            f"places, got {tuple(logits.shape)}"
        )
    if labels is None:
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:2])} as logits has it, got {tuple(labels.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * F.cross_entropy(wide.flatten(0, 1), labels.flatten())


def alignment_loss(video: Tensor, text: Tensor, temperature: float = 0.05) -> Tensor:
    """Cross-entropy of finding text by video and video by text, by cosine; the two are summed.

    Args:
        video: (B, D), all processes' clips (:func:`gather_rows`).
        text: (B, D), row i belongs to clip i.
        temperature: what cosines are divided by, above 0.

    Returns:
        A number in at least float32, also under autocast: at this temperature half precision tells
        cosines apart in steps of several percent.

    Raises:
        ValueError: shapes that differ, or a temperature that is not above 0.
    """
    return info_nce(video, text, temperature) + info_nce(text, video, temperature)


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes of torch's default group; gradients reach this process's rows alone.

    Args:
        x: (B, D), of one shape in all processes.

    Returns:
        (processes * B, D) in the order of ranks; ``x`` itself where there is no group.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


class TranscriptSorter(nn.Module):
    """Says of each transcript its place in time, from the tokens of the clip.

    Nothing tells it the order in which the transcripts are given: another order gives the same logits
    in that order.

    Args:
        dim: channels D of tokens and texts.
        places: places to choose from, as many as transcripts.
        depth: blocks.
        num_heads: heads, divide ``dim``.

    Raises:
        ValueError: they do not, or fewer than 2 places.
    """

    def __init__(
        self, dim: int = 768, places: int = 4, depth: int = 2, num_heads: int = 12
    ) -> None:
        super().__init__()
        if places < 2:
            raise ValueError(f"places must be at least 2, got {places}")
        self.grad_checkpointing = False
        self.type_embed = nn.Parameter(torch.zeros(1, 2, dim))
        self.blocks = nn.ModuleList(TokenBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, places)

    def forward(self, texts: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, K, places).

        Args:
            texts: (B, K, D), a vector of each transcript. No gradient goes back into them.
            tokens: (B, N, D) of the clip, the class token among them.

        Raises:
            ValueError: other shapes.
        """
        dim = self.type_embed.shape[2]
        fits = texts.ndim == tokens.ndim == 3 and texts.shape[2] == tokens.shape[2] == dim
        if not fits or len(texts) != len(tokens):
            raise ValueError(
                f"texts and tokens must be (B, K, {dim}) and (B, N, {dim}), "
                f"got {tuple(texts.shape)} and {tuple(tokens.shape)}"
            )
        texts = texts.detach() + self.type_embed[:, 1:]
        x = torch.cat([tokens + self.type_embed[:, :1], texts], 1)
        for block in self.blocks:
            x = _run(block, x, self.grad_checkpointing)
        return cast(Tensor, self.head(self.norm(x[:, tokens.shape[1] :])))


@dataclass(frozen=True)
class TVTSOutput:
    """What :class:`TVTSPretraining` says of clips and their transcripts.

    Attributes:
        video: (B, P), embedding of each clip.
        text: (B, P), mean embedding of its transcripts.
        order: (B, K, places), logits of each transcript's place; ``None`` for a single transcript.
    """

    video: Tensor
    text: Tensor
    order: Tensor | None


class TVTSPretraining(nn.Module):
    """Encoder of clips, encoder of texts, and the two tasks that they are trained by.

    Published recipe: AdamW at 1e-4 without decay, 16 frames over four stretches of 3 to 5 seconds one
    second apart (:func:`draw_window`), 75 % of patches dropped (:func:`keep_patches`).

    Args:
        video_model: without a head.
        text_model: a transformers encoder with ``last_hidden_state``, of DistilBERT's kind; its first
            token stands for a transcript.
        projection: channels P in which clips and texts are compared.
        places: transcripts of a clip.
        sort_depth: blocks of :class:`TranscriptSorter`.
        sort_heads: its heads.

    Raises:
        ValueError: encoders of different widths.
    """

    def __init__(
        self,
        video_model: TVTS,
        text_model: nn.Module,
        projection: int = 256,
        places: int = 4,
        sort_depth: int = 2,
        sort_heads: int = 12,
    ) -> None:
        super().__init__()
        width = cast(Any, text_model).config.hidden_size
        if width != video_model.dim:
            raise ValueError(
                f"text_model must have the video model's width {video_model.dim}, got {width}"
            )
        self.text_model, self.video_model = text_model, video_model
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(width, projection))
        self.vid_proj = nn.Sequential(nn.Linear(width, projection))
        self.pred_model = TranscriptSorter(width, places, sort_depth, sort_heads)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of clips and of the sorter in the backward."""
        self.video_model.set_grad_checkpointing(enable)
        self.pred_model.grad_checkpointing = enable

    def encode_transcripts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, K, L) to a vector of each transcript (B, K, D).

        Args:
            input_ids: int64.
            attention_mask: (B, K, L), 0 at padding; ``None`` where there is none.

        Raises:
            ValueError: other shapes.
        """
        if input_ids.ndim != 3:
            raise ValueError(f"input_ids must be (B, K, L), got {tuple(input_ids.shape)}")
        mask = attention_mask
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(input_ids.shape)} as input_ids, "
                f"got {tuple(mask.shape)}"
            )
        ids = input_ids.flatten(0, 1)
        states = self.text_model(ids, attention_mask=None if mask is None else mask.flatten(0, 1))
        first = cast(Tensor, states.last_hidden_state)[:, 0]
        return first.unflatten(0, input_ids.shape[:2])

    def forward(
        self,
        clips: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> TVTSOutput:
        """Embeddings and logits.

        Args:
            clips: (B, C, T, H, W), or (B, C, H, W) for a model of images.
            input_ids: (B, K, L), the transcripts of each clip in any order; K = 1 for a caption.
            attention_mask: (B, K, L).
            keep: see :meth:`TVTS.tokenize`.

        Raises:
            ValueError: other shapes.
        """
        if len(clips) != len(input_ids):
            raise ValueError(
                f"clips and input_ids must hold as many clips, got {len(clips)}, {len(input_ids)}"
            )
        texts = self.encode_transcripts(input_ids, attention_mask)
        tokens = self.video_model.forward_features(clips, keep)
        return TVTSOutput(
            self.vid_proj(tokens[:, 0]),
            self.txt_proj(texts).mean(1),
            self.pred_model(texts, tokens) if texts.shape[1] > 1 else None,
        )

    def loss(
        self, output: TVTSOutput, labels: Tensor | None = None, temperature: float = 0.05
    ) -> Tensor:
        """:func:`alignment_loss` over all processes, plus :func:`sort_loss` where there is an order.

        Args:
            output: of :meth:`forward`.
            labels: (B, K), place of each transcript; ``None`` for transcripts in their order.
            temperature: of the alignment.
        """
        video, text = gather_rows(output.video), gather_rows(output.text)
        loss = alignment_loss(video, text, temperature)
        return loss if output.order is None else loss + sort_loss(output.order, labels)


def convert_tvts_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`TVTS` from the authors' first checkpoints, or of an image transformer.

    Args:
        state: the checkpoint, with or without what a training wraps around it: the authors' whole
            model, of which ``video_model.*`` is taken, or an encoder alone, theirs or one of images
            in timm's and MAE's keys, whose patch kernel is put at both frames, unhalved.

    Returns:
        A state dict; that of an image transformer lacks ``temporal_embed``.
    """
    state = unwrap(state)
    part = "video_model."
    if any(key.startswith(part) for key in state):
        state = {key.removeprefix(part): x for key, x in state.items() if key.startswith(part)}
    found = {
        re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key): x
        for key, x in state.items()
        if not key.startswith(("decoder", "mask_token"))  # of MAE's pre-training
    }
    kernel = found.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        found["patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, TUBELET, 1, 1)
    return found


def convert_tvts_pretraining_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`TVTSPretraining` from the authors' first checkpoints.

    Args:
        state: the checkpoint, with or without what a training wraps around it.

    Returns:
        A state dict that shares its tensors with ``state``.

    Raises:
        ValueError: it lacks the encoder of clips or the sorter.
    """
    state = unwrap(state)
    for part in ("video_model.", "text_model.", "txt_proj.", "vid_proj.", "pred_model."):
        if not any(key.startswith(part) for key in state):
            raise ValueError(f"the checkpoint holds no {part}*: it is not a whole TVTS")
    # older releases of transformers saved this range
    return {key: x for key, x in state.items() if key != "text_model.embeddings.position_ids"}


def _fit_positions(model: TVTS, state: dict[str, Tensor], prefix: str = "") -> None:
    """Bring the embeddings in ``state`` to the model's size of image and number of frames."""
    place, time = f"{prefix}pos_embed", f"{prefix}temporal_embed"
    if place in state:
        side = math.isqrt(model.pos_embed.shape[1] - 1)
        table = state[place]
        state[place] = torch.cat([table[:, :1], space_positions(table[:, 1:], (side, side))], 1)
    if time in state:
        state[time] = time_positions(state[time], model.temporal_embed.shape[1])


def _builder(name: str, sizes: Mapping[str, Any]) -> Callable[..., TVTS]:
    def build(pretrained: str | Path | None = None, **options: Any) -> TVTS:
        model = TVTS(**(dict(sizes) | options))
        if pretrained is not None:
            state = convert_tvts_state_dict(read_weights(pretrained))
            _fit_positions(model, state)
            load_backbone(model, state, first_conv="patch_embed.proj", fresh=("temporal_embed",))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as published, without a head.

    Args:
        pretrained: the authors' weights (first version), or those of an image transformer of the same
            size in timm's or MAE's keys: a file, a folder or ``owner/name`` of a hub repository.
            Embeddings of another size of image or number of frames are fitted.
        options: arguments of :class:`TVTS` that differ from the published model.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
TVTS_MODELS: dict[str, Callable[..., TVTS]] = {"tvts_base": _builder("tvts_base", {})}


def tvts_pretraining(
    pretrained: str | Path | None = None, text_model: nn.Module | None = None, **options: Any
) -> TVTSPretraining:
    """The published model: ``tvts_base`` and a DistilBERT, built without a download.

    Args:
        pretrained: the authors' whole checkpoint (first version), as for ``tvts_base``; ``None`` for
            weights as they are.
        text_model: see :class:`TVTSPretraining`; ``None`` for DistilBERT's base size, fresh.
        options: arguments of :class:`TVTS` that differ.

    Raises:
        ValueError: weights that do not fit.
        FileNotFoundError: ``pretrained`` names nothing that exists.
    """
    if text_model is None:
        from transformers import DistilBertConfig, DistilBertModel

        text_model = DistilBertModel(DistilBertConfig())
    model = TVTSPretraining(TVTS(**options), text_model)
    if pretrained is not None:
        state = convert_tvts_pretraining_state_dict(read_weights(pretrained))
        part = "video_model."
        _fit_positions(model.video_model, state, part)
        load_backbone(model, state, first_conv=f"{part}patch_embed.proj", head=f"{part}head.fc")
    return model
