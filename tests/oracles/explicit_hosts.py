"""Tiny Llama, GPT-2 and ViT written out in plain torch, with the rules of AttnLRP as surrogates.

A *surrogate* has the value of an operation and the gradient that its rule prescribes (Achtibat et
al., "AttnLRP", ICML 2024, arXiv:2402.05602), so that activation times gradient is relevance:

- an element-wise function y = f(x): ``y + (y / x) (x - x)``, with y and y / x constant (Eq. 9);
- a product of two factors: half of it with each factor held constant in turn (Eq. 14 and 15);
- a norm: its denominator held constant (Eq. 19);
- softmax, and everything linear: as it is (Eq. 8 and 13).

Nothing here comes from the engine. What a test puts into a host (another activation, an edit at a
hook point) is handed in as functions, so that one description can be run in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------ rules, as surrogates


def quotient(y: Tensor, x: Tensor) -> Tensor:
    """y / x, and 0 where x is 0: what sends nothing receives nothing."""
    zero = x == 0
    return torch.where(zero, 0.0, y / torch.where(zero, 1.0, x))


def passing(y: Tensor, x: Tensor) -> Tensor:
    """The value of ``y``, whose relevance passes to ``x`` element by element."""
    y, kept = y.detach(), x.detach()
    return y + quotient(y, kept) * (x - kept)


def elementwise(function: Function, x: Tensor) -> Tensor:
    """The identity rule on y = f(x)."""
    return passing(function(x.detach()), x)


def product(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The uniform rule on a bilinear function: half to each factor, where both carry relevance."""
    if not (a.requires_grad and b.requires_grad):
        return function(a, b)
    return 0.5 * (function(a, b.detach()) + function(a.detach(), b))


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, half to each."""
    return product(torch.mul, a, b)


def attention_product(composite: str, a: Tensor, b: Tensor) -> Tensor:
    """A matrix product of attention: its plain gradient under RelP and Gradient x Input."""
    if composite in ("RelP", "GradientTimesInput"):
        return a @ b
    return product(torch.matmul, a, b)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Denominator constant, centring linear, the bias absorbs its share."""
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = torch.sqrt(centred.pow(2).mean(dim=-1, keepdim=True) + eps).detach()
    y = centred / scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, narrow: bool) -> Tensor:
    """Llama's norm, its square and mean in float32 where Hugging Face computes them so."""
    kept = x.detach().float() if narrow else x.detach()
    y = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + eps)
    return passing(weight * y.to(x.dtype), x)


def softmax(x: Tensor, narrow: bool) -> Tensor:
    """Its plain Jacobian is its rule."""
    return F.softmax(x, dim=-1, dtype=torch.float32 if narrow else None).to(x.dtype)


# ------------------------------------------------------------------ what a test puts in


@dataclass
class World:
    """What happens in a host besides what its architecture says, and what is read.

    Attributes:
        modules: what stands in the place of a module: (place, layer) -> function of its input.
        before, after: what native hooks on a module do to its input and output.
        edits: what hooks at hook points do, by the hook point's name.
        narrow: whether norms and softmax are computed in float32.
        composite: ``AttnLRP``; ``CPLRP`` (the pattern is constant), ``RelP`` (attention has the
            gradient of calculus) or ``GradientTimesInput`` (so has everything).
        seen: the tensors read, by hook name; their gradients are kept.
    """

    modules: dict[tuple[str, int], Function] = field(default_factory=dict)
    before: dict[tuple[str, int], Function] = field(default_factory=dict)
    after: dict[tuple[str, int], Function] = field(default_factory=dict)
    edits: dict[str, Function] = field(default_factory=dict)
    narrow: bool = True
    composite: str = "AttnLRP"
    seen: dict[str, Tensor] = field(default_factory=dict)

    def at(self, name: str, x: Tensor) -> Tensor:
        """A hook point: an edit, and then a reading of what flows through it alone."""
        if name in self.edits:
            x = self.edits[name](x)
        return self.read(name, x * 1)

    def read(self, name: str, x: Tensor) -> Tensor:
        """Read the total of a tensor."""
        self.seen[name] = x
        if x.requires_grad:
            x.retain_grad()
        return x

    @property
    def plain(self) -> bool:
        return self.composite == "GradientTimesInput"

    def act(self, function: Function) -> Function:
        """An activation, under its rule."""
        return function if self.plain else lambda x: elementwise(function, x)

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of a gate and what it gates."""
        return a * b if self.plain else times(a, b)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if self.plain:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return layer_norm(x, weight, bias, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.plain:
            kept = x.float() if self.narrow else x
            y = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + eps)
            return weight * y.to(x.dtype)
        return rms_norm(x, weight, eps, self.narrow)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Queries times keys; both are [batch, head, pos, d]."""
        return attention_product(self.composite, q, k.transpose(-2, -1))

    def mixed(self, pattern: Tensor, v: Tensor) -> Tensor:
        """Pattern times values."""
        pattern = pattern.detach() if self.composite == "CPLRP" else pattern
        return attention_product(self.composite, pattern, v)

    def run(self, place: str, layer: int, own: Function, x: Tensor) -> Tensor:
        """A module of the model, or what stands in its place, between its native hooks."""
        key = (place, layer)
        if key in self.before:
            x = self.before[key](x)
        y = self.modules.get(key, own)(x)
        return self.after[key](y) if key in self.after else y


@dataclass(frozen=True)
class Host:
    """The weights of one model, copied before a bridge takes it over, and its sizes."""

    kind: str
    tensors: dict[str, Tensor]
    heads: int
    kv_heads: int
    eps: float

    @classmethod
    def copy_from(cls, kind: str, model: Any) -> Host:
        config = model.config
        names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
        return cls(
            kind,
            {k: v.detach().clone() for k, v in model.state_dict().items()},
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            next(getattr(config, name) for name in names if hasattr(config, name)),
        )

    def to(self, dtype: torch.dtype) -> Host:
        tensors = {k: v.to(dtype) for k, v in self.tensors.items()}
        return Host(self.kind, tensors, self.heads, self.kv_heads, self.eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer; GPT-2 keeps its weights as [in, out]."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return F.linear(x, weight.T if self.kind == "gpt2" else weight, bias)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions with angles in float32, as in Hugging Face; x is [batch, head, pos, d]."""
    half = x.shape[-1] // 2
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    angles = torch.arange(x.shape[-2]).float()[:, None] * inverse
    cos, sin = (torch.cat([f, f], dim=-1).to(x.dtype) for f in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def attend(
    host: Host, world: World, q: Tensor, k: Tensor, v: Tensor, root: str, *, causal: bool
) -> Tensor:
    """Softmax attention on [batch, pos, head * d], with its hook points."""
    split = [x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in _heads(host, q, k, v)]
    q, k, v = split
    if host.kind == "llama":
        q, k = rotated(q), rotated(k)
    repeat = host.heads // host.kv_heads
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = world.scores(q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    narrow = world.narrow and host.kind != "gpt2"
    pattern = world.at(f"{root}.hook_pattern", softmax(scores, narrow))
    return world.mixed(pattern, v).transpose(1, 2).flatten(2)


def _heads(host: Host, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, int]]:
    return [(q, host.heads), (k, host.kv_heads), (v, host.kv_heads)]


# ------------------------------------------------------------------ the hosts


def _llama_block(host: Host, world: World, i: int, x: Tensor) -> Tensor:
    root, block = f"model.layers.{i}", f"blocks.{i}"

    def norm(name: str) -> Function:
        weight = host.tensors.get(f"{root}.{name}.weight")
        assert weight is not None
        return lambda x: world.rms_norm(x, weight, host.eps)

    def project(place: str, name: str) -> Function:
        return lambda x: world.run(place, i, lambda x: host.linear(f"{root}.{name}", x), x)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            world.at(f"{block}.attn.{p}.hook_out", project(p, f"self_attn.{p}_proj")(x))
            for p in ("q", "k", "v")
        )
        z = attend(host, world, q, k, v, f"{block}.attn", causal=True)
        return project("o", "self_attn.o_proj")(world.at(f"{block}.attn.o.hook_in", z))

    def mlp(x: Tensor) -> Tensor:
        gate = world.at(f"{block}.mlp.gate.hook_out", project("gate", "mlp.gate_proj")(x))
        up = world.at(f"{block}.mlp.in.hook_out", project("up", "mlp.up_proj")(x))
        post = world.gate(world.run("act", i, world.act(F.silu), gate), up)
        return project("down", "mlp.down_proj")(world.at(f"{block}.mlp.out.hook_in", post))

    def attn_norm(x: Tensor) -> Tensor:
        return world.run("ln1", i, norm("input_layernorm"), x)

    def mlp_norm(x: Tensor) -> Tensor:
        return world.run("ln2", i, norm("post_attention_layernorm"), x)

    return _sequential(world, i, x, attn_norm, attention, mlp_norm, mlp)


def _gpt2_block(host: Host, world: World, i: int, x: Tensor) -> Tensor:
    root, block = f"transformer.h.{i}", f"blocks.{i}"

    def norm(name: str) -> Function:
        weight, bias = (host.tensors[f"{root}.{name}.{part}"] for part in ("weight", "bias"))
        return lambda x: world.layer_norm(x, weight, bias, host.eps)

    def attention(x: Tensor) -> Tensor:
        joint = host.linear(f"{root}.attn.c_attn", x).chunk(3, dim=-1)
        q, k, v = (
            world.at(f"{block}.attn.{p}.hook_out", y) for p, y in zip("qkv", joint, strict=True)
        )
        z = attend(host, world, q, k, v, f"{block}.attn", causal=True)
        z = world.at(f"{block}.attn.o.hook_in", z)
        return world.run("o", i, lambda x: host.linear(f"{root}.attn.c_proj", x), z)

    def mlp(x: Tensor) -> Tensor:
        pre = world.run("up", i, lambda x: host.linear(f"{root}.mlp.c_fc", x), x)
        pre = world.at(f"{block}.mlp.in.hook_out", pre)
        act = world.act(lambda x: F.gelu(x, approximate="tanh"))
        post = world.at(f"{block}.mlp.out.hook_in", world.run("act", i, act, pre))
        return world.run("down", i, lambda x: host.linear(f"{root}.mlp.c_proj", x), post)

    return _sequential(world, i, x, norm("ln_1"), attention, norm("ln_2"), mlp)


def _vit_block(host: Host, world: World, i: int, x: Tensor) -> Tensor:
    root, block = f"vit.layers.{i}", f"blocks.{i}"

    def norm(place: str, name: str) -> Function:
        def own(x: Tensor) -> Tensor:
            weight, bias = (host.tensors[f"{root}.{name}.{part}"] for part in ("weight", "bias"))
            return world.layer_norm(x, weight, bias, host.eps)

        return lambda x: world.run(place, i, own, x)

    def project(place: str, name: str) -> Function:
        return lambda x: world.run(place, i, lambda x: host.linear(f"{root}.{name}", x), x)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (
            world.at(f"{block}.attn.{p}.hook_out", project(p, f"attention.{p}_proj")(x))
            for p in ("q", "k", "v")
        )
        z = attend(host, world, q, k, v, f"{block}.attn", causal=False)
        return project("o", "attention.o_proj")(world.at(f"{block}.attn.o.hook_in", z))

    def mlp(x: Tensor) -> Tensor:
        pre = world.at(f"{block}.mlp.in.hook_out", project("up", "mlp.fc1")(x))
        post = world.run("act", i, world.act(F.gelu), pre)
        return project("down", "mlp.fc2")(world.at(f"{block}.mlp.out.hook_in", post))

    before, after = norm("ln1", "layernorm_before"), norm("ln2", "layernorm_after")
    return _sequential(world, i, x, before, attention, after, mlp)


def _sequential(
    world: World,
    i: int,
    x: Tensor,
    attn_norm: Function,
    attention: Function,
    mlp_norm: Function,
    mlp: Function,
) -> Tensor:
    """A pre-norm block. Totals are read before any edit of the branch, as hook names have it."""
    block = f"blocks.{i}"

    def normed(name: str, norm: Function, x: Tensor) -> Tensor:
        return world.at(f"{block}.{name}.hook_out", norm(world.at(f"{block}.{name}.hook_in", x)))

    def branch(name: str, place: str, run: Function, x: Tensor) -> Tensor:
        y = world.run(place, i, run, world.at(f"{block}.{name}.hook_in", x))
        return world.at(f"{block}.{name}.hook_out", y)

    x = world.at(f"{block}.hook_in", world.read(f"{block}.hook_resid_pre", x * 1))
    if ("block", i) in world.before:
        x = world.before["block", i](x)
    x = x + branch("attn", "attn", attention, normed("ln1", attn_norm, x))
    x = world.read(f"{block}.hook_resid_mid", x)
    x = x + branch("mlp", "mlp", mlp, normed("ln2", mlp_norm, x))
    if ("block", i) in world.after:
        x = world.after["block", i](x)
    return world.at(f"{block}.hook_out", x)


BLOCKS = {"llama": _llama_block, "gpt2": _gpt2_block, "vit": _vit_block}
LAYERS = 2


def run_host(host: Host, inputs: Tensor, world: World) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch, pos or 1, vocabulary], and the leaves, the tokens (patches) first.

    ``inputs`` are token ids [batch, pos], or pixels [batch, channel, row, column] for a ViT, whose
    first leaf is its class token before the embedded patches.
    """
    tensors = host.tensors
    if host.kind == "llama":
        leaves = [tensors["model.embed_tokens.weight"][inputs]]
    elif host.kind == "gpt2":
        leaves = [
            tensors["transformer.wte.weight"][inputs],
            tensors["transformer.wpe.weight"][: inputs.shape[1]][None],
        ]
    else:
        root = "vit.embeddings"
        projection = f"{root}.patch_embeddings.projection"
        weight, bias = tensors[f"{projection}.weight"], tensors[f"{projection}.bias"]
        patches = F.conv2d(inputs, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        leaves = [
            torch.cat([tensors[f"{root}.cls_token"].expand(len(inputs), -1, -1), patches], dim=1),
            tensors[f"{root}.position_embeddings"],
        ]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first = leaves[0] if host.kind == "vit" else world.at("embed.hook_out", leaves[0] * 1)
    x = sum(leaves[1:], first)
    for i in range(LAYERS):
        x = BLOCKS[host.kind](host, world, i, x)
    x = world.at("ln_final.hook_in", x)

    def final(x: Tensor) -> Tensor:
        if host.kind == "llama":
            return world.rms_norm(x, tensors["model.norm.weight"], host.eps)
        name = "transformer.ln_f" if host.kind == "gpt2" else "vit.layernorm"
        return world.layer_norm(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], host.eps)

    x = world.at("ln_final.hook_out", world.run("ln_final", 0, final, x))
    if host.kind == "vit":
        head = F.linear(x[:, :1], tensors["classifier.weight"], tensors["classifier.bias"])
    else:
        head = F.linear(x, tensors["lm_head.weight"])
    return head, leaves
