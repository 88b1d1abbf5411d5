"""The one writer of files: a file appears whole or not at all, and what was there stays.

A file is written in a temporary folder beside its place and renamed by ``os.replace``. Where the
place is a device or a pipe, the finished file is copied into it; where it is a symbolic link, the
file that it leads to is replaced and the link stays. A new file has the permissions that the umask
gives, whatever library wrote it; one that is replaced keeps those that it had.

Several processes, on several hosts, may write on one disk: temporary names carry both, so that what
a killed process left is told from what a living one is writing.
"""

from __future__ import annotations

import errno
import filecmp
import logging
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lenslrp.errors import InputError, StorageError

logger = logging.getLogger("lenslrp")

LINKS = 40
"""Symbolic links that are followed, as in Linux."""

LOCK_PATIENCE = 2.0
"""Seconds to wait for a lock that another process may hold only to see whether it is free."""

HTML = b'<meta name="generator" content="LensLRP">'
"""What every page of ours holds near its beginning."""

_START = 1 << 16
"""Bytes of a file in which the mark of its maker must be."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_NAMESPACE = "pid:[4026531836]"
_TEMPORARY = re.compile(r"\..*\.lenslrp-(?P<host>.+)-(?P<process>\d+)-\d+\.tmp")


@contextmanager
def whole(path: str | Path, *, ours: bytes | None = None, fresh: bool = False) -> Iterator[Path]:
    """A temporary path to write, whose contents take the place of ``path`` when the block ends.

    When the block raises, what was at ``path`` is still there and the temporary file is not.

    Args:
        path: a file, or a place for one; a device, a pipe or a symbolic link is written through.
        ours: what every file of this kind holds near its beginning when LensLRP made it: another
            one is not replaced. None where the folder is our own.
        fresh: replace nothing: a file that is there must have the same contents already.

    Raises:
        InputError: the folder of ``path`` does not exist, or ``path`` is one.
        StorageError: the disk is full, something may not be written, or ``path`` is not ours.
    """
    path = Path(path)
    try:
        target = _end_of_links(path)
        if target.is_dir():
            raise InputError(f"{path} is a directory, give a file")
        if not target.parent.is_dir():
            raise InputError(
                f"the folder {target.parent} does not exist; cannot write {path.name} there"
            )
        if ours is not None:
            require_ours(path, ours)
        through = _is_open_file(target) or (target.exists() and not target.is_file())
        place = Path(tempfile.gettempdir()) if through else target.parent
        with temporary_folder(place, target.name) as scratch:
            temporary = scratch / target.name
            yield temporary
            if through:
                _copy_into(temporary, target)
                return
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if fresh and target.exists() and not filecmp.cmp(temporary, target, shallow=False):
                raise StorageError(
                    f"{path} is in the way: it is another file than the one to be written there. "
                    "Move it, and run the same command again"
                )
            temporary.chmod(_mode(target, scratch))
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def require_ours(path: Path, mark: bytes) -> None:
    """Refuse a place where a file lies that LensLRP did not make. An empty file is nobody's.

    Args:
        mark: what every file of this kind holds near its beginning.

    Raises:
        StorageError: naming the file.
    """
    if not path.is_file() or _is_open_file(_end_of_links(path)):
        return
    with path.open("rb") as file:
        start = file.read(_START)
    if start and mark not in start:
        raise StorageError(
            f"{path} exists and was not made by LensLRP, so it is not replaced. Move it, or choose "
            "another name"
        )


def replaced(path: Path, write: Callable[[], object]) -> Path | None:
    """Call ``write``, which replaces ``path``; the file that was there is kept beside it.

    Returns:
        Where it is kept, such as ``report-1.html``; None if there was none, or the same.
    """
    target = _end_of_links(path)
    if not target.is_file() or _is_open_file(target):
        write()
        return None
    try:
        renamed = _second_name(target)
    except OSError as error:
        raise cannot_write(path, error) from error
    needless = True
    try:
        write()
        needless = filecmp.cmp(renamed, target, shallow=False)
    finally:
        if needless:
            renamed.unlink()
    return None if needless else renamed


def make_folder(path: Path) -> Path:
    """A folder and those above it, where they are not there.

    Raises:
        StorageError: a file is in the way, or it may not be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


_numbers = count()


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder that ends with the block, and in which libraries may leave what they like."""
    short = name.encode()[:100].decode(errors="ignore")
    while True:
        folder = parent / f".{short}.lenslrp-{host()}-{os.getpid()}-{next(_numbers)}.tmp"
        with suppress(FileExistsError):  # of a process that had this number before
            folder.mkdir()
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes of this host left here that were killed while writing."""
    for left in folder.glob(".*.tmp"):
        name = _TEMPORARY.fullmatch(left.name)
        if name and name["host"] == host() and not runs(int(name["process"])):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock at ``path``, and hold it for the block."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            logger.warning("waiting for another process that is preparing %s", path.parent)
            lock.acquire()
    except OSError:  # no locks on this disk; what is made at the same time is the same
        yield
        return
    try:
        yield
    finally:
        lock.release()


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of zstd pages that carry checksums."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


@cache
def host() -> str:
    """This host, in letters, digits, dots and dashes.

    Containers of one host may share its name, but not the numbers of processes: they are told apart
    by their process namespace.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname()).strip("-.")[:60] or "unnamed"
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return name
    return name if namespace == _FIRST_NAMESPACE else f"{name}-{re.sub('[^0-9]', '', namespace)}"


def runs(process: int) -> bool:
    """Whether a process of this host is alive."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def cannot_write(path: Path, error: Exception) -> StorageError:
    """What to say of an error while writing."""
    number = getattr(error, "errno", None)
    if number in _FULL or any(_says(error, full) for full in _FULL):
        return StorageError(
            f"no space left on the disk while writing {path}; what was finished before is "
            "kept. Make room and run the same command again"
        )
    if number == errno.EFBIG or _says(error, errno.EFBIG):
        return StorageError(
            f"{path} would be larger than the limit on the size of a file here (ulimit -f); what "
            "was finished before is kept"
        )
    reason = os.strerror(number) if isinstance(number, int) else str(error)
    return StorageError(f"cannot write {path}: {reason}")


def _says(error: Exception, number: int) -> bool:
    """Whether an error of safetensors, which has no number, tells of this one."""
    return isinstance(error, SafetensorError) and (
        f"code: {number}" in str(error) or f"os error {number}" in str(error)
    )


def _end_of_links(path: Path) -> Path:
    """Where a path leads, through symbolic links to their end, which need not exist."""
    if "\0" in str(path):
        raise InputError(f"no file can be called {str(path)!r}")
    start = path
    for _ in range(LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if _is_open_file(path) or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise StorageError(f"{start} is a symbolic link that leads in a circle")


def _is_open_file(path: Path) -> bool:
    """Whether a path is a file that this process has open, such as ``/dev/stdout``."""
    return path.parent == Path(f"/proc/{os.getpid()}/fd") and path.name.isdecimal()


def _mode(target: Path, scratch: Path) -> int:
    """The permissions of the file that is replaced, or those of a new one."""
    if not target.exists():
        return stat.S_IMODE(scratch.stat().st_mode) & 0o666
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(target.stat().st_mode)


def _copy_into(source: Path, target: Path) -> None:
    """Write what ``source`` holds into a device, a pipe, or an open file at its position."""
    if _is_open_file(target):
        sys.stdout.flush()
    with (
        source.open("rb") as read,
        open(os.dup(int(target.name)) if _is_open_file(target) else target, "wb") as write,
    ):
        shutil.copyfileobj(read, write, 1 << 20)


def _second_name(path: Path) -> Path:
    """The same file once more, under the first free name: ``report-1.html``."""
    for number in count(1):
        kept = path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            os.link(path, kept)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            try:  # a file system without hard links
                with kept.open("xb") as copy, path.open("rb") as source:
                    shutil.copyfileobj(source, copy, 1 << 20)
            except FileExistsError:
                continue
        return kept
    raise AssertionError("numbers do not end")


def slug(text: str, *, limit: int = 100) -> str:
    """``text`` with nothing but letters, digits, dots, dashes, underscores: a name, not a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:limit] or "unnamed"
