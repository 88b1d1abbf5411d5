"""Which pairs of words make two sentences alike, and is it they that do?

    python -m benchmarks.similarity.pairs measure   # benchmarks/results/similarity.json; resumable
    python -m benchmarks.similarity.pairs write     # tables of docs/reference/results/similarity.md

Twenty pairs of sentences, chosen before any of them was explained (`sentences.json`), and
all-MiniLM-L6-v2. BiLRP gives each pair of words its relevance for the cosine, and one backward pass
each word its relevance with the other sentence constant. The interventions delete a word's tokens,
or mask them: in both sentences (a pair of words), or in one of them. Special tokens and punctuation
are no words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

import lenslrp
from benchmarks import RESULTS, ROOT
from lenslrp.analysis import TokenPairs, bilrp
from lenslrp.analysis.common.statistics import interval, spearman
from lenslrp.models.embedded import ensure_cached
from lenslrp.targets import Similarity
from lenslrp.text.words import Word

MODEL = "all-minilm-l6-v2"
COMPOSITES = {
    "AttnLRP": lenslrp.AttnLRP(),
    "CP-LRP": lenslrp.CPLRP(),
}
STATIC = "embedding table"
WAYS = ("deleted", "masked")
KEPT = RESULTS / "similarity.json"
PAGE = ROOT / "docs" / "reference" / "results" / "similarity.md"


def sentences() -> list[tuple[str, str, str]]:
    """Kind, first and second sentence of each pair."""
    text = Path(__file__).with_name("sentences.json").read_text(encoding="utf-8")
    return [(kind, a, b) for kind, a, b in json.loads(text)]


def is_word(word: Word) -> bool:
    return any(char.isalnum() for char in word.text) and not word.text.strip().startswith("[")


def reference(texts: Sequence[str]) -> Tensor:
    """The vectors as transformers gives them, pooled here, in float64."""
    place = ensure_cached(MODEL)
    model = AutoModel.from_pretrained(place).double().eval()
    tokenizer = lenslrp.load(MODEL, device="cpu").tokenizer
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0))
    return torch.stack(vectors)


def without(model: Any, text: str, words: Sequence[Word], way: str) -> Tensor:
    """[1 + word, d]: the vector of a text as it is, and without each of some words."""
    ids = torch.tensor(model.tokenizer(text).input_ids)
    vectors = [lenslrp.embed(model, ids[None])[0]]
    for word in words:
        if way == "masked":
            changed = ids.clone()
            changed[word.positions] = model.tokenizer.mask_token_id
        else:
            changed = ids[[i for i in range(len(ids)) if i not in word.positions]]
        vectors.append(lenslrp.embed(model, changed[None])[0])
    return torch.stack(vectors)


def kept(tokens: TokenPairs) -> tuple[list[Word], list[Word]]:
    a, b = ([word for word in side if is_word(word)] for side in (tokens.words_a, tokens.words_b))
    return a, b


def cosines(model: Any, tokens: TokenPairs, texts: Sequence[str], way: str) -> list[list[float]]:
    """[1 + a, 1 + b]: the cosine of the sentences, the first of each as they are."""
    sides = zip(texts, kept(tokens), strict=True)
    a, b = (without(model, text, words, way) for text, words in sides)
    found: list[list[float]] = (a @ b.T).tolist()
    return found


def measured(
    model: Any, texts: Sequence[str], composite: lenslrp.Composite
) -> tuple[TokenPairs, dict[str, Any]]:
    """What rules say of two sentences: relevance of pairs of words, and of words."""
    tokens = bilrp(model, *texts, composite=composite, batch_size=96)
    _, R = lenslrp.run_with_relevance(model, list(texts), Similarity(), composite, [])
    assert R.positions is not None
    a, b = kept(tokens)
    single = [[float((R.tokens + R.positions)[row, word.positions].sum()) for word in words]
              for row, words in enumerate((a, b))]  # fmt: skip
    matrix = [[float(tokens.matrix[i.positions][:, j.positions].sum()) for j in b] for i in a]
    return tokens, {
        "value": tokens.value,
        "sum": float(tokens.matrix.sum()),
        "matrix": matrix,
        "single": single,
    }


def static(
    model: Any, texts: Sequence[str], words: tuple[list[Word], list[Word]]
) -> list[list[float]]:
    """[a, b]: how alike words are by their rows of the embedding table, for comparison."""
    table = model.original_model.get_input_embeddings().weight.detach()
    sides = []
    for text, side in zip(texts, words, strict=True):
        ids = torch.tensor(model.tokenizer(text).input_ids)
        vectors = torch.stack([table[ids[word.positions]].mean(dim=0) for word in side])
        sides.append(torch.nn.functional.normalize(vectors, dim=1))
    found: list[list[float]] = (sides[0] @ sides[1].T).tolist()
    return found


def measure(names: Sequence[str]) -> None:
    """Goes on where it was interrupted."""
    model = lenslrp.load(MODEL, device="cpu")
    rows = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    KEPT.parent.mkdir(exist_ok=True)
    if not rows:
        for kind, *texts in sentences():
            a, b = reference(texts)
            rows.append({"kind": kind, "texts": texts, "cosine": float(a @ b)})
    for name in names:
        for row in (row for row in rows if name not in row):
            tokens, row[name] = measured(model, row["texts"], COMPOSITES[name])
            row["words"] = [[word.text.strip() for word in side] for side in kept(tokens)]
            row[STATIC] = {"matrix": static(model, row["texts"], kept(tokens))}
            for way in WAYS:
                if way not in row:
                    row[way] = cosines(model, tokens, row["texts"], way)
            KEPT.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(name, row["kind"], f"{row['cosine']:.3f}", largest(row, name)[:3], flush=True)


def largest(row: dict[str, Any], name: str) -> list[tuple[str, str, float]]:
    """Pairs of words, the most relevant first."""
    a, b = row["words"]
    pairs = [(x, y, value) for x, values in zip(a, row[name]["matrix"], strict=True)
             for y, value in zip(b, values, strict=True)]  # fmt: skip
    return sorted(pairs, key=lambda pair: -pair[2])


def effects(row: dict[str, Any], way: str) -> dict[str, np.ndarray]:
    """What the interventions do to the cosine.

    ``both``: how far it falls without a word of each sentence, [a, b]. ``interaction``: how much
    less that is than without the one and without the other together, [a, b]; 0 for words that
    have nothing to do with each other. ``one``: how far it falls without one word, [a + b].
    """
    table = np.array(row[way])
    a, b = table[0, 0] - table[1:, 0], table[0, 0] - table[0, 1:]
    both = table[0, 0] - table[1:, 1:]
    interaction = a[:, None] + b[None] - both
    return {"both": both, "interaction": interaction, "one": np.concatenate([a, b])}


def compared(row: dict[str, Any], name: str, way: str, effect: str) -> dict[str, float]:
    """The effect at what is most relevant, beside the mean of the others."""
    relevance = np.array(row[name]["matrix"]).ravel()
    if effect == "one":
        relevance = np.concatenate(row[name]["single"])
    found = effects(row, way)[effect].ravel()
    best = int(relevance.argmax())
    others = np.delete(found, best)
    return {
        "top": float(found[best]),
        "mean": float(others.mean()),
        "share": float((others < found[best]).mean() + (others == found[best]).mean() / 2),
        "correlation": spearman(relevance, found),
    }


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def pair_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        both, one = (
            compared(row, "AttnLRP", "deleted", effect) for effect in ("interaction", "one")
        )
        pairs = [f"{a} - {b} {value:+.2f}" for a, b, value in largest(row, "AttnLRP")[:3]]
        lines.append(
            [row["kind"], "<br>".join(row["texts"]), f"{row['cosine']:.2f}", "<br>".join(pairs),
             *(f"{each['top']:+.2f} ({each['mean']:+.2f})" for each in (both, one))]
        )  # fmt: skip
    columns = ["", "sentences", "cosine", "pairs of words", "interaction", "without the word"]
    return markdown(columns, lines)


def check_table(rows: Sequence[dict[str, Any]], effect: str) -> str:
    """Over all pairs of sentences, by rules and intervention."""
    lines = []
    for name in (*COMPOSITES, *([] if effect == "one" else [STATIC])):
        for way in WAYS:
            found = [compared(row, name, way, effect) for row in rows]
            more = sum(each["top"] > each["mean"] for each in found)
            most = sum(each["share"] == 1 for each in found)
            values = (
                [each["top"] - each["mean"] for each in found],
                [each["share"] for each in found],
                [each["correlation"] for each in found],
            )
            cells = [interval(np.array(each), 0) for each in values]
            lines.append([name, way, f"{more} of {len(rows)}", f"{most} of {len(rows)}", *cells])
    return markdown(
        ["rules", "words are", "more than the mean of the others", "the most of all",
         "how much more", "share of the others below it", "rank correlation"], lines,
    )  # fmt: skip


def sum_table(rows: Sequence[dict[str, Any]]) -> str:
    """How much of the cosine is at pairs of tokens, and at pairs of words; quartiles."""
    alike = [row for row in rows if row["cosine"] > 0.1]
    lines = []
    for name in COMPOSITES:
        sums = ([row[name]["sum"] for row in alike],
                [np.sum(row[name]["matrix"]) for row in alike])  # fmt: skip
        cells = []
        for each in sums:
            shares = np.array(each) / [row["cosine"] for row in alike]
            low, middle, high = np.percentile(shares, [25, 50, 75])
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append([name, *cells])
    return markdown(["rules", "all pairs of tokens", "pairs of words"], lines)


def write() -> None:
    rows = json.loads(KEPT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    tables = {"pairs": pair_table(rows), "sums": sum_table(rows)}
    tables |= {effect: check_table(rows, effect) for effect in ("both", "interaction", "one")}
    first = [largest(row, "AttnLRP")[0] for row in rows]
    apart = [row for row, (a, b, _) in zip(rows, first, strict=True) if a.lower() != b.lower()]
    tables["apart"] = check_table(apart, "interaction")
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(page, encoding="utf-8")
    difference = max(abs(row["AttnLRP"]["value"] - row["cosine"]) for row in rows)
    print(f"the cosine is within {difference:.1e} of that of transformers in float64")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("command", choices=("measure", "write"))
    parser.add_argument("--rules", nargs="+", choices=tuple(COMPOSITES), default=list(COMPOSITES))
    arguments = parser.parse_args()
    measure(arguments.rules) if arguments.command == "measure" else write()
