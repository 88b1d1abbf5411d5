"""Models of sounds: speech encoders with every head, Whisper; all by derived adapters.

Each on tiny random weights in float64: the logits of transformers, every operation covered, a
ledger that closes, padded rows as they are alone. What is new in them (Whisper's spectrogram and
cross-attention, WavLM's gates) is compared with an explicit pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.structure import components
from lenslrp.models import heads
from lenslrp.targets import Activation, Logit
from tests.conformance.families import randomise
from tests.unit.tiny import changes, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:Support for mismatched")

FAMILIES = ("Data2VecAudio", "Hubert", "SEW", "UniSpeech", "UniSpeechSat", "Wav2Vec2", "WavLM")
HEADS = (
    "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector", "Model",
)  # fmt: skip
ENCODERS = sorted(
    f"{family}{head}" for family in FAMILIES for head in HEADS if hasattr(hf, f"{family}{head}")
)
WHISPER = ("WhisperForAudioClassification", "WhisperForConditionalGeneration", "WhisperModel")
MOONSHINE = ("MoonshineForConditionalGeneration", "MoonshineModel")
WRITERS = (*WHISPER[1:], *MOONSHINE)
NAMES = (*ENCODERS, *WHISPER, *MOONSHINE)
SETTINGS: dict[str, dict[str, Any]] = {
    "group": {},
    "layer": {"feat_extract_norm": "layer"},
    "stable": {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "attention adapters": {"do_stable_layer_norm": True, "adapter_attn_dim": 4},
}
TOLERANCE = 1e-9
FRAMES, MEL = 20, 6


def config(name: str, **settings: Any) -> Any:
    speech = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "conv_dim": (8, 12), "conv_kernel": (4, 3), "conv_stride": (2, 2),
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "conv_pos_kernel_size": 5,
        "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 10, "num_labels": 3,
        "tdnn_dim": (6, 6), "tdnn_kernel": (3, 2), "tdnn_dilation": (1, 2), "xvector_output_dim": 5,
        "num_buckets": 8, "max_bucket_distance": 16, "squeeze_factor": 2,
    }  # fmt: skip
    whisper = {
        "vocab_size": 40, "num_mel_bins": MEL, "d_model": 16, "encoder_layers": 3,
        "encoder_attention_heads": 2, "decoder_layers": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": FRAMES // 2,
        "max_target_positions": 12, "classifier_proj_size": 10, "num_labels": 3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 3,
    }  # fmt: skip
    moonshine = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "decoder_start_token_id": 3,
    }  # fmt: skip
    sizes = {"Whisper": whisper, "Moonshi": moonshine}.get(name[:7], speech)
    return getattr(hf, name).config_class(**{**sizes, **settings})


def made(name: str, *, bias: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(hf, name)(config(name, **settings))
    randomise(model, bias=bias)
    if hasattr(model, "layer_weights"):
        model.layer_weights.data = torch.randn(len(model.layer_weights))
    model.set_attn_implementation("eager")
    return model.double().eval()


def tolerance(name: str) -> float:
    """Moonshine's softmax is in float32, whatever the model's type."""
    return 1e-6 if name in MOONSHINE else TOLERANCE


def sounds(model: Any, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (64,) if model.main_input_name == "input_values" else (MEL, FRAMES)
    sizes = (6000,) if type(model).__name__ in MOONSHINE else sizes
    values = torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)
    return {model.main_input_name: values}


WRITTEN = torch.tensor([[3, 5, 7, 11], [3, 8, 9, 5]])


def written(name: str, key: str = "decoder_input") -> dict[str, Tensor]:
    return {key: WRITTEN} if name in WRITERS else {}


def output_of(output: Any) -> Tensor:
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


def target_of(bridge: Any) -> Any:
    if "unembed" in dict(bridge.named_children()):
        return Logit(2, position=1) if logits_have_positions(bridge) else Logit(2)
    return Activation(last_residual(bridge), 3, 2)


def logits_have_positions(bridge: Any) -> bool:
    kind = type(bridge.original_model).__name__
    pooled = ("ForSequenceClassification", "ForAudioClassification", "ForXVector")
    return not kind.endswith(pooled)


def last_residual(bridge: Any) -> str:
    return [name for name in hook_names(bridge) if name.endswith("blocks.1.hook_resid_post")][-1]


def hook_names(bridge: Any) -> list[str]:
    return list(hook_points(bridge, components(bridge)))


def explain(bridge: Any, composite: Any = None, **options: Any) -> tuple[Tensor, Any]:
    name = type(bridge.original_model).__name__
    given = {"target": target_of(bridge), **sounds(bridge.original_model), **written(name)}
    return lenslrp.run_with_relevance(bridge, composite=composite, **{**given, **options})


def settings_of(name: str) -> list[str]:
    if name in (*WHISPER, *MOONSHINE):
        return ["group"]
    plain = name.startswith(("Data2Vec", "SEW"))
    adapts = name.startswith(("Wav2Vec2", "UniSpeech", "Hubert"))
    return ["group", "layer", *(() if plain else ("stable",)), *(("attention adapters",) * adapts)]


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in NAMES for setting in settings_of(name)]
)
def test_a_model_of_sounds_is_transformers(name: str, setting: str) -> None:
    """Logits, coverage, the ledger, every hook point readable or off the path, undo."""
    model = made(name, **SETTINGS[setting])
    given = {**sounds(model), **written(name, "decoder_input_ids")}
    with torch.no_grad():
        expected = output_of(model(**given))
    bridge = lenslrp.load(model)
    before = snapshot(bridge)
    for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP()):
        for leaves in ("pixels", "patches"):
            logits, R = explain(bridge, composite, leaves=leaves)
            if logits.shape == expected.shape:
                torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance(name))
            assert R.coverage.ok
            assert abs(R.ledger().error) < tolerance(name), str(R.ledger())
            parts = [R.tokens, R.positions, R.decoder_tokens, R.decoder_positions]
            if leaves == "pixels":
                parts[:1] = R.inputs.values()
            total = sum(float(part.sum()) for part in parts if part is not None)
            assert total == pytest.approx(R.ledger().leaves, rel=1e-9, abs=1e-9)
            read = {hook for hook in R if bool(torch.isfinite(R[hook]).all())}
            assert read | set(R.coverage.off_path) == set(hook_names(bridge))
    assert changes(before, bridge) == []
    assert lenslrp.examine(bridge).ok


@pytest.mark.parametrize("name", NAMES)
def test_cp_conserves_without_biases(name: str) -> None:
    model = made(name, bias=False)
    for path, weight in model.named_parameters():
        if path.endswith(("bias", "embed_positions.weight")):
            weight.data.zero_()
    bridge = lenslrp.load(model)
    _, R = explain(bridge, lenslrp.CPLRP(), names_filter=lambda hook: "hook_resid" in hook)
    target = float(R.target.value.sum())
    (values,) = R.inputs.values()
    decoder = 0.0 if R.decoder_tokens is None else float(R.decoder_tokens.sum())
    assert float(values.sum()) + decoder == pytest.approx(target, rel=1e-9, abs=1e-9)
    assert float(R.tokens.sum()) + decoder == pytest.approx(target, rel=1e-9, abs=1e-9)
    for hook in R if decoder == 0 else ():
        if hook.startswith(("blocks.0", "encoder_blocks.0")):
            assert float(R[hook].sum()) == pytest.approx(target, rel=1e-9, abs=1e-9), hook
    for hook in R if decoder != 0 else ():  # what a decoder reads, it reads in every layer
        if hook == "encoder_blocks.2.hook_resid_post":
            assert float(R[hook].sum()) + decoder == pytest.approx(target, rel=1e-9, abs=1e-9)


def test_every_offered_model_of_sounds_is_here() -> None:
    table = {
        name
        for name in heads.offered()
        if getattr(hf, name).main_input_name in ("input_values", "input_features")
    }
    assert table == set(NAMES) - {"HubertModel", "HubertForCTC", "Wav2Vec2Model", "Wav2Vec2ForCTC"}


# ------------------------------------------------------------------- padding

LENGTHS = (64, 41)
MIXED = ("Data2Vec", "SEW")
ALONE = [n for n in ENCODERS if not n.startswith(MIXED) and not n.endswith("ForXVector")]


def padded(model: Any) -> tuple[Tensor, Tensor]:
    """Two sounds of unlike length, and their mask."""
    values = sounds(model)["input_values"]
    mask = torch.ones_like(values, dtype=torch.long)
    values[1, LENGTHS[1] :], mask[1, LENGTHS[1] :] = 0.0, 0
    return values, mask


@pytest.mark.parametrize("setting", ["layer", "stable"])
@pytest.mark.parametrize("name", ALONE)
def test_a_padded_sound_is_what_it_is_alone(name: str, setting: str) -> None:
    model = made(name, **SETTINGS[setting])
    values, mask = padded(model)
    with torch.no_grad():
        expected = output_of(model(values, attention_mask=mask))
    bridge = lenslrp.load(model)
    for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP()):
        logits, R = explain(bridge, composite, input_values=values, attention_mask=mask)
        if logits.shape == expected.shape:
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        _, A = explain(bridge, composite, input_values=values[1:, : LENGTHS[1]])
        frames = A.tokens.shape[1]
        assert R.attention_mask.sum(dim=1).tolist() == [R.tokens.shape[1], frames]
        torch.testing.assert_close(R.tokens[1:, :frames], A.tokens, rtol=1e-9, atol=1e-12)
        assert float(R.tokens[1, frames:].abs().max()) == 0
        given, its_own = R.inputs["input_values"], A.inputs["input_values"]
        torch.testing.assert_close(given[1:, : LENGTHS[1]], its_own, rtol=1e-9, atol=1e-12)
        assert abs(R.ledger().error) < TOLERANCE
        assert sum(A.ledger().table["error"].abs()) < 1e-8
    last = Logit(2, position=-1)
    if logits.ndim == 3 and "unembed" in dict(bridge.named_children()):
        _, R = explain(bridge, target=last, input_values=values, attention_mask=mask)
        _, A = explain(bridge, target=last, input_values=values[1:, : LENGTHS[1]])
        torch.testing.assert_close(R.target.value[1:], A.target.value)


@pytest.mark.parametrize(
    ("name", "setting", "why"),
    [
        ("HubertForCTC", "group", "normalises over the whole length of a sound"),
        ("Data2VecAudioForCTC", "layer", "convolves or pools frames"),
        ("SEWForSequenceClassification", "layer", "convolves or pools frames"),
        ("WavLMForXVector", "layer", "without their dilation"),
    ],
)
def test_padding_that_changes_a_row_is_refused(name: str, setting: str, why: str) -> None:
    model = made(name, **SETTINGS[setting])
    values, mask = padded(model)
    with torch.no_grad():
        together = output_of(model(values, attention_mask=mask))[1]
        alone = output_of(model(values[1:, : LENGTHS[1]]))[0]
    if alone.ndim == 2:
        together = together[: len(alone)]
    assert not torch.allclose(together, alone, rtol=1e-3, atol=1e-6)  # in transformers as well
    bridge = lenslrp.load(model)
    with pytest.raises(lenslrp.InputError, match=why):
        explain(bridge, input_values=values, attention_mask=mask)
    logits, _ = explain(bridge, input_values=values, attention_mask=torch.ones_like(mask))
    torch.testing.assert_close(logits[0], output_of(bridge.original_model(values))[0])


def test_an_adapter_behind_the_encoder_is_refused() -> None:
    sizes = {"output_hidden_size": 16, "adapter_kernel_size": 3}
    bridge = lenslrp.load(made("Wav2Vec2ForCTC", add_adapter=True, **sizes))
    with pytest.raises(lenslrp.InputError, match="fewer outputs than there are frames"):
        explain(bridge)


def test_masks_that_fit_no_sound_are_refused() -> None:
    bridge = lenslrp.load(made("HubertForSequenceClassification", **SETTINGS["layer"]))
    values, mask = padded(bridge.original_model)
    for wrong, why in (
        (mask.flip(1), "put the padding on the right"),
        (mask[:, 1:], r"does not fit input_values \[2, 64\]"),
        (torch.cat([mask[:, :3], mask[:, 3:] * 0], dim=1), "too short"),
    ):
        with pytest.raises(lenslrp.InputError, match=why):
            explain(bridge, input_values=values, attention_mask=wrong)
    whisper = lenslrp.load(made("WhisperForAudioClassification"))
    with pytest.raises(lenslrp.InputError, match="attention_mask goes with tokens"):
        explain(whisper, attention_mask=torch.ones(2, FRAMES).long())


# ------------------------------------------------------------------- sums over layers


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("HubertForSequenceClassification", "group"),
        ("Wav2Vec2ForAudioFrameClassification", "stable"),
        ("WavLMForSequenceClassification", "stable"),
        ("WhisperForAudioClassification", "group"),
    ],
)
def test_a_sum_over_layers_is_read_at_the_blocks(name: str, setting: str) -> None:
    """Hook points hold what the sum reads: their relevance is the total, an edit arrives."""
    model = made(name, use_weighted_layer_sum=True, **SETTINGS[setting])
    base = getattr(model, model.base_model_prefix, model)
    given = sounds(model)
    seen: list[Tensor] = []

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    layers = base.encoder.layers
    handles = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    handles += [
        layer.register_forward_hook(lambda _, args, out: seen.append(first(out)))
        for layer in layers
    ]
    expected = output_of(model(**given))
    for handle in handles:
        handle.remove()

    def doubled(_: Any, args: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    handle = layers[0].register_forward_hook(doubled)
    layers[0]._forward_hooks.move_to_end(handle.id, last=False)  # before transformers' own
    with torch.no_grad():
        edited = output_of(model(**given))
    handle.remove()
    bridge = lenslrp.load(model)
    logits, R = explain(bridge)
    torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=TOLERANCE)
    assert abs(R.ledger().error) < TOLERANCE
    assert list(R.ledger().table.index) == ["all"]  # relevance leaves between the blocks
    assert R.coverage.ok
    stem = "encoder_blocks" if name.startswith("Whisper") else "blocks"
    with torch.no_grad():
        hooked = bridge.run_with_hooks(
            *given.values(), fwd_hooks=[(f"{stem}.0.hook_out", lambda x, hook: 2 * x)]
        )
    torch.testing.assert_close(hooked, edited, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(edited, expected, atol=1e-3)
    if name.startswith("WavLM"):  # no plain gradient, see below
        return
    started = expected[:, 1, 2] if expected.ndim == 3 else expected[:, 2]
    gradients = torch.autograd.grad(started.sum(), seen, allow_unused=True)
    _, G = explain(bridge, lenslrp.GradientTimesInput())
    hooks = [f"{stem}.0.hook_resid_pre", *(f"{stem}.{i}.hook_resid_post" for i in range(2))]
    for hook, x, g in zip(hooks, seen, gradients, strict=False):
        torch.testing.assert_close(G[hook], (x * g).detach(), rtol=1e-9, atol=1e-12)


def test_logits_at_the_target_alone_of_frames() -> None:
    """Which frame a position names is known when the pass has made them."""
    model = lenslrp.load(made("Wav2Vec2ForCTC"))
    given = sounds(model.original_model)
    wanted = Logit(3, position=-1)
    logits, R = lenslrp.run_with_relevance(model, target=wanted, **given)
    same, T = lenslrp.run_with_relevance(model, target=wanted, logits="target", **given)
    torch.testing.assert_close(same, logits)
    torch.testing.assert_close(T.tokens, R.tokens)
