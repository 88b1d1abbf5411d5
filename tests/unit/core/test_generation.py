"""Every written token's relevance: rows are those of single runs, and sums are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as hf
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.errors import InputError
from lenslrp.generation import Generation
from lenslrp.targets import Contrastive, Logit, LogProb
from tests.unit.tiny import SIZES, VOCABULARY, tiny, word_tokenizer

PROMPT, TEXT = [3, 17, 5, 8], [11, 2, 9, 14]


def translator(kind: str) -> TransformerBridge:
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind == "t5":
        config = hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=1, pad_token_id=1, eos_token_id=0,
        )  # fmt: skip
        model = hf.T5ForConditionalGeneration(config)
    else:
        bart = hf.BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32, decoder_start_token_id=2,
            forced_eos_token_id=None,
        )  # fmt: skip
        model = hf.BartForConditionalGeneration(bart)
    return lenslrp.load(model, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "neox"])
def test_rows_are_single_runs(family: str) -> None:
    model = tiny(family)
    G = lenslrp.explain_generation(model, PROMPT, text=TEXT)
    assert G.relevance.shape == (4, 8) and G.start == 4
    logits = model(torch.tensor([PROMPT + TEXT]))[0]
    for row, token in enumerate(TEXT):
        read = torch.tensor([[*PROMPT, *TEXT[:row]]])
        _, R = lenslrp.run_with_relevance(model, read, token, names_filter=[])
        length = len(PROMPT) + row
        torch.testing.assert_close(G.relevance[row, :length], R.tokens[0], rtol=0, atol=1e-10)
        assert not G.relevance[row, length:].any()
        assert float(G.values[row]) == pytest.approx(float(R.target.value), abs=1e-10)
        at = logits[length - 1].detach()
        assert float(G.logits[row]) == pytest.approx(float(at[token]), abs=1e-10)
        log_prob = at.log_softmax(0)[token]
        assert float(G.log_probs[row]) == pytest.approx(float(log_prob), abs=1e-10)
        ledger = R.ledger()
        assert G.ledgers[row].softmax == pytest.approx(ledger.softmax, abs=1e-9)
        arrived = float(G.relevance[row].sum() + G.positional[row])
        assert arrived == pytest.approx(ledger.leaves, abs=1e-9)
    assert bool(G.positional.any()) == (family == "gpt2")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoders_rows_go_over_both_texts(kind: str) -> None:
    model = translator(kind)
    start = int(model.original_model.config.decoder_start_token_id)
    G = lenslrp.explain_generation(model, PROMPT, text=TEXT)
    assert (G.encoder_length, G.start, G.relevance.shape) == (4, 5, (4, 9))
    assert G.token_ids.tolist() == [*PROMPT, start, *TEXT]
    for row, token in enumerate(TEXT):
        written = torch.tensor([[start, *TEXT[:row]]])
        _, R = lenslrp.run_with_relevance(
            model, torch.tensor([PROMPT]), token, decoder_input=written, names_filter=[]
        )
        assert R.decoder_tokens is not None
        single = torch.cat([R.tokens[0], R.decoder_tokens[0]])
        torch.testing.assert_close(G.relevance[row, : 5 + row], single, rtol=0, atol=1e-10)
        assert not G.relevance[row, 5 + row :].any()
    assert G.over().columns.tolist() == ["encoder", "prompt", "written"]
    assert G.over().to_numpy().sum() == pytest.approx(float(G.relevance.sum()))


@pytest.mark.parametrize(
    ("of", "target"),
    [
        ("logit", Logit(2)),
        ("log_prob", LogProb(2)),
        ("runner_up", Contrastive(2, top_k=1)),
        ("mean", Contrastive(2)),
    ],
)
def test_of_says_what_of_the_token(of: str, target: lenslrp.targets.Target) -> None:
    model = tiny()
    G = lenslrp.explain_generation(model, PROMPT, text=TEXT, of=of)
    read = torch.tensor([[*PROMPT, 11]])
    _, R = lenslrp.run_with_relevance(model, read, target, names_filter=[])
    torch.testing.assert_close(G.relevance[1, :5], R.tokens[0], rtol=0, atol=1e-10)
    assert float(G.values[1]) == pytest.approx(float(R.target.value))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_model_writes_its_top_tokens(kind: str) -> None:
    model = tiny() if kind == "llama" else translator(kind)
    G = lenslrp.explain_generation(model, PROMPT, max_new_tokens=5)
    written = G.token_ids[G.start :].tolist()
    inner: Any = model.original_model
    ids = PROMPT if kind == "llama" else [int(inner.config.decoder_start_token_id)]
    for token in written:
        read = torch.tensor([ids])
        if kind == "llama":
            logits = model(read)
        else:
            logits = inner(input_ids=torch.tensor([PROMPT]), decoder_input_ids=read).logits
        best = int(logits[0, -1].argmax())
        assert token == best
        ids = [*ids, best]
    assert len(written) == 5 or written[-1] == inner.generation_config.eos_token_id


def test_text_words_and_spans() -> None:
    G = lenslrp.explain_generation(tiny(tokenizer=word_tokenizer()), "b c a", text="d b e")
    assert [token.strip() for token in G.str_tokens] == ["<s>", "b", "c", "a", "d", "b", "e"]
    assert [token.strip() for token in G.written] == ["d", "b", "e"]
    spans = {"all": (0, 7), "c": "c", "two": (1, 3)}
    sums = G.over(spans)
    assert sums.index.names == ["row", "token"] and len(sums) == 3
    torch.testing.assert_close(torch.tensor(sums["all"].to_numpy()), G.relevance.sum(dim=1))
    torch.testing.assert_close(torch.tensor(sums["c"].to_numpy()), G.relevance[:, 2])
    torch.testing.assert_close(torch.tensor(sums["two"].to_numpy()), G.relevance[:, 1:3].sum(dim=1))
    words = G.words()
    assert words.shape == (3, 7)
    assert words.to_numpy().sum() == pytest.approx(float(G.relevance.sum()))
    table = G.to_dataframe()
    assert len(table) == 4 + 5 + 6
    assert table["relevance"].sum() == pytest.approx(float(G.relevance.sum()))
    best = G.top(1).iloc[0]
    assert abs(best["relevance"]) == pytest.approx(float(G.relevance.abs().max()))
    assert G.str_tokens[best["position"]] == best["token"]
    assert repr(G).startswith("Generation(3 tokens after 4, logit, AttnLRP: ")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    G = lenslrp.explain_generation(tiny(tokenizer=word_tokenizer()), "b c a", text="d b")
    H = Generation.load(G.save(tmp_path / "g.safetensors"))
    for name in ("relevance", "token_ids", "values", "logits", "log_probs", "positional"):
        assert torch.equal(getattr(G, name), getattr(H, name))
    assert repr(H) == repr(G)
    pd.testing.assert_frame_equal(G.words(), H.words())
    assert [ledger.to_dict() for ledger in H.ledgers] == [x.to_dict() for x in G.ledgers]
    pd.testing.assert_frame_equal(G.ledgers[0].table, H.ledgers[0].table)
    _, R = lenslrp.run_with_relevance(tiny(), torch.tensor([PROMPT]), 3, names_filter=[])
    other = R.save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match=f"^{other} holds no saved generation$"):
        Generation.load(other)
    with pytest.raises(lenslrp.StorageError):
        G.save(other)


def test_a_model_that_reads_ahead_is_refused() -> None:
    model = tiny()
    hook = ("blocks.0.hook_resid_post", lambda x, hook: x + x.mean(dim=1, keepdim=True))
    with model.hooks(fwd_hooks=[hook]), pytest.raises(InputError, match="reads tokens behind"):
        lenslrp.explain_generation(model, PROMPT, text=TEXT)


def test_a_model_that_does_not_write_is_refused() -> None:
    sizes = {k: v for k, v in SIZES.items() if not k.endswith("_id")}
    model = lenslrp.load(hf.BertForMaskedLM(hf.BertConfig(**sizes)))
    with pytest.raises(InputError, match="BertForMaskedLM does not write text token by token"):
        lenslrp.explain_generation(model, PROMPT, text=TEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "odds"}, "of must be one of logit, log_prob, runner_up, mean, not 'odds'"),
        ({"text": None, "max_new_tokens": 0}, "max_new_tokens is a number from 1, not 0"),
        ({"text": []}, "the continuation is an empty prompt; give at least one token"),
        ({"text": [99]}, "the continuation has token 99, outside the vocabulary: ids go from 0 "),
        ({"prompt": [[3, 4], [5, 6]]}, "a generation is of one prompt, not 2"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    given = {"prompt": PROMPT, "text": TEXT, **changes}
    with pytest.raises(InputError, match=message):
        lenslrp.explain_generation(tiny(), **given)  # type: ignore[arg-type]


def test_bad_spans_are_named() -> None:
    G = lenslrp.explain_generation(tiny(tokenizer=word_tokenizer()), "b c b", text="d")
    with pytest.raises(InputError, match="^'b' occurs 2 times, not once: give positions$"):
        G.over({"b": "b"})
    with pytest.raises(InputError, match="^'e' does not occur at the tokens from position 0 on$"):
        G.over({"e": "e"})
    with pytest.raises(InputError, match=r"^a span is \(from, to before\) within 5, not \(2, 2\)$"):
        G.over({"b": (2, 2)})
    with pytest.raises(InputError, match="^k must be at least 1, not 0$"):
        G.top(0)


def test_the_matrix_is_drawn_with_every_number() -> None:
    G = lenslrp.explain_generation(tiny(tokenizer=word_tokenizer()), "b c a", text="d b e")
    html = G._repr_html_()
    assert html.count("<td style") == 4 + 5 + 6 and "<script" not in html
    assert f"{float(G.relevance[2, 5]):+.4g}" in html
    probability = math.exp(float(G.log_probs[0]))
    assert f">{probability:.2f}<" in html
