"""What one pass costs: wall time, peak of allocated memory, and their summary over repeats.

Nothing here knows LensLRP or TransformerLens, so that the same file also runs in an environment
that holds only torch, transformers and LXT (`cost_worker.py`).

A *pass* is one forward pass, one backward pass from one logit at the last position, and token
relevance (input times gradient at the embeddings, summed over features). Weights are frozen on
every side and the leaf is a detached copy of the embeddings on every side.

Peak memory is counted, not sampled: the torch profiler reports every allocation and release that
goes through torch's CPU allocator during one untimed pass; the running sum of the two, in order of
time, has a maximum, and that is the peak above what was held before the pass (weights excluded).
It is the same number on every run. Scratch space inside MKL and oneDNN is not seen.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20

Pass = Callable[[Tensor, int], Tensor]
"""(tokens [batch, pos], token id of the target) -> token relevance [batch, pos], in logits."""


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


def build_llama(shape: Shape, attention: str, weights: Path | None = None) -> LlamaForCausalLM:
    """A frozen float32 Llama in evaluation mode with `attention` ("eager" or "sdpa").

    `weights` is a file written by `save_weights`, or safetensors of any float type; without it
    they are drawn with seed 0. ValueError if they do not fit `shape`.
    """
    torch.manual_seed(0)
    config = shape.config()
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    if weights is not None:
        state = load_file(weights)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any("lm_head" not in name for name in missing):
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model


def save_weights(model: LlamaForCausalLM, path: Path) -> None:
    """Write safetensors, so that another process, with another transformers, has the same ones."""
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, path)


def make_tokens(shape: Shape, batch: int, length: int) -> Tensor:
    """Random token ids [batch, pos], the same for everybody."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, shape.vocabulary, (batch, length), generator=generator)


def hugging_face_pass(model: LlamaForCausalLM) -> Pass:
    """The pass of a plain Hugging Face model (and of LXT, which patches the model's classes)."""

    def run(tokens: Tensor, target: int) -> Tensor:
        leaf = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False).logits
        logits[:, -1, target].sum().backward()
        assert leaf.grad is not None
        relevance: Tensor = (leaf.detach() * leaf.grad).sum(-1)
        return relevance

    return run


def wall_ms(run: Pass, tokens: Tensor, target: int) -> float:
    """Wall time of one pass in milliseconds, garbage collected beforehand."""
    gc.collect()
    start = time.perf_counter()
    run(tokens, target)
    return (time.perf_counter() - start) * 1e3


def peak_mib(run: Pass, tokens: Tensor, target: int) -> float:
    """Peak of torch's CPU allocations during one pass, in MiB above the level before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run(tokens, target)
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


@dataclass(frozen=True)
class Summary:
    """Repeats of one configuration: milliseconds, and ratios paired round by round."""

    median: float
    minimum: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Median, minimum and the two quartiles of `values`."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, min(values), low, high)


def paired_ratio(values: Sequence[float], reference: Sequence[float]) -> Summary:
    """Summary of value/reference within each round, so that slow drifts of the machine cancel."""
    return Summary.of([a / b for a, b in zip(values, reference, strict=True)])


def interleave(
    timers: dict[str, Callable[[], float]], repeats: int, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds per configuration: `repeats` rounds, every configuration once in each round.

    The order within a round is drawn anew, so that no configuration always follows the same one.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        names = list(timers)
        order.shuffle(names)
        for name in names:
            times[name].append(timers[name]())
    return times


def shape_to_json(shape: Shape) -> dict[str, int | float | bool]:
    """The fields of `shape`, for the worker process."""
    return asdict(shape)
