"""Frame sequential text decomposer: a sentence into one sub-instruction a frame (Gu et al. 2024)."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stvision.attention.dispatch import check_backend, dispatch_attention
from stvision.attention.volume import AttentionProjections
from stvision.layers.rotary import RotaryEmbedding, apply_rotary


class _SequenceAttention(AttentionProjections):
    """Attention of (N, L, C) to itself or to (N, M, C), optionally causal with rotary positions."""

    def __init__(self, dim: int, heads: int, *, over_time: bool = False) -> None:
        super().__init__(dim, heads)
        self.over_time = over_time
        if over_time:
            self.rotary_emb = RotaryEmbedding(min(32, self.head_dim) // 2 * 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        query, key = self.split_heads(self.to_q(x)), self.split_heads(self.to_k(source))
        if self.over_time:
            table = self.rotary_emb.table(x.shape[1], x)[:, None]
            query = apply_rotary(query, table, overwrite=True)
            key = apply_rotary(key, table, overwrite=True)
        out = dispatch_attention(
            query,
            key,
            self.split_heads(self.to_v(source)),
            is_causal=self.over_time,
            backend=self.backend,
        )
        return self.to_out[0](out.flatten(-2))


class _TextBlock(nn.Module):
    """Tokens of a frame among themselves, then all tokens to the sentence, then feed-forward."""

    def __init__(self, dim: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.attn1 = _SequenceAttention(dim, heads)
        self.ff = FeedForward(dim, mult=ff_mult, activation_fn="geglu")
        self.attn2 = _SequenceAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        batch, frames, length, _ = x.shape
        x = x.flatten(0, 1)
        x = x + self.attn1(self.norm1(x))
        x = x.reshape(batch, frames * length, -1)
        x = x + self.attn2(self.norm2(x), text)
        x = x + self.ff(self.norm3(x))
        return x.unflatten(1, (frames, length))


class _TimeBlock(nn.Module):
    """Each token position over the frames, causally, then feed-forward."""

    def __init__(self, dim: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.attn1 = _SequenceAttention(dim, heads, over_time=True)
        self.ff = FeedForward(dim, mult=ff_mult, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        batch, _, length, _ = x.shape
        x = x.transpose(1, 2).flatten(0, 1)
        x = x + self.attn1(self.norm1(x))
        x = x + self.ff(self.norm3(x))
        return x.unflatten(0, (batch, length)).transpose(1, 2)


class _Layer(nn.Module):
    """A text block, then a time block."""

    def __init__(self, dim: int, heads: int, ff_mult: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            [_TextBlock(dim, heads, ff_mult), _TimeBlock(dim, heads, ff_mult)]
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x, text)
        return x


class FSTextDecomposer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Text states (B, L, D) of a sentence into text states (B, T, L, D) of each frame.

    A fresh model gives every frame the same states, because its query and position embeddings
    start at zero.

    Args:
        dim: width D of the text encoder's states and of the output.
        inner_dim: width inside; ``None`` for ``dim``. Another width adds ``proj_in`` and
            ``proj_out``, for small models.
        num_layers: layers, each one block over the text and one over time.
        num_heads: attention heads.
        ff_mult: width of the feed-forward over ``inner_dim``.
        max_frames: frames of the position embedding; other frame counts read it by nearest
            neighbour.
        max_tokens: longest sentence in tokens.
    """

    config: Any
    _gradient_checkpointing_func: Any
    _supports_gradient_checkpointing = True
    _no_split_modules = (
        "_TextBlock",
        "_TimeBlock",
    )  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = (
        "norm",
        "pos_embed",
        "learnable_query",
    )  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        inner_dim: int | None = None,
        num_layers: int = 8,
        num_heads: int = 8,
        ff_mult: int = 4,
        max_frames: int = 16,
        max_tokens: int = 1024,
    ) -> None:
        super().__init__()
        width = dim if inner_dim is None else inner_dim
        self.learnable_query = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, max_frames, max_tokens, width))
        self.trf_blocks = nn.ModuleList(
            _Layer(width, num_heads, ff_mult) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        projected = width != dim
        self.proj_in = nn.Linear(dim, width) if projected else None
        self.proj_out = nn.Linear(width, dim) if projected else None
        self.gradient_checkpointing = False

    def set_attention_backend(self, backend: str) -> None:
        """Choose how attention is computed: "sdpa", "xformers" or "math"."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, AttentionProjections):
                module.backend = backend

    def forward(self, text_states: Tensor, num_frames: int) -> Tensor:
        """Decompose sentences.

        Args:
            text_states: (B, L, D) states of the text encoder.
            num_frames: T, any number from 1.

        Returns:
            (B, T, L, D).

        Raises:
            ValueError: a shape that does not fit, or a sentence longer than ``max_tokens``.
        """
        if text_states.ndim != 3 or text_states.shape[2] != self.config.dim:
            raise ValueError(
                f"text_states must be (B, L, {self.config.dim}), got shape "
                f"{tuple(text_states.shape)}"
            )
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        batch, length, _ = text_states.shape
        if length > self.pos_embed.shape[2]:
            raise ValueError(
                f"text_states hold {length} tokens, but max_tokens is {self.pos_embed.shape[2]}"
            )
        position = self.pos_embed[:, :, :length]
        if num_frames != position.shape[1]:
            position = F.interpolate(position.permute(0, 3, 1, 2), size=(num_frames, length))
            position = position.permute(0, 2, 3, 1)
        x = (self.learnable_query + position).expand(batch, -1, -1, -1)
        text = text_states if self.proj_in is None else self.proj_in(text_states)
        for layer in self.trf_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(layer, x, text)
            else:
                x = layer(x, text)
        x = self.norm(x)
        return x if self.proj_out is None else self.proj_out(x)


def identity_loss(frame_states: Tensor, text_states: Tensor) -> Tensor:
    """Mean squared error of the frames' mean to the sentence, the decomposer's pre-initialisation.

    Args:
        frame_states: (B, T, L, D), output of :class:`FSTextDecomposer`.
        text_states: (B, L, D), its input; no gradient flows into it.

    Returns:
        Scalar.
    """
    return F.mse_loss(frame_states.mean(dim=1), text_states.detach())
