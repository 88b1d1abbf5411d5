"""Conditional relevance: only what passes through chosen units (CRP; Achtibat et al. 2023).

Units at one hook point are alternatives (OR); hook points are requirements (AND). At a hook point
with a condition the gradient of every other unit is set to zero. In a transformer relevance would
still get past the layer along the residual stream, so the stream is cut there too: of what arrives
at the stream in front of that layer's branch, only what came through the branch goes on. Above the
highest condition relevance is as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lenslrp.analysis.units.kinds import Head, Neuron, Unit
from lenslrp.edits import edit_gradient
from lenslrp.errors import InputError
from lenslrp.graph_check import conditional
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import converted, reverted
from lenslrp.hooks.structure import components, layer_of
from lenslrp.hooks.turns import turn
from lenslrp.running import undone

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def through(model: TransformerBridge, units: Sequence[Unit]) -> Iterator[None]:
    """Inside the block, backward passes count relevance through ``units`` only.

    Concept relevance propagation (CRP; Achtibat et al. 2023, arXiv:2206.03208). Use it around
    `lenslrp.run_with_relevance` with ``ledger=False``: what was cut is on purpose not accounted
    for. At the condition's own hook point all units are still read; take the chosen ones there.

    Args:
        model: a ``TransformerBridge``.
        units: `Neuron` and `Head` of decoder blocks. Units at one hook point are alternatives,
            hook points are requirements.

    Raises:
        InputError: another kind of unit, or a block whose branches cannot be told apart.

    Examples:
        ```python
        with through(model, [Head(5, 2)]):
            _, R = lenslrp.run_with_relevance(model, prompt, ledger=False)
        R.tokens  # [1, pos], in logits: what of the target passed through head 5.2
        ```
    """
    chosen: dict[str, list[int]] = {}
    for unit in units:
        if not isinstance(unit, Neuron | Head) or getattr(unit, "expert", None) is not None:
            raise InputError(f"a condition is a Neuron of a dense MLP or a Head, not {unit}")
        chosen.setdefault(unit.hook(model), []).append(unit.index)
    points = hook_points(model, components(model))
    with turn(model), undone(Attached()) as at:
        for hook, indices in chosen.items():
            cut = _StreamCut(hook)
            cut.attach(model, at)
            at.hook(points[hook], _only(indices, cut))
        with conditional(model):
            yield


class _StreamCut:
    """In front of one branch, passes on what came through the branch and nothing else."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.ran = False  # since the condition's own hook point last fired

    def attach(self, model: TransformerBridge, at: Attached) -> None:
        prefix, branch, _ = self.hook.rsplit(".", 2)
        if layer_of(self.hook) is None:
            raise InputError(f"{self.hook} is in no block: no condition can be put there")
        parts: dict[str, Any] = model.get_submodule(prefix)._modules
        norm = "ln2" if branch == "mlp" and "ln2" in parts else "ln1"
        if parts.get(norm) is None:
            raise InputError(f"{self.hook}: no norm stands before this branch, so no condition")
        at.pre_hook(parts[norm], self._before, with_kwargs=True)
        if "ln2" not in parts:  # one norm serves both branches: the other one must not pass
            other = parts["attn" if branch == "mlp" else "mlp"]
            at.hook(other.hook_out, _nothing)

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.ran = True
        index = next((i for i, x in enumerate(args) if isinstance(x, Tensor)), None)
        x = args[index] if index is not None else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or not x.requires_grad:
            return None
        through_branch: list[Tensor] = []
        view = x.view_as(x)
        edit_gradient(view, through_branch.append)
        edit_gradient(x, lambda g: through_branch.pop() if through_branch else torch.zeros_like(g))
        if index is None:
            return args, {**kwargs, "hidden_states": view}
        return (*args[:index], view, *args[index + 1 :]), kwargs


def _nothing(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:
        edit_gradient(out, torch.zeros_like)


def _only(indices: list[int], cut: _StreamCut) -> Any:
    """Let the gradient of the chosen units pass, and no other."""

    def hook(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        if not cut.ran:
            raise InputError(
                f"{cut.hook}: the norm of this branch stands behind it (a post-norm block), where "
                "the residual stream cannot be cut: no condition"
            )
        cut.ran = False
        if not out.requires_grad:
            return
        conversion = getattr(module, "hook_conversion", None)

        def mask(g: Tensor) -> Tensor:
            by_unit = converted(module, g)
            keep = torch.zeros(by_unit.shape[-1 if conversion is None else 2], device=g.device)
            keep[indices] = 1
            kept = by_unit * (keep if conversion is None else keep[:, None]).to(g)
            return reverted(module, kept).reshape(g.shape)

        edit_gradient(out, mask)

    return hook
