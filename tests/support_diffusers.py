"""diffusers' video pipelines, built tiny with random weights, and arguments to call them with."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet3DConditionModel
from PIL import Image
from support_guidance import tiny_motion_unet
from support_seer import tiny_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

SIZE = 16
PICTURE = Image.new("RGB", (SIZE, SIZE), (90, 140, 20))


def video(frames: int) -> list[Image.Image]:
    return [Image.new("RGB", (SIZE, SIZE), (90, 20 * i, 0)) for i in range(frames)]


def tiny_unet_3d(kind: Any = UNet3DConditionModel, sample_size: int = 8) -> Any:
    torch.manual_seed(0)
    return kind(
        sample_size=sample_size,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=32,
        norm_num_groups=4,
    ).eval()


def _text(kind: Any = CLIPTextModel) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=12, projection_dim=8,
        )
    ).eval()  # fmt: skip


def _common(unet: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    return {
        "vae": vae,
        "text_encoder": _text(),
        "tokenizer": tiny_tokenizer(),
        "unet": unet,
        "scheduler": DDIMScheduler(num_train_timesteps=100),
    }


def _with_motion(**unet_options: Any) -> dict[str, Any]:
    adapter = MotionAdapter(
        block_out_channels=(8,), motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=2,
    )  # fmt: skip
    return {**_common(tiny_motion_unet(**unet_options)), "motion_adapter": adapter}


def _controlnet(kind: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    net = kind(
        block_out_channels=(8, 8, 8), layers_per_block=1, in_channels=4, cross_attention_dim=8,
        norm_num_groups=2, **options,
    )  # fmt: skip
    for parameter in net.parameters():  # its last convolutions start at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


DOWN_2D = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")


def _image_encoder() -> Any:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=SIZE, patch_size=8, projection_dim=8,
        )
    ).eval()  # fmt: skip


def components(name: str) -> dict[str, Any]:
    """Constructor arguments of the pipeline ``name``."""
    if name in ("TextToVideoSDPipeline", "VideoToVideoSDPipeline"):
        return _common(tiny_unet_3d())
    if name == "I2VGenXLPipeline":
        return {
            **_common(tiny_unet_3d(diffusers.I2VGenXLUNet)),
            "image_encoder": _image_encoder(),
            "feature_extractor": CLIPImageProcessor(
                crop_size={"height": SIZE, "width": SIZE}, size={"shortest_edge": SIZE}
            ),
        }
    if name == "PIAPipeline":
        return _with_motion(in_channels=9)
    if name == "AnimateDiffSDXLPipeline":
        parts = _with_motion(
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        )
        return {
            **parts,
            "text_encoder_2": _text(CLIPTextModelWithProjection),
            "tokenizer_2": tiny_tokenizer(),
        }
    parts = _with_motion()
    if name == "AnimateDiffSparseControlNetPipeline":
        parts["controlnet"] = _controlnet(
            diffusers.SparseControlNetModel,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
            conditioning_embedding_out_channels=(8, 8),
            concat_conditioning_mask=True,
            use_simplified_condition_embedding=True,
        )
    elif "ControlNet" in name:
        parts["controlnet"] = _controlnet(
            diffusers.ControlNetModel,
            attention_head_dim=2,
            down_block_types=DOWN_2D,
            conditioning_embedding_out_channels=(8, 8),
        )
    return parts


def tiny_video_pipeline(name: str) -> Any:
    """The pipeline ``name`` of diffusers, 16 x 16 pixels, 8 x 8 latents."""
    pipe = getattr(diffusers, name)(**components(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(name: str, frames: int) -> dict[str, Any]:
    """Arguments of a call that makes ``frames`` frames."""
    arguments: dict[str, Any] = {"prompt": "open the door"}
    if "VideoToVideo" in name:
        arguments |= {"video": video(frames), "strength": 0.5}
        if name == "VideoToVideoSDPipeline":
            return arguments
    else:
        arguments["num_frames"] = frames
    if "ControlNet" in name:
        sparse = "Sparse" in name
        arguments["conditioning_frames"] = video(2 if sparse else frames)
        if sparse:
            arguments["controlnet_frame_indices"] = [0, frames - 1]
    if name in ("PIAPipeline", "I2VGenXLPipeline"):
        arguments["image"] = PICTURE
    return {**arguments, "height": SIZE, "width": SIZE}
