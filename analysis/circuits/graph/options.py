"""What a graph is made with: the one set of options of `attribution_graph` and `estimate_graph`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenslrp import media
from lenslrp.analysis.circuits.graph.candidates import Candidates, find_candidates
from lenslrp.analysis.circuits.graph.cost import GraphEstimate, estimated
from lenslrp.analysis.circuits.graph.gradients import NODE_KINDS
from lenslrp.analysis.circuits.nodes import Node, place_components
from lenslrp.analysis.circuits.replacement import require_coders
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.errors import InputError
from lenslrp.hooks import AttnLRP, Composite
from lenslrp.hooks.rule_types import CONSTANT
from lenslrp.inputs import is_encoder_decoder
from lenslrp.sessions import Session
from lenslrp.targets import PerRow, as_target
from lenslrp.targets import Sequence as Span

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ATTENTION = ("composite", "frozen", "qkv")
"""What becomes of attention: what the composite says; patterns are constants; what the composite
says, with edges into heads told apart by query, key and value."""

ROWS, MEMORY = 8, 2e9
"""Where nothing is said: so many rows at once, or as many as fit into so many bytes beside the
model and the coders."""


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """See `attribution_graph`, whose arguments these are."""

    composite: Composite | None
    components: Sequence[str]
    coders: Sequence[SparseCoder]
    attention: str
    k: int
    share: float
    direct: bool
    node_share: float
    edge_share: float
    prepend_bos: bool | None
    rows: int | None
    max_memory: float | None

    @property
    def split(self) -> bool:
        """Whether edges into heads are told apart by query, key and value."""
        return self.attention == "qkv"

    @property
    def _rows(self) -> int:
        return ROWS if self.rows is None else self.rows

    @property
    def rules(self) -> Composite:
        rules = AttnLRP() if self.composite is None else self.composite
        if self.attention != "frozen":
            return rules
        name, frozen = f"{rules.name}, patterns frozen", {"attention_av": CONSTANT}
        return Composite(name, {**rules.rules, **frozen}, rules.modules)

    @property
    def settings(self) -> dict[str, Any]:
        """What the graph says that it was made with."""
        return {
            "composite": self.rules.name, "components": list(self.components),
            "coders": [coder.name for coder in self.coders], "attention": self.attention,
            "k": self.k, "share": self.share, "direct": self.direct,
            "node_share": self.node_share, "edge_share": self.edge_share,
        }  # fmt: skip

    def cost(self, candidates: Candidates, chosen: Sequence[Node]) -> GraphEstimate:
        """What the graph will take, with as many rows at once as it is made with.

        Raises:
            InputError: one row is more than ``max_memory``.
        """
        cost = estimated(candidates, self._rows, self.direct, self.split, chosen)
        if self.max_memory is not None:
            return cost.within(self.max_memory)
        return cost if self.rows is not None else cost.near(MEMORY)

    @contextmanager
    def candidates(self, model: TransformerBridge, input: Any, target: Any) -> Iterator[Candidates]:
        """The candidates of the prompt, with the rules attached."""
        self._check(model)
        wanted = as_target(target, model.tokenizer, 1, media.labels_of(model))
        if isinstance(wanted, PerRow):
            wanted = wanted.targets[0]
        append = wanted.ids(model.tokenizer) if isinstance(wanted, Span) else []
        bos = self.prepend_bos
        prepared = media.prepare_batch(model, input, {}, append=append, prepend_bos=bos)
        if len(prepared.tokens) != 1:
            raise InputError(f"a graph is of one prompt; {len(prepared.tokens)} were given")
        hooks = place_components(model, self.components) if self.components else {}
        with Session(model, self.rules, ledger=False, logits="target", stays=False) as session:
            yield find_candidates(
                session, prepared, wanted, hooks, self.coders, input=input, prepend_bos=bos
            )

    def _check(self, model: TransformerBridge) -> None:
        if is_encoder_decoder(model):
            raise InputError("a graph is of one stack of layers; this model is an encoder-decoder")
        names = self.components
        if isinstance(names, str):
            raise InputError(f"components is a list of names, not one name: [{names!r}]")
        unknown = [name for name in names if name not in NODE_KINDS]
        if unknown or not (names or self.coders):
            raise InputError(f"components are some of {', '.join(NODE_KINDS)}, not {names!r}")
        require_coders(model, self.coders)
        if self.attention not in ATTENTION:
            raise InputError(f"attention is one of {', '.join(ATTENTION)}, not {self.attention!r}")
        if self.k < 1 or self._rows < 1:
            raise InputError(f"k and rows must be at least 1, not {self.k} and {self._rows}")
        for name in ("share", "node_share", "edge_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"{name} must be above 0 and at most 1, not {value}")
