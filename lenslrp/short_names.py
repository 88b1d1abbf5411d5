"""Hook names in short, as TransformerLens' ``ActivationCache`` takes them: ``("post", 5)``."""

from __future__ import annotations

from collections.abc import Container
from typing import TypeAlias

from transformer_lens.utilities.components_utils import get_act_name

from lenslrp.errors import InputError

Name: TypeAlias = str | tuple[str, int] | tuple[str, int, str]
"""A hook name, whole or in short: ``"blocks.5.mlp.hook_post"``, ``"post5"``, ``("post", 5)``."""


def full_name(key: Name, known: Container[str]) -> str:
    """The whole hook name that a key stands for, by TransformerLens' `get_act_name`.

    Args:
        key: a hook name; a short form; or the name with a layer, and with the part of the block
            where it is in several: ``("normalized", 5, "ln1")``.
        known: names that are whole as they are.

    Raises:
        InputError: something else, or a layer that is not counted from 0.
    """
    if isinstance(key, str):
        return key if key in known else str(get_act_name(key))
    if not isinstance(key, tuple) or not 2 <= len(key) <= 3 or not isinstance(key[0], str):
        raise InputError(
            f"{key!r} is no key: index with a hook name, with one in short such as ('post', 5), or "
            "with the number of a row; R.rows takes slices"
        )
    if not isinstance(key[1], int) or key[1] < 0:
        raise InputError(f"{key!r}: give the layer as a number from 0")
    return str(get_act_name(*key))
