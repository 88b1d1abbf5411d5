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
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.utilities.tokenize_utils import get_attention_mask

from lenslrp.batch import Batch, reads_the_encoder
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NOWHERE = "a hook point fired outside a forward pass of the whole model"

CACHES = ("past_key_values", "cache_params")
"""What a model is given to go on from; the second is a Mamba's."""

Positions = Literal["all", "none"] | tuple[int, ...]
"""``"all"``, ``"none"``, or places: in a prompt, negative ones count from its end."""


def positions(value: str | Sequence[int], what: str) -> Positions:
    """``given``, checked; ``what`` is ``"prompt"`` or ``"generation"``.

    Raises:
        InputError: another word, no integers, or a generated token counted from an end that is not
            known while it is generated.
    """
    if value == "all":
        return "all"
    if value == "none":
        return "none"
    places = None if isinstance(value, str) else tuple(value)
    if places is None or not all(isinstance(p, int) and not isinstance(p, bool) for p in places):
        raise InputError(f"{what} is 'all', 'none' or positions, not {value!r}")
    if what == "generation" and any(p < 0 for p in places):
        raise InputError(
            f"generation={list(places)}: generated tokens count from 0; where they will end is "
            "not known"
        )
    return places


@dataclass(eq=False)
class TrackedPass:
    """One forward pass.

    Attributes:
        start: columns that the cache held.
        real: [batch, start + pos], True where a token (the decoder's, of an encoder-decoder) is
            real, or generated.
        prompts: the rows' prompts, as wide as ``real``; what is generated stands after them.
        chosen: what `TrackedPasses.chosen` answered in this pass.
    """

    start: int
    real: Bool[Tensor, "batch total"]
    prompts: Batch
    chosen: dict[Any, Tensor] = field(default_factory=dict)

    def at(self, hook: str, x: Tensor) -> Batch | None:
        """The text whose prompts lie along ``x`` at a hook point; ``None``: a cache holds them."""
        if self.start and (self.prompts.decoder is None or not reads_the_encoder(hook)):
            return None
        return self.prompts.of(hook, x)


class TrackedPasses:
    """The passes of one model inside a context, see `follow`."""

    def __init__(self) -> None:
        self._now: TrackedPass | str = NOWHERE  # or why it is not known
        self._prompts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by cache
        self._columns: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # that it holds
        self._generations: list[dict[str, int]] = []  # those that are going on; innermost last
        self._text: dict[str, Any] | None = None  # of the forward pass, where it was given strings

    @property
    def now(self) -> TrackedPass:
        """The pass that is going on.

        Raises:
            InputError: there is none, or where its padding is cannot be told.
        """
        if isinstance(self._now, str):
            raise InputError(self._now)
        return self._now

    def chosen(
        self, prompt: Positions, generation: Positions, rows: tuple[int, ...] | None
    ) -> Bool[Tensor, "batch pos"]:
        """Where in the pass that is going on: never at padding.

        Raises:
            InputError: a row that the batch lacks, or a position that a row's prompt lacks.
        """
        key = (prompt, generation, rows)
        if key not in self.now.chosen:
            self.now.chosen[key] = _chosen(self.now, prompt, generation, rows)
        return self.now.chosen[key]

    def before(
        self, model: TransformerBridge, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What the call of the Hugging Face model tells."""
        ids: Any = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")
        if mask is None and self._text is not None:
            mask = get_attention_mask(tokens=ids, **self._text)
        encoder = None
        if getattr(model.config, "is_encoder_decoder", False):
            encoder, mask = (ids, mask), kwargs.get("decoder_attention_mask")
            ids = kwargs.get("decoder_input_ids", kwargs.get("decoder_inputs_embeds"))
        if not isinstance(ids, Tensor):
            pixels = next((x for x in kwargs.values() if isinstance(x, Tensor)), torch.empty(0))
            ids = pixels.new_empty(len(pixels), 0)  # no text: every place at a hook point is real
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        try:
            start = self._held(cache)
        except InputError as error:
            self._now = str(error)
            return
        total = prompt = start + ids.shape[1]
        if start:  # whose prompt a cache holds is remembered for as long as it lives
            prompt = self._prompts.setdefault(cache, start)
        elif self._generations:
            prompt = self._generations[-1].setdefault("prompt", total)
        if cache is not None and not start:
            self._prompts[cache] = prompt
        if cache is not None:
            self._columns[cache] = total
        if self._generations:
            self._generations[-1]["columns"] = total
        try:
            real = _real(ids, mask, total)
            text = Batch.of_mask(real & (torch.arange(total, device=real.device) < prompt))
            if encoder is not None:
                read = next((x for x in encoder if isinstance(x, Tensor)), real[:, :0])
                text = Batch.of_mask(_real(read, encoder[1], read.shape[1]), decoder=text)
            self._now = TrackedPass(start, real, text)
        except InputError as error:
            self._now = str(error)

    def _held(self, cache: Any) -> int:
        """How many columns a cache holds. One of recurrent states alone does not count them.

        Raises:
            InputError: they were filled before anybody looked.
        """
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except ValueError:
            pass
        if not cache.has_previous_state():
            return 0
        known = self._generations[-1].get("columns") if self._generations else None
        columns = self._columns.get(cache, known)
        if columns is None:
            raise InputError(
                "this pass goes on from a recurrent state that was made outside the context, which "
                "does not say how many tokens it has read: begin with the prompt inside"
            )
        return columns

    def given(self, bridge: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A batch of strings, padded on the right, reaches the Hugging Face model with no mask."""
        text = args[0] if args else kwargs.get("input")
        self._text = None
        if isinstance(text, list) and len(text) > 1 and bridge.tokenizer is not None:
            side = kwargs.get("padding_side") or bridge.tokenizer.padding_side
            bos = kwargs.get("prepend_bos")
            bos = bridge.cfg.default_prepend_bos if bos is None else bos
            self._text = {"tokenizer": bridge.tokenizer, "prepend_bos": bos, "padding_side": side}

    @contextmanager
    def generating(self, generation: dict[str, int]) -> Iterator[None]:
        """While passes belong to ``generation``, whose prompt is that of its first pass."""
        self._text = None  # of a forward pass before it
        self._now = NOWHERE
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
def follow(model: TransformerBridge) -> Iterator[TrackedPasses]:
    """Follow the passes of ``model``, a ``TransformerBridge``, for as long as the context lasts."""
    passes = TrackedPasses()
    hooks = ((model, passes.given), (model.original_model, passes.before))
    wraps = {"generate": passes.call, "hf_generate": passes.call, "generate_stream": passes.stream}
    attributes = vars(model)
    before = {name: attributes.get(name) for name in wraps}
    try:
        for module, hook in hooks:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        attributes.update({name: wrap(getattr(model, name)) for name, wrap in wraps.items()})
        yield passes
    finally:
        for module, hook in hooks:  # by what they are: an interrupt could lose a handle
            for key in [k for k, known in module._forward_pre_hooks.items() if known == hook]:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for name, value in before.items():
            if value is None:
                attributes.pop(name, None)
            else:  # another context's, around this one
                attributes[name] = value


def _real(ids: Tensor, mask: Tensor | None, total: int) -> Tensor:
    if mask is None:
        return torch.ones(ids.shape[0], total, device=ids.device, dtype=torch.bool)
    if tuple(mask.shape) != (ids.shape[0], total):
        raise InputError(
            f"the attention mask is {list(mask.shape)}, expected [batch, pos] = "
            f"{[ids.shape[0], total]}: where padding is cannot be told"
        )
    return mask.to(ids.device).bool()


def _chosen(
    at: TrackedPass, prompt: Positions, generation: Positions, rows: tuple[int, ...] | None
) -> Tensor:
    batch, total = at.real.shape
    if not total:
        raise InputError("positions are of tokens; this model was given none")
    outside = [row for row in rows or () if not 0 <= row < batch]
    if outside:
        raise InputError(f"row is {outside[0]}, expected 0 to {batch - 1}")
    if not isinstance(prompt, str) and not at.start:  # else checked when the prompt was read
        for position in prompt:
            at.prompts.require(position, "prompt position", rows)
    written = Batch.of_mask(at.real & ~at.prompts.mask)
    chosen = torch.zeros_like(at.real)
    for text, where in ((at.prompts, prompt), (written, generation)):
        if not isinstance(where, str):
            chosen |= text.where(where)
        elif where == "all":
            chosen |= text.mask
    if rows is not None:
        in_rows = torch.isin(torch.arange(batch), torch.tensor(rows, dtype=torch.long))
        chosen &= in_rows[:, None].to(chosen.device)
    return chosen[:, at.start :]
