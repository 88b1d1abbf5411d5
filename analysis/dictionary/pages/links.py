"""What made a unit fire, what it moved, and what becomes of a target when it is clamped.

Three questions that a dictionary alone cannot answer, put to the model over a unit's own examples:

* **upstream**: relevance of earlier neurons and heads for the unit's activation at its ActMax hits
  (`targets.Activation`): one forward and one backward pass for all examples together;
* **downstream**: the unit is switched off at its RelMax hits, and later neurons and heads are read
  at the same positions with and without it: two forward passes;
* **clamping**: the unit is scaled by 0 and by 2 in the whole document, and the logit that its
  relevance explained is read again, beside a placebo: another unit of the same hook point, drawn
  anew for each example, scaled by 0. Four forward passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.dictionary.unit import ExampleRows, Page
from lenslrp.edits import Edit, edit_units
from lenslrp.errors import InputError
from lenslrp.forward import forward, reading
from lenslrp.hooks.structure import layer_of
from lenslrp.reductions import over_positions
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LINKED = re.compile(r"\w*blocks\.\d+\.(mlp\.hook_post|attn\.hook_z)")
"""Where other units are looked for: MLP neurons and attention heads."""

_QUIET = 0.01
"""A unit that varies by less than this share of its hook point's mean is measured by that share."""


def _over_heads(z: Tensor) -> Tensor:
    """[batch, pos, head, d_head] summed to [batch, head]; no heads where it has another shape."""
    return z.sum(dim=(1, 3)) if z.ndim == 4 else z.new_zeros(len(z), 0)


def _require_component(page: Page, *kinds: str) -> None:
    if page.place.kind not in kinds:
        wanted = " and ".join(f"{kind}s" for kind in kinds)
        raise InputError(f"{page.name} is a {page.place.kind}; this is for {wanted}")


def _ranked(
    values: dict[str, Float[Tensor, "example unit"]], limit: int, column: str
) -> pd.DataFrame:
    """The units with the largest median over examples, in size, and how many examples agree.

    The median, so that no unit is listed for a single example.
    """
    records = []
    for hook, by_example in values.items():
        middle = by_example.quantile(0.5, dim=0)
        best = middle.abs().topk(min(limit, len(middle))).indices
        for unit in best.tolist():
            same = int((by_example[:, unit].sign() == middle[unit].sign()).sum())
            records.append((f"{hook}[{unit}]", float(middle[unit]), same, len(by_example)))
    records = sorted((r for r in records if r[1]), key=lambda record: -abs(record[1]))
    return pd.DataFrame(records[:limit], columns=["name", column, "same_sign", "examples"])


def upstream(model: TransformerBridge, page: Page, *, k: int = 8, limit: int = 12) -> pd.DataFrame:
    """Earlier units whose relevance for this unit's activation is largest.

    Args:
        model: the bridge that the dictionary was built from.
        page: of a neuron.
        k: over how many of the unit's ActMax examples.
        limit: how many units.

    Returns:
        `name`; `relevance` (summed over positions, median over examples, in units of the
        activation); `same_sign` (in how many examples it has that sign); `examples`; `share`
        (of the median activation at the hits).

    Raises:
        InputError: no neuron or other component of a hook point, or ActMax was not searched.
    """
    _require_component(page, "neuron")
    rows = ExampleRows.of(page, page.examples("actmax").head(k))
    with Session(model, ledger=False, logits="target", stays=False) as session:
        _, cache = session.run_with_relevance(
            rows.batch.tokens,
            rows.activations(page),
            names_filter=lambda name: LINKED.fullmatch(name) is not None and _before(name, page),
            reduce={"mlp.hook_post": over_positions, "attn.hook_z": _over_heads},
            attention_mask=rows.batch.mask,
        )
    activation = float(cache.target.value.float().quantile(0.5))
    values = {name: cache[name].float().cpu() for name in cache if cache[name].ndim == 2}
    frame = _ranked(values, limit, "relevance")
    return frame.assign(share=frame["relevance"] / activation if activation else float("nan"))


def downstream(
    model: TransformerBridge, page: Page, *, k: int = 8, limit: int = 12
) -> pd.DataFrame:
    """Later units that change most when this one is switched off at its RelMax hits.

    Arguments as for `upstream`.

    Returns:
        `name`; `change` (with the unit minus without it, at the position of the hit, median
        over examples, in standard deviations of the other unit over all tokens of these examples; a
        head is measured by the length of its value mixture); `same_sign`; `examples`.

    Raises:
        InputError: neither neuron nor head, RelMax was not searched, or nothing comes later.
    """
    _require_component(page, "neuron", "head")
    rows = ExampleRows.of(page, page.examples("relmax").head(k))
    later = [name for name in model.hook_dict if LINKED.fullmatch(name) and _after(name, page)]
    if not later:
        raise InputError(f"no neurons or heads come after {page.place.hook}")
    edits = [
        Edit(page.place.hook, (page.index,), rows=(row,), positions=(hit,))
        for row, hit in enumerate(rows.hits)
    ]
    with_it, without = _read(model, later, rows), _read(model, later, rows, edits)
    change = {}
    for name, (values, std) in with_it.items():
        floor = (_QUIET * std.mean()).clamp_min(torch.finfo(std.dtype).tiny)
        change[name] = (values - without[name][0]) / std.clamp_min(floor)
    return _ranked(change, limit, "change")


def _order(name: str) -> tuple[int, bool]:
    """Where a hook point is in the network: an MLP comes after its block's heads."""
    layer = layer_of(name)
    return (-1 if layer is None else layer), name.endswith("mlp.hook_post")


def _before(name: str, page: Page) -> bool:
    return _order(name) < _order(page.place.hook)


def _after(name: str, page: Page) -> bool:
    return _order(name) > _order(page.place.hook)


def _read(
    model: TransformerBridge, names: list[str], rows: ExampleRows, edits: Sequence[Edit] = ()
) -> dict[str, tuple[Float[Tensor, "example unit"], Float[Tensor, " unit"]]]:
    """One forward pass: each hook point's units at the hits, and their spread over all tokens."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(x: Tensor, name: str) -> None:
        if x.ndim < 3:
            return  # flattened over batch and position
        units = (x.norm(dim=-1) if x.ndim == 4 else x).float()
        at = units[torch.arange(len(units)), rows.columns(rows.hits)]
        found[name] = at.cpu(), units[rows.batch.mask].std(dim=0).cpu()

    readers = {name: partial(keep, name=name) for name in names}
    with edit_units(model, edits), reading(model, readers), forward(model, rows.prepared(model)):
        return found


def clamped(model: TransformerBridge, page: Page, *, k: int = 8) -> pd.DataFrame:
    """The logit that RelMax explained, when this unit is scaled by 0 and by 2.

    Args:
        model, page, k: as for `upstream`, over RelMax examples.

    Returns:
        `rank`; `token` (id) and `position` of the target; `logit` as it is; `off`,
        `doubled` and `placebo`: changes of it, in logits; `score`: the unit's relevance at
        its hit.

    Raises:
        InputError: neither neuron nor head, a hook point with no other unit, RelMax was not
            searched, or relevance explained something else than one token.
    """
    _require_component(page, "neuron", "head")
    frame = page.examples("relmax").head(k)
    if page.place.size < 2:
        raise InputError(f"{page.place.hook} has no other unit to compare with")
    if (frame["target_position"] < 0).any():
        raise InputError("relevance explained something else than the logit of one token")
    documents = page.dictionary.texts.documents(frame["doc"])
    tokens = torch.tensor([documents[doc].aim_token for doc in frame["doc"]])
    rows, aims = ExampleRows.of(page, frame), frame["target_position"].tolist()
    each, columns = torch.arange(len(aims)), rows.columns(aims)[:, None]
    batch = rows.prepared(model)

    def logits(*edits: Edit) -> Tensor:
        with forward(model, batch, edits=edits, columns=columns) as made:
            assert made.logits is not None
            at = made.logits[:, 0].float().cpu()
        if (tokens < 0).any():  # the top logit was explained
            tokens.copy_(at.argmax(dim=1))
        return at[each, tokens]

    hook, unit = page.place.hook, (page.index,)
    plain = logits()
    draw = torch.Generator().manual_seed(page.dictionary.plan.seed)
    others = torch.randint(1, page.place.size, (len(aims),), generator=draw).tolist()
    placebo = [
        Edit(hook, ((page.index + other) % page.place.size,), rows=(row,))
        for row, other in enumerate(others)
    ]
    return pd.DataFrame(
        {
            "rank": frame["rank"],
            "token": tokens.tolist(),
            "position": aims,
            "logit": plain.tolist(),
            "off": (logits(Edit(hook, unit, scale=0.0)) - plain).tolist(),
            "doubled": (logits(Edit(hook, unit, scale=2.0)) - plain).tolist(),
            "placebo": (logits(*placebo) - plain).tolist(),
            "score": frame["score"],
        }
    )
