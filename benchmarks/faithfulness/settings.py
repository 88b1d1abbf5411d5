"""Is there a better setting of AttnLRP? Searched on one half of the texts, reported on the other.

    python -m benchmarks.faithfulness.settings development                           # all of them
    python -m benchmarks.faithfulness.settings held-out --only attnlrp relp --n 100  # the best

Candidates differ from AttnLRP in one thing each, or join two: how a product shares between its
factors (value path against pattern, queries against keys, gate against up), the softmax's
temperature in its backward pass, gamma on linear layers, the derivative of activations and its
stabiliser, positions' relevance, magnitudes instead of signed relevance, the first token's
relevance set to zero, more or less for a block's parts against the stream that they add to.
SmolLM2, four tasks, areas with the first token kept (the sink is no part of the question) and
without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

import lenslrp
from benchmarks.faithfulness.results import BOTH, RUNS, TASKS, Run, measure
from lenslrp.analysis.attribution.methods import METHODS, Method, as_method, run_method
from lenslrp.analysis.passes.problems import AttributionProblem
from lenslrp.hooks import CONSTANT, Composite, Gamma, Identity, Plain, Product, SoftmaxTemperature


def _afterwards(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Method:
    """AttnLRP's relevance of the tokens, changed."""

    def function(question: AttributionProblem, *, seed: int) -> torch.Tensor:
        return change(run_method("attnlrp", question, seed=seed).tokens)

    return Method(name, function, "AttnLRP, changed afterwards")


def _without_first(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, 1:]], dim=1)


def _branches(factor: float) -> Method:
    """AttnLRP, where attention and MLP get ``factor`` times what the residual rule gives them."""

    def weigh(x: torch.Tensor, hook: Any) -> None:
        if x.requires_grad:
            x.register_hook(lambda g: factor * g)

    def function(question: AttributionProblem, *, seed: int) -> torch.Tensor:
        outputs = [
            (f"blocks.{layer}.hook_{part}_out", weigh)
            for layer in range(question.model.cfg.n_layers)
            for part in ("attn", "mlp")
        ]
        with question.model.hooks(fwd_hooks=outputs):
            return run_method("attnlrp", question, seed=seed).tokens

    return Method(f"branches {factor:g}", function, "AttnLRP, the residual stream weighed")


def _values(share: float) -> Product:
    return Product(1 - share, share, f"values {share:g}")


def candidates() -> list[Method]:
    """AttnLRP first, then what might be better."""
    plain = Plain()
    rules = [
        Composite("values .75", {"attention_av": _values(0.75)}),
        Composite("values .9", {"attention_av": _values(0.9)}),
        Composite("values 1, pattern .5", {"attention_av": Product(0.5, 1.0, "more values")}),
        Composite("values 1, pattern .25", {"attention_av": Product(0.25, 1.0, "most values")}),
        Composite("queries plain", {"attention_qk": plain}),
        Composite("temperature 2", {"softmax": SoftmaxTemperature(2.0)}),
        Composite("temperature 4", {"softmax": SoftmaxTemperature(4.0)}),
        Composite(
            "RelP, temperature 2", {**lenslrp.RelP().rules, "softmax": SoftmaxTemperature(2.0)}
        ),
        Composite("RelP, plain activation", {**lenslrp.RelP().rules, "activation": plain}),
        Composite("gamma .05", {"linear": Gamma(0.05)}),
        Composite("gamma .25", {"linear": Gamma(0.25)}),
        Composite("gate constant", {"gate": CONSTANT}),
        Composite("gate 1, up 1", {"gate": plain}),
        Composite("CP, gate constant", {**lenslrp.CPLRP(gate="up").rules}),
        Composite("stabiliser .1", {"activation": Identity(0.1)}),
    ]
    named = ["attnlrp", "cp_lrp", "relp", "gim", "attnlrp_positional", "attnlrp_plain_activation"]
    return [
        *(METHODS[name] for name in named),
        *map(as_method, rules),
        _afterwards("magnitude", torch.abs),
        _afterwards("first token zero", _without_first),
        _branches(0.5),
        _branches(2.0),
    ]


SEARCHED = ("next_word", "sentiment", "indirect_object", "agreement")


def runs(half: str, n: int) -> dict[str, Run]:
    """The tasks as ``results.py`` measures them, on one half and with six steps."""
    common = {"steps": 6, "perturbations": BOTH, "half": half}
    return {
        name: replace(TASKS[name], n=n, options={**TASKS[name].options, **common})
        for name in SEARCHED
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("half", choices=["development", "held-out"])
    parser.add_argument("--tasks", nargs="+", default=list(SEARCHED), choices=SEARCHED)
    parser.add_argument("--only", nargs="+", help="candidates, by name; all of them otherwise")
    parser.add_argument("--n", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = {method.name: method for method in candidates()}
    chosen = [every[name] for name in options.only or every]
    for name, run in runs(options.half, options.n).items():
        if name in options.tasks:
            found = measure(run, chosen, RUNS / f"{name}-{options.half}-{len(chosen)}")
            for metric in ("area", "hit"):
                if metric in found.metrics():
                    table = found.table(metric).drop(columns=["cost", "forward", "backward"])
                    with pd.option_context("display.width", 200):
                        print(f"{name}, {options.half}: {metric}")
                        print(table.round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
