"""Tiny bridges with a program's parts in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

import lenslrp
from lenslrp.hooks import Identity, Normalisation, Operations, Plain
from tests.oracles.explicit_hosts import Host
from tests.property.interpreter import make_unit, run_code
from tests.property.interpreter import modules as code_modules
from tests.property.operations import Env
from tests.property.program import SIZES, UNIFORM, Part, Program

VOCABULARY = 17

PATHS = {
    "llama": {
        "block": "model.layers.{}",
        "act": "model.layers.{}.mlp.act_fn",
        "ln1": "model.layers.{}.input_layernorm",
        "ln2": "model.layers.{}.post_attention_layernorm",
        "ln_final": "model.norm",
        "mlp": "model.layers.{}.mlp",
        "attn": "model.layers.{}.self_attn",
        "q": "model.layers.{}.self_attn.q_proj",
        "k": "model.layers.{}.self_attn.k_proj",
        "v": "model.layers.{}.self_attn.v_proj",
        "o": "model.layers.{}.self_attn.o_proj",
        "gate": "model.layers.{}.mlp.gate_proj",
        "up": "model.layers.{}.mlp.up_proj",
        "down": "model.layers.{}.mlp.down_proj",
    },
    "gpt2": {
        "block": "transformer.h.{}",
        "act": "transformer.h.{}.mlp.act",
        "mlp": "transformer.h.{}.mlp",
        "o": "transformer.h.{}.attn.c_proj",
        "up": "transformer.h.{}.mlp.c_fc",
        "down": "transformer.h.{}.mlp.c_proj",
    },
    "vit": {
        "block": "vit.layers.{}",
        "act": "vit.layers.{}.mlp.activation_fn",
        "ln1": "vit.layers.{}.layernorm_before",
        "ln2": "vit.layers.{}.layernorm_after",
        "ln_final": "vit.layernorm",
        "mlp": "vit.layers.{}.mlp",
        "attn": "vit.layers.{}.attention",
        "q": "vit.layers.{}.attention.q_proj",
        "k": "vit.layers.{}.attention.k_proj",
        "v": "vit.layers.{}.attention.v_proj",
        "o": "vit.layers.{}.attention.o_proj",
        "up": "vit.layers.{}.mlp.fc1",
        "down": "vit.layers.{}.mlp.fc2",
    },
}
"""Where Hugging Face keeps the modules that a part may replace or hook."""

BASES: dict[str, type] = {
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "LlamaRMSNorm": LlamaRMSNorm,
    "LlamaMLP": LlamaMLP,
    "ViTMLP": ViTMLP,
    "LlamaAttention": LlamaAttention,
    "ViTAttention": ViTAttention,
}

RULES: dict[str, Callable[[], Any]] = {
    "identity": Identity,
    "norm": Normalisation,
    "norm centred": lambda: Normalisation(centred=True),
    "operations": Operations,
    "operations gated": lambda: Operations(gated=True),
    "plain": Plain,
}


OWNED = frozenset(
    {"act", "q", "k", "v", "o", "gate", "up", "down", "mlp.hook_out", "attn.hook_out",
     "mlp.out.hook_in", "mlp.in.hook_out", "mlp.gate.hook_out", "ln1.hook_out", "ln2.hook_out"}
)  # fmt: skip
"""Places where the value that passes is nobody else's: a hook may write into it."""

BACKWARD: dict[str, Any] = {
    "looks": lambda module, inputs, outputs: None,
    "doubles": lambda module, inputs, outputs: tuple(g if g is None else 2 * g for g in inputs),
    "flips": lambda module, inputs, outputs: tuple(g if g is None else g.flip(-1) for g in inputs),
}
"""What a backward hook does to the gradient at a module's inputs."""


def _llama() -> Any:
    width, inner, _ = SIZES["llama"]
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def _gpt2() -> Any:
    width, inner, _ = SIZES["gpt2"]
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=width, n_layer=2, n_head=2, n_positions=16, n_inner=inner
        )
    )


def _vit() -> Any:
    width, inner, _ = SIZES["vit"]
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=inner,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=VOCABULARY,
        )
    )


BUILD = {"llama": _llama, "gpt2": _gpt2, "vit": _vit}


@cache
def template(kind: str, seed: int, dtype: torch.dtype) -> tuple[Any, Host]:
    """A Hugging Face model with weights of a unit's order, to be copied; and its weights."""
    generator = torch.Generator().manual_seed(seed)
    model = BUILD[kind]().eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 1 + 0.2 * noise
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.data = 0.8 * noise
        else:
            parameter.data = 1.4 * noise / parameter.shape[-1] ** 0.5
    model.to(dtype)
    model.set_attn_implementation("eager")
    return model, Host.copy_from(kind, model)


@cache
def given(kind: str, seed: int, batch: int = 1) -> Tensor:
    """Token ids, or pixels in float64 for a ViT."""
    generator = torch.Generator().manual_seed(seed + 100)
    if kind == "vit":
        return torch.randn(batch, 1, 4, 4, generator=generator, dtype=torch.float64)
    return torch.randint(0, VOCABULARY, (batch, SIZES[kind][2]), generator=generator)


@dataclass
class Ready:
    """A bridge to run, and the composite that the user gives."""

    bridge: Any
    composite: lenslrp.Composite
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]


@cache
def plain_bridge(kind: str, seed: int, dtype: torch.dtype) -> tuple[Any, dict[str, nn.Module]]:
    """A bridge for programs that only hook it, and its modules as Hugging Face names them."""
    model = copy.deepcopy(template(kind, seed, dtype)[0])
    modules = dict(model.named_modules(remove_duplicate=False))
    return lenslrp.load(model), modules


@contextmanager
def prepared(program: Program, *, fresh: bool = False) -> Iterator[Ready]:
    """The bridge with the program's parts, for the length of the block.

    A bridge takes long to build. Unless a ``fresh`` one is asked for, or a module is replaced that
    the bridge has a component for, one that was used before is used again.
    """
    dtype = getattr(torch, program.dtype)
    shares = {"recurrence": "uniform"} if UNIFORM in program.options else {}
    composite = getattr(lenslrp, program.composite)(**shares)
    replaced = [part for part in program.parts if part.kind == "module"]
    undo: list[Callable[[], None]] = []
    if fresh or any(part.place != "act" for part in replaced):
        model = copy.deepcopy(template(program.host, program.weights, dtype)[0])
        modules = dict(model.named_modules(remove_duplicate=False))
        units = [_replace(modules, program.host, part, dtype, undo) for part in replaced]
        bridge = lenslrp.load(model)
    else:
        bridge, named = plain_bridge(program.host, program.weights, dtype)
        modules = dict(named)
        units = [_replace(modules, program.host, part, dtype, undo) for part in replaced]
    for part, unit in zip(replaced, units, strict=True):
        if part.declared:
            composite = composite.extended({type(unit): RULES[part.declared]()})
    handles: list[Any] = []
    kept: dict[str, Tensor] = {}
    for part in program.parts:
        if part.kind != "module":
            handles += _hook(program.host, part, bridge, modules, dtype, kept)
    seen = given(program.host, program.weights, program.batch)
    try:
        if program.host == "vit":
            yield Ready(bridge, composite, (None,), {"pixel_values": seen.to(dtype)})
        else:
            yield Ready(bridge, composite, (seen,), {})
    finally:
        bridge.reset_hooks()
        for handle in handles:
            handle.remove()
        for restore in undo:
            restore()


def plain_forward(ready: Ready) -> Tensor:
    """Logits of the bridge without any rule."""
    if ready.keywords:
        out: Tensor = ready.bridge(None, return_type="logits", **ready.keywords)
        return out
    logits: Tensor = ready.bridge(*ready.inputs, return_type="logits", use_cache=False)
    return logits


def _replace(
    modules: dict[str, nn.Module],
    host: str,
    part: Part,
    dtype: torch.dtype,
    undo: list[Callable[[], None]],
) -> nn.Module:
    """Put a part's module into a model, whose modules by name are brought up to date."""
    paths = [PATHS[host][part.place].format(layer) for layer in part.layers]
    unit = make_unit(part, dtype, BASES, modules[paths[0]])
    for path in paths:
        parent, _, name = path.rpartition(".")
        undo.append(partial(setattr, modules[parent], name, modules[path]))
        setattr(modules[parent], name, unit)
        modules[path] = unit
        modules.update({f"{path}.{inner}": m for inner, m in unit.named_modules() if inner})
    return unit


def _hook(
    host: str,
    part: Part,
    bridge: Any,
    modules: dict[str, nn.Module],
    dtype: torch.dtype,
    kept: dict[str, Tensor],
) -> list[Any]:
    handles: list[Any] = []
    made: dict[str, nn.Module] = {}
    env = Env(dtype, made)
    if part.kind != "backward":
        made.update(code_modules(part.code, env, part.width))
    for module in made.values():
        module.requires_grad_(False).eval()
    if part.other:
        bridge.add_hook(part.other, lambda x, hook: kept.__setitem__(part.other, x))

    def run(x: Tensor) -> Tensor:
        inputs = [x, kept[part.other]] if part.other else [x]
        return run_code(part.code, env, inputs, "run", owns=part.place in OWNED)

    for layer in part.layers:
        if part.kind == "edit":
            whole = part.place.startswith(("ln_final", "embed"))
            name = part.place if whole else f"blocks.{layer}.{part.place}"
            bridge.add_hook(name, lambda x, hook: run(x))
            continue
        module = modules[PATHS[host][part.place].format(layer)]
        if part.kind == "backward":
            handles.append(module.register_full_backward_hook(BACKWARD[part.code[-1].args[0]]))
        elif part.kind == "after":
            handles.append(module.register_forward_hook(lambda _, args, y: _on_first(run, y)))
        else:
            handles.append(
                module.register_forward_pre_hook(lambda _, args: (run(args[0]), *args[1:]))
            )
    return handles


def _on_first(run: Callable[[Tensor], Tensor], y: Any) -> Any:
    """An attention returns its pattern as well."""
    return (run(y[0]), *y[1:]) if isinstance(y, tuple) else run(y)
