"""One forward pass of a model, whatever it is for.

Everything that LensLRP runs a model for goes through `forward`, or under relevance rules
through `lenslrp.passes.under_rules`: what is read on the way, what is changed, where logits
are computed and where the pass ends is said there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lenslrp import media
from lenslrp.batch import Batch
from lenslrp.edits import Edit, edit_units
from lenslrp.errors import InputError
from lenslrp.hooks.components import BlockBridge, hook_points
from lenslrp.hooks.functions import apply
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.readers import (
    owners,
)
from lenslrp.hooks.shown_scans import show_scans
from lenslrp.hooks.structure import NamedModules, components, layer_of, unchanged
from lenslrp.hooks.turns import turn
from lenslrp.inputs import is_encoder_decoder
from lenslrp.latent import Activation
from lenslrp.leaves import Leaves, cut_inputs
from lenslrp.logits import (
    Columns,
    Outputs,
    Target,
    at_columns,
    columns_of,
    head_component,
    is_hooked,
    unembed_at,
)
from lenslrp.running import (
    UNCAPPED,
    architecture,
    capture,
    frozen,
    positions_second,
    read_at,
    run_model,
    undone,
)
from lenslrp.sentences import Embedding, Similarity
from lenslrp.targets import Sequence, as_target, parts_of, require_latent

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class _CapSkip(torch.autograd.Function):
    """The final soft-cap's values with the gradient started before it."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        ctx.device = before.device  # of a model that is spread over several, not that of its output
        return after.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.device), None


@dataclass
class Forward:
    """What one forward pass gave.

    Attributes:
        batch: what was run.
        logits: [batch, pos, vocab], or [batch, n, vocab] at ``columns``; a classifier's
            [batch, class]. ``None`` before the pass, and where it stopped before them.
        captured: hook point -> its tensor, on the autograd graph.
        columns: where the logits are, if they are not at every position.
    """

    model: TransformerBridge
    batch: Batch
    captured: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    columns: Columns | None = None

    def roots(self, target: Target) -> list[Tensor]:
        """Where relevance starts: the latent units of the target, or the unembedding."""
        latent = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
        if latent and len(latent) < len(parts_of(target)):
            raise InputError("a batch cannot mix Activation targets with targets on the logits")
        return [self.captured[hook] for hook in dict.fromkeys(latent)] or [self._before_softcap()]

    def outputs(self) -> Outputs:
        """What targets are computed from, on the graph."""
        assert self.logits is not None
        before = self._before_softcap()
        logits = self.logits if before is self.logits else apply(_CapSkip, before, self.logits)
        return outputs_of(self.model, self.batch, logits, self._activation, self.columns)

    def _activation(self, hook: str) -> Tensor:
        return positions_second(self.model, hook, self.captured[hook])

    def _before_softcap(self) -> Tensor:
        """The tensor at which a backward pass from the logits starts."""
        assert self.logits is not None
        return self.captured.get(UNCAPPED, self.logits)


def outputs_of(
    model: TransformerBridge,
    batch: Batch,
    logits: Tensor,
    activation: Callable[[str], Tensor],
    columns: Columns | None = None,
) -> Outputs:
    """What targets are computed from."""
    labels = media.labels_of(model)
    own = getattr(model, "sentence_embedding", None)
    return Outputs(logits, batch, model.tokenizer, activation, labels, columns, own)


def columns_for(
    model: TransformerBridge, batch: Batch, targets: Iterable[Target]
) -> Columns | None:
    """Where targets read the logits; ``None`` where one of them, or somebody's hook, sees them all.

    Raises:
        InputError: a position outside a row.
    """
    if _head_of_columns(model) is None:
        return None
    return columns_of(targets, outputs_of(model, batch, torch.empty(0, 0, 0), _none))


def _head_of_columns(model: TransformerBridge) -> nn.Module | None:
    """What can unembed chosen columns alone; ``None`` where a hook, or a classifier's pooling of
    the logits, sees them all, and where the columns are frames, which the pass makes."""
    unembed = head_component(model)
    if media.reads_no_text(model) and not is_encoder_decoder(model):
        return None
    if unembed is None or is_hooked(model, unembed) or media.labels_of(model) is not None:
        return None
    return unembed


def targets_for(
    model: TransformerBridge, targets: Iterable[Any], rows: int
) -> tuple[list[Target], list[int]]:
    """The targets of one call, and the token ids that extend its prompts.

    Args:
        model: a ``TransformerBridge``.
        targets: each as a caller gives it, for the whole batch.
        rows: of the batch.

    Raises:
        InputError: what is no target, or a Sequence beside others.
    """
    labels = media.labels_of(model)
    parsed = [as_target(target, model.tokenizer, rows, labels) for target in targets]
    spans = [target.ids(model.tokenizer) for target in parsed if isinstance(target, Sequence)]
    if spans and len(parsed) > 1:
        raise InputError("a Sequence target extends the prompt: explain it in a run of its own")
    return parsed, spans[0] if spans else []


def require_readable(model: TransformerBridge, target: Target) -> None:
    """Refuse targets on logits for a model without a head, and on hidden states for one with it.

    Raises:
        InputError: naming the targets that such a model has.
    """
    kind = architecture(model)
    if not media.head_of(model):
        require_latent(target, kind)
    elif any(isinstance(part, Embedding | Similarity) for part in parts_of(target)):
        raise InputError(
            f"{kind} has a head: its output is logits, and a text's vector is made of hidden "
            "states. Load the model without its head, with transformers.AutoModel"
        )


def _none(hook: str) -> Tensor:
    raise InputError(f"{hook} has not run yet")


class _Stop(BaseException):
    """Leaves a forward pass: nothing behind this point is needed."""


@contextmanager
def forward(
    model: TransformerBridge,
    batch: Batch,
    *,
    read: Mapping[str, Callable[[Tensor], None]] | None = None,
    edits: Iterable[Edit] = (),
    capture_at: Iterable[str] = (),
    embed: Callable[[nn.Module, Tensor], Tensor | None] | None = None,
    leaves: Leaves | None = None,
    columns: Columns | None = None,
    stop_after: str | None = None,
    record: dict[int, Any] | None = None,
    replay: Mapping[int, Any] | None = None,
    gradients: bool = False,
    at_nodes: Callable[[Attached, Forward], None] | None = None,
) -> Iterator[Forward]:
    """Run ``model`` once without relevance rules; what is attached for it goes with the block.

    Inside a `lenslrp.relevance_rules` block the rules in force take part.

    Args:
        model: a ``TransformerBridge``.
        batch: what it reads.
        read: hook point -> what is called with its activations, in the form in which
            TransformerLens shows them, as they pass.
        edits: what is changed on the way; readers see it changed.
        capture_at: hook points whose tensors are kept on the autograd graph.
        embed: makes, of a module that embeds tokens and what it returned, what is used in its
            place, or ``None``; called until it has replaced the embeddings of ``batch.tokens``
            once (an encoder embeds before a decoder).
        leaves: filled with what is embedded, which is cut off from what it was made of.
        columns: [batch, n], where logits are computed; at every position if not given, and chosen
            from there where somebody's hooks see them all.
        stop_after: a hook point after which nothing is needed.
        record: is given what every block returns, by layer.
        replay: what blocks return instead of running, by layer.
        gradients: keep the autograd graph of everything but the weights.
        at_nodes: attaches what else belongs to the pass.

    Raises:
        InputError: a hook point that the model does not have, one to be read that does not fire, an
            edit that `lenslrp.edits.edit_units` refuses, or no embedding was replaced.
    """
    run = Forward(model, batch)
    with ExitStack() as stack:
        stack.enter_context(frozen(model) if gradients else turn(model))
        stack.enter_context(unchanged(model))
        parts = components(model)
        stack.enter_context(torch.set_grad_enabled(gradients))
        if edits:
            stack.enter_context(edit_units(model, edits))
        seen = stack.enter_context(reading(model, read or {}))
        at = stack.enter_context(undone(Attached()))
        inputs, embedded, picked = dict(batch.media), [], []
        if leaves is not None:
            inputs = cut_inputs(at, parts, embeddings(parts), leaves, batch, [])
        if embed is not None:
            embedded = _replace_embedded(at, parts, batch.tokens, embed)
        if record is not None or replay:
            _keep_blocks(at, parts, record, replay or {})
        named = [*capture_at, *([] if stop_after is None else [stop_after])]
        points = hook_points(model, parts) if named else {}
        show_scans(at, parts, named)
        if capture_at:
            owned = owners(module for _, module in parts)
            capture(at, points, owned, list(capture_at), run.captured)
        if stop_after is not None:
            read_at(at, points, stop_after, _stop)
        if at_nodes is not None:
            at_nodes(at, run)
        unembed = None if columns is None else _head_of_columns(model)
        if columns is not None and unembed is not None:
            picked = unembed_at(at, unembed, columns, batch.written.tokens.shape[1])
        with suppress(_Stop):
            run.logits = run_model(model, batch, leaves, inputs)
        missing = [name for name in read or () if name not in seen]
        if missing:
            raise InputError(f"{missing[0]} does not fire in this model's forward pass")
        if columns is not None and run.logits is not None and run.logits.ndim == 3:
            run.logits = run.logits if picked else at_columns(run.logits, columns)
            run.columns = columns
        if embed is not None and not embedded:
            raise InputError(
                f"{architecture(model)} embedded no tokens of shape {list(batch.tokens.shape)}: "
                "nothing was replaced"
            )
        yield run


@contextmanager
def reading(
    model: TransformerBridge, read: Mapping[str, Callable[[Tensor], None]]
) -> Iterator[set[str]]:
    """Call functions with the activations at hook points in every pass inside the block.

    Args:
        model, read: as for `forward`.

    Yields:
        The hook points that have fired so far.

    Raises:
        InputError: a hook point that the model does not have.
    """
    parts = components(model) if read else []
    points = hook_points(model, parts) if read else {}
    seen = set[str]()
    with turn(model), undone(Attached()) as at:
        show_scans(at, parts, read)
        for name, call in read.items():

            def note(x: Tensor, name: str = name, call: Callable[[Tensor], None] = call) -> None:
                seen.add(name)
                call(x)

            read_at(at, points, name, note)
        yield seen


def _stop(_: Tensor) -> None:
    raise _Stop


def _keep_blocks(
    at: Attached, parts: NamedModules, record: dict[int, Any] | None, replay: Mapping[int, Any]
) -> None:
    for path, block in parts:
        layer = layer_of(path + ".")
        if not isinstance(block, BlockBridge) or layer is None:
            continue
        if record is not None:
            at.hook(block, lambda _, args, out, layer=layer: record.__setitem__(layer, out))
        if layer in replay:
            at.attribute(block, "forward", partial(_give, replay[layer]))


def _give(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _replace_embedded(
    at: Attached,
    parts: NamedModules,
    tokens: Tensor,
    embed: Callable[[nn.Module, Tensor], Tensor | None],
) -> list[Tensor]:
    """Returns a list that is not empty once embeddings were replaced."""
    replaced: list[Tensor] = []

    def replace(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        if replaced or out.ndim != 3 or out.shape[:2] != tokens.shape:
            return None
        replaced.extend(x for x in [embed(module, out)] if x is not None)
        return replaced[0] if replaced else None

    for module, position in embeddings(parts):
        if not position:
            at.hook(module, replace)
    return replaced
