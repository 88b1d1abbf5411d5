"""Steering in files: JSON with vectors in safetensors beside it; control vectors in GGUF.

A specification names neurons and heads by their text (`blocks.5.mlp.hook_post[17]`) and
directions by theirs; the vectors lie under these names in a safetensors file of the same stem.

GGUF control vectors are what llama.cpp (`--control-vector`) and repeng read: architecture
`controlvector`, keys `controlvector.model_hint` and `controlvector.layer_count`, and one
float32 vector a layer called `direction.N`, which is added to the output of block N (from 0) at
every position: `Add(direction, strength)` at `blocks.N.hook_resid_post`. llama.cpp refuses
block 0. Only adding can be said in that format.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenslrp.analysis.common.storage import (
    load_json,
    load_tensors,
    require_plain,
    save_json,
    save_tensors,
)
from lenslrp.analysis.steering.operations import (
    Ablate,
    Add,
    Clamp,
    Operation,
    ProjectOut,
    Scale,
    Steering,
)
from lenslrp.analysis.units.kinds import Direction, Feature, Unit
from lenslrp.analysis.units.locations import block_before
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.errors import InputError, StorageError
from lenslrp.extras import require
from lenslrp.files import whole

STEERING_SCHEMA = 1
OPERATIONS: dict[str, type[Operation]] = {
    "scale": Scale,
    "add": Add,
    "ablate": Ablate,
    "clamp": Clamp,
    "project_out": ProjectOut,
}
"""What an operation is called in a specification; its other entries are its attributes."""

_NUMBERS = frozenset({"factor", "amount", "value", "low", "high"})

CONTROL = "controlvector"


def steering_to_json(steering: Steering) -> tuple[str, dict[str, Tensor]]:
    """The specification as JSON, and the vectors that it names.

    Raises:
        InputError: a feature, whose coder is in a file of its own; two vectors of one name.
    """
    vectors: dict[str, Tensor] = {}
    specification = {
        "schema": STEERING_SCHEMA,
        "prompt": steering.prompt,
        "generation": steering.generation,
        "operations": [_operation_json(each, vectors) for each in steering.operations],
    }
    return json.dumps(specification), vectors


def steering_from_json(text: str, vectors: Mapping[str, Tensor] | None = None) -> Steering:
    """What `steering_to_json` wrote.

    Raises:
        InputError: not such a specification; the message says what is wrong in it.
    """
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {error}") from error
    if not isinstance(spec, dict) or spec.get("schema") != STEERING_SCHEMA:
        raise InputError(f"no steering specification of schema {STEERING_SCHEMA}")
    unknown = set(spec) - {"schema", "prompt", "generation", "operations"}
    if unknown or not isinstance(spec.get("operations"), list):
        raise InputError(f"a specification has a list of operations and no {sorted(unknown)}")
    operations = [_operation_from_json(each, vectors or {}) for each in spec["operations"]]
    return Steering(
        tuple(operations),
        spec.get("prompt", "all"),
        spec.get("generation", "all"),
    )


def save_steering(steering: Steering, path: str | Path) -> Path:
    """Write `path` (JSON) and, where there are directions, the safetensors file beside it.

    Args:
        steering: operations and where they act.
        path: of the JSON file.

    Returns:
        `path`.

    Raises:
        InputError: a feature, whose coder is in a file of its own; two vectors of one name; a path
            that ends with `.safetensors`.
        StorageError: a file of that name that is not ours is in the way, or the disk is full.

    Examples:
        >>> path = save_steering(Steering((Scale(Neuron(17, 40), 0.0),)), "off.json")
        >>> load_steering(path).operations[0].factor
        0.0
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise InputError(f"{path.name} is for the specification; the vectors are written beside it")
    text, vectors = steering_to_json(steering)
    if vectors:  # first: a specification never stands without its vectors
        save_tensors(
            path.with_suffix(".safetensors"),
            vectors,
            {"schema": str(STEERING_SCHEMA)},
            ours=b'"sha256"',
        )
    save_json(path, json.loads(text), ours=b'"operations"')
    return path


def load_steering(path: str | Path) -> Steering:
    """What `save_steering` wrote.

    Args:
        path: of the JSON file.

    Raises:
        StorageError: a file is missing or damaged.
        InputError: it says something that is no steering.
    """
    path = Path(path)
    spec = load_json(path)
    beside = path.with_suffix(".safetensors")
    vectors = load_tensors(beside)[0] if beside.exists() else {}
    return steering_from_json(json.dumps(spec), vectors)


def save_control_vector(
    path: str | Path, directions: Direction | Iterable[Direction], *, model_hint: str
) -> Path:
    """Write directions of the residual stream as a GGUF control vector, one a layer.

    Args:
        path: the file.
        directions: at `blocks.N.hook_resid_post`, or `hook_resid_pre` of the next block.
        model_hint: Hugging Face's `config.model_type`; readers warn where it is another.

    Returns:
        `path`.

    Raises:
        InputError: another hook point, block 0, or two directions of one block.
        MissingExtraError: the `gguf` package is not installed.
        StorageError: a file of that name that is not ours is in the way, or the disk is full.
    """
    path = Path(path)
    layers: dict[int, Direction] = {}
    for each in (directions,) if isinstance(directions, Direction) else directions:
        layer = _layer(each)
        if layer in layers:
            raise InputError(f"two directions for the output of block {layer}: add them up first")
        layers[layer] = each
    if not layers:
        raise InputError("no direction was given")
    gguf = _gguf()
    with whole(path, ours=CONTROL.encode()) as temporary:
        writer = gguf.GGUFWriter(temporary, CONTROL)
        writer.add_string(f"{CONTROL}.model_hint", model_hint)
        writer.add_uint32(f"{CONTROL}.layer_count", len(layers))
        for layer in sorted(layers):
            vector = layers[layer].vector.detach().cpu().float().contiguous().numpy()
            writer.add_tensor(f"direction.{layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def load_control_vector(path: str | Path) -> tuple[Direction, ...]:
    """The directions of a GGUF control vector, each at `blocks.N.hook_resid_post`.

    Args:
        path: the file.

    Returns:
        Directions in the order of the layers.

    Raises:
        StorageError: no such file, or no control vector.
        MissingExtraError: the `gguf` package is not installed.
    """
    path = Path(path)
    gguf = _gguf()
    require_plain(path)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise StorageError(f"{path} is no GGUF file: {error}") from error
    kind = reader.get_field("general.architecture")
    if kind is None or kind.contents() != CONTROL:
        raise StorageError(f"{path} is a GGUF file, but no control vector")
    vectors = {}
    for tensor in reader.tensors:
        layer = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if layer is None or tensor.data.dtype != np.float32 or tensor.data.ndim != 1:
            raise StorageError(
                f"{path}: {tensor.name} is {tensor.data.dtype} {list(tensor.data.shape)}; "
                "a control vector holds float32 vectors called direction.N"
            )
        vectors[int(layer[1])] = torch.from_numpy(np.array(tensor.data))
    if not vectors:
        raise StorageError(f"{path} holds no directions")
    return tuple(Direction(f"blocks.{n}.hook_resid_post", vectors[n]) for n in sorted(vectors))


def _gguf() -> Any:
    require("gguf", "a control vector")
    import gguf

    return gguf


def _layer(direction: Direction) -> int:
    layer = block_before(direction.at)
    if layer is None:
        raise InputError(
            f"{direction.at} is not the residual stream after a block, where control vectors act"
        )
    if layer < 1:
        raise InputError(
            f"{direction.at}: llama.cpp refuses control vectors before block 1's output"
        )
    return layer


def _operation_json(operation: Operation, vectors: dict[str, Tensor]) -> dict[str, Any]:
    kind = next((name for name, cls in OPERATIONS.items() if type(operation) is cls), None)
    if kind is None:
        raise InputError(f"{type(operation).__name__} has no name in a specification")
    spec: dict[str, Any] = {"operation": kind}
    for field in dataclasses.fields(operation):
        value = getattr(operation, field.name)
        if isinstance(value, Unit):
            value = _unit_json(value, vectors)
        elif field.name == "directions":
            value = [_unit_json(each, vectors) for each in value]
        if value is not None:
            spec[field.name] = value
    return spec


def _unit_json(unit: Unit, vectors: dict[str, Tensor]) -> str | dict[str, Any]:
    if isinstance(unit, Feature):
        raise InputError(
            f"{unit}: a feature's coder is in a file of its own; steer along "
            "Direction(coder.written_at, coder.W_dec[index]) to write it down"
        )
    if not isinstance(unit, Direction):
        return str(unit)
    key, vector = str(unit), unit.vector.detach().cpu().contiguous()
    if key in vectors and not torch.equal(vectors[key], vector):
        raise InputError(f"two different vectors are called {key}")
    vectors[key] = vector.clone()
    return {"at": unit.at, "vector": key, "name": unit.name}


def _operation_from_json(spec: Any, vectors: Mapping[str, Tensor]) -> Operation:
    kind = OPERATIONS.get(str(spec.get("operation"))) if isinstance(spec, dict) else None
    if kind is None:
        raise InputError(f"{spec!r} is no operation; known: {', '.join(OPERATIONS)}")
    attributes = {name: value for name, value in spec.items() if name != "operation"}
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = set(attributes) - set(known)
    missing = {name for name, field in known.items() if field.default is dataclasses.MISSING} - set(
        attributes
    )
    if unknown or missing:
        raise InputError(
            f"{spec['operation']} lacks {sorted(missing)} and does not know {sorted(unknown)}"
        )
    for name, value in attributes.items():
        if name == "unit":
            attributes[name] = _unit_from_json(value, vectors)
        elif name == "directions":
            attributes[name] = tuple(_unit_from_json(each, vectors) for each in value)
        elif isinstance(value, list):
            attributes[name] = tuple(value)
        elif name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{name} is {value!r}, expected a number")
    return kind(**attributes)


def _unit_from_json(spec: Any, vectors: Mapping[str, Tensor]) -> Any:
    if isinstance(spec, str):
        return parse_unit(spec)
    if not isinstance(spec, dict) or set(spec) != {"at", "vector", "name"}:
        raise InputError(f"{spec!r} is no unit: expected its text, or at, vector and name")
    if spec["vector"] not in vectors:
        raise InputError(f"no vector is called {spec['vector']!r}; there are {sorted(vectors)}")
    return Direction(spec["at"], vectors[spec["vector"]], spec["name"])
