"""Adapters for encoders that TransformerLens has none for: where their parts are, by name.

They are BERT's in all but names: blocks of attention and MLP, each followed by its norm, around
token and position embeddings. :data:`LAYOUTS` says where a family keeps what.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet


@dataclass(frozen=True)
class EncoderLayout:
    """Where an encoder keeps its parts: paths in the language model, in a block, in a branch.

    Attributes:
        blocks: the list of blocks.
        embeddings: name in the bridge -> path of an embedding table.
        norms: name in the bridge -> path of a norm outside the blocks.
        linear: name in the bridge -> path of a linear layer outside the blocks.
        unembed: what gives the logits.
        attention: path in a block; its query, key, value and output projections.
        mlp: path in a block, empty where its layers are the block's own; first and last layer.
        norm_of: the norms of the two branches, in a block.
    """

    blocks: str
    embeddings: dict[str, str]
    norms: dict[str, str]
    unembed: str
    attention: tuple[str, dict[str, str]]
    mlp: tuple[str, str, str]
    norm_of: tuple[str, str]
    linear: dict[str, str] = field(default_factory=dict)


def _embeddings(base: str, **more: str) -> dict[str, str]:
    names = {"embed": "word_embeddings", "pos_embed": "position_embeddings", **more}
    return {key: f"{base}.embeddings.{name}" for key, name in names.items()}


_BERT_ATTENTION = (
    "attention",
    {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"},
)
_BERT_MLP = ("", "intermediate.dense", "output.dense")
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


def _deberta(**projections: str) -> EncoderLayout:
    """DeBERTa's layout; both versions of it differ in how they project."""
    return EncoderLayout(
        blocks="deberta.encoder.layer",
        embeddings=_embeddings("deberta", token_type_embed="token_type_embeddings"),
        norms={
            "embed_ln": "deberta.embeddings.LayerNorm",
            "ln_final": "cls.predictions.transform.LayerNorm",
        },
        linear={
            "embed_project": "deberta.embeddings.embed_proj",
            "mlm_head": "cls.predictions.transform.dense",
        },
        unembed="cls.predictions.decoder",
        attention=("attention", {**projections, "o": "output.dense"}),
        mlp=_BERT_MLP,
        norm_of=_BERT_NORMS,
    )


LAYOUTS: dict[str, EncoderLayout] = {
    "ElectraForMaskedLM": EncoderLayout(
        blocks="electra.encoder.layer",
        embeddings=_embeddings("electra", token_type_embed="token_type_embeddings"),
        norms={
            "embed_ln": "electra.embeddings.LayerNorm",
            "ln_final": "generator_predictions.LayerNorm",
        },
        linear={
            "embed_project": "electra.embeddings_project",
            "mlm_head": "generator_predictions.dense",
        },
        unembed="generator_lm_head",
        attention=_BERT_ATTENTION,
        mlp=_BERT_MLP,
        norm_of=_BERT_NORMS,
    ),
    "DistilBertForMaskedLM": EncoderLayout(
        blocks="distilbert.transformer.layer",
        embeddings=_embeddings("distilbert"),
        norms={"embed_ln": "distilbert.embeddings.LayerNorm", "ln_final": "vocab_layer_norm"},
        linear={"mlm_head": "vocab_transform"},
        unembed="vocab_projector",
        attention=("attention", {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}),
        mlp=("ffn", "lin1", "lin2"),
        norm_of=("sa_layer_norm", "output_layer_norm"),
    ),
    "MPNetForMaskedLM": EncoderLayout(
        blocks="mpnet.encoder.layer",
        embeddings=_embeddings("mpnet"),
        norms={"embed_ln": "mpnet.embeddings.LayerNorm", "ln_final": "lm_head.layer_norm"},
        linear={"mlm_head": "lm_head.dense"},
        unembed="lm_head.decoder",
        attention=("attention", {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"}),
        mlp=_BERT_MLP,
        norm_of=("attention.LayerNorm", "output.LayerNorm"),
    ),
    "DebertaForMaskedLM": _deberta(qkv="self.in_proj"),
    "DebertaV2ForMaskedLM": _deberta(q="self.query_proj", k="self.key_proj", v="self.value_proj"),
    "AlbertForMaskedLM": EncoderLayout(
        blocks="albert.encoder.albert_layer_groups",
        embeddings=_embeddings("albert", token_type_embed="token_type_embeddings"),
        norms={"embed_ln": "albert.embeddings.LayerNorm", "ln_final": "predictions.LayerNorm"},
        linear={
            "embed_project": "albert.encoder.embedding_hidden_mapping_in",
            "mlm_head": "predictions.dense",
        },
        unembed="predictions.decoder",
        attention=("attention", {"q": "query", "k": "key", "v": "value", "o": "dense"}),
        mlp=("", "ffn", "ffn_output"),
        norm_of=("attention.LayerNorm", "full_layer_layer_norm"),
    ),
    "ModernBertForMaskedLM": EncoderLayout(
        blocks="model.layers",
        embeddings={"embed": "model.embeddings.tok_embeddings"},
        norms={
            "embed_ln": "model.embeddings.norm",
            "encoder_ln": "model.final_norm",
            "ln_final": "head.norm",
        },
        linear={"mlm_head": "head.dense"},
        unembed="decoder",
        attention=("attn", {"qkv": "Wqkv", "o": "Wo"}),
        mlp=("mlp", "Wi", "Wo"),
        norm_of=("attn_norm", "mlp_norm"),
    ),
}

SAME_AS = {
    "XLMRobertaForMaskedLM": "RobertaForMaskedLM",
    "CamembertForMaskedLM": "RobertaForMaskedLM",
}
"""Families whose modules have the names of another's."""


def encoders(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters for the masked language models of these families."""
    made = {name: adapters[other] for name, other in SAME_AS.items()}
    return {**made, **{name: _adapter(name, layout, adapters) for name, layout in LAYOUTS.items()}}


def _adapter(name: str, layout: EncoderLayout, adapters: dict[str, Any]) -> Any:
    bert = adapters["BertForMaskedLM"]

    def init(self: Any, cfg: Any) -> None:
        bert.__init__(self, cfg)
        self.weight_processing_conversions = {}
        self.component_mapping = _components(layout, self.cfg)

    def prepare_model(self: Any, hf_model: Any) -> None:
        if name == "AlbertForMaskedLM":
            _unroll(hf_model.albert.encoder)
        if name == "MPNetForMaskedLM":
            # As a method, as in RoBERTa: by it one knows that positions are counted from padding.
            count = modeling_mpnet.create_position_ids_from_input_ids
            hf_model.mpnet.embeddings.create_position_ids_from_input_ids = count
        if name == "DebertaV2ForMaskedLM":
            _part_positions(hf_model.deberta.encoder)
        for key in (*layout.linear, *layout.norms, *layout.embeddings):
            if not _has(hf_model, self.component_mapping[key].name):
                del self.component_mapping[key]  # another head, or settings without it

    return type(f"{name}Adapter", (bert,), {"__init__": init, "prepare_model": prepare_model})


def _has(model: Any, path: str) -> bool:
    part = model
    for name in path.split("."):
        part = getattr(part, name, None)
    return part is not None


def _unroll(encoder: Any) -> None:
    """Give each of ALBERT's layers modules of its own, which share their weights.

    Hook points of a module that runs many times in a pass would hold its last time.
    """
    groups, config = encoder.albert_layer_groups, encoder.config
    order = [
        layer
        for i in range(config.num_hidden_layers)
        for layer in groups[i * config.num_hidden_groups // config.num_hidden_layers].albert_layers
    ]
    encoder.albert_layer_groups = nn.ModuleList(map(_with_same_weights, order))
    encoder.forward = MethodType(_in_turn, encoder)


def _with_same_weights(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})


def _part_positions(encoder: Any) -> None:
    """Project DeBERTa's relative positions by modules of their own, which share their weights.

    With ``share_att_key`` those of queries and keys run on the tokens and then on the positions.
    """
    for layer in encoder.layer:
        attention = layer.attention.self
        if attention.relative_attention and attention.share_att_key:
            attention.pos_key_proj = _with_same_weights(attention.key_proj)
            attention.pos_query_proj = _with_same_weights(attention.query_proj)
            attention.share_att_key = False


def _in_turn(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    hidden_states = self.embedding_hidden_mapping_in(hidden_states)
    for layer in self.albert_layer_groups:
        hidden_states = layer(hidden_states, attention_mask, **kwargs)
    return BaseModelOutput(last_hidden_state=hidden_states)


def _components(layout: EncoderLayout, config: Any) -> dict[str, Any]:
    from transformer_lens.model_bridge import generalized_components as gc

    def norm(path: str) -> Any:
        return gc.NormalizationBridge(name=path, config=config, use_native_layernorm_autograd=True)

    def table(key: str, path: str) -> Any:
        return (gc.PosEmbedBridge if key == "pos_embed" else gc.EmbeddingBridge)(name=path)

    place, projections = layout.attention
    mlp, first, last = layout.mlp
    block = {
        "ln1": norm(layout.norm_of[0]),
        "ln2": norm(layout.norm_of[1]),
        "attn": gc.AttentionBridge(
            name=place,
            config=config,
            submodules={key: gc.LinearBridge(name=path) for key, path in projections.items()},
            maintain_native_attention=True,
            fused_qkv="qkv" in projections,
        ),
        "mlp": gc.MLPBridge(
            name=mlp or None,
            config=config,
            submodules={"in": gc.LinearBridge(name=first), "out": gc.LinearBridge(name=last)},
        ),
    }
    ends = {"hook_mlp_out": "mlp.out.hook_out", "hook_mlp_in": "mlp.in.hook_in"}
    return {
        **{key: table(key, path) for key, path in layout.embeddings.items()},
        **{key: norm(path) for key, path in layout.norms.items() if key != "ln_final"},
        **{key: gc.LinearBridge(name=path) for key, path in layout.linear.items()},
        "blocks": gc.BlockBridge(
            name=layout.blocks, hook_alias_overrides={} if mlp else ends, submodules=block
        ),
        **{key: norm(path) for key, path in layout.norms.items() if key == "ln_final"},
        "unembed": gc.UnembeddingBridge(name=layout.unembed),
    }
