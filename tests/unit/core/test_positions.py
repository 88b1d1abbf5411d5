"""One meaning for every way to name a token, wherever padding stands (docs/reference/positions.md).

Each way is given a position and says which token of one row's own text it took it for, counted from
that text's first token. Whatever the padding, it must be the same one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp.analysis import Edit, edit_units
from lenslrp.analysis.attribution.attention import attention_rollout
from lenslrp.analysis.circuits.edges import score_edges
from lenslrp.analysis.circuits.graph.graphs import attribution_graph
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import score_nodes
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.passes.problems import resolve
from lenslrp.analysis.passes.prompts import as_prompt
from lenslrp.analysis.steering.operations import Ablate, steer
from lenslrp.analysis.units.kinds import Neuron
from lenslrp.analysis.views import figures as plots
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.targets import Activation, Contrastive, Logit, LogitDiff, LogProb, Top
from lenslrp.views.heatmap import token_heatmap
from tests.conformance import zoo, zoo_media
from tests.unit.tiny import tiny, word_tokenizer

EARLY, POST = "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"
Z, LATER = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"
PATTERN = "blocks.1.attn.hook_pattern"
OWN, OTHER = [3, 17, 5, 8], [2, 9, 2, 21, 9, 14]
N = len(OWN)
POSITIONS = (-1, 0, 2, -3)
VALUE = 7.0  #: what edits write


@dataclass(frozen=True, eq=False)
class Case:
    """A batch whose first row is asked about.

    Attributes:
        given: the batch as ``run_with_relevance`` takes it.
        passed: what the model's own forward pass takes besides the tokens.
        real: of the first row, True where a token is real.
    """

    model: Any
    tokens: Tensor | None
    real: Tensor
    given: Mapping[str, Any] = field(default_factory=dict)
    passed: Mapping[str, Any] = field(default_factory=dict)

    def relevance(self, target: Any, names_filter: Any = ()) -> Any:
        return lenslrp.run_with_relevance(
            self.model, self.tokens, target, names_filter=list(names_filter), **self.given
        )[1]

    def forward(self) -> Tensor:
        logits: Tensor = self.model(self.tokens, **self.passed)
        return logits

    def place(self, column: int) -> int:
        """Which of the row's own tokens stands in a column."""
        assert self.real[column]
        return int(self.real[:column].sum())


@cache
def decoder_model() -> Any:
    return tiny(tokenizer=word_tokenizer()).to(torch.float32)


def case(padding: str) -> Case:
    rows = [OWN] if padding == "none" else [OWN, OTHER]
    batch = Batch.of_rows(rows, "left" if padding == "left" else "right")
    mask = {} if padding == "none" else {"attention_mask": batch.mask.long()}
    return Case(decoder_model(), batch.tokens, batch.mask[0], mask, mask)


def nearest(values: Tensor, value: Tensor | float) -> int:
    """Which of the values [token, ...] it is."""
    away = (values - torch.as_tensor(value)).abs().flatten(1 if values.ndim > 1 else 0)
    away = away.amax(dim=1) if away.ndim > 1 else away
    best = int(away.argmin())
    assert away[best] < 2e-6 < 2e-5 < away[[i for i in range(len(away)) if i != best]].min()
    return best


@cache
def alone() -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [token, vocab] and activations of the first row, run alone."""
    logits, found = decoder_model().run_with_cache(torch.tensor([OWN]))
    return logits[0].detach(), {name: found[name][0].detach() for name in (POST, PATTERN)}


LOGITS: dict[str, tuple[Callable[[int], Any], Callable[[Tensor], Tensor]]] = {
    "Logit": (lambda p: Logit(5, p), lambda x: x[:, 5]),
    "LogProb": (lambda p: LogProb(5, p), lambda x: x.log_softmax(-1)[:, 5]),
    "LogitDiff": (lambda p: LogitDiff(5, 6, p), lambda x: x[:, 5] - x[:, 6]),
    "Contrastive": (
        lambda p: Contrastive(5, p),
        lambda x: x[:, 5] - (x.sum(-1) - x[:, 5]) / (x.shape[1] - 1),
    ),
    "Top": (lambda p: Top(p), lambda x: x.max(-1).values),
}


def of_logits(case: Case, position: int, *, kind: str) -> int:
    make, read = LOGITS[kind]
    return nearest(read(alone()[0]), case.relevance(make(position)).target.value[0])


def activation(case: Case, position: int) -> int:
    value = case.relevance(Activation(POST, 3, position)).target.value[0]
    return nearest(alone()[1][POST][:, 3], value)


def query(case: Case, position: int) -> int:
    value = case.relevance(Activation(PATTERN, (0, 0), position)).target.value[0]
    return nearest(alone()[1][PATTERN][0, :, 0], value)


def key(case: Case, position: int) -> int:
    value = case.relevance(Activation(PATTERN, (0, position), -1)).target.value[0]
    return nearest(alone()[1][PATTERN][0, -1], value)


def written(
    case: Case, context: Any, hook: str = POST, run: Callable[[], Any] | None = None
) -> int:
    """Where a context sets neuron 3 of the first row to ``VALUE``."""
    seen: list[Tensor] = []
    reads = (hook, lambda x, hook: seen.append(x.detach()))
    with torch.no_grad(), context, case.model.hooks(fwd_hooks=[reads]):
        (run or case.forward)()
    (column,) = (seen[0][0, :, 3] == VALUE).nonzero().flatten().tolist()
    return case.place(column)


def edit(position: int, hook: str = POST) -> Edit:
    return Edit(hook, (3,), shift=VALUE, rows=(0,), positions=(position,))


def edited(case: Case, position: int) -> int:
    return written(case, edit_units(case.model, [edit(position)]))


def edited_all_rows(case: Case, position: int) -> int:
    every = Edit(POST, (3,), shift=VALUE, positions=(position,))
    return written(case, edit_units(case.model, [every]))


def edited_in_explanation(case: Case, position: int) -> int:
    context = edit_units(case.model, [edit(position)])
    run = torch.enable_grad()(partial(case.relevance, 5))
    return written(case, context, run=run)


def steered(case: Case, position: int) -> int:
    return written(case, steer(case.model, [Ablate(Neuron(1, 3), VALUE)], prompt=[position]))


def operation(case: Case, position: int) -> int:
    one = Ablate(Neuron(1, 3), VALUE, prompt=[position], rows=(0,))
    return written(case, steer(case.model, [one], generation="none"))


def generated(case: Case, position: int) -> int:
    """Edits during a generation without a cache, whose text grows: the prompt's token it is."""
    padded = case.model.tokenizer.pad_token_id
    tokens = case.tokens.masked_fill(~case.given["attention_mask"].bool(), padded)
    seen: list[Tensor] = []
    reads = (POST, lambda x, hook: seen.append(x.detach()))
    with edit_units(case.model, [edit(position)]), case.model.hooks(fwd_hooks=[reads]):
        case.model.generate(
            tokens, max_new_tokens=2, do_sample=False, verbose=False, stop_at_eos=False,
            attention_mask=case.given["attention_mask"], use_past_kv_cache=False,
        )  # fmt: skip
    assert len(seen) == 2 and seen[1].shape[1] == seen[0].shape[1] + 1
    columns = {int((x[0, :, 3] == VALUE).nonzero()) for x in seen}
    assert len(columns) == 1
    return case.place(columns.pop())


def pairs(case: Case) -> Pairs:
    clean = case.tokens.clone()
    clean[:, 0] += 1
    count = len(clean)
    return Pairs(
        clean, case.tokens, case.given.get("attention_mask", torch.ones_like(clean)).bool(),
        torch.full((count,), 5), torch.full((count,), 6),
    )  # fmt: skip


def patched(case: Case, position: int) -> int:
    scores = score_nodes(
        case.model, pairs(case), method="exact", components=["heads"], by_position=True,
        only=[Node(Z, 1, position)], chunk=1,
    )  # fmt: skip
    (column,) = (scores.values[Z][0, :, 1].nan_to_num(0.0) != 0).nonzero().flatten().tolist()
    assert column in scores.to_dataframe()["position"].tolist()
    return case.place(column)


def upstream(case: Case, position: int) -> int:
    up, down = Node(Z, 1, position), Node(LATER, 1, -1)
    scores = score_edges(
        case.model, pairs(case), method="exact", components=["heads"], by_position=True,
        only=[(up, down)],
    )  # fmt: skip
    found = scores.values[Z][0, 0, :, 1]
    (column,) = (found.nan_to_num(0.0) != 0).nonzero().flatten().tolist()
    assert scores.score(up, down)[0] == found[column]
    return case.place(column)


def downstream(case: Case, position: int) -> int:
    """The edges from the tokens into a head: of which token's head are they?"""
    score = partial(score_edges, case.model, components=["tokens", "heads"], by_position=True)
    every = score(pairs(case)[:1], into=[Node(Z, 1, place) for place in range(N)])
    one = score(pairs(case), into=[Node(Z, 1, position)])
    return nearest(every.values["hook_embed"][0, :, 0], one.values["hook_embed"][0, 0, 0])


def top(case: Case, position: int) -> int:
    own = case.relevance(5, [EARLY])
    frame = own.top(k=10_000, row=0)
    entry = frame[(frame["neuron"] == 3) & (frame["position"] == position % N)].iloc[0]
    assert entry["token"] == own.str_tokens[0][case.real.nonzero()[position]]
    return nearest(own[EARLY][0, case.real, 3], entry["relevance"])


def top_at(case: Case, position: int) -> int:
    own = case.relevance(5, [EARLY])
    frame = own.top(k=10_000, row=0, position=position)
    (entry,) = frame[frame["neuron"] == 3].itertuples()
    return nearest(own[EARLY][0, case.real, 3], entry.relevance)


def frame(case: Case, position: int) -> int:
    own = case.relevance(5)
    rows = own.to_dataframe()
    entry = rows[(rows["row"] == 0) & (rows["position"] == position % N)].iloc[0]
    assert own.batch.column(position) == int(case.real.nonzero()[position])
    return nearest(own.tokens[0, case.real], entry["relevance"])


def words(case: Case, position: int) -> int:
    frame = case.relevance(5).words(0)
    return frame["positions"].tolist().index([position % N])


def residual(case: Case, position: int) -> int:
    own = case.relevance(5, ["hook_resid_pre", "hook_resid_post"])
    assert own.residual(0).shape[1] == N
    column = torch.tensor(own.residual(0)[position % N].tolist())
    every = torch.stack(
        [own[f"blocks.{n}.hook_resid_{at}"][0, case.real].sum(-1)
         for n, at in ((0, "pre"), (1, "pre"), (1, "post"))]
    )  # fmt: skip
    return nearest(every.T, column)


def heatmap(case: Case, position: int) -> int:
    found = case.relevance(5)
    mask = found.attention_mask[0]
    shown = token_heatmap(found.str_tokens[0], found.tokens[0], attention_mask=mask)
    tiles = [int(place) for place in re.findall(r"⁩ · position (\d+) ·", shown)]
    return tiles.index(position % N)


def picture(case: Case, position: int) -> int:
    figure = plots.token_bars(case.relevance(5), 0)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    return [int(label.split()[-1]) for label in labels].index(position % N)


def rollout(case: Case, position: int) -> int:
    question = resolve(case.model, case.tokens, Logit(5), **case.given)
    found = attention_rollout(question, seed=0, position=position)
    return int((found[0, case.real] > 0).sum()) - 1  # causal: it reads what is not after it


def perturbed_target(case: Case, position: int) -> int:
    (place,) = as_prompt(case.model, case.tokens, Logit(5, position)).positions
    return place


def kept(case: Case, position: int) -> int:
    prompt = as_prompt(case.model, case.tokens, Logit(5))
    (place,) = set(range(N)) - set(tokens_of(case.model, prompt, keep=[position]).index.tolist())
    return int(place)


def graph(case: Case, position: int) -> int:
    nodes = attribution_graph(case.model, case.tokens, Logit(5, position), k=4).nodes
    (place,) = nodes.loc[nodes["kind"] == "target", "position"]
    return int(place)


Way = Callable[[Case, int], int]
BATCHES = ("left", "right", "none")
WAYS: dict[str, tuple[Way, tuple[str, ...]]] = {
    **{f"targets.{kind}": (partial(of_logits, kind=kind), BATCHES) for kind in LOGITS},
    "targets.Activation": (activation, BATCHES),
    "targets.Activation of a pattern, query": (query, BATCHES),
    "targets.Activation of a pattern, key": (key, BATCHES),
    "Edit(positions=)": (edited, BATCHES),
    "Edit(positions=) in all rows": (edited_all_rows, BATCHES),
    "Edit(positions=) inside run_with_relevance": (edited_in_explanation, BATCHES),
    "Edit(positions=) while generating": (generated, ("left",)),
    "steer(prompt=)": (steered, BATCHES),
    "an operation's prompt=": (operation, BATCHES),
    "score_nodes(only=)": (patched, ("right", "none")),
    "score_edges(only=)": (upstream, ("right", "none")),
    "score_edges(into=)": (downstream, ("right", "none")),
    "R.top(), column position": (top, BATCHES),
    "R.top(position=)": (top_at, BATCHES),
    "R.to_dataframe(), column position": (frame, BATCHES),
    "R.words(), column positions": (words, BATCHES),
    "R.residual(), columns": (residual, BATCHES),
    "the heatmap's positions": (heatmap, BATCHES),
    "the figures' positions": (picture, BATCHES),
    "attention_rollout(position=)": (rollout, BATCHES),
    "as_prompt(target)": (perturbed_target, ("none",)),
    "tokens_of(keep=)": (kept, ("none",)),
    "attribution_graph, column position": (graph, ("none",)),
}


@pytest.mark.parametrize(
    ("way", "padding"), [(way, padding) for way, (_, on) in WAYS.items() for padding in on]
)
def test_a_position_is_the_same_token_in_every_way(way: str, padding: str) -> None:
    named = [WAYS[way][0](case(padding), position) for position in POSITIONS]
    assert named == [position % N for position in POSITIONS]


@cache
def two_stacks() -> Any:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=23, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return lenslrp.load(model, tokenizer=word_tokenizer())


def encoder_decoder(padding: str) -> tuple[Case, Case]:
    """The first row's encoder text and its decoder text, which is the shorter one of the two."""
    read = Batch.of_rows([OWN, OTHER], padding)
    written = Batch.of_rows([[0, 4, 5], [0, 6, 7, 8, 9]])
    given = {"attention_mask": read.mask.long(), "decoder_input": ["c d", "e f g h"]}
    passed = {
        "attention_mask": read.mask.long(),
        "decoder_input_ids": written.tokens,
        "decoder_attention_mask": written.mask.long(),
    }
    make = partial(Case, two_stacks(), read.tokens, given=given, passed=passed)
    return make(real=read.mask[0]), make(real=written.mask[0])


STACKS = {
    "encoder_blocks.1.mlp.hook_post": 0,
    "decoder_blocks.1.mlp.hook_post": 1,
    "decoder_blocks.1.cross_attn.hook_k": 0,
}
"""Hook point -> whose text it holds: the encoder's, the decoder's."""


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("hook", STACKS)
def test_in_an_encoder_decoder_a_position_is_of_the_hook_points_own_text(
    hook: str, padding: str
) -> None:
    case = encoder_decoder(padding)[STACKS[hook]]
    length = int(case.real.sum())
    unit: Any = (1, 3) if hook.endswith("hook_k") else 3
    for position in (-1, 0, 1, -2):
        explained = case.relevance(Activation(hook, unit, position), [hook])
        seen: list[Tensor] = []
        with (
            torch.no_grad(),
            two_stacks().hooks(fwd_hooks=[(hook, lambda x, hook, seen=seen: seen.append(x))]),
        ):
            case.forward()
        own = seen[0][0, case.real]
        values = own[:, 1, 3] if isinstance(unit, tuple) else own[:, 3]
        at = values[position % length]
        assert torch.allclose(explained.target.value[0], at, atol=1e-4)
        if not isinstance(unit, tuple):
            context = edit_units(two_stacks(), [edit(position, hook)])
            assert written(case, context, hook) == position % length


@pytest.mark.parametrize("padding", ["left", "right"])
def test_in_an_encoder_decoder_tables_name_the_token_of_the_hook_points_own_text(
    padding: str,
) -> None:
    case, decoder = encoder_decoder(padding)
    hooks = [hook for hook in STACKS if "mlp" in hook]
    for hook, own in zip(hooks, (case, decoder), strict=True):
        found = own.relevance(5, [hook])
        tokens = found.str_tokens if own is case else found.decoder_str_tokens
        shown = [token for token, real in zip(tokens[0], own.real, strict=True) if real]
        frame = found.top(k=10_000, row=0)
        for entry in frame.itertuples():
            column = int(own.real.nonzero()[entry.position]) if entry.position < len(shown) else -1
            assert column < 0 or entry.token == shown[entry.position]
            assert entry.relevance == float(found[hook][0, column, entry.neuron])
    value = decoder.relevance(Logit(5, -1)).target.value[0]
    with torch.no_grad():
        logits = decoder.forward()[0, decoder.real]
    assert nearest(logits[:, 5], value) == len(logits) - 1
    frame = case.relevance(5).words(0)
    assert [place for at in frame["positions"] for place in at] == list(range(N))


def test_patches_of_an_image_count_with_what_stands_before_them() -> None:
    model = zoo.build("ViTForImageClassification")
    image = lenslrp.media.example(model, batch=2)
    hook = "blocks.1.mlp.hook_post"
    _, found = model.run_with_cache(None, **image)
    length = found[hook].shape[1]
    case = Case(model, None, torch.ones(length).bool(), image, image)
    for position in (-1, 0, 2, -3):
        value = case.relevance(Activation(hook, 3, position), [hook]).target.value[0]
        assert value == pytest.approx(float(found[hook][0, position, 3]), abs=1e-9)
        assert written(case, edit_units(model, [edit(position, hook)]), hook) == position % length
    frame = case.relevance(1, [hook]).top(k=10_000)
    assert sorted(set(frame["position"])) == list(range(length))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_tokens_of_an_image_in_a_text_count_as_its_tokens(padding: str) -> None:
    model = zoo.build("LlavaForConditionalGeneration", torch.float32)
    tokens, floats, others = zoo_media.example("LlavaForConditionalGeneration", torch.float32)
    single = {name: value[:1] for name, value in floats.items()}
    length, hook = tokens.shape[1] - 2, "blocks.1.mlp.hook_post"
    own = tokens[0, :length]
    batch = Batch.of_rows([own, tokens[1]], padding)
    mask = batch.mask.long()
    passed = {**floats, **others, "attention_mask": mask}
    case = Case(model, batch.tokens, batch.mask[0], passed, passed)
    logits = model(own[None], **single)[0].detach()
    for position in (-1, 0, 3, -3):
        value = case.relevance(Logit(5, position)).target.value[0]
        assert nearest(logits[:, 5], value) == position % length
        assert written(case, edit_units(model, [edit(position, hook)]), hook) == position % length
        steering = steer(model, [Ablate(Neuron(1, 3), VALUE)], prompt=[position])
        assert written(case, steering, hook) == position % length


def test_a_position_that_a_row_lacks_is_refused_in_every_way() -> None:
    message = re.escape(
        f"is out of range: the shortest row has {N} tokens, so positions go from {-N} to {N - 1}"
    )
    for position in (N, -N - 1):
        for padding in ("left", "right"):
            given = case(padding)
            for way in (of_logits_5, activation, query, key, edited_all_rows, steered, rollout):
                with pytest.raises(InputError, match=message):
                    way(given, position)
            with pytest.raises(InputError, match=message):
                edited(given, position)  # in the one row that is too short
        for way in (perturbed_target, kept):
            with pytest.raises(InputError, match=message):
                way(case("none"), position)
    with pytest.raises(InputError, match=message):
        patched(case("right"), -N - 1)
    with pytest.raises(InputError, match="the longest prompt has 6 tokens"):
        patched(case("right"), len(OTHER))


of_logits_5 = partial(of_logits, kind="Logit")


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_and_columns_are_inverse(side: str) -> None:
    batch = Batch.of_rows([OWN, OTHER, [4]], side)
    assert batch.lengths == [4, 6, 1]
    for row, length in enumerate(batch.lengths):
        for position in range(-length, length):
            column = batch.column(position, row)
            assert int(batch.positions[row, column]) == position % length
            assert int(batch.tokens[row, column]) == (OWN, OTHER, [4])[row][position]
        assert (batch.positions[row][~batch.mask[row]] == -1).all()
    x = torch.arange(18.0).view(3, 6, 1)
    assert batch.picked(x, -1).flatten().tolist() == [
        float(6 * row + batch.column(-1, row)) for row in range(3)
    ]
    with pytest.raises(InputError, match="must be an integer, not True"):
        batch.columns(True)
    with pytest.raises(InputError, match="position 1 is out of range: the shortest row has 1 "):
        batch.columns(1)
