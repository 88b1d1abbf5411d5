"""Runs a program in the model and against its reference, and says what came of it."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import lenslrp
from lenslrp.errors import CoverageError, InputError, LoadError
from lenslrp.ledger import BALANCED
from tests.property.bridges import given, plain_forward, prepared, template
from tests.property.program import Program
from tests.property.reference import Reference, refer

CLOSE = {"gpt2": 1e-8, "llama": 1e-6, "vit": 1e-6}
"""How near relevance must be, relative to the largest token's: Llama and ViT have float32 parts."""

REASONS = (
    (r"no rule for (?:the )?([\w ]+?)(?:\d*) (?:in|below)", r"no rule: \1"),
    (r"found no operation of its kind", "a rule without its operation"),
    (r"beside its operation", "a share that reaches what is beside its operation"),
    (r"is the same module as", "one module in two places"),
    (r"does not map each number", "not the element-wise function that was declared"),
    (r"cannot bridge", "TransformerLens cannot bridge it"),
    (r"never ran", "a rule whose operation never ran"),
    (r"is not on the path to the target", "the graph is cut"),
    (r"never fired", "a rule that never fired"),
    (r"do(?:es)? not balance", "the ledger does not balance"),
    (r"does not return its input", "not the norm that was declared"),
)


@dataclass(frozen=True)
class Verdict:
    """``right``, ``refused``, ``wrong``, ``rough`` (bfloat16 says nothing) or ``invalid``."""

    kind: str
    reason: str = ""
    expected: str = ""
    detail: str = ""

    @property
    def over(self) -> bool:
        """Refused although a rule is known for all of it."""
        return self.kind == "refused" and self.expected == "sure"


class Caught:
    """Holds whatever error a block ends in."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.error = error
            return True
        return False


def reason_of(error: Exception) -> str:
    """A refusal's class and kind, without names and numbers."""
    text = str(error)
    for pattern, reason in REASONS:
        found = re.search(pattern, text)
        if found:
            return f"{type(error).__name__}: {found.expand(reason)}"
    return f"{type(error).__name__}: {re.sub(r'[0-9.]+', '#', text)[:60]}"


def judge(program: Program) -> Verdict:
    """Run a program both ways; what is wrong is tried once more, on a bridge of its own."""
    verdict = _judge(program, fresh=False)
    if verdict.kind not in ("wrong", "invalid"):
        return verdict
    again = _judge(program, fresh=True)
    if again.kind == verdict.kind:
        return again
    return Verdict("wrong", f"only on a bridge used before: {verdict.reason}", verdict.expected)


def _judge(program: Program, *, fresh: bool) -> Verdict:
    caught = Caught()
    result: Any = None
    trial = ""
    with caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own word on a program that checkpoints where no gradient is wanted.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        with prepared(program, fresh=fresh) as ready:
            names = set(program.read)
            inner = Caught()
            with inner:
                result = lenslrp.run_with_relevance(
                    ready.bridge,
                    *ready.inputs,
                    target=_target(program),
                    composite=ready.composite,
                    names_filter=None if "all" in names else lambda name: name in names,
                    attention="fused" if "fused" in program.options else "bridge",
                    checkpoint="checkpoint" in program.options,
                    ledger="no ledger" not in program.options,
                    **ready.keywords,
                )
            if inner.error is not None and not _refusal(inner.error):
                trial = _plain_error(ready)
            if inner.error is not None:
                raise inner.error
    reference = Caught()
    right: Reference | None = None
    with reference:
        right = right_for(program, torch.float64)
    if right is None or not bool(right.tokens.isfinite().all()):
        return Verdict("invalid", f"reference: {reference.error!r}"[:160])
    if caught.error is not None:
        if _refusal(caught.error):
            return Verdict("refused", reason_of(caught.error), right.status, str(caught.error))
        if trial:
            return Verdict("invalid", trial)
        kind = "a warning" if isinstance(caught.error, Warning) else "a raw error"
        said = f"{type(caught.error).__name__}: {str(caught.error)[:200]}"
        return Verdict("wrong", kind, right.status, said)
    return _compare(program, right, *result)


def _target(program: Program) -> Any:
    if not program.latent:
        return program.target
    inner = ".mlp.in." in program.latent or ".mlp.out.hook_in" in program.latent
    return lenslrp.targets.Activation(program.latent, program.target % (12 if inner else 8))


def _refusal(error: Exception) -> bool:
    return isinstance(error, CoverageError | InputError | LoadError)


def right_for(program: Program, dtype: torch.dtype, *, narrow: bool = True) -> Reference:
    """The reference of a program in ``dtype``; ``narrow``: with Hugging Face's float32 parts."""
    own = getattr(torch, program.dtype)
    host = template(program.host, program.weights, own)[1].to(dtype)
    seen = given(program.host, program.weights, program.batch)
    seen = seen.to(own).to(dtype) if seen.is_floating_point() else seen
    narrow = narrow and own != torch.bfloat16
    return refer(program, host, seen, dtype, narrow=narrow or dtype == torch.bfloat16)


def _plain_error(ready: Any) -> str:
    """What the program itself does wrong, without any rule."""
    caught = Caught()
    with caught, warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        plain_forward(ready).sum().backward()
    return "" if caught.error is None else f"without rules: {caught.error!r}"[:200]


def _compare(program: Program, right: Reference, logits: Tensor, kept: Any) -> Verdict:
    """Values that were given: right, or wrong in one way."""
    expected = right.status
    if not kept.coverage.ok:
        return Verdict("wrong", "coverage is not ok", expected, str(kept.coverage.uncovered)[:200])
    logits = logits.reshape(right.logits.shape) if logits.ndim == 2 else logits
    if program.dtype == "bfloat16":
        return _compare_coarse(program, right, logits, kept)
    apart = float((logits - right.logits).abs().max() / right.logits.abs().max())
    close = max(CLOSE[program.host], 1e-6 if "fused" in program.options else 0.0)
    if apart > close:
        with prepared(program, fresh=True) as ready:
            plain = plain_forward(ready).reshape(logits.shape)
        kind = "invalid" if torch.equal(plain, logits) else "wrong"
        return Verdict(kind, "another forward pass", expected, f"logits {apart:.1e} apart")
    if expected == "none":
        return Verdict("wrong", "nothing says what is right", expected, "relevance was given")
    # Where next to nothing arrives (a norm of a constant), rounding is all there is to compare.
    scale = max(float(right.tokens.abs().max()), 1e-4 * right.size)
    pairs = {"tokens": (kept.tokens, right.tokens)}
    for name in right.at:
        if name in kept and (name in program.read or "all" in program.read):
            value = kept[name]
            pairs[name] = (value.reshape(right.at[name].shape), right.at[name])
    far = {}
    for name, (a, b) in pairs.items():
        error = float((a - b).abs().max())
        if not error <= close * max(scale, float(b.abs().max()) if name != "tokens" else 0.0):
            far[name] = error / (scale + 1e-30)
    if far and close > 1e-8:  # is it the model's own float32 that moves the answer?
        wide = right_for(program, torch.float64, narrow=False)
        for name in list(far):
            a, b = pairs[name]
            other = wide.tokens if name == "tokens" else wide.at[name]
            moved = float((other - b).abs().max())
            if float((a - b).abs().max()) <= 30 * moved < 1e-3 * max(scale, float(b.abs().max())):
                del far[name]
    if far:
        worst = max(far, key=lambda name: far[name])
        shown = ", ".join(f"{name} {value:.1e}" for name, value in list(far.items())[:4])
        where = "tokens" if "tokens" in far else worst
        return Verdict("wrong", f"relevance at {_kind(where)}", expected, shown)
    return Verdict("right", "", expected)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _compare_coarse(program: Program, right: Reference, logits: Tensor, kept: Any) -> Verdict:
    """bfloat16: balanced, and near float64 in direction."""
    if right.status == "none":
        return Verdict("wrong", "nothing says what is right", "none", "relevance was given")
    coarse = right_for(program, torch.bfloat16)
    itself = _cosine(coarse.tokens, right.tokens)
    if not itself > 0.997:
        return Verdict("rough", "", right.status, f"bfloat16 alone: cosine {itself:.4f}")
    if not _cosine(logits, right.logits) > 0.99:
        return Verdict("invalid", "another forward pass", right.status)
    if "no ledger" in program.options:
        return _direction(kept.tokens, right)
    missed = kept.ledger().imbalance
    if not missed <= BALANCED[torch.bfloat16]:
        return Verdict("wrong", "bfloat16 out of balance", right.status, f"misses {missed:.3f}")
    return _direction(kept.tokens, right)


def _direction(tokens: Tensor, right: Reference) -> Verdict:
    cosine = _cosine(tokens, right.tokens)
    if not cosine > 0.99:
        return Verdict("wrong", "bfloat16 direction", right.status, f"cosine {cosine:.4f}")
    return Verdict("right", "", right.status)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
