"""Files of sparse coders: which layout is at a path, and the tensors of each, as published.

| at the path | layout |
|---|---|
| ``cfg.json`` and ``sae_weights.safetensors`` | SAELens |
| ``cfg.json`` and ``sae.safetensors`` | sparsify |
| ``params.npz`` | Gemma Scope |
| ``params.safetensors`` and ``config.json`` | Gemma Scope 2 |
| ``layer_L.safetensors`` beside ``config.yaml`` | circuit-tracer, see `coder_sets` |
| any other safetensors file with ``W_enc, b_enc, W_dec, b_dec`` | bare: the caller says the rest |

Nothing is unpickled, so checkpoints of torch are refused, by name. Tensors and keys that a layout
does not have are refused too.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lenslrp.analysis.units.saelens import CONFIG, WEIGHTS, Fields, json_of, read_saelens
from lenslrp.errors import InputError, first_line

REQUIRED = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
"""Tensors that every coder has, and their axes."""

FILES = (WEIGHTS, "sae.safetensors", "params.npz", "params.safetensors")
"""That a folder of one coder holds one of."""

REFUSED = {
    "W_enc_0.safetensors": "a cross-layer transcoder: CrossLayerCoder.load reads it",
    "layer_0.safetensors": "a set of transcoders: SparseCoder.load_set reads it, or give one file",
    "hyperparams.json": "Llama Scope's layout, which is not read",
    "latest_ckpt.safetensors": "a temporal coder, which reads other positions too and is not read",
    "ae.pt": "dictionary_learning's layout, a pickle; nothing is unpickled here",
}
"""By a file of a folder: layouts that another function reads, or none."""

HOOKS_OF_GEMMA_SCOPE: Mapping[str, Fields] = {
    "res": {"hook": "blocks.{}.hook_resid_post"},
    "mlp": {"hook": "blocks.{}.hook_mlp_out"},
    "att": {"hook": "blocks.{}.attn.hook_z", "heads": "all"},
    "transcoders": {"hook": "blocks.{}.ln2.hook_normalized", "hook_out": "blocks.{}.hook_mlp_out"},
}
"""By the end of the repository's name; the layer is that of the folder."""

HOOKS_OF_TRANSFORMERS: Mapping[str, str] = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Where Gemma Scope 2 says it reads and writes, inside ``model.layers.L`` -> TransformerLens."""

KEYS_OF_GEMMA_SCOPE_2 = {"architecture", "hf_hook_point_in", "hf_hook_point_out", "model_name",
                         "width", "l0", "type", "affine_connection"}  # fmt: skip

KEYS_OF_SPARSIFY = {"d_in", "num_latents", "expansion_factor", "normalize_decoder", "multi_topk",
                    "k", "activation", "transcode", "skip_connection", "signed"}  # fmt: skip

HOOKS_OF_SPARSIFY: Mapping[tuple[str, bool], Fields] = {
    ("", False): {"hook": "blocks.{}.hook_resid_post"},
    ("mlp", False): {"hook": "blocks.{}.mlp.hook_out"},
    ("mlp", True): {"hook": "blocks.{}.mlp.hook_in", "hook_out": "blocks.{}.mlp.hook_out"},
}
"""By the module inside ``layers.L``, the folder's name, and whether it is a transcoder."""

KEYS_OF_CIRCUIT_TRACER = {"model_name", "model_kind", "feature_input_hook", "feature_output_hook",
                          "transcoders", "scan", "repo_id", "revision", "subfolder"}  # fmt: skip

_HUB = re.compile(
    r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@?]+?))?/?"
    r"(?:(?:@|\?revision=)(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Given:
    """What the caller says of a coder; see `SparseCoder.load`."""

    hook: str | None = None
    hook_out: str | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    norm_scaling_factor: float | None = None


def read_coder(path: str | Path, given: Given) -> Fields:
    """The arguments of the `SparseCoder` at a path; see `SparseCoder.load`."""
    path = local(path)
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        known = [name for name in FILES if name in names]
        if not known:
            reasons = [reason for name, reason in REFUSED.items() if name in names]
            held = ", ".join(sorted(names)[:8]) or "nothing"
            what = f"is {reasons[0]}" if reasons else f"holds no coder: it has {held}"
            raise InputError(f"{path} {what}")
        path = path / known[0]
    bare = False
    if path.suffix == ".npz":
        fields = gemma_scope(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        raise InputError(f"{path} is a pickle; nothing is unpickled here: save it as safetensors")
    else:
        tensors = tensors_of(path)
        if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
            fields = read_saelens(path.parent, tensors, given.norm_scaling_factor)
        elif path.name == "sae.safetensors" and (path.parent / CONFIG).is_file():
            fields = _sparsify(path, tensors)
        elif "w_enc" in tensors:
            fields = _gemma_scope_2(path, tensors)
        elif (path.parent / "config.yaml").is_file():
            fields = transcoder(path) | _layer_hooks(path)
        else:
            bare = True
            fields = {"k": given.k, "subtract_b_dec": given.subtract_b_dec}
            fields |= checked(path, tensors, "threshold", "W_skip")
    if not bare and (given.k is not None or given.subtract_b_dec):
        raise InputError(f"{path}: k and subtract_b_dec are for bare files; this layout says them")
    if given.norm_scaling_factor is not None and path.name != WEIGHTS:
        raise InputError(f"{path}: norm_scaling_factor is for SAELens' expected_average_only_in")
    fields |= {key: getattr(given, key) for key in ("hook", "hook_out") if getattr(given, key)}
    if not fields.get("hook"):
        raise InputError(f"{path} does not say which hook point it reads: give hook=")
    if fields.pop("transcodes", False) and not fields.get("hook_out"):
        raise InputError(
            f"{path} is a transcoder's and does not say which hook point it writes: give hook_out="
        )
    return fields


def local(path: str | Path) -> Path:
    """Where a file or folder is on this machine: as it is, or of the hub's cache.

    Args:
        path: a path, or of the hub ``owner/repo/folder``, ``owner/repo/folder@revision`` or
            ``hf://owner/repo/file?revision=``. Without a network, what the cache has is taken.

    Raises:
        InputError: it is in neither place.
    """
    if Path(path).exists():
        return Path(path)
    match = _HUB.fullmatch(path) if isinstance(path, str) else None
    if match is None:
        raise InputError(f"no file {path}")
    inside = match["inside"]
    if inside is None:
        patterns = ["*.safetensors", "*.npz", CONFIG, "config.*"]
    else:
        patterns = [inside, f"{inside}/*", str(Path(inside).parent / "config.*")]
    try:
        root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no file {path}, and the Hugging Face hub did not give it. {first_line(error)}"
        ) from error
    found = Path(root) / (inside or "")
    if not found.exists():
        raise InputError(f"{match['repo']} has no {inside}, or its cache has not")
    return found


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: no such file, or another kind.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error


def checked(path: Path, tensors: Mapping[str, Tensor], *optional: str) -> Fields:
    """The tensors of a coder, named as SAELens names them: ``W_skip`` is [d_out, d_in] in files.

    Raises:
        InputError: some are missing, not understood, or no matrix or vector where they should be.
    """
    missing = [name for name in REQUIRED if name not in tensors]
    if missing:
        raise InputError(
            f"{path} has no {', '.join(missing)}; it holds {', '.join(sorted(tensors))}"
        )
    if any(tensors[name].ndim != axes for name, axes in REQUIRED.items()):
        raise InputError(f"{path}: W_enc and W_dec are matrices, b_enc and b_dec vectors")
    unknown = sorted(set(tensors) - {*REQUIRED, *optional})
    if unknown:
        raise InputError(f"{path} holds {', '.join(unknown)}, not understood")
    found = dict(tensors)
    if "W_skip" in found:
        found["W_skip"] = found["W_skip"].T.contiguous()
    return found


def yaml_of(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is no mapping of YAML")
    return config


def gemma_scope(path: Path) -> Fields:
    """An ``.npz``; hook points are those of the path, as the hub has it (`...-pt-res/layer_12`).

    Raises:
        InputError: tensors that are missing or not understood, or a coder of token embeddings.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an .npz of numbers: {first_line(error)}") from error
    fields = checked(path, tensors, "threshold")
    where = path.as_posix()
    kind = re.search(r"gemma-scope-[\w.-]+-(res|mlp|att|transcoders)/", where)
    layer = re.search(r"/layer_(\d+)/", where)
    if "/embedding/" in where:
        raise InputError(f"{path}: Gemma Scope's coders of the token embeddings are not read")
    if kind is None or layer is None:
        return fields
    hooks = HOOKS_OF_GEMMA_SCOPE[kind[1]]
    return fields | {key: text.format(layer[1]) for key, text in hooks.items()}


def _sparsify(path: Path, tensors: Mapping[str, Tensor]) -> Fields:
    """EleutherAI's folders, named for the module whose output, or whose two ends, they read."""
    config_path = path.parent / CONFIG
    config = json_of(config_path)
    unknown = sorted(set(config) - KEYS_OF_SPARSIFY)
    if unknown:
        raise InputError(f"{config_path} has {', '.join(unknown)}, not understood")
    if config.get("signed") or config.get("activation", "topk") != "topk" or "k" not in config:
        raise InputError(
            f"{config_path}: signed or groupmax activations are not understood, topk is"
        )
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    fields = checked(path, {names.get(n, n): tensor for n, tensor in tensors.items()}, "W_skip")
    fields["W_enc"] = fields["W_enc"].T.contiguous()
    transcodes = bool(config.get("transcode"))
    fields |= {"k": config["k"], "subtract_b_dec": not transcodes, "transcodes": transcodes}
    module = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.?(.*)", path.parent.name)
    hooks = {} if module is None else HOOKS_OF_SPARSIFY.get((module[2], transcodes), {})
    return fields | {key: text.format(module and module[1]) for key, text in hooks.items()}


def transcoder(path: Path) -> Fields:
    """The tensors of one of circuit-tracer's files, or of Gemma Scope's that it lists.

    circuit-tracer's ``W_enc`` is [features, d_in].

    Raises:
        InputError: tensors that are missing or not understood, or a threshold below 0.
    """
    if path.suffix == ".npz":
        return gemma_scope(path)
    tensors = tensors_of(path)
    if "w_enc" in tensors:
        return gemma_scope_2_tensors(path, tensors)
    named = {name.removeprefix("activation_function."): t for name, t in tensors.items()}
    fields = checked(path, named, "threshold", "W_skip")
    fields["W_enc"] = fields["W_enc"].T.contiguous()
    require_positive(path, fields.get("threshold"))
    return fields


def require_positive(path: Path, threshold: Tensor | None) -> None:
    """circuit-tracer's JumpReLU has no ReLU inside: below 0 it is another function.

    Raises:
        InputError: a threshold below 0.
    """
    if threshold is not None and bool((threshold < 0).any()):
        raise InputError(f"{path}: a threshold is below 0, where features would be negative")


def _layer_hooks(path: Path) -> Fields:
    layer = re.fullmatch(r"layer_(\d+)", path.stem)
    if layer is None:
        raise InputError(f"{path}: circuit-tracer's files are layer_L.safetensors")
    return hooks_of(path.parent / "config.yaml", int(layer[1]))


def hooks_of(path: Path, layer: int) -> Fields:
    """Where circuit-tracer's ``config.yaml`` says that the features of a layer read and write.

    Raises:
        InputError: it does not say, or has a key that is not understood.
    """
    config = yaml_of(path)
    unknown = sorted(set(config) - KEYS_OF_CIRCUIT_TRACER)
    if unknown:
        raise InputError(f"{path} has {', '.join(unknown)}, not understood")
    inside = [config.get(key) for key in ("feature_input_hook", "feature_output_hook")]
    if not all(isinstance(name, str) for name in inside):
        raise InputError(f"{path} does not say feature_input_hook and feature_output_hook")
    return {"hook": f"blocks.{layer}.{inside[0]}", "hook_out": f"blocks.{layer}.{inside[1]}"}


def gemma_scope_2_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Fields:
    """The tensors of Gemma Scope 2: ``affine_skip_connection`` is [d_in, d_out] here.

    Raises:
        InputError: tensors that are missing or not understood.
    """
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    named = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if "W_skip" in named:
        named["W_skip"] = named["W_skip"].T
    return checked(path, named, "threshold", "W_skip")


def _gemma_scope_2(path: Path, tensors: Mapping[str, Tensor]) -> Fields:
    """Hook points are those of the ``config.json`` beside the file, where there is one."""
    fields = gemma_scope_2_tensors(path, tensors)
    config_path = path.parent / "config.json"
    if not config_path.is_file():
        return fields
    config = json_of(config_path)
    unknown = sorted(set(config) - KEYS_OF_GEMMA_SCOPE_2)
    if unknown:
        raise InputError(f"{config_path} has {', '.join(unknown)}, not understood")
    architecture = config.get("architecture")
    if architecture != "jump_relu":
        raise InputError(f"{config_path}: architecture is {architecture!r}, expected 'jump_relu'")
    if bool(config.get("affine_connection")) != ("W_skip" in fields):
        raise InputError(f"{config_path}: affine_connection does not agree with the tensors")
    hook, out = (_hook_of(config_path, config.get(f"hf_hook_point_{end}")) for end in ("in", "out"))
    fields |= {"hook": hook, "hook_out": None if out == hook else out}
    return fields | ({"heads": "all"} if hook is not None and hook.endswith("hook_z") else {})


def _hook_of(path: Path, name: str | None) -> str | None:
    if name is None:
        return None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in HOOKS_OF_TRANSFORMERS:
        known = ", ".join(HOOKS_OF_TRANSFORMERS)
        raise InputError(f"{path}: {name!r} is not understood; inside model.layers.L: {known}")
    return f"blocks.{match[1]}.{HOOKS_OF_TRANSFORMERS[match[2]]}"
