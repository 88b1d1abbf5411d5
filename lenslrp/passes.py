"""One forward pass under rules, and a backward pass for each target that is explained from it.

Leaves are cut at the embeddings, readers stream, and before relevance is returned the graph is
checked and the target accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from lenslrp import media
from lenslrp.batch import PAIRED, Batch
from lenslrp.cache import RelevanceCache
from lenslrp.errors import CoverageError, InputError
from lenslrp.graph_check import GraphFacts, GraphMemory, RuledForward, RunAgain, is_conditional
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.constants import sequence_number
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.install import Rules
from lenslrp.hooks.observing import Observer
from lenslrp.hooks.readers import ON_REQUEST, Readers
from lenslrp.hooks.rule_types import product_shares
from lenslrp.hooks.sharding import gather
from lenslrp.hooks.sites import has_values, row_sums, widened
from lenslrp.latent import Activation
from lenslrp.leaves import cut_inputs
from lenslrp.ledger import BALANCED, Ledger, make_ledger, read_sums
from lenslrp.logits import Columns, Target, head_component, spread, unembed_at
from lenslrp.reductions import reduction_names
from lenslrp.running import (
    architecture,
    axes_behind,
    capture,
    checkpoint_blocks,
    keep_uncapped,
    measuring,
    positions_second,
    run_model,
    undone,
    watch_blocks,
)
from lenslrp.targets import Explained, parts_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass
class Pass(RuledForward):
    """One forward pass under rules, from which any number of targets can be explained."""

    readers: Readers = field(kw_only=True)
    ledger: bool = True  #: hand the account out; it may be kept to see whether it balances alone
    layers: int = 0

    def relevance(self, target: Target, *, last: bool) -> RelevanceCache:
        """One backward pass for one target; ``last`` releases the graph.

        Raises:
            InputError: a target that is not differentiable or not finite.
            CoverageError: what the graph or the account shows is not right, if ``strict``.
            RunAgain: the pass has to be run once more, in another way.
        """
        # 1. The target, and what the graph below it shows.
        outputs = self.outputs()
        values = target.values(outputs)
        if not values.requires_grad:
            raise InputError("the target does not depend on the logits in a differentiable way")
        roots = self.roots(target)
        latent = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
        try:
            facts, faults = self.check(roots, latent)
        except CoverageError:  # broken weights break the form of norms and activations too
            self._require_finite(values, [])
            raise
        on_path = {id(self.rules.sites[index]) for index in facts.sites}
        free = self.ledger or bool(faults) or is_conditional(self.model)
        unknown = not free and facts.kind not in self.memory.balanced
        if unknown and self.accounts is None:
            raise RunAgain("accounts", "a graph that has not been seen to balance")

        # 2. The backward pass, from the target to the leaves.
        for site in self.rules.sites:
            site.backward = 0
        if self.accounts is not None:
            self.accounts.clear()
        self.leaves.passing.clear()
        gather(self.model, latent)
        leaves = self.leaves.all()
        with measuring(roots if self.accounts is not None else []) as at_roots:
            grads = self._backward(values, leaves, retain=not last)
        if self.strict:
            cover.require_fired([s for s in self.rules.sites if id(s) in on_path])

        # 3. Relevance of a leaf: its value times the gradient that arrived there.
        relevances = [
            widened(x.detach()) * widened(torch.zeros_like(x) if g is None else g)
            for x, g in zip(leaves, grads, strict=True)
        ]
        self._require_finite(values, relevances)

        # 4. The account of the target.
        ledger = self._account(target, values, roots, grads, at_roots)
        note = "" if faults else self._unbalanced(ledger, values.dtype, facts)
        if unknown and not note:
            self.memory.balanced.add(facts.kind)
        coverage = cover.Coverage(
            cover.site_rows(self.rules.sites, on_path),
            faults,
            self.readers.off_path(),
            [note] if note else [],
            list(self.memory.cuts or ()),
            balanced=not note,
        )
        explained = Explained.by(target, outputs, values)
        return self._collect(explained, relevances, coverage, ledger)

    def _backward(
        self, values: Tensor, leaves: list[Tensor], *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradient of a target at each leaf, under rules."""
        try:
            return torch.autograd.grad(values.sum(), leaves, retain_graph=retain, allow_unused=True)
        except CheckpointError as error:
            raise CoverageError(
                f"{architecture(self.model)}: a part of the model is recomputed in the "
                "backward pass (torch.utils.checkpoint), where the rules for its operations "
                "are not met: switch gradient checkpointing off; checkpoint=True recomputes "
                f"whole blocks under rules. torch says: {str(error).splitlines()[0]}"
            ) from error
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RunAgain("copies", f"{architecture(self.model)}: {error}") from error

    def _collect(
        self,
        explained: Explained,
        relevances: list[Tensor],
        coverage: cover.Coverage,
        ledger: Ledger | None,
    ) -> RelevanceCache:
        """What the backward pass has left at the leaves and with the readers, as one cache."""
        at = self._by_group(relevances)
        patches = self._patches(at["patches"])
        tokens, positions = _total(at["tokens"]), _per_token(at["positions"])
        patch_positions = _per_token(at["patch_positions"])
        if tokens is None:  # no text: the patches are the sequence
            assert patches is not None
            tokens = media.sequence(at["special"], patches)
            if patch_positions is not None:
                beside = media.beside(tokens, patch_positions, at["special"])
                positions, patch_positions = beside, None
        special = torch.cat(at["special"], dim=1).sum(dim=-1) if at["special"] else None
        decoder = self.batch.decoder
        rows = self.batch.rows(self.model.tokenizer)
        written = decoder.rows(self.model.tokenizer) if decoder else []
        values_read = self.readers.finish()
        return RelevanceCache(
            values=values_read,
            reduced=reduction_names(self.readers.reducers, values_read),
            position_axes=axes_behind(self.rules.points, values_read),
            activations=dict(self.readers.activations),
            # Gemma 4 has embeddings of another width besides; LED has positions for its padding.
            tokens=tokens.sum(dim=-1)
            + sum(part.sum(dim=-1) for part in at["tokens"] if part.shape != tokens.shape),
            embeddings=tokens,
            positions=None if positions is None else positions[:, : tokens.shape[1]],
            decoder_tokens=_per_token(at["decoder_tokens"]),
            decoder_positions=_per_token(at["decoder_positions"]),
            patches=None if patches is None else media.grid(patches),
            patch_positions=patch_positions,
            special=special,
            inputs=dict(zip(self.leaves.inputs, at["inputs"], strict=True)),
            decoder_str_tokens=[row.pieces for row in written] if decoder else None,
            decoder_words_=[row.words for row in written],
            token_ids=self.batch.tokens,
            attention_mask=self.batch.mask,
            decoder_token_ids=None if decoder is None else decoder.tokens,
            decoder_attention_mask=None if decoder is None else decoder.mask,
            str_tokens=[row.pieces for row in rows],
            words_=[row.words for row in rows],
            prompts=[row.prompt for row in rows],
            target=explained,
            composite=self.rules.composite,
            coverage=coverage,
            ledger_=ledger if self.ledger else None,
            routing=dict(self.rules.routing),
            n_experts=max(self.rules.experts.values(), default=0),
            model_name=str(getattr(self.model.cfg, "model_name", "")),
            dtype=str(explained.value.dtype).removeprefix("torch."),
        )

    def _activation(self, hook: str) -> Tensor:
        if hook.endswith(ON_REQUEST):
            raise InputError(f"{hook} is what relevance made of a scan: no relevance starts there")
        x = self.captured.get(hook)
        constant = hook.endswith(PAIRED) and product_shares(self.rules.composite["attention_av"])
        if x is None or not x.requires_grad or (constant and constant[0] == 0):
            why = ""
            if constant and self.rules.attention == "fused":
                why = '; attention="fused" forms no patterns or scores'
            elif constant and constant[0] == 0:
                why = f"; under {self.rules.composite.name} patterns are constants"
            raise InputError(
                f"{hook} is not on the path in this pass{why}: no relevance can start there"
            )
        if constant and constant[0] != constant[1] and not hook.endswith("hook_attn_scores"):
            raise InputError(
                f"under {self.rules.composite.name} patterns get {constant[0]:g} of their product "
                f"with values, and values {constant[1]:g}: {hook} can be explained where "
                "attention_av shares evenly"
            )
        return positions_second(self.model, hook, x)

    def _unbalanced(self, ledger: Ledger | None, dtype: torch.dtype, facts: GraphFacts) -> str:
        """What to say where the account does not add up; raised if strict.

        The graph shows neither a constant that is added on the path nor a gradient that a hook
        changes: only the account does.
        """
        if ledger is None or not math.isfinite(ledger.error):
            return ""
        changed = dict.fromkeys(self.rules.changed)
        if ledger.imbalance <= BALANCED[dtype] and not changed:
            return ""
        note = (
            f"the ledger does not balance: {ledger.target - ledger.accounted:+.4g} of "
            f"{ledger.target:.4g} is not accounted for. Something adds a constant on the path, "
            "changes a gradient, or computes what LensLRP does not know; see R.ledger().table "
            "(with strict=False) for the layer"
        )
        if changed:
            note += f". A backward hook at {', '.join(changed)} changes what passes it"
        overwritten = facts.writes or any(meter.missed for meter in self.rules.edits)
        if overwritten and not self.rules.copies:  # what was measured is not there any more
            raise RunAgain("copies", note)
        if self.strict:
            raise CoverageError(f"{architecture(self.model)}: {note}")
        return note

    def _by_group(self, relevances: list[Tensor]) -> dict[str, list[Tensor]]:
        """Relevance at each leaf, by the group that the leaf is in."""
        left = iter(relevances)
        return {name: [next(left) for _ in group] for name, group in self.leaves.groups().items()}

    def _patches(self, at_leaves: list[Tensor]) -> Tensor | None:
        """Relevance of the first image's patches: at the leaves, or where it passed them."""
        if at_leaves or not self.leaves.seen:
            return at_leaves[0] if at_leaves else None
        x, g = self.leaves.seen[0], self.leaves.passing.get(0)
        return widened(x) * widened(torch.zeros_like(x) if g is None else g)

    def _account(
        self,
        target: Target,
        values: Tensor,
        roots: list[Tensor],
        grads: tuple[Tensor | None, ...],
        at_roots: dict[int, Tensor],
    ) -> Ledger | None:
        if self.accounts is None:
            return None
        leaves = zip(self.leaves.all(), grads, strict=True)
        arrived = [row_sums(x.detach(), g) for x, g in leaves if g is not None]
        parts = parts_of(target)
        starting = []
        for root in (root for root in roots if id(root) in at_roots):
            rows = at_roots[id(root)]
            if len(roots) > 1:  # rows that start elsewhere only pass through here
                rows = rows[[r for r, t in enumerate(parts) if self.roots(t)[0] is root]]
            starting.append(rows)
        return make_ledger(self.accounts, values, arrived, starting, self.layers)

    def _require_finite(self, values: Tensor, relevances: list[Tensor]) -> None:
        """Both are looked at when the backward pass has ended: the host waits for neither."""
        of_target, *of_leaves = read_sums(x.isfinite().all() for x in (values, *relevances))
        if not of_target:
            reason = "activations overflowed or the weights are broken"
            if values.dtype == torch.float64 and not bool(self.batch.mask[:, :1].all()):
                reason = (
                    "in float64 Hugging Face's softmax is NaN where a position sees nothing but "
                    "padding, so pad on the right, give rows of one length, or use float32"
                )
            raise InputError(
                f"the target is NaN or infinite ({values.tolist()}): {reason} "
                f"(dtype {values.dtype}); check the model's own logits"
            )
        if not all(of_leaves):
            raise InputError(
                f"relevance is not finite ({values.dtype}): the backward pass overflowed; run the "
                "model in float32 or bfloat16"
            )


def _total(relevances: list[Tensor]) -> Tensor | None:
    """The sum over the leaves of a group that have the first one's shape, ``None`` without any.

    On the first one's device: embeddings may be spread over several.
    """
    alike = [part for part in relevances if part.shape == relevances[0].shape]
    return torch.stack([r.to(alike[0].device) for r in alike]).sum(dim=0) if alike else None


def _per_token(relevances: list[Tensor]) -> Tensor | None:
    """The same, summed over the features."""
    total = _total(relevances)
    return None if total is None else total.sum(dim=-1)


@contextmanager
def under_rules(
    model: TransformerBridge,
    rules: Rules,
    batch: Batch,
    readers: Readers,
    *,
    latent: Iterable[str] = (),
    columns: Columns | None = None,
    leaf: str = "pixels",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    memory: GraphMemory | None = None,
    observer: Observer | None = None,
    at_nodes: Callable[[Attached, Pass], None] | None = None,
) -> Iterator[Pass]:
    """A forward pass under rules that are attached; its backward passes belong inside the block.

    Args:
        model: a ``TransformerBridge``.
        rules: those in force on it.
        batch: what it reads.
        readers: what is read of relevance in the backward pass.
        latent: hook points whose units are targets.
        columns: where logits are computed; at every position if not given.
        leaf, checkpoint, strict, ledger: as for `lenslrp.run_with_relevance` (``leaves``).
        memory: what is known of the model's graphs.
        observer: watches the pass for what the graph does not show.
        at_nodes: attaches what else belongs to the pass.

    Raises:
        InputError: leaves that the model does not have.
        CoverageError: no token embedding that is known has run.
    """
    assert rules.state is not None
    parts, points = rules.state.parts, rules.points
    rules.begin()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        at = stack.enter_context(undone(Attached()))
        stack.enter_context(readers.reading(copies=rules.copies))
        for meter in rules.edits:
            meter.touched = lambda: 0 if observer is None else observer.touched
        memory = GraphMemory() if memory is None else memory
        run = Pass(
            model, batch, rules=rules, readers=readers, strict=strict, ledger=ledger,
            observer=observer, memory=memory,
        )  # fmt: skip
        inputs = cut_inputs(at, parts, rules.embedded, run.leaves, batch, rules.sites, leaf)
        if rules.accounts is not None:
            rules.accounts.clear()
            run.layers = watch_blocks(at, rules.blocks, rules.accounts)
        if readers.state is not rules.state:
            readers.attach(rules.owned, at)
        capture(at, points, rules.owned, list(latent), run.captured)
        keep_uncapped(at, model, parts, run.captured)
        picked: list[bool] = []
        unembed, length = head_component(model), batch.written.tokens.shape[1]
        if columns is not None and unembed is not None:
            picked = unembed_at(at, unembed, columns, length)
            inside = {id(module) for module in unembed.modules()}
            readers.restore = lambda point, x: (
                spread(x, columns, length) if picked and id(point) in inside else x
            )
        if at_nodes is not None:
            at_nodes(at, run)
        if checkpoint:
            checkpoint_blocks(at, model, parts)
        if has_values(batch.written.mask):
            assert batch.written.lengths is not None  # read before anything runs on a device
        run.first_node = sequence_number()
        with observer or nullcontext():
            run.logits = run_model(model, batch, run.leaves, inputs)
        if picked:
            run.columns = columns
        if media.reads_no_text(model):
            run.batch = media.with_sequence(batch, run.leaves)
        yield run
