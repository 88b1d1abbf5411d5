"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors`` (versions 1 to 6).

Every key of ``cfg.json`` is obeyed, or is one that only training used, or is refused by name.
``metadata`` is free-form, and what it says of hook points is obeyed. A gated coder (Rajamanoharan
et al. 2024) is the JumpReLU coder that it equals: with pre-activations
``x (W_enc exp(r_mag)) + b_mag`` its gate opens above ``b_mag - b_gate exp(r_mag)``. Scales that
SAELens applies as it runs, of a decoder's rows or of all activations, are folded into the weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.files import whole

if TYPE_CHECKING:
    from lenslrp.analysis.units.coders import SparseCoder

logger = logging.getLogger("lenslrp")

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

VERSION = "6.0.0"
"""Of SAELens: the layout that is written."""

MAKER = {"made_by": "LensLRP"}
"""In the files that are written: others are not replaced."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
"""What is read, and its tensors beside W_enc, W_dec and b_dec."""

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Keys before version 6 -> today's."""

WITHOUT_EFFECT = frozenset(
    re.findall(
        r"\w+",
        """
        device model_name model_class_name hook_layer hook_layer_out hook_point_layer
        prepend_bos exclude_special_tokens seqpos_slice context_size dataset_path
        dataset_trust_remote_code is_dataset_tokenized streaming sae_lens_version
        sae_lens_training_version neuronpedia_id hf_hook_name hf_hook_name_out
        finetuning_scaling_factor expansion_factor use_cached_activations
        cached_activations_path from_pretrained_path n_batches_in_buffer total_training_tokens
        training_tokens finetuning_tokens finetuning_method store_batch_size
        store_batch_size_prompts train_batch_size train_batch_size_tokens
        eval_batch_size_prompts n_eval_batches n_eval_seqs seed verbose autocast autocast_lm
        compile_llm compile_sae llm_compilation_mode sae_compilation_mode act_store_device
        b_dec_init_method init_encoder_as_decoder_transpose decoder_orthogonal_init
        decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm
        normalize_sae_decoder scale_sparsity_penalty_by_decoder_norm noise_alpha
        mse_loss_normalization l1_coefficient l1_warm_up_steps l0_coefficient l0_warm_up_steps
        lp_norm lr lr_end lr_scheduler_name lr_warm_up_steps lr_decay_steps n_restart_cycles
        adam_beta1 adam_beta2 use_ghost_grads feature_sampling_window feature_sampling_method
        resample_batches feature_reinit_scale dead_feature_window dead_feature_threshold
        dead_feature_estimation_method log_to_wandb wandb_project wandb_id run_name wandb_entity
        wandb_log_frequency eval_every_n_wandb_logs log_optimizer_state_to_wandb
        log_activations_store_to_wandb n_checkpoints checkpoint_path resume
        jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode
        jumprelu_tanh_scale jumprelu_ste_to_input pre_act_loss_coefficient target_l0
        aux_loss_coefficient topk_threshold_lr use_sparse_activations matryoshka_widths
        use_matryoshka_aux_loss use_matryoshka_loss tokens_per_buffer
        """,
    )
)
"""Keys that say how it was trained, and for what."""

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}

Fields = dict[str, Any]
"""Arguments of a `SparseCoder`."""


@dataclass
class Config:
    """The keys of one ``cfg.json``, taken out one by one; what is left over is not understood."""

    path: Path
    left: dict[str, Any]

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, the default where it is missing or null."""
        value = self.left.pop(key, None)
        return default if value is None else value

    def refuse(self, key: str, value: Any, known: str) -> InputError:
        return InputError(f"{self.path}: {key} is {value!r}, which is not understood: {known}")


def read_saelens(
    folder: Path, tensors: Mapping[str, Tensor], norm_scaling_factor: float | None
) -> Fields:
    """The arguments of the `SparseCoder` that a folder holds, and whether it ``transcodes``.

    Args:
        folder: with ``cfg.json``.
        tensors: of its ``sae_weights.safetensors``.
        norm_scaling_factor: see `SparseCoder.load`.

    Raises:
        InputError: an architecture, key, value or tensor that is not understood.
    """
    config = _config(folder / CONFIG)
    architecture = _architecture(config)
    transcoder = "transcoder" in architecture
    dtype = str(config.take("dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.refuse("dtype", dtype, ", ".join(DTYPES))
    subtract = bool(config.take("apply_b_dec_to_input", not transcoder))
    if transcoder and subtract:
        raise config.refuse("apply_b_dec_to_input", True, "a transcoder's b_dec is of its output")
    normalization = _normalization(config, transcoder, norm_scaling_factor)
    k, rescale = config.take("k"), bool(config.take("rescale_acts_by_decoder_norm", False))
    fields: Fields = {**_hooks(config), "subtract_b_dec": subtract, "transcodes": transcoder}
    sizes = {key: config.take(key) for key in ("d_in", "d_sae", "d_out")}
    if config.left:
        raise InputError(
            f"{config.path} has {', '.join(sorted(config.left))}, which "
            f"{'is' if len(config.left) == 1 else 'are'} not understood"
        )
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    fields |= _tensors(folder / WEIGHTS, architecture, weights)
    shapes = (*fields["W_enc"].shape, fields["W_dec"].shape[-1])
    for (key, size), actual in zip(sizes.items(), shapes, strict=True):
        if size is not None and size != actual:
            raise InputError(f"{config.path}: {key} is {size}, the weights have {actual}")
    if normalization == "expected_average_only_in":
        assert norm_scaling_factor is not None
        fields["W_enc"] = fields["W_enc"] * norm_scaling_factor
        fields["W_dec"] = fields["W_dec"] / norm_scaling_factor
        fields["b_dec"] = fields["b_dec"] / norm_scaling_factor
        if architecture.endswith("batchtopk") and rescale:  # threshold on rescaled activations
            fields["threshold"] = fields["threshold"] / norm_scaling_factor
    else:
        fields["normalization"] = normalization
    if rescale:
        norms = fields["W_dec"].norm(dim=-1)
        fields["W_enc"], fields["b_enc"] = fields["W_enc"] * norms, fields["b_enc"] * norms
        fields["W_dec"] = fields["W_dec"] / norms[:, None]
    if architecture == "topk":
        fields["k"] = k
    return fields


def json_of(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        InputError: something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not an object of JSON")
    return found


def _config(path: Path) -> Config:
    """Today's keys of a ``cfg.json``: those before version 6 are renamed, defaults filled in."""
    cfg = json_of(path)
    metadata = cfg.pop("metadata", None) or {}
    version = metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or "0"
    if int(re.sub(r"\D.*", "", str(version)) or 0) < 6:
        cfg = {RENAMED.get(key, key): value for key, value in cfg.items()}
        if "hook_z" in (cfg.get("hook_name") or ""):
            cfg.setdefault("reshape_activations", "hook_z")
    told = ("hook_name", "hook_head_index", "hook_name_out", "hook_head_index_out",
            "model_from_pretrained_kwargs")  # fmt: skip
    cfg |= {key: metadata[key] for key in told if metadata.get(key) is not None}
    return Config(path, {key: v for key, v in cfg.items() if key not in WITHOUT_EFFECT})


def _architecture(config: Config) -> str:
    architecture = config.take("architecture", "standard")
    function, options = (
        config.take("activation_fn", "relu"),
        config.take("activation_fn_kwargs", {}),
    )
    if function == "topk" and architecture in ("standard", "topk"):
        architecture, options = "topk", dict(options)
        config.left["k"] = options.pop("k", config.left.get("k"))
    elif function != "relu":
        raise config.refuse("activation_fn", function, "relu, or topk of a standard coder")
    if any(options.values()):
        raise config.refuse("activation_fn_kwargs", options, "k of topk")
    if architecture not in ARCHITECTURES:
        raise config.refuse("architecture", architecture, ", ".join(ARCHITECTURES))
    k = config.left.get("k")
    if architecture == "topk" and not isinstance(k, int):
        raise config.refuse("k", k, "how many features of a position are kept")
    if "topk" not in architecture:
        for key in ("k", "rescale_acts_by_decoder_norm"):
            if config.left.get(key):
                raise config.refuse(key, config.left[key], f"a {architecture} coder has none")
    return str(architecture)


def _normalization(config: Config, transcoder: bool, norm_scaling_factor: float | None) -> str:
    kind = config.take("normalize_activations", "none")
    if isinstance(kind, bool):  # before version 2
        kind = "expected_average_only_in" if kind else "none"
    known = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in")
    if kind not in known:
        raise config.refuse("normalize_activations", kind, ", ".join(known))
    expects = kind == "expected_average_only_in"
    if expects and transcoder:
        raise config.refuse("normalize_activations", kind, "a transcoder's two averages differ")
    if expects and norm_scaling_factor is None:
        raise InputError(
            f"{config.path}: normalize_activations is {kind!r}, and no file says the average: give "
            "norm_scaling_factor= (sqrt(d_in) over the mean length of what it reads; 1 where the "
            "weights have it already)"
        )
    if norm_scaling_factor is not None and not expects:
        raise InputError(
            f"{config.path}: norm_scaling_factor is for 'expected_average_only_in'; "
            f"normalize_activations is {kind!r}"
        )
    return str(kind)


def _hooks(config: Config) -> Fields:
    hook, head = config.take("hook_name"), config.take("hook_head_index")
    out, head_out = config.take("hook_name_out"), config.take("hook_head_index_out")
    if head_out is not None:
        raise config.refuse("hook_head_index_out", head_out, "transcoders write whole positions")
    reshape = config.take("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise config.refuse("reshape_activations", reshape, "none, hook_z")
    loaded = config.take("model_from_pretrained_kwargs", {})
    if any(loaded.values()):
        logger.warning(
            "%s was trained on a model loaded with %s: what a TransformerBridge has at its hook "
            "point differs unless it is processed alike (enable_compatibility_mode)",
            config.path.parent, loaded,
        )  # fmt: skip
    heads = "all" if reshape == "hook_z" and head is None else head
    return {"hook": hook, "hook_out": out, "heads": heads}


def _tensors(path: Path, architecture: str, given: Mapping[str, Tensor]) -> Fields:
    tensors = dict(given)
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise InputError(f"{path} has scaling_factor, a finetuned one, which is not understood")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    expected = ("W_enc", "W_dec", "b_dec", *ARCHITECTURES[architecture])
    if set(tensors) != set(expected):
        raise InputError(
            f"{path} holds {', '.join(sorted(given))}; a {architecture} coder has "
            f"{', '.join(expected)}"
        )
    if architecture == "gated":
        gain = tensors.pop("r_mag").exp()
        tensors["W_enc"] = tensors["W_enc"] * gain
        tensors["b_enc"] = tensors.pop("b_mag")
        tensors["threshold"] = tensors["b_enc"] - tensors.pop("b_gate") * gain
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").expand_as(tensors["b_enc"])
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_saelens(coder: SparseCoder, folder: Path) -> Path:
    """See `SparseCoder.save`."""
    transcodes = coder.hook_out is not None
    if coder.later:
        raise InputError(f"SAELens has no layout for {coder.name}, which writes several layers")
    if (coder.k is not None and (transcodes or coder.threshold is not None)) or (
        transcodes and coder.subtract_b_dec
    ):
        raise InputError(
            f"SAELens has no layout for {coder.name}: k beside a threshold or of a transcoder, or "
            "subtract_b_dec of a transcoder"
        )
    if not transcodes:
        architecture = "standard" if coder.threshold is None else "jumprelu"
        architecture = architecture if coder.k is None else "topk"
    else:
        parts = (coder.threshold is not None and "jumprelu", coder.W_skip is not None and "skip")
        architecture = "_".join([part for part in parts if part] + ["transcoder"])
    names = ("W_enc", "W_dec", "b_dec", *ARCHITECTURES[architecture])
    tensors = {name: getattr(coder, name).detach().cpu() for name in names}
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    config = {
        "architecture": architecture,
        "d_in": coder.W_enc.shape[0],
        "d_sae": coder.W_enc.shape[1],
        "dtype": str(coder.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.subtract_b_dec,
        "normalize_activations": coder.normalization,
        "reshape_activations": "hook_z" if coder.heads == "all" else "none",
        "metadata": {
            **MAKER,
            "sae_lens_version": VERSION,
            "hook_name": coder.hook,
            "hook_name_out": coder.hook_out,
            "hook_head_index": None if coder.heads == "all" else coder.heads,
        },
    }
    config |= {} if coder.k is None else {"k": coder.k}
    config |= {} if coder.hook_out is None else {"d_out": coder.W_dec.shape[1]}
    folder.mkdir(parents=True, exist_ok=True)
    mark = MAKER["made_by"].encode()
    with whole(folder / WEIGHTS, ours=mark) as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=MAKER)
    with whole(folder / CONFIG, ours=mark) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
