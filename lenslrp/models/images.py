"""Adapters for vision transformers, and for pairs of a vision and a text tower, by their parts.

transformers gives the parts of these families few different names. :data:`PARTS` says which, and
what a model has is looked up in the model, so that a family is one line of :data:`KINDS`. A stack
is a list of blocks, of attention and MLP, each behind its norm. What lies outside the stacks has
components too: the module that makes a sequence of an image, norms, linear layers, attention
pooling, and what gives the logits, ``unembed``. Where there are two towers, names begin with
``vision_`` and ``text_``; where there are several stages (Swin), with ``stage0_``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lenslrp.media import is_pair
from lenslrp.models.outputs import give_logits
from lenslrp.models.pooling import open_pooling

KINDS = (
    "beit",
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "data2vec-vision",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "metaclip_2",
    "siglip",
    "siglip_text_model",
    "siglip_vision_model",
    "swin",
    "vit_msn",
)
"""Families, as transformers calls their kind of model."""

HEADS = ("MODEL_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
"""The tables of transformers that say which classes a kind of model has."""

UNLISTED = (
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "MetaClip2TextModel",
    "MetaClip2TextModelWithProjection",
    "MetaClip2VisionModel",
    "MetaClip2VisionModelWithProjection",
    "SiglipTextModel",
)
"""Classes of these families that the tables may leave out."""

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
    "embeddings": "embed",
    "embeddings.token_embedding": "embed",
    "embeddings.position_embedding": "pos_embed",
    "pre_layrnorm": "embed_ln",
    "layernorm": "ln_final",
    "norm": "ln_final",
    "post_layernorm": "ln_final",
    "final_layer_norm": "ln_final",
    "pooler.layernorm": "pooler",
    "head": "pooler",
    "classifier": "unembed",
}
"""Paths in a tower outside its stacks -> what the bridge calls them; others keep their own name."""


HEAD_COUNTS = ("num_heads", "num_attention_heads")
"""What transformers calls the number of heads in an attention."""


def image_models(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters for the classes of these families, by class name."""
    from transformers.models.auto import modeling_auto as auto

    listed = [getattr(auto, table).get(kind) for kind in KINDS for table in HEADS]
    names = dict.fromkeys(name for name in (*listed, *UNLISTED) if name is not None)
    return {name: _adapter(name) for name in names}


def _adapter(name: str) -> Any:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    def init(self: Any, cfg: Any) -> None:
        ArchitectureAdapter.__init__(self, cfg)
        cfg.normalization_type, cfg.positional_embedding_type = "LN", "standard"
        cfg.final_rms = cfg.gated_mlp = cfg.attn_only = False
        self.weight_processing_conversions = {}
        self.component_mapping = {}

    def prepare_model(self: Any, hf_model: Any) -> None:
        reads_images = hf_model.main_input_name == "pixel_values"
        self.cfg.is_visual_model = reads_images
        self.cfg.is_multimodal = is_pair(hf_model)
        for module in hf_model.modules():
            if isinstance(module, nn.MultiheadAttention):
                open_pooling(module)
        self.component_mapping = mapping(hf_model, self.cfg)
        if name.endswith("WithProjection") or is_pair(hf_model):
            give_logits(hf_model)

    def setup_hook_compatibility(self: Any, bridge: Any) -> None:
        for module in bridge.modules():
            if isinstance(module, AttentionBridge):  # in every stack, and in attention pooling
                module.setup_hook_compatibility()

    return type(
        f"{name}Adapter",
        (ArchitectureAdapter,),
        {
            "__doc__": f"{name}, by the names of its parts.",
            "__init__": init,
            "prepare_model": prepare_model,
            "setup_hook_compatibility": setup_hook_compatibility,
            "supports_generation": False,
            "supports_causal_loss": False,
        },
    )


def mapping(model: nn.Module, config: Any) -> dict[str, Any]:
    """The component mapping of a model; ``config`` gets the sizes of its first, or last, stack."""
    stacks, made = dict(_stacks(model)), {}
    for path, blocks in stacks.items():
        _measure(config, blocks)
        made[f"{_prefix(path, stacks)}blocks"] = _block(path, blocks[0], copy.copy(config))
    if is_pair(model):
        _measure(config, stacks["text_model.encoder.layers"])
    config.n_layers = len(next(iter(stacks.values())))
    within = list(stacks)
    inside = dict(model.named_modules())
    for path, module in inside.items():
        if path and not path.startswith(tuple(f"{place}." for place in within)):
            component = _outside(path, module, inside, config)
            if component is not None:
                within.append(path)
                made[_name(path, stacks, inside)] = component
    return made


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every list of blocks: what is in it has attention and two norms."""
    for path, module in model.named_modules():
        first = module[0] if isinstance(module, nn.ModuleList) and len(module) else None
        if first is not None and all(_path(first, part) for part in ("attn", "ln1", "ln2")):
            yield path, module


def _path(module: nn.Module, part: str) -> str | None:
    """Where a part is in a module."""
    inside = dict(module.named_modules())
    return next((path for path in PARTS[part] if path in inside), None)


def _measure(config: Any, blocks: nn.ModuleList) -> None:
    """Set the sizes of one stack."""
    attention: Any = blocks[0].get_submodule(str(_path(blocks[0], "attn")))
    for part in attention.modules():
        if "Sdpa" in type(part).__name__:
            raise ValueError(
                f"{type(part).__name__} runs a fused kernel: load the model with "
                'attn_implementation="eager"'
            )
    sizes = [getattr(part, key, None) for part in attention.modules() for key in HEAD_COUNTS]
    config.n_layers, config.n_heads = len(blocks), next(size for size in sizes if size)
    config.d_model = attention.get_submodule(str(_path(attention, "q"))).in_features
    config.d_head = config.d_model // config.n_heads


def _block(path: str, block: nn.Module, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    place = _path(block, "mlp")
    ends = {"hook_mlp_out": "mlp.out.hook_out", "hook_mlp_in": "mlp.in.hook_in"}
    return gc.BlockBridge(
        name=path,
        hook_alias_overrides={} if place else ends,
        submodules={
            "ln1": _norm(str(_path(block, "ln1")), config),
            "ln2": _norm(str(_path(block, "ln2")), config),
            "attn": _attention(block, str(_path(block, "attn")), config),
            "mlp": _mlp(block, place, config),
        },
    )


def _attention(block: nn.Module, place: str, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    return gc.AttentionBridge(
        name=place,
        config=config,
        submodules=_linear(block.get_submodule(place), "q", "k", "v", "o"),
        maintain_native_attention=True,
    )


def _mlp(block: nn.Module, place: str | None, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    inner = block if place is None else block.get_submodule(place)
    return gc.MLPBridge(name=place, config=config, submodules=_linear(inner, "gate", "in", "out"))


def _linear(module: nn.Module, *parts: str) -> dict[str, Any]:
    from transformer_lens.model_bridge import generalized_components as gc

    places = {part: _path(module, part) for part in parts}
    return {part: gc.LinearBridge(name=path) for part, path in places.items() if path}


def _norm(path: str, config: Any) -> Any:
    from transformer_lens.model_bridge import generalized_components as gc

    return gc.NormalizationBridge(name=path, config=config, use_native_layernorm_autograd=True)


def _outside(path: str, module: nn.Module, inside: Mapping[str, nn.Module], config: Any) -> Any:
    """The component of a module that is in no stack, ``None`` where it gets none."""
    from transformer_lens.model_bridge import generalized_components as gc
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    kinds = {type(part) for part in module.modules()}
    if path.endswith("token_embedding"):
        return gc.EmbeddingBridge(name=path)
    if path.endswith("position_embedding"):  # of a text; an image's are inside its embeddings
        return gc.PosEmbedBridge(name=path)
    if path.endswith("embeddings") and nn.Conv2d in kinds:
        return GeneralizedComponent(name=path)
    if nn.MultiheadAttention in (type(part) for part in module.children()):
        parts = {
            "attn": _attention(module, "attention", config),
            "ln": _norm("layernorm", config),
            "mlp": _mlp(module, "mlp", config),
        }
        return GeneralizedComponent(name=path, submodules=parts)
    if isinstance(module, nn.LayerNorm):
        return _norm(path, config)
    if isinstance(module, nn.Linear):
        return (gc.UnembeddingBridge if path == "classifier" else gc.LinearBridge)(name=path)
    return None


def _prefix(path: str, stacks: Mapping[str, Any]) -> str:
    """What the names of a tower or stage begin with, where there are several."""
    if len(stacks) == 1:
        return ""
    tower = re.match(r"(vision|text)_model", path)
    stage = re.search(r"encoder\.layers\.(\d+)", path)
    return f"{tower[1]}_" if tower else f"stage{stage[1]}_" if stage else ""


def _name(path: str, stacks: Mapping[str, Any], inside: Mapping[str, nn.Module]) -> str:
    """What the bridge calls a module outside the stacks."""
    owners = [each.removesuffix("embeddings") for each in inside if each.endswith("embeddings")]
    tower = max((owner for owner in owners if path.startswith(owner)), key=len, default="")
    name = path.removeprefix(tower)
    known = OUTSIDE.get(name, name.replace(".", "_"))
    if name == "post_layernorm" and f"{tower}pre_layrnorm" in inside:
        known = "pooler"  # CLIP's, of the CLS token alone
    return _prefix(path, stacks) + known
