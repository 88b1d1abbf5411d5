"""Which token a target asked for, and whether another was meant.

Tokenizers write most words with the space before them: ``" German"`` is what follows a text,
``"German"`` mostly stands at its beginning. A target that forgets the space is the logit of a token
that the model hardly ever gives there, and its explanation is right and useless.
"""

from __future__ import annotations

from typing import Any

from lenslrp.logits import Outputs

FAR_BEHIND = 10.0
"""How many times more likely the token with a space is, where it is said to be meant."""
AMONG_THE_FIRST = 10
"""The rank that it has at least."""


def asked(target: Any, outputs: Outputs) -> list[tuple[int, int]]:
    """Position and token (or class) of the logit that a target is about, in each row.

    Empty for targets that are about no single token.
    """
    position = getattr(target, "position", None)
    tokens = getattr(target, "tokens_asked", None)
    if position is None or tokens is None:
        return []
    return [(position, token) for token in tokens(outputs)]


def forgotten_space(target: Any, outputs: Outputs) -> str | None:
    """A sentence, where a token was asked for that the model gives with a space before it."""
    text = getattr(target, "token", None)
    if not isinstance(text, str) or outputs.labels is not None or not text[:1].isalnum():
        return None
    ids = outputs.tokenizer.encode(f" {text}", add_special_tokens=False)
    token = outputs.token(text)
    if len(ids) != 1 or ids[0] == token:
        return None
    logits = outputs.rows_at(target.position).detach().float()[0]
    ranks = [int((logits > logits[i]).sum()) + 1 for i in (token, ids[0])]
    times = float((logits[ids[0]] - logits[token]).exp())
    if times < FAR_BEHIND or ranks[1] > AMONG_THE_FIRST:
        return None
    return (
        f"the token {text!r} has rank {ranks[0]:,} there, and {' ' + text!r}, with a space before "
        f"it, rank {ranks[1]}: did you mean {' ' + text!r}?"
    )
