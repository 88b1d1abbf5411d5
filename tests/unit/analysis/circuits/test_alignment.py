"""Pairs of prompts of different lengths: which tokens correspond, and scores by loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lenslrp import InputError
from lenslrp.analysis.circuits.alignment import counterparts
from lenslrp.analysis.circuits.edges import score_edges
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import Circuit, verify
from lenslrp.analysis.circuits.scores import score_nodes
from tests.unit.analysis.circuits.test_circuits import linear_model
from tests.unit.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

Z = "blocks.0.attn.hook_z"


def word_pieces() -> Any:
    """Letters are words of one token; ``ab``, ``abc`` and ``fg`` are of two, three and two."""
    pieces = ["<s>", "</s>", *"abcdefgh", *(f"##{x}" for x in "abcdefgh"), "?"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(pieces)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##")
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", bos_token="<s>")


def bridge(family: str = "llama") -> Any:
    return tiny(family, tokenizer=word_pieces())


def made(model: Any, clean: list[str], corrupt: list[str], align: str | None) -> Pairs:
    n = len(clean)
    return Pairs.from_texts(
        model, clean, corrupt, ["d"] * n, ["e"] * n, prepend_bos=False, align=align
    )


@pytest.mark.parametrize(
    ("clean", "corrupt", "align", "places"),
    [
        ("d abc e f", "d g e f", "span", [0, -1, -1, 1, 2, 3]),
        ("d g e f", "d abc e f", "span", [0, 3, 4, 5]),
        ("d fg e f", "d abc e f", "span", [0, 2, 3, 4, 5]),
        ("d e f", "d h g e f", "span", [0, 3, 4]),
        ("d abc", "d g", "span", [0, -1, -1, 1]),
        ("abc e f abc e", "g e f g e", "words", [-1, -1, 0, 1, 2, -1, -1, 3, 4]),
        ("fg e abc h", "abc e fg f", "span", list(range(7))),
        ("a fg", "abc f", "words", [2, -1, 3]),
    ],
)
def test_which_tokens_correspond(clean: str, corrupt: str, align: str, places: list[int]) -> None:
    tokenizer = word_pieces()
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in (clean, corrupt)]
    assert counterparts(*rows, align, tokenizer) == places


@pytest.mark.parametrize(
    ("clean", "corrupt", "align", "message"),
    [
        ("d ab", "d a", None,
         "pair 0: the prompts have 3 and 2 tokens, and must have the same number, so that "
         "positions correspond; align='span' or 'words' says which do where they have not"),
        ("d ab", "d a", "start", "pair 0: align must be one of span, words, not 'start'"),
        ("ab e f ab e", "g e f g e", "span",
         "pair 0: the prompts differ in more than one place, or repeat a token where they differ"),
        ("d e", "d e f", "span",
         "pair 0: the prompts have 2 and 3 tokens, and their last tokens do not correspond"),
        ("d e", "d e f", "words", "pair 0: the prompts have 2 and 3 words"),
    ],
)  # fmt: skip
def test_what_cannot_be_aligned(clean: str, corrupt: str, align: str | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        made(bridge(), [clean], [corrupt], align)
    assert str(caught.value).startswith(message)


def test_masks_and_counterparts_of_a_batch() -> None:
    pairs = made(bridge(), ["d abc e", "d f", "g e"], ["d g e", "d abc", "h e"], "span")
    assert pairs.corrupt_mask is not None and pairs.counterpart is not None
    assert pairs.mask.sum(dim=1).tolist() == [5, 2, 2]
    assert pairs.corrupt_mask.sum(dim=1).tolist() == [3, 4, 2]
    assert pairs.counterpart.tolist() == [[0, -1, -1, 1, 2], [0, 3, -1, -1, -1], [0, 1, -1, -1, -1]]
    part = pairs[1:]
    assert part.clean.shape == (2, 2) and part.corrupt.shape == (2, 4)
    assert part.counterpart is not None and part.counterpart.tolist() == [[0, 3], [0, 1]]
    back = pairs.seen_from("corrupt")
    assert back.mask.tolist() == pairs.corrupt_mask.tolist()
    assert back.counterpart is not None
    assert back.counterpart.tolist() == [[0, 3, 4, -1], [0, -1, -1, 1], [0, 1, -1, -1]]
    alike = made(bridge(), ["d g e"], ["d f e"], "span")
    assert alike.corrupt_mask is None and alike.counterpart is None


def looped(model: Any, pairs: Pairs, row: int, direction: str, node: Node) -> float:
    """The effect of one head, from plain runs without padding and the map between tokens."""
    assert pairs.corrupt_mask is not None and pairs.counterpart is not None
    clean, corrupt = pairs.clean[row][pairs.mask[row]], pairs.corrupt[row][pairs.corrupt_mask[row]]
    places = [(i, int(j)) for i, j in enumerate(pairs.counterpart[row][: len(clean)]) if j >= 0]
    base, other = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    to_base = [(j, i) for i, j in places] if direction == "denoising" else places
    if node.position is not None:
        wanted = node.position % len(base)
        to_base = [(into, source) for into, source in to_base if into == wanted]
    _, cache = model.run_with_cache(other[None])

    def put(x: Tensor, hook: Any) -> Tensor:
        y = x.clone()
        for into, source in to_base:
            y[0, into, node.unit] = cache[node.hook][0, source, node.unit]
        return y

    def gap() -> Tensor:
        logits = model(base[None])[0, -1]
        return logits[pairs.answers[row]] - logits[pairs.rivals[row]]

    with torch.no_grad():
        before = gap()
        with model.hooks(fwd_hooks=[(node.hook, put)]):
            return float(gap() - before)


CLEAN = ["d abc e f", "d g h", "fg b d e"]
CORRUPT = ["d g e f", "d abc h", "c b d e"]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exact_effects_are_those_of_a_loop(family: str, direction: str) -> None:
    model = bridge(family)
    pairs = made(model, CLEAN, CORRUPT, "span")
    scores = score_nodes(
        model, pairs, method="exact", components=["heads"], direction=direction, chunk=2
    )
    placed = score_nodes(
        model, pairs, method="exact", components=["heads"], direction=direction, by_position=True,
        chunk=2,
    )  # fmt: skip
    for row in range(3):
        for unit in range(2):
            expected = looped(model, pairs, row, direction, Node(Z, unit))
            assert float(scores.values[Z][row, unit]) == pytest.approx(expected, abs=1e-9)
            for position in range(int(placed.mask[row].sum())):
                expected = looped(model, pairs, row, direction, Node(Z, unit, position))
                found = float(placed.values[Z][row, position, unit])
                assert found == pytest.approx(expected, abs=1e-9), (row, unit, position)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_estimates_are_exact_on_a_linear_model(direction: str) -> None:
    model = linear_model()
    words = made(bridge(), CLEAN, CORRUPT, "words")
    shared: dict[str, Any] = {"direction": direction, "by_position": True, "chunk": 2}
    exact = score_nodes(model, words, method="exact", **shared)
    assert max(effects.abs().max() for effects in exact.values.values()) > 1
    for method in ("relevance", "attribution"):
        found = score_nodes(model, words, method=method, **shared)
        for hook, effects in exact.values.items():
            assert torch.allclose(found.values[hook], effects, atol=1e-9), hook
    names: dict[str, Any] = {"direction": direction, "components": ("tokens", "heads", "mlp")}
    edges = score_edges(model, words, **names)
    nodes = score_nodes(model, words, **names)
    for hook, sums in edges.outgoing().items():
        assert torch.allclose(sums, nodes.values[hook], rtol=0, atol=1e-7), hook
    best = edges.best(4)
    measured = score_edges(model, words, method="exact", only=best, **names)
    for up, down in best:
        assert torch.allclose(measured.score(up, down), edges.score(up, down), atol=1e-7)
    assert any(down != TARGET for _, down in best)


def test_answers_of_several_tokens_behind_prompts_of_different_lengths() -> None:
    model = bridge()
    pairs = Pairs.from_texts(
        model, CLEAN, CORRUPT, ["abc", "fg", "d"], ["h", "e", "fg"],
        prepend_bos=False, align="span", several_tokens=True,
    )  # fmt: skip
    assert pairs.answers.tolist() == [[2, 11, 12], [7, 16, -1], [5, -1, -1]]
    for side, texts in (("clean", CLEAN), ("corrupt", CORRUPT)):
        for row, text in enumerate(texts):
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            total = 0.0
            for sign, answers in ((1, pairs.answers), (-1, pairs.rivals)):
                answer = answers[row][answers[row] >= 0].tolist()
                for end, token in enumerate(answer):
                    with torch.no_grad():
                        logits = model(torch.tensor([ids + answer[:end]]))[0, -1]
                    total += sign * float(logits[token] - logits.exp().sum().log())
            assert float(pairs.measured(model, side=side)[row]) == pytest.approx(total, abs=1e-9)
    whole = score_nodes(model, pairs, method="exact", components=["mlp"], by_position=True)
    some = [score_nodes(model, pairs[i : i + 1], method="exact", components=["mlp"],
                        by_position=True) for i in range(3)]  # fmt: skip
    for hook, value in whole.values.items():
        for row, alone in enumerate(some):
            one = alone.values[hook][0]
            assert torch.allclose(value[row, : len(one)], one, rtol=0, atol=1e-9)
            assert (value[row, len(one) :] == 0).all()


def test_what_different_lengths_do_not_allow_is_refused_by_name() -> None:
    model = bridge()
    pairs = made(model, CLEAN, CORRUPT, "span")
    circuit = Circuit({Z: "heads"}, {Z: torch.tensor([True, False])})
    with pytest.raises(InputError, match="not every token of the clean run has activations in"):
        verify(model, pairs, [circuit])
    with pytest.raises(InputError, match="have different numbers of tokens: give another method"):
        score_nodes(model, pairs, method="integrated")
    with pytest.raises(InputError, match="have different numbers of tokens: give another method"):
        score_edges(model, pairs, method="integrated")
    whole = Circuit({Z: "heads"}, {Z: torch.tensor([True, True])})
    assert verify(model, pairs, [whole], ablation="mean").faithfulness == pytest.approx([1.0])
