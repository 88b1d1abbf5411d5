"""Files that a kill cannot spoil and a stranger cannot abuse.

Everything is written by `lenslrp.files`, so a file is either whole or not there. Tensors lie
in safetensors files that hold a SHA-256 of their own contents, so a flipped bit is found wherever
it is. Nothing is ever unpickled. What is read back is bounded before it is used: headers,
manifests, row groups and file names from outside go through here.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenslrp.errors import StorageError
from lenslrp.files import whole
from lenslrp.fingerprints import canonical

HEADER_LIMIT = 1 << 22
"""Bytes of a safetensors header; ours are a few kilobytes."""

JSON_LIMIT = 1 << 24
"""Bytes of a manifest."""

CHECKSUM = "sha256"

GROUP_LIMIT = 1 << 30
"""Bytes of one row group, unpacked."""

Form = tuple[torch.dtype, tuple[int | None, ...]]
"""Of a tensor: its type and its shape, None where any size will do."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes, values and metadata."""
    digest = hashlib.sha256(canonical(dict(metadata)).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    ours: bytes | None = None,
    fresh: bool = False,
) -> None:
    """Write a safetensors file with its own checksum, whole or not at all: see `whole`."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checked = {**metadata, CHECKSUM: contents_sha256(kept, metadata)}
    with whole(path, ours=ours, fresh=fresh) as temporary:
        save_file(kept, temporary, metadata=checked)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file written by `save_tensors`, checked.

    Raises:
        StorageError: truncated, damaged, or not such a file.
    """
    require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} is damaged or truncated: {error}") from error
    stated = metadata.pop(CHECKSUM, None)
    if stated != contents_sha256(tensors, metadata):
        raise StorageError(
            f"{path} is damaged: its contents do not match the SHA-256 stored in it. Delete it and "
            "run the same command again"
        )
    return tensors, metadata


def require_forms(path: Path, tensors: Mapping[str, Tensor], forms: Mapping[str, Form]) -> None:
    """Refuse tensors of other names, types or shapes than a file of its kind holds.

    Raises:
        StorageError: naming the file and the first tensor that differs.
    """
    if set(tensors) != set(forms):
        raise StorageError(
            f"{path} is damaged: it holds {str(sorted(tensors))[:200]}; expected {sorted(forms)}"
        )
    for name, (dtype, shape) in forms.items():
        tensor = tensors[name]
        fits = tensor.ndim == len(shape) and all(
            size is None or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            expected = [size if size is not None else "any" for size in shape]
            raise StorageError(
                f"{path} is damaged: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{dtype} {expected}"
            )


def require_numbers(path: Path, metadata: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse metadata in which one of these is not a whole number.

    Raises:
        StorageError: naming the file and the entry.
    """
    for name in names:
        if not re.fullmatch(r"\d{1,18}", metadata.get(name, "")):
            raise StorageError(f"{path} is damaged: {name} is {metadata.get(name)!r:.40}")


def require_range(path: Path, name: str, values: Any, low: int, high: int) -> None:
    """Refuse whole numbers outside ``low`` to ``high - 1``.

    Args:
        values: a tensor or an array.

    Raises:
        StorageError: naming the file and what the numbers are.
    """
    if 0 not in values.shape and (int(values.min()) < low or int(values.max()) >= high):
        raise StorageError(
            f"{path} is damaged: {name} from {int(values.min())} to {int(values.max())}, expected "
            f"{low} to {high - 1}"
        )


def require_header(path: Path) -> None:
    """Refuse a safetensors file whose header is larger than the file, or than ours ever are.

    Raises:
        StorageError: naming the file.
    """
    require_plain(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if len(start) < 8:
        raise StorageError(f"{path} is truncated: {size} bytes, too short for a header")
    length = struct.unpack("<Q", start)[0]
    if length > HEADER_LIMIT:
        raise StorageError(
            f"{path} claims a header of {length} bytes; ours have up to {HEADER_LIMIT}"
        )
    if length > size - 8:
        raise StorageError(f"{path} is truncated: a header of {length} bytes in a file of {size}")


def open_parquet(
    path: Path, schema: pa.Schema, row: int, groups: Sequence[int] | None = None
) -> pq.ParquetFile:
    """A parquet file of known form, its pages to be checked as they are read.

    Args:
        path: the file.
        schema: its columns.
        row: bytes that a row has at most, unpacked.
        groups: rows of each row group, where that is known.

    Raises:
        StorageError: no regular file, no parquet, or one of another form.
    """
    require_plain(path)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is damaged: {str(error)[:200]}") from error
    if not file.schema_arrow.equals(schema):
        raise StorageError(
            f"{path} does not have the columns of this schema: {file.schema_arrow.names} of "
            f"{str([str(t) for t in file.schema_arrow.types])[:200]}"
        )
    metadata = file.metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if groups is not None and sizes != list(groups):
        raise StorageError(
            f"{path} does not have the row groups of this dictionary: {sum(sizes)} rows in "
            f"{len(sizes)} groups, expected {sum(groups)} in {len(groups)}"
        )
    _require_bounded(path, file, row)
    return file


def _require_bounded(path: Path, file: pq.ParquetFile, row: int) -> None:
    """Refuse row groups that would unpack to more than their rows can have.

    Raises:
        StorageError: naming the file and the size.
    """
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        size = max(
            group.total_byte_size,
            *(group.column(c).total_uncompressed_size for c in range(group.num_columns)),
        )
        limit = min(GROUP_LIMIT, (1 << 20) + 2 * row * group.num_rows)
        if size > limit:
            raise StorageError(
                f"{path} claims {size} bytes for {group.num_rows} rows, expected up to {limit}"
            )


def read_groups(
    path: Path,
    file: pq.ParquetFile,
    groups: list[int] | None,
    columns: list[str] | None = None,
    *,
    empty: tuple[str, ...] = (),
) -> pa.Table:
    """Some row groups, or all, checked down to their characters.

    Args:
        empty: columns that may have empty cells.

    Raises:
        StorageError: a page's checksum is not what it should be, or its contents are no values of
            their type; names the file.
    """
    chosen = list(range(file.metadata.num_row_groups)) if groups is None else groups
    try:
        table = file.read_row_groups(chosen, columns=columns)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is damaged: {str(error)[:200]}") from error
    rows = sum(file.metadata.row_group(i).num_rows for i in chosen)
    if table.num_rows != rows:
        raise StorageError(f"{path} is damaged: {table.num_rows} rows where it says {rows}")
    for name, column in zip(table.column_names, table.columns, strict=True):
        entries = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if name not in empty and (column.null_count or entries.null_count):
            raise StorageError(f"{path} is damaged: empty cells in the column {name}")
    return table


def require_plain(path: Path) -> None:
    """Refuse what is not a regular file in its own right: a link could lead anywhere.

    Raises:
        StorageError: a link, a folder, or nothing there.
    """
    if path.is_symlink():
        raise StorageError(f"{path} is a symbolic link; a dictionary's files must be files")
    if not path.is_file():
        raise StorageError(f"{path} does not exist or is not a file")


def save_json(path: Path, value: Any, *, ours: bytes | None = None, fresh: bool = False) -> None:
    """Write JSON, whole or not at all: see `whole`."""
    with whole(path, ours=ours, fresh=fresh) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        StorageError: too large, not JSON, or not an object.
    """
    require_plain(path)
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise StorageError(f"{path} has {size} bytes; at most {JSON_LIMIT} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} does not hold a JSON object")
    return value


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def check_files(folder: Path, records: Any, allowed: frozenset[str], contents: bool) -> None:
    """Compare files with what the manifest says of them.

    Args:
        folder: where they lie.
        records: name -> ``{"bytes", "sha256"}``, as read from the manifest.
        allowed: the only names that may occur: none of them leads out of the folder.
        contents: compare the SHA-256 as well, not the size alone.

    Raises:
        StorageError: naming the first file that is missing, foreign, truncated or damaged.
    """
    if not isinstance(records, dict) or set(records) != allowed:
        names = sorted(map(str, records)) if isinstance(records, dict) else records
        raise StorageError(
            f"{folder / 'manifest.json'} lists the files {str(names)[:200]}; a dictionary of this "
            f"schema has exactly {sorted(allowed)}"
        )
    for name in sorted(allowed):
        path, record = folder / name, records[name]
        require_plain(path)
        size = path.stat().st_size
        if not isinstance(record, dict) or size != record.get("bytes"):
            stated = record.get("bytes") if isinstance(record, dict) else record
            raise StorageError(f"{path} has {size} bytes, but the manifest says {stated!r:.40}")
        if contents and file_sha256(path) != record.get("sha256"):
            raise StorageError(f"{path} is damaged: its SHA-256 is not the one in the manifest")
