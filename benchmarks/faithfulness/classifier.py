"""Is relevance faithful for a fine-tuned classifier? MiniLM, trained here on sentences of reviews.

    python -m benchmarks.faithfulness.classifier [--n 150] [--seeds 0 1 2]

Half of `movie_reviews.jsonl` (by a hash of the text) trains a `BertForSequenceClassification` on
the embedded MiniLM for three epochs; sentences of the other half that it classifies as they are
labelled are explained: the logit of the label less that of the other. Tokens go in the order of
relevance, a mask token or nothing in their place; the area between the curves is in logits. There
is a model a seed, kept in `benchmarks/results/classifier/` with the results, which go on where
they were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification

import lenslrp
from benchmarks import DATA, RESULTS
from lenslrp.analysis import evaluate
from lenslrp.analysis.common.records import split_of
from lenslrp.models.embedded import ensure_cached
from lenslrp.quiet import quiet_transformers

FOLDER = RESULTS / "classifier"
METHODS = (
    "random",
    "gradient_x_input",
    "integrated_gradients",
    "attention_rollout",
    "gradient_x_attention_rollout",
    "cp_lrp",
    "attnlrp",
)
LABELS = {0: "negative", 1: "positive"}
EPOCHS, BATCH, RATE, LENGTH = 3, 16, 5e-5, 64


def trained(records: list[dict[str, Any]], folder: Path, seed: int) -> Path:
    """The directory of a classifier fine-tuned on the records; trained if it is not there."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(seed)
    source = ensure_cached("all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    with quiet_transformers():
        model = BertForSequenceClassification.from_pretrained(source, id2label=LABELS)
    numbers = {label: number for number, label in LABELS.items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(records)).split(BATCH)
        for rows in tqdm(order, desc="training", unit="batch"):
            batch = [records[row] for row in rows.tolist()]
            texts = [record["text"] for record in batch]
            inputs = tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH
            )
            wanted = torch.tensor([numbers[record["label"]] for record in batch])
            model(**inputs, labels=wanted).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def accuracy(folder: Path, records: list[dict[str, Any]]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            texts = [record["text"] for record in batch]
            logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
            given = [LABELS[label] for label in logits.argmax(dim=-1).tolist()]
            right += sum(a == r["label"] for a, r in zip(given, batch, strict=True))
    return right / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA / "movie_reviews.jsonl")
    parser.add_argument("--n", type=int, default=150, help="sentences (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    records = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    halves = {
        half: [record for record in records if split_of(record["text"]) == half]
        for half in ("development", "held-out")
    }
    for seed in options.seeds:
        folder = trained(halves["development"], FOLDER / f"model-{seed}", seed)
        right = accuracy(folder, halves["held-out"])
        print(f"seed {seed}: accuracy {right:.3f} of {len(halves['held-out'])} held-out sentences")
        results = evaluate(
            "classification",
            lenslrp.load(folder, device="cpu"),
            list(METHODS),
            data=options.data,
            half="held-out",
            n=options.n,
            length=LENGTH,
            steps=6,
            folder=FOLDER / f"areas-{seed}",
            perturbations=["token:[MASK]", "zero"],
        )
        print(results)


if __name__ == "__main__":
    main()
