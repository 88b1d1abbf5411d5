"""Logits: what targets read of them, and where they are computed.

The unembedding of one position costs as much as a large part of a block, and its output is the
largest tensor of a pass. So logits are computed at every position, or only where a target reads
them; what is read there is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks.components import UnembeddingBridge
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.state import users_hooks
from lenslrp.text.names import Token, class_id, token_id
from lenslrp.text.spelling import str_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.sentences import SentenceEmbedding

LOGITS = ("all", "target")

Columns = Int[Tensor, "batch n"]


def require_logits(logits: str) -> None:
    """Refuse another choice than those of `LOGITS`."""
    if logits not in LOGITS:
        raise InputError(f"logits must be one of {LOGITS}, not {logits!r}")


@dataclass(frozen=True)
class Outputs:
    """What a target is computed from.

    Attributes:
        logits: the model's logits, through which gradients flow.
        batch: what was run, which says where a position is; the logits are of what it has
            ``written``.
        tokenizer: the model's tokenizer, or ``None``.
        activation: gives the tensor at a hook point that was asked for, on the graph.
        labels: names of a classifier's classes, ``None`` for other models. Its logits are
            [batch, class] and have no positions.
        columns: where the logits are, if they are not at every position.
        embedding: how the checkpoint makes one vector of a text, where it says so. A bare model's
            ``logits`` are its hidden states.
    """

    logits: Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch class"]
    batch: Batch
    tokenizer: Any
    activation: Callable[[str], Tensor]
    labels: dict[int, str] | None = None
    columns: Int[Tensor, "batch n"] | None = None
    embedding: SentenceEmbedding | None = None

    def token(self, token: Token) -> int:
        """The column of a token, or of a class, in the logits.

        Raises:
            InputError: no token of the tokenizer, or an id outside the vocabulary.
        """
        if self.labels is not None:
            return class_id(self.labels, token, self.logits.shape[-1])
        return token_id(self.tokenizer, token, self.logits.shape[-1])

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True where a token of the text that the logits belong to is real."""
        return self.batch.written.mask.to(self.logits.device)

    @property
    def prompt_lengths(self) -> list[int]:
        """Real tokens of each row's prompt; what follows is a teacher-forced target."""
        return self.batch.written.prompt_lengths

    def at(self, position: int) -> Int[Tensor, " batch"]:
        """The column of the logits at ``position`` in each row.

        Raises:
            InputError: a position outside a row.
        """
        return self.batch.written.columns(position)

    def row(self, row: int) -> Outputs:
        """The outputs of one row, as a batch of one: other rows may be shorter."""
        one = slice(row, row + 1)
        return replace(
            self,
            logits=self.logits[one],
            batch=self.batch.texts_of(row),
            columns=None if self.columns is None else self.columns[one],
            activation=lambda hook: self.activation(hook)[one],
        )

    def place(self, position: int) -> str:
        """What a target's text says of its position: nothing where there is none."""
        return "" if self.logits.ndim == 2 else f" at position {position}"

    def rows_at(self, position: int) -> Float[Tensor, "batch vocab"]:
        """The logits at one position of each row; a classifier has but one.

        Raises:
            InputError: a position outside a row.
        """
        if self.logits.ndim == 2:
            if position != -1:
                raise InputError(f"a classifier's logits have no positions; {position} was given")
            return self.logits
        return self.logits_at(self.at(position)[:, None])[:, 0]

    def logits_at(self, columns: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n vocab"]:
        """The logits at columns of each row."""
        if self.columns is not None:  # the logits are of these columns
            same = self.columns[:, None, :] == columns[:, :, None].to(self.columns.device)
            columns = same.int().argmax(dim=2)
        rows = torch.arange(len(self.logits), device=self.logits.device)[:, None]
        return self.logits[rows, columns.to(self.logits.device)]

    def span(self, length: int) -> Int[Tensor, "batch length"]:
        """The columns that predict ``length`` tokens after each row's prompt."""
        return self.batch.written.span(length)


@runtime_checkable
class Target(Protocol):
    """Anything with a text and a value per batch row."""

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """What is explained in each row, on the autograd graph."""

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""


def shown(outputs: Outputs, token: Token) -> str:
    """A token, or a class, as a target's text names it."""
    if outputs.labels is not None and isinstance(token, int):
        return repr(outputs.labels.get(token, token))
    if isinstance(token, str) or outputs.tokenizer is None:
        return repr(token)
    return repr(str_token(outputs.tokenizer, token))


def columns_of(targets: Iterable[Target], outputs: Outputs) -> Columns | None:
    """The columns that targets read the logits at, each once; ``None`` where one reads them all.

    Args:
        targets: targets of one batch.
        outputs: without logits: masks and lengths of the batch.

    Raises:
        InputError: a position outside a row.
    """
    distinct: dict[tuple[int, ...], Columns] = {}
    for target in targets:
        columns = columns_read(target, outputs)
        if columns is None:
            return None
        for column in columns.unbind(dim=1):
            distinct[tuple(column.tolist())] = column
    return torch.stack(list(distinct.values()), dim=1)


def columns_read(target: Target, outputs: Outputs) -> Columns | None:
    """The columns that one target reads; ``None`` where it reads all, or does not say."""
    columns = getattr(target, "columns", None)
    return None if columns is None else columns(outputs)


def head_component(model: TransformerBridge) -> nn.Module | None:
    """The component that makes logits of the residual stream, where the bridge has one."""
    unembed = getattr(model, "_modules", {}).get("unembed")
    return unembed if isinstance(unembed, UnembeddingBridge) else None


def is_hooked(model: TransformerBridge, unembed: nn.Module) -> bool:
    """Whether somebody else's hooks see the logits, or what they are made of."""
    inner = getattr(model, "original_model", model)
    after = [hook for of in (model, inner) for hook in users_hooks(of, ("_forward_hooks",))]
    return bool(after) or any(True for of in unembed.modules() for _ in users_hooks(of))


def unembed_at(at: Attached, unembed: nn.Module, columns: Columns, length: int) -> list[bool]:
    """Unembed the chosen columns of a batch of ``length`` positions alone.

    Returns a list that is not empty once that has happened.
    """
    picked: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != (len(columns), length):
            return None  # of another text
        picked.append(True)
        return (at_columns(x, columns), *args[1:])

    at.first_pre_hook(unembed, pick)
    return picked


def at_columns(x: Tensor, columns: Columns) -> Tensor:
    """``x`` [batch, pos, ...] at the columns of each row: [batch, n, ...]."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, columns.to(x.device)]


def spread(x: Tensor, columns: Columns, length: int) -> Tensor:
    """The inverse of `at_columns`: 0 at the positions that were not picked."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    full = x.new_zeros(len(x), length, *x.shape[2:])
    full[rows, columns.to(x.device)] = x
    return full
