"""Text towers of open_clip models as transformers' CLIP text encoders.

open_clip (Ilharco et al. 2021) and transformers write the same network (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", ICML 2021, section 2.4) with other
names: one matrix for query, key and value against three, and one table of positions. A converted
encoder is saved, loaded and run as any other; open_clip is needed for the conversion alone.
"""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stvision.optional import mend_torchvision, require

#: What a name of an open_clip text encoder begins with.
PREFIX = "open_clip:"
#: What open_clip itself reads configuration and weights from; such names have no tag.
SCHEMES = ("local-dir:", "hf-hub:")


def parse_open_clip(name: str) -> tuple[str, str | None]:
    """Model and weights of a name such as ``open_clip:RN50/openai`` or ``open_clip:RN50/clip.pt``.

    Args:
        name: ``open_clip:MODEL/TAG``, ``open_clip:MODEL/FILE`` (an absolute path stands behind two
            slashes), ``open_clip:local-dir:FOLDER`` or ``open_clip:hf-hub:OWNER/NAME``.

    Returns:
        open_clip's own name of the model, and tag or file of the weights; None for the last two.

    Raises:
        ValueError: no such form.
    """
    model = name.removeprefix(PREFIX)
    if model.startswith(SCHEMES):
        return model, None
    model, _, weights = model.partition("/")
    if not name.startswith(PREFIX) or not model or not weights:
        raise ValueError(
            f"text encoder {name!r} must be open_clip:MODEL/WEIGHTS, where WEIGHTS is a tag such as "
            "'openai' or a file, or open_clip:local-dir:FOLDER or open_clip:hf-hub:OWNER/NAME"
        )
    return model, weights


def load_open_clip_text(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the text tower of an open_clip model.

    Sentences are padded with the token that ends them, as Stable Diffusion 1 does; open_clip pads
    with the token of "!". The states of a sentence's own tokens do not depend on it.

    Args:
        name: see :func:`parse_open_clip`.
        dtype: of the weights.

    Returns:
        ``(tokenizer, text_encoder)``: ``CLIPTokenizer`` and ``CLIPTextModel``, in evaluation mode,
        without gradients.

    Raises:
        ImportError: open_clip is not installed; the sentence holds the installing command.
        ValueError: no such model or weights, or a text tower of another kind.
    """
    model_name, weights = parse_open_clip(name)
    mend_torchvision()
    library = require("open_clip", extra="vision", distribution="open_clip_torch", pinned=True)
    if weights is not None and not Path(weights).is_file():
        _check_tag(library, model_name, weights)
    try:
        model = library.create_model(model_name, pretrained=weights, require_pretrained=True)
        tokenizer = library.get_tokenizer(model_name)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"open_clip cannot load {name!r}: {error}") from error
    return as_clip_tokenizer(tokenizer, name), as_clip_text_model(model, name).to(dtype)


def _check_tag(library: Any, model: str, tag: str) -> None:
    models = library.list_models()
    if model not in models:
        near = get_close_matches(model, models, n=3, cutoff=0.4)
        raise ValueError(f"open_clip has no model {model!r}; near names: {', '.join(near)}")
    tags = library.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise ValueError(
            f"{tag!r} is neither a file nor weights that open_clip knows for {model}: "
            f"{', '.join(tags) or 'none'}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if offline and not library.get_pretrained_cfg(model, tag).get("hf_hub"):
        raise ValueError(
            f"HF_HUB_OFFLINE is set, and open_clip has {model} {tag} from no hub; download the file "
            f"and give open_clip:{model}/FILE"
        )


def as_clip_tokenizer(tokenizer: Any, name: str) -> Any:
    """open_clip's byte-pair tokenizer as a transformers ``CLIPTokenizer`` with the same ids.

    Raises:
        ValueError: a tokenizer of another kind, as models with other text towers have.
    """
    from transformers import CLIPTokenizer

    if not hasattr(tokenizer, "bpe_ranks") or not hasattr(tokenizer, "encoder"):
        raise ValueError(f"{name}: its tokenizer, {type(tokenizer).__name__}, is not CLIP's")
    vocabulary = dict(tokenizer.encoder)
    start, end = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary["<|startoftext|>"] = vocabulary.pop(start)
    vocabulary["<|endoftext|>"] = vocabulary.pop(end)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(tokenizer.bpe_ranks),
        model_max_length=tokenizer.context_length,
    )


def as_clip_text_model(model: nn.Module, name: str) -> Any:
    """The text tower of an open_clip model as a transformers ``CLIPTextModel``, in float32.

    Args:
        model: with the tower's parts in itself or under ``text``.
        name: for error sentences.

    Raises:
        ValueError: the tower is not CLIP's causal transformer.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tower: Any = getattr(model, "text", model)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "attn_mask")
    plain = all(getattr(tower, part, None) is not None for part in parts)
    if not plain or getattr(tower, "cls_emb", None) is not None:
        raise ValueError(f"{name}: its text tower, {type(tower).__name__}, is not CLIP's")
    blocks = list(tower.transformer.resblocks)
    activation = type(blocks[0].mlp[1]).__name__
    vocabulary, width = tower.token_embedding.weight.shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=blocks[0].mlp[0].out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=len(tower.positional_embedding),
        hidden_act={"GELU": "gelu", "QuickGELU": "quick_gelu"}[activation],
        layer_norm_eps=tower.ln_final.eps,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    encoder: Any = CLIPTextModel(config)
    state = dict(_renamed(tower, blocks))
    # the same names with and without the inner module that older releases of transformers have
    inner = "text_model." if any(k.startswith("text_model.") for k in encoder.state_dict()) else ""
    try:
        encoder.load_state_dict({inner + key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{name}: its text tower is not CLIP's: {error}") from error
    return encoder.eval().requires_grad_(False)


def _renamed(tower: Any, blocks: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the tower under the names that transformers gives them."""
    yield "embeddings.token_embedding.weight", tower.token_embedding.weight
    yield "embeddings.position_embedding.weight", tower.positional_embedding
    for number, block in enumerate(blocks):
        place = f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            joined = getattr(block.attn, f"in_proj_{kind}")
            for letter, part in zip("qkv", joined.chunk(3), strict=True):
                yield f"{place}.self_attn.{letter}_proj.{kind}", part
            modules = {
                "self_attn.out_proj": block.attn.out_proj,
                "layer_norm1": block.ln_1,
                "layer_norm2": block.ln_2,
                "mlp.fc1": block.mlp[0],
                "mlp.fc2": block.mlp[-1],
            }
            for target, module in modules.items():
                yield f"{place}.{target}.{kind}", getattr(module, kind)
    for kind in ("weight", "bias"):
        yield f"final_layer_norm.{kind}", getattr(tower.ln_final, kind)
