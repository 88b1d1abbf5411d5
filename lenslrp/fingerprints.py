"""What tells whether a result is of the same model, tokenizer, rules and settings as another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.packed import stored_numbers
from lenslrp.running import architecture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Settings = dict[str, Any]


def describe_model(model: TransformerBridge) -> dict[str, Any]:
    """What identifies a bridge: its name, its type, and a fingerprint of its weights."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = stored_numbers(parameter).reshape(-1)
        step = max(1, len(flat) // 1024)
        sample = flat[::step].float().cpu().contiguous().numpy()
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode())
        digest.update(sample.tobytes())
    return {
        "name": str(getattr(model.cfg, "model_name", "")),
        "revision": getattr(config, "_commit_hash", None),
        "architecture": architecture(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
        "compatibility": bool(getattr(model, "compatibility_mode", False)),
    }


def describe_tokenizer(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer: its rules where it can state them, else its vocabulary."""
    if tokenizer is None:
        return "none"
    core = getattr(tokenizer, "backend_tokenizer", None)
    text = core.to_str() if core is not None else canonical(tokenizer.get_vocab())
    return hashlib.sha256(text.encode()).hexdigest()


def describe_rules(composite: Composite) -> dict[str, str]:
    """Name and fingerprint of a rule set."""
    table = {role: repr(rule) for role, rule in composite.rules.items()}
    modules = {f"{c.__module__}.{c.__qualname__}": repr(r) for c, r in composite.modules.items()}
    text = canonical([table, modules])
    return {"name": composite.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def canonical(value: Any) -> str:
    """JSON of one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def require_same_settings(path: Path, stored: Settings, current: Settings) -> None:
    """Refuse to go on with what was made with other settings.

    Raises:
        InputError: naming every setting that differs, with both values.
    """
    stored, current = _flat(stored), _flat(current)
    names = dict.fromkeys([*stored, *current])
    other = [
        f"{name} {json.dumps(stored.get(name))}, now {json.dumps(current.get(name))}"
        for name in names
        if stored.get(name) != current.get(name)
    ]
    if other:
        raise InputError(
            f"{path} was made with other settings ({'; '.join(other)}): "
            "move it, or give another place for the results"
        )


def _flat(settings: Settings, prefix: str = "") -> Settings:
    """Settings of settings by a dotted name."""
    flat: Settings = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
