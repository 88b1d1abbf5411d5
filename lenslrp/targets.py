"""What is explained: the scalar, one a batch row, at which the backward pass starts.

Every target is a small frozen dataclass whose ``values(outputs)`` gives [batch] numbers in logits
(or in the unit of the activation that is explained), and whose ``text(outputs)`` says in words what
they are. Anything with these two methods is a target. A token is a string, which must be one token
of the model's tokenizer, or an id; for a classifier, a class's name or number. Positions count the
real tokens of a row: 0 is its first token that is not padding, -1 its last.

Examples:
    >>> from lenslrp import targets
    >>> target = targets.LogitDiff(" Paris", " Rome")  # why Paris rather than Rome?
    >>> logits, R = lenslrp.run_with_relevance(model, "The capital of France is", target)
    >>> R.target.text
    "logit difference ' Paris' - ' Rome' at position -1"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.asked import asked, forgotten_space
from lenslrp.batch import PAIRED as PAIRED
from lenslrp.batch import reads_the_encoder as reads_the_encoder
from lenslrp.combined import PerRow as PerRow
from lenslrp.combined import Sum as Sum
from lenslrp.combined import parts_of as parts_of
from lenslrp.errors import InputError
from lenslrp.latent import Activation as Activation
from lenslrp.logits import Outputs as Outputs
from lenslrp.logits import Target as Target
from lenslrp.logits import shown
from lenslrp.sentences import DenseLayer as DenseLayer
from lenslrp.sentences import Embedding as Embedding
from lenslrp.sentences import SentenceEmbedding as SentenceEmbedding
from lenslrp.sentences import Similarity as Similarity
from lenslrp.text.names import Token, token_ids
from lenslrp.text.spelling import Speller

__all__ = [
    "Activation", "Contrastive", "Custom", "DenseLayer", "Embedding", "Explained", "LogProb",
    "Logit", "LogitDiff", "Outputs", "PerRow", "SentenceEmbedding", "Sequence", "Similarity",
    "Sum", "Target", "Top",
]  # fmt: skip


class _AtPosition:
    """A target that reads the logits at one position."""

    position: int

    def tokens_asked(self, outputs: Outputs) -> list[int]:
        """The token (or class) whose logit it is about in each row; of a difference, the first."""
        token: Token = vars(self)["a" if "a" in vars(self) else "token"]
        return [outputs.token(token)] * len(outputs.logits)

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"]:
        """Where it reads the logits."""
        return outputs.at(self.position)[:, None]


@dataclass(frozen=True)
class Top(_AtPosition):
    """The top logit at a position, in each row its own: the default target.

    Args:
        position: of the logits, in the row's real tokens.
    """

    position: int = -1

    def tokens_asked(self, outputs: Outputs) -> list[int]:
        """The token with the top logit in each row."""
        best: list[int] = outputs.rows_at(self.position).argmax(dim=1).tolist()
        return best

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The largest logit of each row, in logits."""
        rows: Tensor = outputs.rows_at(self.position)
        return rows.gather(1, rows.argmax(dim=1, keepdim=True))[:, 0]

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        names = ", ".join(shown(outputs, i) for i in self.tokens_asked(outputs))
        return f"top logit {names}{outputs.place(self.position)}"


@dataclass(frozen=True)
class Logit(_AtPosition):
    """The logit of one token.

    Args:
        token: one token, as a string or an id.
        position: of the logits, in the row's real tokens.
    """

    token: Token
    position: int = -1

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The token's logit in each row, in logits."""
        return outputs.rows_at(self.position)[:, outputs.token(self.token)]

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        return f"logit of {shown(outputs, self.token)}{outputs.place(self.position)}"


@dataclass(frozen=True)
class LogitDiff(_AtPosition):
    """The logit of ``a`` minus that of ``b``: positive evidence is for one and against the other.

    Args:
        a: one token, as a string or an id.
        b: likewise.
        position: of the logits, in the row's real tokens.
    """

    a: Token
    b: Token
    position: int = -1

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The difference in each row, in logits."""
        rows = outputs.rows_at(self.position)
        return rows[:, outputs.token(self.a)] - rows[:, outputs.token(self.b)]

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        a, b = shown(outputs, self.a), shown(outputs, self.b)
        return f"logit difference {a} - {b}{outputs.place(self.position)}"


@dataclass(frozen=True)
class Contrastive(_AtPosition):
    """The logit of a token minus the mean of all the others, or of the ``top_k`` best others.

    Args:
        token: one token, as a string or an id.
        position: of the logits, in the row's real tokens.
        top_k: how many of the largest other logits; ``None`` for all of them.
    """

    token: Token
    position: int = -1
    top_k: int | None = None

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The contrast in each row, in logits."""
        rows, token = outputs.rows_at(self.position), outputs.token(self.token)
        logit = rows[:, token]
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | None):
            raise InputError(f"top_k is a number of other tokens or None, not {self.top_k!r}")
        if rows.shape[1] == 1:
            raise InputError("this model has one logit, and no others to set it against")
        if self.top_k is None:
            return logit - (rows.sum(dim=1) - logit) / (rows.shape[1] - 1)
        if not 1 <= self.top_k < rows.shape[1]:
            raise InputError(f"top_k must be from 1 to {rows.shape[1] - 1}, not {self.top_k}")
        others = rows.detach().clone()
        others[:, token] = -torch.inf
        best = others.topk(self.top_k, dim=1).indices
        return logit - rows.gather(1, best).mean(dim=1)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        others = "the rest" if self.top_k is None else f"the top {self.top_k} others"
        where = outputs.place(self.position)
        return f"logit of {shown(outputs, self.token)} against {others}{where}"


@dataclass(frozen=True)
class LogProb(_AtPosition):
    """The log-probability of a token.

    It is not linear in the logits: what that adds is ``nonlinear_target`` in the ledger.

    Args:
        token: one token, as a string or an id.
        position: of the logits, in the row's real tokens.
    """

    token: Token
    position: int = -1

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The natural logarithm of the probability, in each row."""
        rows = outputs.rows_at(self.position)
        return torch.log_softmax(rows, dim=1)[:, outputs.token(self.token)]

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        return f"log-probability of {shown(outputs, self.token)}{outputs.place(self.position)}"


@dataclass(frozen=True)
class Sequence:
    """A span of several tokens after the prompt, teacher-forced: the sum over its tokens.

    Args:
        tokens: a string, or token ids; they are appended to every prompt but the last one, which
            is only predicted.
        of: sum the tokens' logits, or their log-probabilities.

    Raises:
        InputError: no token, something else than tokens, or another ``of``.
    """

    tokens: str | tuple[int, ...] | list[int]
    of: Literal["logit", "log_prob"] = "logit"

    def __post_init__(self) -> None:
        if self.of not in ("logit", "log_prob"):
            raise InputError(f"of must be 'logit' or 'log_prob', not {self.of!r}")
        if not isinstance(self.tokens, str | SequenceABC | Tensor):
            raise InputError(f"a Sequence target is a string or token ids, not {self.tokens!r}")
        if len(self.tokens) == 0:
            raise InputError("a Sequence target needs at least one token")
        if not isinstance(self.tokens, str):
            items = [t.item() if isinstance(t, Tensor) else t for t in self.tokens]
            wrong = [t for t in items if isinstance(t, bool) or not isinstance(t, int) or t < 0]
            if wrong:
                raise InputError(f"token ids are integers from 0, not {wrong[0]!r}")
            object.__setattr__(self, "tokens", tuple(items))

    def ids(self, tokenizer: Any) -> list[int]:
        """The token ids of the span."""
        if isinstance(self.tokens, str):
            return token_ids(tokenizer, self.tokens)
        return list(self.tokens)

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"]:
        """Where it reads the logits."""
        return outputs.span(len(self.ids(outputs.tokenizer)))

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The sum over the span, in each row, in logits (or nats)."""
        ids = [outputs.token(i) for i in self.ids(outputs.tokenizer)]
        rows = outputs.logits_at(outputs.span(len(ids)))
        if self.of == "log_prob":
            rows = torch.log_softmax(rows, dim=-1)
        index = torch.tensor(ids).to(rows.device).view(1, -1, 1).expand(len(rows), -1, 1)
        return rows.gather(2, index)[:, :, 0].sum(dim=1)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        ids = self.ids(outputs.tokenizer)
        span = str(ids)
        if outputs.tokenizer is not None:
            span = repr(Speller(outputs.tokenizer).spell(ids).text)
        unit = "logits" if self.of == "logit" else "log-probabilities"
        return f"sum of {unit} of the span {span}"


@dataclass(frozen=True)
class Custom:
    """A function of the logits [batch, pos, vocab] that returns [batch] values.

    Args:
        fn: differentiable; a scalar is divided evenly among the rows.
        name: what it is called in ``R.target``.

    Examples:
        >>> mean = targets.Custom(lambda logits: logits[:, -1].mean(dim=-1), "mean logit")
    """

    fn: Callable[[Tensor], Tensor]
    name: str = "custom"

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """What the function returns."""
        values = self.fn(outputs.logits)
        if not isinstance(values, Tensor) or values.shape not in ((), (len(outputs.logits),)):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"a Custom target must return a tensor of shape [{len(outputs.logits)}], one value "
                f"a batch row, not {got}"
            )
        if values.is_complex():
            raise InputError(f"a Custom target must return real numbers, not {values.dtype}")
        return values.expand(len(outputs.logits)) / (
            len(outputs.logits) if values.shape == () else 1
        )

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        return f"{self.name} function of the logits"


@dataclass(frozen=True)
class Explained:
    """What exactly was explained: its text, and its value in each batch row.

    Attributes:
        text: of the target.
        value: [batch], in logits or the activation's own unit; relevance is in the same.
        texts: of each row, where there are several.
        asked: in each row the position and the token (or class) whose logit it is about; empty
            where it is about no single one.
    """

    text: str
    value: Float[Tensor, " batch"] = field(repr=False)
    texts: tuple[str, ...] = field(default=(), repr=False)
    asked: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @classmethod
    def by(cls, target: Target, outputs: Outputs, values: Tensor) -> Explained:
        """What a target explained in these outputs, where its values are ``values``."""
        rows = len(values) if len(values) > 1 else 0
        each = target.targets if isinstance(target, PerRow) else (target,) * rows
        texts = tuple(each[row].text(outputs.row(row)) for row in range(rows))
        tokens = []
        for row, part in enumerate(parts_of(target)):
            seen = outputs.row(row) if isinstance(target, PerRow) else outputs
            tokens += asked(part, seen)
            if said := forgotten_space(part, seen):
                warnings.warn(said, stacklevel=2)
        tokens = tokens if len(tokens) == len(values) else []
        return cls(target.text(outputs), values.detach(), texts, tuple(tokens))

    def of(self, row: int) -> str:
        """What was explained in one row."""
        return self.texts[row] if self.texts else self.text

    def __str__(self) -> str:
        values = ", ".join(f"{v:.4g}" for v in self.value.tolist())
        return f"{self.text} = {values}"


def require_latent(target: Target, architecture: str) -> None:
    """Refuse targets on logits for a model that has none.

    Raises:
        InputError: naming the targets that such a model has.
    """
    of_states = (Activation, Custom, Embedding, Similarity)
    if not all(isinstance(part, of_states) for part in parts_of(target)):
        raise InputError(
            f"{architecture} has no head: its output is hidden states or an embedding, not logits. "
            "Explain one of its units with targets.Activation(hook, unit, position), a text's "
            "vector with targets.Embedding and targets.Similarity, or a function of its output "
            "with targets.Custom(fn)"
        )


def as_target(
    target: Any, tokenizer: Any, batch: int, labels: dict[int, str] | None = None
) -> Target:
    """A target from what a caller may give: ``None``, a string, a token id, a list, a Target.

    Strings are a classifier's ``labels`` where there are any, else tokens.

    Raises:
        InputError: anything else, or a list whose length is not the batch's.
    """
    if target is None:
        return Top()
    if isinstance(target, str) and labels is not None:
        return Logit(target)
    if isinstance(target, str):
        ids = token_ids(tokenizer, target)
        return Logit(target) if len(ids) == 1 else Sequence(target)
    if isinstance(target, int) and not isinstance(target, bool):
        return Logit(target)
    target = target.targets if isinstance(target, PerRow) else target
    if isinstance(target, SequenceABC) or (isinstance(target, Tensor) and target.ndim == 1):
        items = [t.item() if isinstance(t, Tensor) else t for t in target]
        nested = [t for t in items if isinstance(t, SequenceABC) and not isinstance(t, str)]
        if nested:
            raise InputError(f"a list has one target a row, not lists of them: {nested[0]!r}")
        if len(items) != batch:
            raise InputError(f"{len(items)} targets for a batch of {batch}: give one a row")
        parts = tuple(as_target(item, tokenizer, 1, labels) for item in items)
        if any(isinstance(item, Sequence) for item in parts):
            raise InputError("targets of several tokens cannot be mixed in one batch; run each row")
        return PerRow(parts)
    if isinstance(target, Target) and not isinstance(target, type):
        if labels is not None and isinstance(target, Sequence):
            raise InputError(
                "a Sequence is of tokens that follow a text, and this model's logits are of "
                "classes: give a class, or targets.Sum of several"
            )
        return target
    raise InputError(
        "target must be a token (string or id), a Target, a list of one per row or None (of a "
        f"unit: targets.Activation); got {type(target).__name__}"
    )
