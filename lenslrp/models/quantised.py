"""Quantised models: read packed, and kept in the form whose backward pass is known.

Weights are quantised by transformers while it reads them, or were when they were saved; nothing
here unpacks a model. Rules unpack a layer at a time (`lenslrp.hooks.packed`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lenslrp.errors import LoadError, MissingExtraError
from lenslrp.extras import require
from lenslrp.hooks.packed import is_packed_linear, rounds_its_input

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""What a configuration calls its method, and the package that an extra brings for it."""


def require_package(quantization_config: Any, config: Any, name: str) -> None:
    """Say which package a quantised model needs, before its weights are read.

    Args:
        quantization_config: what the caller gave, or ``None``.
        config: the checkpoint's configuration, which may hold one.

    Raises:
        LoadError: it is not installed.
    """
    settings = quantization_config or getattr(config, "quantization_config", None)
    if settings is None:
        return
    given = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = str(getattr(given, "value", given))
    if method in PACKAGES:
        try:
            require(PACKAGES[method], f"{name!r}, quantised with {method},")
        except MissingExtraError as error:
            raise LoadError(str(error)) from error


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether linear layers of a model keep their weights packed."""
    return any(is_packed_linear(module) for module in model.modules())


def rounds(model: PreTrainedModel) -> bool:
    """Whether layers of a model compute in fewer digits than the rest of it."""
    return any(is_packed_linear(m) and rounds_its_input(m) for m in model.modules())


def require_its_type(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Refuse another type for a quantised model in memory: its scales would be rounded.

    Raises:
        LoadError: naming both.
    """
    if dtype not in (None, model.dtype) and is_quantised(model):
        raise LoadError(
            f"this {type(model).__name__} is quantised, and what is not packed is {model.dtype}: "
            f"load it from its files for {dtype} (dtype= and quantization_config=)"
        )


def keep_unpackable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes' 4-bit layers in the form that has a backward pass.

    On some CPUs the first pass without gradients packs their weights anew, for a kernel of
    inference that computes in bfloat16 and has no backward pass.

    Raises:
        LoadError: that has happened: bitsandbytes' way back gets the scales wrong.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise LoadError(
                f"{name} has run without gradients on this CPU, where bitsandbytes packs 4-bit "
                "weights anew for inference, and cannot undo it: load the model before it runs"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
