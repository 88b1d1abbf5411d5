"""Bars for what takes long, in one place.

A bar appears after some seconds, where somebody looks: in a notebook or at a terminal, and not in a
file or a test. ``TQDM_DISABLE=1`` in the environment switches every one off.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

with warnings.catch_warnings():  # without ipywidgets a notebook's bars are text
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm

PATIENCE = 3.0
"""Seconds without a bar."""


def progress_bar(
    what: str,
    things: Iterable[Any] | None = None,
    total: int | None = None,
    *,
    shown: bool | None = None,
    **options: Any,
) -> tqdm[Any]:
    """A bar over ``things``, or one that is moved by ``update``.

    Args:
        what: is done; stands before the bar.
        things: gone through.
        total: how many there are, where that is not their length.
        shown: always or never; ``None`` for a bar that waits and looks, see the module.
        options: of tqdm.
    """
    notebook = _in_notebook()
    if shown is None:
        options = {"delay": PATIENCE, "leave": False, **options}
        shown = notebook or sys.stderr.isatty()
    if notebook:
        options = {"file": sys.stdout, **options}  # a notebook puts the other one in a red box
    hidden = {} if shown else {"disable": True}  # else as TQDM_DISABLE says
    return tqdm(things, what, total, **hidden, **options)


def _in_notebook() -> bool:
    """Whether a kernel runs this, which to have imported one does not make so."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
