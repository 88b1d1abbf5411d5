"""``explain_to``: token relevance of many prompts in one file, resumable, by one process or many.

Inputs are taken in the windows of `lenslrp.explaining`. Each leaves one part, a parquet file
beside the result, that is there whole or not at all and says what it was made from. A run that was
interrupted makes the parts that are missing; processes that split the windows make one part each
and never talk. Whoever finds all parts there joins them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError, StorageError
from lenslrp.explaining import NO_INPUT, Batches, Numbered, explained, input_windows, is_several
from lenslrp.files import make_folder, parquet_writer, remove_leftovers, taking_turns, whole
from lenslrp.fingerprints import (
    canonical,
    describe_model,
    describe_rules,
    describe_tokenizer,
    require_same_settings,
)
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.rule_types import Rule
from lenslrp.progress import progress_bar
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TABLE_FORMAT = "lenslrp.tokens/1"
TABLE_SUFFIXES = (".parquet", ".jsonl")
KEY = b"lenslrp"
"""Where a parquet file's metadata says what it was made from."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_COLUMNS = pa.schema([("row", pa.int64()), ("prompt", pa.string())])  # of an empty part


@dataclass(frozen=True)
class Explanations:
    """What `explain_to` made.

    Attributes:
        path: the table.
        complete: whether it is there; not before all shares are done, where work is split.
        prompts: explained prompts: of the table, or of this share where it is not complete.
        rows: their tokens.
        skipped: (number of the input, why), of those that could not be explained.
    """

    path: Path
    complete: bool
    prompts: int
    rows: int
    skipped: tuple[tuple[int, str], ...] = field(repr=False)

    @classmethod
    def of(cls, path: Path, parts: list[dict[str, Any]]) -> Explanations:
        """What some parts, by what they say of themselves, hold together."""
        prompts, rows = (sum(part[name] for part in parts) for name in ("prompts", "rows"))
        skipped = tuple((index, why) for part in parts for index, why in part["skipped"])
        return cls(path, path.exists(), prompts, rows, skipped)

    def __str__(self) -> str:
        left = f", {len(self.skipped)} skipped" if self.skipped else ""
        done = "" if self.complete else "; other shares are not done yet"
        return f"{self.path}: {self.prompts} prompts, {self.rows} tokens{left}{done}"


def explain_to(
    path: str | Path,
    model: TransformerBridge,
    inputs: Iterable[Any],
    targets: Any = None,
    *,
    composite: Composite | Mapping[str, Rule] | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
    total: int | None = None,
) -> Explanations:
    """Explain many prompts and write their token relevance to one file, a row a token.

    Called again with the same arguments it goes on where it was. Memory does not grow with the
    number of inputs. Inputs that cannot be explained are counted and left out.

    Args:
        path: ``.parquet`` or ``.jsonl``; the columns are those of ``R.to_dataframe()``, and ``row``
            is the number of the input. Work in progress lies in ``path.parts`` beside it.
        model: a ``TransformerBridge``, in eval mode.
        inputs: as for `lenslrp.Session.explain`; read as they are needed.
        targets: likewise.
        composite: as for `lenslrp.run_with_relevance`.
        batch_size: prompts of a batch; ``None`` goes by tokens.
        prepend_bos: as for `lenslrp.run_with_relevance`.
        attention: likewise.
        checkpoint: likewise.
        strict: likewise.
        shard: (share, of how many): this process explains windows ``share``, ``share + n``, ... of
            1,024 inputs. Give every process all of the inputs; the last to finish joins the table,
            which is the same as that of one process.
        progress: show prompts a second and the time left, on standard error.
        total: how many inputs there are, where they cannot tell.

    Returns:
        The path, how many prompts and tokens, and what was skipped and why.

    Raises:
        InputError: a path of another kind, a shard that is none, or no input could be explained;
            what lies there was made from other inputs or with other options (it names them).
        StorageError: a file is there already, or the disk is full.
        CoverageError: the model has an operation without a rule.

    Examples:
        >>> print(lenslrp.explain_to("relevance.parquet", model, ["The sky is", "Two plus two is"]))
        relevance.parquet: 2 prompts, 7 tokens
    """
    path, (share, shares) = require_place(path), shard
    if not 0 <= share < shares:
        raise InputError(f"shard is (share, of how many), from 0: {shard!r} is none")
    batches = Batches.of(model, batch_size)
    rules = as_composite(AttnLRP() if composite is None else composite)
    settings = {
        "format": TABLE_FORMAT,
        "model": describe_model(model),
        "tokenizer": describe_tokenizer(model.tokenizer),
        "rules": describe_rules(rules),
        "attention": attention,
        "prepend_bos": prepend_bos,
        "batch": str(batches),
        "target": "one for each input" if is_several(targets) else _as_text(targets),
    }
    parts = TableParts(path, settings)
    records: list[dict[str, Any]] = []
    count = 0
    total = len(inputs) if total is None and isinstance(inputs, Sized) else total
    with (
        progress_bar("explain", total=total, shown=progress, unit=" prompts", smoothing=0.1) as bar,
        Session(
            model, rules, attention=attention, checkpoint=checkpoint, strict=strict, ledger=False,
            logits="target",
        ) as session,
    ):  # fmt: skip

        def run(prompts: Any, target: Any, mask: Tensor | None) -> RelevanceCache:
            _, relevance = session.run_with_relevance(
                prompts, target, [], prepend_bos=prepend_bos, attention_mask=mask
            )
            return relevance

        for count, numbered in enumerate(input_windows(inputs, targets), start=1):
            window = count - 1
            mine = window % shares == share
            about = parts.about(window, numbered) if mine else None
            if mine and about is None:
                results = explained(run, model, numbered, batches, prepend_bos)
                about = parts.write(window, numbered, _counted(results, bar))
            elif progress:  # done before, or by others: no part of this run's speed
                done = sum(prompt is not NO_INPUT for _, prompt, _ in numbered)
                bar.initial += done
                bar.update(done)
            if about is not None:
                records.append(about)
    if not count:
        raise InputError("there are no inputs")
    return parts.join(count, records)


def require_place(path: str | Path) -> Path:
    """A path that a table can be written to.

    Raises:
        InputError: another kind of file, or in a folder that is not there.
    """
    path = Path(path)
    if path.suffix not in TABLE_SUFFIXES:
        raise InputError(f"{path}: a table is one of {', '.join(TABLE_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.absolute().parent}")
    return path


def _counted(results: Iterable[Any], bar: Any) -> Iterator[Any]:
    for numbers, result in results:
        yield numbers, result
        bar.update(len(numbers))


def _as_text(value: Any) -> str:
    """An input or a target as text that is the same in every process."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return _ADDRESS.sub("", repr(value))


class TableParts:
    """The parts of one table, in a folder beside it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.folder = path.with_name(path.name + ".parts")
        if path.exists() and not self.folder.is_dir():
            raise self._in_the_way()
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def file(self, window: int) -> Path:
        return self.folder / f"window-{window:08d}.parquet"

    def about(self, window: int, inputs: list[Numbered]) -> dict[str, Any] | None:
        """What a part says of itself, ``None`` where it is not there yet.

        Raises:
            InputError: it was made with other settings, or from other inputs.
            StorageError: it is damaged, or no part.
        """
        path = self.file(window)
        if not path.exists():
            if self.path.exists():
                raise self._in_the_way()
            return None
        about = _about(path)
        require_same_settings(self.folder, about["settings"], self.settings)
        if about["inputs"] != _digest(inputs):
            first, last = inputs[0][0], inputs[-1][0]
            raise InputError(
                f"{self.folder} was made from other inputs: those from {first} to {last} differ. "
                "Move it, or give another place for the results"
            )
        return about

    def _in_the_way(self) -> StorageError:
        return StorageError(
            f"{self.path} is there already and is not replaced: move it, or choose another name"
        )

    def write(self, window: int, inputs: list[Numbered], results: Iterator[Any]) -> dict[str, Any]:
        """Make one part: the tables of its prompts, in the order of their numbers."""
        frames: list[pd.DataFrame] = []
        skipped: dict[int, str] = {}
        for numbers, result in results:
            if isinstance(result, InputError):
                skipped[numbers[0]] = str(result.__cause__ or result)
                continue
            frame = result.to_dataframe()
            frames.append(frame.assign(row=np.array(numbers)[frame["row"]]))
        table, prompts = _COLUMNS.empty_table(), 0
        if frames:
            frame = pd.concat(frames).sort_values("row", kind="stable")
            table = pa.Table.from_pandas(frame, preserve_index=False)
            prompts = int(frame["row"].nunique())
        about = {
            "settings": self.settings,
            "inputs": _digest(inputs),
            "prompts": prompts,
            "rows": table.num_rows,
            "skipped": sorted(skipped.items()),
        }
        with whole(self.file(window)) as temporary:
            _write(temporary, [table], about)
        return about

    def join(self, count: int, records: list[dict[str, Any]]) -> Explanations:
        """The table, where all parts of it are there.

        Raises:
            InputError: there are parts of more inputs, or not one input was explained.
        """
        files = [self.file(window) for window in range(count)]
        done = records
        lock = self.folder.with_name(self.folder.name + ".lock")
        if all(file.exists() for file in files):
            with taking_turns(lock):
                if all(file.exists() for file in files):  # nobody joined them in the meantime
                    done = self._joined(files)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
        return Explanations.of(self.path, done)

    def _joined(self, files: list[Path]) -> list[dict[str, Any]]:
        more = sorted({*self.folder.glob("window-*.parquet")} - {*files})
        if more:
            raise InputError(
                f"{self.folder} was made from more inputs than there are now ({more[0].name}): "
                "move it, or give another place for the results"
            )
        parts = [_about(file) for file in files]
        result = Explanations.of(self.path, parts)
        if not result.rows:
            self._clear(files)
            why = (
                f"not one could be explained: {result.skipped[0][1]}" if result.skipped else "empty"
            )
            raise InputError(f"there is no table of these inputs: {why}")
        about = {
            "settings": self.settings,
            "prompts": result.prompts,
            "rows": result.rows,
            "skipped": result.skipped,
        }
        tables = (_read(file) for file in files)
        with whole(self.path, fresh=True) as temporary:
            if self.path.suffix == ".parquet":
                _write(temporary, tables, about)
            else:
                _write_lines(temporary, tables)
        self._clear(files)
        return parts

    def _clear(self, files: list[Path]) -> None:
        for file in reversed(files):
            file.unlink()
        with suppress(OSError):  # something of the user's is in it
            self.folder.rmdir()


def _digest(inputs: list[Numbered]) -> str:
    """SHA-256 of inputs and targets."""
    digest = hashlib.sha256()
    for _, prompt, target in inputs:
        text = "" if prompt is NO_INPUT else f"{_as_text(prompt)}|{_as_text(target)}"
        digest.update(f"{len(text)}|{text}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _about(path: Path) -> dict[str, Any]:
    """What a part was made from.

    Raises:
        StorageError: damaged, or another kind of file.
    """
    try:
        metadata = (pq.read_schema(path).metadata or {})[KEY]
        about: dict[str, Any] = json.loads(metadata)
        for name in ("settings", "inputs", "prompts", "rows", "skipped"):
            about[name]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    return about


def _damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} is damaged, or no part of a table ({str(error)[:200]}): delete it and run the "
        "same command again"
    )


def _read(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _write(path: Path, tables: Iterable[pa.Table], about: Mapping[str, Any]) -> None:
    """One parquet file of tables that have the same columns; those without rows are left out."""
    writer, empty = None, None
    try:
        for table in tables:
            if not table.num_rows:
                empty = table
                continue
            if writer is None:
                schema = table.schema.with_metadata({KEY: canonical(about).encode()})
                writer = parquet_writer(path, schema)
            writer.write_table(table.cast(schema))
        if writer is None and empty is not None:
            schema = empty.schema.with_metadata({KEY: canonical(about).encode()})
            writer = parquet_writer(path, schema)
    finally:
        if writer is not None:
            writer.close()


def _write_lines(path: Path, tables: Iterable[pa.Table]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for batch in table.to_batches(max_chunksize=4096):
                file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in batch.to_pylist())
