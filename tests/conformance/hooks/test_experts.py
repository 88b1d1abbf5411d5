"""Mixtures of experts: rules against a hand-out of relevance in loops, implementations, reading.

The oracle (:func:`handed_out`) gives relevance to one Mixtral block in loops over tokens, experts
and neurons, from the block's input and the relevance at its output, without any gradient.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp.hooks import Gamma, Operations, operations
from tests.conformance import zoo
from tests.conformance.families import tokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")

POST = "blocks.1.mlp.hook_expert_post"
BLOCK = "blocks.1.mlp"


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return zoo.build("MixtralForCausalLM")


def explain(model: Any, composite: Any, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, tokens(), 5, composite, **options)[1]


# ------------------------------------------------------------------ the rules, by an oracle


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def share(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """The epsilon rule in loops: R(x_i) = sum_j x_i w_ji / z_j R(z_j)."""
    z = weight @ x
    return torch.stack(
        [
            sum(x[i] * weight[j, i] / z[j] * relevance[j] for j in range(len(z)))
            for i in range(len(x))
        ]
    )


@torch.no_grad()
def handed_out(
    block: Any, x: Tensor, relevance: Tensor, router_share: float, top_k: int = 2
) -> tuple[Tensor, Tensor, dict[tuple[int, int], Tensor]]:
    """Relevance of a block's input [pos, d_model] from that of its output.

    Returns:
        The input's, what the router's softmax leaked, and (position, expert) -> neurons'.
    """
    into = torch.zeros_like(x)
    neurons: dict[tuple[int, int], Tensor] = {}
    leaked = torch.zeros((), dtype=x.dtype)
    for t in range(len(x)):
        logits = block.gate.weight @ x[t]
        chosen = logits.topk(top_k).indices.tolist()
        weights = torch.softmax(logits[chosen].float(), dim=0).to(x.dtype)  # as Hugging Face does
        outputs = []
        for e in chosen:
            gate, up = (block.experts.gate_up_proj[e] @ x[t]).chunk(2)
            post = torch.tensor([silu(float(v)) for v in gate], dtype=x.dtype) * up
            outputs.append((post, block.experts.down_proj[e] @ post))
        total = sum(w * out[1] for w, out in zip(weights, outputs, strict=True))
        to_weights = []
        for e, w, (post, out) in zip(chosen, weights, outputs, strict=True):
            contribution = w * out / total * relevance[t]  # a sum: to each term its share
            to_weights.append(router_share * contribution.sum())
            to_post = share(post, block.experts.down_proj[e], (1 - router_share) * contribution)
            neurons[t, e] = to_post
            # Half to the gate (through its activation, element by element), half to `up`.
            both = torch.cat([to_post / 2, to_post / 2])
            into[t] += share(x[t], block.experts.gate_up_proj[e], both)
        # The softmax rule: R(l_i) = l_i sum_j dw_j/dl_i R(w_j) / w_j.
        for i, e in enumerate(chosen):
            passed = sum(
                (weights[j] * (float(i == j) - weights[i])) * to_weights[j] / weights[j]
                for j in range(top_k)
            )
            r = logits[e] * passed
            leaked = leaked + to_weights[i] - r
            into[t] += share(x[t], block.gate.weight[e : e + 1], r[None])
    return into, leaked, neurons


@pytest.mark.parametrize("router", ["uniform", "constant"])
def test_one_block_against_the_oracle(mixtral: Any, router: Any) -> None:
    names = [f"{BLOCK}.hook_in", f"{BLOCK}.hook_out", POST]
    R = explain(mixtral, lenslrp.AttnLRP(router=router), names_filter=names)
    _, cache = mixtral.run_with_cache(tokens(), names_filter=names[0])
    block = mixtral.blocks[1].mlp.original_component
    for row in range(2):
        into, _, neurons = handed_out(
            block,
            cache[names[0]][row],
            R[names[1]][row],
            0.5 if router == "uniform" else 0.0,
        )
        # Hugging Face's router computes its softmax in float32.
        torch.testing.assert_close(R[names[0]][row], into, rtol=1e-5, atol=1e-6)
        for (t, e), expected in neurons.items():
            slot = R.routing[BLOCK][row, t].tolist().index(e)
            torch.testing.assert_close(R[POST][row, t, slot], expected, rtol=1e-5, atol=1e-6)


def test_the_router_gets_half_or_nothing(mixtral: Any) -> None:
    weights = f"{BLOCK}.gate.hook_expert_weights"
    out = f"{BLOCK}.hook_out"
    half = explain(mixtral, lenslrp.AttnLRP(), names_filter=[weights, out])
    assert float(half[weights].sum()) == pytest.approx(float(half[out].sum() / 2), rel=1e-6)
    nothing = explain(mixtral, lenslrp.AttnLRP(router="constant"), names_filter=[weights])
    assert bool((nothing[weights] == 0).all())


def test_uniform_leaks_where_constant_conserves(mixtral: Any) -> None:
    uniform = explain(mixtral, lenslrp.CPLRP(router="uniform"), names_filter=[]).ledger()
    constant = explain(mixtral, lenslrp.CPLRP(), names_filter=[]).ledger()
    assert abs(uniform.softmax) > 1e-3
    assert abs(uniform.error) < 1e-6
    assert constant.softmax == 0
    assert abs(constant.leaves - constant.target) < 1e-9


# ------------------------------------------------------------------ every implementation


@pytest.mark.parametrize("composite", [lenslrp.AttnLRP(), lenslrp.CPLRP(gate="up")], ids=str)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_implementations_agree(implementation: str, composite: Any) -> None:
    names = [POST, f"{BLOCK}.gate.hook_expert_weights", "blocks.0.hook_resid_pre"]
    model = zoo.build("MixtralForCausalLM", torch.float32)
    one_by_one = explain(model, composite, names_filter=names)
    model.original_model.set_experts_implementation(implementation)
    plain = zoo.plain_logits(model)
    logits, R = lenslrp.run_with_relevance(model, tokens(), 5, composite, names)
    assert torch.equal(logits, plain)
    assert abs(R.ledger().error) < 1e-5
    for name in names:
        torch.testing.assert_close(R[name], one_by_one[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(R.tokens, one_by_one.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        R.activations[POST], one_by_one.activations[POST], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_weighted_linear_rules_need_experts_one_by_one(implementation: str) -> None:
    model = zoo.build("MixtralForCausalLM", torch.float32)
    table = {"linear": Gamma(0.1)}
    eager = explain(model, table, names_filter=[]).ledger()
    assert abs(eager.error) < 1e-5
    assert abs(eager.leaves - explain(model, {}, names_filter=[]).ledger().leaves) > 1e-3
    model.original_model.set_experts_implementation(implementation)
    with pytest.raises(lenslrp.InputError, match=r"blocks\.\d\.mlp: a gamma rule .*'eager'"):
        explain(model, table)


WEIGHTED = [
    "AfmoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GptOssForCausalLM",
    "HrmTextForCausalLM",
    "LEDForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "SwitchTransformersForConditionalGeneration",
]
GAMMA = {"linear": Gamma(0.3), "projection": Gamma(0.3)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_linear_rules_reach_every_weight_but_the_routers(name: str) -> None:
    """Also where a factor is constant, and layers that feed nothing else are off the path."""
    model = zoo.build(name)
    for base in (lenslrp.AttnLRP(), lenslrp.CPLRP(gate="up")):
        R = zoo.explain(model, {**base.rules, **GAMMA}, [])[1]
        assert abs(R.ledger().error) <= max(1e-8, zoo.tolerance(name))
        ruled = R.coverage.sites[R.coverage.sites["rule"] == "gamma"]["hook"]
        mixtures = [
            b.mlp for b in getattr(model, "blocks", []) if hasattr(b.mlp, "hook_router_scores")
        ]
        chooses = r"router|classifier|shared_expert_gate" + (r"|mlp\.gate$" if mixtures else "")
        assert not ruled.str.contains(chooses).any()
        assert ruled.str.endswith("mlp.experts").sum() == len(mixtures), list(ruled)


def test_raw_weights_without_their_rule_are_refused() -> None:
    """JetMoe's heads are experts, called past any component: plain products would be epsilon."""
    model = zoo.build("JetMoeForCausalLM")
    with pytest.raises(lenslrp.CoverageError, match=r"Mm in .*attn\.experts\.output_linear"):
        explain(model, {"projection": Gamma(0.3)})


def test_checkpointed_experts_give_the_same(mixtral: Any) -> None:
    R = explain(mixtral, lenslrp.AttnLRP(), names_filter=[POST])
    again = explain(mixtral, lenslrp.AttnLRP(), names_filter=[POST], checkpoint=True)
    torch.testing.assert_close(again.tokens, R.tokens, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again[POST], R[POST], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ reading


def test_experts_without_a_token_have_no_relevance(mixtral: Any) -> None:
    short = tokens()[:, :2]
    R = lenslrp.run_with_relevance(mixtral, short, 5)[1]
    idle = 0
    for row in range(2):
        table = R.experts(row)
        assert table.shape == (zoo.LAYERS, 4)
        for layer in range(zoo.LAYERS):
            used = set(R.routing[f"blocks.{layer}.mlp"][row].flatten().tolist())
            idle += 4 - len(used)
            assert all(table.loc[layer, e] == 0 for e in range(4) if e not in used)
            last = R.routing[f"blocks.{layer}.mlp"][row, -1].tolist()  # where the target is
            assert all(table.loc[layer, e] != 0 for e in last)
    assert idle
    # The neurons' relevance is the experts' share of the block's: down_proj has no bias.
    total = float(R[f"{BLOCK}.hook_out"][0].sum()) / 2
    assert float(R.experts(0).loc[1].sum()) == pytest.approx(total, rel=1e-6)


def test_top_neurons_name_their_expert(mixtral: Any) -> None:
    R = explain(mixtral, lenslrp.AttnLRP())
    best = R.top("mlp.hook_expert_post", k=4).iloc[0]
    there = R.top("mlp.hook_expert_post", k=1, position=int(best["position"])).iloc[0]
    assert there.equals(best)
    chosen = R.routing[f"blocks.{best['layer']}.mlp"][0, best["position"]].tolist()
    slot = chosen.index(best["expert"])
    name = f"blocks.{best['layer']}.mlp.hook_expert_post"
    where = (0, best["position"], slot, best["neuron"])
    assert (
        float(R[name][where])
        == best["relevance"]
        == pytest.approx(
            float(
                torch.stack(
                    [R[f"blocks.{i}.mlp.hook_expert_post"][0].abs().max() for i in (0, 1)]
                ).max()
            )
            * (1 if best["relevance"] > 0 else -1)
        )
    )
    assert float(R.activations[name][where]) == best["activation"]


def test_experts_that_see_every_token() -> None:
    """Llama 4 weights the input of every expert; those not chosen get zeros."""
    model = zoo.build("Llama4ForCausalLM")
    R = explain(model, lenslrp.AttnLRP())
    assert R[POST].shape == (2, 7, 4, 24)
    name = f"{BLOCK}.shared_expert.hook_out"
    experts = R[f"{BLOCK}.hook_out"].sum() - R[name].sum()
    torch.testing.assert_close(R[POST].sum(), experts, rtol=1e-6, atol=1e-9)
    read = R[POST].flatten(0, 1).sum(-1)
    assert bool(((read != 0).sum(-1) <= 2).all())  # top 2


def test_a_neuron_of_an_expert_as_target(mixtral: Any) -> None:
    """Its activation is explained, and the ledger balances from there."""
    target = lenslrp.targets.Activation(POST, (1, 3), position=-2)
    R = lenslrp.run_with_relevance(mixtral, tokens(), target)[1]
    values = explain(mixtral, lenslrp.AttnLRP()).activations[POST][:, -2, 1, 3]
    torch.testing.assert_close(R.target.value, values)
    assert abs(R.ledger().error) < 1e-6


def test_reductions_of_experts(mixtral: Any) -> None:
    whole = explain(mixtral, lenslrp.AttnLRP(), names_filter=[POST])[POST]
    summed = explain(mixtral, lenslrp.AttnLRP(), names_filter=[POST], reduce="sum")[POST]
    torch.testing.assert_close(summed, whole.sum(-1))


def test_routing_is_saved(mixtral: Any, tmp_path: Path) -> None:
    R = explain(mixtral, lenslrp.AttnLRP())
    back = lenslrp.RelevanceCache.load(R.save(tmp_path / "r.safetensors"))
    assert back.n_experts == 4
    assert torch.equal(back.routing[BLOCK], R.routing[BLOCK])
    assert back.experts().equals(R.experts())


def test_nothing_stays_behind(mixtral: Any) -> None:
    block = mixtral.blocks[1].mlp.original_component
    before = [dict(part.__dict__) for part in block.modules()]
    explain(mixtral, lenslrp.AttnLRP())
    attached = lenslrp.relevance_rules(mixtral, lenslrp.AttnLRP())
    with pytest.raises(RuntimeError, match="stop"), attached:
        raise RuntimeError("stop")
    after = [dict(part.__dict__) for part in block.modules()]
    assert [set(d) for d in before] == [set(d) for d in after]


# ------------------------------------------------------------------ GPT-OSS's gate


def test_gpt_oss_gate_is_element_wise() -> None:
    """(up + 1) * glu: half to each; glu and the clips by the identity rule, the 1 as a bias."""
    model = zoo.build("GptOssForCausalLM")
    experts = model.blocks[1].mlp.original_component.experts
    assert experts.limit > 0
    R = explain(model, lenslrp.AttnLRP())
    assert abs(R.ledger().error) < 1e-9
    experts.limit = 0.5  # so low that it clips
    try:
        clipped = explain(model, lenslrp.AttnLRP())
        assert abs(clipped.ledger().error) < 1e-9
        assert float((clipped.tokens - R.tokens).abs().max()) > 1e-6
    finally:
        experts.limit = 7.0


# ------------------------------------------------------------------ mutation

FORGOTTEN = [
    ("product", lambda self, a, b: a * b, "no rule for Mul"),
    ("activation", lambda self, act, x, gate=True: act(x), "no rule for"),
    ("leak", lambda self, function, *inputs: function(*inputs), "no rule for Softmax"),
]


@pytest.mark.parametrize(("kind", "bare", "said"), FORGOTTEN)
def test_a_kind_of_operation_that_is_not_met_is_noticed(
    kind: str, bare: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("GptOssForCausalLM")
    explain(model, lenslrp.AttnLRP(), names_filter=[])
    monkeypatch.setattr(operations.OperationIntercept, kind, bare)
    with pytest.raises(lenslrp.CoverageError, match=said):
        explain(model, lenslrp.AttnLRP(), names_filter=[])


@pytest.mark.parametrize(("kind", "bare"), [("sum", lambda self, y, args, sign: y)])
def test_constants_that_are_not_booked_unbalance(
    kind: str, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("GptOssForCausalLM")
    monkeypatch.setattr(operations.OperationIntercept, kind, bare)
    with pytest.raises(lenslrp.CoverageError, match="the ledger does not balance"):
        explain(model, lenslrp.AttnLRP(), names_filter=[])
    with pytest.warns(UserWarning, match="the ledger does not balance"):
        R = explain(model, lenslrp.AttnLRP(), names_filter=[], strict=False)
    assert abs(R.ledger().error) > 1e-3


def test_a_region_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a leak's input does not close would hide everything below it."""
    model = zoo.build("MixtralForCausalLM")

    def open_ended(self: Any, function: Any, *inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return operations.F.apply(
            operations.F.RegionOutput, y, None, "softmax", self.sites["softmax"]
        )

    monkeypatch.setattr(operations.OperationIntercept, "leak", open_ended)
    with pytest.raises(lenslrp.CoverageError, match="leaves a region past its inputs"):
        explain(model, lenslrp.AttnLRP(), names_filter=[])


# ------------------------------------------------------------------ raw operations, by a user


class HandMade(torch.nn.Module):
    """A gated MLP in plain Python, with a gate that no table knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, 2 * width, dtype=torch.float64)
        self.second = torch.nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.first(x).chunk(2, dim=-1)
        return self.second(torch.nn.functional.gelu(gate) * up + 0.5)


def hand_made() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{k: v for k, v in zoo.SIZES.items() if hasattr(hf.LlamaConfig(), k)})
    model = hf.LlamaForCausalLM(config).double().eval()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(HandMade(24), torch.nn.SiLU())
    return lenslrp.load(model)


def test_a_module_in_plain_python_is_refused_and_taught() -> None:
    model = hand_made()
    with pytest.raises(lenslrp.CoverageError, match="HandMade"):
        explain(model, lenslrp.AttnLRP())
    table = lenslrp.AttnLRP().extended({HandMade: Operations(gated=True)})
    R = explain(model, table)
    assert R.coverage.ok
    assert abs(R.ledger().error) < 1e-9
    assert abs(R.ledger().biases) > 1e-5  # its linear layers' and the 0.5
