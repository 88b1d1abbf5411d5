"""The folder of a dictionary in the making: whose it is, who is using it, and how it is cleared.

Work in progress lies in `work` inside the dictionary's folder. LensLRP makes it together with a
mark, in one step; a folder of that name without the mark is somebody else's, and is neither written
to nor cleared. Clearing deletes the files that we make, by their names, and nothing else.

One process at a time builds, and one scans a shard. It holds a lock of the operating system, which
ends with the process, and leaves a note that says who it is. Where the lock is free and the note is
still there, the process was killed: of this host, or of another one whose locks are not seen here.
The first is taken over; of the second nobody here can know, so the user is asked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lenslrp.analysis.common.storage import load_json, save_json
from lenslrp.errors import StorageError
from lenslrp.files import (
    LOCK_PATIENCE,
    cannot_write,
    host,
    make_folder,
    remove_leftovers,
    runs,
    temporary_folder,
)

FILES = frozenset(
    {
        "units.parquet",
        "examples.parquet",
        "vocabulary.parquet",
        "texts.sqlite",
        "citations.safetensors",
        "samples.safetensors",
    }
)
"""What a dictionary consists of, with `manifest.json`."""

MANIFEST, PLAN, MARK = "manifest.json", "plan.json", "lenslrp.json"
BUILD = "build"
TURNS = "prepare.lock"
"""Held while what all shards start from is prepared."""

_MADE = re.compile(
    r"(shard-\d{5,}-of-\d{5,}|replay-\d{5,}-of-\d{5,}-\d{6,}|vocabulary-\d{5,})\.safetensors"
)
_IN_CORPUS = re.compile(r"corpus\.json|part-\d{6,}\.safetensors")
NOTE = ".holder.json"
_OF_LOCKS = re.compile(r"(build|prepare|shard-\d{5,}-of-\d{5,})(\.lock|\.holder\.json)")


def begin_work(folder: Path) -> Path:
    """The place for work on the dictionary `folder`: made, or found as it was left.

    Raises:
        StorageError: a finished dictionary is there, or something that LensLRP did not make.
    """
    work = folder / "work"
    if (folder / MANIFEST).exists() and not (_is_ours(work) and (work / PLAN).exists()):
        if _is_finished(folder):
            raise StorageError(
                f"{folder} holds a finished dictionary already: open it, or choose another path"
            )
        raise _in_the_way(folder / MANIFEST)
    if not _is_ours(work):
        for name in ("work", *sorted(FILES)):
            if os.path.lexists(folder / name):
                raise _in_the_way(folder / name)
        make_folder(folder)
        _make(work)
    for place in (folder, work, work / "corpus"):
        remove_leftovers(place)
    return work


def found_work(folder: Path) -> Path:
    """The place where another process has begun.

    Raises:
        StorageError: none has.
    """
    work = folder / "work"
    if not _is_ours(work):
        raise StorageError(f"{work} is not there: no dictionary was begun in {folder}")
    return work


def _is_ours(work: Path) -> bool:
    return work.is_dir() and not work.is_symlink() and (work / MARK).is_file()


def _make(work: Path) -> None:
    """The folder and its mark at once, so that a kill leaves both or none."""
    try:
        with temporary_folder(work.parent, work.name) as scratch:
            save_json(scratch / MARK, {"what": "work on a dictionary in progress, made by LensLRP"})
            scratch.rename(work)
    except OSError as error:
        if not _is_ours(work):  # another process was quicker
            raise cannot_write(work, error) from error


def _is_finished(folder: Path) -> bool:
    with suppress(StorageError):
        return "plan_sha256" in load_json(folder / MANIFEST)
    return False


def _in_the_way(path: Path) -> StorageError:
    return StorageError(
        f"{path} is in the way: LensLRP did not make it, and a dictionary in {path.parent} would "
        "need its place. Choose another path for the dictionary, or move it"
    )


def clear_work(work: Path) -> None:
    """Delete our files in `work`, and the folder if nothing else is in it.

    The plan goes first: without it, what is left of the work is not gone on with.
    """
    (work / PLAN).unlink(missing_ok=True)
    remove_leftovers(work)
    for path in work.iterdir():
        if _MADE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    clear_corpus(work / "corpus")
    for path in work.iterdir():
        if _OF_LOCKS.fullmatch(path.name):
            with suppress(OSError):  # Windows: it is open
                path.unlink(missing_ok=True)
    (work / MARK).unlink()
    with suppress(OSError):  # something of the user's is in it
        work.rmdir()


def clear_corpus(folder: Path) -> None:
    """Delete a tokenised corpus, if there is one."""
    if not folder.is_dir():
        return
    remove_leftovers(folder)
    for path in folder.iterdir():
        if _IN_CORPUS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def shard_name(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}"


@contextmanager
def using(work: Path, what: str) -> Iterator[None]:
    """Hold `work` for building (`BUILD`, which excludes all others) or for one shard.

    Raises:
        StorageError: another process is using it; the message says which.
    """
    with _locked(work, what) as surely:
        _require_over(work, what, surely)
        for note in sorted(work.glob(f"*{NOTE}")):
            other = note.name.removesuffix(NOTE)
            if other != what and BUILD in (what, other):
                with _locked(work, other) as surely:
                    _require_over(work, other, surely)
        note = work / f"{what}{NOTE}"
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        save_json(note, {"process": os.getpid(), "host": host(), "since": since})
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


@contextmanager
def _locked(work: Path, what: str) -> Iterator[bool]:
    """The lock of one kind of work, and whether it is one: not every disk has locks."""
    lock = FileLock(work / f"{what}.lock")
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        raise _in_use(work, what, _holder(work, what)) from None
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _require_over(work: Path, what: str, surely: bool) -> None:
    """Refuse where whoever left a note may still be at work.

    Args:
        surely: the lock was free, so it is no process of this host.
    """
    holder = _holder(work, what)
    if holder is None:
        return
    if holder["host"] != host():
        note = work / f"{what}{NOTE}"
        raise StorageError(
            f"{work.parent} was in use ({what}) by process {holder['process']} on host "
            f"{holder['host']} since {holder['since']}, and from host {host()} it cannot be told "
            f"whether it still is. If that process has ended, delete {note} and run the same "
            "command again: it goes on from there"
        )
    if not surely and runs(holder["process"]):
        raise _in_use(work, what, holder)


def _holder(work: Path, what: str) -> dict[str, Any] | None:
    """Who left a note, if anybody did."""
    try:
        note = load_json(work / f"{what}{NOTE}")
    except StorageError:
        return None
    fits = isinstance(note.get("process"), int) and isinstance(note.get("host"), str)
    return note if fits and isinstance(note.get("since"), str) else None


def _in_use(work: Path, what: str, holder: dict[str, Any] | None) -> StorageError:
    who = "another process"
    if holder is not None:
        who = f"process {holder['process']} on host {holder['host']} since {holder['since']}"
    return StorageError(
        f"{work.parent} is in use ({what}) by {who}. Wait until it has ended, or choose another "
        "path"
    )
