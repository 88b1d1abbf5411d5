"""One input and one target, as a function of what the model embedded: what every method resolves.

A method of attribution finds how the target's value depends on the units of the input: token
embeddings (a unit is the whole vector), or patches of an image (a unit is all of its pixels). Here
input and target are resolved exactly as `lenslrp.run_with_relevance` resolves them; then the
value can be had for any number of changed inputs, in chunks of bounded memory, and every pass is
counted. The default target, the top logit, is that of the unchanged input throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp import media
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.forward import columns_for, forward, outputs_of, require_readable
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.install import require_bridge
from lenslrp.hooks.readers import NamesFilter
from lenslrp.leaves import Leaves
from lenslrp.logits import Columns, Outputs, Target
from lenslrp.media import batch_size
from lenslrp.running import architecture
from lenslrp.sessions import Session
from lenslrp.targets import (
    Activation,
    Explained,
    Logit,
    PerRow,
    Sequence,
    Similarity,
    Top,
    as_target,
    parts_of,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SEQUENCES_AT_ONCE = 16
"""How many sequences run through the model at once."""


@dataclass
class PassCount:
    """Forward and backward passes of one sequence that an explanation took."""

    forward: int = 0
    backward: int = 0


@dataclass(eq=False)
class AttributionProblem:
    """The value of a target as a function of an input; see `resolve`.

    Attributes:
        inputs: the embeddings of the tokens, [batch, pos, d_model], or an image's pixels,
            [batch, channel, height, width].
        vectors: the embedding of every unit, [batch, units, d_model].
        mask: True where a unit (a token, a patch) is real.
        target: with the top logit's token fixed.
        explained: the target's text, and its value for the unchanged input.
        units: what the units are called.
        grid: rows and columns of an image's patches, ``None`` for text.
        input_keywords: the input, as keywords of `lenslrp.run_with_relevance`.
        columns: where the logits are that the target reads, if not everywhere.
        chunk: how many sequences run at once.
        passes: counted so far, for each row.
    """

    model: TransformerBridge
    prepared: Batch
    inputs: Tensor
    vectors: Float[Tensor, "batch units d_model"]
    mask: Bool[Tensor, "batch units"]
    target: Target
    explained: Explained
    units: list[list[str]]
    grid: tuple[int, int] | None
    input_keywords: Mapping[str, Any]
    columns: Columns | None = None
    chunk: int = SEQUENCES_AT_ONCE
    passes: PassCount = field(default_factory=PassCount)

    @property
    def step(self) -> int:
        """How many copies of the batch run at once."""
        return max(1, self.chunk // len(self.inputs))

    def values(
        self, inputs: Float[Tensor, "copies batch ..."], **how: Any
    ) -> Float[Tensor, "copies batch"]:
        """The target's value for changed inputs, on the autograd graph where they are on it.

        Args:
            how: what else is done in each pass, as for `lenslrp.forward.forward`.
        """
        return torch.cat([self._values(part, **how) for part in inputs.split(self.step)])

    def relevance(self, composite: Composite, names_filter: NamesFilter = ()) -> RelevanceCache:
        """Relevance of the unchanged input under rules: one forward and one backward pass."""
        with Session(self.model, composite, ledger=False, logits="target", stays=False) as session:
            _, cache = session.run_with_relevance(
                target=self.target, names_filter=names_filter, **self.input_keywords
            )
        self.passes.forward += 1
        self.passes.backward += 1
        return cache

    def gradients(self, inputs: Float[Tensor, "copies batch ..."]) -> Tensor:
        """The gradient of the value at changed inputs, of their shape."""
        gradients = []
        for part in inputs.split(self.step):
            leaf = part.detach().clone().requires_grad_()
            with torch.enable_grad():
                value = self._values(leaf).sum()
            gradients.append(torch.autograd.grad(value, leaf)[0])
        return torch.cat(gradients)

    @torch.no_grad()
    def ablated(
        self, keep: Bool[Tensor, "copies batch units"], baseline: Tensor
    ) -> Float[Tensor, "copies batch"]:
        """The value with every unit that is not kept set to the baseline."""
        parts = keep.to(self.inputs.device).split(self.step)
        return torch.cat(
            [
                self._values(torch.where(self.over_inputs(part), self.inputs, baseline))
                for part in parts
            ]
        )

    def over_inputs(self, units: Tensor) -> Tensor:
        """[..., batch, units] spread over the shape of the inputs (or one it broadcasts to)."""
        if self.grid is None:
            return units[..., None]
        height, width = (n // m for n, m in zip(self.inputs.shape[-2:], self.grid, strict=True))
        image: Tensor = units.unflatten(-1, self.grid)[..., None, :, :]
        return image.repeat_interleave(height, -2).repeat_interleave(width, -1)

    def summed(self, relevance: Tensor) -> Float[Tensor, "... batch units"]:
        """Relevance of the inputs summed over each unit: features of a token, pixels of a patch."""
        if self.grid is None:
            return relevance.sum(dim=-1)
        rows, columns = self.grid
        image = relevance.sum(dim=-3)
        parts: Tensor = image.unflatten(-2, (rows, -1)).unflatten(-1, (columns, -1))
        return parts.sum(dim=(-3, -1)).flatten(-2)

    def baseline(self, kind: str | Tensor) -> Tensor:
        """What takes the place of a unit, of the inputs' shape.

        ``"zero"`` (for pixels: the processor's mean colour), ``"mean"`` (of the row's own real
        tokens, or the image's own mean colour), or a tensor that broadcasts to the inputs.

        Raises:
            InputError: anything else.
        """
        x = self.inputs
        if isinstance(kind, Tensor):
            try:
                return kind.to(x).expand_as(x)
            except RuntimeError as error:
                raise InputError(
                    f"a baseline must broadcast to the inputs {list(x.shape)}, not "
                    f"{list(kind.shape)}"
                ) from error
        if kind == "zero":
            return torch.zeros_like(x)
        if kind == "mean" and self.grid is not None:
            return x.mean(dim=(-2, -1), keepdim=True).expand_as(x)
        if kind == "mean":
            real = self.mask[..., None].to(x.dtype)
            mean = (x * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            return mean.expand_as(x)
        raise InputError(f"baseline must be 'zero', 'mean' or a tensor, not {kind!r}")

    def generator(self, row: int, seed: int) -> torch.Generator:
        """Random numbers for one row: by seed and content, whatever the batch it is in."""
        prompt = self.prepared
        content = (
            self.inputs[row] if prompt.media or "inputs_embeds" in prompt.kwargs
            else prompt.tokens[row][prompt.mask[row]]
        )  # fmt: skip
        data = content.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(f"{seed} ".encode() + data).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _values(self, inputs: Tensor, **how: Any) -> Tensor:
        copies, batch = inputs.shape[:2]
        sequences = inputs.flatten(0, 1)
        changed, columns = self.prepared.repeated(copies), self.columns
        if changed.media:
            changed = replace(changed, media={"pixel_values": sequences})
        elif "inputs_embeds" in changed.kwargs:
            changed.kwargs["inputs_embeds"] = sequences
        else:
            how["embed"] = lambda _, out: sequences if out.shape == sequences.shape else None
        self.passes.forward += copies
        with forward(
            self.model, changed, capture_at=latent(self.target),
            columns=None if columns is None else columns.repeat(copies, 1),
            gradients=inputs.requires_grad and torch.is_grad_enabled(), **how,
        ) as run:  # fmt: skip
            assert run.logits is not None
            self.passes.backward += copies if run.logits.requires_grad else 0
            values = []
            for copy in range(copies):
                rows = slice(copy * batch, (copy + 1) * batch)
                hooked = {name: x[rows] for name, x in run.captured.items()}
                outputs = outputs_of(
                    self.model, self.prepared, run.logits[rows], hooked.__getitem__,
                    None if run.columns is None else columns,
                )  # fmt: skip
                values.append(self.target.values(outputs))
        return torch.stack(values)


def resolve(
    model: TransformerBridge,
    input: Any = None,
    target: Any = None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
    pixel_values: Any = None,
    chunk: int = SEQUENCES_AT_ONCE,
) -> AttributionProblem:
    """Resolve an input and a target into a problem, with one forward pass that is not counted.

    Args:
        model: a ``TransformerBridge``.
        input: as for `lenslrp.run_with_relevance`, like the other keywords. Of an encoder-decoder,
            the units are the encoder's tokens.
        target: the same.
        prepend_bos: the same.
        attention_mask: the same.
        inputs_embeds: the same.
        decoder_input: the same.
        pixel_values: the same.
        chunk: how many sequences may run at once; the batch itself always does.

    Raises:
        InputError: what cannot be explained; sound, and an image beside text, which
            `lenslrp.run_with_relevance` explains but the baselines do not.
    """
    require_bridge(model)
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, not {chunk}")
    kind = architecture(model)
    main_input = media.main_input(model)
    if main_input not in ("input_ids", "pixel_values"):
        raise InputError(f"baselines take text and images; {kind} reads {main_input}")
    image = main_input == "pixel_values"
    if pixel_values is not None and not image:
        raise InputError(f"baselines take text or an image, not both; {kind} reads {main_input}")
    if image and isinstance(input, Tensor) and input.is_floating_point():
        input, pixel_values = None, input
    floats = media.floats_given(model, pixel_values, None, None)
    pixel_values = floats.get("pixel_values")
    input_keywords = {
        "input": input, "prepend_bos": prepend_bos, "attention_mask": attention_mask,
        "inputs_embeds": inputs_embeds, "decoder_input": decoder_input,
        "pixel_values": pixel_values,
    }  # fmt: skip
    batch = batch_size(input, inputs_embeds, floats)
    parsed = as_target(target, model.tokenizer, batch, media.labels_of(model))
    prepared = media.prepare_batch(
        model,
        input,
        floats,
        append=parsed.ids(model.tokenizer) if isinstance(parsed, Sequence) else [],
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        decoder_input=decoder_input,
    )
    require_readable(model, parsed)
    leaves = Leaves()
    columns = columns_for(model, prepared, [parsed])
    with forward(model, prepared, leaves=leaves, capture_at=latent(parsed), columns=columns) as run:
        outputs = run.outputs()
    grid = None
    if image:
        inputs = prepared.media["pixel_values"]
        seen = media.with_sequence(prepared, leaves) if leaves.seen else prepared
        prepared = replace(seen, media=prepared.media)
        grid = _grid(leaves, inputs, kind)
        vectors = leaves.seen[0].flatten(2).transpose(1, 2)
        units = [[f"{r},{c}" for r in range(grid[0]) for c in range(grid[1])]] * len(inputs)
        mask = torch.ones(len(inputs), grid[0] * grid[1], dtype=torch.bool, device=inputs.device)
    else:
        if len(leaves.tokens) != 1 and inputs_embeds is None:
            raise InputError(
                f"{kind} embeds its tokens in {len(leaves.tokens)} places: the baselines take "
                "models that do it in one"
            )
        inputs = (leaves.tokens[0] if inputs_embeds is None else inputs_embeds).detach()
        vectors, mask, units = inputs, prepared.mask, prepared.str_tokens(model.tokenizer)
    value = parsed.values(outputs).detach()
    if not bool(value.isfinite().all()):
        raise InputError(f"the target is NaN or infinite: {value.tolist()}")
    explained = Explained(parsed.text(outputs), value)
    fixed = _fixed(parsed, outputs)
    return AttributionProblem(
        model, prepared, inputs, vectors, mask, fixed, explained, units, grid, input_keywords,
        columns, chunk,
    )  # fmt: skip


def latent(target: Target) -> list[str]:
    """The hook points whose units a target reads."""
    hooks = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
    return list(dict.fromkeys(hooks))


def _grid(leaves: Leaves, pixels: Tensor, kind: str) -> tuple[int, int]:
    """Rows and columns of an image's patches."""
    grid = leaves.seen[0].shape[2:] if leaves.seen and leaves.seen[0].ndim == 4 else ()
    sizes = pixels.shape[-2:]
    if len(grid) != 2 or any(n % m for n, m in zip(sizes, grid, strict=True)):
        raise InputError(f"{kind} has no grid of patches that covers its image {list(sizes)}")
    return int(grid[0]), int(grid[1])


def _fixed(target: Target, outputs: Outputs) -> Target:
    """The target with the top logit's token, or the other text's vector, of the unchanged input."""
    if isinstance(target, PerRow):
        rows = enumerate(target.targets)
        return PerRow(tuple(_fixed(part, outputs.row(row)) for row, part in rows))
    if isinstance(target, Similarity):
        return PerRow(target.of_rows(outputs))
    if not isinstance(target, Top):
        return target
    best = outputs.rows_at(target.position).argmax(dim=1).tolist()
    logits = tuple(Logit(token, target.position) for token in best)
    return logits[0] if len(logits) == 1 else PerRow(logits)
