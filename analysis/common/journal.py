"""A results file of one JSON object a line, so that an interrupted run goes on where it was.

The first line holds the settings. Results made with other settings are not mixed in, and a line
that was being written when the run ended is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lenslrp.errors import StorageError
from lenslrp.files import cannot_write, make_folder, whole
from lenslrp.fingerprints import require_same_settings

Row = dict[str, Any]


@contextmanager
def resumed(path: Path, settings: Row) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The results in the file so far, and a function that appends one more.

    Raises:
        InputError: the file was made with other settings; the message names them.
        StorageError: a line of the file is damaged, it is another kind of file, or the disk is
            full.
    """
    make_folder(path.parent)
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if not complete:
        complete = (json.dumps(settings) + "\n").encode()
        if not complete.startswith(content):
            raise StorageError(
                f"{path} is in the way: it is no results file of LensLRP. Move it, or give another "
                "place for the results"
            )
    head, *rows = [_parsed(path, n, line) for n, line in enumerate(complete.splitlines(), 1)]
    require_same_settings(path, head, json.loads(json.dumps(settings)))
    if complete != content:
        with whole(path) as temporary:
            temporary.write_bytes(complete)
    with path.open("ab", buffering=0) as file:

        def append(result: Row) -> None:
            left = (json.dumps(result) + "\n").encode()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                raise cannot_write(path, error) from error

        yield rows, append


def _parsed(path: Path, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} line {number} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} line {number} is damaged: no JSON object")
    return value
