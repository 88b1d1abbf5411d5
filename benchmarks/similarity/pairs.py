"""Which pairs of words make two sentences alike, and is it they that do?

    python -m benchmarks.similarity.pairs measure   # benchmarks/results/similarity.json; resumable
    python -m benchmarks.similarity.pairs write     # tables of docs/reference/results/similarity.md

Twenty pairs of sentences, chosen before any of them was explained (`sentences.json`), and
all-MiniLM-L6-v2. BiLRP gives each pair of words its relevance for the cosine. The intervention
takes a word out of each sentence (deletes its tokens, or masks them) and asks how far the cosine
falls: for the pair of words with the largest relevance, and for every other pair. Special tokens
and punctuation are no words.
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
from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.models.embedded import ensure_cached
from lenslrp.text.words import Word

MODEL = "all-minilm-l6-v2"
COMPOSITES = {
    "AttnLRP": lenslrp.AttnLRP(),
    "CP-LRP": lenslrp.CPLRP(),
    "Gradient x Input": lenslrp.GradientTimesInput(),
}
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
    """[word, d]: the vector of a text without each of some words."""
    tokenizer = model.tokenizer
    ids = torch.tensor(tokenizer(text).input_ids)
    vectors = []
    for word in words:
        if way == "masked":
            changed = ids.clone()
            changed[word.positions] = tokenizer.mask_token_id
        else:
            changed = ids[[i for i in range(len(ids)) if i not in word.positions]]
        vectors.append(lenslrp.embed(model, changed[None])[0])
    return torch.stack(vectors)


def falls(model: Any, pairs: TokenPairs, texts: Sequence[str], way: str) -> Tensor:
    """[a, b]: how far the cosine falls without a word of each sentence, for all pairs of words."""
    sides = zip(texts, (pairs.words_a, pairs.words_b), strict=True)
    a, b = (without(model, text, [w for w in words if is_word(w)], way) for text, words in sides)
    return pairs.value - a @ b.T


def ranked(matrix: Tensor, fall: Tensor) -> dict[str, Any]:
    """Of the most relevant pair: its fall, the mean of the others', the share that it exceeds."""
    best = int(matrix.argmax())
    others = fall.flatten()[torch.arange(fall.numel()) != best]
    top = float(fall.flatten()[best])
    below = (others < top).double() + (others == top) / 2
    return {
        "top": top,
        "mean": float(others.mean()),
        "share": float(below.mean()),
        "correlation": float(np.corrcoef(matrix.flatten(), fall.flatten())[0, 1]),
    }


def measured(model: Any, texts: Sequence[str], composite: lenslrp.Composite) -> dict[str, Any]:
    """What rules say of two sentences, and what the interventions say of that."""
    tokens = bilrp(model, *texts, composite=composite, batch_size=96)
    kept = [[i for i, word in enumerate(words) if is_word(word)]
            for words in (tokens.words_a, tokens.words_b)]  # fmt: skip
    words = tokens.words()
    matrix = words.matrix[kept[0]][:, kept[1]]
    a, b = ([side[i].strip() for i in some]
            for side, some in zip((words.a, words.b), kept, strict=True))  # fmt: skip
    places = [divmod(i, len(b)) for i in matrix.flatten().argsort(descending=True).tolist()]
    return {
        "value": tokens.value,
        "sum": float(tokens.matrix.sum()),
        "words": float(matrix.sum()),
        "largest": [(a[i], b[j], float(matrix[i, j])) for i, j in places[:3]],
        **{way: ranked(matrix, falls(model, tokens, texts, way)) for way in WAYS},
    }


def measure(names: Sequence[str]) -> None:
    """Goes on where it was interrupted."""
    model = lenslrp.load(MODEL, device="cpu")
    rows = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    KEPT.parent.mkdir(exist_ok=True)
    if not rows:
        for kind, *texts in sentences():
            a, b = reference(texts)
            rows.append({"kind": kind, "a": texts[0], "b": texts[1], "cosine": float(a @ b)})
    for name in names:
        for row in rows:
            if name not in row:
                row[name] = measured(model, (row["a"], row["b"]), COMPOSITES[name])
                KEPT.write_text(json.dumps(rows, indent=1), encoding="utf-8")
                print(name, row["kind"], f"{row['cosine']:.3f}", row[name]["largest"], flush=True)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def pair_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown(
        ["", "sentences", "cosine", "pairs of words, with AttnLRP's relevance",
         "falls without the first", "others", "exceeds"],
        [
            [
                row["kind"],
                f"{row['a']}<br>{row['b']}",
                f"{row['cosine']:.2f}",
                ", ".join(f"{a} - {b} {value:+.2f}" for a, b, value in row["AttnLRP"]["largest"]),
                f"{row['AttnLRP']['deleted']['top']:+.2f}",
                f"{row['AttnLRP']['deleted']['mean']:+.2f}",
                f"{row['AttnLRP']['deleted']['share']:.0%}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def check_table(rows: Sequence[dict[str, Any]]) -> str:
    """Over all pairs of sentences, by composite and intervention."""
    lines = []
    for name in COMPOSITES:
        for way in WAYS:
            found = [row[name][way] for row in rows if name in row]
            more = sum(each["top"] > each["mean"] for each in found)
            first = sum(each["share"] == 1 for each in found)
            cells = []
            for values in (
                [each["top"] - each["mean"] for each in found],
                [each["share"] for each in found],
                [each["correlation"] for each in found],
            ):
                mean, low, high = bootstrap(np.array(values), 0)
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            lines.append([name, way, f"{more} of {len(rows)}", f"{first} of {len(rows)}", *cells])
    return markdown(
        ["rules", "words", "falls more than at a random pair", "most of all pairs",
         "how much more", "share of pairs exceeded", "correlation with relevance"], lines,
    )  # fmt: skip


def sum_table(rows: Sequence[dict[str, Any]]) -> str:
    """How much of the cosine is at pairs of tokens, and how much of that at pairs of words."""
    lines = []
    for name in COMPOSITES:
        cells = []
        for key in ("sum", "words"):
            low, middle, high = np.percentile([row[name][key] / row["cosine"] for row in rows
                                               if row["cosine"] > 0.1], [25, 50, 75])  # fmt: skip
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append([name, *cells])
    return markdown(["rules", "all pairs of tokens", "of them, pairs of words"], lines)


def write() -> None:
    rows = json.loads(KEPT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    tables = {"pairs": pair_table(rows), "check": check_table(rows), "sums": sum_table(rows)}
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(page, encoding="utf-8")
    apart = max(abs(row["AttnLRP"]["value"] - row["cosine"]) for row in rows)
    print(f"the cosine is within {apart:.1e} of that of transformers in float64")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("command", choices=("measure", "write"))
    parser.add_argument("--rules", nargs="+", choices=tuple(COMPOSITES), default=list(COMPOSITES))
    arguments = parser.parse_args()
    measure(arguments.rules) if arguments.command == "measure" else write()
