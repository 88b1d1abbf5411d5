"""Reads and writes against gradients and explicit products, family by family.

In the last block, the gradient of the logits with respect to a neuron's activation, norms'
denominators held, is what the neuron writes, over a positive number; the gradient of a
pre-activation with respect to the residual stream is what it reads. The rules hold denominators, so
both are had from a plain backward pass, which knows nothing of gains, offsets and centring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformer_lens.tools.analysis import logit_readout

import lenslrp
from lenslrp.analysis import (
    Direction,
    Feature,
    Head,
    Lens,
    Neuron,
    SparseCoder,
    cosines,
    reads,
    writes,
)
from lenslrp.analysis.units.locations import blocks_name
from lenslrp.analysis.units.projection import project
from lenslrp.analysis.units.unembedding import embedding, measure_gain, unembed
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.structure import components
from tests.conformance import zoo
from tests.conformance.families import tokens

DECODERS = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "GPTNeoXForCausalLM",
    "PhiForCausalLM", "Olmo2ForCausalLM", "BloomForCausalLM", "Phi3ForCausalLM", "MptForCausalLM",
    "CohereForCausalLM", "NemotronForCausalLM",
)  # fmt: skip
ENCODER_DECODERS = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
MIXTURES = ("MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM")
ALL = (*DECODERS, *ENCODER_DECODERS)
LAST = zoo.LAYERS - 1


Trace = dict[str, list[Tensor]]


def run(model: Any) -> None:
    """A forward pass on the zoo's input."""
    extra = {"decoder_input_ids": tokens(2, 4, seed=8)} if zoo.two_stacks(model) else {}
    with zoo.default_type(model):
        model(tokens(), use_cache=False, **extra)


@contextmanager
def traced(model: Any, *names: str) -> Iterator[Trace]:
    """Tensors at hook points in one forward pass under AttnLRP, and the logits before a soft-cap.

    Experts that run one after another fire their hook point once each.
    """
    seen: Trace = defaultdict(list)
    points = hook_points(model, components(model))

    def keep(name: str) -> Any:
        return lambda _, args, out: seen[name].append(out)

    with lenslrp.relevance_rules(model, lenslrp.AttnLRP(), strict=False) as rules:
        handles = [points[n].register_forward_hook(keep(n)) for n in (*names, "unembed.hook_out")]
        run(model)
        for handle in handles:
            handle.remove()
        seen["routing"] = list(rules.routing.values())[-1:]
        yield seen


def along(a: Tensor, b: Tensor) -> None:
    """Equal up to a positive factor."""
    a, b = a.double(), b.double()
    torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=1e-5, atol=1e-6)


def gradient(value: Tensor, at: list[Tensor]) -> Tensor:
    return sum(torch.autograd.grad(value, at, retain_graph=True))


@pytest.mark.parametrize("name", ALL)
def test_what_a_neuron_writes_is_the_gradient_of_the_logits(name: str) -> None:
    model = zoo.build(name)
    neuron = Neuron(LAST, 3)
    with traced(model, neuron.hook(model)) as seen:
        post = seen[neuron.hook(model)]
        width = post[0].shape[-1]
        grads = [gradient(x, post).reshape(-1, width) for x in seen["unembed.hook_out"][0][0, -1]]
    rows = torch.stack(grads)[:, :, 3]  # of the one position that these logits depend on
    along(writes(model, neuron).scores, rows[:, rows.abs().sum(dim=0).argmax()])


@pytest.mark.parametrize("processed", [True, False])
def test_folded_norms_are_read_as_they_are(processed: bool) -> None:
    model, neuron = zoo.build("GPT2LMHeadModel"), Neuron(LAST, 3)
    model.enable_compatibility_mode(no_processing=not processed)
    with traced(model, neuron.hook(model)) as seen:
        post = seen[neuron.hook(model)]
        grads = [gradient(x, post)[0, -1, 3] for x in seen["unembed.hook_out"][0][0, -1]]
    along(writes(model, neuron).scores, torch.stack(grads))


@pytest.mark.parametrize("name", MIXTURES)
def test_what_an_experts_neuron_writes(name: str) -> None:
    model = zoo.build(name)
    hook = f"blocks.{LAST}.mlp.hook_expert_post"
    with traced(model, hook) as seen:
        post, chosen = seen[hook], seen["routing"][0]
        grads = [gradient(x, post)[0, -1, 0, 3] for x in seen["unembed.hook_out"][0][0, -1]]
    neuron = Neuron(LAST, 3, expert=int(chosen[0, -1, 0]))
    assert neuron.hook(model) == hook
    along(writes(model, neuron).scores, torch.stack(grads))
    total = sum(post)
    assert neuron.activation(total, chosen)[0, -1] == total[0, -1, 0, 3]
    other = Neuron(LAST, 3, expert=next(e for e in range(4) if e not in chosen[0, -1]))
    assert other.activation(total, chosen)[0, -1] == 0


@pytest.mark.parametrize("name", MIXTURES)
def test_what_an_experts_neuron_reads(name: str) -> None:
    """The neuron's value from its two input vectors and the normed residual, by hand."""
    model = zoo.build(name)
    hook, into = f"blocks.{LAST}.mlp.hook_expert_post", f"blocks.{LAST}.ln2.hook_out"
    with traced(model, hook, into) as seen:
        x, post = seen[into][0][0, -1].detach(), sum(seen[hook])[0, -1, 0, 3].detach()
        expert = int(seen["routing"][0][0, -1, 0])
    vectors = {k: v[0].double() for k, v in Neuron(LAST, 3, expert=expert).reads(model).items()}
    block = model.blocks[LAST].mlp.original_component
    if name == "GptOssForCausalLM":
        bias, experts = block.experts.gate_up_proj_bias[expert].double(), block.experts
        gate, up = x @ vectors["gate"] + bias[6], x @ vectors["in"] + bias[7]
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        expected = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    else:
        expected = torch.nn.functional.silu(x @ vectors["gate"]) * (x @ vectors["in"])
    torch.testing.assert_close(post, expected.detach(), rtol=1e-6, atol=1e-8)


def test_experts_that_keep_their_weights_the_other_way_round() -> None:
    model = zoo.build("Llama4ForCausalLM")
    experts = model.blocks[LAST].mlp.original_component.experts
    neuron = Neuron(LAST, 3, expert=2)
    size = experts.down_proj.shape[1]
    assert torch.equal(neuron.writes(model)["out"][0], experts.down_proj[2, 3])
    assert torch.equal(neuron.reads(model)["gate"][0], experts.gate_up_proj[2, :, 3])
    assert torch.equal(neuron.reads(model)["in"][0], experts.gate_up_proj[2, :, size + 3])


READERS = {
    "GPT2LMHeadModel": ("ln2", {"in": "mlp.in.hook_out"}),
    "PhiForCausalLM": ("ln1", {"in": "mlp.in.hook_out"}),
    **dict.fromkeys(
        ("LlamaForCausalLM", "Gemma2ForCausalLM", "Olmo2ForCausalLM"),
        ("ln2", {"in": "mlp.in.hook_out", "gate": "mlp.gate.hook_out"}),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_neuron_reads_is_the_gradient_of_its_input(name: str) -> None:
    model, neuron = zoo.build(name), Neuron(LAST, 3)
    norm, parts = READERS[name]
    start = "mlp" if name == "Olmo2ForCausalLM" else norm  # which norms only what it writes
    into = f"blocks.{LAST}.{start}.hook_in"
    names = {part: f"blocks.{LAST}.{hook}" for part, hook in parts.items()}
    found = reads(model, neuron)
    assert set(found) == set(parts)
    with traced(model, into, *names.values()) as seen:
        for part, hook in names.items():
            grad = gradient(
                seen[hook][0].view(2, -1, 24 if "GPT2" not in name else 64)[0, 2, 3], seen[into]
            )
            along(found[part].scores, embedding(model) @ grad.view(2, -1, 16)[0, 2])


def feature(model: Any, hook: str, out: str | None) -> Feature:
    """A feature of a random coder in the last block."""
    draw = torch.Generator().manual_seed(3)
    encode, decode = (torch.randn(16, 5, generator=draw).double() for _ in range(2))
    where = {"hook": f"blocks.{LAST}.{hook}", "hook_out": out and f"blocks.{LAST}.{out}"}
    zeros = torch.zeros(16).double()
    coder = SparseCoder(
        W_enc=encode, b_enc=zeros[:5], W_dec=decode.T.contiguous(), b_dec=zeros, **where
    )
    return Feature(coder, 3)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        *((name, "mlp.hook_in") for name in READERS),
        *((name, f"{READERS[name][0]}.hook_out") for name in READERS if "Olmo2" not in name),
    ],
)  # fmt: skip
def test_what_a_transcoders_feature_reads_is_the_gradient_of_its_input(
    name: str, hook: str
) -> None:
    model, norm = zoo.build(name), READERS[name][0]
    start = "mlp" if name == "Olmo2ForCausalLM" else norm  # which norms only what it writes
    into = f"blocks.{LAST}.{start}.hook_in"
    unit = feature(model, hook, "hook_mlp_out")
    with traced(model, into, unit.coder.hook) as seen:
        read = (seen[unit.coder.hook][0] @ unit.coder.W_enc)[..., 3]
        grad = gradient(read.view(2, -1)[0, 2], seen[into]).view(2, -1, 16)[0, 2]
    along(reads(model, unit)["in"].scores, embedding(model) @ grad)


@pytest.mark.parametrize("name", [name for name in READERS if "Olmo2" not in name])
def test_what_is_read_ahead_of_a_norms_gain(name: str) -> None:
    """What a norm divides is the stream, or the stream less its mean."""
    model, norm = zoo.build(name), READERS[name][0]
    unit, into = feature(model, f"{norm}.hook_normalized", "hook_mlp_out"), f"{norm}.hook_in"
    with traced(model, f"blocks.{LAST}.{into}", unit.coder.hook) as seen:
        x, shown = (seen[key][0][0, 2].detach() for key in seen if key.startswith("blocks"))
    row = unit.coder.W_enc[:, 3]
    if name in ("GPT2LMHeadModel", "PhiForCausalLM"):
        x, row = x - x.mean(), row - row.mean()
    along(shown, x)
    along(reads(model, unit)["in"].scores, embedding(model) @ row)


@pytest.mark.parametrize(
    ("name", "out"),
    [
        *((name, out) for name in (*READERS, "GPTNeoXForCausalLM")
          for out in ("mlp.hook_out", "hook_mlp_out", "hook_resid_post")),
        ("PhiForCausalLM", "attn.hook_out"),
    ],
)  # fmt: skip
def test_what_a_feature_writes_is_the_gradient_of_the_logits(name: str, out: str) -> None:
    model = zoo.build(name)
    stream = out == "hook_resid_post"
    unit = feature(model, out, None) if stream else feature(model, "mlp.hook_in", out)
    with traced(model, unit.coder.written_at) as seen:
        at = seen[unit.coder.written_at]
        grads = [
            gradient(x, at).view(2, -1, 16)[0, -1] @ unit.coder.W_dec[3]
            for x in seen["unembed.hook_out"][0][0, -1]
        ]
    along(writes(model, unit).scores, torch.stack(grads))


def test_what_attention_writes_passes_a_norm_of_its_own() -> None:
    model = zoo.build("Gemma2ForCausalLM")
    gain = measure_gain(model, model.blocks[LAST].ln1_post, torch.zeros(16).double())
    for out, through in (("attn.hook_out", gain.forward), ("hook_attn_out", lambda row: row)):
        unit = feature(model, out, None)
        expected = project(model, through(unit.coder.W_dec[3])[None])[0].cpu()
        torch.testing.assert_close(writes(model, unit).scores, expected)


def test_a_cross_layer_feature_writes_the_sum_of_its_layers() -> None:
    model, out = zoo.build("Gemma2ForCausalLM"), "mlp.hook_out"
    one = feature(model, "mlp.hook_in", out).coder
    first = {"hook": "blocks.0.mlp.hook_in", "hook_out": "blocks.0.hook_mlp_out"}
    across = replace(one, **first, later={f"blocks.{LAST}.hook_mlp_out": one.W_dec.flip(0)})
    total = one.W_dec[3] + one.W_dec[1]
    scores = writes(model, Feature(across, 3)).scores
    torch.testing.assert_close(scores, project(model, total[None])[0].cpu())
    behind = replace(across, later={f"blocks.{LAST}.{out}": one.W_dec})
    with pytest.raises(InputError, match="writes through norms of several layers, not through one"):
        writes(model, Feature(behind, 3))
    lens = Lens({0: torch.eye(16)}, {}, {}, "ridge", "x", "", 2, 0, 0)
    with pytest.raises(InputError, match="writes at several layers, and a lens is of one"):
        writes(model, Feature(across, 3), lens=lens)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MistralForCausalLM"])
def test_what_a_head_reads_with_grouped_queries(name: str) -> None:
    """Query head 1 of two reads keys and values of the one group there is."""
    model = grouped(name)
    into = f"blocks.{LAST}.ln1.hook_in"
    hooks = {"q": (f"blocks.{LAST}.attn.hook_q", 1), "k": (f"blocks.{LAST}.attn.hook_k", 0),
             "v": (f"blocks.{LAST}.attn.hook_v", 0)}  # fmt: skip
    head = Head(LAST, 1)
    gain = measure_gain(model, model.blocks[LAST].ln1, torch.zeros(16).double())
    with traced(model, into, *(hook for hook, _ in hooks.values())) as seen:
        for part, (hook, index) in hooks.items():
            for j in (0, 5):
                value = seen[hook][0].view(2, -1, model.cfg.n_heads if part == "q" else 1, 8)
                grad = gradient(value[0, 2, index, j], seen[into])[0, 2]
                along(gain.backward(head.reads(model)[part][j]), grad)


def grouped(name: str) -> Any:
    torch.manual_seed(0)
    config = type(zoo.config(name))(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=48,
        initializer_range=0.4,
    )  # fmt: skip
    model = getattr(transformers, name)(config).double().eval()
    return lenslrp.load(model)


@pytest.mark.parametrize("name", [*DECODERS, "T5ForConditionalGeneration"])
def test_heads_results_add_up_to_the_attentions_output(name: str) -> None:
    model = zoo.build(name)
    head = Head(LAST, 0)
    z_name = head.hook(model)
    out_name = z_name.replace("hook_z", "o.hook_out")
    with traced(model, z_name, out_name) as seen:
        z, out = seen[z_name][0].detach(), seen[out_name][0].detach()
    heads = model.cfg.n_heads
    z = z.reshape(*z.shape[:2], heads, -1)
    total = sum(z[:, :, h] @ Head(LAST, h).writes(model)["out"] for h in range(heads))
    attention = getattr(model, z_name.split(".")[0])[LAST]
    bias = getattr(getattr(attention, z_name.split(".")[2]), "b_O", None)
    torch.testing.assert_close(total if bias is None else total + bias, out.view_as(total))
    norms = torch.stack([Head(LAST, h).activation(z) for h in range(heads)], dim=-1)
    torch.testing.assert_close(norms, z.norm(dim=-1))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_ov_of_what_is_attended_to(name: str) -> None:
    """The first position attends to itself only: its heads' OV images add up to its output."""
    model = zoo.build(name, bias=False)
    names = ("hook_resid_pre", "attn.hook_out")
    with traced(model, *(f"blocks.{LAST}.{n}" for n in names)) as seen:
        residual, out = (seen[f"blocks.{LAST}.{n}"][0][0, 0].detach() for n in names)
    total = sum(writes(model, Head(LAST, h), source=residual).scores for h in range(2))
    post = getattr(model.blocks[LAST], "ln1_post", None)
    if post is not None:
        out = post.original_component(out[None, None])[0, 0]
    along(total, project(model, out[None])[0])


def test_components_rebuild_a_heads_circuits() -> None:
    model = zoo.build("LlamaForCausalLM")
    head = Head(1, 1)
    gain = model.blocks[1].ln1.weight.detach()
    rows = embedding(model)
    value, out = head.reads(model)["v"] * gain, head.writes(model)["out"]
    query, key = (head.reads(model)[n] * gain for n in ("q", "k"))
    ov, qk = torch.zeros(53, 53).double(), torch.zeros(53, 53).double()
    for component in range(8):
        read, write = (
            reads(model, head, component=component),
            writes(model, head, component=component),
        )
        ov += read["v"].strength * torch.outer(read["v"].scores, write.scores)
        qk += read["q"].strength * torch.outer(read["q"].scores, read["k"].scores)
        assert write.strength == read["v"].strength
    torch.testing.assert_close(ov, (rows @ value.T) @ project(model, out))
    torch.testing.assert_close(qk, (rows @ query.T) @ (rows @ key.T).T)


@pytest.mark.parametrize("name", [*ALL, *MIXTURES, "SwitchTransformersForConditionalGeneration",
                                  "ViTForImageClassification"])  # fmt: skip
def test_the_readout_of_the_last_residual_is_the_models_logits(name: str) -> None:
    model = zoo.build(name)
    kept: list[Tensor] = []
    point = model.hook_dict[f"{blocks_name(model)}.{LAST}.hook_resid_post"]
    handle = point.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
    logits = zoo.plain_logits(model).detach()
    handle.remove()
    last = kept[-1].reshape(-1, 16)
    ours = unembed(model, last)
    if logits.ndim == 2:  # an image classifier reads its first token
        ours, logits = ours[:1], logits[:1]
    torch.testing.assert_close(ours, logits.reshape(-1, logits.shape[-1]).double(),
                               rtol=1e-6, atol=1e-6)  # fmt: skip
    if name in DECODERS:
        torch.testing.assert_close(ours, logit_readout(model, last).values)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"])
def test_at_a_residual_scores_are_differences_of_real_logits(name: str) -> None:
    model = zoo.build(name)
    at, vector = torch.randn(2, 16).double()
    found = writes(model, Direction(f"blocks.{LAST}.hook_resid_post", vector), at=at, amount=0.5)
    hf = model.original_model
    logits = []
    for x in (at, at + 0.5 * vector):
        y = hf.lm_head(hf.get_decoder().norm(x[None, None]) if hasattr(hf.get_decoder(), "norm")
                       else hf.transformer.ln_f(x[None, None]))[0, 0]  # fmt: skip
        cap = getattr(hf.config, "final_logit_softcapping", None)
        logits.append(cap * torch.tanh(y / cap) if cap else y)
    torch.testing.assert_close(found.scores, (logits[1] - logits[0]).detach())


def test_cosines_of_a_gated_neuron_are_those_of_the_folded_weights() -> None:
    model = zoo.build("LlamaForCausalLM")
    mlp, gain = model.blocks[1].mlp, model.blocks[1].ln2.weight.detach()
    into, gate, out = gain * mlp.W_in[:, 3], gain * mlp.W_gate[:, 3], mlp.W_out[3].detach()
    found = cosines(model, Neuron(1, 3))
    for pair, (a, b) in {"in,out": (into, out), "gate,out": (gate, out),
                         "gate,in": (gate, into)}.items():  # fmt: skip
        assert found[pair] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-9)


def test_untied_embeddings_are_not_confused() -> None:
    model = zoo.build("LlamaForCausalLM")
    hf = model.original_model
    assert hf.lm_head.weight.data_ptr() != hf.model.embed_tokens.weight.data_ptr()
    vector = torch.randn(16).double()
    unit = Direction("blocks.1.hook_resid_post", vector)
    gain = model.ln_final.weight.detach()
    torch.testing.assert_close(
        writes(model, unit).scores, hf.lm_head.weight.detach() @ (gain * vector)
    )
    torch.testing.assert_close(
        reads(model, unit)["in"].scores, hf.model.embed_tokens.weight.detach() @ vector
    )
