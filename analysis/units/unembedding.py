"""From the residual stream to the vocabulary and back: final norm, unembedding, embedding.

Norms are measured, not looked up. At a fixed denominator a norm is linear, ``gain * (x - c mean(x))
+ bias``; what it does to a few known vectors gives the gain and whether it centres, in whatever
convention the class stores them (Gemma keeps the gain less 1, others fold it away).

TransformerLens' ``logit_readout`` reads states of a decoder; it refuses encoder-decoders and
classifiers, runs the bridge's hook points, and unembeds with the whole vocabulary at once. So the
projection here is a different one; the tests hold the two equal where both apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenslrp.analysis.units.locations import Side, blocks_name, require_plain_weights
from lenslrp.errors import InputError
from lenslrp.hooks.padding import OF_A_ROW, of_encoder
from lenslrp.hooks.structure import original
from lenslrp.hooks.turns import turn
from lenslrp.media import labels_of
from lenslrp.text.spelling import Speller

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

VOCABULARY_CHUNK = 16_384
"""Vocabulary rows a product: at d_model = 4096 in float32, 256 MiB at once."""

BETWEEN = ("mlm_head", "prediction_head", "project_out", "hc_head", "sigma_map", "classifier_ln")
"""Parts of a bridge that stand between the residual stream and the unembedding."""

SCALED = {
    **dict.fromkeys(
        (
            "T5ForConditionalGeneration",
            "LongT5ForConditionalGeneration",
            "MT5ForConditionalGeneration",
        ),
        "scale_decoder_outputs",
    ),
    "SwitchTransformersForConditionalGeneration": "tie_word_embeddings",
}
"""Models that multiply by d_model ** -0.5 before the unembedding if their configuration says so."""

_PROBE = 64.0  # large, so that a norm's epsilon does not count


@dataclass(frozen=True, eq=False)
class Gain:
    """A norm at a fixed denominator: ``gain * (x - mean(x))`` or ``gain * x``."""

    gain: Float[Tensor, " d_model"]
    centred: bool

    def forward(self, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What becomes of vectors that are written before the norm."""
        if self.centred:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        return vectors * self.gain.to(vectors)

    def backward(self, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What vectors that read behind the norm read before it (the transpose)."""
        vectors = vectors * self.gain.to(vectors)
        return vectors - vectors.mean(dim=-1, keepdim=True) if self.centred else vectors


@torch.no_grad()
def measure_gain(model: nn.Module, norm: nn.Module, like: Tensor) -> Gain:
    """The gain of one of a model's norms, [..., d_model]; ``like`` gives width and device.

    Raises:
        InputError: the module is not linear at a fixed denominator, as norms are.
    """
    module: Any = original(norm) or norm
    width = like.shape[-1]
    weight = next(module.parameters(), like)  # a LayerNorm takes no other type than its weight's
    signs = torch.ones(width, dtype=weight.dtype, device=like.device)
    signs[1::2] = -1
    if width % 2:  # zero mean all the same
        signs[-1] = -2
        signs[-2] = 1
    probes = torch.stack([signs * 0, signs * _PROBE, torch.full_like(signs, _PROBE)])
    with turn(model):
        zero, probe, even = module(probes[None])[0]
    gain = (probe - zero) / signs * signs.square().mean().sqrt()
    centred = bool((even - zero).abs().sum() < 0.01 * gain.abs().sum())
    expected = zero if centred else zero + gain
    if not torch.allclose(even, expected, rtol=0.05, atol=0.05 * float(gain.abs().mean())):
        raise InputError(f"{type(module).__name__} is no LayerNorm or RMSNorm of one vector")
    return Gain(gain, centred)


def final_norm(model: TransformerBridge, side: Side = "decoder") -> nn.Module | None:
    """The norm after the last block of encoder or decoder; None without one (post-norm models)."""
    name = "ln_final" if blocks_name(model, side) == "blocks" else f"{side}_ln_final"
    return None if _between(model) else getattr(model, name, None)


def _between(model: TransformerBridge) -> str | None:
    modules = getattr(model, "_modules", {})
    known = next((name for name in BETWEEN if modules.get(name) is not None), None)
    if known is not None or labels_of(model) is None:
        return known
    config = _config(model)
    if _name(model).endswith(OF_A_ROW) and (of_encoder(config) or config.is_encoder_decoder):
        return "what makes one vector of a text"
    parts = getattr(model.adapter, "component_mapping", None) or {}
    roots = {key: str(part.name).split(".")[0] for key, part in parts.items()}
    trunk = {root for key, root in roots.items() if key.endswith("blocks")}
    return next((k for k, root in roots.items() if k != "unembed" and root not in trunk), None)


def output_norm(model: TransformerBridge) -> nn.Module | None:
    """The norm whose output is unembedded: the final one, or that of a post-norm last block.

    A post-norm block (BART's) ends in its norm, which the residual stream after it has passed.
    """
    norm = final_norm(model)
    if norm is None:
        last = getattr(model, blocks_name(model))[-1]._modules
        norm = next((last[n] for n in ("ln3", "ln2", "ln1") if last.get(n) is not None), None)
    return norm


def input_norm(model: TransformerBridge, block: Any, side: Side, part: str) -> nn.Module | None:
    """The norm through which ``part`` (attn, cross_attn, mlp) of a block reads the residual stream.

    None in post-norm models, and where only outputs are normed (OLMo 2). Every pre-norm model of
    the zoo has a final norm, and no post-norm model has one.
    """
    if final_norm(model, side) is None:
        return None
    norm: nn.Module | None = block._modules.get(f"ln{_number(block, part)}")
    return norm


def branch_norm(block: Any, part: str) -> nn.Module | None:
    """The norm that a branch's output passes before it is added (Gemma 2, OLMo 2), if any."""
    norm: nn.Module | None = block._modules.get(f"ln{_number(block, part)}_post")
    return norm


def _number(block: Any, part: str) -> int:
    """Norms are numbered along the block: attention's is the first, the MLP's the last."""
    if part != "mlp":
        return 2 if part == "cross_attn" else 1
    numbers = [int(name[2]) for name in block._modules if name[:2] == "ln" and name[2:3].isdigit()]
    return max(numbers, default=1)


def unembedding(model: TransformerBridge) -> tuple[Float[Tensor, "rows d_model"], Tensor | None]:
    """The rows that turn a normed residual into logits (W_U transposed), and their bias.

    For a classifier these are the classes.

    Raises:
        InputError: the model has none, or something not linear stands before it.
    """
    unembed = getattr(model, "unembed", None)
    if unembed is None:
        raise InputError(
            f"{_name(model)} has no unembedding, so nothing that it writes can be read as tokens"
        )
    between = _between(model)
    if between is not None:
        raise InputError(
            f"{_name(model)} has a head of its own ({between}) between the residual stream and "
            "the vocabulary, so a direction has no reading of its own there"
        )
    config = _config(model)
    if getattr(config, "do_stable_layer_norm", False) and final_norm(model) is None:
        raise InputError(f"{_name(model)}: the bridge does not know the model's final norm")
    require_plain_weights(unembed)
    weight = unembed.W_U.T if hasattr(unembed, "W_U") else unembed.weight
    if weight.ndim != 2 or weight.shape[1] != model.cfg.d_model:
        raise InputError(
            f"{_name(model)}: the unembedding reads {weight.shape[-1]} values, the residual "
            f"stream has {model.cfg.d_model}"
        )
    bias = getattr(original(unembed), "bias", None)
    return weight.detach(), None if bias is None else bias.detach()


def embedding(model: TransformerBridge) -> Float[Tensor, "d_vocab d_model"]:
    """W_E.

    Raises:
        InputError: the model reads no tokens, or embeds them at another width.
    """
    require_plain_weights(getattr(model, "embed", None))
    weight = getattr(getattr(model, "embed", None), "W_E", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"{_name(model)} embeds no tokens, so nothing that it reads is one")
    if weight.shape[-1] != model.cfg.d_model:
        raise InputError(
            f"{_name(model)} embeds tokens with {weight.shape[-1]} values, the residual stream "
            f"has {model.cfg.d_model}"
        )
    return weight.detach()


def dot_products(
    rows: Float[Tensor, "rows d_model"], vectors: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n rows"]:
    """``vectors @ rows.T`` in chunks of rows, at least in float32."""
    vectors = vectors.to(rows.device)
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    return torch.cat(
        [vectors @ part.to(vectors).T for part in rows.split(VOCABULARY_CHUNK)], dim=-1
    )


@torch.no_grad()
def unembed(
    model: TransformerBridge, residual: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n rows"]:
    """Logits of residual vectors: the real final norm, unembedding, bias and soft-cap."""
    rows, bias = unembedding(model)
    norm = output_norm(model) if final_norm(model) is not None else None
    x = residual.to(rows)
    if norm is not None:
        module: Any = original(norm) or norm
        with turn(model):
            x = module(x[None])[0]
    if getattr(_config(model), SCALED.get(_name(model), "-"), False):
        x = x * rows.shape[1] ** -0.5
    logits = dot_products(rows, x)
    if bias is not None:
        logits = logits + bias.to(logits)
    transform = getattr(model.adapter, "apply_output_logits_transform", None)
    return logits if transform is None else transform(logits)


def labels(model: TransformerBridge) -> Callable[[int], str]:
    """The names of the unembedding's rows: tokens, or a classifier's classes."""
    names = labels_of(model)
    if names is not None:
        return lambda row: names.get(row, f"[{row}]")
    return token_labels(model)


def token_labels(model: TransformerBridge) -> Callable[[int], str]:
    """Tokens as text; their ids where the model has no tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return lambda row: f"[{row}]"
    return Speller(tokenizer).token


def _config(model: TransformerBridge) -> Any:
    """Hugging Face's configuration; None for TransformerLens' native models, which have none."""
    return getattr(model.original_model, "config", None)


def _name(model: TransformerBridge) -> str:
    return type(getattr(model, "original_model", model)).__name__
