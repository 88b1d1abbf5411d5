"""Attach a composite's rules to a bridge, for the length of a ``with`` block, and undo it all.

Rules are forward hooks on hook points and wrapped modules, whose returned tensors have the same
values and their own backward. Weights are frozen meanwhile. When the block ends, by return or by
exception, the model has the hooks, ``requires_grad`` flags, attention implementation and mode that
it had before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks.attach import attach_all
from lenslrp.hooks.components import hook_points, watched_blocks
from lenslrp.hooks.composites import Composite, as_composite
from lenslrp.hooks.constants import EditMeter
from lenslrp.hooks.context import Context
from lenslrp.hooks.coverage import gap_message, require_fired, require_in_place
from lenslrp.hooks.graph_walk import walk
from lenslrp.hooks.handles import Attached, Holder, Undo, raise_failed, undo_all
from lenslrp.hooks.packed import is_packed, is_packed_linear
from lenslrp.hooks.readers import Readers, owners
from lenslrp.hooks.rule_types import Rule
from lenslrp.hooks.sharding import require_whole, reshard
from lenslrp.hooks.sites import Accounts, Site
from lenslrp.hooks.state import ModelState
from lenslrp.hooks.structure import NamedModules, components
from lenslrp.hooks.turns import turn

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ATTENTION_MODES = ("bridge", "fused")


class Rules:
    """The rules in force on one model: what :func:`relevance_rules` yields.

    ``sites``, ``routing`` and :meth:`verify` are for users.

    Attributes:
        composite: the table in force.
        sites: every attached rule, and how often it fired.
        routing: the experts that each position was sent to in the last forward pass, by the name
            of the mixture, [batch, pos, slot].
        experts: how many experts each mixture has.
        state: the model as it was when they were attached; ``None`` while they are not.
        points: its hook points by name.
        owned: the component of every ``hook_in``, by the id of that hook point.
        blocks: its blocks by layer, see :func:`~lenslrp.hooks.components.watched_blocks`.
        embedded: its embeddings, and whether each is one of positions.
    """

    def __init__(
        self,
        model: TransformerBridge,
        composite: Composite,
        attention: str,
        books: Accounts | None,
        copies: bool = False,
    ) -> None:
        self.model = model
        self.composite = composite
        self.attention = attention
        self.accounts = books
        self.copies = copies
        self.edits: list[EditMeter] = []
        self.changed: list[str] = []
        self.sites: list[Site] = []
        self.weights: dict[int, str] = {}
        self.routing: dict[str, Tensor] = {}
        self.experts: dict[str, int] = {}
        self.holder = Holder()
        self.state: ModelState | None = None
        self.points: dict[str, nn.Module] = {}
        self.owned: dict[int, nn.Module] = {}
        self.blocks: dict[int, nn.Module] = {}
        self.embedded: list[tuple[nn.Module, bool]] = []
        self._readers = Attached()
        self._undo: list[Undo] = []

    def attach(self) -> None:
        """Register every hook; freezes the weights."""
        reshard(self.model)
        self.state = None
        state = ModelState(self.model)
        self.points = hook_points(self.model, state.parts)
        self.owned = owners(module for _, module in state.parts)
        self.blocks = watched_blocks(state.parts)
        context = Context(
            self.composite,
            self.accounts,
            self.attention,
            copies=self.copies,
            routing=self.routing,
            experts=self.experts,
        )
        attached = Attached(self.copies, self.holder)
        self._readers = Attached(self.copies, self.holder)
        self._undo = attached.undo
        self.embedded = attach_all(self.model, state.parts, context, attached)
        frozen = self._guard(attached, state.parts)
        if self.sites:  # re-attached after a nested context: the same rules, counting on
            for new, old in zip(attached.sites, self.sites, strict=True):
                new.forward, new.backward = old.forward, old.backward
        self.sites = attached.sites
        self.edits, self.changed = attached.edits, attached.changed
        self.weights = attached.weights
        for weight in frozen:
            attached.freeze(weight)
        attached.undo += [partial(reshard, self.model), self._drop_readers]
        state.settle()
        self.state = state

    def keep(self, readers: Readers | None) -> None:
        """Attach readers for as long as the rules are attached, in the place of earlier ones."""
        assert self.state is not None
        self._drop_readers()
        if readers is not None:
            readers.attach(self.owned, self._readers)
            readers.state = self.state
        self.state.settle()

    def _drop_readers(self) -> None:
        raise_failed(undo_all(self._readers.undo))

    def begin(self) -> None:
        """Nothing has fired yet: a new pass begins under rules that were attached before."""
        for site in self.sites:
            site.forward, site.backward, site.order = 0, 0, -1
        for meter in self.edits:
            meter.missed = False
        self.changed.clear()
        self.routing.clear()

    @property
    def current(self) -> bool:
        """Whether the model is as it was when the rules were attached."""
        return self.state is not None and self.state.current

    def detach(self) -> list[BaseException]:
        """Undo :meth:`attach`, last thing first, however far it went; returns what failed."""
        return undo_all(self._undo)

    def _guard(self, attached: Attached, parts: NamedModules) -> list[nn.Parameter]:
        """Refuse other threads' passes, begun before or now; returns the weights to be frozen.

        Rules refuse by themselves. A pass may also reach none and only weights that are frozen, or
        be at its last one: what unembeds ends in a hook point.
        """
        # run_with_cache calls what the bridge wraps, past the bridge's own forward.
        guarded = {self.model, getattr(self.model, "original_model", self.model)}
        guarded |= {c.hook_out for c in self.model.children() if hasattr(c, "hook_out")}
        weights: dict[nn.Parameter, None] = {}
        for _, module in parts:
            trained = [p for p in module._parameters.values() if p is not None and p.requires_grad]
            if trained:
                guarded.add(module)
                weights.update(dict.fromkeys(trained))
        for module in guarded:
            attached.guard(module)
        return list(weights)

    def verify(self, *roots: Tensor) -> None:
        """Check that everything between ``roots`` (logits, say) and the leaves has its rule.

        Call it after the forward pass, before the backward pass.

        Raises:
            CoverageError: naming the first operations without a rule, or rules that sit where their
                operation is not.
        """
        walked = walk(roots, weights=self.weights)
        architecture = type(getattr(self.model, "original_model", self.model)).__name__
        if walked.gaps:
            raise CoverageError(gap_message(walked.gaps, architecture))
        require_in_place(walked, architecture)


def require_attention(attention: str) -> None:
    """Refuse another choice than those of :data:`ATTENTION_MODES`."""
    if attention not in ATTENTION_MODES:
        raise InputError(f"attention must be one of {ATTENTION_MODES}, not {attention!r}")


def require_bridge(model: TransformerBridge) -> None:
    """Refuse what rules cannot be attached to.

    Raises:
        InputError: no bridge, a quantised, an offloaded or a split weight or one that autograd
            cannot use, or train mode, of the whole or of a part.
    """
    if not hasattr(model, "hook_dict") or not isinstance(model, nn.Module):
        raise InputError(
            "model must be a TransformerBridge (lenslrp.load gives one), not "
            f"{type(model).__name__}"
        )
    parts = components(model)
    require_whole(model)
    owned = [(m, w) for _, m in parts for w in m._parameters.values() if w is not None]
    for module, parameter in owned:
        if parameter.is_inference():
            raise InputError(
                f"{_name_of(model, parameter)} was made under "
                "torch.inference_mode(), and autograd can use no such weight: load (or move, or "
                "convert) the model outside it; torch.no_grad() is fine"
            )
        if is_packed(parameter) and not is_packed_linear(module):
            kind = type(parameter).__name__
            raise InputError(
                f"{_name_of(model, parameter)} is quantised ({parameter.dtype}"
                f"{'' if kind == 'Parameter' else f', {kind}'}) and belongs to a "
                f"{type(module).__name__}; rules unpack weights of linear layers only, and those "
                "that a package unpacks: load the model in float32, bfloat16 or float16"
            )
    offloaded = [name for name, module in parts if _is_offloaded(module)]
    if offloaded:
        raise InputError(
            f"the weights of {offloaded[0]} (and {len(offloaded) - 1} more modules) are offloaded, "
            "and the rules need them during the backward pass too; give a device_map that keeps "
            "them all on devices"
        )
    # Dropout goes by the mode of its own module, not by the bridge's.
    if model.training or any(_drops_out(module) for _, module in parts):
        raise InputError(
            "the model, or a part of it, is in train mode, where dropout would change what is "
            "explained; call model.eval() first (and model.original_model.eval())"
        )


def _name_of(model: nn.Module, weight: Tensor) -> str:
    """The name of a weight in the model that the bridge wraps, if it has one."""
    names = (name for name, known in model.named_parameters() if known is weight)
    return next(names, "a weight").replace("_original_component.", "")


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings this module's weights in for each call and takes them out again."""
    return bool(getattr(module.__dict__.get("_hf_hook"), "offload", False))


def _drops_out(module: nn.Module) -> bool:
    """Whether a module is in train mode and that changes what it computes."""
    shares = (getattr(module, name, 0) for name in ("p", "attention_dropout", "dropout"))
    return module.training and any(isinstance(s, float) and s > 0 for s in shares)


def _reached(sites: list[Site]) -> list[Site]:
    """The sites up to the highest layer at which a backward pass has begun."""
    fired = [site for site in sites if site.backward]
    top = max((_height(site) for site in fired), default=-1.0)
    return [site for site in sites if site.forward and not site.cut and _height(site) <= top]


def _height(site: Site) -> float:
    return float("inf") if site.layer is None else float(site.layer)


@contextmanager
def relevance_rules(
    model: TransformerBridge,
    composite: Composite | Mapping[str, Rule],
    *,
    attention: str = "bridge",
    strict: bool = True,
    accounts: Accounts | None = None,
    copies: bool = False,
    books: Accounts | None = None,
) -> Iterator[Rules]:
    """Attach LRP rules to ``model`` for the length of the block.

    Inside, a forward pass gives the same logits as ever, and the backward pass of anything computed
    from them gives gradients under which activation times gradient is relevance, at every hook
    point (Arras et al. 2025, 2502.15886), in units of what ``backward`` is called on. Weights are
    frozen meanwhile. Nested blocks on one model: the innermost is in force. Threads take turns.

    Args:
        model: a ``TransformerBridge``.
        composite: ``AttnLRP()``, ``CPLRP()``, ... or a mapping from role to rule.
        attention: ``"bridge"`` (patterns readable) or ``"fused"`` (torch's fused kernel).
        strict: at the end of the block, raise if a rule's forward ran and its backward never did
            although another's did.
        accounts: where rules report what they absorb, for a ledger, in units of the target.
        copies: keep copies of what is needed for the backward pass, for a model that writes in
            place to what its modules return.
        books: the former name of ``accounts``.

    Yields:
        The rules in force; ``rules.verify(logits)`` checks, before the backward pass, that each
        operation has one.

    Raises:
        InputError: no bridge, a model in train mode, weights that are quantised, offloaded or
            split, or rules that cannot be had with this attention.
        CoverageError: at the end of the block, see ``strict``.

    Examples:
        Relevance of the embeddings, [batch, pos, d_model], for the logit of token 7::

            with relevance_rules(model, AttnLRP()) as rules:
                embedded = model.embed(tokens).detach().requires_grad_()
                logits = model(embedded)
                rules.verify(logits)
                logits[0, -1, 7].backward()
            R = embedded * embedded.grad
    """
    require_attention(attention)
    require_bridge(model)
    accounts = books if accounts is None else accounts
    rules = Rules(model, as_composite(composite), attention, accounts, copies)
    with turn(model, rules):
        yield rules
    if strict:
        require_fired(_reached(rules.sites))
