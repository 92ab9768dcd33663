"""diffusers' image blocks on clips whose frames are folded into the batch.

The modules keep diffusers' parameters, keys, attention processors and adapters. What differs from
their image forward: a group norm may see all frames of a clip, and the time embedding is projected
once a clip.
"""

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from stvision.layers.frames import add_per_clip, group_norm_frames, is_channels_last


class FrameResnetBlock(ResnetBlock2D):
    """A residual block of the image U-Net, applied to every frame of a clip."""

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor | None, frames: int, norm_frames: int
    ) -> Tensor:
        """Transform a clip.

        Args:
            x: (B·T, C, h, w), frames of a clip consecutive.
            temb: (B, D) time embedding, already through the activation unless ``skip_time_act``.
            frames: T.
            norm_frames: frames that share group-norm statistics, T or 1.

        Returns:
            (B·T, C', h, w).
        """
        hidden = self.conv1(self.nonlinearity(group_norm_frames(self.norm1, x, norm_frames)))
        scale = shift = None
        if self.time_emb_proj is not None and temb is not None:
            projected = self.time_emb_proj(temb)
            if self.time_embedding_norm == "scale_shift":
                scale, shift = projected.chunk(2, dim=1)
            else:
                hidden = add_per_clip(hidden, projected, frames)
        hidden = group_norm_frames(self.norm2, hidden, norm_frames)
        if scale is not None and shift is not None:
            folded = hidden.unflatten(0, (scale.shape[0], frames))
            folded = folded * (1 + scale[:, None, :, None, None])
            hidden = (folded + shift[:, None, :, None, None]).flatten(0, 1)
        hidden = self.conv2(self.dropout(self.nonlinearity(hidden)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out = x + hidden
        return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


class FrameTransformer(Transformer2DModel):
    """A spatial transformer of the image U-Net: each frame attends to itself and to its text."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        text: Tensor | None,
        text_bias: Tensor | None,
        norm_frames: int,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Transform a clip.

        Args:
            x: (B·T, C, h, w), frames of a clip consecutive.
            text: (B·T, L, D) text states of each frame.
            text_bias: (B·T, 1, L) added to the scores of the cross-attention, or ``None``.
            norm_frames: frames that share group-norm statistics, T or 1.
            cross_attention_kwargs: handed to the attention processors.

        Returns:
            (B·T, C, h, w).
        """
        n, _, height, width = x.shape
        hidden = group_norm_frames(self.norm, x, norm_frames)
        if not self.use_linear_projection:
            hidden = self.proj_in(hidden)
        tokens = hidden.permute(0, 2, 3, 1).reshape(n, height * width, hidden.shape[1])
        if self.use_linear_projection:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=text,
                encoder_attention_mask=text_bias,
                cross_attention_kwargs=cross_attention_kwargs,
            )
        if self.use_linear_projection:
            tokens = self.proj_out(tokens)
        hidden = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if not is_channels_last(x):
            hidden = hidden.contiguous()
        if not self.use_linear_projection:
            hidden = self.proj_out(hidden)
        return hidden + x


def inflate_blocks(module: nn.Module) -> None:
    """Turn the residual blocks and spatial transformers inside ``module`` into those for clips.

    Their class changes in place; parameters, buffers and keys stay.
    """
    for child in module.modules():
        if type(child) is ResnetBlock2D:
            child.__class__ = FrameResnetBlock
        elif type(child) is Transformer2DModel:
            child.__class__ = FrameTransformer
