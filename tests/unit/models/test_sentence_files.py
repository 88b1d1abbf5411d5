"""Checkpoints of sentence-transformers: what their settings say is obeyed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import lenslrp
from lenslrp.targets import SentenceEmbedding, Similarity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "##s", "A"]
TEXTS = ["a cat sat", "a dog ran ran ran"]
Settings = dict[str, Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Writes a checkpoint with some of its files changed; ``None`` leaves one out."""

    def write(head: bool = False, lower: bool = True, **changed: Any) -> Path:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        model = BertModel(config).eval()
        model.save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower).save_pretrained(tmp_path)
        if head:
            settings = json.loads((tmp_path / "config.json").read_text())
            settings["architectures"] = ["BertForMaskedLM"]
            (tmp_path / "config.json").write_text(json.dumps(settings))
        kinds = changed.get("kinds", ["Transformer", "Pooling", "Normalize"])
        paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
        files: Settings = {
            "modules.json": [
                {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
            ],
            "1_Pooling/config.json": changed.get("pooling", {"pooling_mode_mean_tokens": True}),
            "sentence_bert_config.json": changed.get("text", {"max_seq_length": 8}),
            "config_sentence_transformers.json": changed.get("general", {"prompts": {}}),
        }
        if "dense" in changed:
            files["2_Dense/config.json"] = changed["dense"]
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, ("last",)),
        ({"pooling_mode_weightedmean_tokens": True}, ("weighted_mean",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 16}, ("last",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
    ],
)
def test_pooling_is_read(checkpoint: Checkpoint, pooling: Settings, expected: Any) -> None:
    bridge = lenslrp.load(str(checkpoint(pooling=pooling)), device="cpu")
    assert bridge.sentence_embedding == SentenceEmbedding(expected, normalise=True, longest=8)


def test_a_checkpoint_s_own_embedding(checkpoint: Checkpoint) -> None:
    """Mean over the tokens of each text, normalised; the pair's similarity is its product."""
    folder = checkpoint(general={"similarity_fn_name": "dot"})
    bridge = lenslrp.load(folder, device="cpu")
    model = BertModel.from_pretrained(folder).eval()
    vectors = []
    for text in TEXTS:
        with torch.no_grad():
            ids = bridge.tokenizer(text, return_tensors="pt").input_ids
            mean = model(ids).last_hidden_state[0].mean(dim=0)
        vectors.append(mean / mean.norm())
    torch.testing.assert_close(lenslrp.embed(bridge, TEXTS), torch.stack(vectors))
    _, R = lenslrp.run_with_relevance(bridge, TEXTS, Similarity())
    torch.testing.assert_close(R.target.value, (vectors[0] @ vectors[1]).expand(2))
    assert R.target.text == "dot product with the other text (mean pooling)"
    with pytest.raises(lenslrp.InputError, match="has 9 tokens, .* reads the first 8"):
        lenslrp.embed(bridge, "a cat sat sat sat sat sat")
    assert lenslrp.embed(bridge, "a cat sat sat sat sat sat", "cls").shape == (1, 16)


@pytest.mark.parametrize("activation", ["Tanh", "Identity"])
def test_a_dense_layer_behind_the_pooling(checkpoint: Checkpoint, activation: str) -> None:
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    folder = checkpoint(kinds=kinds, dense={"activation_function": f"torch.nn.{activation}"})
    weight, bias = torch.randn(5, 16), torch.randn(5)
    file = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": weight, "linear.bias": bias}, file)
    bridge = lenslrp.load(folder, device="cpu")
    mean = lenslrp.embed(bridge, TEXTS, "mean")
    vectors = mean @ weight.T + bias
    vectors = vectors.tanh() if activation == "Tanh" else vectors
    vectors /= vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lenslrp.embed(bridge, TEXTS), vectors)
    _, R = lenslrp.run_with_relevance(bridge, TEXTS, Similarity())
    torch.testing.assert_close(R.target.value, (vectors[0] @ vectors[1]).expand(2))
    assert R.target.text == "cosine similarity to the other text (mean pooling, a dense layer)"
    file.write_bytes(b"damaged")
    with pytest.raises(lenslrp.LoadError, match="weights of .*2_Dense cannot be read"):
        lenslrp.load(folder, device="cpu")


def test_the_bare_model_is_loaded(checkpoint: Checkpoint) -> None:
    """all-mpnet-base-v2 and others name a class with a head, whose weights they do not have."""
    folder = checkpoint(head=True)
    assert type(lenslrp.load(folder, device="cpu").original_model) is BertModel
    (folder / "modules.json").unlink()
    with pytest.raises(lenslrp.LoadError, match="not those of a BertForMaskedLM"):
        lenslrp.load(folder, device="cpu")


def test_a_model_that_keeps_its_head(checkpoint: Checkpoint) -> None:
    folder = checkpoint(kinds=["MLMTransformer", "SpladePooling"])
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    bridge = lenslrp.load(folder, device="cpu")
    assert type(bridge.original_model) is BertForMaskedLM
    with pytest.raises(lenslrp.InputError, match="has a head"):
        lenslrp.embed(bridge, TEXTS)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kinds": ["Transformer", "Pooling", "Normalize", "Dense"]}, "it has a module Dense"),
        ({"kinds": ["Transformer", "Pooling", "Dense"]}, "2_Dense has no model.safetensors"),
        (
            {
                "kinds": ["Transformer", "Pooling", "Dense"],
                "dense": {"activation_function": "torch.nn.modules.activation.GELU"},
            },
            "its module Dense has the activation GELU",
        ),
        (
            {"kinds": ["Transformer", "Pooling", "Dense"], "dense": {"use_residual": True}},
            "its module Dense is more than a layer",
        ),
        ({"kinds": ["Transformer", "WeightedLayerPooling", "Pooling"]}, "WeightedLayerPooling"),
        ({"kinds": ["Transformer"]}, "it has no module Pooling"),
        ({"pooling": {"pooling_mode_new": True}}, "names no pooling that is explained"),
        ({"pooling": {"pooling_mode": "attention"}}, "names no pooling that is explained"),
        ({"text": {"do_lower_case": True}, "lower": False}, "texts are put in lower case first"),
        ({"general": {"default_prompt_name": "query"}}, "the prompt 'query' is put before"),
        ({"general": {"similarity_fn_name": "euclidean"}}, "compared by 'euclidean'"),
    ],
)
def test_what_is_not_explained_is_refused(
    checkpoint: Checkpoint, changed: Settings, reason: str
) -> None:
    """When it is used; the model is loaded, and a pooling that is named is explained."""
    bridge = lenslrp.load(checkpoint(**changed), device="cpu")
    with pytest.raises(lenslrp.InputError, match=f"what is not explained: .*{reason}"):
        lenslrp.run_with_relevance(bridge, TEXTS, Similarity())
    lenslrp.run_with_relevance(bridge, TEXTS, Similarity(pooling="mean"))


def test_lower_case_by_the_tokenizer_itself(checkpoint: Checkpoint) -> None:
    bridge = lenslrp.load(checkpoint(text={"do_lower_case": True}), device="cpu")
    assert bridge.sentence_embedding.refused == ""


@pytest.mark.parametrize("content", ["{}", '["Pooling"]', '[{"path": ""}]', "no json"])
def test_modules_that_are_none(checkpoint: Checkpoint, content: str) -> None:
    folder = checkpoint()
    (folder / "modules.json").write_text(content)
    with pytest.raises(lenslrp.LoadError, match=r"modules\.json of "):
        lenslrp.load(folder, device="cpu")


def test_other_checkpoints_say_nothing(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    (folder / "modules.json").unlink()
    assert lenslrp.load(folder, device="cpu").sentence_embedding is None
