"""Between the first kernel of the forward pass and the end of the backward pass the host does not
wait for the device more often than the bridge alone has it wait.

Every place where the host needs a number is an operation that a dispatch mode sees, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lenslrp
from tests.unit import tiny

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
"""Operations whose result, or its shape, the host has to know."""


class Waits(TorchDispatchMode):
    """Names of the operations that the host waits for, from the embedding on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.begun = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.begun = self.begun or name == "embedding"
        picks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if self.begun and (picks or name in WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host waits for in ``run`` up to the end of its backward pass."""
    ended: list[int] = []
    grad = torch.autograd.grad
    with Waits() as seen, monkeypatch.context() as patch:

        def noted(*args: Any, **kwargs: Any) -> Any:
            made = grad(*args, **kwargs)
            ended.append(len(seen.found))
            return made

        patch.setattr(torch.autograd, "grad", noted)
        run()
    (end,) = ended
    return seen.found[:end]


def bridge_alone(model: Any, tokens: Tensor, mask: Tensor) -> Callable[[], Any]:
    """A forward and a backward pass with the weights frozen."""

    def run() -> None:
        made: list[Tensor] = []

        def leaf(_: Any, args: Any, out: Tensor) -> Tensor:
            made.append(out.detach().requires_grad_())
            return made[-1]

        handle = model.embed.original_component.register_forward_hook(leaf)
        try:
            logits = model(tokens, attention_mask=mask, return_type="logits", use_cache=False)
            torch.autograd.grad(logits[:, -1, 5].sum(), made)
        finally:
            handle.remove()

    return run


@pytest.mark.parametrize(("dtype", "ledger"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("logits", ["all", "target"])
@pytest.mark.parametrize("attention", ["bridge", "fused"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "neox"])
def test_a_pass_waits_no_more_than_the_bridge(
    family: str,
    attention: str,
    dtype: torch.dtype,
    ledger: bool,
    logits: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.tiny(family).to(dtype)
    model.requires_grad_(False)
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, :2] = 0
    inner = model.original_model.config  # what transformers looks at for the mask differs
    with monkeypatch.context() as patch:
        patch.setattr(inner, "_attn_implementation", "sdpa" if attention == "fused" else "eager")
        plain = waits(bridge_alone(model, tiny.TOKENS, mask), monkeypatch)

    options: dict[str, Any] = {"attention": attention, "ledger": ledger, "logits": logits}
    with lenslrp.session(model, **options) as session:

        def run() -> None:
            session.run_with_relevance(tiny.TOKENS, 5, reduce="sum", attention_mask=mask)

        with Waits():  # what is looked at once has been; under a mode some operations are others
            run()
        assert sorted(waits(run, monkeypatch)) == sorted(plain)


def test_a_question_to_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter of this file: a hook that reads one number is one wait."""
    model = tiny.tiny("llama")
    point = model.blocks[0].hook_mlp_out
    handle = point.register_forward_hook(lambda _, args, y: y * float(y.isfinite().all()))
    try:
        run = bridge_alone(model, tiny.TOKENS, torch.ones_like(tiny.TOKENS))
        assert waits(run, monkeypatch) == ["_local_scalar_dense"]
    finally:
        handle.remove()
