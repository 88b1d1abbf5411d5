"""Do the report's two interventions agree with relevance? On the 50 fixed prompts.

    python -m benchmarks.faithfulness.report_checks [--model smollm2-135m]

For each prompt of `keyword_prompts.json` (written before any relevance was looked at): the target
is the model's first choice; the head of most relevance is switched off, and the token of most
relevance replaced, each beside its control (`lenslrp.analysis.views.checks`). A check agrees where
the target's probability falls, and by more than under the control. Intervals are 95% percentile
bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse

import numpy as np

import lenslrp
from benchmarks.faithfulness.keywords import read_prompts
from lenslrp.analysis.common.statistics import interval
from lenslrp.analysis.views.checks import checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    model = lenslrp.load(options.model)
    rows: dict[str, list[tuple[bool, float, float]]] = {"head": [], "token": []}
    for number, prompt in enumerate(read_prompts()):
        _, relevance = lenslrp.run_with_relevance(
            model, prompt.prompt, prompt.target, names_filter=lambda n: n.endswith("attn.hook_z")
        )
        trials = checked(model, relevance).trials
        for kind, trial in zip(rows, trials, strict=True):
            lost = trial.before - trial.after, trial.before - trial.control_after
            rows[kind].append((trial.agrees, *lost))
            sign = "agrees" if trial.agrees else "DIFFERS"
            print(
                f"{number:3} {sign:8} {trial.what} {lost[0]:+.3f}, {trial.control} {lost[1]:+.3f}"
            )
    print("\n| check | agrees | falls by | control falls by |\n|---|---|---|---|")
    for kind, found in rows.items():
        cells = [interval(np.array([float(row[i]) for row in found]), 0) for i in range(3)]
        print(f"| {kind}, n = {len(found)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
