"""A Seer pipeline of tiny real components with random weights, none of them an identity."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

from stvision.models.fstext import FSTextDecomposer
from stvision.models.sampling import make_scheduler
from stvision.models.seer import SeerUNetModel
from stvision.pipelines.seer import SeerPipeline

WORDS = [
    "open",
    "close",
    "push",
    "pull",
    "the",
    "a",
    "drawer",
    "door",
    "red",
    "blue",
    "cup",
    "to",
    "left",
    "right",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers, with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=12,
    )


def tiny_stable_diffusion(root: Path, image: dict[str, Any]) -> Path:
    """Write a Stable Diffusion folder of tiny random parts, whose text states have width 16.

    Args:
        root: where.
        image: arguments of the U-Net.
    """
    torch.manual_seed(0)
    UNet2DConditionModel(**image).save_pretrained(root / "unet")
    AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).save_pretrained(root / "vae")
    words = root / "words"
    words.mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "o</w>": 2, "p</w>": 3}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"))
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(root / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(root / "text_encoder")
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root


def _shake(module: nn.Module, scale: float) -> None:
    """Give zero-initialised weights something to do."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=scale)


def tiny_seer_components(seed: int = 0) -> dict:
    """Constructor arguments of a tiny ``SeerPipeline``; pictures of 16 x 16 pixels."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )
    image = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    unet = SeerUNetModel.from_unet2d(image)
    fstext = FSTextDecomposer(dim=16, num_layers=1, num_heads=2, max_frames=8, max_tokens=12)
    _shake(unet, 0.05)
    _shake(fstext, 0.3)
    text_encoder = BertModel(
        BertConfig(
            vocab_size=4 + len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    )
    return {
        "vae": vae.eval(),
        "unet": unet.eval(),
        "fstext": fstext.eval(),
        "scheduler": make_scheduler("sd"),
        "tokenizer": tiny_tokenizer(),
        "text_encoder": text_encoder.eval(),
    }


def tiny_seer_pipeline(seed: int = 0, **options) -> SeerPipeline:
    """A tiny pipeline that makes 5 frames from 2, in 3 steps."""
    defaults = {
        "num_frames": 5,
        "num_reference_frames": 2,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "fps": 4.0,
        "max_text_length": 8,
    }
    pipeline = SeerPipeline(**tiny_seer_components(seed), **{**defaults, **options})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
