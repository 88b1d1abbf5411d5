"""What a directory or a hub id holds, as the Hugging Face model that was saved there.

The class is the one that the checkpoint names, never a family's default with a fresh head. All of
its weights come from the checkpoint, or the load fails naming those that do not. Weights are read
from safetensors only: a pickle can run code.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from lenslrp.errors import FAILURES, LoadError, first_line
from lenslrp.models.embedded import EMBEDDED
from lenslrp.models.heads import offered
from lenslrp.models.quantised import require_package
from lenslrp.models.sentence_files import is_sentence_model

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("lenslrp")

UNREADABLE = (*FAILURES, OSError, SafetensorError, StrictDataclassError)
"""What transformers raises for a checkpoint that is not one."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "source.spm", "tekken.json",
)  # fmt: skip

_LEFT_OVER = re.compile(
    r"(^|\.)pooler\.|^cls\.seq_relationship\.|(position_ids|inv_freq|masked_bias)$"
)
"""Weights that checkpoints carry beside those of the class that they name: the heads of BERT's
pretraining, and tables that older versions stored."""

_REMOTE = (
    "Its code comes with the checkpoint and is not run here: load it with transformers and "
    "trust_remote_code=True if you trust it, and give lenslrp.load the model"
)

_FORMER = {"T5WithLMHeadModel": "T5ForConditionalGeneration"}
"""Names that classes had when checkpoints were published."""

_TRAINING_ONLY = re.compile(r"(^|\.)masked_spec_embed$")
"""A weight that only training reads."""


def nearest_architectures(name: str, known: Iterable[str]) -> str:
    """The supported classes that a class without an adapter is likest."""
    names = list(known)
    family = sorted(each for each in names if each.startswith(name[:4]))
    family = family or difflib.get_close_matches(name, names, n=3)
    return ", ".join(family) or "none"


def supported_architectures() -> dict[str, Any]:
    """Every class name that TransformerLens has an adapter for, those of other packages too."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    ArchitectureAdapterFactory.discover_entry_points()
    for name, adapter in offered().items():  # where LensLRP is not installed, or an older one is
        ArchitectureAdapterFactory._adapters.setdefault(name, adapter)
    return dict(ArchitectureAdapterFactory._adapters)


def require_architecture(cls: type) -> str:
    """The bridge's name for a model's class.

    Not taken from the configuration: one made by hand names no architecture, and the family's
    default would stand in for it (a masked language model for a classifier).

    Raises:
        LoadError: there is no adapter for it.
    """
    supported = supported_architectures()
    for each in cls.__mro__:
        name = _spelt(each.__name__, supported)
        if name is not None:
            return name
    raise LoadError(
        f"TransformerLens has no adapter for {cls.__name__}; nearest: "
        f"{nearest_architectures(cls.__name__, supported)}"
    )


def _spelt(name: str, known: Collection[str]) -> str | None:
    """A class's name as it is spelt there: ``MPTForCausalLM`` became ``MptForCausalLM``."""
    if name in known:
        return name
    return next((each for each in known if each.lower() == name.lower()), None)


def require_device(device: str | torch.device) -> torch.device:
    """
    Raises:
        LoadError: there is no such device here.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        devices = ["cpu", *(f"cuda:{index}" for index in range(count))]
        raise LoadError(
            f"no device {str(device)!r} here; torch sees {', '.join(devices)}. {first_line(error)}"
        ) from error
    return place


def read_checkpoint(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    revision: str | None,
    n_devices: int | None,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of the checkpoint's own class, and its tokenizer if it has one.

    Raises:
        LoadError: anything else; the message says what is wrong and what to do.
    """
    if Path(name).is_file():
        raise LoadError(f"{name!r} is a file: give the directory that save_pretrained made")
    config = _configuration(name, revision)
    cls = _own_class(name, config)
    if is_sentence_model(name, revision):
        cls = _without_head(cls, config)
    architecture = require_architecture(cls)
    _prepare_loading(architecture, config, name, dtype)
    require_package(quantization_config, config, name)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "revision": revision or "main",
        "attn_implementation": "eager",
        "use_safetensors": True,
        "output_loading_info": True,
        **_placement(n_devices),
    }
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
        if device is not None and device.type != "cpu":  # it is packed where it will be
            options["device_map"] = {"": device}
    model = _with_all_weights(name, cls, options)
    if n_devices is None and device is not None:
        model = to_device(model, device)
    return model, read_tokenizer(name, revision)


def to_device(model: Any, device: torch.device) -> Any:
    """
    Raises:
        LoadError: it does not fit.
    """
    try:
        return model if model.device == device else model.to(device)
    except (torch.OutOfMemoryError, ValueError) as error:
        raise LoadError(
            f"this {type(model).__name__} cannot go to {device}: give a smaller dtype, another "
            f"device, or n_devices. {first_line(error)}"
        ) from error


def _configuration(name: str, revision: str | None) -> Any:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise LoadError(f"{name!r} has no config.json (it holds {files}): not a checkpoint")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise LoadError(f"{name!r} has a configuration of its own. {_REMOTE}") from error
        if folder.is_dir() or not isinstance(error, OSError):
            raise LoadError(
                f"config.json of {name!r} cannot be read as a configuration: {first_line(error)}"
            ) from error
        raise LoadError(
            f"{name!r} is not an embedded model ({', '.join(EMBEDDED)}), not a directory, and "
            f"the Hugging Face hub did not give it{_nearest_official(name)}. {first_line(error)}"
        ) from error


def _nearest_official(name: str) -> str:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    near = difflib.get_close_matches(name, [*EMBEDDED, *OFFICIAL_MODEL_NAMES], n=1)
    return f" (nearest known name: {near[0]!r})" if near and near[0] != name else ""


def _own_class(name: str, config: Any) -> type[PreTrainedModel]:
    named = list(getattr(config, "architectures", None) or [])
    if not named:
        raise LoadError(
            f'the configuration of {name!r} names no class under "architectures": load it with '
            "its own class from transformers, and give lenslrp.load the model"
        )
    spelt = _spelt(_FORMER.get(str(named[0]), str(named[0])), dir(transformers))
    cls = getattr(transformers, spelt or "", None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise LoadError(
            f"{name!r} is a {named[0]}, which transformers {transformers.__version__} does not "
            f"have. {_REMOTE}"
        )
    return cls


def _without_head(cls: type[PreTrainedModel], config: Any) -> type[PreTrainedModel]:
    """The bare model of a class that a checkpoint of sentence-transformers names."""
    bare: Any = transformers.MODEL_MAPPING.get(type(config), cls)
    found: type[PreTrainedModel] = bare[0] if isinstance(bare, tuple | list) else bare
    return found


def _prepare_loading(architecture: str, config: Any, name: str, dtype: torch.dtype) -> None:
    """What TransformerLens' adapter does before weights are read (it mends classes)."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    try:
        settings = build_bridge_config_from_hf(config, architecture, name, dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(settings)
        adapter.prepare_loading(name, {"config": config})
    except FAILURES as error:
        raise LoadError(
            f"TransformerLens cannot bridge this {architecture}: {first_line(error)}"
        ) from error


def _placement(n_devices: int | None) -> dict[str, Any]:
    from transformer_lens.utilities.multi_gpu import resolve_device_map

    if n_devices is None:
        return {}
    try:
        device_map, max_memory = resolve_device_map(n_devices, None, None, None)
    except FAILURES as error:
        raise LoadError(f"n_devices={n_devices}: {first_line(error)}") from error
    placement = {"device_map": device_map, "max_memory": max_memory}
    return {key: value for key, value in placement.items() if value is not None}


def over_devices(model: PreTrainedModel, n_devices: int) -> None:
    """Spread a model in memory, as transformers spreads one that it reads.

    Raises:
        LoadError: there are fewer devices.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    placement = _placement(n_devices)
    if not placement:
        return
    whole = list(model._no_split_modules or ())
    room = get_balanced_memory(model, placement["max_memory"], whole)
    dispatch_model(model, infer_auto_device_map(model, room, whole))


def _with_all_weights(name: str, cls: type[Any], options: dict[str, Any]) -> PreTrainedModel:
    model, missing, unexpected = _read(name, cls, options)
    takes = inspect.signature(cls.__init__).parameters
    if missing and all("pooler." in key for key in missing) and "add_pooling_layer" in takes:
        # saved without the pooler that the class has by default
        model, missing, unexpected = _read(name, cls, {**options, "add_pooling_layer": False})
    require_same(name, f"a {cls.__name__}", missing, unexpected)
    return model


def require_same(name: str, kind: str, expected: set[str], present: set[str]) -> None:
    """
    Raises:
        LoadError: naming what is wanted and not there, and what is there and not wanted.
    """
    faults = [
        f"{_some(keys)} {what}"
        for keys, what in (
            (expected - present, "missing from the files"),
            (present - expected, "in the files and not in the model"),
        )
        if keys
    ]
    if faults:
        raise LoadError(
            f"the weights of {name!r} are not those of {kind} with its configuration: "
            f"{'; '.join(faults)}. Nothing is loaded with random weights; if you mean to leave "
            "some out, load it with transformers and give lenslrp.load the model"
        )


def _read(
    name: str, cls: type[Any], options: dict[str, Any]
) -> tuple[PreTrainedModel, set[str], set[str]]:
    try:
        model, info = cls.from_pretrained(name, **options)
    except UNREADABLE as error:
        raise LoadError(f"{name!r}: {_why_no_weights(name, cls, error)}") from error
    unexpected = set(info["unexpected_keys"])
    if left := sorted(key for key in unexpected if _LEFT_OVER.search(key)):
        logger.info("%s: weights that %s does not have: %s", name, cls.__name__, left)
    missing = {key for key in info["missing_keys"] if not _TRAINING_ONLY.search(key)}
    return model, missing, unexpected - set(left)


def _why_no_weights(name: str, cls: type[Any], error: BaseException) -> str:
    folder = Path(name)
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [file for file in files if file.endswith(PICKLES)]
    if isinstance(error, OSError) and pickles and not any(f.endswith("safetensors") for f in files):
        return (
            f"its weights are in {', '.join(pickles)}, a pickle or another format that is never "
            "read here, because it can run code. Where you trust it, convert it once: "
            f"transformers.{cls.__name__}.from_pretrained(...).save_pretrained(...) writes "
            "safetensors"
        )
    if isinstance(error, SafetensorError):
        return f"a safetensors file of it is damaged ({first_line(error)}): copy it again"
    if "ignore_mismatched_sizes" in str(error):
        return (
            f"its weights have other shapes than a {cls.__name__} with its configuration "
            "(transformers lists them above): config.json and the weights do not belong together"
        )
    return f"transformers cannot read its weights as a {cls.__name__}: {first_line(error)}"


def _some(keys: set[str], limit: int = 4) -> str:
    shown = sorted(keys)[:limit]
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{', '.join(shown)}{more}"


def read_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own; None where a directory has none."""
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            return None
        try:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if (folder / file).is_file():
                    json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{name}/{file} is not JSON: {first_line(error)}") from error
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except UNREADABLE as error:
        if not folder.is_dir() and isinstance(error, OSError | ValueError):
            logger.warning("%s has no tokenizer (%s): give token tensors", name, first_line(error))
            return None
        raise LoadError(f"the tokenizer of {name!r} cannot be read: {first_line(error)}") from error
    return tokenizer
