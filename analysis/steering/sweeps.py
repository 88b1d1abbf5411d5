"""How strongly to steer: what each strength does to the answer and to the text, beside placebos.

One strength after another is tried on the same prompts, all prompts in one batch, and read by

* `target`: the logit difference that was steered for, at the end of the prompt;
* `kl`: KL(base || steered) of the next token there, in nats: what else changed;
* `perplexity` of the steered text under the base model: exp of `nll`, in nats a token;
* `norm_ratio`: the length of the residual stream behind the steered place, at the end of the
  prompt, over its length in the base model;
* `repetition`: the share of the text's bigrams that it had before.

A steering vector always does *something*; the question is what another one would have done. So each
strength is also tried on other units, drawn anew for each seed:

============ ================================================ =====================================
kind         of a direction                                   of a neuron
============ ================================================ =====================================
`random`   the operation on a random direction of the same  the operation on another neuron of
             length, of no preferred orientation              the layer
`placebo`  a step as long as the steered one, to the last   a change of another neuron that writes
             digit, along the difference of two states        a step as long as the steered one
             that the model has on these prompts
============ ================================================ =====================================

So `placebo` differs from what is tested in nothing but where it points. Text is generated
greedily; the only chance is in the placebos, which the seed fixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.steering.directions import states
from lenslrp.analysis.steering.moves import moved, step_length
from lenslrp.analysis.steering.operations import (
    Ablate,
    Add,
    Moving,
    Operation,
    Scale,
    steer,
)
from lenslrp.analysis.steering.result import SweepResult
from lenslrp.analysis.units.kinds import Direction, Neuron, Unit
from lenslrp.analysis.units.locations import blocks_name
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.forward import forward, reading
from lenslrp.hooks.structure import layer_of
from lenslrp.hooks.turns import turn
from lenslrp.inputs import prepare_text
from lenslrp.media import labels_of
from lenslrp.progress import progress_bar
from lenslrp.text.names import token_id

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

STRENGTHS: dict[type[Moving], str] = {Scale: "factor", Add: "amount", Ablate: "value"}
"""What a coefficient is of each operation."""

Tokens = str | int | Sequence[str | int]


@dataclass(frozen=True)
class Matched(Operation):
    """The change that `operation` makes to its unit, made to another: steps of the same length."""

    operation: Moving
    other: Unit
    factor: float

    def hook(self, model: TransformerBridge) -> str:
        return self.operation.hook(model)

    def apply(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        change = self.operation.change(self.operation.unit.activation(x), x)
        return moved(self.other, x, self.other.activation(x), self.factor * change)


def sweep(
    model: TransformerBridge,
    operation: Moving | Callable[[int], Moving],
    coefficients: Sequence[float],
    prompts: Sequence[str],
    *,
    target: tuple[Tokens, Tokens],
    layers: Sequence[int] | None = None,
    prompt: str | Sequence[int] = "all",
    generation: str | Sequence[int] = "all",
    new_tokens: int = 16,
    draws: int = 2,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> SweepResult:
    """Steer with every coefficient, at every layer, and with placebos; see the module.

    Args:
        model: a `TransformerBridge` of a decoder, with a tokenizer.
        operation: on a neuron or a direction; or, with `layers`, a function from layer to one.
        coefficients: the factors of a `Scale`, amounts of an `Add`, values of an `Ablate`.
        prompts: texts; all go through the model as one batch.
        target: tokens that are steered for, tokens that are steered against: the target is the mean
            logit of the first less that of the second.
        layers: where to try `operation`.
        prompt, generation: as in `steer`.
        new_tokens: how long a text is generated.
        draws: how many random units and placebos for each coefficient; 0 for none.
        seed: of the draws.
        prepend_bos: as in `model.to_tokens`.

    Returns:
        One row a prompt and condition: `target` in logits, `kl` and `nll` in nats.

    Raises:
        InputError: an operation without a strength or on another unit; no prompts or coefficients.

    Examples:
        >>> result = sweep(model, Scale(Neuron(17, 40), 1.0), [0.0, 2.0], ["I think that"],
        ...                target=(" good", " bad"))
        >>> result.to_dataframe()["kind"].value_counts().to_dict()  # 2 draws for each coefficient
        {'random': 4, 'placebo': 4, 'steered': 2, 'base': 1}
    """
    if not coefficients or new_tokens < 1 or draws < 0:
        raise InputError("a sweep needs coefficients, new_tokens >= 1 and draws >= 0")
    if callable(operation) == (layers is None):
        raise InputError("give layers with a function from layer to operation, and only then")
    batch = _Prompts.of(model, prompts, target, new_tokens, prepend_bos)
    operations = (
        [operation(layer) for layer in layers or ()] if callable(operation) else [operation]
    )
    frames: list[pd.DataFrame] = []
    bar = progress_bar("sweep", total=len(operations) * len(coefficients) * (1 + 2 * draws))
    for each in operations:
        if type(each) not in STRENGTHS or not isinstance(each.unit, Neuron | Direction):
            raise InputError(
                f"{type(each).__name__} of {each.unit} has no strength to sweep; expected Scale, "
                "Add or Ablate of a Neuron or Direction"
            )
        layer = layer_of(each.hook(model))
        stream = f"{blocks_name(model)}.{layer}.hook_resid_post"
        base = batch.read(model, stream)
        if not frames:
            frames.append(base.rows(base, kind="base", layer=layer))
        pairs = list(_controls(model, each, prompts, draws, seed, prepend_bos)) if draws else []
        for coefficient in coefficients:
            strength: dict[str, Any] = {STRENGTHS[type(each)]: float(coefficient)}
            strengthened = replace(each, **strength)
            tried: list[tuple[str, float, Operation]] = [("steered", math.nan, strengthened)]
            for number, (random, placebo, factor) in enumerate(pairs):
                tried.append(("random", number, replace(strengthened, unit=random)))
                tried.append(("placebo", number, Matched(strengthened, placebo, factor)))
            for kind, draw, what in tried:
                steered = steer(model, [what], prompt=prompt, generation=generation)
                with turn(model), steered:
                    condition = batch.read(model, stream)
                labels = {"kind": kind, "layer": layer, "coefficient": coefficient, "draw": draw}
                frames.append(condition.rows(base, **labels))
                bar.update()
    bar.close()
    scored = pd.concat(frames, ignore_index=True)
    scored["nll"] = batch.surprise(model, np.stack(scored.pop("tokens").to_list()))
    scored["perplexity"] = np.exp(scored["nll"])
    names = tuple(f"{type(each).__name__} of {each.unit}" for each in operations)
    return SweepResult(scored, seed, names)


@dataclass(frozen=True, eq=False)
class _Read:
    """What one condition did to all prompts."""

    logits: Float[Tensor, "prompt vocabulary"]
    lengths: Float[Tensor, " prompt"]
    tokens: Int[Tensor, "prompt new"]
    target: Float[Tensor, " prompt"]
    texts: list[str]

    def rows(self, base: _Read, **condition: Any) -> pd.DataFrame:
        p, q = base.logits.log_softmax(dim=-1), self.logits.log_softmax(dim=-1)
        return pd.DataFrame(
            {
                "kind": condition["kind"],
                "layer": condition["layer"],
                "coefficient": condition.get("coefficient", math.nan),
                "draw": condition.get("draw", math.nan),
                "prompt": range(len(self.texts)),
                "target": self.target.tolist(),
                "kl": (p.exp() * (p - q)).sum(dim=-1).clamp_min(0).tolist(),
                "norm_ratio": (self.lengths / base.lengths).tolist(),
                "repetition": [_repetition(row) for row in self.tokens.tolist()],
                "text": self.texts,
                "tokens": list(self.tokens.numpy()),
            }
        )


@dataclass(frozen=True, eq=False)
class _Prompts:
    """All prompts, padded on the left."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    wanted: tuple[list[int], list[int]]
    new: int

    @classmethod
    def of(
        cls,
        model: TransformerBridge,
        prompts: Sequence[str],
        target: Any,
        new: int,
        bos: bool | None,
    ) -> _Prompts:
        if isinstance(prompts, str):
            raise InputError(f"prompts is a list of texts, not one text: [{prompts!r}]")
        if labels_of(model) is not None:
            raise InputError("a sweep looks at next tokens, and this model gives classes")
        prepared = prepare_text(model, list(prompts), prepend_bos=bos)
        ids = zip(prepared.tokens, prepared.mask, strict=True)
        left = Batch.of_rows([row[real].tolist() for row, real in ids], "left")
        token_lists = [[side] if isinstance(side, str | int) else list(side) for side in target]
        vocabulary = int(model.cfg.d_vocab)
        first, second = (
            [token_id(model.tokenizer, t, vocabulary) for t in tokens] for tokens in token_lists
        )
        device = prepared.tokens.device
        return cls(left.tokens.to(device), left.mask.to(device), (first, second), new)

    @torch.no_grad()
    def read(self, model: TransformerBridge, stream: str) -> _Read:
        lengths: list[Tensor] = []

        def measure(x: Tensor) -> None:
            lengths.append(x[:, -1].float().norm(dim=-1).cpu())

        with reading(model, {stream: measure}):
            generated: Any = model.generate(
                self.tokens,
                attention_mask=self.mask.long(),
                max_new_tokens=self.new,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                output_logits=True,
            )
        logits = generated.logits[0].double().cpu()
        new = generated.sequences[:, -self.new :].cpu()
        first, second = self.wanted
        target = logits[:, first].mean(dim=1) - logits[:, second].mean(dim=1)
        texts = [model.tokenizer.decode(row) for row in new]
        return _Read(logits, lengths[0], new, target, texts)

    @torch.no_grad()
    def surprise(self, model: TransformerBridge, texts: NDArray[np.int64]) -> list[float]:
        """Nats a token of each row [row, new] under the base model; rows go round the prompts."""
        count = len(self.tokens)
        rows = [(index % count, *row.tolist()) for index, row in enumerate(texts)]
        unique = list(dict.fromkeys(rows))
        nats: list[float] = []
        for start in range(0, len(unique), count):
            some = torch.tensor(unique[start : start + count], device=self.tokens.device)
            which, new = some[:, 0], some[:, 1:]
            mask = torch.cat([self.mask[which], torch.ones_like(new).bool()], dim=1)
            tokens = torch.cat([self.tokens[which], new], dim=1)
            batch = prepare_text(model, tokens, attention_mask=mask)
            ends = torch.arange(mask.shape[1])[-self.new - 1 : -1].expand(len(some), -1)
            with forward(model, batch, columns=ends) as run:
                assert run.logits is not None
                logits = run.logits.float()
            losses = torch.nn.functional.cross_entropy(logits.mT, new, reduction="none")
            nats += losses.mean(dim=1).tolist()
        by_row = dict(zip(unique, nats, strict=True))
        return [by_row[row] for row in rows]


def _repetition(tokens: list[int]) -> float:
    pairs = list(pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _controls(
    model: TransformerBridge,
    operation: Moving,
    prompts: Sequence[str],
    draws: int,
    seed: int,
    bos: bool | None,
) -> Iterator[tuple[Unit, Unit, float]]:
    """A random unit, a placebo's, and how many times more its activation must change."""
    rng = np.random.default_rng(seed)
    unit = operation.unit
    if isinstance(unit, Neuron):
        size = model.blocks[unit.layer].mlp.W_out.shape[0]
        length = float(unit.writes(model)["out"].norm())
        for _ in range(draws):
            others = [replace(unit, index=_other(rng, unit.index, size)) for _ in range(2)]
            yield others[0], others[1], length / float(others[1].writes(model)["out"].norm())
        return
    assert isinstance(unit, Direction)
    states_seen = torch.cat([row[1:] for row in states(model, prompts, unit.at, prepend_bos=bos)])
    if len(states_seen) < 2:
        raise InputError("placebos are made of the prompts' states: give longer prompts or draws=0")
    for _ in range(draws):
        noise = torch.from_numpy(rng.standard_normal(len(unit.vector))).to(states_seen)
        a, b = rng.choice(len(states_seen), 2, replace=False)
        directions = [_as_long(v, unit) for v in (noise, states_seen[a] - states_seen[b])]
        yield directions[0], directions[1], step_length(unit) / step_length(directions[1])


def _other(rng: np.random.Generator, index: int, size: int) -> int:
    return int((index + rng.integers(1, size)) % size)


def _as_long(vector: Tensor, unit: Direction) -> Direction:
    length = unit.vector.norm().to(vector)
    return Direction(unit.at, vector * (length / vector.norm()))
