"""A prompt and the tokens written after it: by the model, greedily, or given.

Position ``i`` of a `Writing` counts everything that was read and written: for a decoder the prompt,
then the written tokens; for an encoder-decoder the encoder's text, the decoder's start, then the
written tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.hooks.turns import turn
from lenslrp.inputs import prepare_text, require_ids
from lenslrp.logits import Outputs, Target
from lenslrp.running import architecture
from lenslrp.targets import Contrastive, Logit, LogProb
from lenslrp.text.conversation import chat
from lenslrp.text.names import token_ids
from lenslrp.text.spelling import Speller
from lenslrp.text.words import Word, pieces, words

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OF: dict[str, Callable[[int, int], Target]] = {
    "logit": Logit,
    "log_prob": LogProb,
    "runner_up": partial(Contrastive, top_k=1),
    "mean": Contrastive,
}
"""What of a written token is explained: its logit, its log-probability, its logit less that of the
best other token, or less the mean of all others."""


@dataclass(frozen=True)
class Noted:
    """A target on one written token that keeps what the model made of it.

    Attributes:
        target: what is explained.
        token: the written token's id.
        position: of the logits that it was chosen from.
        notes: position -> the target's value, the token's logit and its log-probability.
    """

    target: Any
    token: int
    position: int
    notes: dict[int, tuple[float, float, float]]

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The target's."""
        values: Tensor = self.target.values(outputs)
        logits = outputs.rows_at(self.position).detach()
        log_probs = logits.log_softmax(dim=1)
        seen = (values.detach(), logits[:, self.token], log_probs[:, self.token])
        value, logit, log_prob = torch.stack(seen)[:, 0].tolist()
        self.notes[self.position] = value, logit, log_prob
        return values

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"]:
        """The target's."""
        columns: Tensor = self.target.columns(outputs)
        return columns

    def text(self, outputs: Outputs) -> str:
        """The target's."""
        return str(self.target.text(outputs))


@dataclass(frozen=True)
class Writing:
    """Token ids of a prompt and of what was written after it.

    Attributes:
        prompt: what the model read, or its encoder.
        begun: what the decoder of an encoder-decoder was given before it wrote.
        written: the written tokens.
    """

    prompt: list[int]
    begun: list[int]
    written: list[int]

    @property
    def ids(self) -> list[int]:
        """The token at every position."""
        return [*self.prompt, *self.begun, *self.written]

    @property
    def start(self) -> int:
        """The position of the first written token."""
        return len(self.prompt) + len(self.begun)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model reads to choose each written token: all but the last, teacher-forced."""
        read = torch.tensor([[*(self.begun or self.prompt), *self.written[:-1]]])
        if not self.begun:
            return {"input": read}
        return {"input": torch.tensor([self.prompt]), "decoder_input": read}

    def targets(self, of: str) -> list[Noted]:
        """One target a written token, on the logits that it was chosen from.

        Raises:
            InputError: ``of`` is none of `OF`.
        """
        if of not in OF:
            raise InputError(f"of must be one of {', '.join(OF)}, not {of!r}")
        first, notes = len(self.begun or self.prompt) - 1, dict[int, tuple[float, float, float]]()
        return [Noted(OF[of](t, i), t, i, notes) for i, t in enumerate(self.written, start=first)]

    def relevance(self, cache: RelevanceCache) -> Float[Tensor, " position"]:
        """Relevance at the token embeddings of every position; nothing has read the last token."""
        parts = [cache.tokens[0]]
        if cache.decoder_tokens is not None:
            parts.append(cache.decoder_tokens[0])
        return torch.cat([*parts, parts[0].new_zeros(1)])

    def text(self, tokenizer: Any) -> tuple[list[str], list[Word]]:
        """What each position shows, and the words with their positions."""
        if tokenizer is None:
            names = [str(i) for i in self.ids]
            return names, [Word(name, [i]) for i, name in enumerate(names)]
        speller, shown, found = Speller(tokenizer), list[str](), list[Word]()
        for ids in (self.prompt, [*self.begun, *self.written]) if self.begun else (self.ids,):
            row = speller.spell(ids)
            found += [Word(w.text, [len(shown) + i for i in w.positions]) for w in words(row)]
            shown += pieces(row)
        return shown, found


def write(
    model: TransformerBridge,
    prompt: Any,
    text: Any = None,
    *,
    max_new_tokens: int = 20,
    prepend_bos: bool | None = None,
) -> Writing:
    """A prompt and its continuation: ``text`` (a string or ids), or what the model writes.

    Raises:
        InputError: no prompt of one row, no token after it, or a model that does not write.
    """
    if not getattr(model.original_model, "can_generate", bool)():
        raise InputError(
            f"{architecture(model)} does not write text token by token; explain its output with "
            "lenslrp.run_with_relevance"
        )
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        prompt = chat(model, prompt)
    batch = prepare_text(model, prompt, prepend_bos=prepend_bos)
    if len(batch.tokens) != 1:
        raise InputError(f"a generation is of one prompt, not {len(batch.tokens)}")
    ids: list[int] = batch.tokens[0].tolist()
    begun: list[int] = batch.decoder.tokens[0].tolist() if batch.decoder else []
    if text is None:
        written = greedy(model, ids, max_new_tokens)[len(begun or ids) :]
    else:
        written = (
            token_ids(model.tokenizer, text) if isinstance(text, str) else list(map(int, text))
        )
        require_ids(model, [written], "the continuation")
    return Writing(ids, begun, written)


@torch.no_grad()
def greedy(model: TransformerBridge, ids: list[int], max_new_tokens: int) -> list[int]:
    """Everything that the model's decoder holds after it has written, its start or prompt too.

    Hugging Face's own loop, with its key-value cache and the checkpoint's generation settings, but
    without sampling or beams.

    Raises:
        InputError: ``max_new_tokens`` below 1.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise InputError(f"max_new_tokens is a number from 1, not {max_new_tokens!r}")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    tokenizer = model.tokenizer
    original_model: Any = model.original_model
    pad = next(
        (i for i in (getattr(tokenizer, "pad_token_id", None),
                     getattr(tokenizer, "eos_token_id", None)) if i is not None),
        0,
    )  # fmt: skip
    with turn(model):
        written = original_model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    result: list[int] = written[0].tolist()
    return result
