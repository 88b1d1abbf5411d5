"""Adapters for vision transformers, and for pairs of a vision and a text tower, by their parts.

transformers gives the parts of these families few different names. :data:`PARTS` says which; what a
model has is looked up in the model itself, so that a family is one line of :data:`KINDS`. A tower
is a list of blocks of attention and MLP, each behind its norm. What lies outside the lists becomes
components too: the module that makes a sequence of an image, norms, linear layers, and the one that
gives the logits, ``unembed``. In a model of two towers their names begin with ``vision_`` and
``text_``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

PARTS: Mapping[str, tuple[str, ...]] = {
    "ln1": ("layernorm_before", "norm1", "layer_norm1"),
    "ln2": ("layernorm_after", "norm2", "layer_norm2"),
    "attn": ("attention", "self_attn"),
    "q": ("q_proj", "attention.query"),
    "k": ("k_proj", "attention.key"),
    "v": ("v_proj", "attention.value"),
    "o": ("o_proj", "out_proj", "output.dense"),
    "mlp": ("mlp",),
    "gate": ("gate_proj",),
    "in": ("fc1", "up_proj", "intermediate.dense"),
    "out": ("fc2", "down_proj", "output.dense"),
}
"""What the bridge calls a part of a block -> its paths in transformers, the first that is there."""

OUTSIDE: Mapping[str, str] = {
    "layernorm": "ln_final",
    "norm": "ln_final",
    "post_layernorm": "ln_final",
    "final_layer_norm": "ln_final",
    "pre_layrnorm": "embed_ln",
    "embeddings.token_embedding": "embed",
    "embeddings.position_embedding": "pos_embed",
    "embeddings": "embed",
    "classifier": "unembed",
}
"""Paths outside the blocks -> what the bridge calls them; others keep their own name."""

HEADS = ("MODEL_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
"""The tables of transformers that say which classes a kind of model has."""

KINDS = (
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "data2vec-vision",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "vit_msn",
)

PROJECTED = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
"""Classes of these kinds that no table of transformers has."""


def image_models(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters for the classes of these kinds, by class name."""
    from transformers.models.auto import modeling_auto as auto

    made = {}
    for kind in KINDS:
        for table in HEADS:
            name = getattr(auto, table).get(kind)
            if name is not None:
                made[name] = _adapter(name)
    return {**made, **{name: _adapter(name) for name in PROJECTED}}


def _adapter(name: str) -> Any:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    def init(self: Any, cfg: Any) -> None:
        ArchitectureAdapter.__init__(self, cfg)
        cfg.normalization_type, cfg.positional_embedding_type = "LN", "standard"
        cfg.final_rms = cfg.gated_mlp = cfg.attn_only = False
        self.weight_processing_conversions = {}
        self.component_mapping = {}

    def prepare_model(self: Any, hf_model: Any) -> None:
        reads_images = hf_model.main_input_name == "pixel_values"
        self.cfg.is_visual_model = reads_images
        self.cfg.is_multimodal = not reads_images and "image" in hf_model.input_modalities
        self.component_mapping = mapping(hf_model, self.cfg)

    return type(
        f"{name}Adapter",
        (ArchitectureAdapter,),
        {
            "__doc__": f"{name}, by the names of its parts.",
            "__init__": init,
            "prepare_model": prepare_model,
            "supports_generation": False,
            "supports_causal_loss": False,
        },
    )


def mapping(model: nn.Module, config: Any) -> dict[str, Any]:
    """The component mapping of a model; where it has one tower, ``config`` gets its sizes."""
    stacks = dict(_stacks(model))
    several = len(stacks) > 1
    made: dict[str, Any] = {}
    for path, blocks in stacks.items():
        sizes = copy.copy(config) if several else config
        _measure(sizes, blocks)
        made[f"{_prefix(path, several)}blocks"] = _block(path, blocks[0], sizes)
    within = tuple(f"{path}." for path in stacks)
    for path, module in model.named_modules():
        if path and not path.startswith(within):
            component = _outside(path, module, config)
            if component is not None:
                made[_name(path, several)] = component
    return made


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every list of blocks: what is in it has attention and two norms."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            if all(_path(module[0], part) for part in ("attn", "ln1", "ln2")):
                yield path, module


def _path(module: nn.Module, part: str) -> str | None:
    """Where a part is in a module."""
    inside = dict(module.named_modules())
    return next((path for path in PARTS[part] if path in inside), None)


def _measure(config: Any, blocks: nn.ModuleList) -> None:
    """Set the sizes of one tower."""
    attention: Any = blocks[0].get_submodule(str(_path(blocks[0], "attn")))
    d_model = attention.get_submodule(str(_path(attention, "q"))).in_features
    heads = next(
        getattr(part, name)
        for part in attention.modules()
        for name in ("num_heads", "num_attention_heads")
        if hasattr(part, name)
    )
    config.n_layers, config.n_heads = len(blocks), heads
    config.d_model, config.d_head = d_model, d_model // heads


def _block(path: str, block: nn.Module, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    attention, mlp = str(_path(block, "attn")), _path(block, "mlp")
    inner = block if mlp is None else block.get_submodule(mlp)
    layers = {key: _path(inner, key) for key in ("gate", "in", "out")}
    projections = {key: _path(block.get_submodule(attention), key) for key in "qkvo"}
    ends = {"hook_mlp_out": "mlp.out.hook_out", "hook_mlp_in": "mlp.in.hook_in"}
    return gc.BlockBridge(
        name=path,
        hook_alias_overrides={} if mlp else ends,
        submodules={
            "ln1": _norm(str(_path(block, "ln1")), config),
            "ln2": _norm(str(_path(block, "ln2")), config),
            "attn": gc.AttentionBridge(
                name=attention,
                config=config,
                submodules={k: gc.LinearBridge(name=p) for k, p in projections.items() if p},
                maintain_native_attention=True,
            ),
            "mlp": gc.MLPBridge(
                name=mlp,
                config=config,
                submodules={k: gc.LinearBridge(name=p) for k, p in layers.items() if p},
            ),
        },
    )


def _norm(path: str, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    return gc.NormalizationBridge(name=path, config=config, use_native_layernorm_autograd=True)


def _outside(path: str, module: nn.Module, config: Any) -> Any:
    """The component of a module that is in no block, ``None`` where it gets none."""
    from transformer_lens.model_bridge import generalized_components as gc
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    named = path.rpartition("embeddings.")[2]
    if isinstance(module, nn.Embedding):
        if named == "token_embedding":
            return gc.EmbeddingBridge(name=path)
        return None
    if path.endswith("embeddings") and any(isinstance(m, nn.Conv2d) for m in module.modules()):
        return GeneralizedComponent(name=path)
    if isinstance(module, nn.LayerNorm):
        return _norm(path, config)
    if isinstance(module, nn.Linear):
        kind = gc.UnembeddingBridge if path == "classifier" else gc.LinearBridge
        return kind(name=path)
    return None


def _prefix(path: str, several: bool) -> str:
    """What the names of a tower begin with."""
    return f"{path.split('_')[0]}_" if several else ""


def _name(path: str, several: bool) -> str:
    """What the bridge calls a module outside the blocks."""
    for known, name in OUTSIDE.items():
        if path == known or path.endswith(f".{known}"):
            return f"{_prefix(path, several)}{name}" if name != "unembed" else name
    return path.replace(".", "_")
