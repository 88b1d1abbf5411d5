"""Models spread over several devices, as ``n_devices`` and ``device_map`` do it.

Without accelerators the second device is simulated (:mod:`tests.conformance.elsewhere`): tensors
with values that say where they are, under torch's own rule that an operation's tensors are on one
device. So whatever combines tensors of different layers without moving them fails here as it would
there. The tests on CUDA run the same through ``n_devices=2`` where there are two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lenslrp
from lenslrp import targets
from lenslrp.hooks import Gamma
from lenslrp.hooks.linear_rules import Epsilon
from lenslrp.hooks.sites import Accounts, Site
from lenslrp.passes import _total
from tests.conformance.elsewhere import Elsewhere, devices, place
from tests.conformance.families import make, tokens
from tests.unit.tiny import FAMILIES, changes, snapshot

FIRST, SECOND = torch.device("cpu:0"), torch.device("cpu:1")
MIDDLE, LAST = "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "top": (None, {}),
    "logit for each row": ([targets.Logit(5), targets.LogProb(6)], {}),
    "latent": (targets.Activation(LAST, 3), {}),
    "latent for each row": ([targets.Activation(MIDDLE, 3), targets.Activation(LAST, 3)], {}),
    "sequence": (targets.Sequence((4, 5, 6)), {}),
    "contrastive": (targets.Contrastive(5, top_k=3), {}),
    "checkpoint": (5, {"checkpoint": True}),
    "gamma": (5, {"composite": {"linear": Gamma(0.2), "projection": Gamma(0.1)}}),
    "GIM": (5, {"composite": lenslrp.GIM()}),
    "plain": (5, {"composite": lenslrp.GradientTimesInput()}),
    "reduced": (5, {"reduce": "sum"}),
}


def moved_to(device: torch.device) -> Callable[..., Any]:
    """A forward hook that brings all inputs to a device, as accelerate's do."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, (args, kwargs))

    return hook


def spread(model: Any, *, back: bool) -> Any:
    """Embeddings and the first block on one device, all above on another; ``back``: logits too."""
    above = [model.blocks[1], model.ln_final, model.unembed]
    place(model, FIRST)
    model.blocks[0].register_forward_pre_hook(moved_to(FIRST), with_kwargs=True, prepend=True)
    for part in above:
        place(part, SECOND)
        part.register_forward_pre_hook(moved_to(SECOND), with_kwargs=True, prepend=True)
    if back:  # accelerate returns a model's output where its input came from
        model.unembed.register_forward_hook(lambda _, args, y: y.to(FIRST))
    model.cfg.device = FIRST
    return model


def values(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


@pytest.mark.parametrize("back", [True, False], ids=["output moved back", "output left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_two_devices_give_what_one_gives(family: str, back: bool) -> None:
    """Every value equal to the last bit, on the device of its own layer; the ledger closed."""
    single = make(family)
    expected = {
        name: lenslrp.run_with_relevance(single, tokens(), target, **options)
        for name, (target, options) in CASES.items()
    }
    model = make(family)
    with devices():
        model = spread(model, back=back)
        for name, (target, options) in CASES.items():
            logits, found = lenslrp.run_with_relevance(model, tokens(), target, **options)
            reference, cache = expected[name]
            assert torch.equal(values(logits), reference), name
            assert torch.equal(values(found.tokens), cache.tokens), name
            assert found.tokens.device == FIRST
            assert set(found) == set(cache)
            for hook in cache:
                assert torch.equal(values(found[hook]), cache[hook]), (name, hook)
            assert found.ledger().to_dict() == pytest.approx(cache.ledger().to_dict(), abs=1e-12)
            if name == "top":
                assert found["blocks.0.mlp.hook_post"].device == FIRST
                assert found["blocks.1.mlp.hook_post"].device == SECOND
                pandas = found.heads(), found.residual(), found.top("mlp.hook_post", k=3)
                assert all(len(table) for table in pandas)


def test_the_simulated_device_is_a_device() -> None:
    """What an accelerator refuses is refused."""
    with devices():
        a, b = (Elsewhere(torch.ones(3), device) for device in (FIRST, SECOND))
        with pytest.raises(RuntimeError, match="same device"):
            a + b
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([a, b])
        assert (a + b.to(FIRST)).device == FIRST
        assert torch.zeros(2, device=SECOND).device == SECOND
        leaf = a.clone().requires_grad_()
        (leaf.to(SECOND) * b).sum().backward()
        assert leaf.grad is not None and leaf.grad.device == FIRST


def test_books_of_a_layer_on_two_devices() -> None:
    books = Accounts()
    site = Site("blocks.0.mlp", "Linear", "linear", Epsilon(), 0)
    with devices():
        for device in (FIRST, SECOND):
            books.add("biases", site, Elsewhere(torch.ones(2), device))
        (total,) = books.terms.values()
        assert (float(total), total.device) == (4.0, FIRST)


def test_leaves_on_two_devices() -> None:
    """Two embeddings that make one token's vector, each where its weights are."""
    with devices():
        parts = [Elsewhere(torch.full((1, 2), float(i)), d) for i, d in ((1, FIRST), (2, SECOND))]
        total = _total(parts)
    assert total is not None
    assert (values(total).tolist(), total.device) == ([[3.0, 3.0]], FIRST)


def test_offloaded_weights_are_refused_by_name() -> None:
    """They are on the meta device between calls, where no rule can read them."""
    model = make("llama")
    cpu_offload(model.original_model, execution_device=torch.device("cpu"))
    before = snapshot(model)
    with pytest.raises(lenslrp.InputError, match=r"weights of .* are offloaded.*device_map"):
        lenslrp.run_with_relevance(model, tokens(), 5)
    assert changes(before, model) == []


# ------------------------------------------------------------------------------------ on CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="n_devices=2 needs two CUDA devices"
)


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"attention": "fused"}, {"checkpoint": True}], ids=str)
def test_one_cuda_device(options: dict[str, Any]) -> None:
    expected = lenslrp.run_with_relevance(make("llama"), tokens(), 5, **options)[1]
    model = make("llama")
    model.to("cuda")
    found = lenslrp.run_with_relevance(model, tokens(), 5, **options)[1]
    assert found.tokens.device.type == "cuda"
    torch.testing.assert_close(found.tokens.cpu(), expected.tokens, rtol=1e-5, atol=1e-6)
    assert abs(found.ledger().error) < 1e-6


@needs_two
@pytest.mark.real
@pytest.mark.parametrize("options", [{}, {"attention": "fused"}, {"checkpoint": True}], ids=str)
def test_two_cuda_devices(options: dict[str, Any]) -> None:
    """``lenslrp.load(..., n_devices=2)``: the same relevance as on one."""
    prompt = "The Eiffel Tower is located in the city of"
    single = lenslrp.load("smollm2-135m", device="cuda:0")
    expected = lenslrp.run_with_relevance(single, prompt, " Paris", reduce="sum", **options)[1]
    model = lenslrp.load("smollm2-135m", n_devices=2)
    placed = {str(p.device) for p in model.original_model.parameters()}
    assert placed == {"cuda:0", "cuda:1"}
    found = lenslrp.run_with_relevance(model, prompt, " Paris", reduce="sum", **options)[1]
    cosine = torch.cosine_similarity(found.tokens.cpu(), expected.tokens.cpu(), dim=1)
    assert float(cosine) > 1 - 1e-6
    assert abs(found.ledger().error) < 1e-3
    hook = "blocks.29.hook_resid_post"
    torch.testing.assert_close(found[hook].cpu(), expected[hook].cpu(), rtol=1e-3, atol=1e-4)


@needs_two
def test_a_model_in_memory_over_two_cuda_devices() -> None:
    plain = FAMILIES["llama"]().double().eval()
    single = lenslrp.load(copy.deepcopy(plain))
    expected = lenslrp.run_with_relevance(single, tokens(), 5)[1]
    model = lenslrp.load(plain, n_devices=2)
    placed = {str(p.device) for p in model.original_model.parameters()}
    assert placed == {"cuda:0", "cuda:1"}
    found = lenslrp.run_with_relevance(model, tokens(), 5)[1]
    torch.testing.assert_close(found.tokens.cpu(), expected.tokens, rtol=1e-5, atol=1e-6)
