"""Every recurrent mixer against an explicit one that hands relevance out step by step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.hooks.structure import components
from tests.conformance import zoo
from tests.conformance.families import tokens
from tests.oracles import explicit_recurrent as explicit

pytestmark = pytest.mark.filterwarnings("ignore")

TWINS: dict[str, tuple[str, Callable[..., explicit.Explained]]] = {
    "MambaForCausalLM": ("MambaMixer", explicit.mamba),
    "FalconMambaForCausalLM": ("FalconMambaMixer", explicit.mamba),
    "JambaForCausalLM": ("JambaMambaMixer", explicit.mamba),
    "Mamba2ForCausalLM": ("Mamba2Mixer", explicit.mamba2),
    "BambaForCausalLM": ("BambaMixer", explicit.mamba2),
    "FalconH1ForCausalLM": ("FalconH1Mixer", explicit.mamba2),
    "GraniteMoeHybridForCausalLM": ("GraniteMoeHybridMambaLayer", explicit.mamba2),
    "NemotronHForCausalLM": ("NemotronHMamba2Mixer", explicit.mamba2),
    "Zamba2ForCausalLM": ("Zamba2MambaMixer", explicit.mamba2),
    "Qwen3NextForCausalLM": ("GatedDeltaNetBridge", explicit.delta_net),
    "Qwen3_5ForCausalLM": ("GatedDeltaNetBridge", explicit.delta_net),
    "Qwen3_5MoeForCausalLM": ("GatedDeltaNetBridge", explicit.delta_net),
    "OlmoHybridForCausalLM": ("OlmoHybridGatedDeltaNet", explicit.delta_net),
    "RecurrentGemmaForCausalLM": ("RecurrentGemmaRecurrentBlock", explicit.rg_lru),
    "RwkvForCausalLM": ("RwkvSelfAttention", explicit.rwkv),
}


def mixer_of(model: Any, kind: str) -> Any:
    return next(m for _, m in components(model) if type(m).__name__ == kind)


def run(mixer: Any, u: Tensor) -> Tensor:
    """What a mixer gives, called as its block calls it."""
    if type(mixer).__name__ == "RecurrentGemmaRecurrentBlock":
        places = torch.arange(u.shape[1]).expand(u.shape[:2])
        out = mixer(u, places, None, use_cache=False)
    else:
        out = mixer(u)
    return out[0] if isinstance(out, tuple) else out


def noise(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compare(name: str, tolerance: float, length: int = 7, **changes: Any) -> None:
    kind, twin = TWINS[name]
    model = zoo.wrap(name, zoo.plain(name, changes=changes))
    mixer = mixer_of(model, kind)
    u = noise(2, length, model.cfg.d_model, seed=3)
    g = noise(2, length, model.cfg.d_model, seed=4)
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        leaf = u.clone().requires_grad_()
        out = run(mixer, leaf)
        out.backward(g)
    inner = mixer.original_component if kind == "GatedDeltaNetBridge" else mixer
    with torch.no_grad():
        expected_out, expected = twin(inner, u, lambda y: y * g)
    close = {"rtol": tolerance, "atol": tolerance * float(expected.abs().max())}
    torch.testing.assert_close(out.detach(), expected_out, **close)
    torch.testing.assert_close(u * leaf.grad, expected, **close)


@pytest.mark.parametrize("name", list(TWINS))
def test_a_mixer_is_its_twin(name: str) -> None:
    compare(name, 3e-6)


@pytest.mark.parametrize("name", list(TWINS))
def test_what_float32_rounds_is_all_that_is_apart(name: str) -> None:
    with zoo.Widened():
        compare(name, 1e-9)


VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FalconH1ForCausalLM", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    ("FalconH1ForCausalLM", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    ("Mamba2ForCausalLM", {"n_groups": 2, "time_step_limit": (0.0, 0.5)}),
    ("MambaForCausalLM", {"use_conv_bias": False, "use_bias": True}),
    ("OlmoHybridForCausalLM", {"linear_allow_neg_eigval": True}),
    ("Qwen3NextForCausalLM", {"linear_num_value_heads": 4, "linear_num_key_heads": 2}),
    ("Qwen3_5ForCausalLM", {"linear_num_value_heads": 4, "linear_num_key_heads": 2}),
    ("RwkvForCausalLM", {"num_hidden_layers": 5, "rescale_every": 2}),
    (
        "Zamba2ForCausalLM",  # two layers share one transformer
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    ),
)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("choice", ["constant", "uniform"])
def test_other_settings(name: str, changes: dict[str, Any], choice: Any) -> None:
    with zoo.Widened():
        compare(name, 1e-9, **changes)
    model = zoo.wrap(name, zoo.plain(name, changes=changes))
    logits = zoo.plain_logits(model)
    ruled, cache = zoo.explain(model, lenslrp.AttnLRP(recurrence=choice), [])
    assert torch.equal(ruled, logits)
    assert abs(cache.ledger().error) < 1e-6


@pytest.mark.parametrize("name", ["Mamba2ForCausalLM", "Qwen3NextForCausalLM"])
def test_several_chunks(name: str) -> None:
    with zoo.Widened():
        compare(name, 1e-9, length=70)


def half(x: Tensor) -> Tensor:
    return x.detach() + (x - x.detach()) / 2


def silu(x: Tensor) -> Tensor:
    """The identity rule: x times a constant."""
    return x * x.detach().sigmoid()


def uniform_mamba(mixer: Any, u: Tensor) -> Tensor:
    """Mamba's mixer under the uniform rule, as a function whose gradient is the rule's."""
    x, z = (u @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    values = silu(explicit.convolved(x, explicit.weight_of(mixer.conv1d)[:, 0], mixer.conv1d.bias))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step, written, read = (values @ mixer.x_proj.weight.T).split(sizes, dim=-1)
    step = torch.nn.functional.softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    decay = torch.exp(step[..., None] * -mixer.A_log.exp())
    written, read = step[..., None] * written[:, :, None], read[:, :, None].expand_as(decay)
    none = torch.zeros_like(mixer.D)
    scanned, _ = explicit.selective(half(values), half(decay), half(written), half(read), none)
    scanned = scanned + mixer.D * values  # a weight: no factor of the operator
    return (half(scanned) * half(silu(z))) @ mixer.out_proj.weight.T


def test_uniform_gives_half_to_values_and_half_to_the_operator_once() -> None:
    model = zoo.build("MambaForCausalLM")
    mixer = mixer_of(model, "MambaMixer")
    u, g = (noise(2, 7, model.cfg.d_model, seed=seed) for seed in (3, 4))
    grads = []
    with zoo.Widened():
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP(recurrence="uniform")):
            leaf = u.clone().requires_grad_()
            run(mixer, leaf).backward(g)
            grads.append(leaf.grad)
        leaf = u.clone().requires_grad_()
        uniform_mamba(mixer, leaf).backward(g)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def whole_mamba(model: Any, ids: Tensor, token: int) -> Tensor:
    """Relevance of every position for one logit at the last: residuals, norms, mixers, explicit."""
    backbone = model.original_model.backbone
    x = backbone.embeddings.weight.detach()[ids]
    residuals = [x]
    for block in backbone.layers:
        normed = norm_of(block.norm, x)
        x = x + explicit.mamba(block.mixer, normed, torch.zeros_like)[0]
        residuals.append(x)
    final, weight = norm_of(backbone.norm_f, x), model.original_model.lm_head.weight.detach()
    R = torch.zeros_like(x)
    R[:, -1] = final[:, -1] * weight[token]
    for block, x in reversed(list(zip(backbone.layers, residuals, strict=False))):
        normed = norm_of(block.norm, x)
        out, _ = explicit.mamba(block.mixer, normed, torch.zeros_like)
        ratio = R / (x + out)
        _, on_norm = explicit.mamba(block.mixer, normed, lambda y, ratio=ratio: y * ratio)
        R = x * ratio + on_norm
    return R.sum(-1)


def norm_of(norm: Any, x: Tensor) -> Tensor:
    epsilon = norm.original_component.variance_epsilon
    return explicit.normalised(x, explicit.weight_of(norm), epsilon)


@pytest.mark.parametrize("widened", [False, True])
def test_tokens_of_a_whole_mamba(widened: bool) -> None:
    model = zoo.build("MambaForCausalLM")
    with zoo.Widened() if widened else nullcontext():
        _, cache = zoo.explain(model, lenslrp.CPLRP(), [])
    with torch.no_grad():
        expected = whole_mamba(model, tokens(), 5)
    tolerance = 1e-9 if widened else 1e-6
    torch.testing.assert_close(cache.tokens, expected, rtol=tolerance, atol=tolerance)


def test_the_map_of_a_scan() -> None:
    """Each entry: the value at one position is scanned alone."""
    model = zoo.build("MambaForCausalLM")
    hooks = ("hook_scan_map", "hook_scan_out", "hook_scan_in")
    kept: dict[str, Tensor] = {}
    with zoo.Widened():
        _, cache = zoo.explain(model, lenslrp.AttnLRP(), [f"blocks.0.mixer.{h}" for h in hooks])
        handle = model.blocks[0].mixer.in_proj.hook_in.register_forward_hook(
            lambda _, args, x: kept.update(u=x.detach())
        )
        zoo.plain_logits(model)
        handle.remove()
    mixer, u = mixer_of(model, "MambaMixer"), kept["u"]
    with torch.no_grad():
        x, _ = (u @ mixer.in_proj.weight.T).chunk(2, dim=-1)
        c = explicit.convolved(x, explicit.weight_of(mixer.conv1d)[:, 0], mixer.conv1d.bias)
        values = torch.nn.functional.silu(c)
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        step, written, read = (values @ mixer.x_proj.weight.T).split(sizes, dim=-1)
        step = torch.nn.functional.softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
        decay = torch.exp(step[..., None] * -mixer.A_log.exp())
        operator = (step[..., None] * written[:, :, None], read[:, :, None].expand_as(decay))

        def scan(part: Tensor) -> Tensor:
            return explicit.selective(part, decay, *operator, mixer.D)[0]

        ratio = cache["blocks.0.mixer.hook_scan_out"] / scan(values)
        columns = []
        for s in range(u.shape[1]):
            alone = torch.zeros_like(values)
            alone[:, s] = values[:, s]
            columns.append((scan(alone) * ratio).sum(-1))
    expected = torch.stack(columns, -1)[:, None]
    close = {"rtol": 1e-6, "atol": 1e-6}  # the map is formed in the scan's own float32
    torch.testing.assert_close(cache["blocks.0.mixer.hook_scan_map"], expected, **close)
