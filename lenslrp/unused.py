"""Hook points that fire and whose tensor nobody uses: neither read nor edited.

TransformerLens shows some tensors and goes on with others: under ``use_split_qkv_input`` attention
reads copies of its own, scores and patterns of attention that Hugging Face computes are shown after
the fact, a rotary embedding is given hidden states for their type alone. A gradient never comes to
such a tensor and an edit of it is lost, which looks like a relevance of 0 and like a unit without
effect.

One short pass tells, once a model and setting: every hook point's tensor gets a node of its own in
the autograd graph, and those that the output does not lead to are unused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lenslrp import media
from lenslrp.batch import PAIRED, Batch
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.composites import Composite, GradientTimesInput
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.install import relevance_rules
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.sites import has_values
from lenslrp.hooks.state import users_hooks
from lenslrp.hooks.structure import components, unchanged
from lenslrp.hooks.turns import in_force
from lenslrp.inputs import decoder_reads_the_text, is_encoder_decoder
from lenslrp.leaves import Leaves, cut_inputs
from lenslrp.running import frozen, run_model, undone

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.cache import RelevanceCache

SHORT = 2
"""How many tokens the pass has."""

INPUTS: Mapping[str, str] = {
    "use_split_qkv_input": "hook_q_input, {0}.hook_k_input and {0}.hook_v_input",
    "use_attn_in": "hook_attn_in",
}
"""Setting of the bridge -> what attention reads instead, block by block."""

PLAIN = frozenset(
    {
        "attention_mask",
        "position_ids",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
    }
)
"""What a forward pass is given for text."""

ADDITIONS = ("use_hook_mlp_in", "use_attn_result")
BEFORE_ATTENTION = re.compile(r"(\w*blocks\.\d+)\.(ln1|attn|self_attn)\.")

_known: WeakKeyDictionary[nn.Module, dict[Any, frozenset[str]]] = WeakKeyDictionary()


def unused(
    model: TransformerBridge,
    prepared: Batch | None = None,
    *,
    live: bool,
    modules: Mapping[type, Any] | None = None,
) -> frozenset[str]:
    """Names of hook points that fire in vain.

    Args:
        model: a ``TransformerBridge``.
        prepared: an input that the model takes; a made-up one if not given.
        live: with relevance rules, under which delegated attention is live; none of their cuts.
        modules: what a composite says of module classes, which may be all that makes them run.
    """
    settings = tuple(bool(getattr(model.cfg, name, False)) for name in (*INPUTS, *ADDITIONS))
    config = getattr(getattr(model, "original_model", None), "config", None)
    rules = GradientTimesInput().extended(modules or {}) if live else None
    key = (live, settings, getattr(config, "_attn_implementation", None), tuple(modules or ()))
    by_setting = _known.setdefault(model, {})
    if key not in by_setting:
        if prepared is None:
            seen = _any_input(model)
        else:  # hooks of a user's own may fit this one shape
            whole = next(_foreign(model), None) or decoder_reads_the_text(model.original_model)
            seen = prepared if whole else _short(prepared)
        by_setting[key] = _look(model, seen, rules, quiet=prepared is None)
    return by_setting[key]


def why_unused(model: TransformerBridge, name: str) -> str:
    """What to say of such a hook point, and where to go instead."""
    block = BEFORE_ATTENTION.match(name)
    setting = next((flag for flag in INPUTS if getattr(model.cfg, flag, False)), None)
    if setting and block and not name.endswith(PAIRED):
        return (
            f"nothing uses the tensor at {name} while {setting} is on: attention reads "
            f"{block[1]}.{INPUTS[setting].format(block[1])}. Go there, or call "
            f"model.set_{setting}(False)"
        )
    if name.endswith(PAIRED):
        return (
            f"Hugging Face computes the attention of {name}, and TransformerLens shows it after "
            f"the fact: a change there is lost, except under relevance rules. Change "
            f"{name.rpartition('.')[0]}.o.hook_in, or run it inside lenslrp.relevance_rules"
        )
    return f"{name} fires in this model, and nothing uses its tensor"


def require_used(model: TransformerBridge, names: Collection[str]) -> set[str]:
    """Refuse edits that would be lost.

    Returns those at attention that is live under relevance rules only: fit there and nowhere else.

    Raises:
        InputError: naming the setting or the hook point that is used instead.
    """
    if any(weight.is_inference() for weight in model.parameters()):
        return set()  # no graph can be had of them
    ruled = in_force(model)
    vain = unused(model, live=ruled) if names else ()
    lost = [name for name in names if name in vain]
    for name in lost:
        if ruled or not name.endswith(PAIRED):
            raise InputError(why_unused(model, name))
    return set(lost)


def withdraw(
    model: TransformerBridge, caches: list[RelevanceCache], lost: set[str], named: bool
) -> None:
    """Take back zeros that are none: no gradient came, because nothing uses the tensor.

    Raises:
        InputError: those hook points were named by the caller.
    """
    if lost and named:
        raise InputError(f"no relevance can be read: {why_unused(model, min(lost))}")
    for cache in caches:
        for name in sorted(lost):
            del cache.values[name]
        cache.coverage.off_path.extend(sorted(lost))


def _any_input(model: TransformerBridge) -> Batch:
    if media.reads_no_text(model):
        return media.prepare_media(model, None, media.example(model))
    config = getattr(model.original_model, "config", None)
    ends = (getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos"))
    words = sorted(set(range(int(model.cfg.d_vocab))[: SHORT + 3]) - set(ends))  # padding is masked
    tokens = torch.tensor([words[:SHORT]], device=next(model.parameters()).device)
    return media.prepare_batch(
        model, tokens, {}, decoder_input=tokens if is_encoder_decoder(model) else None
    )


def _short(prepared: Batch) -> Batch:
    """The first tokens of the first row, where an input is nothing but tokens."""
    if prepared.media or not set(prepared.kwargs) <= PLAIN:
        return prepared
    decoder = prepared.decoder and _first(prepared.decoder)
    kwargs = {"decoder_input_ids": decoder.tokens} if decoder else {}
    return replace(_first(prepared), kwargs=kwargs, decoder=decoder)


def _first(prepared: Batch) -> Batch:
    tokens = prepared.tokens[0][prepared.mask[0]][None, :SHORT]
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), [tokens.shape[1]])


def _foreign(model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """Hooks that a user has put on modules themselves: where each is kept, and its key."""
    for module in model.modules():
        if not isinstance(module, HookPoint):
            yield from users_hooks(module)


def _look(
    model: TransformerBridge, prepared: Batch, rules: Composite | None, *, quiet: bool
) -> frozenset[str]:
    if not has_values(prepared.tokens):
        return frozenset()
    points = hook_points(model, components(model))
    names: dict[int, list[str]] = {}
    for name, point in points.items():
        names.setdefault(id(point), []).append(name)
    seen: dict[int, list[Any]] = {}

    def mark(point: nn.Module, _: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor) or not out.is_floating_point() or not out.requires_grad:
            return None
        marked = out.clone()
        seen.setdefault(id(point), []).append(marked.grad_fn)
        return marked

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if rules is not None:
            stack.enter_context(relevance_rules(model, rules, strict=False))
        stack.enter_context(_silenced(points.values()))
        if quiet:
            stack.enter_context(_without(list(_foreign(model))))
        stack.enter_context(frozen(model))
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.enable_grad())
        at = stack.enter_context(undone(Attached()))
        parts, leaves = components(model), Leaves()
        inputs = cut_inputs(at, parts, embeddings(parts), leaves, prepared, [])
        for point in {id(point): point for point in points.values()}.values():
            at.hook(point, mark)
        used = _above(run_model(model, prepared, leaves, inputs).grad_fn)
    lost = {key for key, nodes in seen.items() if not any(id(node) in used for node in nodes)}
    if len(lost) == len(seen):  # the pass left no graph: nothing can be told
        return frozenset()
    return frozenset(name for key in lost for name in names[key])


def _above(node: Any) -> dict[int, Any]:
    """Every node that an output was made through."""
    reached: dict[int, Any] = {}
    stack = [node]
    while stack:
        node = stack.pop()
        if node is not None and id(node) not in reached:
            reached[id(node)] = node
            stack.extend(below for below, _ in node.next_functions)
    return reached


@contextmanager
def _without(hooks: list[tuple[dict[int, Any], int]]) -> Iterator[None]:
    kept = [(table, dict(table)) for table in {id(table): table for table, _ in hooks}.values()]
    for table, key in hooks:
        del table[key]
    try:
        yield
    finally:
        for table, before in kept:
            table.clear()
            table.update(before)


@contextmanager
def _silenced(points: Iterable[nn.Module]) -> Iterator[None]:
    """Without the hooks that users have put on hook points: this pass is none of theirs."""
    kept: list[tuple[Any, dict[str, Any]]] = []
    for point in points:
        if not isinstance(point, HookPoint) or not (point.fwd_hooks or point.bwd_hooks):
            continue
        state: dict[str, Any] = {k: getattr(point, k) for k in ("fwd_hooks", "bwd_hooks")}
        state |= {k: dict(getattr(point, k)) for k in ("_forward_hooks", "_backward_hooks")}
        kept.append((point, state))
        for handle in (*point.fwd_hooks, *point.bwd_hooks):
            point._forward_hooks.pop(handle.hook.id, None)
            point._backward_hooks.pop(handle.hook.id, None)
        point.fwd_hooks, point.bwd_hooks = [], []
    try:
        yield
    finally:
        for point, state in kept:
            point.fwd_hooks, point.bwd_hooks = state["fwd_hooks"], state["bwd_hooks"]
            for key in ("_forward_hooks", "_backward_hooks"):
                table = getattr(point, key)
                table.clear()
                table.update(state[key])
