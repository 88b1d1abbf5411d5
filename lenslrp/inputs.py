"""What a caller may explain, made into token rows, a mask and what the model's forward takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import PosEmbedBridge

from lenslrp.batch import Batch as Batch
from lenslrp.errors import InputError
from lenslrp.hooks.padding import (
    masked_ids,
    position_ids,
    reads_last,
    require_ends,
    require_padding,
    takes_left,
    takes_mask,
)
from lenslrp.hooks.structure import components_where
from lenslrp.text.names import token_ids
from lenslrp.text.tokenization import tokenize

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def prepare_text(
    model: TransformerBridge,
    text: Any,
    *,
    append: list[int] | None = None,
    prepend_bos: bool | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
) -> Batch:
    """Rows of tokens from a string, strings or a tensor; ``append`` is a teacher-forced span.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, shapes that do not fit.
    """
    append, two_stacks = append or [], is_encoder_decoder(model)
    if decoder_input is not None and not two_stacks:
        raise InputError("decoder_input is for encoder-decoders; this model has no decoder of it")
    texts = prepare_side(
        model, text, append=[] if two_stacks else append, prepend_bos=prepend_bos,
        attention_mask=attention_mask, inputs_embeds=inputs_embeds,
    )  # fmt: skip
    return with_decoder(model, texts, decoder_input, append) if two_stacks else texts


def is_encoder_decoder(model: TransformerBridge) -> bool:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def decoder_reads_the_text(model: Any) -> bool:
    """Whether an encoder-decoder's decoder reads what its encoder does, shifted by one token.

    So do classifiers, taggers and question answerers, which write nothing (Lewis et al. 2020,
    arXiv:1910.13461).
    """
    heads = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    written = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    takes = inspect.signature(model.forward).parameters
    return bool(written) and type(model).__name__.endswith(heads) and "decoder_input_ids" in takes


def text_of_decoder(model: Any, row: list[int]) -> list[int]:
    """What such a decoder is given of a text, by the model's own code: it shifted by one token.

    The start token goes by the family; mBART's is the text's last token, which names a language.
    """
    text, config = torch.tensor([row]), model.config
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)
    shifts = (getattr(module, "shift_tokens_right", None) for module in modules)
    if (shift := next(filter(None, shifts), None)) is not None:  # BART's kin
        takes = inspect.signature(shift).parameters
        start = [config.decoder_start_token_id] if "decoder_start_token_id" in takes else []
        shifted: Tensor = shift(text, config.pad_token_id, *start)
    elif hasattr(model, "_shift_right"):  # T5's
        shifted = model._shift_right(text)
    else:
        shifted = model.prepare_decoder_input_ids_from_labels(text)
    ids: list[int] = shifted[0].tolist()
    return ids


def _start_token(model: Any) -> int:
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise InputError("this model names no decoder start token: give decoder_input as ids")
    return int(start)


def with_decoder(
    model: TransformerBridge, encoder: Batch, decoder_input: Any, append: list[int]
) -> Batch:
    """The decoder's rows: its start token and the words given, or a token tensor as it is."""
    batch, inner = len(encoder.tokens), model.original_model
    if isinstance(decoder_input, Tensor) or (decoder_input and not _is_text(decoder_input)):
        tokens, mask = _as_tensor(decoder_input, None)
        rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    elif not decoder_input and decoder_reads_the_text(inner):
        read = zip(encoder.tokens, encoder.mask, strict=True)
        rows = [text_of_decoder(inner, row[keep].tolist()) for row, keep in read]
    else:
        texts = [decoder_input] * batch if isinstance(decoder_input, str) else decoder_input
        words = [token_ids(model.tokenizer, text) for text in texts] if texts else [[]] * batch
        rows = [[_start_token(inner), *ids] for ids in words]
    if len(rows) != batch:
        raise InputError(f"{len(rows)} rows for the decoder, {batch} for the encoder")
    lengths = [len(row) for row in rows]
    written = Batch.of_rows([row + append[:-1] for row in rows], "right", _pad_id(model))
    tokens, mask = written.tokens, written.mask
    require_ids(model, [*rows, append] if append else rows)
    _require_room(model, tokens.shape[1], decoder=True)
    device = _device(model)
    kwargs = {**encoder.kwargs, "decoder_input_ids": tokens.to(device)}
    if not bool(mask.all()):
        kwargs["decoder_attention_mask"] = mask.long().to(device)
    given_texts = [decoder_input] * batch if isinstance(decoder_input, str) else decoder_input
    texts = given_texts if _is_text(given_texts) else None
    decoder = Batch(tokens.to(device), mask.to(device), lengths, texts=texts)
    return replace(encoder, kwargs=kwargs, decoder=decoder)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], str)
    )


def prepare_side(
    model: TransformerBridge,
    text: Any,
    *,
    append: list[int],
    prepend_bos: bool | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Batch:
    """What `prepare_text` does for one stack."""
    if inputs_embeds is not None:
        return _from_embeddings(model, text, inputs_embeds, attention_mask, append)
    if isinstance(text, Tensor | list) and _is_empty(text):
        raise InputError("an empty prompt; give at least one token")
    padding_side = "right"
    texts: list[str] | None = None
    if isinstance(text, str) or (isinstance(text, list) and text and isinstance(text[0], str)):
        if attention_mask is not None:
            raise InputError("attention_mask goes with token tensors; text brings its own")
        texts = [text] if isinstance(text, str) else text
        rows = _tokenize(model, texts, prepend_bos)
        mask, padding_side = None, _padding_side(model)
    elif isinstance(text, Tensor | list):
        tokens, mask = _as_tensor(text, attention_mask)
        rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
        if bool((~mask).any()):
            padding_side = "left" if bool((~mask[:, 0]).any()) else "right"
    else:
        raise InputError(
            "input must be a string, a list of strings or a token tensor [batch, pos], not "
            f"{type(text).__name__}"
        )
    require_ids(model, [*rows, append] if append else rows)
    lengths = [len(row) for row in rows]
    if mask is None or append:
        padded = Batch.of_rows([row + append[:-1] for row in rows], padding_side, _pad_id(model))
        tokens, mask = padded.tokens, padded.mask
    _require_room(model, tokens.shape[1])
    require_padding(model, mask)
    require_ends(model, mask, tokens)
    tokens = masked_ids(model, tokens, mask)
    device = _device(model)
    kwargs: dict[str, Any] = {}
    if not bool(mask.all()) and takes_mask(model):
        kwargs["attention_mask"] = mask.long().to(device)
    return Batch(tokens.to(device), mask.to(device), lengths, kwargs, texts=texts)


def require_ids(model: TransformerBridge, rows: list[list[int]], name: str = "row {}") -> None:
    """Refuse rows of token ids that are empty, or not all in the vocabulary.

    Args:
        name: what the message calls a row, by its number.

    Raises:
        InputError: naming the first such row.
    """
    vocabulary = int(model.cfg.d_vocab)
    for index, row in enumerate(rows):
        if not row:
            raise InputError(f"{name.format(index)} is an empty prompt; give at least one token")
        if min(row) < 0 or max(row) >= vocabulary:
            worst = max(row) if max(row) >= vocabulary else min(row)
            raise InputError(
                f"{name.format(index)} has token {worst}, outside the vocabulary: ids go from 0 to "
                f"{vocabulary - 1}"
            )


def _tokenize(
    model: TransformerBridge, texts: list[str], prepend_bos: bool | None
) -> list[list[int]]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"row {index} is not a string but {type(text).__name__}")
        if not text:
            raise InputError(f"row {index} is an empty prompt; give at least one token")
    return [token_row(model, text, prepend_bos) for text in texts]


def token_row(model: TransformerBridge, prompt: Any, prepend_bos: bool | None) -> list[int]:
    """The token ids of one prompt: a string, or ids as they are.

    Raises:
        InputError: nothing in it, no tokenizer for a string, or it is neither.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InputError("this model has no tokenizer: give a token tensor [batch, pos]")
        return tokenize(model, prompt, prepend_bos) if prompt else []
    if not isinstance(prompt, list | tuple | Tensor):
        raise InputError(f"a prompt is a string or token ids, not {type(prompt).__name__}")
    tokens, _ = _as_tensor(prompt, None) if len(prompt) else (torch.zeros(1, 0).long(), None)
    if len(tokens) != 1:
        raise InputError(f"one prompt is one row of token ids, not {list(tokens.shape)}")
    row: list[int] = tokens[0].tolist()
    return row


def pad_rows(model: TransformerBridge, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as one token tensor, padded on the model's side, and its mask where it is."""
    batch = Batch.of_rows(rows, _padding_side(model), _pad_id(model))
    return batch.tokens, None if bool(batch.mask.all()) else batch.mask


def _padding_side(model: TransformerBridge) -> str:
    """Where texts are padded: on the tokenizer's side, if the model takes it."""
    side = getattr(model.tokenizer, "padding_side", None) or "right"
    side = "left" if reads_last(model) else side
    return side if takes_left(model) else "right"


def _as_tensor(text: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    try:
        tokens = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("input must be strings or a token tensor [batch, pos]") from error
    ids = tokens
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(
            f"a token tensor is integers [batch, pos], not {ids.dtype} {list(ids.shape)}"
        )
    return tokens, as_mask(attention_mask, tokens)


def as_mask(attention_mask: Any, tokens: Tensor, name: str = "tokens") -> Tensor:
    """[batch, pos], True where a token, or a sample of a sound, is real.

    Raises:
        InputError: it does not fit ``tokens``, which the message calls ``name``, or has gaps.
    """
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise InputError(
            f"attention_mask must be a tensor [batch, pos], not {type(attention_mask).__name__}"
        )
    if attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask {list(attention_mask.shape)} does not fit {name} {list(tokens.shape)}"
        )
    mask = attention_mask.to(tokens.device).bool()
    edges = mask.int().diff(dim=1).abs().sum(dim=1)
    if bool((edges > 1).any()):
        raise InputError("attention_mask has gaps: padding must be on one side of each row")
    return mask


def _is_empty(text: Tensor | list[Any]) -> bool:
    if isinstance(text, Tensor):
        return text.numel() == 0
    return not text or all(isinstance(row, list) and not row for row in text)


def _require_room(model: TransformerBridge, length: int, *, decoder: bool = False) -> None:
    limit = min(_tables(model, decoder), default=length)
    if length > limit:
        where = " of the decoder" if decoder else ""
        raise InputError(f"{length} tokens{where}, but the model has positions for {limit}")


def _tables(model: TransformerBridge, decoder: bool) -> Iterator[int]:
    """How long each table of positions is that one stack reads; rotary ones are made as needed."""
    for path, module in components_where(model, "position tables", _has_positions):
        table = getattr(module, "embed_positions", None)  # of sines (GPT-J, CodeGen)
        if isinstance(module, PosEmbedBridge) and "relative" not in str(module.name):
            if path.startswith("decoder") == decoder:
                inner: Any = module.original_component
                if hasattr(inner, "make_weights"):  # sines that grow with the text (M2M-100)
                    continue
                padding = getattr(inner, "padding_idx", None)  # places begin behind its row (MPNet)
                reserved = int(getattr(inner, "offset", 0)) + (
                    0 if padding is None else padding + 1
                )
                rows = len(getattr(inner, "weight", ())) - reserved
                yield min(model.cfg.n_ctx, rows) if rows > 0 else model.cfg.n_ctx
        elif isinstance(table, Tensor):
            yield len(table)
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is not None and hasattr(config, "attn_config"):  # MPT makes its ALiBi for as many
        yield int(config.max_seq_len)


def _has_positions(module: Any) -> bool:
    table = getattr(module, "embed_positions", None)
    return isinstance(module, PosEmbedBridge) or isinstance(table, Tensor)


def _from_embeddings(
    model: TransformerBridge,
    text: Any,
    embeds: Tensor,
    attention_mask: Tensor | None,
    append: list[int],
) -> Batch:
    if text is not None:
        raise InputError("give either an input or inputs_embeds, not both")
    width, dtype = model.cfg.d_model, next(model.parameters()).dtype
    if not isinstance(embeds, Tensor):
        raise InputError(f"inputs_embeds must be a tensor, not {type(embeds).__name__}")
    if embeds.ndim != 3 or 0 in embeds.shape or embeds.shape[-1] != width:
        raise InputError(
            f"inputs_embeds must be [batch, pos, d_model], not {list(embeds.shape)}"
            if embeds.ndim != 3 or 0 in embeds.shape
            else f"inputs_embeds must be [batch, pos, d_model={width}], not {list(embeds.shape)}"
        )
    if embeds.dtype != dtype:
        raise InputError(f"inputs_embeds are {embeds.dtype}, the model is {dtype}")
    if append:
        raise InputError("a Sequence target needs token input: its tokens are appended to it")
    batch, length, _ = embeds.shape
    tokens = torch.arange(length, device=embeds.device).expand(batch, -1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    kwargs: dict[str, Any] = {"inputs_embeds": embeds}
    if attention_mask is not None:
        mask = as_mask(attention_mask, tokens)
        require_padding(model, mask)
        if takes_mask(model):
            kwargs["attention_mask"] = attention_mask
        places = position_ids(model, mask)
        if places is not None:
            kwargs["position_ids"] = places
    require_ends(model, mask)
    return Batch(tokens, mask, mask.sum(dim=1).tolist(), kwargs)


def _pad_id(model: TransformerBridge) -> int:
    tokenizer = model.tokenizer
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and value < model.cfg.d_vocab:
            return value
    return 0  # any will do under the mask


def _device(model: TransformerBridge) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
