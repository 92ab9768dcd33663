"""Seer: a text-to-image U-Net inflated to predict video (Gu et al. 2024, ICLR)."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from stvision.attention.dispatch import check_backend, load_xformers
from stvision.attention.volume import AttentionProjections
from stvision.layers.frames import group_norm_frames
from stvision.models.inflate import inflate_blocks
from stvision.models.swap import SwapTransformer, asking
from stvision.models.temporal import TemporalTransformer

#: block types of an image U-Net that can be inflated
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

#: values of ``temporal``
TEMPORALS = ("transformer", "swap")

#: values of ``skip_reference_ff``
SKIP_REFERENCE_FF = ("never", "training", "always")


@dataclass
class SeerUNetOutput(BaseOutput):
    """Output of :class:`SeerUNetModel`.

    Args:
        sample: (B, C, T, h, w) prediction for every frame, reference frames included.
    """

    sample: Tensor


class SeerUNetModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Image U-Net with per-frame image layers and a temporal transformer after each spatial one.

    State-dict keys are those of diffusers' ``UNet2DConditionModel`` plus
    ``{down_blocks.i|mid_block|up_blocks.i}.temporal_attentions.j.*``. All arguments that are not
    listed here mean what they mean in ``UNet2DConditionModel``.

    Args:
        attention: temporal mechanism, a name in :data:`stvision.attention.ATTENTIONS`.
        attention_kwargs: options of that mechanism.
        temporal_layers: transformer blocks in each temporal transformer, or pairs of a temporal
            branch and a Swap-CA.
        temporal_heads: heads of temporal attention; default as many as the image attention of
            the same block.
        norm_over_frames: statistics of group norms over (T, h, w) jointly, as in the authors'
            weights; ``False`` for each frame by itself.
        skip_reference_ff: when the temporal feed-forward leaves the first ``cond_frames`` frames
            as they are: "never" (as at the authors' inference), "training" (as in the authors'
            training) or "always".
        temporal: what follows each spatial transformer: Seer's "transformer", or "swap" for a
            temporal branch joined by swapped cross-attention
            (:class:`stvision.models.swap.SwapTransformer`); the asking branch alternates from one
            to the next in order of evaluation.
        temporal_kwargs: options of "swap": ``window``, ``shift``, ``ff_mult``, ``kernel_size``,
            ``causal``, ``rotary_dim``.
    """

    config: Any
    _gradient_checkpointing_func: Any
    _supports_gradient_checkpointing = True
    _no_split_modules = (
        "BasicTransformerBlock",
        "FrameResnetBlock",
        "TemporalTransformer",
        "SwapTransformer",
    )  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ("norm",)  # type: ignore[assignment]
    _repeated_blocks = ("BasicTransformerBlock", "TemporalBlock", "SwapBlock")  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 768,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        attention_head_dim: int | tuple[int, ...] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        timestep_post_act: str | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        attention: str = "seer-window",
        attention_kwargs: dict[str, Any] | None = None,
        temporal_layers: int = 1,
        temporal_heads: int | None = None,
        norm_over_frames: bool = True,
        skip_reference_ff: str = "never",
        temporal: str = "transformer",
        temporal_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_blocks(down_block_types, mid_block_type, up_block_types)
        if skip_reference_ff not in SKIP_REFERENCE_FF:
            raise ValueError(
                f"skip_reference_ff must be one of {', '.join(map(repr, SKIP_REFERENCE_FF))}, "
                f"got {skip_reference_ff!r}"
            )
        _check_temporal(temporal, temporal_kwargs, attention, attention_kwargs)
        image: Any = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            down_block_types=tuple(down_block_types),
            mid_block_type=mid_block_type,
            up_block_types=tuple(up_block_types),
            only_cross_attention=only_cross_attention,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            downsample_padding=downsample_padding,
            mid_block_scale_factor=mid_block_scale_factor,
            dropout=dropout,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            attention_head_dim=attention_head_dim,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            resnet_time_scale_shift=resnet_time_scale_shift,
            resnet_skip_time_act=resnet_skip_time_act,
            resnet_out_scale_factor=resnet_out_scale_factor,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            timestep_post_act=timestep_post_act,
            conv_in_kernel=conv_in_kernel,
            conv_out_kernel=conv_out_kernel,
        )
        for name, child in image.named_children():
            self.add_module(name, child)
        if mid_block_type is None:  # named_children leaves it out
            self.mid_block = None
        inflate_blocks(self)
        self.time_activation = get_activation(act_fn)
        site = 0
        for block in self._attention_blocks():
            transformers: list[nn.Module] = []
            for module in cast(list[Any], block.attentions):
                heads = temporal_heads or module.num_attention_heads
                if temporal == "swap":
                    made: nn.Module = SwapTransformer(
                        module.inner_dim,
                        heads,
                        num_layers=temporal_layers,
                        first_query=asking(site * temporal_layers),
                        norm_num_groups=norm_num_groups,
                        **(temporal_kwargs or {}),
                    )
                else:
                    made = TemporalTransformer(
                        module.inner_dim,
                        heads,
                        attention=attention,
                        attention_kwargs=attention_kwargs,
                        num_layers=temporal_layers,
                        norm_num_groups=norm_num_groups,
                    )
                transformers.append(made)
                site += 1
            block.temporal_attentions = nn.ModuleList(transformers)
        self.gradient_checkpointing = False

    @classmethod
    def inflated_config(cls, image_config: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Constructor arguments that inflate an image U-Net of this configuration.

        Args:
            image_config: configuration of a ``UNet2DConditionModel``.
            options: arguments that it has not, or that replace its own.

        Raises:
            ValueError: the image U-Net has a part that this one has no place for.
        """
        known = set(inspect.signature(cls.__init__).parameters)
        image_options = inspect.signature(UNet2DConditionModel.__init__).parameters
        config: dict[str, Any] = {}
        for name, value in image_config.items():
            if name in known:
                config[name] = value
            elif name in image_options and value not in (None, image_options[name].default):
                same_heads = (
                    name == "num_attention_heads" and value == image_config["attention_head_dim"]
                )
                # without effect unless addition_embed_type is set
                idle = name in {"addition_time_embed_dim", "addition_embed_type_num_heads"}
                if not same_heads and not idle:
                    raise ValueError(
                        f"an image U-Net with {name}={value!r} cannot be inflated: this model has "
                        "no place for it"
                    )
        return {**config, **options}

    @classmethod
    def from_unet2d(cls, unet2d: Any, **options: Any) -> "SeerUNetModel":
        """Inflate an image U-Net; its weights are copied, temporal layers are fresh identities.

        Args:
            unet2d: any diffusers ``UNet2DConditionModel`` of the Stable Diffusion 1.x or 2.x kind, of any
                size: down, middle and up blocks with or without cross-attention, linear or
                convolutional projections, one head count or one a block.
            options: arguments of this class that the image U-Net has not (``attention``,
                ``attention_kwargs``, ``temporal_layers``, ``temporal_heads``,
                ``norm_over_frames``, ``skip_reference_ff``, ``temporal``, ``temporal_kwargs``) or
                that replace its own.

        Returns:
            Model on the device and in the dtype of ``unet2d``.

        Raises:
            ValueError: the image U-Net has a part that this one has no place for.
        """
        model = cls(**cls.inflated_config(dict(unet2d.config), **options))
        missing, extra = model.load_state_dict(unet2d.state_dict(), strict=False)
        missing = [key for key in missing if "temporal_attentions." not in key]
        if missing or extra:
            raise ValueError(
                f"the image U-Net does not fit its own configuration: missing {missing[:3]}, "
                f"unexpected {extra[:3]}"
            )
        weight = unet2d.conv_in.weight
        # the plain method: diffusers' own warns about casting whenever a dtype is given
        return nn.Module.to(model, device=weight.device, dtype=weight.dtype)

    def _blocks(self) -> list[Any]:
        middle: list[Any] = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *middle, *self.up_blocks]

    def _attention_blocks(self) -> Iterator[Any]:
        for block in self._blocks():
            if len(getattr(block, "attentions", ())) > 0:
                yield block

    def temporal_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the temporal transformers, the ones that are trained."""
        for name, parameter in self.named_parameters():
            if "temporal_attentions." in name:
                yield parameter

    def freeze_image_layers(self) -> None:
        """Let only the temporal transformers receive gradients."""
        self.requires_grad_(False)
        for parameter in self.temporal_parameters():
            parameter.requires_grad_(True)

    def set_attention_backend(self, backend: str) -> None:
        """Choose how image and temporal attention are computed.

        Args:
            backend: "sdpa", "xformers" (needs a CUDA device) or "math" (written out).

        Raises:
            ValueError: unknown name.
            ImportError: xFormers is chosen and missing.
        """
        check_backend(backend)
        if backend == "xformers":
            load_xformers()  # diffusers' processor would fail late and without a reason
        processors = {
            "sdpa": AttnProcessor2_0,
            "xformers": XFormersAttnProcessor,
            "math": AttnProcessor,
        }
        if self.attn_processors:
            self.set_attn_processor(processors[backend]())
        for module in self.modules():
            if isinstance(module, AttentionProjections):
                module.backend = backend

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def _text(
        self, states: Tensor | None, mask: Tensor | None, sample: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text states (B·T, L, D) and score bias (B·T, 1, L) of each frame."""
        batch, frames = sample.shape[0], sample.shape[2]
        if states is None:
            if next(self._attention_blocks(), None) is not None:
                raise ValueError("encoder_hidden_states is needed: this U-Net has cross-attention")
            return None, None
        if states.ndim == 3:
            states = states[:, None].expand(-1, frames, -1, -1)
        if states.ndim != 4 or states.shape[:2] != (batch, frames):
            raise ValueError(
                f"encoder_hidden_states must be (B, L, D) or (B, T, L, D) with B={batch} and "
                f"T={frames}, got shape {tuple(states.shape)}"
            )
        bias = None
        if mask is not None:
            if mask.ndim == 2:
                mask = mask[:, None].expand(-1, frames, -1)
            if mask.shape != states.shape[:3]:
                raise ValueError(
                    "encoder_attention_mask must be (B, L) or (B, T, L) for text states "
                    f"{tuple(states.shape)}, got shape {tuple(mask.shape)}"
                )
            bias = (1 - mask.flatten(0, 1).to(sample.dtype))[:, None] * -10000.0
        return states.flatten(0, 1), bias

    def _time_embedding(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """(B, D) embedding of the timestep that all frames of a clip share."""
        if not torch.is_tensor(timestep):
            dtype = torch.float32 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
        timestep = timestep.to(sample.device).reshape(-1)
        if timestep.shape[0] not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be one number or one a clip ({sample.shape[0]}), got "
                f"{timestep.shape[0]}"
            )
        embedding = self.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype)
        embedding = self.time_embedding(embedding)
        # every block starts with this activation: once for all of them
        return embedding if self.config.resnet_skip_time_act else self.time_activation(embedding)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        *,
        cond_frames: int = 0,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SeerUNetOutput | tuple[Tensor]:
        """Predict the noise (or whatever the scheduler's prediction type names) of a clip.

        Args:
            sample: (B, C, T, h, w) latents: clean reference frames first, then noisy ones.
            timestep: one number or (B,); all frames of a clip share it.
            encoder_hidden_states: (B, T, L, D) text states of each frame, or (B, L, D) shared.
            cond_frames: number of clean reference frames; matters for ``skip_reference_ff`` only.
            encoder_attention_mask: (B, L) or (B, T, L), 1 or ``True`` where a text token counts.
            cross_attention_kwargs: handed to the image attention's processors.
            return_dict: return :class:`SeerUNetOutput` instead of a tuple.

        Returns:
            Prediction (B, C', T, h, w); that of the reference frames is without meaning.

        Raises:
            ValueError: a shape that does not fit.
        """
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must be (B, {self.config.in_channels}, T, h, w), got shape "
                f"{tuple(sample.shape)}"
            )
        batch, _, frames = sample.shape[:3]
        if not 0 <= cond_frames <= frames:
            raise ValueError(f"cond_frames must be between 0 and {frames}, got {cond_frames}")
        norm_frames = frames if self.config.norm_over_frames else 1
        skip = self.config.skip_reference_ff
        skip_frames = cond_frames if skip == "always" or skip == "training" and self.training else 0
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. what every frame is told: the time and the text
        temb = self._time_embedding(timestep, sample)
        text, bias = self._text(encoder_hidden_states, encoder_attention_mask, sample)

        def layer(block: Any, index: int, x: Tensor) -> Tensor:
            """Spatial transformer ``index`` of a block, then its temporal one."""
            x = self._run(
                block.attentions[index], x, text, bias, norm_frames, cross_attention_kwargs
            )
            temporal = block.temporal_attentions[index]
            return self._run(temporal, x, frames, norm_frames, skip_frames)

        # 2. frames into the batch, once
        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))

        # 3. down
        skips = [x]
        for block in self.down_blocks:
            attends = hasattr(block, "attentions")
            for index, resnet in enumerate(block.resnets):
                x = self._run(resnet, x, temb, frames, norm_frames)
                if attends:
                    x = layer(block, index, x)
                skips.append(x)
            for sampler in block.downsamplers or ():
                x = sampler(x)
                skips.append(x)

        # 4. middle
        if self.mid_block is not None:
            x = self._run(self.mid_block.resnets[0], x, temb, frames, norm_frames)
            for index, resnet in enumerate(self.mid_block.resnets[1:]):
                x = layer(self.mid_block, index, x)
                x = self._run(resnet, x, temb, frames, norm_frames)

        # 5. up
        for block in self.up_blocks:
            attends = hasattr(block, "attentions")
            for index, resnet in enumerate(block.resnets):
                x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(resnet, x, temb, frames, norm_frames)
                if attends:
                    x = layer(block, index, x)
            for sampler in block.upsamplers or ():
                target = skips[-1].shape[2:]
                double = (2 * x.shape[2], 2 * x.shape[3]) == tuple(target)
                x = sampler(x) if double else sampler(x, target)

        # 6. head
        x = self.conv_out(self.conv_act(group_norm_frames(self.conv_norm_out, x, norm_frames)))
        out = x.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()
        return SeerUNetOutput(sample=out) if return_dict else (out,)


def _check_blocks(down: tuple[str, ...], mid: str | None, up: tuple[str, ...]) -> None:
    for name, given, allowed in (
        ("down_block_types", down, DOWN_BLOCKS),
        ("mid_block_type", (mid,), MID_BLOCKS),
        ("up_block_types", up, UP_BLOCKS),
    ):
        for kind in given:
            if kind not in allowed:
                raise ValueError(
                    f"{name} may hold {', '.join(map(repr, allowed))}, but {kind!r} cannot be "
                    "inflated"
                )


def _check_temporal(
    temporal: str, options: dict[str, Any] | None, attention: str, attention_options: Any
) -> None:
    if temporal not in TEMPORALS:
        raise ValueError(
            f"temporal must be one of {', '.join(map(repr, TEMPORALS))}, got {temporal!r}"
        )
    if temporal == "transformer":
        if options:
            raise ValueError("temporal_kwargs are options of temporal='swap'; leave them out")
        return
    if attention != "seer-window" or attention_options:
        raise ValueError(
            "attention and attention_kwargs choose the mechanism of temporal='transformer'; "
            "give temporal_kwargs with temporal='swap'"
        )
    allowed = {"window", "shift", "ff_mult", "kernel_size", "causal", "rotary_dim"}
    unknown = sorted(set(options or {}) - allowed)
    if unknown:
        raise ValueError(
            f"temporal_kwargs may hold {', '.join(sorted(allowed))}, got {unknown[0]!r}"
        )
