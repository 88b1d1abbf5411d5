"""The passes of the cost benchmark that run on a TransformerBridge, without and with LensLRP."""

from __future__ import annotations

import tempfile

import torch
from cost_measure import Pass
from tokenizers import Tokenizer, models
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lenslrp

REDUCE = {"mlp.hook_post": "sum_positions", "*": "sum"}
"""What the all-hooks case keeps: of neurons one number each, of other hook points one a token."""


def build_bridge(model: LlamaForCausalLM) -> TransformerBridge:
    """The bridge around `model` (modified in place), with a tokenizer that needs no download."""
    vocabulary = {f"w{index}": index for index in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        pad_token="w2",
    )
    with tempfile.TemporaryDirectory() as folder:  # the bridge reads its tokenizer again, by path
        tokenizer.save_pretrained(folder)
        stored = PreTrainedTokenizerFast.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            "random-llama", hf_model=model, tokenizer=stored
        )
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


def plain_pass(bridge: TransformerBridge) -> Pass:
    """Forward and backward without rules: Gradient x Input at the embeddings."""

    def run(tokens: Tensor, target: int) -> Tensor:
        leaves: list[Tensor] = []

        def cut(value: Tensor, hook: object) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        with bridge.hooks(fwd_hooks=[("embed.hook_out", cut)]):
            bridge(tokens)[:, -1, target].sum().backward()
        (leaf,) = leaves
        assert leaf.grad is not None
        return (leaf.detach() * leaf.grad).sum(-1)

    return run


def rules_pass(bridge: TransformerBridge, attention: str = "bridge") -> Pass:
    """The same pass inside `relevance_rules`: AttnLRP, and nothing read but the embeddings."""
    plain = plain_pass(bridge)

    def run(tokens: Tensor, target: int) -> Tensor:
        with lenslrp.relevance_rules(bridge, lenslrp.AttnLRP(), attention=attention):
            return plain(tokens, target)

    return run


def all_hooks_pass(bridge: TransformerBridge) -> Pass:
    """`run_with_relevance` with every hook point on the path read, streamed and reduced."""

    def run(tokens: Tensor, target: int) -> Tensor:
        _, relevance = lenslrp.run_with_relevance(
            bridge,
            tokens,
            target=target,
            composite=lenslrp.AttnLRP(),
            names_filter=None,
            reduce=REDUCE,
        )
        return torch.as_tensor(relevance.tokens)

    return run
