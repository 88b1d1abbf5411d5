"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lenslrp.errors import InputError, StorageError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write, beside ``path``, whose place it takes when the block ends well.

    When the block raises, what was at ``path`` is still there and the temporary file is not.

    Raises:
        InputError: the folder of ``path`` does not exist.
        StorageError: the disk is full.
    """
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; cannot write {path.name} there")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise StorageError(
                f"no space left on the disk while writing {path}; what was finished before is "
                "kept. Make room and run the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"code: {errno.ENOSPC}" in str(error) or "No space left" in str(error)
