"""A results file of one JSON object a line, so that an interrupted benchmark goes on where it was.

The first line holds the settings. Results made with other settings are not mixed in, and a line
that was being written when the run ended is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")  # ignored by git


@contextmanager
def resumed(
    path: Path, settings: dict[str, Any]
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """What was done already, and a function that appends one more result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(settings)
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = kept[: kept.rfind("\n") + 1] or f"{head}\n"
    first, *lines = kept.splitlines()
    if first != head:
        raise SystemExit(f"{path} was made with other settings: move it, or give --results")
    path.write_text(kept, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def append(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        yield [json.loads(line) for line in lines], append
