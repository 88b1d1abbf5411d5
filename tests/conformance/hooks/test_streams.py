"""Several residual streams: DeepSeek V4's hyper-connections and Gemma 3n's AltUp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.hooks import Product
from tests.conformance import zoo
from tests.oracles import explicit_streams as explicit

pytestmark = pytest.mark.filterwarnings("ignore")

HYPER, ALTUP = "DeepseekV4ForCausalLM", "Gemma3nForConditionalGeneration"


def activations(model: Any, names: list[str]) -> dict[str, Tensor]:
    """What hook points hold in a pass without rules."""
    kept: dict[str, Tensor] = {}
    hooks = [(name, lambda x, hook: kept.update({hook.name: x.detach()})) for name in names]
    with model.hooks(fwd_hooks=hooks):
        zoo.plain_logits(model)
    return kept


def close(found: Tensor, expected: Tensor) -> None:
    near = 1e-9 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=near)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_hyper_connections_is_its_twin(layer: int) -> None:
    """Both kinds of compressed attention, and experts by token and by router."""
    model, inner = zoo.build(HYPER), zoo.plain(HYPER).model
    block = f"blocks.{layer}"
    bias = f"{block}.attn.compressor.hook_block_bias"
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, [f"{block}.hook_in", f"{block}.hook_out", bias])
        out, back = explicit.hyper_layer(
            inner.layers[layer],
            inner.rotary_emb,
            kept[f"{block}.hook_in"],
            zoo.prompt(model),
            kept[bias][:, 0],
        )
    close(kept[f"{block}.hook_out"], out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        close(R[f"{block}.hook_in"], back(R[f"{block}.hook_out"]))


def test_the_last_collapse_is_its_twin() -> None:
    model, inner = zoo.build(HYPER), zoo.plain(HYPER).model
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, ["blocks.1.hook_out", "hc_head.hook_out"])
        out, back = explicit.hyper_head(inner.hc_head, kept["blocks.1.hook_out"])
    close(kept["hc_head.hook_out"], out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.AttnLRP())
    with torch.no_grad():
        close(R["blocks.1.hook_out"], back(R["hc_head.hook_out"]))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_altup_is_its_twin(layer: int) -> None:
    """With a threshold before its activation, and without."""
    model, inner = zoo.build(ALTUP), zoo.plain(ALTUP).model.language_model
    block = f"blocks.{layer}"
    names = [f"{block}.{end}" for end in ("hook_in", "hook_out", "per_layer_projection.hook_in")]
    ids = zoo.prompt(model)
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, names)
        embedded = inner.project_per_layer_inputs(
            inner.embed_tokens(ids), inner.get_per_layer_inputs(ids)
        )
        streams = kept[names[0]].movedim(0, 2)
        out, back = explicit.altup_layer(
            inner.layers[layer], inner.rotary_emb, streams, embedded[:, :, layer]
        )
    close(kept[names[1]].movedim(0, 2), out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        on_streams, on_embedded = back(R[names[1]])
    close(R[names[0]], on_streams)
    close(R[names[2]], 2 * on_embedded)


def test_how_streams_begin_and_end_is_its_twin() -> None:
    model, inner = zoo.build(ALTUP), zoo.plain(ALTUP).model.language_model
    names = ["blocks.1.hook_out", "ln_final.hook_in", "embed.hook_out", "blocks.0.hook_in"]
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, names)
        last, to_streams = explicit.joined(inner, kept[names[0]].movedim(0, 2))
        first, to_embedding = explicit.opened(inner, kept[names[2]])
    close(kept[names[1]], last)
    close(kept[names[3]].movedim(0, 2), first)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        close(R[names[0]], to_streams(R[names[1]]))
        given = to_embedding(R[names[3]])
    # The embedding gives every layer's own input its share as well.
    assert not torch.allclose(R["embed.hook_out"], given, rtol=1e-3)
