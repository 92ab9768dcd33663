"""Key layout and sizes of the full Stable Diffusion 1.5 layout, on the meta device."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from stvision.models.fstext import FSTextDecomposer
from stvision.models.seer import SeerUNetModel

WIDTHS = (320, 640, 1280, 1280)


def temporal_shapes(width: int) -> dict[str, tuple[int, ...]]:
    inner = "transformer_blocks.0."
    return {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "proj_in.weight": (width, width, 1, 1),
        "proj_in.bias": (width,),
        "proj_out.weight": (width, width, 1, 1),
        "proj_out.bias": (width,),
        inner + "attn1.to_q.weight": (width, width),
        inner + "attn1.to_k.weight": (width, width),
        inner + "attn1.to_v.weight": (width, width),
        inner + "attn1.to_out.0.weight": (width, width),
        inner + "attn1.to_out.0.bias": (width,),
        inner + "attn1.rotary_emb.freqs": (16,),
        inner + "norm1.weight": (width,),
        inner + "norm1.bias": (width,),
        inner + "norm3.weight": (width,),
        inner + "norm3.bias": (width,),
        inner + "ff.net.0.proj.weight": (8 * width, width),
        inner + "ff.net.0.proj.bias": (8 * width,),
        inner + "ff.net.2.weight": (width, 4 * width),
        inner + "ff.net.2.bias": (width,),
    }


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        image = UNet2DConditionModel(cross_attention_dim=768)
        return image, SeerUNetModel(cross_attention_dim=768), FSTextDecomposer()


def test_unet_keys_are_the_image_unets_and_the_temporal_ones(models) -> None:
    image, video, _ = models
    expected = {key: tuple(value.shape) for key, value in image.state_dict().items()}
    places = [(f"down_blocks.{i}", 2, WIDTHS[i]) for i in range(3)]
    places += [("mid_block", 1, 1280)]
    places += [(f"up_blocks.{i}", 3, WIDTHS[3 - i]) for i in range(1, 4)]
    assert sum(count for _, count, _ in places) == 16
    for block, count, width in places:
        for index in range(count):
            for key, shape in temporal_shapes(width).items():
                expected[f"{block}.temporal_attentions.{index}.{key}"] = shape
    assert {key: tuple(value.shape) for key, value in video.state_dict().items()} == expected


def test_sizes_are_the_published_ones(models) -> None:
    _, video, fstext = models

    def millions(parameters) -> float:
        return round(sum(p.numel() for p in parameters) / 1e6, 1)

    assert millions(video.parameters()) == 1082.8
    assert millions(video.temporal_parameters()) == 223.3
    assert millions(fstext.parameters()) == 182.6


def test_fstext_keys(models) -> None:
    width = 768
    expected = {
        "learnable_query": (1, 1, 1, width),
        "pos_embed": (1, 16, 1024, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for layer in range(8):
        for block, attentions, norms in ((0, (1, 2), (1, 2, 3)), (1, (1,), (1, 3))):
            prefix = f"trf_blocks.{layer}.transformer_blocks.{block}."
            for a in attentions:
                for name in ("to_q", "to_k", "to_v", "to_out.0"):
                    expected[f"{prefix}attn{a}.{name}.weight"] = (width, width)
                expected[f"{prefix}attn{a}.to_out.0.bias"] = (width,)
            for n in norms:
                expected[f"{prefix}norm{n}.weight"] = expected[f"{prefix}norm{n}.bias"] = (width,)
            expected[prefix + "ff.net.0.proj.weight"] = (8 * width, width)
            expected[prefix + "ff.net.0.proj.bias"] = (8 * width,)
            expected[prefix + "ff.net.2.weight"] = (width, 4 * width)
            expected[prefix + "ff.net.2.bias"] = (width,)
        expected[f"trf_blocks.{layer}.transformer_blocks.1.attn1.rotary_emb.freqs"] = (16,)
    found = {key: tuple(value.shape) for key, value in models[2].state_dict().items()}
    assert found == expected


def test_heads_follow_the_image_attention(models) -> None:
    _, video, _ = models
    heads = {
        re.sub(r"\.\d+\.transformer.*", "", name): module.heads
        for name, module in video.named_modules()
        if name.endswith("attn1") and "temporal" in name
    }
    assert set(heads.values()) == {8}
