"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lenslrp.errors import InputError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file to write, beside ``path``, which it replaces when the block ends well.

    When the block raises, what was at ``path`` is still there and the temporary file is not. The
    mode of the result is that of any new file.

    Raises:
        InputError: the folder of ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; cannot write {path.name} there")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
