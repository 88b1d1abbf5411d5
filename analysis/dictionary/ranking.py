"""Which units belong to a concept, without its words being in their examples.

**By weights** (`find_written`): what a unit writes is projected on the tokens of the words, and
compared with its projection on the whole vocabulary. With the vocabulary's rows `w` of mean `m` and
covariance `C`, and what the unit writes, `v`, behind the final norm's gain::

    score(unit, token) = (w[token] - m) . v / sqrt(v . C v)

in standard deviations of the unit's own projection; a unit's score is the mean over the words. No
list is read, so that a unit is found too that has the word in place 40, or six related ones.

**By meaning** (`find_meaning`): a sentence encoder reads the query and the documents of the
examples. A unit's score is the mean cosine of its examples' documents with the query, each weighed
by the example's strength, less the mean over all units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.dictionary.finding import Found, find, require_words
from lenslrp.analysis.dictionary.unit import require_same_model
from lenslrp.analysis.dictionary.vocabulary_lists import written_vectors
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.analysis.units.projection import project
from lenslrp.analysis.units.unembedding import (
    measure_gain,
    output_norm,
    token_labels,
    unembedding,
)
from lenslrp.embedding import embed
from lenslrp.errors import InputError
from lenslrp.models.loading import load
from lenslrp.text.names import token_ids
from lenslrp.text.visible_text import running
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary

ENCODER = "all-minilm-l6-v2"
UNITS_AT_ONCE = 4096
ROWS_AT_ONCE = 16_384
TEXTS_AT_ONCE = 16


@dataclass(frozen=True, eq=False, repr=False)
class RankedUnits(Shown):
    """Units by a concept, best first.

    Attributes:
        words: what was asked for.
        by: `"writes"` or `"meaning"`.
        units: one row a unit: `unit, hook, index`; by writing `side` (`"top"`: its activation
            raises the words' logits, `"bottom"`: lowers them), `score` (standard deviations of its
            projection), `token` (the one of the words' that it writes most) and `rank` (of that
            token at that side, from 0); by meaning `score` (cosine above the mean unit's), `doc`
            and `sentence` (the window of the example that is nearest).
        missing: hook point -> why its units were left out.
    """

    words: tuple[str, ...]
    by: str
    units: pd.DataFrame
    missing: dict[str, str]

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.hook}[{row.index}]" for row in self.top(3).itertuples())
        asked = ", ".join(map(repr, self.words))
        return f"RankedUnits({asked}, by {self.by}: {len(self)} units; best {best or '-'})"

    def top(self, k: int = 10) -> pd.DataFrame:
        """The first `k` rows of `units`."""
        return self.units.head(k)

    def to_dataframe(self) -> pd.DataFrame:
        """`units`."""
        return self.units

    def face(self) -> Face:
        shown = self.units.drop(columns="unit")
        if "sentence" in shown:
            shown["sentence"] = shown["sentence"].map(running)
        notes = [f"{hook} is left out: {why}" for hook, why in self.missing.items()]
        title = f"Units by {', '.join(self.words)}"
        return Face(title, {"units": len(self), "by": self.by}, shown, notes=notes)


def find_units(
    d: NeuronDictionary,
    words: Sequence[str],
    *,
    criterion: str = "actmax",
    limit: int = 20,
    by: str = "examples",
    model: TransformerBridge | None = None,
    encoder: TransformerBridge | None = None,
) -> Found | RankedUnits:
    """Units by the words of a concept.

    Args:
        d: an open dictionary.
        words: words or phrases, any of which will do; by writing, words of one token each; by
            meaning, words or sentences, whose mean is taken.
        criterion: whose examples are read.
        limit: how many units.
        by: `"examples"`: their examples hold the words more often than by chance (see
            `lenslrp.analysis.dictionary.finding`); `"writes"`: they write the words by their
            weights; `"meaning"`: the documents of their examples are near.
        model: the bridge that the dictionary was built from, of `"writes"`: a dictionary holds no
            weights.
        encoder: a sentence encoder, of `"meaning"`; None for the embedded ``all-minilm-l6-v2``.

    Raises:
        InputError: no word; another `by`, or one without its model; what `find`, `find_written`
            and `find_meaning` refuse.
    """
    if by == "examples" and model is None and encoder is None:
        return find(d, words, criterion, limit)
    require_words(words)
    if by == "writes" and model is not None and encoder is None:
        return find_written(d, words, model, limit)
    if by == "meaning" and model is None:
        return find_meaning(d, words, encoder, criterion, limit)
    raise InputError(
        "find goes by='examples', by='writes' with model=, or by='meaning' with or without "
        f"encoder=; given is by={by!r}, model={_given(model)}, encoder={_given(encoder)}"
    )


def _given(model: TransformerBridge | None) -> str:
    return "None" if model is None else "a model"


def find_written(
    d: NeuronDictionary, words: Sequence[str], model: TransformerBridge, limit: int = 20
) -> RankedUnits:
    """Units that write the words, over the whole vocabulary; see the module.

    Args:
        d: an open dictionary.
        words: each one token of the model, alone or after a space.
        model: the bridge that the dictionary was built from.
        limit: how many units.

    Raises:
        InputError: no word, a word of several tokens, another model, or one that writes no tokens.
    """
    require_same_model(d, model)
    forms = [_forms(model, word) for word in words]
    rows, _ = unembedding(model)
    mean, covariance = _moments(rows)
    norm = output_norm(model)
    scores = torch.full((len(d), len(forms)), torch.nan)
    tokens = torch.zeros(len(d), len(forms), dtype=torch.int64)
    missing: dict[str, str] = {}
    for place in d.plan.places:
        try:
            units = [parse_unit(place.name(i)) for i in range(place.size)]
            vectors = written_vectors(model, units)["out"]
        except InputError as error:
            missing[place.hook] = str(error)
            continue
        for first, some in enumerate(vectors.split(UNITS_AT_ONCE)):
            some = some.to(rows.device)
            if norm is not None:
                some = measure_gain(model, norm, some).forward(some)
            some = some.double()
            deviation = (some @ covariance * some).sum(dim=1).clamp_min(1e-30).sqrt()
            at = slice(place.first + first * UNITS_AT_ONCE, None)
            for column, ids in enumerate(forms):
                each = some @ (rows[ids].double() - mean).T / deviation[:, None]
                best = each.abs().argmax(dim=1, keepdim=True)
                scores[at, column][: len(some)] = each.gather(1, best)[:, 0].float().cpu()
                tokens[at, column][: len(some)] = torch.tensor(ids)[best[:, 0].cpu()]
    if len(missing) == len(d.plan.places):
        raise InputError(f"no unit writes tokens: {'; '.join(dict.fromkeys(missing.values()))}")
    score = scores.mean(dim=1)
    order = score.abs().nan_to_num(-1).argsort(descending=True, stable=True)[:limit].tolist()
    order = [unit for unit in order if not score[unit].isnan()]
    records, label = [], token_labels(model)
    for unit in order:
        sign = 1 if score[unit] >= 0 else -1
        token = int(tokens[unit, (sign * scores[unit]).argmax()])
        written = written_vectors(model, [parse_unit(d.name(unit))])["out"]
        projected = sign * project(model, written)[0]
        rank = int((projected > projected[token]).sum())
        side = "top" if sign > 0 else "bottom"
        records.append((*d.named(unit), side, float(score[unit]), label(token), rank))
    columns = ["unit", "hook", "index", "side", "score", "token", "rank"]
    return RankedUnits(tuple(words), "writes", pd.DataFrame(records, columns=columns), missing)


def _forms(model: TransformerBridge, word: str) -> list[int]:
    """The word as one token, at the start of a text and after a space."""
    both = [token_ids(model.tokenizer, text) for text in (word.strip(), f" {word.strip()}")]
    single = list(dict.fromkeys(ids[0] for ids in both if len(ids) == 1))
    if not single:
        pieces = list(map(token_labels(model), both[1]))
        raise InputError(f"{word!r} is {len(pieces)} tokens ({pieces}); give words of one token")
    return single


def _moments(rows: Tensor) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_model"]]:
    """Mean and covariance of rows, in float64."""
    mean = rows.double().mean(dim=0)
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for some in rows.split(ROWS_AT_ONCE):
        centred = some.double() - mean
        total += centred.T @ centred
    return mean, total / len(rows)


def find_meaning(
    d: NeuronDictionary,
    words: Sequence[str],
    encoder: TransformerBridge | None = None,
    criterion: str = "actmax",
    limit: int = 20,
) -> RankedUnits:
    """Units whose examples mean what the words say; see the module.

    Args:
        d: an open dictionary.
        words: a sentence, or several words and sentences, whose mean is taken.
        encoder: a sentence encoder, as `lenslrp.embed` takes it; None for the embedded
            ``all-minilm-l6-v2``.
        criterion: whose examples.
        limit: how many units.

    Raises:
        InputError: an unknown criterion, or a model that is no sentence encoder.
    """
    d.require_criterion(criterion)
    documents = d.citations.documents
    if encoder not in d.encoded:
        encode = load(ENCODER) if encoder is None else encoder
        texts = [d.texts.referenced([doc])[doc].text for doc in documents]
        d.encoded[encoder] = encode, _vectors(encode, texts)
    encode, vectors = d.encoded[encoder]
    query = _vectors(encode, words).mean(dim=0)
    near = vectors @ torch.nn.functional.normalize(query, dim=0)
    searched = np.array([name == criterion for name, _ in d.slots])
    total, weight = np.zeros(len(d)), np.zeros(len(d))
    best = np.full(len(d), -np.inf)
    nearest = np.zeros((len(d), 2), np.int64)
    for doc, cosine in zip(documents, near.tolist(), strict=True):
        entries, positions, strengths = d.citations.of(doc)
        kept = searched[entries % len(d.slots)]
        units, sizes = entries[kept] // len(d.slots), np.abs(strengths[kept])
        np.add.at(total, units, sizes * cosine)
        np.add.at(weight, units, sizes)
        better = cosine > best[units]
        best[units[better]] = cosine
        nearest[units[better]] = np.stack(
            [np.full(better.sum(), doc), positions[kept][better]], axis=1
        )
    shown = weight > 0
    score = np.where(shown, total / np.where(shown, weight, 1), -np.inf)
    score -= score[shown].mean() if shown.any() else 0
    order = np.argsort(-score, kind="stable")[:limit]
    records = []
    for unit in order[shown[order]].tolist():
        doc, position = nearest[unit].tolist()
        (sentence,) = d.shown(d.texts.referenced([doc])[doc], np.array([position]))
        records.append((*d.named(unit), float(score[unit]), doc, sentence))
    columns = ["unit", "hook", "index", "score", "doc", "sentence"]
    return RankedUnits(tuple(words), "meaning", pd.DataFrame(records, columns=columns), {})


def _vectors(encoder: TransformerBridge, texts: Sequence[str]) -> Float[Tensor, "text d"]:
    """Of each text, as far as the encoder's context reaches."""
    length = min(int(encoder.cfg.n_ctx), int(encoder.tokenizer.model_max_length))
    vectors = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        some = list(texts[first : first + TEXTS_AT_ONCE])
        batch = encoder.tokenizer(
            some, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        vectors.append(embed(encoder, batch["input_ids"], attention_mask=batch["attention_mask"]))
    return torch.cat(vectors).cpu()
