"""Packages that the extras bring, asked for before the work that needs them begins."""

from __future__ import annotations

from importlib import import_module

from lenslrp.errors import MissingExtraError

EXTRAS = {
    "PIL": "evaluate",
    "bitsandbytes": "quantised",
    "captum": "evaluate",
    "gguf": "demo",
    "matplotlib": "plot",
    "onnx": "demo",
    "peft": "peft",
    "ray": "ray",
    "torchao": "quantised",
}
"""Package, as it is imported, to the extra that brings it."""


def require(package: str, what: str, extra: str | None = None) -> None:
    """Say which extra is missing, if one is.

    Args:
        package: a key of `EXTRAS`.
        what: what needs it.
        extra: which extra to name, where several bring it.

    Raises:
        MissingExtraError: it is not installed; the message is the command that installs it.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: "
            f"pip install 'lenslrp[{extra or EXTRAS[package]}]'"
        ) from error
