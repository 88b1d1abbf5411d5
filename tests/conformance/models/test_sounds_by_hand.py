"""AttnLRP of Whisper and of WavLM by an explicit float64 pass over the weights of transformers.

A surrogate with the model's values whose plain gradient is the rules' (Achtibat et al. 2024, Eq. 8
to 19): activations are a constant slope, denominators of norms constants, each factor of a product
sees the other as a constant and gets half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import lenslrp
from lenslrp.targets import Logit
from tests.conformance.models.test_sounds import MEL, WRITTEN, made, sounds

HEADS = 2
Weights = dict[str, Tensor]


def linear(w: Weights, path: str, x: Tensor) -> Tensor:
    y = torch.einsum("bti,oi->bto", x, w[f"{path}.weight"])
    return y + w[f"{path}.bias"] if f"{path}.bias" in w else y


def act(x: Tensor) -> Tensor:
    return x * (functional.gelu(x) / x).detach()


def norm(w: Weights, path: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt().detach()
    return centred / scale * w[f"{path}.weight"] + w[f"{path}.bias"]


def half(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    return (function(a, b.detach()) + function(a.detach(), b)) / 2


def convolve(w: Weights, path: str, x: Tensor, step: int, pad: int = 0) -> Tensor:
    """[batch, channel, place], window by window."""
    kernel, x = w[f"{path}.weight"], functional.pad(x, (pad, pad))
    size = kernel.shape[-1]
    windows = [x[..., i : i + size] for i in range(0, x.shape[-1] - size + 1, step)]
    y = torch.stack([torch.einsum("bck,ock->bo", window, kernel) for window in windows], dim=-1)
    return y + w[f"{path}.bias"][:, None] if f"{path}.bias" in w else y


def attend(
    w: Weights, path: str, x: Tensor, read: Tensor | None = None, constant: Any = 0.0
) -> Tensor:
    """Attention with a constant added to its scores; ``read``: what keys and values are of."""
    read = x if read is None else read
    given = (("q_proj", x), ("k_proj", read), ("v_proj", read))
    q, k, v = (
        linear(w, f"{path}.{name}", of).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name, of in given
    )
    scores = half(lambda a, b: a @ b.transpose(2, 3), q, k) / q.shape[-1] ** 0.5
    pattern = torch.softmax(scores + constant, dim=-1)
    z = half(torch.matmul, pattern, v)
    return linear(w, f"{path}.out_proj", z.transpose(1, 2).flatten(2))


def mlp(w: Weights, path: str, x: Tensor) -> Tensor:
    return linear(w, f"{path}.fc2", act(linear(w, f"{path}.fc1", x)))


def stack(w: Weights, side: str, x: Tensor, read: Tensor | None = None, mask: Any = 0.0) -> Tensor:
    for layer in range(len({key.split(".")[3] for key in w if key.startswith(f"{side}.layers")})):
        path = f"{side}.layers.{layer}"
        x = x + attend(
            w, f"{path}.self_attn", norm(w, f"{path}.self_attn_layer_norm", x), None, mask
        )
        if read is not None:
            q = norm(w, f"{path}.encoder_attn_layer_norm", x)
            x = x + attend(w, f"{path}.encoder_attn", q, read)
        x = x + mlp(w, path, norm(w, f"{path}.final_layer_norm", x))
    return norm(w, f"{side}.layer_norm", x)


def test_whisper() -> None:
    model = made("WhisperForConditionalGeneration")
    w: Weights = {key: value.clone() for key, value in model.state_dict().items()}
    spectrogram = sounds(model)["input_features"].requires_grad_()
    assert spectrogram.shape[1] == MEL
    batch, length = WRITTEN.shape
    rows = w["model.decoder.embed_tokens.weight"][WRITTEN].clone().requires_grad_()
    heard = w["model.encoder.embed_positions.weight"].expand(batch, -1, -1).clone()
    places = w["model.decoder.embed_positions.weight"][:length].expand(batch, -1, -1).clone()
    heard.requires_grad_(), places.requires_grad_()
    x = act(convolve(w, "model.encoder.conv1", spectrogram, 1, 1))
    frames = convolve(w, "model.encoder.conv2", x, 2, 1)
    frames.retain_grad()
    read = stack(w, "model.encoder", act(frames).transpose(1, 2) + heard)
    future = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    out = stack(w, "model.decoder", rows + places, read, future)
    logits = out @ w["proj_out.weight"].T
    logits[:, 1, 2].sum().backward()

    _, R = lenslrp.run_with_relevance(
        lenslrp.load(model), input_features=sounds(model)["input_features"],
        decoder_input=WRITTEN, target=Logit(2, position=1),
    )  # fmt: skip
    torch.testing.assert_close(R.target.value, logits[:, 1, 2].detach(), rtol=1e-9, atol=1e-12)
    pairs = (
        (R.inputs["input_features"], spectrogram, False),
        (R.tokens, frames.transpose(1, 2), True),
        (R.positions, heard, True),
        (R.decoder_tokens, rows, True),
        (R.decoder_positions, places, True),
    )
    for found, leaf, summed in pairs:
        gradient = leaf.grad if leaf is not pairs[1][1] else frames.grad.transpose(1, 2)
        expected = (leaf * gradient).detach()
        expected = expected.sum(dim=-1) if summed else expected
        assert float(expected.abs().max()) > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def encode(w: Weights, model: Any, wave: Tensor, bias: Callable[[int, Tensor], Any]) -> Tensor:
    """The hidden states of a speech encoder; ``bias``: what a layer adds to its scores."""
    family = model.base_model_prefix
    convolution = getattr(model, family).encoder.pos_conv_embed.conv
    x = wave[:, None]
    for layer in range(2):
        path = f"{family}.feature_extractor.conv_layers.{layer}"
        x = convolve(w, f"{path}.conv", x, 2).transpose(1, 2)
        x = act(norm(w, f"{path}.layer_norm", x)).transpose(1, 2)
    frames = norm(w, f"{family}.feature_projection.layer_norm", x.transpose(1, 2))
    frames = linear(w, f"{family}.feature_projection.projection", frames)
    places = functional.conv1d(
        frames.transpose(1, 2), convolution.weight.detach(), convolution.bias.detach(),
        padding=convolution.padding[0], groups=convolution.groups,
    )[..., :-1]  # fmt: skip
    x = norm(w, f"{family}.encoder.layer_norm", frames + act(places).transpose(1, 2))
    for layer in range(2):
        path = f"{family}.encoder.layers.{layer}"
        x = x + attend(w, f"{path}.attention", x, None, bias(layer, x))
        x = norm(w, f"{path}.layer_norm", x)
        inside = act(linear(w, f"{path}.feed_forward.intermediate_dense", x))
        x = x + linear(w, f"{path}.feed_forward.output_dense", inside)
        x = norm(w, f"{path}.final_layer_norm", x)
    return x


def compare(model: Any, wave: Tensor, logits: Tensor) -> Any:
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), wave)
    expected = (wave * gradient).detach()
    _, R = lenslrp.run_with_relevance(lenslrp.load(model), input_values=wave.detach(), target=2)
    torch.testing.assert_close(R.target.value, logits[:, 2].detach(), rtol=1e-9, atol=1e-12)
    assert float(expected.abs().max()) > 1e-6
    torch.testing.assert_close(R.inputs["input_values"], expected, rtol=1e-9, atol=1e-12)
    return R


def test_wavlm() -> None:
    """Its gates are constants; the bias that they scale takes what is added to the scores."""
    model = made("WavLMForSequenceClassification", feat_extract_norm="layer", conv_bias=True)
    w: Weights = {key: value.clone() for key, value in model.state_dict().items()}
    first = model.wavlm.encoder.layers[0].attention

    def bias(layer: int, x: Tensor) -> Tensor:
        path = f"wavlm.encoder.layers.{layer}.attention"
        heads = x.detach().unflatten(-1, (HEADS, -1)).transpose(1, 2)
        name = f"{path}.gru_rel_pos_linear"
        sums = heads @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        a, b = torch.sigmoid(sums.unflatten(-1, (2, 4)).sum(dim=-1)).split(1, dim=-1)
        gate = a * (b * w[f"{path}.gru_rel_pos_const"] - 1) + 2
        return gate * first.compute_bias(x.shape[1], x.shape[1]).detach()

    wave = sounds(model)["input_values"].requires_grad_()
    x = encode(w, model, wave, bias)
    pooled = linear(w, "projector", x).mean(dim=1, keepdim=True)
    R = compare(model, wave, linear(w, "classifier", pooled)[:, 0])
    assert abs(R.ledger().positional) > 1e-9


def test_a_speaker_vector() -> None:
    """Pooling by mean and standard deviation: ``y = sum c c / ((n - 1) y)``, half to each c."""
    model = made("Wav2Vec2ForXVector", feat_extract_norm="layer", conv_bias=True)
    w: Weights = {key: value.clone() for key, value in model.state_dict().items()}
    wave = sounds(model)["input_values"].requires_grad_()
    x = linear(w, "projector", encode(w, model, wave, lambda layer, x: 0.0))
    for layer, (size, spread) in enumerate(((3, 1), (2, 2))):
        windows = [x[:, i * spread : x.shape[1] - (size - 1 - i) * spread] for i in range(size)]
        y = linear(w, f"tdnn.{layer}.kernel", torch.cat(windows, dim=-1))
        x = y * (y > 0)
    centred = x - x.mean(dim=1, keepdim=True)
    squares = half(torch.mul, centred, centred).sum(dim=1)
    constant = (x.shape[1] - 1) * x.std(dim=1).detach()
    deviation = squares / constant.clamp_min(1e-300)  # a channel that is nowhere active has none
    pooled = torch.cat([x.mean(dim=1), deviation], dim=-1)[:, None]
    compare(model, wave, linear(w, "classifier", linear(w, "feature_extractor", pooled))[:, 0])
