"""A Hugging Face model and a bridge around a copy of it, for methods checked without the bridge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import lenslrp
from tests.unit.tiny import FAMILIES, HEADS, TOKENS, VOCABULARY

WRITTEN = torch.tensor([[0, 4, 5], [0, 7, 7]])  # by a decoder
TARGETS = torch.tensor([5, 7])


@dataclass(frozen=True)
class Pair:
    """One model twice.

    Attributes:
        plain: Hugging Face's.
        bridge: TransformerLens' around a copy.
        given: what :func:`lenslrp.analysis.attribute` is given.
        inputs: the same as embeddings (or pixels), [batch, ...].
        logits: of changed inputs, by the plain model, where the target is: [batch, vocab].
    """

    plain: Any
    bridge: Any
    given: dict[str, Any]
    inputs: Tensor
    run: Callable[[Tensor], Any]
    reads: Callable[[Tensor], Tensor]

    def values(self, inputs: Tensor) -> Tensor:
        """The targets' logits, [batch]."""
        return self.reads(self.run(inputs).logits)[torch.arange(2), TARGETS]

    def explain(self, method: str, **options: Any) -> Any:
        from lenslrp.analysis.attribution.methods import attribute

        return attribute(method, self.bridge, target=TARGETS, **self.given, **options)


def _spread(model: nn.Module) -> nn.Module:
    """Weights large enough for attention and activations to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.ndim < 2:
                weight.copy_((0.0 if "bias" in name else 1.0) + 0.2 * noise)
            else:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
    return model


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1]


def language(name: str, **changes: Any) -> Pair:
    """A decoder of ``tests/unit/tiny.py``."""
    plain: Any = _spread(FAMILIES[name](**changes).double()).eval()
    plain.set_attn_implementation("eager")
    embeds = plain.get_input_embeddings()(TOKENS).detach()
    bridge = lenslrp.load(copy.deepcopy(plain))

    def run(inputs: Tensor) -> Any:
        return plain(inputs_embeds=inputs, output_attentions=True, use_cache=False)

    return Pair(plain, bridge, {"input": TOKENS}, embeds, run, _last)


def t5(**changes: Any) -> Pair:
    """An encoder-decoder whose decoder has written two tokens beside its start token."""
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=HEADS,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        **changes,
    )
    plain: Any = _spread(hf.T5ForConditionalGeneration(config).double()).eval()
    plain.set_attn_implementation("eager")
    embeds = plain.get_input_embeddings()(TOKENS).detach()
    bridge = lenslrp.load(copy.deepcopy(plain))

    def run(inputs: Tensor) -> Any:
        return plain(
            inputs_embeds=inputs,
            decoder_input_ids=WRITTEN,
            output_attentions=True,
            use_cache=False,
        )

    given = {"input": TOKENS, "decoder_input": WRITTEN}
    return Pair(plain, bridge, given, embeds, run, _last)


def vit() -> Pair:
    """A vision transformer with six patches of 4 x 4 pixels."""
    config = hf.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=(8, 12),
        patch_size=4,
        num_labels=9,
    )
    plain: Any = _spread(hf.ViTForImageClassification(config).double()).eval()
    plain.set_attn_implementation("eager")
    pixels = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2)).double()
    bridge = lenslrp.load(copy.deepcopy(plain))

    def run(inputs: Tensor) -> Any:
        return plain(pixel_values=inputs, output_attentions=True)

    return Pair(plain, bridge, {"pixel_values": pixels}, pixels, run, lambda logits: logits)


PAIRS: dict[str, Callable[[], Pair]] = {
    "llama": lambda: language("llama"),
    "gpt2": lambda: language("gpt2"),
    "t5": t5,
    "vit": vit,
}
