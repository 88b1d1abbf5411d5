"""Many prompts: in batches of like length, one cache a prompt, in the order given.

Inputs are taken in windows of a fixed number. Inside a window prompts are sorted by their length in
tokens and cut into batches, so that little is padded; results come in the order of the inputs. What
shares a batch thus depends on the inputs alone, never on where a run was interrupted or how it was
split: another padding moves relevance by rounding (2e-6 in float32).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp import media
from lenslrp import targets as kinds
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.inputs import pad_rows, require_ids, token_row
from lenslrp.logits import Target
from lenslrp.targets import as_target
from lenslrp.text.conversation import chat

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WINDOW = 1024
"""Inputs that are taken at a time."""

BATCH_TOKENS = {"cpu": 384}
"""Tokens of a batch, padding included, by the kind of device (``benchmarks/many_prompts.py``)."""

BATCH_TOKENS_ELSEWHERE = 4096

ExplainBatch = Callable[[Any, Any, Tensor | None], RelevanceCache]
"""What explains one batch: (texts or a token tensor, a target for all or a list of one for each,
the attention mask of a padded tensor)."""

NO_INPUT = object()
"""An input that is none, such as an empty line of a file: its number is passed over."""


@dataclass(frozen=True)
class QueuedPrompt:
    """One input: its number, what the model is given, and its length in tokens."""

    index: int
    given: str | list[int]
    target: Any
    length: int
    together: Any  #: prompts share a batch only where this is equal


@dataclass(frozen=True)
class Batches:
    """How many prompts share a batch.

    Attributes:
        size: prompts, or None where ``tokens`` decide.
        tokens: of a batch, padding included.
    """

    size: int | None
    tokens: int

    @classmethod
    def of(cls, model: TransformerBridge, size: int | None) -> Batches:
        """Raises `InputError` for a size that is none."""
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputError(f"batch_size is a number of prompts from 1 or None, not {size!r}")
        kind = next(model.parameters()).device.type
        return cls(size, BATCH_TOKENS.get(kind, BATCH_TOKENS_ELSEWHERE))

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.size is None else f"{self.size} prompts"

    def cut(self, prompts: Iterable[QueuedPrompt]) -> list[list[QueuedPrompt]]:
        """Batches of prompts of like length, the one with the first prompt first."""
        groups: dict[Any, list[QueuedPrompt]] = {}
        for prompt in prompts:
            groups.setdefault(prompt.together, []).append(prompt)
        cut: list[list[QueuedPrompt]] = []
        for group in groups.values():
            batch: list[QueuedPrompt] = []
            for prompt in sorted(group, key=lambda prompt: prompt.length):
                if batch and self._is_full(len(batch), prompt.length):
                    cut.append(batch)
                    batch = []
                batch.append(prompt)
            cut.append(batch)
        return sorted(cut, key=lambda batch: min(prompt.index for prompt in batch))

    def _is_full(self, prompts: int, longest: int) -> bool:
        if self.size is not None:
            return prompts >= self.size
        return (prompts + 1) * longest > self.tokens


def explain(
    run: ExplainBatch,
    model: TransformerBridge,
    inputs: Iterable[Any],
    targets: Any = None,
    *,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    window: int = WINDOW,
) -> Iterator[RelevanceCache]:
    """One single-row cache for each input, in the order given.

    Args:
        run: explains one batch, such as ``run_with_relevance`` with its other options bound.
        model: a bridge.
        inputs: prompts, read as they are needed: strings, lists or 1-D tensors of token ids, or
            conversations (lists of messages, as for `lenslrp.chat`).
        targets: ``None``, one target for all inputs, or an iterable of one for each. Targets of
            several tokens (a `lenslrp.targets.Sequence`, a string of several) share a batch
            with others of the same tokens alone, since they are appended to their prompts.
        batch_size: prompts of a batch; ``None`` goes by tokens.
        prepend_bos: as for `lenslrp.run_with_relevance`; give ``run`` the same.
        window: inputs that are taken, and sorted by length, at a time. Caches of a window wait
            until it is their turn: with hook points read, a smaller one takes less memory.

    Raises:
        InputError: an input or a target that cannot be explained; the message names its number.
    """
    batches = Batches.of(model, batch_size)
    for window_inputs in input_windows(inputs, targets, window):
        held: dict[int, RelevanceCache | InputError] = {}
        results = explained(run, model, window_inputs, batches, prepend_bos)
        for index, prompt, _ in window_inputs:
            while prompt is not NO_INPUT and index not in held:
                numbers, result = next(results)
                rows = [result] if isinstance(result, InputError) else result.rows
                held.update(zip(numbers, rows, strict=True))
            ready = held.pop(index, None)
            if isinstance(ready, InputError):
                raise ready
            if ready is not None:
                yield ready


Numbered = tuple[int, Any, Any]
"""An input's number, the input, its target."""


def input_windows(
    inputs: Iterable[Any], targets: Any, size: int = WINDOW
) -> Iterator[list[Numbered]]:
    """The inputs with their numbers and targets, ``size`` at a time.

    Raises:
        InputError: inputs that are one string, or more or fewer targets than inputs.
    """
    if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable):
        raise InputError(f"inputs are many prompts, such as a list; got {type(inputs).__name__}")
    end = object()
    several = is_several(targets)
    pairs = (
        itertools.zip_longest(inputs, targets, fillvalue=end)
        if several
        else ((prompt, targets) for prompt in inputs)
    )
    numbered = ((index, *pair) for index, pair in enumerate(pairs))
    while window := list(itertools.islice(numbered, size)):
        for index, prompt, target in window:
            if prompt is end or target is end:
                more = "targets than inputs" if prompt is end else "inputs than targets"
                raise InputError(f"there are more {more}: only {index} of the latter; give as many")
        yield window


def is_several(targets: Any) -> bool:
    """Whether targets are one for each input, and not one for all."""
    if isinstance(targets, Tensor):
        return targets.ndim > 0
    return isinstance(targets, Iterable) and not isinstance(targets, str | Target)


def explained(
    run: ExplainBatch,
    model: TransformerBridge,
    window: Sequence[Numbered],
    batches: Batches,
    prepend_bos: bool | None,
) -> Iterator[tuple[list[int], RelevanceCache | InputError]]:
    """The prompts of a window, batch by batch: their numbers, and their cache.

    An input that cannot be explained comes by itself, with why.
    """
    labels, prompts = media.labels_of(model), []
    for index, prompt, target in window:
        if prompt is NO_INPUT:
            continue
        try:
            prompts.append(_prompt(model, index, prompt, target, prepend_bos, labels))
        except InputError as error:
            yield [index], _named(index, error)
    for batch in batches.cut(prompts):
        yield from _run(run, model, batch)


def _run(
    run: ExplainBatch, model: TransformerBridge, batch: list[QueuedPrompt]
) -> Iterator[tuple[list[int], RelevanceCache | InputError]]:
    """One batch; where the model refuses it, each prompt by itself."""
    target = batch[0].target
    if not isinstance(target, kinds.Sequence):  # which all of the batch have
        target = [prompt.target for prompt in batch]
    rows: Any = [prompt.given for prompt in batch]
    mask = None
    if not isinstance(rows[0], str):
        rows, mask = pad_rows(model, rows)
    numbers = [prompt.index for prompt in batch]
    try:
        relevance = run(rows, target, mask)
    except InputError as error:
        if len(batch) == 1:
            yield numbers, _named(numbers[0], error)
        for prompt in batch if len(batch) > 1 else ():
            yield from _run(run, model, [prompt])
    else:
        yield numbers, relevance


def _named(index: int, error: InputError) -> InputError:
    named = InputError(f"input {index}: {error}")
    named.__cause__ = error
    return named


def _prompt(
    model: TransformerBridge,
    index: int,
    prompt: Any,
    target: Any,
    prepend_bos: bool | None,
    labels: dict[int, str] | None,
) -> QueuedPrompt:
    """An input in the form in which it is run.

    Raises:
        InputError: it is no prompt, or its target is none.
    """
    if isinstance(prompt, InputError):
        raise prompt
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(m, Mapping) for m in prompt):
        prompt = chat(model, prompt)[0]
    ids = token_row(model, prompt, prepend_bos)
    require_ids(model, [ids], "it")
    parsed = as_target(target.item() if isinstance(target, Tensor) else target,
                       model.tokenizer, 1, labels)  # fmt: skip
    length = len(ids)
    together: Any = None
    if isinstance(parsed, kinds.Sequence):
        length += len(parsed.ids(model.tokenizer)) - 1
        together = parsed
    elif isinstance(parsed, kinds.Activation):
        together = parsed.hook
    elif isinstance(parsed, kinds.Custom):  # a function of logits that may count from their end
        together = length
    text = prompt if isinstance(prompt, str) else None
    return QueuedPrompt(
        index, ids if text is None else text, parsed, length, (text is None, together)
    )
