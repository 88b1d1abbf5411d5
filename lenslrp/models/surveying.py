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

from lenslrp.batch import Batch
from lenslrp.defaults import recommended
from lenslrp.errors import InputError
from lenslrp.hooks import coverage as cover
from lenslrp.hooks.composites import Composite, as_composite
from lenslrp.hooks.install import relevance_rules
from lenslrp.hooks.packed import FLOATING
from lenslrp.hooks.readers import NamesFilter, Readers, select_names
from lenslrp.hooks.rule_types import Rule
from lenslrp.hooks.sites import Accounts
from lenslrp.inputs import is_encoder_decoder
from lenslrp.logits import head_component, require_logits
from lenslrp.models.loading import load
from lenslrp.passes import Pass, under_rules
from lenslrp.reductions import Reduce, reduction_for
from lenslrp.running import measuring
from lenslrp.targets import Top
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformer_lens.model_bridge import TransformerBridge

GIB = 2**30


@dataclass(frozen=True, repr=False)
class Survey(Shown):
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

    def face(self) -> Face:
        sizes = {"weights": self.weights, "peak besides": self.peak, "between passes": self.held}
        rules = self.coverage.face()
        facts = {
            "model": self.architecture,
            "under": self.composite,
            "weights in all": f"{self.parameters / 1e9:.2f}e9",
            **{f"{name}, GiB": size / GIB for name, size in sizes.items()},
            "operations": f"{self.flops / 1e12:.2f}e12",
        }
        return replace(rules, title=f"Survey: what a pass needs. {rules.title}", facts=facts)

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
        composite: `lenslrp.recommended` of the model if not given.
        architecture: name of the model's class; the configuration's own, or its causal language
            model, if not given.
        length: tokens of the input.
        batch: its rows.
        dtype: of the weights.
        names_filter: as for `lenslrp.run_with_relevance`, but no hook is read by default.
        reduce: likewise.
        attention: likewise.
        checkpoint: likewise.
        ledger: likewise.
        logits: likewise.
        inputs: what the model takes instead of tokens: name -> shape of floats.

    Returns:
        The rules that each operation would get, bytes and floating-point operations.

    Raises:
        InputError: no such class, a type of weights that rules cannot read, or a model that looks
            at values on its way.
        CoverageError: as when the model itself is explained.

    Examples:
        >>> lenslrp.survey(transformers.LlamaConfig(), length=512).parameters
        6738415616
    """
    if dtype not in FLOATING:
        raise InputError(f"dtype must be one of {', '.join(map(str, FLOATING))}, not {dtype}")
    require_logits(logits)
    cls = _class_of(config, architecture)
    with FakeTensorMode():
        built = _built(cls, config, dtype)
        weights = list(built.parameters())  # before a bridge splits some of them
        model = load(built, verify=False)
        table = as_composite(recommended(model) if composite is None else composite)
        prepared = _batch(model, batch, length, inputs or {}, dtype)
        columns = None
        if logits == "target" and head_component(model) is not None:
            columns = torch.full((batch, 1), length - 1)
        held = Held(model)
        with ExitStack() as stack:
            accounts = Accounts() if ledger else None
            rules = stack.enter_context(
                relevance_rules(model, table, attention=attention, strict=False, books=accounts)
            )
            names, _ = select_names(rules.points, names_filter)
            readers = Readers.plan(rules.points, names, partial(reduction_for, reduce))
            stack.enter_context(held)
            run = stack.enter_context(
                _by_shape(
                    model, rules, prepared, readers,
                    columns=columns, checkpoint=checkpoint, strict=False, ledger=ledger,
                )
            )  # fmt: skip
            between, outputs, roots = held.now, run.outputs(), run.roots(Top())
            rules.verify(*roots)
            graph = run.walk(roots)
            with measuring(roots if ledger else []):
                value = outputs.logits.flatten(1)[:, -1].sum()
                torch.autograd.grad(value, run.leaves.all(), allow_unused=True)
            readers.finish()
        sites = [site for site in rules.sites if id(site) in graph.sites]
        cover.require_fired(sites)
        off_path = readers.off_path()
        return Survey(
            cls.__name__,
            table.name,
            sum(p.numel() for p in weights),
            cover.Coverage(cover.site_rows(sites), off_path=off_path),
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


@contextmanager
def _by_shape(model: TransformerBridge, *arguments: Any, **options: Any) -> Iterator[Pass]:
    """The forward pass under rules, where it needs no values."""
    with ExitStack() as stack:
        try:
            run = stack.enter_context(under_rules(model, *arguments, **options))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"{type(model.original_model).__name__} decides by values ({error.func}), which "
                "fake tensors have not; a mixture of experts does not with "
                'config._experts_implementation = "batched_mm" (or "grouped_mm", in bfloat16)'
            ) from error
        yield run


def _batch(
    model: TransformerBridge, batch: int, length: int, shapes: Mapping[str, Any], dtype: torch.dtype
) -> Batch:
    size = 0 if shapes else length
    tokens = torch.zeros(batch, size, dtype=torch.long)
    text = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), [size] * batch)
    if shapes:
        floats = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        return replace(text, media=floats)
    if is_encoder_decoder(model):
        return replace(text, decoder=text, kwargs={"decoder_input_ids": tokens})
    return text
