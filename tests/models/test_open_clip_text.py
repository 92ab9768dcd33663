"""open_clip's text towers as transformers encoders, beside the same network written here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stvision.models.open_clip_text import (
    as_clip_text_model,
    as_clip_tokenizer,
    load_open_clip_text,
    parse_open_clip,
)
from stvision.models.text import encode_text, load_text
from stvision.pipelines.seer import SeerPipeline


class Block(nn.Module):
    """A residual attention block with open_clip's names."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), activation, nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    """The text part of an open_clip model."""

    def __init__(self, activation: nn.Module, width: int = 16, length: int = 9) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(12, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, activation) for _ in range(2))
        self.ln_final = nn.LayerNorm(width)
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def states(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, self.attn_mask)
        return self.ln_final(x)


#: letters, letters that end a word, one merge, and the two special tokens
LETTERS = ["a", "b", "!", "a</w>", "b</w>", "!</w>", "ab</w>", "x", "x</w>", "y"]
TOKENS = SimpleNamespace(
    encoder={word: i for i, word in enumerate([*LETTERS, "<start_of_text>", "<end_of_text>"])},
    bpe_ranks={("a", "b</w>"): 0},
    context_length=9,
)


@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
@pytest.mark.parametrize("nested", [False, True])
def test_states_equal_those_of_the_tower(activation, nested: bool) -> None:
    torch.manual_seed(0)
    tower = Tower(activation()).eval()
    model = nn.ModuleDict({"text": tower}) if nested else tower
    if nested:
        model.text = tower
    encoder = as_clip_text_model(model, "tiny")
    ids = torch.randint(0, 11, (3, 9))
    ids[:, -1] = 11
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(ids).last_hidden_state, tower.states(ids), atol=1e-5, rtol=1e-5
        )
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_tokens_have_the_same_numbers(tmp_path) -> None:
    tokenizer = as_clip_tokenizer(TOKENS, "tiny")
    # <start> ab</w> b a</w> !</w> <end>, then the token that ends a sentence once more
    row = tokenizer("AB ba!", padding="max_length", max_length=9)
    assert row.input_ids == [10, 6, 1, 3, 5, 11, 11, 11, 11]
    assert row.attention_mask == [1] * 6 + [0] * 3 and tokenizer.model_max_length == 9
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("AB ba!").input_ids == tokenizer("AB ba!").input_ids


@pytest.fixture
def library(monkeypatch) -> ModuleType:
    """A library called open_clip with one tiny model."""
    made = ModuleType("open_clip")

    def create_model(name: str, pretrained: str | None, require_pretrained: bool) -> nn.Module:
        assert require_pretrained
        if name == "local-dir:/nowhere":
            raise RuntimeError("no such folder")
        torch.manual_seed(3)
        return Tower(nn.GELU())

    made.create_model = create_model
    made.get_tokenizer = lambda name: TOKENS
    made.list_models = lambda: ["RN50", "RN101"]
    made.list_pretrained_tags_by_model = lambda name: ["openai"]
    made.get_pretrained_cfg = lambda name, tag: {"url": "https://example.org/RN50.pt"}
    monkeypatch.setitem(sys.modules, "open_clip", made)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return made


def test_a_pipeline_takes_the_encoder_by_name(library, tmp_path) -> None:
    from support_seer import tiny_seer_components

    parts = tiny_seer_components()
    del parts["tokenizer"], parts["text_encoder"]
    name = "open_clip:RN50/openai"
    pipe = SeerPipeline(**parts, text_model=name)
    tokenizer, encoder = load_text(name)
    expected = encode_text(tokenizer, encoder, ["ab ba"])
    assert torch.equal(pipe.encode_prompt(["ab ba"]), expected) and expected.shape == (1, 9, 16)
    pipe.save_pretrained(tmp_path / "named")
    assert not (tmp_path / "named" / "text_encoder").exists()
    loaded = SeerPipeline.from_pretrained(tmp_path / "named")
    assert torch.equal(loaded.encode_prompt(["ab ba"]), expected)


def test_a_saved_encoder_needs_the_library_no_more(library, tmp_path, monkeypatch) -> None:
    tokenizer, encoder = load_open_clip_text("open_clip:RN50/openai")
    expected = encode_text(tokenizer, encoder, ["ab ba"])
    encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert torch.equal(encode_text(*load_text(str(tmp_path)), ["ab ba"]), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("open_clip:RN50", "must be open_clip:MODEL/WEIGHTS"),
        ("open_clip:/openai", "must be open_clip:MODEL/WEIGHTS"),
        ("open_clip:RM50/openai", "no model 'RM50'; near names: RN50"),
        (
            "open_clip:RN50/opnai",
            "neither a file nor weights that open_clip knows for RN50: openai",
        ),
        ("open_clip:local-dir:/nowhere", "cannot load .* no such folder"),
    ],
)
def test_wrong_names_are_one_sentence(library, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_text(name)


def test_nothing_is_downloaded_offline(library, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and open_clip has RN50 openai"):
        load_text("open_clip:RN50/openai")


def test_other_towers_are_refused(library) -> None:
    tower = Tower(nn.GELU())
    tower.cls_emb = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match="its text tower, Tower, is not CLIP's"):
        as_clip_text_model(tower, "coca")
    with pytest.raises(ValueError, match="its tokenizer, object, is not CLIP's"):
        as_clip_tokenizer(object(), "siglip")


def test_the_absent_library_names_its_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install -c constraints.txt 'stvision\[vision\]'"):
        load_text("open_clip:RN50/openai")


def test_names() -> None:
    assert parse_open_clip("open_clip:RN50/openai") == ("RN50", "openai")
    assert parse_open_clip("open_clip:RN50//weights/clip.pt") == ("RN50", "/weights/clip.pt")
    assert parse_open_clip("open_clip:hf-hub:owner/name") == ("hf-hub:owner/name", None)


def test_the_real_library() -> None:
    """Random weights of RN50's text tower; runs where open_clip is installed."""
    from stvision.optional import mend_torchvision

    mend_torchvision()
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("RN50").eval()
    theirs = open_clip.get_tokenizer("RN50")
    tokenizer, encoder = as_clip_tokenizer(theirs, "RN50"), as_clip_text_model(model, "RN50")
    texts = ["open the drawer!", "Push the RED cup  to the left, it's 3 o'clock", "", "naïve café"]
    ids, ours = (
        theirs(texts),
        tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt"),
    )
    own = ours.attention_mask.bool()
    assert torch.equal(ids[own], ours.input_ids[own])
    with torch.no_grad():
        states = model.token_embedding(ids) + model.positional_embedding
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
        found = encoder(ours.input_ids).last_hidden_state
    torch.testing.assert_close(found[own], states[own], atol=1e-5, rtol=1e-5)
