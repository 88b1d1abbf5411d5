"""Random programs: a seed gives one, always the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tests.property.operations import ACTIVATIONS, ATTENTIONS
from tests.property.program import SIZES, UNIFORM, Node, Part, Program
from tests.property.writer import ELEMENTWISE, FLAVOURS, SCANNING, Writer


def _chain(rng: random.Random, width: int, weights: dict[str, float], inputs: int = 1) -> Any:
    writer = Writer(rng, width, inputs)
    end = writer.grow(0, rng.randint(1, 5), weights)
    if inputs == 2:
        end = writer.fit(end, width)
        op, style = rng.choice([("add", "+"), ("add", "sub"), ("product", "*"), ("where", "mask")])
        end = writer.add(op, (end, 1), style)
        end = writer.grow(end, rng.randint(0, 1), weights)
    return writer.done(writer.fit(end, width))


TREACHEROUS = (
    "MyRMSNorm", "RMSNorm", "LlamaRMSNorm", "T5LayerNorm", "OlmoLayerNorm", "LayerNorm", "FancyNorm"
)  # fmt: skip


def _norm_code(rng: random.Random, width: int, weights: dict[str, float]) -> tuple[Node, ...]:
    """A norm and what may be wrong with it: linear layers around it, a gain from the input."""
    writer = Writer(rng, width)
    at = writer.linear(0, width) if rng.random() < 0.1 else 0
    if rng.random() < 0.2:
        at = writer.grow(at, 1, weights)
    at = writer.fit(at, width)
    if rng.random() < 0.3:
        at = writer.add("norm", (at,), rng.choice(["layer", "rms"]))
    else:
        over = rng.choice(["features"] * 6 + ["tokens", "all", "l1", "max"])
        at = writer.add("raw_norm", (at,), int(rng.random() < 0.3), over, rng.choice([0, 1, 1]))
    if rng.random() < 0.15:
        gain = writer.linear(0, width)
        at = writer.add("product", (at, gain), "*")
    if rng.random() < 0.15:
        at = writer.linear(at, width)
    if rng.random() < 0.15:
        at = writer.grow(at, 1, weights)
    at = writer.fit(at, width)
    if rng.random() < 0.35:
        at = writer.add("shift", (at,), "feature", "+")
    return writer.done(at)


def _mlp_code(rng: random.Random, host: str, weights: dict[str, float]) -> tuple[Node, ...]:
    """A gated or plain MLP from named layers, with random operations between."""
    width, inner, _ = SIZES[host]
    writer = Writer(rng, width)

    def some(i: int, size: int, often: float = 0.3) -> int:
        return writer.fit(writer.grow(i, 1, weights), size) if rng.random() < often else i

    def activated(i: int) -> int:
        name = rng.choice(list(ACTIVATIONS))
        if rng.random() < 0.7:
            return writer.add("activation", (i,), name, rng.choice(["plain", "plain", "inplace"]))
        return writer.add("function", (i,), name, "call")

    if host == "llama":
        gate = activated(some(writer.linear(0, inner, "gate_proj"), inner))
        up = some(writer.linear(0, inner, "up_proj"), inner)
        at = writer.add("product", (gate, up), rng.choice(["*", "*", "mul_", "einsum"]))
        if rng.random() < 0.25:  # a linear branch beside the product
            at = writer.add("add", (at, rng.choice([gate, up])), rng.choice(["+", "sub", "add_"]))
        if rng.random() < 0.1:
            at = writer.add("product", (at, up), "*")
    else:
        at = activated(some(writer.linear(0, inner, "c_fc" if host == "gpt2" else "fc1"), inner))
    at = some(at, inner)
    down = {"llama": "down_proj", "gpt2": "c_proj", "vit": "fc2"}[host]
    at = some(writer.linear(at, width, down), width)
    return writer.done(writer.fit(at, width))


def _attention_code(rng: random.Random, host: str, weights: dict[str, float]) -> tuple[Node, ...]:
    width = SIZES[host][0]
    writer = Writer(rng, width)

    def some(i: int, often: float = 0.2) -> int:
        return writer.fit(writer.grow(i, 1, weights), width) if rng.random() < often else i

    parts = [some(writer.linear(0, width, f"{p}_proj")) for p in "qkv"]
    variant = "standard" if rng.random() < 0.4 else rng.choice(ATTENTIONS)
    at = some(writer.add("attend", tuple(parts), 2, variant, int(host == "llama")))
    at = some(writer.linear(at, width, "o_proj"))
    return writer.done(writer.fit(at, width))


def _module(rng: random.Random, host: str, flavour: str) -> Part:
    width, inner, _ = SIZES[host]
    weights = FLAVOURS[flavour]
    places = {"llama": ["act"] * 4 + ["norm", "mlp", "mlp", "attn"], "gpt2": ["act"] * 4 + ["mlp"],
              "vit": ["act"] * 4 + ["norm", "mlp", "attn"]}[host]  # fmt: skip
    place = rng.choice(places)
    declared, base, form, cls = "", "", "class", rng.choice(["Unit", "Block", "Mixer"])
    layers = (0, 1) if rng.random() < 0.12 else (rng.choice([0, 1]),)
    if place == "norm":
        place = rng.choice(["ln1", "ln2", "ln_final"])
        layers = (0,) if place == "ln_final" else layers
        code = _norm_code(rng, width, weights)
        cls, draw = rng.choice(TREACHEROUS), rng.random()
        if draw < 0.2:
            base = rng.choice(["LayerNorm", "RMSNorm", "LlamaRMSNorm"])
            form = rng.choice(["class", "instance"])
        if draw > 0.5:
            declared = rng.choice(["norm", "norm centred", "norm centred", "identity", "plain"])
        return Part("module", place, layers, width, code, cls, base, form, declared)
    if place == "mlp":
        code = _mlp_code(rng, host, weights)
        if rng.random() < 0.4:
            declared = rng.choice(["operations", "operations gated", "operations gated", "plain"])
        base = (
            {"llama": "LlamaMLP", "vit": "ViTMLP", "gpt2": ""}[host] if rng.random() < 0.3 else ""
        )
        return Part("module", place, layers, width, code, cls, base, form, declared)
    if place == "attn":
        code = _attention_code(rng, host, weights)
        declared = "operations" if rng.random() < 0.35 else ""
        base = {"llama": "LlamaAttention", "vit": "ViTAttention"}[host]
        base = base if rng.random() < 0.3 else ""
        return Part("module", place, layers, width, code, cls, base, form, declared)
    draw = rng.random()
    if draw < (0.25 if flavour in ("product", "function") else 0.5):
        code = _chain(rng, inner, weights)
        if rng.random() < 0.25:
            base = rng.choice(["GELU", "SiLU", "ReLU"])
            form, cls = rng.choice(["class", "instance"]), rng.choice(["MyGELU", "SiLUActivation"])
    elif draw < (0.4 if flavour in ("product", "function") else 0.65):
        declared = "identity"
        code = _chain(rng, inner, ELEMENTWISE if rng.random() < 0.7 else weights)
    elif draw < 0.9:
        declared = rng.choice(["operations", "operations", "operations gated"])
        code = _chain(rng, inner, weights)
    else:
        declared = rng.choice(["plain", "plain", "norm"])
        code = _chain(rng, inner, weights)
    return Part("module", place, layers, inner, code, cls, base, form, declared)


EDITS = {
    8: ["hook_in", "ln1.hook_in", "ln1.hook_out", "attn.hook_in", "attn.hook_out", "ln2.hook_in",
        "ln2.hook_out", "mlp.hook_in", "mlp.hook_out", "hook_out", "ln_final.hook_out",
        "ln_final.hook_in", "embed.hook_out"],
    12: ["mlp.in.hook_out", "mlp.out.hook_in", "mlp.gate.hook_out"],
}  # fmt: skip
WIDTHS = {"act": (12, 12), "gate": (8, 12), "up": (8, 12), "down": (12, 8)}
"""Of a module's input and output, where they are not the model's own."""
HOOKED = {
    "llama": ["block", "act", "ln1", "ln2", "ln_final", "mlp", "q", "o", "gate", "up", "down"],
    "gpt2": ["block", "act", "mlp", "o", "up", "down"],
    "vit": [
        "block",
        "act",
        "ln1",
        "ln2",
        "ln_final",
        "mlp",
        "attn",
        "q",
        "k",
        "v",
        "o",
        "up",
        "down",
    ],
}


def _hook(rng: random.Random, host: str, flavour: str) -> Part:
    layer = rng.choice([0, 1])
    weights = FLAVOURS[flavour]
    if rng.random() < 0.45:
        width = rng.choice([8, 8, 12])
        gone = {"llama": "", "gpt2": "mlp.gate.hook_out", "vit": "mlp.gate.hook_out embed.hook_out"}
        names = [name for name in EDITS[width] if name not in gone[host].split()]
        kind, place = "edit", rng.choice(names)
    else:
        kind, place = rng.choice(["after", "after", "before"]), rng.choice(HOOKED[host])
        place = "act" if rng.random() < 0.3 else place
        width = WIDTHS.get(place, (8, 8))[kind == "after"]
    layer = 0 if place.startswith(("ln_final", "embed")) else layer
    if kind == "before" and rng.random() < 0.3:
        effect = rng.choice(["looks", "looks", "doubles", "flips"])
        code = (Node("input"), Node("gradient", (0,), (effect,)))
        return Part("backward", place, (layer,), width, code)
    other = ""
    if rng.random() < 0.2:
        options = ["blocks.0.hook_in", "blocks.0.ln1.hook_out"] if width == 8 else []
        options += ["blocks.0.mlp.in.hook_out"] if width == 12 and layer else []
        earlier = layer or place.startswith(("ln2", "mlp", "ln_final", "attn", "o"))
        other = rng.choice(options) if options and earlier else ""
    simple = flavour in ("linear", "constant") and not other and rng.random() < 0.5
    if simple:  # what users write: a scale, a constant
        writer = Writer(rng, width)
        at = writer.step(0, {"scale": 1, "shift": 2, "move": 0.5})
        code = writer.done(at)
    else:
        code = _chain(rng, width, weights, 2 if other else 1)
    if kind == "edit":
        return Part(kind, place, (layer,), width, code, other=other)
    return Part(kind, place, (layer,), width, code, other=other)


READABLE = (
    "blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_mid", "blocks.{}.ln1.hook_in",
    "blocks.{}.ln1.hook_out", "blocks.{}.ln2.hook_in", "blocks.{}.attn.hook_in",
    "blocks.{}.attn.hook_out", "blocks.{}.mlp.hook_in", "blocks.{}.mlp.hook_out",
    "blocks.{}.hook_out", "blocks.{}.attn.hook_pattern", "blocks.{}.mlp.out.hook_in",
    "blocks.{}.attn.v.hook_out", "blocks.{}.attn.q.hook_out", "blocks.{}.mlp.in.hook_out",
)  # fmt: skip


def generate(seed: int, dtype: str = "float64", flavour: str = "") -> Program:
    """The program of a seed; programs with scans are those of a ``flavour`` that is asked for."""
    rng = random.Random(seed)
    host = rng.choice(["llama", "gpt2", "vit"])
    flavour = flavour or rng.choice([name for name in FLAVOURS if name != SCANNING])
    parts: list[Part] = []
    draw = rng.random()
    if draw < 0.7:
        parts.append(_module(rng, host, flavour))
    if draw > 0.6:
        parts.append(_hook(rng, host, flavour))
    if draw > 0.93:
        parts.append(_hook(rng, host, rng.choice(["linear", "constant"])))
    there = [part for part in parts if _there(part, parts)]
    program = Program(
        host,
        tuple(sorted(there, key=_order)),
        rng.randrange(4),
        rng.randrange(17),
        dtype,
        ("all",),
        flavour,
        batch=2 if rng.random() < 0.1 else 1,
    )
    if rng.random() < 0.7:
        names = {rng.choice(READABLE).format(rng.choice([0, 1])) for _ in range(2)}
        program = replace(program, read=tuple(sorted(names)))
    return _run_otherwise(rng, program)


def _run_otherwise(rng: random.Random, program: Program) -> Program:
    """Other composites, options and targets, where the reference knows what is right."""
    nodes = [node for part in program.parts for node in part.code]
    attends = any(node.op == "attend" for node in nodes)
    scans = any(node.op == "scan" for node in nodes)
    draw = rng.random()
    if draw < 0.08:
        program = replace(program, composite="GradientTimesInput")
    elif draw < 0.16 and not (attends or scans):
        program = replace(program, composite="RelP")
    elif draw < 0.26 and not attends and not any("column" in node.args for node in nodes):
        program = replace(program, composite="CPLRP")
    draw = rng.random()
    if draw < 0.1:
        program = replace(program, options=("no ledger",))
    elif draw < 0.15:
        program = replace(program, options=("checkpoint",))
    elif draw < 0.2 and program.host != "vit" and not attends and program.composite == "AttnLRP":
        program = replace(program, options=("fused",))
    if scans and program.composite == "AttnLRP" and rng.random() < 0.5:
        program = replace(program, options=(*program.options, UNIFORM))
    whole = {part.place for part in program.parts if part.kind == "module"} & {"mlp", "attn"}
    if rng.random() < 0.1 and not whole and program.dtype == "float64":
        names = ["hook_out", "mlp.hook_out", "mlp.out.hook_in", "attn.hook_out", "mlp.in.hook_out"]
        latent = f"blocks.{rng.choice([0, 1, 1])}.{rng.choice(names)}"
        program = replace(program, latent=latent)
    return program


INSIDE = {
    "mlp": ("act", "gate", "up", "down", "mlp.in.hook_out", "mlp.out.hook_in", "mlp.gate.hook_out"),
    "attn": ("q", "k", "v", "o"),
}
"""Places that are gone where a module is replaced as a whole."""


def _there(part: Part, parts: list[Part]) -> bool:
    """Whether the place that a hook is for, and the one it reads, are still in the model."""
    _, block, read = part.other.split(".", 2) if part.other else ("", "", "")
    for other in parts:
        inside = INSIDE.get(other.place, ()) if other.kind == "module" and other is not part else ()
        if part.place in inside and set(part.layers) & set(other.layers):
            return False
        if read in inside and int(block) in other.layers:
            return False
    return True


def _order(part: Part) -> tuple[bool, str]:
    """Captures come first, as they are added first."""
    return (part.kind == "module", part.place)
