"""Directories of classes that TransformerLens does not have: none gets a head that is not its own.

The classes are found by looking through transformers: bare models, classifiers of sequences, tokens
and images, question answering, multiple choice, CLIP, sounds. Each is saved with its own random
weights and loaded by directory: with a derived adapter it is the checkpoint, without one it is
refused.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

import lenslrp
from lenslrp.errors import LoadError
from lenslrp.models.heads import offered
from lenslrp.models.verifying import output_of, short_input
from tests.conformance.families import randomise, tokens
from tests.conformance.zoo_configs import CHANGES, tiny
from tests.unit.tiny_tokenizers import LINES, word_level

KINDS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "Model",
)
STEMS = (
    "Albert", "Bart", "Bert", "BigBird", "Bloom", "CTRL", "Camembert", "Deberta", "DistilBert",
    "Electra", "Falcon", "GPT2", "GPTNeo", "GPTNeoX", "Gemma", "Gemma2", "Gemma3Text", "Llama",
    "MPNet", "Mistral", "Mixtral", "ModernBert", "OPT", "Phi", "Phi3", "Qwen2", "Qwen3", "Roberta",
    "T5", "XLMRoberta",
)  # fmt: skip
OTHERS = (
    "CLIPModel", "CLIPTextModel", "CLIPVisionModel", "SiglipModel", "Dinov2Model",
    "Dinov2ForImageClassification", "BeitForImageClassification", "Wav2Vec2ConformerModel",
    "Speech2TextForConditionalGeneration", "SpeechT5ForSpeechToText",
    "T5EncoderModel", "BertForPreTraining", "BertForNextSentencePrediction",
    "ElectraForPreTraining", "DistilBertForMaskedLM", "AlbertForMaskedLM", "MPNetForMaskedLM",
    "ViTForMaskedImageModeling", "GPT2DoubleHeadsModel",
)  # fmt: skip
NAMES = [
    name
    for name in (*(f"{stem}{kind}" for stem in STEMS for kind in KINDS), *OTHERS)
    if hasattr(hf, name) and name not in SUPPORTED_ARCHITECTURES
]
SMALL: dict[str, Any] = {
    "projection_dim": 16, "image_size": 8, "patch_size": 4, "max_source_positions": 16,
    "max_target_positions": 48, "embedding_size": 16, "d_kv": 8, "dim": 16, "hidden_dim": 24,
    "n_heads": 2, "n_layers": 2, "num_mel_bins": 8, "n_inner": 24, "dff": 24, "block_size": 4,
    "head_dim": 8,
}  # fmt: skip


def build(name: str) -> Any:
    """A tiny model of a class, its weights its own."""
    torch.manual_seed(0)
    cls = getattr(hf, name)
    kind = cls.config_class
    plain = kind()
    changes = {key: value for key, value in SMALL.items() if hasattr(plain, key)}
    near = next((n for n in CHANGES if getattr(hf, n).config_class is kind), None)
    config = tiny(plain, kind, {**changes, **CHANGES.get(near or "", {})}, 53)
    model = cls._from_config(config, attn_implementation="eager")
    randomise(model, bias=True)
    return model.eval()


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_there_are_many() -> None:
    assert len(NAMES) >= 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name in offered()])
def test_a_derived_adapter_keeps_the_checkpoints_own_head(
    name: str, tmp_path: Path, no_network: None
) -> None:
    model = build(name)
    if not getattr(model.config, "pad_token_id", None):
        model.config.pad_token_id = 0
    text = tokens(1, 6)
    if model.config.is_encoder_decoder:
        text[0, -1] = model.config.eos_token_id
    model.save_pretrained(tmp_path)
    reloaded = getattr(hf, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    options: dict[str, Any] = {"decoder_input_ids": text} if name == "T5Model" else {}
    given: Any = text[:, None] if name.endswith("ForMultipleChoice") else text
    takes = inspect.signature(reloaded.forward).parameters
    if "pixel_values" in takes:
        options = short_input(reloaded)
        text = given = options.pop("input_ids", None)
    else:
        options["use_cache"] = False
    own = {key: value for key, value in options.items() if key in takes}
    with torch.no_grad():
        expected = output_of(reloaded(**own, **({} if given is None else {"input_ids": given})))
    bridge = lenslrp.load(str(tmp_path), device="cpu")
    assert type(bridge.original_model) is getattr(hf, name)
    with torch.no_grad():
        found = bridge(text, return_type="logits", **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in offered()])
def test_none_gets_a_head_that_is_not_its_own(name: str, tmp_path: Path, no_network: None) -> None:
    build(name).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=f"no adapter for {name}; nearest: "):
        lenslrp.load(str(tmp_path))
    with pytest.raises(LoadError, match=f"no adapter for {name}; nearest: "):
        lenslrp.load(build(name))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter for Llama's sequence classifier, as another package would offer it."""
    base: Any = SUPPORTED_ARCHITECTURES["LlamaForCausalLM"]

    class Classifier(base):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.component_mapping["unembed"] = UnembeddingBridge(name="score")

    adapters = dict(ArchitectureAdapterFactory._adapters)
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", adapters)
    ArchitectureAdapterFactory.register_adapter("LlamaForSequenceClassification", Classifier)


def test_an_adapter_of_others_gets_the_checkpoints_own_head(
    tmp_path: Path, registered: None, no_network: None
) -> None:
    model = build("LlamaForSequenceClassification")
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens(1, 6)).logits
    bridge = lenslrp.load(str(tmp_path), device="cpu")
    assert type(bridge.original_model) is hf.LlamaForSequenceClassification
    with torch.no_grad():
        assert torch.equal(bridge(tokens(1, 6), use_cache=False), expected)


def test_the_classes_are_of_every_kind() -> None:
    for kind in KINDS:
        assert sum(name.endswith(kind) for name in NAMES) >= 8, kind
    assert all(inspect.isclass(getattr(hf, name)) for name in NAMES)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_the_hub_lays_it(cache: Path, repository: str, files: Path, ref: str) -> None:
    """A repository in the hub's cache: blobs, a snapshot of links to them, and a name for it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / ref).write_text(COMMIT)
    for index, file in enumerate(sorted(files.iterdir())):
        blob = folder / "blobs" / f"{index:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))


@pytest.mark.parametrize("ref", ["main", "v1.0"])
def test_a_hub_id_is_its_directory_and_the_model_in_memory(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """Without a network: what the hub's cache holds, at the revision that was asked for."""
    model = build("ElectraForSequenceClassification")
    model.config.id2label = {0: "bad", 1: "good"}
    files, cache = tmp_path / "files", tmp_path / "cache"
    model.save_pretrained(files)
    word_level().save_pretrained(files)
    as_the_hub_lays_it(cache, "somebody/tiny-electra", files, ref)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    revision = None if ref == "main" else ref
    bridges = (
        lenslrp.load(str(files), device="cpu"),
        lenslrp.load("somebody/tiny-electra", device="cpu", revision=revision),
        lenslrp.load(model, tokenizer=word_level(), device="cpu"),
    )
    target = lenslrp.targets.LogitDiff("good", "bad")
    runs = [lenslrp.run_with_relevance(bridge, LINES[0], target) for bridge in bridges]
    for (logits, R), bridge in zip(runs, bridges, strict=True):
        assert type(bridge.original_model) is hf.ElectraForSequenceClassification
        torch.testing.assert_close(logits, runs[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(R.tokens, runs[0][1].tokens, rtol=1e-5, atol=1e-6)
        assert R.str_tokens == runs[0][1].str_tokens
        assert R.ledger().to_dict() == pytest.approx(runs[0][1].ledger().to_dict(), abs=1e-6)
    assert runs[0][1].tokens.abs().max() > 1e-6


def test_a_hub_id_that_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match="the Hugging Face hub did not give it"):
        lenslrp.load("somebody/tiny-electra")
