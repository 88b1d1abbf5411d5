"""Four small models of Hugging Face's classes, trained from nothing on all tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from benchmarks import RESULTS
from benchmarks.recurrent.tasks import VOCABULARY, Sequence, Task
from lenslrp.quiet import quiet_transformers

FOLDER = RESULTS / "recurrent"
WIDTH, LAYERS = 64, 3
STEPS, RATE = 2000, 3e-3
ROWS = {"recall": 12, "copying": 16, "text": 4}
"""Sequences of each task in a batch."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}


def mamba2() -> Any:
    config = transformers.Mamba2Config(
        **COMMON, state_size=16, expand=2, head_dim=32, num_heads=4, n_groups=1, chunk_size=24
    )
    return transformers.Mamba2ForCausalLM(config)


def delta_net() -> Any:
    config = transformers.Qwen3_5TextConfig(
        **COMMON,
        **HEADS,
        intermediate_size=128,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    )
    model = transformers.Qwen3_5ForCausalLM(config)
    # transformers starts at a bias of 1, with which a state is forgotten within a token; these are
    # the steps that Mamba2 starts with, .001 to .1.
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            steps = 10 ** torch.empty_like(parameter).uniform_(-3, -1)
            parameter.data = steps + torch.log(-torch.expm1(-steps))
    return model


def rg_lru() -> Any:
    config = transformers.RecurrentGemmaConfig(
        **COMMON,
        **HEADS,
        intermediate_size=256,
        lru_width=WIDTH,
        attention_window_size=64,
        block_types=["recurrent", "recurrent", "attention"],
    )
    return transformers.RecurrentGemmaForCausalLM(config)


def transformer() -> Any:
    config = transformers.LlamaConfig(**COMMON, **HEADS, intermediate_size=128)
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "Mamba2": mamba2,
    "Qwen3.5": delta_net,
    "RecurrentGemma": rg_lru,
    "Llama": transformer,
}


def labels(sequences: list[Sequence]) -> torch.Tensor:
    """[sequence, pos], the tokens at answers, and elsewhere what the loss leaves out."""
    marked = torch.full((len(sequences), len(sequences[0].tokens)), -100)
    for row, sequence in enumerate(sequences):
        for at in sequence.answers:
            marked[row, at] = sequence.tokens[at]
    return marked


def batch(known: Mapping[str, Task], rng: np.random.Generator) -> list[Sequence]:
    return [task(rng) for name, task in known.items() for _ in range(ROWS[name])]


def trained(name: str, seed: int, known: Mapping[str, Task], steps: int = STEPS) -> Any:
    """A model trained on all tasks at once; read from its folder if it is there."""
    folder = FOLDER / f"{name}-{seed}-{'-'.join(known)}-{steps}"
    with quiet_transformers():
        torch.manual_seed(seed)
        model = MODELS[name]()
        if (folder / "config.json").is_file():
            return type(model).from_pretrained(folder).eval()
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    model.train()
    for step in (bar := tqdm(range(steps), desc=f"{name} {seed}")):
        sequences = batch(known, rng)
        tokens = torch.tensor([sequence.tokens for sequence in sequences])
        loss = model(tokens, labels=labels(sequences), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.2f}")
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def answered(model: Any, sequences: list[Sequence]) -> list[int]:
    """The model's top token where the explained answer stands in each sequence."""
    logits = model(torch.tensor([s.tokens for s in sequences]), use_cache=False).logits
    ends = torch.tensor([s.end for s in sequences])
    top: list[int] = logits[torch.arange(len(ends)), ends - 1].argmax(dim=-1).tolist()
    return top
