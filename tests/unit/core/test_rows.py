"""The rows of a batch: each is what its prompt gives alone, in tables, in files, in differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import lenslrp
from lenslrp.edits import Edit, edit_units
from lenslrp.reductions import OverFeatures
from lenslrp.rows import position_axes
from lenslrp.targets import Activation, Custom, LogitDiff
from tests.conformance import zoo
from tests.unit.tiny import TOKENS, tiny, word_tokenizer

PROMPTS = ["a b c d e", "f", "g h i"]
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}  # Hugging Face's norms are float32 inside


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


def padded(model: Any, side: str) -> Any:
    """The model, its padding on one side; float32 where a row could see nothing but padding."""
    model.tokenizer.padding_side = side
    return model


def same(a: lenslrp.RelevanceCache, b: lenslrp.RelevanceCache, **tolerance: Any) -> None:
    """All that two caches say, but for the account and the table of rules."""
    assert a.str_tokens == b.str_tokens
    assert a.prompts == b.prompts
    assert a.words_ == b.words_
    assert a.target.text == b.target.text
    assert a.reduced == b.reduced
    assert a.values.keys() == b.values.keys()
    tensors = {name: value.to_dense() for name, value in a.values.items()}
    tensors |= {"own tokens": a.tokens, "value": a.target.value, "mask": a.attention_mask}
    tensors |= {f"active {name}": value for name, value in a.activations.items()}
    others = {name: value.to_dense() for name, value in b.values.items()}
    others |= {"own tokens": b.tokens, "value": b.target.value, "mask": b.attention_mask}
    others |= {f"active {name}": value for name, value in b.activations.items()}
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(
            value, others[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize(
    "reduce", [None, "sum", "sum_positions", lenslrp.TopK(3), lambda r: r.sum(dim=-1)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_its_prompt_gives_alone(side: str, reduce: Any) -> None:
    model = padded(tiny("gpt2", tokenizer=word_tokenizer()).float(), side)
    targets = [5, LogitDiff(3, 4), "b"]
    _, R = lenslrp.run_with_relevance(model, PROMPTS, targets, reduce=reduce)
    assert len(R.rows) == 3
    for index, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        _, alone = lenslrp.run_with_relevance(model, prompt, target, reduce=reduce)
        row = R.rows[index]
        if callable(reduce) and not isinstance(reduce, lenslrp.TopK):
            # What a function of the user's left is not known: only the row is taken out of it.
            assert row["blocks.0.attn.hook_z"].shape == (1, 6, 2)
            continue
        kept = {n: v for n, v in alone.values.items() if n in row.values}
        assert set(alone.values) - set(kept) <= {"pos_embed.hook_in", "pos_embed.hook_out",
                                                 "hook_pos_embed"}  # fmt: skip
        same(row, type(alone)(**{**vars(alone), "values": kept}), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(row.positions, alone.positions, rtol=2e-4, atol=2e-4)
        assert row.coverage.ok


def test_rows_of_every_hook_point_in_float64(model: Any) -> None:
    padded(model, "right")
    _, R = lenslrp.run_with_relevance(model, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        _, alone = lenslrp.run_with_relevance(model, prompt)
        same(R[index], alone, **CLOSE)
        assert R[index].words().to_dict() == R[index].words().to_dict()
        assert (R[index].heads() - alone.heads()).abs().to_numpy().max() < 1e-6
        assert R[index]["blocks.1.attn.hook_pattern"].shape[2:] == (len(prompt.split()) + 1,) * 2


def test_rows_are_a_sequence(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(padded(model, "right"), PROMPTS, names_filter=[])
    assert R[-1].prompts == R.rows[2].prompts == ["g h i"]
    assert [row.prompts[0] for row in R.rows] == PROMPTS
    assert [row.prompts[0] for row in R.rows[1:]] == PROMPTS[1:]
    for wrong in (3, -4):
        with pytest.raises(lenslrp.InputError, match=r"row -?\d is out of range: the batch has 3"):
            R[wrong]
    with pytest.raises(lenslrp.InputError, match="one row of a larger batch"):
        R[0].ledger()
    assert isinstance(R.ledger().leaves, float)


def test_a_row_does_not_keep_its_batch(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(padded(model, "right"), PROMPTS)
    stored = {value.untyped_storage().data_ptr() for value in R.values.values()}
    row = R[1]
    assert not any(value.untyped_storage().data_ptr() in stored for value in row.values.values())


def test_a_batch_of_one_is_its_row_with_the_ledger(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(model, "a b", 5)
    assert R[0] is R
    mask = torch.tensor([[False, True, True]])
    options = {"attention_mask": mask, "names_filter": "hook_resid_pre"}
    _, R = lenslrp.run_with_relevance(model.float(), torch.tensor([[1, 3, 4]]), 5, **options)
    model.double()
    row = R[0]
    assert row.tokens.shape == (1, 2)
    assert row["blocks.0.hook_resid_pre"].shape == (1, 2, 16)
    assert row.ledger() is R.ledger()


def test_targets_of_rows_are_told_apart(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(padded(model, "right"), PROMPTS, names_filter=[])
    assert [R.target.of(row) for row in range(3)] == [row.target.text for row in R.rows]
    assert all(text.startswith("top logit") and "," not in text for text in R.target.texts)
    _, R = lenslrp.run_with_relevance(model, PROMPTS, [4, "a", LogitDiff(3, 4)], names_filter=[])
    assert R[2].target.text == "logit difference 'b' - 'c' at position -1"
    _, R = lenslrp.run_with_relevance(model, PROMPTS, "a", names_filter=[])
    assert R[1].target.text == R.target.text == "logit of 'a' at position -1"


def test_rows_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = zoo.build("T5ForConditionalGeneration")
    read = torch.tensor([[5, 7, 9, 4], [6, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    written = torch.tensor([[0, 5, 6], [0, 7, 8]])
    _, R = lenslrp.run_with_relevance(
        model, read, [3, 4], attention_mask=mask, decoder_input=written
    )
    _, alone = lenslrp.run_with_relevance(model, read[1:, :2], 4, decoder_input=written[1:])
    back = lenslrp.RelevanceCache.load(R.save(tmp_path / "both"))
    for row in (R[1], back[1]):
        same(row, alone, **CLOSE)
        torch.testing.assert_close(row.decoder_tokens, alone.decoder_tokens, **CLOSE)
    frame = R.to_dataframe()
    assert frame.groupby(["row", "side"]).size().to_dict() == {
        (0, "encoder"): 4, (0, "decoder"): 3, (1, "encoder"): 2, (1, "decoder"): 3
    }  # fmt: skip
    assert frame[frame["side"] == "decoder"]["token_id"].tolist() == written.flatten().tolist()
    pd.testing.assert_frame_equal(back.to_dataframe(), frame)


def test_padding_of_a_decoder_is_cut() -> None:
    model = zoo.build("T5ForConditionalGeneration")
    tokens = torch.tensor([[5, 7, 9], [6, 8, 4]])
    _, R = lenslrp.run_with_relevance(
        model, tokens, 3, decoder_input=torch.tensor([[0, 5], [0, 5]])
    )
    R.decoder_attention_mask[1, 1] = False  # as texts of two lengths for the decoder leave it
    row = R[1]
    assert row.decoder_tokens.shape == (1, 1)
    assert row["decoder_blocks.0.hook_resid_pre"].shape == (1, 1, 16)
    assert row["encoder_blocks.0.hook_resid_pre"].shape == (1, 3, 16)
    assert len(R.to_dataframe().query("row == 1 and side == 'decoder'")) == 1
    earlier = replace(R, decoder_attention_mask=None, decoder_token_ids=None)  # an older file
    assert earlier[1].decoder_tokens.shape == (1, 2)
    assert earlier.to_dataframe().query("side == 'decoder'")["token_id"].tolist() == [-1] * 4


def test_a_table_has_a_row_for_each_token(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(padded(model, "right"), PROMPTS, [5, 6, 7], names_filter=[])
    frame = R.to_dataframe()
    assert list(frame) == ["row", "prompt", "position", "token", "token_id", "relevance", "target",
                           "value"]  # fmt: skip
    assert frame["row"].tolist() == [0] * 6 + [1] * 2 + [2] * 4
    assert frame["position"].tolist() == [*range(6), *range(2), *range(4)]
    assert frame["token_id"].tolist() == R.token_ids[R.attention_mask].tolist()
    assert frame["relevance"].tolist() == R.tokens[R.attention_mask].tolist()
    assert frame["token"].tolist()[:3] == [*R.str_tokens[0][:3]]
    assert frame.groupby("row")["value"].first().tolist() == R.target.value.tolist()
    assert frame.groupby("row")["prompt"].first().tolist() == PROMPTS
    assert frame.groupby("row")["target"].nunique().tolist() == [1, 1, 1]


def test_a_table_has_the_relevance_of_learned_positions() -> None:
    _, R = lenslrp.run_with_relevance(tiny("gpt2"), TOKENS, 5, names_filter=[])
    frame = R.to_dataframe()
    assert frame["positional"].tolist() == R.positions.flatten().tolist()
    total = frame["relevance"].sum() + frame["positional"].sum()
    assert total == pytest.approx(R.ledger().leaves)


def test_a_table_names_the_patches_of_an_image() -> None:
    model = zoo.build("ViTForImageClassification")
    from lenslrp import media

    given = media.example(model, batch=2)
    _, R = lenslrp.run_with_relevance(model, target=1, names_filter=[], **given)
    frame = R.to_dataframe()
    rows, columns = R.patches.shape[1:]
    patches = frame.dropna(subset="patch_row")
    assert len(patches) == 2 * rows * columns
    assert len(frame) - len(patches) == 2 * R.special.shape[1]
    for record in patches.to_dict("records"):
        place = record["row"], record["patch_row"], record["patch_column"]
        assert record["relevance"] == float(R.patches[place])
        assert record["token"] == f"{place[1]},{place[2]}"
    row = R[1]
    assert torch.equal(row.patches, R.patches[1:])
    assert torch.equal(row.pixels, R.pixels[1:])


def test_a_batch_is_saved_with_its_rows(model: Any, tmp_path: Path) -> None:
    _, R = lenslrp.run_with_relevance(
        padded(model, "right"), PROMPTS, ["a", 5, LogitDiff(3, 4)], reduce="sum"
    )
    back = lenslrp.RelevanceCache.load(R.save(tmp_path / "many.safetensors"))
    for mine, theirs in zip(R.rows, back.rows, strict=True):
        same(mine, theirs, rtol=0, atol=0)
    assert back.reduced == R.reduced
    pd.testing.assert_frame_equal(back.to_dataframe(), R.to_dataframe())


@pytest.mark.parametrize(
    ("name", "ndim", "reduced", "axes"),
    [
        ("blocks.0.hook_resid_pre", 3, "", (1,)),
        ("blocks.0.hook_resid_pre", 2, "sum", (1,)),
        ("blocks.0.hook_resid_pre", 2, "sum_positions", ()),
        ("blocks.0.attn.hook_z", 4, "", (1,)),
        ("blocks.0.attn.hook_z", 3, "sum", (1,)),
        ("blocks.0.attn.hook_pattern", 4, "", (2, 3)),
        ("blocks.0.attn.hook_pattern", 3, "sum", (2,)),
        ("blocks.0.attn.hook_attn_scores", 3, "sum_positions", (1, 2)),
        ("blocks.0.mixer.hook_scan_map", 4, "", (2, 3)),
        ("audio_feature_extractor.hook_out", 3, "", (2,)),
        ("audio_feature_extractor.hook_in", 2, "", ()),
        ("pooler.hook_out", 2, "", ()),
        ("blocks.0.attn.hook_z", 4, "custom", ()),
    ],
)
def test_which_axes_are_positions(name: str, ndim: int, reduced: str, axes: Any) -> None:
    assert position_axes(name, ndim, reduced) == axes


def test_a_padded_length_that_is_also_a_width_is_not_cut_from_features() -> None:
    """16 tokens in a model of width 16: what was summed over positions has features left."""
    model = tiny("llama").double()
    tokens = torch.randint(2, 23, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 10:] = False
    for reduce, shape in (("sum_positions", (1, 16)), (OverFeatures(), (1, 10))):
        _, R = lenslrp.run_with_relevance(
            model, tokens, 5, None, "hook_resid_pre",
            reduce=reduce, attention_mask=mask,
        )  # fmt: skip
        assert R[1]["blocks.0.hook_resid_pre"].shape == shape


def test_checkpoints_of_one_architecture_are_subtracted() -> None:
    before, after = tiny("llama", seed=0), tiny("llama", seed=1)
    before.cfg.model_name, after.cfg.model_name = "base", "tuned"
    _, a = lenslrp.run_with_relevance(before, TOKENS, [5, 6])
    _, b = lenslrp.run_with_relevance(after, TOKENS, [5, 6])
    difference = b - a
    assert difference.model_name == "tuned - base"
    assert torch.equal(difference.tokens, b.tokens - a.tokens)
    name = "blocks.1.mlp.hook_post"
    assert torch.equal(difference[name], b[name] - a[name])
    assert difference[1].target.text == "(logit of 6 at position -1) - (logit of 6 at position -1)"


def test_what_does_not_fit_is_not_subtracted() -> None:
    model = tiny("llama")
    _, a = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter="hook_resid_pre")

    def refused(message: str, other: Any = model, tokens: Any = TOKENS, **options: Any) -> None:
        options = {"names_filter": "hook_resid_pre", **options}
        _, b = lenslrp.run_with_relevance(other, tokens, 5, **options)
        with pytest.raises(lenslrp.InputError, match=f"cannot subtract: {message}"):
            a - b

    changed = TOKENS.clone()
    changed[1, 2] = 7
    mask = torch.ones_like(TOKENS)
    mask[0, 5] = 0
    refused(r"\[2, 6\] tokens here, \[2, 4\] there", tokens=TOKENS[:, :4])
    refused(r"other tokens, the first in row 1 at column 2 \(id 2 here, 7 there\)", tokens=changed)
    refused("the padding stands at other positions there", attention_mask=mask)
    refused(r"blocks.0.hook_resid_pre, blocks.1.hook_resid_pre were read here alone",
            names_filter=[])  # fmt: skip
    refused("blocks.0.mlp.hook_post, blocks.1.mlp.hook_post were read there alone",
            names_filter=["hook_resid_pre", "mlp.hook_post"])  # fmt: skip
    refused(r"blocks.0.hook_resid_pre is \[2, 6, 16\] here and \[2, 6\] there", reduce="sum")
    wider = tiny("llama", hidden_size=20)
    refused(r"blocks.0.hook_resid_pre is \[2, 6, 16\] here and \[2, 6, 20\] there", wider)


def test_what_is_off_the_path_in_one_is_left_out_of_a_difference() -> None:
    model = tiny("llama")
    _, a = lenslrp.run_with_relevance(model, TOKENS, 5)
    _, b = lenslrp.run_with_relevance(model, TOKENS, 5, attention="fused")
    difference = a - b
    assert "blocks.0.attn.hook_pattern" in a
    assert "blocks.0.attn.hook_pattern" not in difference
    torch.testing.assert_close(difference.tokens, torch.zeros_like(a.tokens), **CLOSE)


def test_rows_of_custom_and_latent_targets(model: Any) -> None:
    padded(model, "right")
    hook = "blocks.0.mlp.hook_post"
    _, R = lenslrp.run_with_relevance(model, PROMPTS, Activation(hook, 3), names_filter=[])
    assert [row.target.text for row in R.rows] == [f"activation of {hook}[3] at position -1"] * 3
    _, R = lenslrp.run_with_relevance(
        model, TOKENS, Custom(lambda x: x[:, -1, :3].sum(1), "three"), names_filter=[]
    )
    assert R[1].target.text == "three function of the logits"


HEADS_FIRST = {
    "Qwen3ForCausalLM": "blocks.1.attn.hook_q_normed",
    "DeepseekV3ForCausalLM": "blocks.1.attn.hook_q",
}


@pytest.mark.parametrize("name", HEADS_FIRST)
def test_positions_that_stand_behind_heads(name: str, tmp_path: Path) -> None:
    """[batch, head, pos, d_head], and as many heads as positions: rows, targets, edits, files."""
    model, hook = zoo.build(name), HEADS_FIRST[name]
    tokens, mask = torch.tensor([[7, 9], [11, 0]]), torch.tensor([[1, 1], [1, 0]])
    _, R = lenslrp.run_with_relevance(model, tokens, 5, names_filter=[hook], attention_mask=mask)
    _, alone = lenslrp.run_with_relevance(model, tokens[1:, :1], 5, names_filter=[hook])
    saved = lenslrp.RelevanceCache.load(R.save(tmp_path / "cache.safetensors"))
    for cache in (R, saved):
        torch.testing.assert_close(cache.rows[1][hook], alone[hook], **CLOSE)
    with pytest.raises(lenslrp.InputError, match=r"top\(\) needs"):
        R.top(hook.split(".", 2)[2])

    _, seen = model.run_with_cache(tokens[:1], names_filter=[hook])
    _, A = lenslrp.run_with_relevance(model, tokens[:1], Activation(hook, (1, 3), 0))
    torch.testing.assert_close(A.target.value[0], seen[hook][0, 1, 0, 3], **CLOSE)
    with edit_units(model, [Edit(hook, units=(1,), scale=0.0, positions=(0,))]):
        _, changed = model.run_with_cache(tokens[:1], names_filter=[hook])
    expected = seen[hook].clone()
    expected[0, 1, 0] = 0
    torch.testing.assert_close(changed[hook], expected, **CLOSE)
