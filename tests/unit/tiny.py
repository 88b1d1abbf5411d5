"""Tiny random models in float64, a word tokenizer, and a snapshot of all that a model holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

import lenslrp

VOCABULARY = 23
HEADS = 2
WORDS = ["<s>", "</s>", *(chr(ord("a") + i) for i in range(VOCABULARY - 2))]
TOKENS = torch.tensor([[3, 17, 5, 17, 8, 11], [2, 9, 2, 21, 9, 14]])

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _llama(**changes: Any) -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": 1, **changes}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))


def _qwen3(**changes: Any) -> nn.Module:
    config = hf.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8, **changes)
    return hf.Qwen3ForCausalLM(config)


def _gemma2(**changes: Any) -> nn.Module:
    quirks: dict[str, Any] = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }
    config = hf.Gemma2Config(**SIZES, num_key_value_heads=1, **{**quirks, **changes})
    return hf.Gemma2ForCausalLM(config)


def _gpt2(**changes: Any) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=HEADS,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        **changes,
    )
    return hf.GPT2LMHeadModel(config)


def _phi(**changes: Any) -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**SIZES, **changes))


def _neox(**changes: Any) -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, use_parallel_residual=False, **changes))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "phi": _phi,
    "neox": _neox,
}


def _native(**changes: Any) -> TransformerBridge:
    sizes: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 32,
        "d_head": 8,
        "n_heads": HEADS,
        "d_vocab": VOCABULARY,
        "d_mlp": 24,
        "act_fn": "gelu",
        "normalization_type": "LN",
    }
    return TransformerBridge.boot_native(TransformerBridgeConfig(**{**sizes, **changes}))


def tiny(
    family: str = "llama", *, seed: int = 0, tokenizer: Any = None, **changes: Any
) -> TransformerBridge:
    """A bridge of two layers, two heads and 23 words, with weights large enough to matter.

    ``changes`` go to the Hugging Face configuration (``family="native"``: to the bridge's own).
    """
    torch.manual_seed(seed)
    model = _native(**changes) if family == "native" else FAMILIES[family](**changes)
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(10 if "emb" in name or "wte" in name else 6)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    bos = None if tokenizer is None else True  # its texts begin with <s>, which it does not add
    if family == "native":
        bridge = model
    else:
        bridge = lenslrp.load(model, tokenizer=tokenizer, prepend_bos=bos)
    assert isinstance(bridge, TransformerBridge)
    with torch.no_grad():
        bridge(TOKENS)  # TransformerLens and transformers set some attributes at the first pass
    return bridge


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One word, one token: ``"a b"`` is [2, 3]; an unknown word is ``<s>``."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<s>"
    )


def hook_order(module: nn.Module) -> dict[str, list[Any]]:
    """Every hook of a module, in the order in which they run."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return {kind: list(getattr(module, kind).items()) for kind in kinds}


# Attributes that a plain forward pass of TransformerLens' own replaces, or that an exception in it
# leaves behind: what it saw last, a cache of names, its lists of handles (their contents are
# compared).
REPLACED = frozenset(
    {
        "_pattern",
        "_block_alias_cache",
        "_current_batch_size",
        "_derived_position_ids_ok",
        "_fired_hook_in",
        "_fired_hook_out",
        "fwd_hooks",
        "bwd_hooks",
    }
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a context must leave as it found it, ready to be compared with ``==``."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}: hooks"] = hook_order(module)
        state[f"{name}: training"] = module.training
        state[f"{name}: attributes"] = {
            key: id(value) for key, value in vars(module).items() if key not in REPLACED
        }
        state[f"{name}: children"] = {k: id(child) for k, child in module._modules.items()}
        if isinstance(module, HookPoint):
            state[f"{name}: points"] = (list(module.fwd_hooks), list(module.bwd_hooks))
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        state[f"{name}: attention"] = (id(config), implementation)
    for name, weight in model.named_parameters(remove_duplicate=False):
        state[f"{name}: frozen"] = (id(weight), not weight.requires_grad, weight.grad is None)
        state[f"{name}: version"] = weight._version
    state["grad mode"] = torch.is_grad_enabled()
    return state


def changes(before: dict[str, Any], model: nn.Module) -> list[str]:
    """What is not as it was: empty when everything has been undone."""
    after = snapshot(model)
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def embedding_leaf(kept: list[Tensor]) -> tuple[str, Callable[..., Tensor]]:
    """A forward hook for ``model.hooks`` that cuts a leaf at the token embeddings, as users do."""

    def cut(x: Tensor, hook: Any) -> Tensor:
        kept.append(x.detach().clone().requires_grad_())
        return kept[-1]

    return "hook_embed", cut


def own_relevance(model: TransformerBridge, token: int = 5, tokens: Tensor = TOKENS) -> Tensor:
    """Token relevance [batch, pos] with the low-level means: an own leaf, forward and backward."""
    kept: list[Tensor] = []
    with model.hooks(fwd_hooks=[embedding_leaf(kept)]):
        model(tokens)[:, -1, token].sum().backward()
    (leaf,) = kept
    assert leaf.grad is not None
    return (leaf * leaf.grad).sum(dim=-1).detach()


def plain_gradients(
    model: nn.Module, tokens: Tensor = TOKENS, names: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every weight's gradient of a plain pass, without leaving a ``.grad`` behind.

    Weights by ``names`` are asked for although they may be frozen meanwhile.
    """
    logits = model(tokens)
    named = dict(model.named_parameters())
    asked = [n for n, p in named.items() if p.requires_grad] if names is None else names
    weights = {name: named[name] for name in asked}
    loss = logits.square().sum()
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    kept = {n: g for n, g in zip(weights, grads, strict=True) if g is not None}
    return logits.detach(), kept
