"""Intercepting torch functions while a module runs; attention of Hugging Face made hookable by it.

Delegated attention fires ``hook_attn_scores`` and ``hook_pattern`` after the fact, where neither
an edit nor a rule has any effect. While such a module runs here, the call of its softmax is
intercepted and passed through the bridge's two hook points, and the product of pattern and values
gets its rule. The arithmetic stays the module's, call by call, so the forward pass is bit-identical
whatever the family.

Constants that the module adds to the scores (a relative-position bias, ALiBi) take relevance with
them: the ``positional`` term of the ledger, measured where they are added. So do constants that
queries or keys are multiplied with (DeBERTa's embeddings of relative positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from lenslrp.hooks.handles import Attached
from lenslrp.hooks.sites import Site, row_sums
from lenslrp.hooks.structure import original

SUM_FUNCTIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
MATRIX_PRODUCT_FUNCTIONS = frozenset({"matmul", "__matmul__", "bmm", "einsum"})


class Intercept(TorchFunctionMode):
    """Hands every call of a torch function to :meth:`intercept`, by the function's name."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.intercepts():
            return func(*args, **kwargs)
        return self.intercept(func, getattr(func, "__name__", ""), args, kwargs)

    def intercepts(self) -> bool:
        """Whether calls of the code that runs now are intercepted."""
        return True

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with whatever it needs before and after."""
        return func(*args, **kwargs)


class ScoreMeter(Intercept):
    """Accounts for what constants added to the scores of one attention module take.

    Args:
        qk: the site of Q@K^T, ``None`` where the pattern is constant.
        share: what queries and keys each get of the scores' gradient.
    """

    def __init__(self, qk: Site | None, share: float) -> None:
        super().__init__()
        self.qk, self.share = qk, share

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if name == "baddbmm":  # Bloom adds ALiBi in the product itself
            return self.metered(out, (args[0] * kwargs.get("beta", 1),))
        return self.metered(out, args) if name in SUM_FUNCTIONS else out

    def metered(self, y: Any, args: tuple[Any, ...]) -> Any:
        """Account for what a constant addend of the scores takes, when the gradient arrives."""
        site, share, addend = self.qk, self.share, constant_addend(y, args)
        if site is None or site.accounts is None or addend is None:
            return y

        def measure(g: Tensor) -> None:
            absorbed = row_sums(addend.expand(g.shape).to(g.dtype), g) / share
            site.report("positional", absorbed)
            # The product below gets what is left: subtract it from what the product reports.
            site.report("plain", -(1 - 2 * share) * absorbed)

        y.register_hook(measure)
        return y


def constant_addend(y: Any, args: tuple[Any, ...]) -> Tensor | None:
    """What is added to something on the graph, where it is not on the graph itself."""
    if not isinstance(y, Tensor) or y.ndim < 3 or not y.requires_grad:
        return None
    addends = [a.detach() for a in args if isinstance(a, Tensor) and not a.requires_grad]
    return addends[0] if len(addends) == 1 else None


class HookableAttention(ScoreMeter):
    """Intercepts the softmax of one attention module, what makes its scores and what follows it.

    Args:
        attn: whose hook points to call.
        at_product: gives the output of pattern @ values its rule.
        biases: accounts for what is added to queries, keys and values.
    """

    def __init__(
        self,
        attn: AttentionBridge,
        at_product: Callable[[Tensor], Tensor],
        qk: Site | None,
        share: float,
        biases: Site,
    ) -> None:
        super().__init__(qk, share)
        self.attn, self.at_product, self.biases = attn, at_product, biases
        self.has_scores = False
        self.learned = isinstance(original(attn), nn.MultiheadAttention)  # queries, when pooling
        self.pattern: Tensor | None = None
        self.passed_on: list[Tensor] = []  # the pattern after casts and dropout
        self.multiplied = False

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.pattern is None:
            # A router inside the attention has a softmax as well, over two dimensions.
            if name == "softmax" and isinstance(args[0], Tensor) and args[0].ndim > 2:
                scores = self.attn.hook_attn_scores(args[0])
                pattern = func(scores, *args[1:], **kwargs)
                _zero_fully_masked_rows(scores, pattern)
                self.pattern = self.attn.hook_pattern(pattern)
                self.passed_on.append(self.pattern)
                return self.pattern
            if name in SUM_FUNCTIONS:
                out = func(*args, **kwargs)
                return self.metered(out, args) if self.has_scores else self.biased(out, args)
            if name in MATRIX_PRODUCT_FUNCTIONS and not self.learned:
                return self.term(func, args, kwargs)
        elif not self.multiplied and name in MATRIX_PRODUCT_FUNCTIONS and self._multiplies(args):
            self.multiplied = True
            return self.at_product(func(*args, **kwargs))
        out = func(*args, **kwargs)
        follows_pattern = self.pattern is not None and bool(args) and self.is_pattern(args[0])
        if follows_pattern and isinstance(out, Tensor) and out.shape == args[0].shape:
            self.passed_on.append(out)
        return out

    def biased(self, y: Any, args: tuple[Any, ...]) -> Any:
        """Account for a constant added to queries, keys or values: a bias (DeBERTa's)."""
        site, addend = self.biases, constant_addend(y, args)
        if site.accounts is not None and addend is not None:
            y.register_hook(lambda g: site.report("biases", row_sums(addend.expand(g.shape), g)))
        return y

    def term(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product before the softmax: Q@K^T, or a term of the scores beside it.

        The other factor of such a term is a constant, embeddings of relative positions. It is a
        factor like any other: put on the graph, where it gets its share, which is `positional`.
        """
        tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        constants = [i for i in tensors if not args[i].requires_grad]
        if len(tensors) != 2 or not torch.is_grad_enabled() or len(constants) == 2:
            return func(*args, **kwargs)
        if not constants:
            self.has_scores = True
        if not constants or self.qk is None or args[constants[0]].ndim < 3:  # a weight
            return func(*args, **kwargs)
        factors, site = list(args), self.qk
        factors[constants[0]] = args[constants[0]].detach().requires_grad_()
        y = func(*factors, **kwargs)
        if site.accounts is not None:
            kept = y.detach()
            y.register_hook(lambda g: site.report("positional", row_sums(kept, g)))
        return y

    def is_pattern(self, value: Any) -> bool:
        """Whether a value is the pattern, as it is or cast."""
        return any(value is known for known in self.passed_on)

    def _multiplies(self, args: tuple[Any, ...]) -> bool:
        assert self.pattern is not None
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is None:
            return False
        shape, factor_shape = self.pattern.shape, first.shape
        return factor_shape.numel() == shape.numel() and factor_shape[-1] == shape[-1]


def _zero_fully_masked_rows(scores: Tensor, pattern: Tensor) -> None:
    """A query that sees no key (padding) has NaN for a pattern, which the model sets to 0 later.

    Softmax's own backward would turn the gradient of 0 into NaN there; it stays 0.
    """
    if scores.requires_grad:
        fully_masked = pattern.detach()[..., :1].isnan()  # all of a row, if any
        scores.register_hook(lambda g: g.masked_fill(fully_masked, 0.0))


def attach_hookable_attention(
    at: Attached,
    attn: AttentionBridge,
    at_product: Callable[[Tensor], Tensor],
    qk: Site | None,
    share: float,
    biases: Site,
) -> None:
    """Run the wrapped attention module, wherever the bridge calls it, as hookable attention."""
    inner = original(attn)
    if inner is None:
        return
    run = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with HookableAttention(attn, at_product, qk, share, biases) as mode:
            out = run(*args, **kwargs)
        if mode.pattern is None or not isinstance(out, tuple):
            return out
        # The bridge would fire the hooks a second time on the pattern that is handed out.
        return tuple(None if mode.is_pattern(item) else item for item in out)

    at.attribute(inner, "forward", forward)
    for config in _configs(inner):
        at.setting(config, "_attn_implementation", "eager")


class ProductIntercept(Intercept):
    """Gives the product of pattern and values, where the bridge computes it, its rule."""

    def __init__(self, at_product: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at_product = at_product
        self.pattern: Tensor | None = None

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if (
            self.pattern is not None
            and name in MATRIX_PRODUCT_FUNCTIONS
            and args[0].shape == self.pattern.shape
        ):
            self.pattern = None
            return self.at_product(out)
        return out


def attach_at_product(
    at: Attached, attn: AttentionBridge, at_product: Callable[[Tensor], Tensor]
) -> None:
    """The rule of A@V at the product itself, where ``o`` is not what follows it."""
    run = attn.forward
    running: list[ProductIntercept] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        with ProductIntercept(at_product) as mode:
            running[:] = [mode]
            return run(*args, **kwargs)

    def at_pattern(_: nn.Module, args: tuple[Any, ...], pattern: Tensor) -> None:
        running[0].pattern = pattern

    at.hook(attn.hook_pattern, at_pattern)
    at.attribute(attn, "forward", forward)


def attach_score_meter(at: Attached, attn: AttentionBridge, qk: Site, share: float) -> None:
    """Meter the scores of attention that the bridge computes itself with ALiBi."""
    run = attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with ScoreMeter(qk, share):
            return run(*args, **kwargs)

    at.attribute(attn, "forward", forward)


def _configs(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", "eager") not in ("eager", None):
            yield config
