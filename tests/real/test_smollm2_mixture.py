"""A mixture of experts with real weights: SmolLM2's own, copied or split into a Mixtral.

No natively trained mixture comes as a package file. Copies of one MLP as experts compute what the
dense model computes, whatever the router says, because the router's weights add up to one; halves
of it do so with equal weights. So under a constant router relevance must be the dense model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import lenslrp
from benchmarks.gallery import upcycled

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "The opposite of hot is",
    "When Mary and John went to the store, John gave a drink to",
]


@pytest.mark.parametrize("split", [False, True], ids=["copies", "halves"])
def test_a_constant_router_gives_the_dense_relevance(
    smollm2: TransformerBridge, split: bool
) -> None:
    mixed = upcycled.mixtral(smollm2, halves=split)
    for prompt in PROMPTS:
        options: dict[str, Any] = {"names_filter": "mlp.hook_expert_post"}
        a, R = lenslrp.run_with_relevance(
            mixed, prompt, composite=lenslrp.AttnLRP(router="constant"), **options
        )
        options["names_filter"] = "mlp.hook_post"
        b, D = lenslrp.run_with_relevance(smollm2, prompt, composite=lenslrp.AttnLRP(), **options)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        size = float(D.tokens.abs().max())
        assert float((R.tokens - D.tokens).abs().max()) <= 1e-4 * size
        assert abs(R.ledger().error) < 1e-4
        # Neuron by neuron too: an expert's copies share the dense neuron's relevance.
        chosen = R["blocks.3.mlp.hook_expert_post"]
        whole = chosen.flatten(2) if split else chosen.sum(dim=2)
        if split:  # slots are in the order in which the router chose them
            order = R.routing["blocks.3.mlp"].argsort(dim=-1)
            whole = chosen.gather(2, order[..., None].expand_as(chosen)).flatten(2)
        torch.testing.assert_close(whole, D["blocks.3.mlp.hook_post"], rtol=1e-3, atol=1e-4 * size)


def test_a_uniform_router_takes_half_of_the_mixture(smollm2: TransformerBridge) -> None:
    R = lenslrp.run_with_relevance(upcycled.mixtral(smollm2), PROMPTS[0])[1]
    out, weight = R["blocks.3.mlp.hook_out"], R["blocks.3.mlp.gate.hook_expert_weights"]
    assert float(weight.sum()) == pytest.approx(float(out.sum()) / 2, rel=1e-3)
    assert R.experts().shape == (30, 4)
    assert abs(R.ledger().error) < 1e-4
