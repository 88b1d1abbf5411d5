"""``lenslrp doctor``: did I cover everything, and is it right?

Runs one random prompt through a model under a composite and reports which rule sits where, which
operations have none, whether the bridge computes what Hugging Face's model does, whether the
forward pass was touched and whether the target is accounted for.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from lenslrp import media
from lenslrp.cache import RelevanceCache
from lenslrp.defaults import recommended
from lenslrp.errors import CoverageError, InputError
from lenslrp.forward import forward
from lenslrp.hooks.assignment import assign
from lenslrp.hooks.composites import Composite, as_composite
from lenslrp.hooks.coverage import Coverage
from lenslrp.hooks.rule_types import Rule
from lenslrp.latent import Activation
from lenslrp.ledger import BALANCED, Ledger
from lenslrp.models.verifying import Agreement
from lenslrp.models.wrapped import agreement_of
from lenslrp.running import architecture
from lenslrp.sessions import Session
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """What `lenslrp.examine` and `lenslrp doctor` show; it prints as a report.

    Attributes:
        architecture: the Hugging Face class.
        composite: name of the table that was tried.
        forward_equal: whether logits with rules are ``torch.equal`` to those without.
        gap: the `CoverageError`'s text, ``None`` when everything is covered.
        agreement: of the bridge with the Hugging Face model before it was wrapped.
        assigned: which component was given which rule, see `lenslrp.hooks.assign`.
        coverage: of the run (with gaps: of a run that takes the plain gradient there).
        ledger: likewise.
        dtype: of the logits.
        tolerance: what the ledger's imbalance is held against.
        advice: what would make passes on this machine faster.
    """

    architecture: str
    composite: str
    forward_equal: bool
    gap: str | None
    assigned: pd.DataFrame
    coverage: Coverage
    ledger: Ledger
    dtype: str
    tolerance: float
    agreement: Agreement
    advice: str = ""

    @property
    def balanced(self) -> bool:
        """Whether the account misses no more than ``tolerance``."""
        return self.ledger.imbalance <= self.tolerance

    @property
    def ok(self) -> bool:
        """Whether this model can be explained under this composite."""
        return self.forward_equal and self.gap is None and self.balanced and self.agreement.ok

    def render(self) -> RenderableType:
        """For ``rich.print`` or a ``rich.console.Console``."""
        parts: list[RenderableType] = [
            Text(f"{self.architecture} under {self.composite} ({self.dtype})", style="bold")
        ]
        parts.append(_rules_table(self.assigned, self.coverage))
        parts.append(_verdict(str(self.agreement), self.agreement.ok, self.agreement.known))
        parts.append(_verdict("every operation on the path has its rule", self.gap is None))
        if self.gap is not None:
            parts.append(Text(f"  {self.gap}", style="red"))
        parts.append(_verdict("the forward pass is untouched", self.forward_equal))
        balance = f"the ledger balances: it misses {self.ledger.imbalance:.1e} of its largest entry"
        parts.append(_verdict(balance + f" (tolerance {self.tolerance:g})", self.balanced))
        parts.extend(Text(f"  {line}") for line in str(self.ledger).splitlines())
        parts.append(_verdict("this model can be explained", self.ok))
        if self.advice:
            parts.append(Text(self.advice))
        return Group(*parts)

    def face(self) -> Face:
        return replace(
            self.coverage.face(),
            title=f"Diagnosis: this model can{'' if self.ok else 'not'} be explained",
            facts={
                "model": self.architecture,
                "under": self.composite,
                "bridge computes the same": self.agreement.ok if self.agreement.known else None,
                "every operation has its rule": self.gap is None,
                "forward pass untouched": self.forward_equal,
                "ledger misses, of its largest entry": self.ledger.imbalance,
            },
        )

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=100, color_system=None, force_jupyter=False)
        console.print(self.render())
        return buffer.getvalue()

    __repr__ = __str__


def _verdict(claim: str, holds: bool, known: bool = True) -> Text:
    mark, style = ("yes", "green") if holds else ("NO", "bold red")
    mark, style = (mark, style) if known else ("?", "yellow")
    return Text.assemble((f"{mark:>4}  ", style), claim)


def _rules_table(assigned: pd.DataFrame, coverage: Coverage) -> Table:
    """What has fired; and layers under epsilon, whose rule is their own gradient."""
    names = [Column(name, overflow="fold") for name in ("role", "rule", "component")]
    table = Table(*names, "places", "fired")
    groups = coverage.sites.groupby(["role", "rule", "component"], sort=True)
    for (role, rule, component), sites in groups:
        fired = int(sites["fired"].sum())
        table.add_row(role, rule, component, str(len(sites)), str(fired))
    layers = assigned[assigned["rule"] == "epsilon"]
    for (role, component), places in layers.groupby(["role", "component"], sort=True):
        table.add_row(role, "epsilon", component, str(len(places)), "own gradient")
    return table


def examine(
    model: TransformerBridge,
    composite: Composite | Mapping[str, Rule] | None = None,
    *,
    length: int = 12,
    seed: int = 0,
) -> Diagnosis:
    """Try a composite on a model with one random prompt (or image, or sound).

    Args:
        model: a ``TransformerBridge`` in eval mode.
        composite: `lenslrp.recommended` of the model if not given.
        length: tokens of the random prompt.
        seed: of the random prompt.

    Returns:
        Which component has which rule, whether each operation is covered, the forward pass
        untouched and the target accounted for.

    Raises:
        InputError: the model is not a bridge, or in train mode.

    Examples:
        >>> lenslrp.examine(model).ok
        True
    """
    generator = torch.Generator().manual_seed(seed)
    if not hasattr(model, "hook_dict"):
        raise InputError(f"model must be a TransformerBridge, not {type(model).__name__}")
    target, inputs = None, dict[str, Tensor]()
    if media.reads_no_text(model):
        inputs = media.example(model, seed)
        if not media.head_of(model):
            residual = [name for name in model.hook_dict if name.endswith("hook_resid_post")]
            target = Activation(residual[-1], 0)
    else:
        inputs = {
            "input": torch.randint(0, int(model.cfg.d_vocab), (1, length), generator=generator)
        }
    table = recommended(model) if composite is None else composite
    gap = None

    def explained(*, strict: bool) -> tuple[Tensor, RelevanceCache]:
        with Session(model, table, strict=strict, stays=False) as session:
            return session.run_with_relevance(target=target, names_filter=[], **inputs)

    try:
        logits, relevance = explained(strict=True)
    except CoverageError as error:
        gap = str(error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the gap is reported below
            logits, relevance = explained(strict=False)
    floats = dict(inputs)
    batch = media.prepare_batch(model, floats.pop("input", None), floats)
    with forward(model, batch) as plain:
        equal = plain.logits is not None and bool(torch.equal(plain.logits, logits))
    name = table.name if isinstance(table, Composite) else "custom"
    return Diagnosis(
        architecture(model),
        name,
        equal,
        gap,
        assign(model, as_composite(table)).table(),
        relevance.coverage,
        relevance.ledger(),
        relevance.dtype,
        BALANCED[getattr(torch, relevance.dtype)],
        agreement_of(model),
        _advice(logits.device),
    )


def _advice(device: torch.device) -> str:
    """A setting of torch's that spares the kernel a page fault for every 4 KiB of a long input."""
    if device.type != "cpu" or sys.platform != "linux" or os.environ.get("THP_MEM_ALLOC_ENABLE"):
        return ""
    return "With long inputs on a CPU, THP_MEM_ALLOC_ENABLE=1 in the environment saves page faults"
