"""The errors that LensLRP raises, one class for each thing a caller can do about it."""

from __future__ import annotations

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What models raise for inputs and settings that they cannot take."""


class LensLRPError(Exception):
    """Base class of every error raised by LensLRP."""


class InputError(LensLRPError, ValueError):
    """The caller gave something that cannot be explained: the message names the valid choice."""


class CoverageError(LensLRPError):
    """An operation between the leaves and the target has no rule, or a rule did not fire.

    Relevance is never returned past such a gap unless ``strict=False`` was given.
    """


class LoadError(LensLRPError):
    """A model could not be loaded; the message says what was looked for and what to do."""


class MissingExtraError(LensLRPError, ImportError):
    """Something needs a package that an extra of LensLRP brings; the message says how to get it."""


class StorageError(LensLRPError):
    """A file is damaged, does not belong here, or could not be written; the message names it."""


class OutOfMemoryError(LensLRPError, RuntimeError, MemoryError):
    """A pass did not fit: the message says what it needs and which options would lower that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, could not allocate: each backend says so in words of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    words = ("out of memory", "defaultcpuallocator", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(word in message for word in words)


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = f"{type(error).__name__}: {lines[0]}" if isinstance(error, LookupError) else lines[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."
