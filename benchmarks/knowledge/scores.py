"""Facts that a model knows, and how every method scores every MLP neuron for one of them.

Used by `neurons.py`. Scores are [layer, neuron], the sum over the prompt's positions
unless said otherwise; the neurons with the largest signed score are the method's choice.

| method | score of a neuron at `mlp.hook_post` |
|---|---|
| AttnLRP | relevance for the answer's logit |
| AttnLRP, last | the same at the last position only |
| AttnLRP, contrast | relevance for the answer's logit less the mean of its ten best other tokens' |
| CP-LRP | relevance under CP-LRP, for the logit |
| grad x act | activation times plain gradient of the logit |
| direct | activation at the last position times `W_out . W_U[answer]` through the final gain: |
| | what the neuron adds to the logit by itself, not through later layers (logit attribution) |
| CP-LRP, contrast; grad x act, contrast; direct, contrast | the same for the contrast |
| activation | sum of absolute activations |
| weights | `W_out . W_U[answer]` through the final gain alone; the same in every prompt |
| random | drawn from the same layers as AttnLRP's choice, among the ten other neurons with the |
| | nearest write contribution (root of the sum of squared activations, times W_out's norm) |
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp import targets
from lenslrp.files import whole

FACTS = Path(__file__).with_name("facts.json")
HOOK = "blocks.{}.mlp.hook_post"
OTHERS = 10
CHANNELS = (
    "AttnLRP",
    "AttnLRP, last",
    "AttnLRP, contrast",
    "CP-LRP",
    "grad x act",
    "grad x act, contrast",
    "direct",
    "activation",
    "weights",
    "CP-LRP, contrast",
    "direct, contrast",
)
RANDOM = "random"
METHODS = (*CHANNELS, RANDOM)
KEPT = (*CHANNELS, "norm", "last value")
"""What is kept of each fact: the methods' scores, each neuron's write contribution, and its
activation at the last position."""

Neurons = tuple[tuple[int, int], ...]  # (layer, neuron), best first


@dataclass(frozen=True)
class Fact:
    """A prompt whose most likely next token is the right answer."""

    relation: str
    prompt: str
    answer: str
    ids: tuple[int, ...]
    answer_id: int


def last_only(x: Tensor, hook: Any) -> Tensor:
    """At `unembed.hook_in`: logits of the last position are all that is needed."""
    return x[:, -1:]


def read_prompts(path: Path) -> list[tuple[str, str, str]]:
    """All of the list: relation, prompt, answer."""
    relations = json.loads(path.read_text(encoding="utf-8"))["relations"]
    return [
        (name, entry["template"].replace("{}", subject), answer)
        for name, entry in relations.items()
        for subject, answer in entry["facts"]
    ]


def known_facts(model: TransformerBridge, path: Path) -> tuple[list[Fact], Counter[str]]:
    """The facts that the model gets right, and how many were asked by relation."""
    encode = model.tokenizer.encode
    prompts = read_prompts(path)
    by_length: dict[int, list[int]] = defaultdict(list)
    ids = [encode(prompt, add_special_tokens=False) for _, prompt, _ in prompts]
    answers = [encode(f" {answer}", add_special_tokens=False) for _, _, answer in prompts]
    for index, row in enumerate(ids):
        by_length[len(row)].append(index)
    top: dict[int, int] = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[("unembed.hook_in", last_only)]):
        for group in tqdm(by_length.values(), desc="asking", unit="length"):
            for start in range(0, len(group), 32):
                some = group[start : start + 32]
                logits = model(torch.tensor([ids[i] for i in some]))[:, -1]
                top.update(zip(some, logits.argmax(dim=-1).tolist(), strict=True))
    facts = [
        Fact(relation, prompt, answer, tuple(ids[i]), answers[i][0])
        for i, (relation, prompt, answer) in enumerate(prompts)
        if answers[i] == [top[i]]
    ]
    return facts, Counter(relation for relation, _, _ in prompts)


def chosen_facts(facts: list[Fact], seed: int, per_relation: int, per_answer: int) -> list[Fact]:
    """A balanced sample in random order: at most so many of a relation, and of one answer in it."""
    order = np.random.default_rng(seed).permutation(len(facts))
    relations: Counter[str] = Counter()
    answers: Counter[tuple[str, int]] = Counter()
    chosen = []
    for index in order:
        fact = facts[index]
        key = (fact.relation, fact.answer_id)
        if relations[fact.relation] < per_relation and answers[key] < per_answer:
            relations[fact.relation] += 1
            answers[key] += 1
            chosen.append(fact)
    return chosen


def write_norms(model: TransformerBridge) -> Tensor:
    """The norm of every neuron's row of W_out: [layer, neuron]."""
    return torch.stack([block.mlp.W_out.detach().norm(dim=-1) for block in model.blocks])


def through_final_gain(model: TransformerBridge, tokens: list[int] | slice) -> Tensor:
    """The unembedding of some tokens through the final norm's gain (RMS norm, no offset)."""
    W_U: Tensor = model.unembed.W_U.detach()
    return W_U[:, tokens].T * model.ln_final.weight.detach()


@torch.no_grad()
def _activations(model: TransformerBridge, tokens: Tensor) -> Tensor:
    """[layer, batch, pos, neuron]."""
    names = [HOOK.format(layer) for layer in range(len(model.blocks))]
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    return torch.stack([cache[name] for name in names])


@torch.no_grad()
def rivals_of(model: TransformerBridge, tokens: Tensor, facts: list[Fact]) -> Tensor:
    """The mean unembedding of each fact's ten best other tokens, through the final gain."""
    with model.hooks(fwd_hooks=[("unembed.hook_in", last_only)]):
        logits = model(tokens)[:, -1]
    logits[torch.arange(len(facts)), [fact.answer_id for fact in facts]] = -torch.inf
    best = logits.topk(OTHERS, dim=-1).indices.tolist()
    return torch.stack([through_final_gain(model, row).mean(dim=0) for row in best])


def score_batch(model: TransformerBridge, facts: list[Fact], norms: Tensor) -> Tensor:
    """All of `KEPT` for facts of one prompt length: [fact, kept, layer, neuron]."""
    tokens = torch.tensor([fact.ids for fact in facts])
    logit: Any = [targets.Logit(fact.answer_id) for fact in facts]
    contrast: Any = [targets.Contrastive(fact.answer_id, top_k=OTHERS) for fact in facts]

    def relevance(composite: Any, wanted: list[Any]) -> list[Tensor]:
        caches = lenslrp.relevance_for_targets(
            model, tokens, wanted, composite, "mlp.hook_post", ledger=False
        )
        layers = range(len(model.blocks))
        return [torch.stack([c[HOOK.format(layer)] for layer in layers]) for c in caches]

    attnlrp, attnlrp_contrast = relevance(lenslrp.AttnLRP(), [logit, contrast])
    cplrp, cplrp_contrast = relevance(lenslrp.CPLRP(), [logit, contrast])
    gradient, gradient_contrast = relevance(lenslrp.GradientTimesInput(), [logit, contrast])
    x = _activations(model, tokens)
    answers = through_final_gain(model, [fact.answer_id for fact in facts])
    weights = torch.stack([answers @ block.mlp.W_out.detach().T for block in model.blocks])
    against = answers - rivals_of(model, tokens, facts)
    weights_contrast = torch.stack([against @ block.mlp.W_out.detach().T for block in model.blocks])
    kept = [
        attnlrp.sum(dim=2),
        attnlrp[:, :, -1],
        attnlrp_contrast.sum(dim=2),
        cplrp.sum(dim=2),
        gradient.sum(dim=2),
        gradient_contrast.sum(dim=2),
        x[:, :, -1] * weights,
        x.abs().sum(dim=2),
        weights,
        cplrp_contrast.sum(dim=2),
        x[:, :, -1] * weights_contrast,
        x.square().sum(dim=2).sqrt() * norms[:, None],
        x[:, :, -1],
    ]
    return torch.stack(kept).permute(2, 0, 1, 3)


def score_all(model: TransformerBridge, facts: list[Fact], folder: Path) -> None:
    """One file a fact in `folder`; those that are there are not computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    norms = write_norms(model)
    missing: dict[int, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if not (folder / f"{index}.npy").exists():
            missing[len(fact.ids)].append(index)
    with tqdm(total=sum(map(len, missing.values())), desc="scoring", unit="fact") as bar:
        for group in missing.values():
            for start in range(0, len(group), 8):
                some = group[start : start + 8]
                scores = score_batch(model, [facts[i] for i in some], norms).numpy()
                for index, score in zip(some, scores, strict=True):
                    with whole(folder / f"{index}.npy") as part:
                        np.save(part, score.astype(np.float32))
                bar.update(len(some))


def read_scores(folder: Path, index: int) -> dict[str, NDArray[np.float32]]:
    """`KEPT` of one fact, each [layer, neuron]."""
    return dict(zip(KEPT, np.load(folder / f"{index}.npy", allow_pickle=False), strict=True))


def top_neurons(scores: NDArray[Any], k: int) -> Neurons:
    """The k largest, best first; ties by place."""
    best = np.argsort(-scores, axis=None, kind="stable")[:k]
    layers, neurons = np.unravel_index(best, scores.shape)
    return tuple((int(a), int(b)) for a, b in zip(layers, neurons, strict=True))


def matched(
    wanted: Neurons, norm: NDArray[np.float32], rng: np.random.Generator, pool: int = 10
) -> Neurons:
    """For each neuron another of its layer with nearly the same write contribution."""
    taken = set(wanted)
    picks = []
    for layer, neuron in wanted:
        order = np.argsort(np.abs(norm[layer] - norm[layer, neuron]), kind="stable")
        free = [int(i) for i in order if (layer, int(i)) not in taken][:pool]
        pick = (layer, free[int(rng.integers(len(free)))])
        taken.add(pick)
        picks.append(pick)
    return tuple(picks)


def choices(scores: dict[str, NDArray[np.float32]], k: int, seed: list[int]) -> dict[str, Neurons]:
    """Every method's k best neurons; the first n of them are its choice for n < k."""
    chosen = {name: top_neurons(scores[name], k) for name in CHANNELS}
    rng = np.random.default_rng(seed)
    chosen[RANDOM] = matched(chosen["AttnLRP"], scores["norm"], rng)
    return chosen
