"""Every architecture does what ``docs/reference/architectures.md`` says of it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

import lenslrp
from lenslrp import media
from lenslrp.hooks import UNIFORM, Plain
from lenslrp.hooks.components import attach_all_cycles, hook_points
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import ON_REQUEST
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.sites import LEDGER_TERMS
from lenslrp.hooks.structure import components
from tests.conformance import zoo
from tests.conformance.zoo_configs import family
from tests.unit.tiny import changes, snapshot

ROWS = {row.name: row for row in zoo.read()}
COVERED = [name for name, row in ROWS.items() if row.result == "covered"]
NATIVE = [name for name in COVERED if name in SUPPORTED_ARCHITECTURES]
REFUSED = [name for name, row in ROWS.items() if row.result == "refused"]
UNLOADED = [name for name in REFUSED if not ROWS[name].bridge]

# transformers and TransformerLens warn about settings of single architectures; ours stay errors.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_table_has_every_architecture() -> None:
    assert list(ROWS) == [*zoo.registered(), *zoo.offered()]
    assert zoo.DOCUMENT.read_text(encoding="utf-8") == zoo.write(list(ROWS.values()))
    assert {row.result for row in ROWS.values()} <= {"covered", "refused", "untested"}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in UNLOADED])
def test_the_bridge_is_the_model(name: str) -> None:
    """Its outputs, with an image or a sound where one is read, and the ids that a text becomes."""
    limit = 1e-6 if family(name) in zoo.FORWARD_FLOAT32 else 1e-9
    found = zoo.apart(name)
    assert max(found.values()) <= limit, found
    model = zoo.build(name)
    assert media.reads_no_text(model) or zoo.same_ids(model)
    said = ROWS[name].bridge
    assert ("float32 inside" in said) == (family(name) in zoo.FORWARD_FLOAT32)
    assert ("same ids" in said) != media.reads_no_text(model)
    assert all(f"with {kind}" in said for kind in found if kind)


@pytest.mark.parametrize("name", sorted(zoo.FORWARD_FLOAT32))
def test_what_hugging_face_rounds_is_all_that_is_apart(name: str) -> None:
    with zoo.Widened():
        assert max(zoo.apart(name).values()) <= 1e-12


@pytest.mark.parametrize("settings", list(zoo.DIFFERING))
def test_what_transformer_lens_computes_otherwise_is_refused(settings: str) -> None:
    name, changes = zoo.DIFFERING[settings]
    with pytest.raises(lenslrp.LoadError, match="is refused after a short pass|cannot bridge this"):
        zoo.wrap(name, zoo.plain(name, changes=changes))


@pytest.mark.parametrize("name", COVERED)
def test_covered(name: str) -> None:
    """Forward identity, coverage, ledger, every hook readable or said to be off the path, undo."""
    model = zoo.build(name)
    logits = zoo.plain_logits(model)
    before = snapshot(model)
    scans = bool(mixers(components(model)))
    composites = [lenslrp.AttnLRP(), lenslrp.CPLRP(), lenslrp.GradientTimesInput()]
    if name.startswith(zoo.GATED):
        with pytest.raises(lenslrp.CoverageError, match="no rule for Sigmoid in blocks.0.attn"):
            zoo.explain(model, composites.pop(), [])
    for composite in composites:
        ruled, cache = zoo.explain(model, composite)
        assert torch.equal(ruled, logits) or family(name) in zoo.ROUNDS
        assert cache.coverage.uncovered == []
        ledger = cache.ledger()
        # Plain gradients through a scan in float32 are much larger than the target: rounding
        # goes by the largest entry.
        plain = scans and composite == lenslrp.GradientTimesInput()
        missed = ledger.imbalance if plain else abs(ledger.error)
        assert missed <= zoo.tolerance(name), str(ledger)
        entries = (ledger.target, ledger.leaves, *(getattr(ledger, term) for term in LEDGER_TERMS))
        near = zoo.tolerance(name) * max(1.0, *(abs(entry) for entry in entries))
        rows = ledger.table["error"]
        if (
            family(name) == "OpenAIGPTLMHeadModel"
        ):  # one activation for all layers, booked in the first
            rows = pd.Series([rows.sum()])
        assert float(rows.abs().max()) <= near, str(ledger.table)
        read = {hook for hook in cache if bool(torch.isfinite(cache[hook]).all())}
        points = {
            name for name in hook_points(model, components(model)) if not name.endswith(ON_REQUEST)
        }
        assert read | set(cache.coverage.off_path) == points
        assert read
    assert changes(before, model) == []
    model.requires_grad_(False)  # as its weights are under rules
    assert torch.equal(zoo.plain_logits(model), ruled)


@pytest.mark.parametrize("name", sorted(zoo.FLOAT32))
def test_what_float32_rounds_is_all_that_is_missed(name: str) -> None:
    assert name in COVERED
    model = zoo.build(name)
    for composite in (lenslrp.AttnLRP(), lenslrp.GradientTimesInput()):
        with zoo.Widened():
            _, cache = zoo.explain(model, composite, [])
        assert abs(cache.ledger().error) <= 1e-12, str(cache.ledger())


@pytest.mark.parametrize("name", NATIVE)
def test_plain_gradients_are_those_of_calculus(name: str) -> None:
    """Gradient x Input at the leaves against a pass without any rule: nothing is cut on the way."""
    model = zoo.build(name)
    if media.reads_no_text(model):
        pytest.skip("tests/conformance/core/test_images.py has them")
    _, cache = zoo.explain(model, lenslrp.GradientTimesInput(), [])
    if name == "HrmTextForCausalLM":  # which runs most of its cycles without gradients
        attach_all_cycles(Attached(), model.original_model.model)
    leaves, logits = zoo.plain_leaves(model)
    total = logits[:, -1, 5].sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    arrived = sum(float((x * g).sum()) for x, g in zip(leaves, grads, strict=True) if g is not None)
    assert cache.ledger().leaves == pytest.approx(arrived, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", COVERED)
def test_cp_conserves_without_biases(name: str) -> None:
    """At the leaves, and at every residual hook where one stack carries the whole flow."""
    model = zoo.build(name, bias=False)
    _, cache = zoo.explain(model, lenslrp.CPLRP(), is_residual)
    ledger = cache.ledger()
    started = ledger.target - ledger.nonlinear_target  # before a final soft-cap
    near = zoo.tolerance(name) * max(1.0, abs(started))
    if family(name) == "GptOssForCausalLM":  # each expert adds 1 to its `up`
        started -= ledger.biases
    assert abs(ledger.leaves - started) <= near, str(ledger)
    if ledger.table.index[0] != "all" and family(name) != "GptOssForCausalLM":
        for hook in cache:
            assert abs(float(cache[hook].sum()) - started) <= near, hook


def is_residual(hook: str) -> bool:
    return hook.endswith(("hook_resid_pre", "hook_resid_post"))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in NATIVE for dtype in DTYPES]
    + [(name, torch.bfloat16) for name in COVERED if name not in NATIVE],
    ids=str,
)
def test_the_forward_pass_is_untouched(name: str, dtype: torch.dtype) -> None:
    if family(name) in zoo.NOT_IN_16_BITS and dtype != torch.float32:
        with pytest.raises(lenslrp.LoadError, match=zoo.NOT_IN_16_BITS[family(name)]):
            zoo.build(name, dtype)
        return
    model = zoo.build(name, dtype)
    logits = zoo.plain_logits(model)
    context: Any = lenslrp.relevance_rules(model, lenslrp.AttnLRP())
    with context:
        ruled = zoo.plain_logits(model)
    if family(name) in zoo.ROUNDS:
        model.requires_grad_(False)
        logits = zoo.plain_logits(model)
    assert torch.equal(ruled, logits)


BETWEEN: dict[str, Any] = {
    "gate uniform": {"attention_gate": UNIFORM},
    "gate and softmax plain": {"attention_gate": Plain(), "softmax": Plain()},
    "norm plain": {"norm": Plain()},
}


@pytest.mark.parametrize(
    "name", ["AfmoeForCausalLM", "BitNetForCausalLM", "HrmTextForCausalLM", "LagunaForCausalLM"]
)
@pytest.mark.parametrize("rules", list(BETWEEN))
def test_what_stands_between_values_and_o_has_a_rule_of_its_own(name: str, rules: str) -> None:
    """A gate or a norm there: the half rule of A@V stays at the product, below it."""
    _, cache = zoo.explain(zoo.build(name), BETWEEN[rules], [])
    assert abs(cache.ledger().error) <= zoo.tolerance(name), str(cache.ledger())
    if rules == "gate uniform" and name != "BitNetForCausalLM":
        _, constant = zoo.explain(zoo.build(name), lenslrp.AttnLRP(), [])
        assert not torch.allclose(cache.tokens, constant.tokens, rtol=1e-3)


def test_a_point_that_fires_for_two_lengths_has_both() -> None:
    """T5Gemma 2 projects what its decoder and its encoder see to keys with one matrix."""
    model = zoo.build("T5Gemma2ForConditionalGeneration")
    point = "decoder_blocks.1.self_attn.hook_k"
    kept: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[(point, lambda x, hook: kept.append(x.detach()))]):
        zoo.plain_logits(model)
    _, cache = zoo.explain(model, lenslrp.AttnLRP(), [point])
    lengths = [x.shape[1] for x in kept]
    assert lengths == [4, 7]  # of the decoder, then of the encoder
    assert cache[point].shape[1] == sum(lengths)


def test_gemma_4_has_relevance_at_the_embedding_of_each_layer() -> None:
    model = zoo.build("Gemma4ForCausalLM")
    _, cache = zoo.explain(model, lenslrp.AttnLRP(), [])
    assert float(cache.tokens.sum()) == pytest.approx(cache.ledger().leaves, rel=1e-9)
    assert not torch.allclose(cache.tokens, cache.embeddings.sum(dim=-1), rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    if name in UNLOADED:
        with pytest.raises(lenslrp.LoadError, match=name):
            zoo.build(name)
        return
    model = zoo.build(name)
    with pytest.raises(lenslrp.CoverageError) as caught:
        zoo.explain(model, lenslrp.AttnLRP(), [])
    assert name in str(caught.value)
    assert (
        " in " in str(caught.value) or " below " in str(caught.value) or " at " in str(caught.value)
    )
