"""Results of circuits as files: tensors in safetensors with their checksum, all else as JSON.

One metadata entry holds the class, the version and every field that is no tensor; the writer is
that of `lenslrp.analysis.common.storage`. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lenslrp.analysis.common.storage import load_tensors, require_header, save_tensors
from lenslrp.errors import InputError, StorageError

ENTRY = "lenslrp.circuits"
VERSION = 1

_Result = TypeVar("_Result", bound="Saved")


class Saved:
    """`save` and `load` for a dataclass of tensors, mappings to tensors, and what JSON can hold.

    `made_from` says of other fields what makes them of their JSON.
    """

    made_from: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (no pickle); `load` reads it back.

        Args:
            path: where. An earlier file of circuits is replaced, whole or not at all.

        Returns:
            The path.

        Raises:
            InputError: the folder is not there, or `path` is one.
            StorageError: the file cannot be written, or another one is there.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        groups: dict[str, list[str]] = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                tensors[item.name] = value
            elif isinstance(value, Mapping) and all(isinstance(x, Tensor) for x in value.values()):
                groups[item.name] = list(value)
                tensors |= {f"{item.name}/{key}": x for key, x in value.items()}
            else:
                plain[item.name] = value
        facts = {"kind": type(self).__name__, "version": VERSION, "plain": plain, "groups": groups}
        # Tensors may be views of one, which safetensors asks to be separate.
        apart = {name: x.detach().clone() for name, x in tensors.items()}
        entry = {ENTRY: json.dumps(facts, default=asdict)}
        save_tensors(path, apart, entry, ours=f'"{ENTRY}"'.encode())
        return path

    @classmethod
    def load(cls: type[_Result], path: str | Path) -> _Result:
        """Read what `save` wrote, on the CPU.

        Args:
            path: of the file.

        Raises:
            InputError: a file of something else, or of another version.
            StorageError: no such file, or a damaged one.
        """
        path = Path(path)
        facts = _facts(path)
        kind, version = facts.get("kind"), facts.get("version")
        if kind != cls.__name__:
            raise InputError(f"{path} holds {kind or 'something else'}, not {cls.__name__}")
        if version != VERSION:
            raise InputError(f"{path} is {kind} of version {version!r}; this reads {VERSION}")
        tensors, _ = load_tensors(path)
        values = {
            name: cls.made_from.get(name, lambda value: value)(value)
            for name, value in facts["plain"].items()
        }
        for name, keys in facts["groups"].items():
            values[name] = {key: tensors.pop(f"{name}/{key}") for key in keys}
        return cls(**values, **tensors)


def _facts(path: Path) -> dict[str, Any]:
    """What the metadata says, before the tensors are read; empty if the file is none of ours."""
    require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged, or no safetensors file: {error}") from error
    return facts if isinstance(facts, dict) else {}
