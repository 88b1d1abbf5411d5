"""An error for a pass that does not fit: what it would need, and what would lower that."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from lenslrp.batch import Batch
from lenslrp.errors import FAILURES, LensLRPError, OutOfMemoryError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


logger = logging.getLogger("lenslrp")


@contextmanager
def explained_oom(model: TransformerBridge, batch: Batch, **options: Any) -> Iterator[None]:
    """Say of an allocation that fails in the block what the pass needs and what would lower it.

    Put it around what attaches to the model for one pass: the estimate comes after that is undone.

    Args:
        model: a ``TransformerBridge``.
        batch: what is explained.
        options: of `lenslrp.run_with_relevance`, as the pass has them: ``composite``,
            ``names_filter``, ``reduce``, ``attention``, ``checkpoint``, ``ledger`` (and
            ``logits``, where the caller has that choice).

    Raises:
        OutOfMemoryError: from torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(_message(model, batch, options, error)) from error


def _message(
    model: TransformerBridge, batch: Batch, options: Mapping[str, Any], error: BaseException
) -> str:
    inner = getattr(model, "original_model", model)
    rows = len(batch.tokens) or len(next(iter(batch.media.values())))
    choices = _choices(options, rows)
    now = _estimate(inner, batch, rows, options)
    lowered = {name: value for _, change in choices for name, value in change.items()}
    least = _estimate(inner, batch, 1, {**options, **lowered}) if choices and now else None
    if now and least is None:  # a model that the fused kernel cannot compute
        choices = [choice for choice in choices if "attention" not in choice[1]]
        lowered.pop("attention", None)
        least = _estimate(inner, batch, 1, {**options, **lowered}) if choices else None
    texts = [text for text, _ in choices]
    needs = ""
    if now:
        needs = f" It needs {_size(now[0])} besides {_size(now[1])} of weights (lenslrp.survey)."
    less = f" With all of these lowered it needs {_size(least[0])}." if least else ""
    lower = (
        f"Not lowered yet: {', '.join(texts)}.{less}"
        if texts
        else "Its options are as low as they go: give a shorter input, load the model in a smaller "
        "type, or spread it over devices (n_devices)."
    )
    shapes = [f"{n} {list(x.shape)}" for n, x in batch.media.items()]
    size = f"{rows} x {batch.tokens.shape[1]:,} tokens (batch x length)"
    size = " and ".join([size] * bool(batch.tokens.numel()) + shapes)
    kind = str(inner.dtype).removeprefix("torch.")
    return (
        f"out of memory while explaining {size} with {type(inner).__name__} in {kind}.{needs} "
        f"{lower} torch says: {first_line(error)}"
    )


def _choices(options: Mapping[str, Any], rows: int) -> list[tuple[str, dict[str, Any]]]:
    """What is not lowered yet, as it is told and as options."""
    names, reduce = options.get("names_filter"), options.get("reduce")
    remedies: list[tuple[str, dict[str, Any]]] = []
    if rows > 1:
        remedies.append((f"the batch ({rows} rows at once)", {}))
    if not options.get("checkpoint"):
        remedies.append(("checkpoint=True", {"checkpoint": True}))
    if options.get("attention", "bridge") == "bridge":
        remedies.append(('attention="fused"', {"attention": "fused"}))
    if reduce is None and (names is None or names):
        remedies.append(('reduce="sum" (or fewer hooks, names_filter=[...])', {"reduce": "sum"}))
    if options.get("logits") == "all":
        remedies.append(('logits="target"', {"logits": "target"}))
    return remedies


def _estimate(
    model: TransformerBridge, batch: Batch, rows: int, options: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Bytes at the peak besides the weights, and of the weights; ``None`` where nobody can tell."""
    from lenslrp.models.surveying import survey

    if batch.media and batch.tokens.numel():
        return None  # a survey reads tokens or an image, not both
    try:
        estimate = survey(
            copy.deepcopy(model.config),
            architecture=type(model).__name__,
            batch=rows,
            length=batch.tokens.shape[1],
            dtype=model.dtype,
            inputs={name: (rows, *x.shape[1:]) for name, x in batch.media.items()},
            **{n: v for n, v in options.items() if n in signature(survey).parameters},
        )
    except (LensLRPError, *FAILURES) as error:
        logger.info("no estimate of what the pass needs: %s", first_line(error))
        return None
    return estimate.peak, estimate.weights


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
