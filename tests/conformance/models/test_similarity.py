"""A text's vector and the similarity of two texts, on tiny random weights in float64.

Values are those of transformers, pooled in loops; relevance is that of an explicit pass without
autograd; ledgers close; padded rows are as they are alone; without biases CP conserves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp.analysis import attribute, bilrp
from lenslrp.sentences import POOLINGS
from lenslrp.targets import Custom, DenseLayer, Embedding, Logit, SentenceEmbedding, Similarity
from tests.conformance import zoo_configs
from tests.conformance.models.test_heads import made, rows
from tests.oracles.explicit_bert import BertWeights, run

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "type_vocab_size": 2,
    "pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, float]] = {
    "BertModel": ("mean", 1e-9),
    "RobertaModel": ("cls", 1e-9),
    "MPNetModel": ("mean", 1e-9),
    "ModernBertModel": ("mean", 1e-9),
    "DistilBertModel": ("max", 1e-9),
    "LlamaModel": ("last", 1e-6),  # norms in float32
    "Qwen3Model": ("last", 1e-6),
    "GPT2Model": ("weighted_mean", 1e-9),
}
"""A pooling that such models are used with, and how far the ledger may be from closing."""


def bare(name: str, *, biases: bool = True) -> Any:
    kind = getattr(hf, name).config_class
    causal = {"LlamaModel": "LlamaForCausalLM", "Qwen3Model": "Qwen3ForCausalLM",
              "GPT2Model": "GPT2LMHeadModel"}  # fmt: skip
    more = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2} if "Distil" in name else {}
    config = zoo_configs.config(causal[name]) if name in causal else kind(**{**SIZES, **more})
    model = made(name, config)
    for path, weight in model.named_parameters():
        if not biases and path.endswith("bias"):
            weight.data.zero_()
    return model


def pooled(x: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """The vector of each row, token by token."""
    vectors: list[Any] = []
    for row, real in zip(x, mask.bool(), strict=True):
        states = list(row[real])
        n = len(states)
        each: dict[str, Any] = {
            "mean": sum(states) / n,
            "cls": states[0],
            "last": states[-1],
            "max": torch.stack(states).max(dim=0).values,
            "mean_sqrt_len": sum(states) / n**0.5,
            "weighted_mean": sum((i + 1) * h for i, h in enumerate(states)) / sum(range(n + 1)),
        }
        vectors.append(each[pooling])
    return torch.stack(vectors)


def hidden(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return states


@pytest.mark.parametrize("name", FAMILIES)
def test_two_texts_of_a_family(name: str) -> None:
    """The value is transformers', the ledger closes, and each row is as it is alone."""
    pooling, tolerance = FAMILIES[name]
    model = bare(name)
    tokens, mask = rows(model.config)
    vectors = pooled(hidden(model, tokens, mask), mask, pooling)
    cosine = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    bridge = lenslrp.load(model)
    for measure, expected in (("cosine", cosine), ("dot", vectors[0] @ vectors[1])):
        target = Similarity(pooling=pooling, measure=measure)  # type: ignore[arg-type]
        _, R = lenslrp.run_with_relevance(bridge, tokens, target, attention_mask=mask)
        assert_near(R.target.value, expected.expand(2), tolerance)
        assert abs(R.ledger().error) < tolerance
        assert abs(R.ledger().nonlinear_target) < tolerance
        assert R.tokens[1, 4:].abs().max() < 1e-12
        assert R.tokens.abs().max() > 1e-6
        for row, length in ((0, 6), (1, 4)):
            one = Similarity(vectors[1 - row], pooling, measure)  # type: ignore[arg-type]
            _, alone = lenslrp.run_with_relevance(bridge, tokens[row : row + 1, :length], one)
            assert_near(alone.target.value, expected[None], tolerance)
            assert_near(alone.tokens[0], R.tokens[row, :length], tolerance)


def assert_near(x: Tensor, y: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(y.abs().max()))
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(pooling: str) -> None:
    """On either side of the padding; the components of the vector, and lenslrp.embed."""
    model = bare("BertModel")
    tokens, mask = rows(model.config)
    vectors = pooled(hidden(model, tokens, mask), mask, pooling)
    bridge = lenslrp.load(model)
    torch.testing.assert_close(lenslrp.embed(bridge, tokens, pooling, attention_mask=mask), vectors)
    for component in (0, 7, -1):
        target = Embedding(component, pooling)
        _, R = lenslrp.run_with_relevance(bridge, tokens, target, attention_mask=mask)
        torch.testing.assert_close(R.target.value, vectors[:, component])
        assert abs(R.ledger().error) < 1e-9 and abs(R.ledger().nonlinear_target) < 1e-9
    both = SentenceEmbedding((pooling, "mean"), normalise=True)
    joint = torch.cat([vectors, pooled(hidden(model, tokens, mask), mask, "mean")], dim=1)
    joint /= joint.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lenslrp.embed(bridge, tokens, both, attention_mask=mask), joint)
    _, R = lenslrp.run_with_relevance(bridge, tokens, Embedding(20, both), attention_mask=mask)
    torch.testing.assert_close(R.target.value, joint[:, 20])
    assert abs(R.ledger().error) < 1e-9 and abs(R.ledger().nonlinear_target) < 1e-9


@pytest.mark.parametrize("activation", ["Identity", "Tanh"])
def test_a_dense_layer(activation: str) -> None:
    """By the epsilon and the identity rule; what the bias keeps is the target's own."""
    tokens, _ = rows(bare("BertModel").config)
    bridge = lenslrp.load(bare("BertModel", biases=False))
    torch.manual_seed(3)
    weight, bias = torch.randn(5, 16).double(), torch.randn(5).double()
    mean = lenslrp.embed(bridge, tokens, "mean")
    z = mean @ weight.T + bias
    y = z.tanh() if activation == "Tanh" else z
    for kept in (bias, None):
        embedding = SentenceEmbedding("mean", dense=(DenseLayer(weight, kept, activation),))
        _, R = lenslrp.run_with_relevance(bridge, tokens, Embedding(2, embedding), lenslrp.CPLRP())
        assert R.positions is not None
        total = (R.tokens + R.positions).sum(dim=1)
        assert abs(R.ledger().error) < 1e-9
        if kept is None:
            torch.testing.assert_close(total, R.target.value)
        else:
            torch.testing.assert_close(R.target.value, y[:, 2])
            share = bias[2] / z[:, 2] * y[:, 2]
            torch.testing.assert_close(total, y[:, 2] - share)
            assert R.ledger().nonlinear_target == pytest.approx(float(share.sum()))


def test_padding_on_the_left() -> None:
    model = bare("LlamaModel")
    tokens, mask = rows(model.config)
    bridge = lenslrp.load(model.float())
    target = Similarity(pooling="weighted_mean")
    _, right = lenslrp.run_with_relevance(bridge, tokens, target, attention_mask=mask)
    tokens[1], mask[1] = tokens[1].roll(2), mask[1].roll(2)
    _, left = lenslrp.run_with_relevance(bridge, tokens, target, attention_mask=mask)
    torch.testing.assert_close(left.target.value, right.target.value)
    torch.testing.assert_close(left.tokens[1, 2:], right.tokens[1, :4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cp", [False, True], ids=["attnlrp", "cp"])
def test_relevance_is_that_of_an_explicit_pass(cp: bool) -> None:
    """The cosine of two mean-pooled texts, from the product down to words and positions."""
    model = bare("BertModel")
    weights = BertWeights.copy_from(model)
    tokens, _ = rows(model.config)
    n = tokens.shape[1]
    states, down = run(weights, tokens, cp=cp)
    torch.testing.assert_close(states, hidden(model, tokens, torch.ones_like(tokens)))
    vectors = states.sum(dim=1) / n
    start = torch.zeros_like(states)
    for row in range(2):
        other = vectors[1 - row] / (vectors[0].norm() * vectors[1].norm())
        for i in range(n):  # relevance of what a token's state adds to the similarity
            start[row, i] = states[row, i] * other / n
    words, positions, types = down(start)
    composite = lenslrp.CPLRP() if cp else lenslrp.AttnLRP()
    _, R = lenslrp.run_with_relevance(
        lenslrp.load(model), tokens, Similarity(pooling="mean"), composite
    )
    torch.testing.assert_close(R.target.value, start.sum(dim=(1, 2)), rtol=1e-11, atol=0)
    assert R.positions is not None
    torch.testing.assert_close(R.tokens, words, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(R.positions, positions + types, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("name", ["BertModel", "MPNetModel", "ModernBertModel"])
def test_without_biases_cp_conserves_on_each_side(name: str, measure: Any) -> None:
    """Relevance of either text is the whole similarity; so is that of all pairs of tokens."""
    model = bare(name, biases=False)
    tokens, _ = rows(model.config)
    bridge = lenslrp.load(model)
    target = Similarity(pooling="mean", measure=measure)
    _, R = lenslrp.run_with_relevance(bridge, tokens, target, lenslrp.CPLRP())
    relevance = R.tokens if R.positions is None else R.tokens + R.positions
    assert_near(relevance.sum(dim=1), R.target.value, 1e-9)
    pairs = bilrp(
        bridge, tokens[:1], tokens[1:], "mean", measure=measure, composite=lenslrp.CPLRP(),
        batch_size=5,
    )  # fmt: skip
    assert pairs.value == pytest.approx(float(R.target.value[0]), rel=1e-9)
    assert float(pairs.matrix.sum()) == pytest.approx(pairs.value, rel=1e-9)
    assert_near(pairs.matrix.sum(dim=1), relevance[0], 1e-9)
    assert_near(pairs.matrix.sum(dim=0), relevance[1], 1e-9)


def test_pairs_are_sums_over_components() -> None:
    """Of the explicit pass, for texts of different lengths and rules that do not conserve."""
    model = bare("BertModel")
    weights = BertWeights.copy_from(model)
    tokens, _ = rows(model.config)
    texts = (tokens[:1], tokens[1:, :4])
    vectors, parts = [], []
    for text in texts:
        states, down = run(weights, text, cp=False)
        n, size = states.shape[1:]
        vectors.append(states[0].sum(dim=0) / n)
        each = []
        for m in range(size):
            start = torch.zeros_like(states)
            start[0, :, m] = states[0, :, m] / n
            each.append(down(start).sum(dim=0)[0])
        parts.append(each)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for of_a, of_b in zip(*parts, strict=True):
        for i in range(6):
            for j in range(4):
                expected[i, j] += of_a[i] * of_b[j]
    expected /= vectors[0].norm() * vectors[1].norm()
    pairs = bilrp(lenslrp.load(model), *texts, "mean", batch_size=7)
    torch.testing.assert_close(pairs.matrix, expected, rtol=1e-8, atol=1e-11)
    best = pairs.top(1).iloc[0]
    assert abs(best["relevance"]) == pytest.approx(float(expected.abs().max()))
    words = pairs.words()
    torch.testing.assert_close(words.matrix, pairs.matrix)  # without a tokenizer, a word is an id
    assert "cosine similarity (mean pooling)" in pairs.plot().axes[0].get_title(loc="left")


def test_images_are_compared_as_well() -> None:
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = made("ViTModel", config)
    torch.manual_seed(2)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        states = model(pixels).last_hidden_state
    bridge = lenslrp.load(model)
    for pooling in ("cls", "mean"):
        vectors = pooled(states, torch.ones(states.shape[:2]), pooling)
        torch.testing.assert_close(lenslrp.embed(bridge, pixels, pooling), vectors)
        _, R = lenslrp.run_with_relevance(bridge, pixels, Similarity(pooling=pooling))
        cosine = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
        torch.testing.assert_close(R.target.value, cosine.expand(2))
        assert abs(R.ledger().error) < 1e-9
        pairs = bilrp(bridge, pixels[:1], pixels[1:], pooling)
        assert pairs.matrix.shape == (5, 5) and pairs.a[1:3] == ["0,0", "0,1"]
        assert pairs.value == pytest.approx(float(cosine))


def test_baselines_take_it() -> None:
    """Of a changed text the other stays as it was: occlusion is the similarity that is lost."""
    model = bare("BertModel")
    tokens, _ = rows(model.config)
    bridge = lenslrp.load(model)
    found = attribute("occlusion", bridge, tokens, Similarity(pooling="mean"))
    vectors = lenslrp.embed(bridge, tokens, "mean")
    one = attribute("occlusion", bridge, tokens[:1], Similarity(vectors[1], "mean"))
    torch.testing.assert_close(found.tokens[:1], one.tokens)
    assert found.tokens.abs().max() > 1e-6


def test_what_is_refused() -> None:
    tokens, _ = rows(bare("BertModel").config)
    bridge = lenslrp.load(bare("BertModel"))

    def explain(target: Any, tokens: Tensor = tokens, bridge: Any = bridge) -> None:
        lenslrp.run_with_relevance(bridge, tokens, target)

    with pytest.raises(lenslrp.InputError, match="does not say how its texts are pooled"):
        explain(Similarity())
    with pytest.raises(lenslrp.InputError, match="not 'means'; did you mean 'mean'"):
        explain(Similarity(pooling="means"))
    with pytest.raises(lenslrp.InputError, match="measure is one of cosine, dot, not 'l2'"):
        explain(Similarity(pooling="mean", measure="l2"))  # type: ignore[arg-type]
    with pytest.raises(lenslrp.InputError, match="pairs of rows, and here are 1"):
        explain(Similarity(pooling="mean"), tokens[:1])
    with pytest.raises(lenslrp.InputError, match="pairs of rows, and here are 1"):
        explain([Similarity(pooling="mean")] * 2)  # a target of a row sees that row only
    with pytest.raises(lenslrp.InputError, match=r"other must be a vector \[16\], not \[3\]"):
        explain(Similarity(torch.zeros(3), "mean"))
    with pytest.raises(lenslrp.InputError, match="component 16 is outside the embedding, of 16"):
        explain(Embedding(16, "mean"))
    with pytest.raises(lenslrp.InputError, match="has 6 tokens, .* reads the first 5"):
        explain(Embedding(0, SentenceEmbedding("mean", longest=5)))
    with pytest.raises(lenslrp.InputError, match="targets.Embedding and targets.Similarity"):
        explain(Logit(3))
    with pytest.raises(lenslrp.InputError, match="one text on each side, not 2"):
        bilrp(bridge, tokens, tokens[:1], "mean")
    head = lenslrp.load(made("BertForMaskedLM", hf.BertConfig(**SIZES)))
    with pytest.raises(lenslrp.InputError, match=r"has a head: .* transformers.AutoModel"):
        explain(Similarity(pooling="mean"), bridge=head)
    with pytest.raises(lenslrp.InputError, match="has a head"):
        lenslrp.embed(head, tokens, "mean")


def test_a_custom_target_on_hidden_states_stays() -> None:
    model = bare("BertModel")
    tokens, _ = rows(model.config)
    bridge = lenslrp.load(model)
    _, R = lenslrp.run_with_relevance(bridge, tokens, Custom(lambda x: x.mean(dim=1)[:, 3]))
    _, E = lenslrp.run_with_relevance(bridge, tokens, Embedding(3, "mean"))
    torch.testing.assert_close(R.tokens, E.tokens)


def test_what_is_no_pooling_and_texts_in_other_forms() -> None:
    encoder = lenslrp.load(bare("BertModel"))
    for pooling in (3, (), ("mean", "avg")):
        with pytest.raises(lenslrp.InputError, match="pooling is one of"):
            SentenceEmbedding(pooling)  # type: ignore[arg-type]
    tokens = torch.tensor([[7, 9, 4]])
    expected = bilrp(encoder, tokens, [5, 6], "mean").matrix
    for text in (tokens[0], [7, 9, 4], [[7, 9, 4]]):
        torch.testing.assert_close(bilrp(encoder, text, [[5, 6]], "mean").matrix, expected)


def test_vectors_of_nothing_but_padding_are_refused() -> None:
    """In float64 the softmax of a column that sees nothing is NaN."""
    decoder = lenslrp.load(bare("LlamaModel"))
    tokens, mask = torch.tensor([[7, 9, 4], [0, 8, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(lenslrp.InputError, match=r"vectors of rows \[1\] are NaN"):
        lenslrp.embed(decoder, tokens, "mean", attention_mask=mask)
