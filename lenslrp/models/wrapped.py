"""What is remembered of a Hugging Face model that is inside a bridge, on the model itself.

A bridge replaces the model's modules in place. So a model is wrapped once: whoever loads it again
(a notebook cell that is run again) gets the bridge that it is in; ``save_pretrained`` goes on
writing the names that the weights had; and the comparison with the unwrapped model can be made
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from lenslrp.errors import LoadError
from lenslrp.hooks.packed import is_packed
from lenslrp.models.verifying import Agreement, Reference, compare

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_KEY = "_lenslrp_wrapped"
UNASKED = Agreement(None, reason="it was loaded with verify=False")
_INSIDE = "_original_component"  # what TransformerLens puts into the names of wrapped weights


@dataclass(frozen=True)
class Wrapped:
    """A model inside a bridge.

    Attributes:
        bridge: the bridge.
        reference: what the model gave before; None if it was not asked.
        agreement: of the bridge with it, when it was loaded.
        state: see `_state`; empty if they were not compared.
    """

    bridge: TransformerBridge
    reference: Reference | None
    agreement: Agreement
    state: tuple[float, ...]


def recall(model: Any) -> Wrapped | None:
    """What is remembered of a Hugging Face model; None if it is in no bridge.

    Raises:
        LoadError: it is inside a bridge that nobody remembers.
    """
    wrapped = vars(model).get(_KEY)
    if isinstance(wrapped, Wrapped):
        return wrapped
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise LoadError(
            f"this {type(model).__name__} is inside a TransformerBridge already, which replaced "
            "its modules: give that bridge, or load the model anew"
        )
    return None


def remember(model: Any, bridge: TransformerBridge, reference: Reference | None) -> Agreement:
    """Keep it on the model, past what ``nn.Module`` makes of attributes; compare the two."""
    agreement = UNASKED if reference is None else compare(bridge, reference)
    state = _state(model) if agreement.known else ()
    vars(model)[_KEY] = Wrapped(bridge, reference, agreement, state)
    return agreement


def agreement_of(bridge: Any) -> Agreement:
    """The short pass once more, through a bridge that may have been loaded long ago."""
    model = getattr(bridge, "original_model", None)
    known = vars(model).get(_KEY) if model is not None else None
    if not isinstance(known, Wrapped):
        reason = "this bridge was made without lenslrp.load, so the model itself was never seen"
        return Agreement(None, reason=reason)
    if known.reference is None or not known.agreement.known:
        return known.agreement
    if known.state != _state(model):
        return Agreement(None, reason="its weights were changed after it was loaded")
    return compare(bridge, known.reference)


def keep_names(model: Any) -> None:
    """Before a model is wrapped: ``save_pretrained`` goes on writing its weights by these names.

    PEFT looks for an adapter's weights by the names of modules, and would find none.
    """
    adapted = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    saver = _refuse_to_save if adapted else partial(_save, model, frozenset(model.state_dict()))
    vars(model)["save_pretrained"] = saver


def _save(
    model: Any, names: frozenset[str], save_directory: Any, *args: Any, **options: Any
) -> Any:
    if options.get("state_dict") is None:
        options["state_dict"] = original_weights(model, names)
    return type(model).save_pretrained(model, save_directory, *args, **options)


def _refuse_to_save(*args: Any, **options: Any) -> None:
    raise LoadError(
        "the modules that this adapter is on are inside a bridge, where PEFT does not find its "
        "weights: save the adapter before the model is loaded into a bridge"
    )


def original_weights(model: Any, names: frozenset[str]) -> dict[str, Tensor]:
    """The weights and buffers of a wrapped model under the names that they had before."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path = ".".join(part for part in name.split(".") if part != _INSIDE)
        if path in names:
            weights.setdefault(path, value)
    return weights


def _state(model: Any) -> tuple[float, ...]:
    """A few values of every weight: other ones after training, editing or casting."""
    weights = [
        w.detach().flatten()
        for w in model.parameters()
        if w.is_floating_point() and w.device.type != "meta" and not is_packed(w)
    ]
    return tuple(float(w[:: max(1, w.numel() // 16)].double().sum()) for w in weights)
