"""Which rules to begin with, by measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lenslrp import media
from lenslrp.hooks import AttnLRP, AttnLRPViT, Composite
from lenslrp.hooks.install import require_bridge

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def recommended(model: TransformerBridge) -> Composite:
    """The composite that measured best on models of this kind (``docs/reference/results/``).

    For models that read images, ``AttnLRPViT()``: gamma 0.25 on the convolution and 0.05 on linear
    layers. For all others ``AttnLRP()``: no other setting was better across tasks.

    Args:
        model: a ``TransformerBridge``.

    Raises:
        InputError: no bridge, or one that rules cannot be attached to.

    Examples:
        >>> lenslrp.recommended(model).name  # of a language model
        'AttnLRP'
    """
    require_bridge(model)
    return AttnLRPViT() if media.main_input(model) == "pixel_values" else AttnLRP()
