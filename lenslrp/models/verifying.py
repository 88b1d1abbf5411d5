"""Is the bridge the model? One short pass of both, compared.

TransformerLens computes attention, norms and experts of many families itself. Where it computes
something else than Hugging Face, relevance would explain another model, and its ledger would close
all the same. So ``load`` runs a few random tokens (an image, a sound) through the model as it
is before it is wrapped, the same through the bridge afterwards, and compares what comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lenslrp import media
from lenslrp.batch import Batch
from lenslrp.errors import FAILURES
from lenslrp.forward import forward
from lenslrp.hooks.sites import has_values
from lenslrp.inputs import decoder_reads_the_text, text_of_decoder
from lenslrp.models.heads import CHOICE
from lenslrp.models.outputs import named_logits
from lenslrp.models.quantised import rounds

LENGTH = 6  #: tokens of the short pass
LARGEST = 40_000_000_000  #: weights; above, a pass costs too much to be made unasked

TOLERANCE: Mapping[str, float] = {
    "float64": 1e-9,
    "float64, float32 inside": 1e-6,  # a norm, softmax or rotary table of Hugging Face's
    "float32": 1e-4,
    "bfloat16": 0.1,
    "float16": 0.1,
    "rounded inputs": 0.1,
}
"""How far the outputs may be apart, relative to the largest. In 16 bits the median over positions
is held to it, because rounding can send a token to another expert; so it is where packed layers
round their inputs, to 8 bits say, which makes a step of a difference of 1e-7."""


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face model gave before it was wrapped.

    Attributes:
        given: the keywords of its forward pass.
        output: its logits, or the hidden states of a model without a head; None if there are none.
        kind: key in `TOLERANCE`.
        reason: why there is no output.
        failed: because the model itself cannot make one.
    """

    given: Mapping[str, Any]
    output: Tensor | None
    kind: str
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Agreement:
    """How far the bridge's output is from Hugging Face's, relative to the largest entry.

    Attributes:
        difference: None if it was not compared.
        tolerance: what it is held against.
        reason: why they were not compared.
        failed: because one of them cannot run the short pass.
    """

    difference: float | None
    tolerance: float = 0.0
    reason: str = ""
    failed: bool = False

    @property
    def ok(self) -> bool:
        """Nothing speaks against it: in agreement, or not compared."""
        return not self.failed and (self.difference is None or self.difference <= self.tolerance)

    @property
    def known(self) -> bool:
        """Whether they were compared."""
        return self.failed or self.difference is not None

    def __str__(self) -> str:
        if self.difference is None:
            return f"not compared with Hugging Face: {self.reason}"
        return (
            f"the bridge computes what Hugging Face computes: apart by {self.difference:.1e} of "
            f"the largest output (tolerance {self.tolerance:g})"
        )


def reference(model: Any, run: Callable[..., Any] | None = None) -> Reference:
    """One short pass of a Hugging Face model in evaluation mode, which it does not change.

    Args:
        model: the model.
        run: what is called, where that is not the model (a PeftModel around it).
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    kind = str(weight.dtype).removeprefix("torch.") if weight is not None else "none"
    if weight is None or kind not in TOLERANCE:
        return Reference({}, None, kind, f"its weights are {kind}")
    if not has_values(weight):
        return Reference({}, None, kind, "its weights have no values")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return Reference({}, None, kind, f"it has more than {LARGEST:.0e} weights")
    inputs = given = short_input(model)
    if type(model).__name__.endswith(CHOICE):  # which takes several, [batch, choice, pos]
        given = {**inputs, "input_ids": inputs["input_ids"][:, None]}
    try:
        with torch.no_grad(), _Narrowed() as narrowed:
            output = output_of((run or model)(**given))
    except FAILURES as error:
        reason = f"the model itself raises for a few random tokens: {_said(error)}"
        return Reference(inputs, None, kind, reason, failed=True)
    if kind == "float64" and narrowed.seen:
        kind += ", float32 inside"
    if rounds(model):
        kind = "rounded inputs"
    return Reference(inputs, output, kind)


def compare(bridge: Any, expected: Reference) -> Agreement:
    """The same pass through the bridge."""
    if expected.output is None:
        return Agreement(None, reason=expected.reason, failed=expected.failed)
    weight = next(p for p in bridge.parameters() if p.is_floating_point())
    inputs = {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in expected.given.items()
    }
    if decoder_reads_the_text(bridge.original_model):  # the model shifts it by itself
        written = text_of_decoder(bridge.original_model, inputs["input_ids"][0].tolist())
        inputs["decoder_input_ids"] = torch.tensor([written], device=weight.device)
    try:
        with forward(bridge, _batch(inputs)) as run:
            output = output_of((run.logits,))
    except FAILURES as error:
        reason = f"the bridge raises for what the model runs: {_said(error)}"
        return Agreement(None, reason=reason, failed=True)
    kinds = (expected.kind, str(weight.dtype).removeprefix("torch."))
    tolerance = max(TOLERANCE.get(kind, 0.0) for kind in kinds)
    if tuple(output.shape) != tuple(expected.output.shape):
        reason = f"the output is {list(output.shape)}, the model's {list(expected.output.shape)}"
        return Agreement(None, reason=reason, failed=True)
    wide = tolerance > TOLERANCE["float32"]
    return Agreement(difference(output, expected.output, by_position=wide), tolerance)


def _batch(inputs: dict[str, Any]) -> Batch:
    ids = inputs.pop("input_ids", None)
    if ids is not None:
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), [ids.shape[1]], inputs)
    floats = {name: inputs.pop(name) for name in media.LAYOUTS if name in inputs}
    rows = len(next(iter(floats.values())))
    empty = torch.empty(rows, 0, dtype=torch.long)
    return Batch(empty, empty.bool(), [0] * rows, inputs, media=floats)


def difference(output: Tensor, expected: Tensor, *, by_position: bool = False) -> float:
    """The largest difference, relative to the largest entry; NaN where only one has a NaN."""
    a, b = output.detach().double().cpu(), expected.detach().double().cpu()
    apart = torch.where(a == b, 0.0, (a - b).abs())  # infinities in the same place
    apart = torch.where(a.isnan() & b.isnan(), 0.0, apart)
    scale = b[b.isfinite()].abs().max().clamp_min(1e-30) if bool(b.isfinite().any()) else 1.0
    if by_position and apart.ndim > 2:
        return float((apart.flatten(2).amax(dim=2) / scale).median())
    return float((apart / scale).max())


def output_of(result: Any) -> Tensor:
    """Logits or hidden states, as TransformerLens chooses them."""
    for output in (
        getattr(result, "logits", None),
        named_logits(result),
        getattr(result, "last_hidden_state", None),
    ):
        if isinstance(output, Tensor):
            return output
    first = result[0] if isinstance(result, tuple) else result
    if not isinstance(first, Tensor):
        raise TypeError(f"no tensor comes out of it, but {type(first).__name__}")
    return first


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def short_input(model: Any, seed: int = 0) -> dict[str, Any]:
    """A few random tokens, or a random image or sound for a model that reads no text."""
    seen: Any = SimpleNamespace(original_model=model, parameters=model.parameters)
    takes = inspect.signature(model.forward).parameters
    floats = dict(media.example(seen, seed)) if media.reads_no_text(seen) else {}
    if floats and "decoder_input_ids" not in takes:
        return floats
    config = model.config
    text = config.get_text_config(decoder=True)
    special = reserved_ids(config.to_dict())
    order = torch.randperm(int(text.vocab_size), generator=torch.Generator().manual_seed(seed))
    free = [token for token in order[: LENGTH + len(special)].tolist() if token not in special]
    ids = torch.tensor([(free or order.tolist())[:LENGTH]], device=model.device)
    inputs: dict[str, Any] = floats or {"input_ids": ids}
    if decoder_reads_the_text(model):
        ids[0, -1] = config.eos_token_id  # where a classifier reads its answer
    elif getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        written = ids[:, :3].clone()
        written[0, 0] = written[0, 0] if start is None else start
        inputs["decoder_input_ids"] = written
    if media.is_pair(model):
        inputs.update(media.example(seen, seed))
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def reserved_ids(config: Mapping[Any, Any]) -> set[int]:
    """The ids that a configuration gives a meaning: padding, places for images."""
    ids: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            ids |= reserved_ids(value)
        elif str(name).endswith(("_token_id", "_token_index")):
            values = value if isinstance(value, list | tuple) else [value]
            ids |= {each for each in values if isinstance(each, int)}
    return ids


class _Narrowed(TorchFunctionMode):
    """Notes whether a pass in float64 computes anything in float32."""

    seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            self.seen = True
        return result
