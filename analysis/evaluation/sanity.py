"""Does relevance depend on what it should depend on, and on nothing else?

* **Randomisation** (Adebayo et al. 2018, "Sanity checks for saliency maps"): the weights of layers
  are randomised, and relevance must become another one. Cascading: from the last layer down, all
  above stay random. Independent: one layer at a time. Relevance that survives shows the input, not
  the model.
* **An irrelevant change**: a sentence that does not matter is exchanged for another. The other
  tokens mean the same as before, so their relevance should not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lenslrp.analysis.common.statistics import Numbers, spearman
from lenslrp.analysis.units.locations import blocks_name
from lenslrp.errors import InputError
from lenslrp.hooks.turns import turn
from lenslrp.progress import progress_bar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MODES = ("cascading", "independent")


def randomisation(
    model: TransformerBridge,
    relevance: Callable[[], Any],
    *,
    mode: str = "cascading",
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of relevance with what it was, as the model's blocks are randomised.

    A block is randomised by shuffling the entries of each of its weights: every weight keeps its
    distribution, so activations keep their size, and nothing of what was learned is left. All is
    put back, however the check ends.

    Args:
        model: a ``TransformerBridge``; its weights are restored.
        relevance: computes the relevance of one input, for one fixed target; any shape. Or a dict
            of such, of several inputs and methods, which then share what is randomised.
        mode: ``"cascading"``: a layer and all above it; or ``"independent"``: that layer alone.
        layers: at which to look, all if not given.
        seed: of the shuffles.

    Returns:
        A row a layer, in the order of randomisation: ``layer``; ``spearman`` of the relevance with
        the original; ``spearman_abs`` of their absolute values (the paper gives both). For a dict,
        a row a layer and key, with the key as ``name``.

    Raises:
        InputError: an unknown mode or layer.

    Examples:
        ```python
        frame = randomisation(model, lambda: attribute("attnlrp", model, text, " Paris").tokens)
        frame["spearman"]  # 1 at a layer: without it and all above, relevance is the same
        ```
    """
    if mode not in MODES:
        raise InputError(f"mode is 'cascading' or 'independent', not {mode!r}")
    blocks = list(getattr(model, blocks_name(model)))
    chosen = list(range(len(blocks))) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < len(blocks):
            raise InputError(f"layer is {layer}, but the model has layers 0 to {len(blocks) - 1}")
    unchanged = relevance()
    original, rows = _vectors(unchanged), []
    for layer in progress_bar("layers", chosen[::-1]):
        randomised = range(layer, len(blocks)) if mode == "cascading" else [layer]
        with turn(model), shuffled([(k, blocks[k]) for k in randomised], seed):
            changed = _vectors(relevance())
        for name, before in original.items():
            after = changed[name]
            pair = (spearman(before, after), spearman(np.abs(before), np.abs(after)))
            rows.append((name, layer, *pair))
    frame = pd.DataFrame(rows, columns=["name", "layer", "spearman", "spearman_abs"])
    return frame if isinstance(unchanged, Mapping) else frame.drop(columns="name")


@contextmanager
def shuffled(modules: Iterable[tuple[int, nn.Module]], seed: int) -> Iterator[None]:
    """Every parameter's entries in random order inside the context, and back after it.

    A module's shuffle depends on its number and the seed alone.
    """
    originals: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    try:
        with torch.no_grad():
            for number, module in modules:
                generator = torch.Generator().manual_seed(seed * 100_003 + number)
                for weight in module.parameters():
                    if id(weight) in originals:
                        continue
                    originals[id(weight)] = (weight, weight.detach().clone())
                    order = torch.randperm(weight.numel(), generator=generator)
                    weight.copy_(weight.reshape(-1)[order.to(weight.device)].view_as(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, value in originals.values():
                weight.copy_(value)


@dataclass(frozen=True)
class Sensitivity:
    """How relevance of the other tokens changed when one sentence was exchanged for another.

    Attributes:
        shared: tokens before and after the sentence, which both texts have.
        spearman: rank correlation of their relevance.
        change: sum of its absolute change, over the sum of its absolute value before: 0 is best.
        inside: share of all absolute relevance that the first sentence has: an irrelevant one
            should have little.
        target_change: of the target's value, in its own unit: how irrelevant the change was.
    """

    shared: int
    spearman: float
    change: float
    inside: float
    target_change: float


def sensitivity(
    explain: Callable[[str], tuple[list[int], Any, float]], before: str, after: str
) -> Sensitivity:
    """Exchange one part of a text for another, and compare the relevance of the other tokens.

    Args:
        explain: from a text to its token ids, their relevance [pos], and the target's value.
        before: a text.
        after: the text, different in one place.

    Raises:
        InputError: the texts are equal, or have no token in common.

    Examples:
        ```python
        def explain(text):
            _, R = lenslrp.run_with_relevance(model, text, " Paris")
            return model.to_tokens(text)[0].tolist(), R.tokens[0], float(R.target.value[0])

        question = "The capital of France is"
        sensitivity(explain, f"It rains. {question}", f"I sing. {question}").spearman  # 1 is best
        ```
    """
    (ids, first, value), (other, second, other_value) = explain(before), explain(after)
    if ids == other:
        raise InputError("the two texts are the same tokens: nothing was changed")
    short = min(len(ids), len(other))
    head = next((i for i in range(short) if ids[i] != other[i]), short)
    rest = short - head
    tail = next((i for i in range(rest) if ids[-1 - i] != other[-1 - i]), rest)
    if head + tail == 0:
        raise InputError("the two texts have no token in common at their beginning or end")
    whole = _vector(first)
    a, b = _ends(whole, head, tail), _ends(_vector(second), head, tail)
    size = np.abs(whole).sum()
    return Sensitivity(
        head + tail,
        spearman(a, b),
        float(np.abs(a - b).sum() / np.abs(a).sum()),
        float(1 - np.abs(a).sum() / size),
        float(other_value - value),
    )


def _ends(values: Numbers, head: int, tail: int) -> Numbers:
    return np.concatenate([values[:head], values[len(values) - tail :]])


def _vectors(relevance: Any) -> dict[Any, Numbers]:
    """Every relevance by its key; a single one by ``None``."""
    named = relevance if isinstance(relevance, Mapping) else {None: relevance}
    return {name: _vector(values) for name, values in named.items()}


def _vector(values: Any) -> Numbers:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64).ravel()
