"""Padding: every row of a batch gives what it gives alone, on whichever side its padding is.

Where a model has absolute positions, those of a row that is padded on the left must come from the
mask. Most take ``position_ids``; RoBERTa and M2M100 count the tokens that are not their padding
token; others (BART, Pegasus) count columns and cannot be told otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lenslrp.errors import InputError
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.structure import components

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POOLS_LAST = "SiglipTextModel"
"""A text tower that pools at the last column, and was trained on texts of one length."""

MIXES_COLUMNS = (
    *("ShortConv", "RwkvSelfAttention", "RecurrentGemmaRecurrentBlock"),
    *("DeepseekV4CSACompressor", "DeepseekV4HCACompressor"),
)
"""How classes end that mix columns, padding or not (LFM2, RWKV, RG-LRU, DeepSeek V4)."""

OF_A_ROW = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
"""How classes end whose output is of a row, and not of each of its tokens."""


MIXES_FRAMES = ("Data2VecAudio", "SEW")
"""Families that stack convolutions over frames, or pool them: padding reaches real frames."""


def is_left(mask: Tensor) -> bool:
    """Whether any row has padding before its first token."""
    return bool((~mask[:, :1]).any())


def require_padding(model: TransformerBridge, mask: Tensor) -> None:
    """Refuse padding under which a row would not be what it is alone.

    Raises:
        InputError: saying which side is right.
    """
    kind = type(getattr(model, "original_model", model)).__name__
    if bool(mask.all()):
        return
    if kind.startswith("T5Gemma") and kind.endswith("ForSequenceClassification"):
        raise InputError(
            f"{kind} reads one token more of a row with padding behind it than of the row alone; "
            "give rows of equal length, or one each"
        )
    if is_left(mask) and not takes_mask(model):
        raise InputError(
            f"{kind}: TransformerLens' attention for it takes a padding mask otherwise than "
            "Hugging Face's, so a row that is padded on the left would be wrong; put the padding "
            "on the right"
        )
    if is_left(mask) and reads_first_column(model.original_model):
        raise InputError(
            f"{kind} reads the first column of its text, which is padding in a row that is padded "
            "on the left; put the padding on the right"
        )
    if reads_last(model) and bool((~mask[:, -1:]).any()):
        raise InputError(
            f"{kind} reads a text at its last column, so a row that is padded on the right is not "
            "what it is alone; put the padding on the left, or, as it was trained, give the "
            "padding tokens without a mask"
        )
    if is_left(mask) and not takes_left(model):
        raise InputError(
            f"{kind} goes by columns, so a row that is padded on the left is not what it is alone; "
            "put the padding on the right"
        )


def reads_last(model: TransformerBridge) -> bool:
    """Whether a text is pooled at the last column, padding or not."""
    return any(type(part).__name__ == POOLS_LAST for part in model.original_model.modules())


def require_sound_padding(model: TransformerBridge, mask: Tensor) -> None:
    """Refuse padding under which a sound would not be what it is alone.

    Args:
        mask: [batch, sample], False at padding.

    Raises:
        InputError: saying why.
    """
    inner = model.original_model
    kind = type(inner).__name__
    if is_left(mask):
        raise InputError(f"{kind}: put the padding on the right of a sound")
    why = ""
    if any(isinstance(module, nn.GroupNorm) for module in inner.modules()):
        why = "its feature encoder normalises over the whole length of a sound (group norm)"
    elif kind.startswith(MIXES_FRAMES):
        why = "it convolves or pools frames after the padding has become numbers"
    elif kind.endswith("ForXVector"):
        why = "transformers counts the frames of its last layers without their dilation"
    if why:
        raise InputError(
            f"{kind}: {why}, so a padded row is not what it is alone; give sounds of one length, "
            "or one each"
        )


def require_ends(model: TransformerBridge, mask: Tensor, tokens: Tensor | None = None) -> None:
    """Refuse rows of which a classifier would read padding, or nothing: it finds an end by ids.

    Args:
        mask: [batch, pos], False at padding.
        tokens: [batch, pos]; ``None`` where embeddings are given.

    Raises:
        InputError: saying what is right.
    """
    inner: Any = model.original_model
    kind = type(inner).__name__
    if not kind.endswith("ForSequenceClassification") or of_encoder(inner.config):
        return
    if inner.config.is_encoder_decoder:
        end = _end_token(inner)
        ends = None if tokens is None or end is None else ((tokens == end) & mask).sum(dim=1)
        if ends is not None and (int(ends.min()) == 0 or len(set(ends.tolist())) > 1):
            raise InputError(
                f"{kind} reads a text at its last end token ({end}), of which each row must have "
                f"as many, one at least; these have {ends.tolist()}"
            )
        return
    padding = _padding_token(inner)
    if padding is None and len(mask) > 1:
        raise InputError(
            f"{kind} has no padding token, by which it finds the end of each of several rows: give "
            "one row, or set config.pad_token_id"
        )
    if (tokens is None or padding is None) and not bool(mask[:, -1:].all()):
        raise InputError(
            f"{kind} finds the last token of a row by its ids, and reads the last column of "
            "embeddings, or where it has no padding token: put the padding on the left, or give "
            "tokens and a config.pad_token_id"
        )
    if tokens is not None and is_left(mask) and bool(((tokens == padding) | ~mask).all(1).any()):
        raise InputError(f"a row has nothing but the padding token ({padding}) of {kind}")


def takes_mask(model: TransformerBridge) -> bool:
    """Whether a padding mask has the effect that it has on the model itself.

    OpenAI GPT's has not. With padding on the right it needs none: no token sees what follows it.
    """
    return not type(getattr(model, "original_model", model)).__name__.startswith("OpenAIGPT")


def takes_left(model: TransformerBridge) -> bool:
    """Whether rows padded on the left can have the positions that they have alone."""
    inner = model.original_model
    mixes = any(type(module).__name__.endswith(MIXES_COLUMNS) for module in inner.modules())
    if mixes or not takes_mask(model) or reads_first_column(inner):
        return False
    config = getattr(inner, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return True
    if type(inner).__name__.endswith(OF_A_ROW):
        return False  # its decoder's text begins in the first column, and is read by the encoder's
    if counting(inner) is not None:
        return True
    return not any(position for _, position in embeddings(components(model)))


def reads_first_column(inner: nn.Module) -> bool:
    """Whether an encoder's head reads the first token of a row, wherever its padding is."""
    config: Any = getattr(inner, "config", None)
    if not of_encoder(config) or getattr(config, "classifier_pooling", "cls") == "mean":
        return False
    return type(inner).__name__.endswith(OF_A_ROW)


def of_encoder(config: Any) -> bool:
    """Whether a family's language model fills in masked tokens, in one stack."""
    masked = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not config.is_encoder_decoder


def counting(inner: nn.Module) -> int | None:
    """The padding token of a model that finds positions by it, ``None`` for others."""
    for module in inner.modules():
        if callable(getattr(module, "create_position_ids_from_input_ids", None)):
            padding = getattr(module, "padding_idx", None)
            return None if padding is None else int(padding)
    return None


def masked_ids(model: TransformerBridge, tokens: Tensor, mask: Tensor) -> Tensor:
    """``tokens`` with the padding token where padding is, for a model that goes by it.

    Some count their positions by it, and a decoder's classifier finds the end of a row by it. One
    that pools a text at its end token finds none in what is put there; nor does one that pools at
    the largest number (CLIP's towers).
    """
    if bool(mask.all()):
        return tokens
    inner = model.original_model
    padding, end = counting(inner), _end_token(inner)
    if padding is None and end is not None:
        padding = int(end == 0)
    if padding is None and type(inner).__name__.endswith("ForSequenceClassification"):
        padding = _padding_token(inner)
    return tokens if padding is None else tokens.masked_fill(~mask.to(tokens.device), padding)


def _padding_token(inner: Any) -> int | None:
    """The token by which transformers' classifiers of decoders know padding."""
    padding: int | None = inner.config.get_text_config().pad_token_id
    return padding


def _end_token(inner: Any) -> int | None:
    """The token at which a text is pooled, ``None`` where it is not pooled by one."""
    ends = [vars(part).get("eos_token_id") for part in inner.modules()]  # of text towers
    if type(inner).__name__.endswith(OF_A_ROW) and inner.config.is_encoder_decoder:
        ends.append(inner.config.eos_token_id)
    return next((int(end) for end in ends if isinstance(end, int)), None)


def position_ids(model: TransformerBridge, mask: Tensor) -> Tensor | None:
    """The positions of embeddings padded on the left; ``None`` where the model finds them itself.

    For tokens the bridge does the same.
    """
    inner = model.original_model
    if not is_left(mask):
        return None
    counted = mask.long().cumsum(dim=1)
    padding = counting(inner)
    if padding is not None:
        return torch.where(mask, counted + padding, padding)
    if not accepts_mask_derived_position_ids(inner):
        return None
    return (counted - 1).clamp(min=0)
