"""Sums of products that are formed in pieces and shared, and norms that save their scale alone."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lenslrp
from lenslrp.hooks import checks, norms, sites
from lenslrp.hooks import functions as F
from lenslrp.hooks.rule_types import Identity, Normalisation
from lenslrp.hooks.sites import Site, dots, row_sums
from tests.unit import tiny

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    sites.forget_products()
    yield
    sites.forget_products()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------- sums of products


@pytest.mark.parametrize("piece", [1, 40, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7), (3, 2, 5, 7)])
def test_pieces_are_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "PRODUCTS_AT_ONCE", piece)
    x, g = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype)
    wide = torch.float32 if dtype in HALF else dtype
    made = dots(x, g)
    assert (made.dtype, made.shape) == (wide, shape[:-1])
    torch.testing.assert_close(made, (x.to(wide) * g.to(wide)).sum(dim=-1))
    sums = (x.double() * g.double()).reshape(len(x), -1).sum(dim=1)
    torch.testing.assert_close(row_sums(x, g), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_widened_is_a_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "PRODUCTS_AT_ONCE", 64)
    sizes: list[int] = []
    widened = sites.widened
    monkeypatch.setattr(sites, "widened", lambda x: sizes.append(x.numel()) or widened(x))
    row_sums(noise(2, 3, 16, 32, dtype=dtype), noise(2, 3, 16, 32, seed=1, dtype=dtype))
    assert max(sizes) <= 64


def test_what_is_masked_counts_nothing() -> None:
    x, g = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    x[0, 0, 1:], g[0, 0, 1:] = -torch.inf, 0.0
    x[1, 2], g[1, 2] = torch.nan, 0.0
    sums = torch.where(g == 0, 0.0, x.double() * g.double()).sum(dim=(1, 2))
    torch.testing.assert_close(row_sums(x, g), sums, rtol=1e-6, atol=1e-6)
    assert row_sums(x, g, masked=False).isnan().all()
    assert row_sums(noise(1, 3), torch.full((1, 3), torch.nan)).isnan().all()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Fills with the activations of the products that are really formed."""
    formed: list[Tensor] = []
    plain = sites._dots

    def noted(x: Tensor, g: Tensor, masked: bool) -> Tensor:
        formed.append(x)
        return plain(x, g, masked)

    monkeypatch.setattr(sites, "_dots", noted)
    return formed


def test_one_pair_is_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = counted(monkeypatch)
    x, g = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    assert dots(x, g) is dots(x.detach(), g)
    row_sums(x, g, masked=False)
    assert len(formed) == 1
    dots(x, g, masked=True)  # another sum where x is not finite
    assert len(formed) == 2


@pytest.mark.parametrize("change", ["activation", "gradient", "view"])
def test_another_pair_is_multiplied_anew(change: str) -> None:
    x, g = noise(2, 4, 4), noise(2, 4, 4, seed=1)
    dots(x, g)
    if change == "view":
        x = x.transpose(1, 2)
    else:
        (x if change == "activation" else g).mul_(3.0)
    torch.testing.assert_close(dots(x, g), (x * g).sum(dim=-1))


def test_memory_used_anew_is_not_taken_for_what_was_there() -> None:
    g, addresses = noise(2, 4096), set()
    for seed in range(20):
        x = noise(2, 4096, seed=seed)
        addresses.add(x.data_ptr())
        torch.testing.assert_close(dots(x, g), (x * g).sum(dim=-1))
        del x
    assert len(addresses) < 20  # the allocator does hand out the same memory


def test_no_gradient_is_kept_alive() -> None:
    x, g = noise(2, 4), noise(2, 4, seed=1)
    dots(x, g)
    gone = ref(g)
    del g
    gc.collect()
    assert gone() is None


def test_site_and_reader_share_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's watch, its readers and the pattern's site ask for what is there already."""
    model = tiny.tiny("llama").to(torch.float32)
    formed = counted(monkeypatch)
    asked: list[tuple[int, int]] = []
    plain = sites.dots

    def noted(x: Tensor, g: Tensor, *, masked: bool = False) -> Tensor:
        asked.append((x.data_ptr(), g.data_ptr()))
        return plain(x, g, masked=masked)

    monkeypatch.setattr(sites, "dots", noted)
    monkeypatch.setattr("lenslrp.reductions.dots", noted)
    _, shared = lenslrp.run_with_relevance(model, tiny.TOKENS, 5, reduce="sum")
    assert len(formed) < 0.8 * len(asked)
    formed.clear()
    asked.clear()
    monkeypatch.setattr(sites, "_recent", deque(maxlen=0))
    _, apart = lenslrp.run_with_relevance(model, tiny.TOKENS, 5, reduce="sum")
    assert len(formed) == len(asked)
    for name in apart.values:
        assert torch.equal(shared[name], apart[name])
    assert shared.ledger().to_dict() == apart.ledger().to_dict()
    assert not sites._recent


# ------------------------------------------------------------------------------------- norms


class Twisted(LlamaRMSNorm):
    """A user's: another power of the same thing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def module(cls: type[nn.Module], eps: float = 1e-5) -> Any:
    norm: Any = cls(16, eps=eps)
    with torch.no_grad():
        norm.weight.add_(noise(16, seed=2) * 0.3)
    return norm.requires_grad_(False)


FORMS: dict[type[nn.Module], str] = {
    LlamaRMSNorm: "weight",
    T5LayerNorm: "weight",
    Gemma2RMSNorm: "1 + weight",
    nn.RMSNorm: "weight",
    Twisted: "exact",
}


@pytest.mark.parametrize("cls", FORMS)
def test_form_of_a_norm(cls: type[nn.Module]) -> None:
    norm, x = module(cls), noise(2, 5, 16)
    assert checks.norm_form(norm, norm.forward, x, norm(x), Normalisation(), None) == FORMS[cls]


def test_form_of_an_activation_in_any_layout() -> None:
    """In float32, erf rounds otherwise in a vector of numbers than alone."""
    gelu, x = nn.GELU(), torch.linspace(-6, 6, 4032).view(2, 12, 168).transpose(1, 2)
    for given in (x, x.contiguous(), x.transpose(1, 2)):
        checks._proven.pop(gelu, None)
        assert checks.form_of(gelu, gelu.forward, given, gelu(given)) == "exact"


def test_a_norm_with_another_small_number_is_no_such_norm() -> None:
    """The number in the attribute is not the one that is added."""
    norm, x = module(LlamaRMSNorm), noise(2, 5, 16)
    norm.eps, norm.variance_epsilon = norm.variance_epsilon, 4e-5
    y = norm(x)
    checks._proven.pop(norm, None)
    names = checks.EPSILON_NAMES
    try:
        checks.EPSILON_NAMES = names[::-1]
        assert checks.norm_form(norm, norm.forward, x, y, Normalisation(), None) == "exact"
    finally:
        checks.EPSILON_NAMES = names


@pytest.mark.parametrize("cls", [LlamaRMSNorm, Gemma2RMSNorm])
def test_the_slim_norm_is_the_rule_of_its_values(cls: type[nn.Module]) -> None:
    norm, x, g = module(cls), noise(2, 5, 16) * 1e-2, noise(2, 5, 16, seed=1)
    y, site = norm(x), Site("norm", "Norm", "norm", Normalisation(), None)
    gradients = []
    for slim in (True, False):
        leaf = x.clone().requires_grad_()
        if slim:
            out = norms._slim(norm, FORMS[cls], leaf, y, site)
            assert out is not None
            saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
            assert [tuple(t.shape) for t in saved] == [(2, 5, 1), (16,)]
        else:
            out = F.apply(F.Elementwise, leaf, y, Identity(), site)
        gradients += torch.autograd.grad(out, leaf, g)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_in_float64_the_values_of_the_norm_have_the_say() -> None:
    norm, x = module(LlamaRMSNorm), noise(2, 5, 16, dtype=torch.float64)
    site = Site("norm", "Norm", "norm", Normalisation(), None)
    assert norms._slim(norm, "weight", x, norm(x), site) is None


# ------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), hf.activations.QuickGELUActivation()])
def test_an_activation_passes_everything_on(act: nn.Module) -> None:
    """x times the gradient is y times g, without a stabiliser, and 0 stays 0."""
    x, g = noise(3, 8, dtype=torch.float64), noise(3, 8, seed=1, dtype=torch.float64)
    x[0, 0], x[1, 1] = 0.0, 1e-30
    site = Site("act", "Act", "activation", Identity(), None)
    apply = checks.elementwise(act, Identity(), site)
    leaf = x.clone().requires_grad_()
    out = apply(leaf, act(x))
    assert out is not None
    (at_x,) = torch.autograd.grad(out, leaf, g)
    torch.testing.assert_close(x * at_x, act(x) * g, rtol=1e-12, atol=0.0)
    assert at_x.isfinite().all()
