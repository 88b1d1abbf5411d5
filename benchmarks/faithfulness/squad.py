"""Does relevance point at the answer in the paragraph? Flan-T5-small on SQuAD 1.1.

    python -m benchmarks.faithfulness.squad [--data squad_dev.jsonl] [--of log_prob] [--failures 10]

Flan-T5 (the embedded `flan-t5-small-titles`) answers each question from its paragraph, greedily.
Where the answer equals one of the reference answers (after SQuAD's normalisation), the answer's
tokens are explained (the sum of their logits, teacher-forced), and the relevance of the paragraph's
tokens at the encoder is compared with the answer's span there:

* top-1: the most relevant token of the paragraph (question and instruction left out) overlaps the
  span; `words`: the same for whitespace words, with a word's relevance the sum over its tokens;
  `anywhere`: any place where the paragraph has the answer's words counts;
* IoU of the binarised relevance with the span. How the AttnLRP paper binarised is not known to the
  authors of this script, so four ways are given: above half of the maximum, Otsu's threshold over
  the positive values, as many tokens as the span has, and the best threshold of each question (an
  upper bound, which looks at the span).

Random is the exact expectation for top-1, and the mean over 200 random orders for IoU.
Each question's relevance is appended to `--results` (a file that git ignores) when it is done, and
is not computed again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import DATA, RESULTS
from benchmarks.faithfulness.examples import METHODS, RANDOM
from lenslrp import targets
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.statistics import RESAMPLES, interval
from lenslrp.analysis.evaluation.spans import ious, normalise, occurrences, overlap, words_of
from lenslrp.analysis.evaluation.tasks import QUESTION, generate
from lenslrp.text.spelling import Spans

MODEL = "flan-t5-small-titles"
TEMPLATE = QUESTION[True]
QUESTIONS = DATA / "squad_dev.jsonl"
RANDOM_ORDERS = 200


@dataclass(frozen=True)
class Item:
    """One question: what the model answered and, if it is right, where that stands and why."""

    id: str
    answer: str
    correct: bool
    contains: bool
    offsets: Spans  # of the paragraph's tokens, in its characters
    span: tuple[int, int] | None  # of the answer, in characters
    relevance: dict[str, list[float]]  # method -> of the paragraph's tokens


def examine(model: TransformerBridge, entry: dict[str, Any], of: Any) -> Item:
    """Answer one question and, if the answer is right, explain it with every method."""
    context = entry["context"]
    prompt = TEMPLATE.format(context=context, question=entry["question"])
    ids = generate(model, model.tokenizer(prompt)["input_ids"])
    answer = model.tokenizer.decode(ids)
    references = [a for a in entry["answers"] if normalise(a["text"])]
    equal = [a for a in references if normalise(a["text"]) == normalise(answer)]
    contains = any(normalise(a["text"]) in normalise(answer) for a in references)
    if not equal:
        return Item(entry["id"], answer, False, contains, [], None, {})
    begin = TEMPLATE.index("{context}")
    encoded = model.tokenizer(prompt, return_offsets_mapping=True)
    inside = [
        (position, (start - begin, stop - begin))
        for position, (start, stop) in enumerate(encoded["offset_mapping"])
        if max(start, begin) < min(stop, begin + len(context))
    ]
    relevance = {}
    for name, composite in METHODS.items():
        _, cache = lenslrp.run_with_relevance(
            model,
            torch.tensor([encoded["input_ids"]]),
            target=targets.Sequence(ids, of=of),
            composite=composite(),
            names_filter=[],
        )
        values = cache.tokens[0, [position for position, _ in inside]]
        relevance[name] = [float(f"{v:.6g}") for v in values.tolist()]
    first = equal[0]
    span = (first["start"], first["start"] + len(first["text"]))
    return Item(entry["id"], answer, True, True, [s for _, s in inside], span, relevance)


def judge(item: Item, context: str, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Method -> measure -> value, for one question answered correctly."""
    assert item.span is not None
    key = overlap(item.offsets, [item.span])
    everywhere = [item.span, *occurrences(context, context[slice(*item.span)])]
    anywhere = overlap(item.offsets, everywhere)
    words = words_of(item.offsets, context)
    word_key = np.array([key[word].any() for word in words])
    judged: dict[str, dict[str, float]] = {}
    for name, listed in item.relevance.items():
        values = np.array(listed)
        sums = np.array([values[word].sum() for word in words])
        judged[name] = {
            "top-1": float(key[values.argmax()]),
            "top-1, anywhere": float(anywhere[values.argmax()]),
            "top-1, words": float(word_key[sums.argmax()]),
        } | {f"IoU, {way}": value for way, value in ious(values, key).items()}
    orders = [ious(rng.random(len(key)), key) for _ in range(RANDOM_ORDERS)]
    judged[RANDOM] = {
        "top-1": float(key.mean()),
        "top-1, anywhere": float(anywhere.mean()),
        "top-1, words": float(word_key.mean()),
    } | {f"IoU, {way}": float(np.mean([order[way] for order in orders])) for way in orders[0]}
    return judged


def run(model_name: str, entries: list[dict[str, Any]], results: Path, of: str) -> Iterator[Item]:
    """All items in order, from the results file where they are done already."""
    settings = {"model": model_name, "template": TEMPLATE, "of": of, "methods": list(METHODS)}
    model = None
    with resumed(results, settings) as (rows, append):
        done = {row["id"]: Item(**row) for row in rows}
        for entry in tqdm(entries, desc="questions", unit="q"):
            if entry["id"] not in done:
                model = model or lenslrp.load(model_name, dtype=torch.float32, device="cpu")
                done[entry["id"]] = examine(model, entry, of)
                append(asdict(done[entry["id"]]))
            yield done[entry["id"]]


def print_table(judged: list[dict[str, dict[str, float]]], seed: int) -> None:
    """Every measure with its interval, and AttnLRP's paired lead."""
    measures = list(judged[0][RANDOM])
    names = [*METHODS, RANDOM]
    columns = {(n, m): np.array([item[n][m] for item in judged]) for n in names for m in measures}
    print("| method | " + " | ".join(measures) + " |\n|---|" + "---|" * len(measures))
    for name in names:
        cells = [interval(columns[name, measure], seed) for measure in measures]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("| *AttnLRP's lead over* |" + " |" * len(measures))
    for name in names[1:]:
        cells = [interval(columns[names[0], m] - columns[name, m], seed, "+") for m in measures]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_failures(
    items: list[Item], entries: dict[str, dict[str, Any]], method: str, count: int
) -> None:
    """Questions whose most relevant paragraph token is not in the answer, to be read."""
    for item in items:
        assert item.span is not None
        values = np.array(item.relevance[method])
        key = overlap(item.offsets, [item.span])
        if count == 0 or key[values.argmax()]:
            continue
        count -= 1
        context = entries[item.id]["context"]
        order = np.argsort(-values, kind="stable")
        best = [f"{context[slice(*item.offsets[i])].strip()} {values[i]:+.2f}" for i in order[:5]]
        a, b = item.offsets[order[0]]
        rank = int(np.flatnonzero(key[order])[0]) + 1
        print(f"- Q: {entries[item.id]['question']}")
        print(f"  answer: {item.answer!r}, rank of its best token {rank} of {len(values)}")
        print(f"  most relevant: {', '.join(best)}")
        print(f"  around the first: ...{context[max(a - 60, 0) : b + 40]}...\n")


def main() -> None:
    """Answer, explain, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=QUESTIONS, help="SQuAD, one JSON object a line"
    )
    parser.add_argument("--model", default=MODEL, help="an encoder-decoder, as in lenslrp.load")
    parser.add_argument("--of", choices=["logit", "log_prob"], default="logit")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--results", type=Path, help="where each question's relevance is kept")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and random orders")
    parser.add_argument("--failures", type=int, default=0, help="print so many of AttnLRP's misses")
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"{options.data} does not exist; give --data")
    entries = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    entries = entries[: options.limit]
    results = options.results or RESULTS / f"squad_{options.of}.jsonl"
    items = list(run(options.model, entries, results, options.of))
    by_id = {entry["id"]: entry for entry in entries}
    right = [item for item in items if item.correct]
    rng = np.random.default_rng(options.seed)
    judged = [judge(item, by_id[item.id]["context"], rng) for item in right]
    contained = sum(item.contains for item in items)
    print(
        f"{options.model}: {len(right)} of {len(items)} questions answered exactly ({contained} "
        f"contain the answer); target: sum of the answer's {options.of}s; n = {len(right)}, 95% "
        f"bootstrap intervals, {RESAMPLES} resamples, seed {options.seed}\n"
    )
    print_table(judged, options.seed)
    if options.failures:
        print_failures(right, by_id, "AttnLRP", options.failures)


if __name__ == "__main__":
    main()
