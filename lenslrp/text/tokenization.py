"""Text into token ids: the ids that Hugging Face's own tokenizer gives, and nothing else.

TransformerLens loads a tokenizer a second time with ``add_bos_token=True``, which rewrites its
template (BERT's ``[CLS] $A [SEP]``, GLM's ``[gMASK]<sop> $A``), and then puts a token before the
text or takes one away by the architecture's default. Here the tokenizer stays what it was, and
whether a beginning-of-sequence token stands before a text is the tokenizer's own choice, unless
``prepend_bos`` says otherwise.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


def give_tokenizer(bridge: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The bridge reads text with a copy of ``tokenizer``, and so does ``bridge.to_tokens``.

    Only what its ids do not depend on is set: the side that TransformerLens pads this architecture
    on, and a padding token where there is none.
    """
    kept = copy.deepcopy(tokenizer)
    side = getattr(bridge.cfg, "default_padding_side", None)
    if side is not None:
        kept.padding_side = side
    if kept.pad_token is None:
        for token in (kept.eos_token, kept.bos_token, kept.unk_token):
            if token is not None:
                kept.pad_token = token
                break
    bridge._tokenizer = None  # in place of another one, TransformerLens would load it once more
    bridge.tokenizer = kept
    bridge.cfg.tokenizer_prepends_bos = prepends(kept)
    bridge.cfg.tokenizer_appends_eos = False  # TransformerLens would take the token away
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos


def beginning(tokenizer: Any) -> int | None:
    """The token that stands before a text: BOS, or ``[CLS]`` where a tokenizer has no BOS."""
    for name in ("bos_token_id", "cls_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return None


def prepends(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts that token before a text."""
    first, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return len(first) > len(bare) and first[0] == beginning(tokenizer)


def tokenize(model: TransformerBridge, text: str, prepend_bos: bool | None = None) -> list[int]:
    """The ids of one text.

    Args:
        model: a bridge.
        text: what is read.
        prepend_bos: whether it begins with the token of `beginning`. None: what the bridge
            was loaded with, by default as the tokenizer itself does it.

    Raises:
        InputError: no tokenizer, or a BOS is asked for that the tokenizer does not have.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("this model has no tokenizer: give a token tensor [batch, pos]")
    wanted = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    prepended = bool(model.cfg.tokenizer_prepends_bos)
    token = beginning(tokenizer)
    if wanted and not prepended:
        if token is None:
            raise InputError(
                "prepend_bos: this model's tokenizer has no beginning-of-sequence token; write the "
                "token that you mean at the start of the text"
            )
        ids.insert(0, token)
    elif prepended and not wanted:
        ids = ids[1:]
    if ids[:2] == [token, token] and text.startswith(tokenizer.convert_ids_to_tokens(token)):
        warnings.warn(
            f"the text begins with {tokenizer.decode([token])!r} and gets another one before it; "
            "leave it out of the text, or give prepend_bos=False",
            stacklevel=2,
        )
    return ids
