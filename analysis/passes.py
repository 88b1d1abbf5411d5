"""Which token of which text a forward pass is at: the same answer with a KV cache and without.

While a text is generated, a model with a cache sees the prompt and then one token a pass; without a
cache it sees the whole text again and again. "The last position" is therefore a different token in
the two. Here every position is counted from where its text begins: in the prompt, padding left out,
or in what was generated after it.

What is known of a pass comes from the call of the wrapped Hugging Face model (its cache, its mask),
through which ``forward``, ``generate``, ``generate_stream`` and ``hf_generate`` all go. Only that a
generation is going on cannot be seen there when it has no cache, so these methods of the one bridge
are wrapped for as long as the context lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.utilities.tokenize_utils import get_attention_mask

from lenslrp.errors import InputError
from lenslrp.inputs import is_encoder_decoder

Positions = Literal["all", "none"] | tuple[int, ...]
"""``"all"``, ``"none"``, or places: in a prompt, negative ones count from its end."""


def positions(given: str | Sequence[int], what: str) -> Positions:
    """``given``, checked; ``what`` is ``"prompt"`` or ``"generation"``.

    Raises:
        InputError: another word, no integers, or a generated token counted from an end that is not
            known while it is generated.
    """
    if given == "all":
        return "all"
    if given == "none":
        return "none"
    places = None if isinstance(given, str) else tuple(given)
    if places is None or not all(isinstance(p, int) and not isinstance(p, bool) for p in places):
        raise InputError(f"{what} is 'all', 'none' or positions, not {given!r}")
    if what == "generation" and any(p < 0 for p in places):
        raise InputError(
            f"generation={list(places)}: generated tokens count from 0; where they will end is "
            "not known"
        )
    return places


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        start: positions that the cache held, padding counted.
        prompt: positions of the prompt, padding counted.
        real: [batch, start + length], True where a token is no padding.
        chosen: what :func:`Passes.chosen` answered in this pass.
    """

    start: int
    prompt: int
    real: Bool[Tensor, "batch total"]
    chosen: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and positions of this pass."""
        return self.real.shape[0], self.real.shape[1] - self.start


class Passes:
    """The passes of one model inside a context, see :func:`follow`."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self._prompts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by cache
        self._generations: list[dict[str, int]] = []  # those that are going on; innermost last
        self._text: dict[str, Any] | None = None  # of the forward pass, where it was given strings

    def chosen(
        self, prompt: Positions, generation: Positions, rows: tuple[int, ...] | None
    ) -> Bool[Tensor, "batch pos"]:
        """Where in the pass that is going on: never at padding.

        Raises:
            InputError: a row that the batch lacks, or a position that a row's prompt lacks.
        """
        if self.now is None:
            raise InputError("a hook point fired outside a forward pass of the whole model")
        key = (prompt, generation, rows)
        if key not in self.now.chosen:
            self.now.chosen[key] = _chosen(self.now, prompt, generation, rows)
        return self.now.chosen[key]

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the call of the Hugging Face model tells."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            raise InputError("positions are of tokens; this model was given none")
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        total = start + ids.shape[1]
        prompt = total
        if start:
            prompt = self._prompts.get(cache, start)
        elif self._generations:
            prompt = self._generations[-1].setdefault("prompt", total)
        mask = kwargs.get("attention_mask")
        if mask is None and self._text is not None:
            mask = get_attention_mask(tokens=ids, **self._text)
        if mask is None:
            mask = torch.ones(ids.shape[0], total, device=ids.device)
        if tuple(mask.shape) != (ids.shape[0], total):
            raise InputError(
                f"the attention mask is {list(mask.shape)}, expected [batch, pos] = "
                f"{[ids.shape[0], total]}: where padding is cannot be told"
            )
        self.now = Pass(start, prompt, mask.to(ids.device).bool())

    def after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Whose prompt a cache holds is remembered for as long as the cache lives."""
        cache = getattr(out, "past_key_values", None)
        if cache is not None and self.now is not None:
            self._prompts[cache] = self.now.prompt

    def given(self, bridge: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A batch of strings, padded on the right, reaches the Hugging Face model with no mask."""
        text = args[0] if args else kwargs.get("input")
        self._text = None
        if isinstance(text, list) and len(text) > 1 and bridge.tokenizer is not None:
            side = kwargs.get("padding_side") or bridge.tokenizer.padding_side
            bos = kwargs.get("prepend_bos")
            bos = bridge.cfg.default_prepend_bos if bos is None else bos
            self._text = {
                "tokenizer": bridge.tokenizer,
                "prepend_bos": bos,
                "padding_side": side,
            }

    @contextmanager
    def generating(self, generation: dict[str, int]) -> Iterator[None]:
        """While passes belong to ``generation``, whose prompt is that of its first pass."""
        self._text = None  # of a forward pass before it
        self._generations.append(generation)
        try:
            yield
        finally:
            self._generations.remove(generation)

    def call(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``inner`` as a generation of its own."""

        def generate(*args: Any, **kwargs: Any) -> Any:
            with self.generating({}):
                return inner(*args, **kwargs)

        return generate

    def stream(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a generator: between two tokens no generation is going on."""

        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            generation: dict[str, int] = {}
            items = inner(*args, **kwargs)
            while True:
                with self.generating(generation):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item

        return generate


@contextmanager
def follow(model: Any) -> Iterator[Passes]:
    """Follow the passes of ``model`` for as long as the context lasts.

    Args:
        model: a ``TransformerBridge`` of a decoder.

    Raises:
        InputError: an encoder-decoder, whose two stacks are at two texts.
    """
    if is_encoder_decoder(model):
        raise InputError("positions are followed in decoders; this model is an encoder-decoder")
    passes = Passes()
    inner = model.original_model
    handles = [
        model.register_forward_pre_hook(passes.given, with_kwargs=True),
        inner.register_forward_pre_hook(passes.before, with_kwargs=True),
        inner.register_forward_hook(passes.after, with_kwargs=True),
    ]
    wraps = {"generate": passes.call, "hf_generate": passes.call, "generate_stream": passes.stream}
    own = vars(model)
    before = {name: own.get(name) for name in wraps}
    own.update({name: wrap(getattr(model, name)) for name, wrap in wraps.items()})
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
        for name, value in before.items():
            if value is None:
                del own[name]
            else:  # another context's, around this one
                own[name] = value


def _chosen(
    at: Pass, prompt: Positions, generation: Positions, rows: tuple[int, ...] | None
) -> Tensor:
    batch, total = at.real.shape
    column = torch.arange(total, device=at.real.device)
    in_prompt = (column < at.prompt) & at.real
    place = at.real[:, : at.prompt].cumsum(dim=1) - 1  # in the prompt, padding left out
    lengths = at.real[:, : at.prompt].sum(dim=1, keepdim=True)
    wanted = torch.ones(batch, dtype=torch.bool, device=column.device)
    if rows is not None:
        outside = [row for row in rows if not 0 <= row < batch]
        if outside:
            raise InputError(f"row is {outside[0]}, expected 0 to {batch - 1}")
        wanted = torch.isin(torch.arange(batch, device=column.device), column.new_tensor(rows))
    found = torch.zeros_like(at.real)
    if prompt == "all":
        found |= in_prompt
    elif prompt != "none" and prompt:
        _require_inside(prompt, lengths[wanted], at.start)
        asked = column.new_tensor(prompt)
        counted = torch.where(asked < 0, asked + lengths, asked)  # [batch, places]
        here = (place[:, :, None] == counted[:, None]).any(dim=-1)
        found[:, : at.prompt] |= here & in_prompt[:, : at.prompt]
    if generation == "all":
        found |= column >= at.prompt
    elif generation != "none" and generation:
        found |= torch.isin(column - at.prompt, column.new_tensor(generation))
    return (found & wanted[:, None])[:, at.start :]


def _require_inside(places: tuple[int, ...], lengths: Tensor, start: int) -> None:
    if start or not len(lengths):
        return  # the prompt was checked when it was read
    shortest = int(lengths.min())
    for place in places:
        if not -shortest <= place < shortest:
            raise InputError(
                f"prompt position is {place}, expected {-shortest} to {shortest - 1}: the shortest "
                f"prompt has {shortest} tokens"
            )
