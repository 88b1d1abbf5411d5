"""What one of two processes does that share a model; run by ``test_sharding.py``.

``python -m tests.unit.two_processes STORE RANK OUT``: the file at which the processes meet, the
number of this one, and where its findings go, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lenslrp
from lenslrp import targets
from lenslrp.hooks import Gamma
from tests.unit.tiny import FAMILIES, TOKENS, changes, snapshot, tiny

PLAN = {"gate_proj": ColwiseParallel, "up_proj": ColwiseParallel, "down_proj": RowwiseParallel}


def sharded(family: str, mesh: DeviceMesh, *, inner: bool = False, keep: bool = False) -> Any:
    """A bridge under FSDP2; ``inner``: what it wraps, ``keep``: gathered until backward."""
    model = tiny(family)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model.original_model if inner else model, mesh=mesh)
    return model


def compared(model: Any, whole: Any, tokens: Any, target: Any, options: Any) -> dict[str, Any]:
    """How far apart are the relevance of a sharded model and that of a whole one, and the rest."""
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    before = snapshot(model)
    expected, cache = lenslrp.run_with_relevance(whole, tokens, target, **options)
    logits, found = lenslrp.run_with_relevance(model, tokens, target, **options)
    assert cache.keys() == found.keys()
    # FSDP has other tensors in the places of weights that it has gathered and of those it has not.
    swapped = (": frozen", ": version")
    return {
        "logits": bool(torch.equal(logits, expected)),
        "tokens": float((found.tokens - cache.tokens).abs().max()),
        "size": float(cache.tokens.abs().max()),
        "hooks": max(float((found[name] - cache[name]).abs().max()) for name in cache),
        "error": abs(found.ledger().error),
        "flags": flags == {name: weight.requires_grad for name, weight in model.named_parameters()},
        "changes": [change for change in changes(before, model) if not change.endswith(swapped)],
    }


def trains(model: nn.Module, whole: nn.Module, tokens: Any) -> float:
    """How far apart the gradients of the first norm are after a plain pass, summed over inputs."""
    found = []
    for each in (model, whole):
        each(tokens).square().sum().backward()
        weight = next(w for n, w in each.named_parameters() if w.ndim == 1 and w.grad is not None)
        grad: Any = weight.grad
        if hasattr(grad, "full_tensor"):  # the mean over processes
            grad = grad.full_tensor() * 2
        else:
            dist.all_reduce(grad)
        found.append(grad)
        each.zero_grad(set_to_none=True)
    return float((found[0] - found[1]).abs().max())


def refusal(model: Any, **options: Any) -> str:
    """What is said of a model that cannot be explained."""
    try:
        lenslrp.run_with_relevance(model, TOKENS, 5, **options)
    except lenslrp.InputError as error:
        return str(error)
    return ""


def split(mesh: DeviceMesh, model: nn.Module) -> nn.Module:
    """Tensor parallelism of the MLPs, as a plan of transformers' does it."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = {n: style() for n in layers for part, style in PLAN.items() if part in n}
    return parallelize_module(model, mesh, plan)


def findings(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    tokens = TOKENS[:, : 6 - rank]  # each process has an input of its own
    found: dict[str, Any] = {}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "logit": (5, {}),
        "fused": (5, {"attention": "fused"}),
        "checkpoint": (5, {"checkpoint": True}),
        "plain": (5, {"composite": lenslrp.GradientTimesInput()}),
        "latent": (targets.Activation("blocks.1.mlp.hook_post", 3), {}),
        "latent below": (targets.Activation("blocks.0.attn.hook_z", (1, 3)), {}),
    }
    shapes = {"llama": {}, "gemma2": {"keep": True}, "neox": {"inner": True}}
    for family, shape in shapes.items():
        model, whole = sharded(family, mesh, **shape), tiny(family)
        for name, (target, options) in cases.items():
            if family == "llama" or name in ("logit", "latent"):
                found[f"{family}, {name}"] = compared(model, whole, tokens, target, options)
        found[f"trains: {family}"] = trains(model, whole, tokens)
    several = [lenslrp.relevance_for_targets(m, tokens, [3, 5, 7]) for m in (model, whole)]
    found["targets"] = max(
        float((a.tokens - b.tokens).abs().max()) for a, b in zip(*several, strict=True)
    )
    gamma = {"linear": Gamma(0.2), "projection": Gamma(0.2)}
    found["refused: gamma"] = refusal(sharded("llama", mesh), composite=gamma)
    model = tiny("llama")
    split(mesh, model.original_model)
    found["refused: tensor parallel"] = refusal(model)
    for name, place in {"shard": Shard(0), "replica": Replicate()}.items():
        model = tiny("llama")
        head = model.unembed.original_component
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [place]))
        found[f"refused: {name}"] = refusal(model)
    try:
        lenslrp.load(split(mesh, FAMILIES["llama"]()))  # type: ignore[arg-type]
    except lenslrp.LoadError as error:
        found["refused: load"] = str(error)
    return found


def main(store: str, rank: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = findings(rank, init_device_mesh("cpu", (2,)))
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # neither closes its connections on the other
    os._exit(
        0
    )  # gloo's threads that are still at work as Python ends abort the process now and then


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
