"""What a model of any size would need, told from shapes alone: no weights, no values.

The model is built, bridged, given its rules, run forward, walked and run backward with torch's fake
tensors, which have a shape, a type and a device but no memory behind them. So the same code that
explains a model says which rule sits where in it, and counts every byte that torch would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.initialization import no_init_weights

from lenslrp.errors import InputError
from lenslrp.forward import keep_unembedded, undone
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.components import Attached, components, hook_points
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.embeddings import embeddings
from lenslrp.hooks.install import FLOATING, relevance_rules
from lenslrp.hooks.readers import NamesFilter, Readers, owners, select_names
from lenslrp.hooks.rules import Rule
from lenslrp.hooks.sites import Books
from lenslrp.inputs import Batch
from lenslrp.leaves import Leaves, cut_leaves, cut_media
from lenslrp.loading import load
from lenslrp.logits import head_component, require_logits, unembed_at
from lenslrp.passes import checkpoint_blocks, starting, watch_blocks
from lenslrp.reductions import Reduce, reduction_for

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 2**30


@dataclass(frozen=True)
class Survey:
    """What one pass over a model would need.

    Attributes:
        architecture: the Hugging Face class.
        composite: name of the table.
        parameters: how many weights.
        coverage: which rule sits where, and that each was reached.
        weights: bytes of the weights.
        held: bytes held between the forward and the backward pass, besides the weights.
        peak: most bytes held at any time, besides the weights: tensors that torch allocates, not
            the scratch space inside a kernel, nor what an allocator leaves unused.
        flops: floating-point operations of the matrix products, forward and backward.
    """

    architecture: str
    composite: str
    parameters: int
    coverage: cover.Coverage
    weights: int
    held: int
    peak: int
    flops: int

    def __str__(self) -> str:
        return (
            f"{self.architecture} under {self.composite}: {self.parameters / 1e9:.2f}e9 weights, "
            f"{self.weights / GIB:.2f} GiB; {self.peak / GIB:.2f} GiB besides at the peak, "
            f"{self.held / GIB:.2f} between the passes; {self.flops / 1e12:.2f}e12 operations\n"
            f"{self.coverage}"
        )


def survey(
    config: Any,
    composite: Composite | Mapping[str, Rule] | None = None,
    *,
    architecture: str | None = None,
    length: int = 16,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    names_filter: NamesFilter = (),
    reduce: Reduce = "sum",
    attention: str = "bridge",
    checkpoint: bool = False,
    ledger: bool = True,
    logits: str = "all",
    inputs: Mapping[str, Any] | None = None,
) -> Survey:
    """Coverage, memory and arithmetic of explaining one logit, from a configuration alone.

    Args:
        config: a Hugging Face configuration, such as ``transformers.LlamaConfig()``.
        composite: ``AttnLRP()`` if not given.
        architecture: name of the model's class; the configuration's own, or its causal language
            model, if not given.
        length, batch: of the input.
        dtype: of the weights.
        names_filter, reduce, attention, checkpoint, ledger, logits: as for
            :func:`lenslrp.run_with_relevance`, but no hook is read by default.
        inputs: what the model takes instead of tokens: name -> shape of floats.

    Raises:
        InputError: no such class, a type of weights that rules cannot read, or a model that looks
            at values on its way.
        CoverageError: as when the model itself is explained.
    """
    if dtype not in FLOATING:
        raise InputError(f"dtype must be one of {', '.join(map(str, FLOATING))}, not {dtype}")
    require_logits(logits)
    table = as_composite(AttnLRP() if composite is None else composite)
    cls = _class_of(config, architecture)
    with FakeTensorMode():
        built = _built(cls, config, dtype)
        weights = list(built.parameters())  # before a bridge splits some of them
        model = load(built, verify=False)
        given = _inputs(model, batch, length, inputs or {}, dtype)
        books = Books() if ledger else None
        leaves, held = Leaves(), Held(model)
        parts = list(components(model))
        with ExitStack() as stack:
            rules = stack.enter_context(
                relevance_rules(model, table, attention=attention, strict=False, books=books)
            )
            at = stack.enter_context(undone(Attached()))
            if "input" in given:
                cut_leaves(at, embeddings(parts), leaves, _as_prepared(given))
            else:
                given = cut_media(at, parts, leaves, rules.sites, given, "pixels")
            if books is not None:
                watch_blocks(at, parts, books)
            points, captured = hook_points(model, parts), dict[str, Tensor]()
            keep_unembedded(at, parts, captured)
            unembed = head_component(model)
            if logits == "target" and unembed is not None and "input" in given:
                unembed_at(at, unembed, torch.full((batch, 1), length - 1), length)
            names, _ = select_names(points, names_filter)
            readers = Readers.plan(points, names, partial(reduction_for, reduce))
            readers.attach(owners(m for _, m in parts), at)
            if checkpoint:
                checkpoint_blocks(at, parts)
            stack.enter_context(held)
            made = _logits(model, given)
            between = held.now
            capped = getattr(model.cfg, "output_logits_soft_cap", None)
            root = captured["unembed"] if capped else made  # where relevance starts
            rules.verify(root)
            found = cover.walk([root], weights=rules.weights)
            with starting([root] if ledger else []):
                torch.autograd.grad(root.flatten(1)[:, -1].sum(), leaves.all(), allow_unused=True)
            readers.finish()
        sites = [site for site in rules.sites if id(site) in found.sites]
        cover.require_fired(sites)
        off_path = readers.off_path()
        return Survey(
            cls.__name__,
            table.name,
            sum(p.numel() for p in weights),
            cover.Coverage(cover.site_table(sites), off_path=off_path),
            sum(p.numel() * p.element_size() for p in weights),
            between,
            held.peak,
            held.flops,
        )


class Held(TorchDispatchMode):
    """Counts the bytes of every tensor that is alive, apart from a model's own, and operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._meet(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default:
            return True  # TransformerLens asks whether a hook has changed something: none is here
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return out

    def _meet(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if counted else 0
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _class_of(config: Any, architecture: str | None) -> Any:
    named = [architecture] if architecture else list(getattr(config, "architectures", None) or [])
    if not named and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls = getattr(transformers, named[0], None) if named else None
    if cls is None:
        raise InputError(
            f"no model class {named[0]!r} in transformers"
            if named
            else f"{type(config).__name__} names no architecture: give architecture="
        )
    return cls


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _built(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    with _default(dtype), no_init_weights():  # drawing weights may look at them (ViT)
        model = cls(config)
    model.tie_weights()
    return model.eval()


def _logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    others: dict[str, Any] = {name: value for name, value in given.items() if name != "input"}
    if "input" in given:
        others["use_cache"] = False
    try:
        logits: Tensor = model(given.get("input"), return_type="logits", **others)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            f"{type(model.original_model).__name__} decides by values ({error.func}), which fake "
            "tensors have not; a mixture of experts does not with config._experts_implementation = "
            '"batched_mm" (or "grouped_mm", in bfloat16)'
        ) from error
    return logits


def _as_prepared(given: Mapping[str, Tensor]) -> Batch:
    sides = [given[name] for name in ("input", "decoder_input_ids") if name in given]
    made = [Batch(t, torch.ones_like(t, dtype=torch.bool), [t.shape[1]] * len(t)) for t in sides]
    return replace(made[0], decoder=made[1] if len(made) > 1 else None)


def _inputs(
    model: Any, batch: int, length: int, shapes: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    if shapes:
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    tokens = torch.zeros(batch, length, dtype=torch.long)
    given = {"input": tokens}
    if getattr(model.original_model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens
    return given
