"""What the rules on a model go by: its modules' hooks, its weights, its mode and its settings.

Rules that were attached to a model hold for as long as none of it changes. It is told from keys and
addresses alone, without a look at any value: writes to a weight through ``.data`` are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lenslrp.hooks.attach import components

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KNOWN = ("torch.", "transformers.", "transformer_lens.")
"""Packages whose modules do the same at every call."""


@dataclass(frozen=True)
class State:
    """One model at one moment; two are equal where rules that fit the one fit the other.

    Attributes:
        hooks: which hooks, and forward passes of single modules, it has.
        rest: its modules, weights, mode and settings.
        hooked: whether anything is to happen before or after any module's forward pass.
        known: whether all its code is torch's, transformers' and TransformerLens'.
    """

    hooks: int = 0
    rest: int = 0
    hooked: bool = False
    known: bool = False

    @classmethod
    def of(cls, model: Any) -> State:
        """The state of a model."""
        hooks: list[Any] = []
        modes: list[Any] = []
        hooked, known = False, True
        for _, module in components(model):
            own = module.__dict__
            forward = own.get("forward")
            modes.append((id(module), own["training"]))
            for kind in KINDS:
                if own[kind]:
                    hooks.append((id(module), kind, *own[kind]))
                    hooked = hooked or kind.startswith("_forward")
            if forward is not None:
                hooks.append((id(module), id(forward)))
                known = known and str(getattr(forward, "__module__", "")).startswith(KNOWN)
            known = known and type(module).__module__.startswith(KNOWN)
        weights = [
            (id(w), w.untyped_storage()._cdata, w.storage_offset(), w._version, w.requires_grad)
            for w in model.parameters()
        ]
        configs = (getattr(model, "cfg", None), getattr(model, "original_model", None))
        settings = [_settings(getattr(of, "config", of)) for of in configs]
        rest = hash((tuple(modes), tuple(weights), tuple(settings)))
        return cls(hash(tuple(hooks)), rest, hooked, known)


def _settings(config: Any) -> tuple[Any, ...]:
    plain = (bool, int, float, str, type(None))
    values = getattr(config, "__dict__", {}).items()
    return tuple((name, value) for name, value in values if isinstance(value, plain))
