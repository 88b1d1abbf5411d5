"""Other features that can be taken away: attention heads, MLP neurons, patches of an image.

The latent version of a perturbation test: relevance at ``hook_z`` or ``mlp.hook_post`` says which
heads and neurons the target needs, so switching them off in that order must show it. Features are
laid out as ``R.heads()`` is, layer by layer, so ``R.heads().to_numpy()`` is their relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lenslrp.analysis.common.statistics import Numbers
from lenslrp.analysis.evaluation.features import TOKENS_PER_PASS, Features, Masks
from lenslrp.analysis.passes.problems import resolve
from lenslrp.analysis.passes.prompts import (
    ExplainedPrompt,
    Values,
    image_logits,
    prompt_logits,
    target_values,
)
from lenslrp.analysis.units.locations import head_hooks, require_readable_heads
from lenslrp.edits import Edit
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.readers import select_names
from lenslrp.hooks.structure import components, layer_of
from lenslrp.inputs import is_encoder_decoder
from lenslrp.running import architecture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

IMAGES_PER_PASS = 16


def heads_of(model: TransformerBridge, prompt: ExplainedPrompt) -> Features:
    """Heads, [layer x head]: a head that is gone writes nothing at any position.

    Attention's and those of recurrent mixers, as in `RelevanceCache.heads`.

    Args:
        model: a ``TransformerBridge`` of one stack.
        prompt: from `as_prompt`.

    Raises:
        InputError: an encoder-decoder, or attention without heads at ``hook_z``, also beside
            recurrent mixers.

    Examples:
        ```python
        features = heads_of(model, prompt)  # size: layers * heads, in the order of R.heads()
        curves(features, {"attnlrp": unit_relevance(R, "attn.hook_z")})
        ```
    """
    parts = components(model)
    require_readable_heads(parts)
    names = head_hooks(hook_points(model, parts))
    if not names:
        raise InputError(f"{architecture(model)} has no heads at attn.hook_z or hook_scan_out")
    return _units(model, prompt, names, 4)


def neurons_of(model: TransformerBridge, prompt: ExplainedPrompt) -> Features:
    """MLP neurons, [layer x neuron]: one that is gone is 0 at every position."""
    points = hook_points(model, components(model))
    return _units(model, prompt, select_names(points, "mlp.hook_post")[0], 3)


def unit_relevance(cache: Any, name: str) -> Numbers:
    """Relevance of every unit, summed over positions: [layer x unit], as the features are.

    Args:
        cache: a `lenslrp.RelevanceCache` of one input, with the hook points read whole.
        name: ``"attn.hook_z"`` or ``"mlp.hook_post"``.

    Returns:
        [layers * units], in units of the target.
    """
    if name == "attn.hook_z":
        heads: Numbers = cache.heads().to_numpy(dtype=np.float64).ravel()
        return heads[~np.isnan(heads)]  # where a layer has fewer than another
    hooks = sorted((hook for hook in cache if hook.endswith(name)), key=lambda h: layer_of(h) or 0)
    rows = [cache[hook][0].double().sum(dim=0) for hook in hooks]
    return torch.cat(rows).cpu().numpy()


def patches_of(
    model: TransformerBridge, prompt: ExplainedPrompt, *, baseline: str = "zero"
) -> Features:
    """Patches of an image, row by row: one that is gone has the baseline's pixels.

    Args:
        baseline: ``"zero"`` (the mean colour of the processor's statistics), ``"mean"`` (the
            image's own mean colour).

    Raises:
        InputError: an unknown baseline.
    """
    if prompt.pixels is None:
        raise InputError("this prompt has no image")
    problem = resolve(model, pixel_values=prompt.pixels[None], target=prompt.target)
    assert problem.grid is not None
    replacement = problem.baseline(baseline)

    def without(removed: Masks) -> Values:
        values = []
        for part in torch.from_numpy(removed).to(replacement.device).split(IMAGES_PER_PASS):
            images = torch.where(problem.over_inputs(part), replacement, problem.inputs)
            values.append(target_values(model, prompt, image_logits(model, images)))
        return Values(*np.concatenate(values, axis=1))

    return Features(np.arange(problem.grid[0] * problem.grid[1]), without)


def _units(
    model: TransformerBridge, prompt: ExplainedPrompt, names: Sequence[str], dims: int
) -> Features:
    if is_encoder_decoder(model):
        raise InputError("heads and neurons are switched off in models of one stack only")
    sizes: dict[str, int] = {}

    def measure(name: str, x: Tensor) -> None:
        scan = name.endswith("hook_scan_out") and x.ndim == 3  # of all channels: one unit
        if x.ndim != dims and not scan:
            raise InputError(f"{name} has shape {list(x.shape)}; units need {dims} axes")
        sizes[name] = 1 if scan else x.shape[2]

    prompt_logits(model, prompt, read={name: partial(measure, name) for name in names})
    starts = dict(zip(names, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    rows_at_once = max(1, TOKENS_PER_PASS // len(prompt.tokens))

    def without(removed: Masks) -> Values:
        values = []
        for part in torch.from_numpy(removed).split(rows_at_once):
            edits = [
                Edit(name, function=_switched_off(part[:, start : start + sizes[name]]))
                for name, start in starts.items()
            ]
            logits = prompt_logits(model, prompt, len(part), edits=edits)
            values.append(target_values(model, prompt, logits))
        return Values(*np.concatenate(values, axis=1))

    return Features(np.arange(sum(sizes.values())), without)


def _switched_off(gone: Tensor) -> Callable[[Tensor], Tensor]:
    def switch(x: Tensor) -> Tensor:
        shape: Sequence[int] = (len(gone), 1, gone.shape[1], *[1] * (x.ndim - 3))
        return x.masked_fill(gone.to(x.device).view(*shape), 0)

    return switch
