"""What one pass costs: CPU time, peak of allocated memory, and their summary over rounds.

Nothing here knows LensLRP or TransformerLens, so that the same file also runs in an environment
that holds only torch, transformers and LXT (`worker.py`).

A *pass* is one forward pass, one backward pass from one logit at the last position, and token
relevance (input times gradient at the embeddings, summed over features). Weights are frozen on
every side and the leaf is a detached copy of the embeddings on every side.

Time is what the system charges to the process, in user and in kernel mode. Peak memory is counted,
not sampled: the torch profiler reports every allocation and release that goes through torch's CPU
allocator during one untimed pass; the running sum of the two, in order of time, has a maximum, and
that is the peak above what was held before the pass (weights excluded). It is the same number on
every run. Scratch space inside MKL and oneDNN is not seen.
"""

from __future__ import annotations

import gc
import resource
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20

TARGET = 7
"""The token id whose logit at the last position is explained."""

Pass = Callable[[Tensor], Tensor]
"""tokens [batch, pos] -> token relevance [batch, pos], in logits."""

Times = tuple[float, float]
"""CPU seconds of one pass: user, system."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a bias-free Llama. `kv_heads` = `heads` means attention without grouped queries."""

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def config(self) -> LlamaConfig:
        """The Hugging Face configuration of these sizes."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            rms_norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            max_position_embeddings=8192,
            bos_token_id=1,
            eos_token_id=2,
        )


SMOLLM2 = Shape(
    layers=30,
    d_model=576,
    d_mlp=1536,
    heads=9,
    kv_heads=3,
    vocabulary=49152,
    tied=True,
    norm_eps=1e-5,
    rope_theta=100000.0,
)
"""SmolLM2-135M's sizes."""


def build_llama(shape: Shape, attention: str, weights: Path) -> LlamaForCausalLM:
    """A frozen float32 Llama in evaluation mode with `attention` ("eager" or "sdpa").

    `weights` is a file of safetensors of any float type. ValueError if they do not fit `shape`.
    """
    config = shape.config()
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval().requires_grad_(False)


def make_tokens(vocabulary: int, length: int) -> Tensor:
    """Random token ids [1, pos], the same for everybody."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (1, length), generator=generator)


def hugging_face_pass(model: LlamaForCausalLM, logits: str) -> Pass:
    """The pass of a Hugging Face model (and of LXT, which patches the model's classes).

    `logits` is "all", or "target" to compute those of the last position alone.
    """
    kept = {"all": 0, "target": 1}[logits]

    def run(tokens: Tensor) -> Tensor:
        leaf = model.get_input_embeddings()(tokens).detach().requires_grad_()
        found = model(inputs_embeds=leaf, use_cache=False, logits_to_keep=kept).logits
        found[:, -1, TARGET].sum().backward()
        assert leaf.grad is not None
        return (leaf.detach() * leaf.grad).sum(-1)

    return run


def cpu_seconds(run: Pass, tokens: Tensor) -> Times:
    """User and system time of one pass, garbage collected beforehand."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    run(tokens)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


def peak_mib(run: Pass, tokens: Tensor) -> float:
    """Peak of torch's CPU allocations during one pass, in MiB above the level before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run(tokens)
    del result
    inner = prof.profiler
    assert inner is not None and inner.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]"
    ]
    if not changes:
        raise RuntimeError("the profiler reported no allocation; peak memory cannot be measured")
    level = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        level += size
        peak = max(peak, level)
    return peak / MIB


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of `values`, two of them at least."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def verdict(measured: float, bar: float | None) -> str:
    """Two cells: the bar, and whether it is met."""
    return " | " if bar is None else f"<= {bar:.2f} | {'yes' if measured <= bar else '**no**'}"
