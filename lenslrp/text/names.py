"""What a caller calls a token or a class, made into its number."""

from __future__ import annotations

import difflib
from typing import Any

from lenslrp.errors import InputError
from lenslrp.text.spelling import Speller
from lenslrp.text.words import pieces

Token = str | int


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a target string, without special tokens.

    Raises:
        InputError: an empty string, or a model without a tokenizer.
    """
    if tokenizer is None:
        raise InputError("this model has no tokenizer: give the target as a token id")
    if not text:
        raise InputError("the target is an empty string; give at least one token")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def token_id(tokenizer: Any, token: Token, vocabulary: int) -> int:
    """One token of the vocabulary from a string or an id.

    Raises:
        InputError: an id outside the vocabulary, or a string of several tokens.
    """
    if isinstance(token, str):
        ids = token_ids(tokenizer, token)
        if len(ids) != 1:
            shown = pieces(Speller(tokenizer).spell(ids))
            raise InputError(
                f"{token!r} is {len(ids)} tokens ({shown}); give one token, or explain them all "
                "with targets.Sequence"
            )
        token = ids[0]
    if isinstance(token, bool) or not isinstance(token, int):
        raise InputError(f"a token is a string or an integer id, not {token!r}")
    if not 0 <= token < vocabulary:
        raise InputError(
            f"target token {token} is outside the vocabulary: ids go from 0 to {vocabulary - 1}"
        )
    return token


def class_id(labels: dict[int, str], name: Token, classes: int) -> int:
    """A class of a classifier from its label, one of the label's synonyms, or its number.

    Raises:
        InputError: no class is called that, with the nearest labels, or several are; or a number
            out of range.
    """
    if isinstance(name, str):
        called: dict[str, set[int]] = {}
        for index, text in labels.items():
            called.setdefault(text, set()).add(index)
        whole = set(called)
        for index, text in labels.items():  # "tabby, tabby cat"
            for synonym in {synonym.strip() for synonym in text.split(",")} - whole:
                called.setdefault(synonym, set()).add(index)
        if name not in called:
            lower = {text.lower(): text for text in called}
            near = difflib.get_close_matches(name.lower(), lower, n=3) or list(lower)[:3]
            raise InputError(
                f"no class is called {name!r}; nearest: {', '.join(lower[n] for n in near)}"
            )
        if len(called[name]) > 1:
            raise InputError(
                f"classes {', '.join(map(str, sorted(called[name])))} are all called {name!r}: "
                "give a number"
            )
        return min(called[name])
    if isinstance(name, bool) or not isinstance(name, int):
        raise InputError(f"a class is a label or an integer, not {name!r}")
    if not 0 <= name < classes:
        raise InputError(f"class {name} does not exist: they go from 0 to {classes - 1}")
    return name
