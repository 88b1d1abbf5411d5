"""Two concepts steered in SmolLM2, each strength beside placebos (docs/how-to/steering.md).

    python -m benchmarks.knowledge.steering [astronomy] [happiness]

*astronomy*: neuron 23.1368, whose negative activation writes moon, Jupiter, Hubble (docs/
knowledge_neurons.md), is added to. *happiness*: the mean difference of happy and sad sentences,
at three layers. Both are read on the 32 openings below, of which none says anything of either.
Tables go to standard output, all rows to results/steering-NAME.csv.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lenslrp
from benchmarks import RESULTS
from lenslrp.analysis import Add, Neuron, SweepResult, mean_difference, sweep

SEED = 0
LAYERS = (8, 14, 20)

OPENINGS = (
    "When I opened the door, I saw", "The first thing she told me was",
    "Yesterday my brother and I",
    "In the middle of the room there was", "The old man looked up and said",
    "The story begins with",
    "After the long journey, they", "My neighbour came over and talked about",
    "The teacher asked the class to think about", "At the end of the street stands",
    "The letter that arrived today was", "I have been thinking about", "The new book is about",
    "On the way home we talked about", "The picture on the wall shows", "She turned around and saw",
    "The children were looking at", "It was late in the evening, and", "The film that we saw was",
    "Everyone in the village knew about", "He wrote a short poem about", "The next morning the",
    "What I remember best is", "The museum has a large collection of", "Last summer we visited",
    "The report describes", "As soon as the music stopped,", "I would like to tell you about",
    "The woman at the window was", "From the train we could see", "My favourite thing is",
    "Nobody in the house expected",
)  # fmt: skip

PEOPLE = ("I am", "She is", "My friend is", "The whole family is", "He was", "They were")
HAPPY = (
    "so happy today", "full of joy", "smiling and laughing", "delighted with the news",
    "cheerful and glad", "having a wonderful time",
)  # fmt: skip
SAD = (
    "so sad today", "full of sorrow", "crying and weeping", "devastated by the news",
    "gloomy and miserable", "having a terrible time",
)  # fmt: skip


def texts(moods: tuple[str, ...]) -> list[str]:
    return [f"{who} {mood}." for who in PEOPLE for mood in moods]


def astronomy(model: Any, openings: Sequence[str] = OPENINGS, new_tokens: int = 16) -> SweepResult:
    return sweep(
        model,
        Add(Neuron(23, 1368), 0.0),
        (10.0, -10.0, -20.0, -40.0, -80.0),
        openings,
        target=(
            (" moon", " stars", " planets", " telescope", " Jupiter", " Mars", " galaxy"),
            (" house", " table", " river", " money", " school", " dog", " garden"),
        ),
        new_tokens=new_tokens,
        draws=2,
        seed=SEED,
        prepend_bos=False,
    )


def happiness(model: Any) -> SweepResult:
    def operation(layer: int) -> Add:
        at = f"blocks.{layer}.hook_resid_post"
        direction = mean_difference(model, texts(HAPPY), texts(SAD), at, prepend_bos=False)
        return Add(direction, 0.0, units="resid_rms")

    return sweep(
        model,
        operation,
        (-8.0, 4.0, 8.0, 16.0),
        OPENINGS,
        target=(
            (" happy", " glad", " wonderful", " great", " joyful"),
            (" sad", " unhappy", " terrible", " bad", " miserable"),
        ),
        layers=LAYERS,
        draws=2,
        seed=SEED,
        prepend_bos=False,
    )


CONCEPTS: dict[str, Callable[[Any], SweepResult]] = {"astronomy": astronomy, "happiness": happiness}


WORDS = {
    "astronomy": r"\b(?:moons?|stars?|stellar|planets?|planetary|sun|sunlight|solar|space|"
    r"spacecraft|sky|skies|universe|galax(?:y|ies)|telescopes?|orbits?|celestial|astro\w*|comets?|jupiter|"
    r"saturn|mars)\b",
    "happiness": r"\b(?:happy|happier|happily|happiness|joy|joyful|joyous|glad|smil(?:es?|ed|ing)|"
    r"laugh(?:s|ed|ing|ter)?|delight(?:s|ed|ful)?|cheer(?:s|ed|ful|fully)?|wonderful|wonderfully|"
    r"excit(?:ed|ing|ement)|lov(?:e|ed|es|ing|ely))\b",
}
"""How a text of the concept is told: by any of these words in it."""


def speaks_of(name: str) -> Callable[[str], float]:
    """Whether a text has a word of the concept: 1 or 0."""
    words = re.compile(WORDS[name], re.IGNORECASE)
    return lambda text: float(words.search(text) is not None)


def print_result(result: SweepResult) -> None:
    for metric in ("target", "said"):
        table = result.summary(metric)
        for column in ("change", "over_random", "over_placebo"):
            table[column] = [
                f"{m:+.2f} ({low:+.2f} to {high:+.2f})"
                for m, low, high in table[[column, f"{column}_low", f"{column}_high"]].to_numpy()
            ]
        print(metric)
        print(table[[c for c in table if not c.endswith(("_low", "_high"))]].to_string(index=False))
    frame = result.to_dataframe()
    keys = ["layer", "coefficient", "kind"]
    means = ["target", "said", "kl", "nll", "norm_ratio", "repetition"]
    print(frame.groupby(keys, dropna=False)[means].mean().round(3).to_string())
    some = frame[frame.draw.isna() | (frame.kind == "placebo") & (frame.draw == 0)]
    for row in some[some.prompt.isin([1, 9, 24])].itertuples():
        print(f"{row.layer} {row.coefficient} {row.kind}: {OPENINGS[row.prompt]} | {row.text!r}")


def main() -> None:
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    RESULTS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CONCEPTS:
        start = time.perf_counter()
        result = CONCEPTS[name](model).scored("said", speaks_of(name))
        print(f"## {name}: {time.perf_counter() - start:.0f} s")
        result.to_dataframe().to_csv(RESULTS / f"steering-{name}.csv", index=False)
        print_result(result)


if __name__ == "__main__":
    main()
