"""Prompts from a file or standard input, a line each, read as they are needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lenslrp.errors import InputError
from lenslrp.explaining import NO_INPUT

TEXT_FILES = (".jsonl", ".txt")
STDIN = Path("-")


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, of standard input where ``path`` is ``-``.

    Raises:
        InputError: no such file, or one of another kind.
    """
    if path == STDIN:
        yield from sys.stdin.buffer
        return
    if path.suffix not in TEXT_FILES:
        raise InputError(f"{path.name}: a file of prompts is one of {', '.join(TEXT_FILES)}, or -")
    try:
        file: IO[bytes] = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield from file


def prompts_of(path: Path, default: Any = None) -> Iterator[tuple[Any, Any]]:
    """Prompt and target of each line: number ``n`` of the results is line ``n + 1``.

    A line of text is a prompt. A line of ``.jsonl`` is an object with ``prompt`` (a string) or
    ``messages`` (a conversation) and, if given, ``target``: a string, or a token id. Lines of
    standard input are either. A damaged line gives an `InputError` in place of its prompt,
    an empty one nothing.

    Args:
        default: the target of lines that have none.
    """
    for number, line in enumerate(lines_of(path)):
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
            if not text.strip():
                yield NO_INPUT, default
            elif path.suffix == ".txt" or (path == STDIN and not text.lstrip().startswith("{")):
                yield text, default
            else:
                yield _from_json(text, default)
        except UnicodeDecodeError as error:
            yield InputError(f"not UTF-8: {error.reason} at byte {error.start}"), default
        except InputError as error:
            yield error, default


def _from_json(line: str, default: Any) -> tuple[Any, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {error}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError("no JSON object with either 'prompt' or 'messages'")
    prompt = record.get("prompt")
    if "messages" in record:
        prompt = record["messages"]
        if not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
            raise InputError("'messages' is a list of objects with 'role' and 'content'")
    elif not isinstance(prompt, str):
        raise InputError(f"'prompt' is a string, not {type(prompt).__name__}")
    target = record.get("target")
    if target is not None and (isinstance(target, bool) or not isinstance(target, str | int)):
        raise InputError(f"'target' is a string or a token id, not {type(target).__name__}")
    return prompt, default if target is None else target
