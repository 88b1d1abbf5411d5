"""What the rules on a model go by: its modules' hooks, its weights, its mode and its settings.

Rules that were attached to a model hold for as long as none of it changes. It is told from keys and
addresses alone, without a look at any value: writes to a weight through ``.data`` are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from lenslrp.hooks.handles import ThreadBound
from lenslrp.hooks.scan_points import scan_points
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.structure import TRUSTED_PACKAGES, components

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FORWARD_KINDS = HOOK_KINDS[:2]

RUNNING_PACKAGES = (*TRUSTED_PACKAGES, "accelerate.", "lenslrp.hooks.")
"""Whose hooks on modules belong to how a model runs."""


def users_hooks(
    module: nn.Module, kinds: tuple[str, ...] = FORWARD_KINDS
) -> Iterator[tuple[Any, int]]:
    """A module's hooks that are a user's own: where each is kept, and its key.

    TransformerLens puts hooks on modules to see what passes; those on a hook point call a user's.
    """
    for kind in kinds:
        for key, hook in getattr(module, kind).items():
            inner = hook.func if isinstance(hook, partial) else hook
            package = f"{getattr(inner, '__module__', '')}."
            runs = package.startswith(RUNNING_PACKAGES)
            if not isinstance(hook, ThreadBound) and (isinstance(module, HookPoint) or not runs):
                yield getattr(module, kind), key


class ModelState:
    """A model at the moment when rules were attached to it, and whether it is still as it was.

    Attributes:
        parts: its modules by name.
        hooks: stands for the hooks, and forward passes of single modules, that it had.
        rest: stands for its modules, weights, mode and settings.
        hooked: whether hooks of the user's are to see or change what passes.
        known: whether all its code is torch's, transformers' and TransformerLens'.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.parts = components(model)
        watched = [*self.parts, *scan_points(mixers(self.parts)).items()]
        self._own = [module.__dict__ for _, module in watched]
        self.hooked, self.known = False, True
        for _, module in watched:
            forward = module.__dict__.get("forward")
            code = type(module).__module__ if forward is None else forward.__module__
            self.known = self.known and str(code).startswith(TRUSTED_PACKAGES)
            if not self.hooked and (module._forward_hooks or module._forward_pre_hooks):
                self.hooked = any(True for _ in users_hooks(module))
        self.hooks = hash(self._hooks())
        self.rest = hash(self._rest())
        self._kept = list(model.parameters())  # so that no other can have the place of one
        self._last = 0
        self._ruled: tuple[Any, Any] | None = None

    def settle(self) -> None:
        """What the rules have put on the model belongs to it from now on."""
        self._ruled = self._hooks(), self._rest()
        self._last = RemovableHandle.next_id

    @property
    def current(self) -> bool:
        """Whether the model is as it was when :meth:`settle` was called."""
        if self._ruled is None or self._rest() != self._ruled[1]:
            return False
        # torch counts the hooks that it has ever registered; some may have been removed.
        if RemovableHandle.next_id == self._last and not self.hooked:
            return bool(self._shadowed() == self._ruled[0][0])
        same: bool = self._hooks() == self._ruled[0]
        if same:
            self._last = RemovableHandle.next_id
        return same

    def _shadowed(self) -> tuple[int, ...]:
        return tuple(id(own["forward"]) for own in self._own if "forward" in own)

    def _hooks(self) -> tuple[Any, ...]:
        keys = (
            (index, kind, *own[kind])
            for index, own in enumerate(self._own)
            for kind in HOOK_KINDS
            if own[kind]
        )
        return (self._shadowed(), *keys)

    def _rest(self) -> tuple[Any, ...]:
        modules = [id(child) for own in self._own for child in own["_modules"].values()]
        weights = [
            (id(w), w.untyped_storage()._cdata, w.storage_offset(), w._version, w.requires_grad)
            for own in self._own
            for w in own["_parameters"].values()
            if w is not None
        ]
        inner = getattr(self.model, "original_model", None)
        settings = [_settings(getattr(of, "config", of)) for of in (self.model.cfg, inner)]
        modes = [own["training"] for own in self._own]
        return (id(inner), tuple(modules), tuple(weights), tuple(settings), tuple(modes))


def _settings(config: Any) -> tuple[Any, ...]:
    plain = (bool, int, float, str, type(None))
    values = getattr(config, "__dict__", {}).items()
    return tuple((name, value) for name, value in values if isinstance(value, plain))
