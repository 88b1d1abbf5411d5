"""Weights that are spread over processes: FSDP2's are gathered where they are used, others refused.

``torch.distributed.fsdp.fully_shard`` gathers a block's weights for its forward pass and once more
for its backward pass, so that every process computes the whole model on an input of its own. Under
tensor parallelism a process holds, and a hook shows, a part of each activation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import distributed, nn

from lenslrp.errors import InputError


def _loaded(module: str, name: str) -> Any:
    """A class of torch's, an empty tuple where nothing has loaded its module: nothing is one."""
    return getattr(sys.modules.get(module), name, ())


def _alone() -> bool:
    """Whether there is no other process that could hold a part of a model."""
    return not (distributed.is_available() and distributed.is_initialized())


def is_sharded(tensor: Any) -> bool:
    """Whether a process holds a part of a tensor only."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def is_gathering(function: Any) -> bool:
    """Whether an autograd function is FSDP2's: it hands gradients on and lets go of weights."""
    groups = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
    return function is _loaded(groups, "RegisterPostBackwardFunction")


def gather(model: nn.Module, names: Iterable[str]) -> None:
    """Have FSDP2 gather the weights around hook points at which a backward pass will start.

    It does so by itself where gradients come to what a module returns.
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    points: dict[str, Any] = model.hook_dict if kind else {}  # type: ignore[assignment]
    starts = {points[name] for name in names if name in points}
    for module in _modules(model) if starts else ():
        if isinstance(module, kind) and not starts.isdisjoint(module.modules()):
            module.unshard()


def reshard(model: nn.Module) -> None:
    """Have FSDP2 let go of what it has gathered: flags are set on the weights that it gathers.

    It keeps the outermost module's after a forward pass, and gives them the flags of the others
    when it gathers them, not while it keeps them.
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    for module in _modules(model) if kind and not _alone() else ():
        if isinstance(module, kind):
            module.reshard()


def _modules(model: nn.Module) -> Iterator[Any]:
    """The modules of the bridge and of the model that it wraps, which is not among its children."""
    yield from model.modules()
    inner = getattr(model, "original_model", None)
    if isinstance(inner, nn.Module):
        yield from inner.modules()


def require_whole(model: nn.Module) -> None:
    """Refuse weights that are split over processes and not gathered where they are used.

    Raises:
        InputError: naming the weight.
    """
    if _alone():
        return
    weights = {n.replace("_original_component.", ""): p for n, p in model.named_parameters()}
    fsdp = "torch.distributed.fsdp"
    old, new = _loaded(fsdp, "FullyShardedDataParallel"), _loaded(fsdp, "FSDPModule")
    if old and any(isinstance(module, old) for module in _modules(model)):
        raise InputError(
            "the model, or a part of it, is in torch's FullyShardedDataParallel, which keeps its "
            "weights as pieces of one tensor: use torch.distributed.fsdp.fully_shard"
        )
    split = {name: weight for name, weight in weights.items() if is_sharded(weight)}
    if not split:
        return
    blocks = [module for module in _modules(model) if isinstance(module, new)]
    gathered = {id(weight) for block in blocks for weight in block.parameters()}
    for name, weight in split.items():
        *over, last = weight.placements  # type: ignore[attr-defined]
        if id(weight) not in gathered or not last.is_shard() or any(p.is_shard() for p in over):
            raise InputError(
                f"{name} is split over processes ({', '.join(map(str, weight.placements))}), as by "  # type: ignore[attr-defined]
                "tensor parallelism (tp_plan): a hook would show each process a part of an "
                "activation, and the ledger would miss the others. Load the model whole and call "
                "torch.distributed.fsdp.fully_shard on its blocks, or spread its layers over "
                "devices (n_devices)"
            )
