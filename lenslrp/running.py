"""What every pass of a model is made of, for whatever purpose: the call, and what watches it.

Weights are frozen, tensors are read or kept at hook points, blocks are recomputed, relevance is
measured as it goes by, and all that was attached is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from lenslrp import media
from lenslrp.batch import PAIRED, Batch
from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks.components import UnembeddingBridge
from lenslrp.hooks.experts import ExpertPoint
from lenslrp.hooks.handles import Attached, raise_failed, undo_all
from lenslrp.hooks.readers import converted, hidden_states_of, is_total, listen, select_names
from lenslrp.hooks.sites import Accounts, row_sums
from lenslrp.hooks.structure import NamedModules, blocks, position_axis
from lenslrp.hooks.turns import turn
from lenslrp.leaves import Leaves

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

UNCAPPED = "unembed"
"""Where logits are kept before a final soft-cap, beside the hook points that are captured."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside, so that none is kept for it."""
    with turn(model):
        thawed = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            for weight in thawed:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in thawed:
                weight.requires_grad_(True)


def run_model(
    model: TransformerBridge, batch: Batch, leaves: Leaves | None, inputs: Mapping[str, Tensor]
) -> Tensor:
    """The logits of a batch; where there are ``leaves``, given embeddings become some of them.

    Raises:
        CoverageError: no token embedding that is known has run.
    """
    if media.reads_no_text(model):
        first = {name: x for name, x in inputs.items() if name == "input_features"}
        rest = {name: x for name, x in inputs.items() if name not in first}
        cached = {} if batch.decoder is None else {"use_cache": False}
        only: Tensor = model(
            *(first.values() or (None,)), return_type="logits", **cached, **batch.kwargs, **rest
        )
        return only
    # A key-value cache is of no use here, and a checkpointed block would fill it twice.
    kwargs = {"use_cache": False, **batch.kwargs, **inputs}
    if "inputs_embeds" in kwargs:
        leaf = kwargs.pop("inputs_embeds")
        if leaves is not None:
            leaf = leaf.detach().clone().requires_grad_()
            leaves.tokens.append(leaf)
        logits: Tensor = model(leaf, return_type="logits", **kwargs)
        return logits
    logits = model(batch.tokens, return_type="logits", **kwargs)
    if leaves is not None and not leaves.tokens:
        raise CoverageError(
            f"{architecture(model)}: no known token embedding ran in the forward pass, so there "
            "are no leaves to give relevance to"
        )
    return logits


@contextmanager
def undone(at: Attached) -> Iterator[Attached]:
    """What ``at`` has attached is undone at the end, also after an interrupt."""
    try:
        try:
            yield at
        finally:
            raise_failed(undo_all(at.undo))
    finally:
        undo_all(at.undo)


def read_at(
    at: Attached, points: Mapping[str, nn.Module], name: str, call: Callable[[Tensor], None]
) -> None:
    """Call ``call`` with the activations at a hook point as they pass."""
    if name not in points:
        refuse(points, name)

    def hook(point: nn.Module, _: Any, x: Tensor) -> None:
        call(converted(point, x))

    listen(at, points[name], [name], hook)


def positions_second(model: TransformerBridge, name: str, x: Tensor) -> Tensor:
    """The tensor at a hook point, [batch, pos, ...], where its positions stand behind heads."""
    return x.movedim(axis, 1) if (axis := axes_behind(model.hook_dict, [name]).get(name)) else x


def axes_behind(points: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    """The axis of positions at each of some hook points where it is behind the second."""
    axes = {name: position_axis(points.get(name)) for name in names if not name.endswith(PAIRED)}
    return {name: axis for name, axis in axes.items() if axis != 1}


def refuse(points: Mapping[str, nn.Module], name: str) -> NoReturn:
    """Say of a name that is no hook point what would be one.

    Raises:
        InputError: with the nearest names.
    """
    in_blocks, _ = select_names(points, name)
    raise InputError(f"{name} is in every block; name one: {', '.join(in_blocks[:3])}")


def capture(
    at: Attached,
    points: Mapping[str, nn.Module],
    owned: Mapping[int, nn.Module],
    hooks: list[str],
    captured: dict[str, Tensor],
) -> None:
    """Keep the tensors, on the graph, at hook points; ``owned`` as from `owners`."""
    for name in hooks:
        if name not in points:
            refuse(points, name)
        point = points[name]

        def keep(point: Any, x: Any, name: str = name) -> None:
            if not isinstance(x, Tensor):
                raise InputError(f"{name} holds a {type(x).__name__} and no activations")
            x = converted(point, x)
            before = captured.get(name)
            if before is None:
                captured[name] = x
            elif before.shape != x.shape:
                raise InputError(
                    f"{name} fires for two sequences, of {before.shape[1]} and {x.shape[1]} "
                    "positions, in one pass; explain a hook point that fires for one"
                )
            else:
                captured[name] = before + x if isinstance(point, ExpertPoint) else x

        def before_it(
            _: nn.Module, args: Any, kwargs: Any, keep: Any = keep, point: Any = point
        ) -> None:
            keep(point, hidden_states_of(args, kwargs))

        def at_it(point: nn.Module, args: Any, x: Any, keep: Any = keep) -> None:
            keep(point, x)

        owner = owned.get(id(point)) if is_total(name) else None
        if owner is not None:  # the residual stream itself, as the readers see it
            at.first_pre_hook(owner, before_it, with_kwargs=True)
        else:
            listen(at, point, [name], at_it)


def keep_uncapped(
    at: Attached, model: TransformerBridge, parts: NamedModules, captured: dict[str, Tensor]
) -> None:
    """Keep what the unembedding returns, where a soft-cap makes the logits of it."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    for _, module in parts if cap and float(cap) > 0 else ():
        if isinstance(module, UnembeddingBridge):

            def unembedded(_: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
                captured[UNCAPPED] = x

            at.hook(module, unembedded)


def watch_blocks(at: Attached, blocks: Mapping[int, Any], accounts: Accounts) -> int:
    """Account for the relevance that enters and leaves every block; returns how many there are."""
    passing = accounts.flows.__setitem__
    for layer, module in blocks.items():
        for side, point in (("in", module.hook_in), ("out", module.hook_out)):

            def watch(
                _: nn.Module, args: tuple[Any, ...], x: Tensor, key: tuple[int, str] = (layer, side)
            ) -> None:
                if x.requires_grad:
                    kept = x.detach()
                    x.register_hook(lambda g: passing(key, row_sums(kept, g, masked=False)))

            at.hook(point, watch)
    return max(blocks, default=-1) + 1


@contextmanager
def measuring(roots: list[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Relevance of each row at the roots, [batch], once the backward pass has passed them.

    Measured as the gradient goes by: that of all logits is as large as they are, and is not kept.
    """
    at_roots: dict[int, Tensor] = {}

    def measure(root: Tensor) -> Any:
        key, kept = id(root), root.detach()
        return root.register_hook(lambda g: at_roots.__setitem__(key, row_sums(kept, g)))

    handles = [measure(root) for root in roots]
    try:
        yield at_roots
    finally:
        for handle in handles:
            handle.remove()


def checkpoint_blocks(at: Attached, model: TransformerBridge, parts: NamedModules) -> None:
    """Recompute each block in the backward pass (non-reentrant; identical relevance).

    Heads that take no ``use_cache`` have their base model fill a cache, which would happen twice.
    """
    for module in model.original_model.modules():
        if getattr(config := getattr(module, "config", None), "use_cache", False):
            at.setting(config, "use_cache", False)
    for block in blocks(parts):
        at.attribute(block, "forward", partial(checkpointed, block.forward, use_reentrant=False))


def architecture(model: TransformerBridge) -> str:
    """The Hugging Face class name of what a bridge wraps."""
    return type(getattr(model, "original_model", model)).__name__
