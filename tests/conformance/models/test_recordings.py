"""Arrays and wav files through a checkpoint's own feature extractor, from a directory."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import lenslrp
from tests.conformance.models.test_sounds import (
    FRAMES,
    MEL,
    NAMES,
    SETTINGS,
    explain,
    made,
    output_of,
    sounds,
)
from tests.conformance.models.test_sounds import written as spoken

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:At least one mel filter")

RATE = 16000
SAMPLES = 160 * FRAMES


def sound(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, length).astype(np.float32)


def spectrograms() -> Any:
    """Whisper's own, of a fifth of a second."""
    extractor = hf.WhisperFeatureExtractor(feature_size=MEL, sampling_rate=RATE)
    extractor.n_samples = SAMPLES
    return extractor


def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<start>", *(chr(ord("a") + i) for i in range(26))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<pad>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip


def save(folder: Path, model: Any, extractor: Any) -> Any:
    model.float().save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def written(path: Path, samples: np.ndarray[Any, Any], rate: int = RATE, **changed: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(changed.get("channels", 1))
        file.setsampwidth(changed.get("width", 2))
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_waveforms_from_a_directory(tmp_path: Path, no_network: None) -> None:
    model = made("Wav2Vec2ForSequenceClassification", **SETTINGS["layer"])
    model.config.id2label = {0: "yes", 1: "no", 2: "up"}
    extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    bridge = lenslrp.load(save(tmp_path, model, extractor), device="cpu")
    long, short = sound(70), sound(43, seed=1)
    logits, R = lenslrp.run_with_relevance(bridge, [long, short], "no")
    given = extractor([long, short], sampling_rate=RATE, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model.float()(**given).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert R.inputs["input_values"].shape == (2, 70)
    alone, A = lenslrp.run_with_relevance(bridge, short, "no")
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(R.tokens[1:, : A.tokens.shape[1]], A.tokens, rtol=1e-3, atol=1e-5)
    assert R.target.text == "logit of 'no'"


def test_a_wav_file_is_its_samples(tmp_path: Path) -> None:
    bridge = lenslrp.load(made("HubertForSequenceClassification").float())
    bridge.processor = hf.Wav2Vec2FeatureExtractor()
    samples = sound(64)
    path = written(tmp_path / "yes.wav", samples)
    _, R = lenslrp.run_with_relevance(bridge, path, 1)
    _, A = lenslrp.run_with_relevance(bridge, (samples * 32767).astype("<i2") / 32768.0, 1)
    torch.testing.assert_close(R.inputs["input_values"], A.inputs["input_values"])
    _, S = lenslrp.run_with_relevance(bridge, str(path), 1)
    assert torch.equal(S.tokens, R.tokens)


def test_whisper_from_a_directory(tmp_path: Path, no_network: None) -> None:
    model = made("WhisperForConditionalGeneration")
    extractor = spectrograms()
    save(tmp_path, model, extractor)
    tokenizer().save_pretrained(tmp_path)
    bridge = lenslrp.load(tmp_path, device="cpu")
    bridge.processor.n_samples = SAMPLES
    samples = sound(SAMPLES - 100)
    logits, R = lenslrp.run_with_relevance(bridge, samples, "d", decoder_input="a b")
    given = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = model.float()(given, decoder_input_ids=torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(R.target.value, expected[:, -1, 7], rtol=1e-4, atol=1e-5)
    assert R.target.text == "logit of 'd' at position -1"
    assert R.decoder_str_tokens == [["<start>", " a", " b"]]
    assert R.inputs["input_features"].shape == (1, MEL, FRAMES)
    _, S = lenslrp.run_with_relevance(bridge, samples, "c d e", decoder_input="a b")
    assert S.decoder_str_tokens == [["<start>", " a", " b", " c", " d"]]  # a span, teacher-forced
    _, D = lenslrp.run_with_relevance(bridge, samples, "a")
    assert D.decoder_str_tokens == [["<start>"]]
    frame = R.to_dataframe()
    assert set(frame["side"]) == {"encoder", "decoder"}
    assert lenslrp.examine(bridge).ok


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    bridge = lenslrp.load(made("HubertForSequenceClassification").float())
    with pytest.raises(lenslrp.InputError, match="no feature extractor: load it from a directory"):
        lenslrp.run_with_relevance(bridge, sound(64), 1)
    bridge.processor = hf.Wav2Vec2FeatureExtractor()
    other = written(tmp_path / "b.wav", sound(64), 8000)
    stereo = written(tmp_path / "c.wav", sound(64), channels=2)
    (tmp_path / "d.wav").write_text("no sound")
    for given, why in (
        (sound(64)[None], r"one channel, not an array \[1, 64\]"),
        (np.zeros(64, dtype=np.int16), "recording 0 is int16: samples are floats"),
        ([sound(64), None], "recording 1 must be an array .*, not NoneType"),
        (other, "sampled at 8000 Hz, and the model reads 16000 Hz"),
        (stereo, "2 channels of 16 bits"),
        (tmp_path / "d.wav", "cannot be read as a wav file"),
        (tmp_path / "e.wav", "cannot be read as a wav file"),
        ([sound(64), sound(43)], "normalises over the whole length of a sound"),
    ):
        with pytest.raises(lenslrp.InputError, match=why):
            lenslrp.run_with_relevance(bridge, given, 1)
    whisper = lenslrp.load(made("WhisperForAudioClassification").float())
    whisper.processor = spectrograms()
    with pytest.raises(lenslrp.InputError, match=rf"reads {SAMPLES} \(0\.2 s\): cut it"):
        lenslrp.run_with_relevance(whisper, sound(SAMPLES + 1), 1)


def test_what_ast_would_cut_is_refused() -> None:
    extractor = hf.ASTFeatureExtractor(num_mel_bins=8, max_length=24)
    model = hf.ASTForAudioClassification(
        hf.ASTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_mel_bins=8, max_length=24, patch_size=4, frequency_stride=4, time_stride=4,
        )
    ).eval()  # fmt: skip
    bridge = lenslrp.load(model)
    bridge.processor = extractor
    longest = 400 + 24 * 160 - 1
    _, R = lenslrp.run_with_relevance(bridge, sound(longest), 1)
    assert R.inputs["input_values"].shape == (1, 24, 8)
    with pytest.raises(lenslrp.InputError, match=f"ASTFeatureExtractor reads {longest}"):
        lenslrp.run_with_relevance(bridge, sound(longest + 1), 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_from_its_directory(name: str, tmp_path: Path, no_network: None) -> None:
    model = made(name, mask_time_prob=0.05).float()
    given = {key: value.float() for key, value in sounds(model).items()}
    with torch.no_grad():
        expected = output_of(model(**given, **spoken(name, "decoder_input_ids")))
    model.save_pretrained(tmp_path)
    bridge = lenslrp.load(tmp_path, device="cpu")
    assert type(bridge.original_model) is getattr(hf, name)
    logits, R = explain(bridge, **given)
    if "unembed" in dict(bridge.named_children()):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert R.coverage.ok
