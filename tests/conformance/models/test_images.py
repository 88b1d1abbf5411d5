"""Vision transformers and pairs of an image and a text tower, by derived adapters.

Each on tiny random weights in float64: the outputs of transformers, coverage, a ledger that closes,
relevance of pixels that is the gradient's where no rule changes it, all undone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp import media
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.structure import components
from lenslrp.models.images import image_models
from lenslrp.models.wrapped import agreement_of
from lenslrp.targets import Activation, Custom, Logit, Similarity
from tests.conformance.zoo import Widened
from tests.unit.tiny import changes, snapshot

IMAGE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
PAIR = {"text_config": TEXT, "vision_config": IMAGE}
BIASED = {**IMAGE, "use_relative_position_bias": True}

SETTINGS: dict[str, dict[str, Any]] = {
    "BeitForImageClassification": BIASED,
    "BeitModel": {**IMAGE, "use_absolute_position_embeddings": True, "use_mean_pooling": False},
    "CLIPForImageClassification": PAIR,
    "CLIPModel": {**PAIR, "projection_dim": 12},
    "CLIPTextModel": TEXT,
    "CLIPTextModelWithProjection": {**TEXT, "eos_token_id": 3, "projection_dim": 12},
    "CLIPVisionModel": IMAGE,
    "CLIPVisionModelWithProjection": {**IMAGE, "projection_dim": 12},
    "Data2VecVisionForImageClassification": BIASED,
    "Data2VecVisionModel": {**IMAGE, "use_shared_relative_position_bias": True},
    "Dinov2ForImageClassification": IMAGE,
    "Dinov2Model": {**IMAGE, "use_swiglu_ffn": True},
    "Dinov2WithRegistersForImageClassification": IMAGE,
    "Dinov2WithRegistersModel": {**IMAGE, "num_register_tokens": 2},
    "DINOv3ViTModel": {**IMAGE, "num_register_tokens": 2, "use_gated_mlp": True},
    "IJepaForImageClassification": IMAGE,
    "IJepaModel": IMAGE,
    "MetaClip2ForImageClassification": PAIR,
    "MetaClip2Model": {**PAIR, "projection_dim": 12},
    "MetaClip2TextModel": TEXT,
    "MetaClip2TextModelWithProjection": {**TEXT, "projection_dim": 12},
    "MetaClip2VisionModel": IMAGE,
    "MetaClip2VisionModelWithProjection": {**IMAGE, "projection_dim": 12},
    "SiglipForImageClassification": PAIR,
    "SiglipModel": PAIR,
    "SiglipTextModel": TEXT,
    "SiglipVisionModel": IMAGE,
    "SwinForImageClassification": {**SWIN, "use_absolute_embeddings": True},
    "SwinModel": {**SWIN, "num_heads": (2, 4)},
    "ViTMSNForImageClassification": IMAGE,
    "ViTMSNModel": IMAGE,
}
COMPOSITES: dict[str, Any] = {
    "AttnLRP": lenslrp.AttnLRP,
    "AttnLRPViT": lenslrp.AttnLRPViT,
    "CPLRP": lenslrp.CPLRP,
    "GradientTimesInput": lenslrp.GradientTimesInput,
}
TEXTS = [name for name in SETTINGS if "Text" in name]
PAIRS = ("CLIPModel", "MetaClip2Model", "SiglipModel")
POOLED = ("SiglipVisionModel", "SiglipModel")


def made(name: str, *, bias: bool = True, **more: Any) -> Any:
    """The model of transformers, the same at every call."""
    cls = getattr(hf, name)
    config = cls.config_class(**{**SETTINGS[name], **more}, attn_implementation="eager")
    if "Classification" in name:
        config.num_labels = 3
    model = cls(config).double().eval()
    generator = torch.Generator().manual_seed(3)
    for path, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.4
        scales = weight.ndim == 1 and not path.endswith("bias")
        weight.data = values + 0.7 if scales else values
        if not bias and path.endswith("bias"):
            weight.data.zero_()
    return model


@cache
def bridge(name: str) -> Any:
    return lenslrp.load(made(name))


def given(model: Any, rows: int = 2) -> dict[str, Any]:
    """What a model reads: an image, a text that ends with EOS, or both."""
    inner = model.original_model
    read = {} if "Text" in type(inner).__name__ else media.example(model, batch=rows)
    if not media.reads_no_text(model):
        config = getattr(inner.config, "text_config", inner.config)
        tokens = torch.randint(4, 39, (rows, 6), generator=torch.Generator().manual_seed(1))
        tokens[:, -1] = config.eos_token_id
        read["input"] = tokens
    return read


def last(model: Any) -> str:
    """The residual stream at the end of the last stack."""
    stack = [name for name in model.hook_dict if name.endswith("blocks.1.hook_resid_post")][-1]
    return str(stack)


def explain(model: Any, composite: Any = None, **options: Any) -> Any:
    if "target" not in options:
        latent = Activation(last(model), 5, 0)
        pair = media.is_pair(model.original_model)
        options["target"] = None if pair else 1 if media.head_of(model) else latent
    options.setdefault("names_filter", [])
    if "pixel_values" not in options and "input" not in options:
        options.update(given(model))
    return lenslrp.run_with_relevance(model, composite=composite, **options)


def own_output(model: Any, read: dict[str, Any]) -> Tensor:
    """What transformers gives for the same, by its own names."""
    output = model(**{{"input": "input_ids"}.get(name, name): x for name, x in read.items()})
    if "logits_per_image" in output:
        return output.logits_per_image.diagonal()[:, None]
    for name in ("logits", "image_embeds", "text_embeds"):
        if name in output:
            return output[name]
    return output.last_hidden_state


def test_every_family_is_here() -> None:
    assert set(SETTINGS) == {name for name in image_models({}) if hasattr(hf, name)}


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_are_those_of_transformers(name: str) -> None:
    model = made(name)
    read = given(bridge(name))
    with torch.no_grad():
        expected = own_output(model, read)
    logits, _ = explain(bridge(name))
    torch.testing.assert_close(logits, expected, rtol=0, atol=agreement_of(bridge(name)).tolerance)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", SETTINGS)
def test_covered(name: str, composite: str) -> None:
    """Forward identity, coverage, ledger, every hook readable or off the path, undo."""
    model = bridge(name)
    read = given(model)
    with torch.no_grad():
        plain = model(read.pop("input", None), return_type="logits", **read)
    before = snapshot(model)
    for leaves in ("pixels", "patches") if "Text" not in name else ("pixels",):
        logits, R = explain(model, COMPOSITES[composite](), names_filter=None, leaves=leaves)
        assert torch.equal(logits, plain)
        assert R.coverage.ok and R.coverage.uncovered == []
        assert abs(R.ledger().error) <= 5 * agreement_of(model).tolerance, str(R.ledger())
        found = {hook for hook in R if bool(torch.isfinite(R[hook]).all())}
        assert found | set(R.coverage.off_path) == set(hook_points(model, components(model)))
        assert float(R.tokens.abs().sum()) > 0
    assert changes(before, model) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_what_float32_rounds_is_all_that_is_missed(name: str) -> None:
    model = bridge(name)
    for composite in COMPOSITES.values():
        with Widened():
            _, R = explain(model, composite())
        assert abs(R.ledger().error) <= 1e-11, str(R.ledger())


@pytest.mark.parametrize("name", SETTINGS)
def test_cp_conserves_without_biases(name: str) -> None:
    """At the leaves and at every residual hook; of two towers each its own part."""
    model = lenslrp.load(made(name, bias=False))
    with Widened():
        _, R = explain(
            model,
            lenslrp.CPLRP(),
            names_filter=lambda hook: "hook_resid" in hook and hook != last(model),
        )
    target = float(R.target.value.sum())
    near = 1e-11 * max(1.0, abs(target))
    assert abs(R.ledger().leaves - target) <= near
    assert len(R.keys()) >= 5
    by_tower: dict[str, list[float]] = {}
    for hook in R:
        tower = hook.split("_")[0] if name in PAIRS else ""
        by_tower.setdefault(tower, []).append(float(R[hook].sum()))
    assert all(max(sums) - min(sums) <= near for sums in by_tower.values()), by_tower
    assert abs(sum(sums[0] for sums in by_tower.values()) - target) <= near, by_tower


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in TEXTS])
def test_plain_gradients_are_those_of_calculus(name: str) -> None:
    """Relevance of pixels, and of the text beside them, against a pass without any rule."""
    model = bridge(name)
    with Widened():
        _, R = explain(model, lenslrp.GradientTimesInput())
        read = given(model)
        pixels = read.pop("pixel_values").requires_grad_()
        kept: list[Tensor] = []
        point = model.hook_dict[last(model)]
        handle = point.register_forward_hook(lambda _, args, x: kept.append(x))
        logits = model(read.pop("input", None), pixel_values=pixels, return_type="logits")
        handle.remove()
        value = logits[:, 0 if name in PAIRS else 1] if media.head_of(model) else kept[-1][:, 0, 5]
        (g,) = torch.autograd.grad(value.sum(), pixels)
    torch.testing.assert_close(R.pixels, (pixels * g).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_are_independent(name: str) -> None:
    model = bridge(name)
    read = given(model)
    _, both = explain(model, names_filter=None, **read)
    for row in range(2):
        _, alone = explain(
            model, names_filter=None, **{k: x[row : row + 1] for k, x in read.items()}
        )
        for part in ("tokens", "positions", "special", "patches", "pixels", "patch_positions"):
            if getattr(both, part) is not None:
                torch.testing.assert_close(getattr(both, part)[row], getattr(alone, part)[0])
        assert set(both[row].keys()) == set(alone.keys())
        for hook in alone:
            torch.testing.assert_close(both[row][hook], alone[hook])
        torch.testing.assert_close(
            torch.tensor(both.heads(row).to_numpy()), torch.tensor(alone.heads().to_numpy()),
            equal_nan=True,
        )  # fmt: skip


# ------------------------------------------------------------------- rules, by explicit passes


@pytest.mark.parametrize("composite", [lenslrp.AttnLRP, lenslrp.CPLRP])
@pytest.mark.parametrize("name", PAIRS)
def test_image_and_text_share_their_similarity(name: str, composite: Any) -> None:
    """At each number of an embedding: half of what the two numbers give to the scaled cosine."""
    model = bridge(name)
    hooks = ["visual_projection.hook_out", "text_projection.hook_out"]
    if name == "SiglipModel":
        hooks = ["vision_pooler.hook_out", "text_pooler.hook_out"]
    seen: dict[str, Tensor] = {}
    handles = [
        model.hook_dict[hook].register_forward_hook(
            lambda _, args, x, hook=hook: seen.__setitem__(hook, x.detach())
        )
        for hook in hooks
    ]
    _, R = explain(model, composite(), names_filter=hooks)
    for handle in handles:
        handle.remove()
    image, text = (seen[hook] for hook in hooks)
    scale = float(model.original_model.logit_scale.detach().exp())
    for row in range(2):
        lengths = float(image[row].pow(2).sum().sqrt()), float(text[row].pow(2).sum().sqrt())
        for i in range(image.shape[1]):
            product = scale * (image[row, i] / lengths[0]) * (text[row, i] / lengths[1])
            for hook in hooks:
                torch.testing.assert_close(R[hook][row, i], product / 2, rtol=1e-9, atol=1e-12)
    shared = sum(float(R[hook].sum()) for hook in hooks)
    constant = float(getattr(model.original_model, "logit_bias", torch.zeros(1)).detach())
    assert shared + 2 * constant == pytest.approx(float(R.target.value.sum()), rel=1e-9)


@pytest.mark.parametrize("composite", ["AttnLRP", "CPLRP"])
def test_attention_pooling_by_an_explicit_pass(composite: str) -> None:
    """Keys get all of the scores' relevance, whose queries are a weight; values half, or all."""
    model = bridge("SiglipVisionModel")
    names = ["pooler.attn.hook_k", "pooler.attn.hook_v", "pooler.attn.hook_z"]
    seen: dict[str, Tensor] = {}
    handles = [
        model.hook_dict[hook].register_forward_hook(
            lambda _, args, x, hook=hook: seen.__setitem__(hook, x.detach())
        )
        for hook in (*names[:2], "pooler.attn.hook_q")
    ]
    target = Activation("pooler.attn.hook_out", 3)
    _, R = explain(
        model, COMPOSITES[composite](), names_filter=lambda hook: hook in names, target=target
    )
    for handle in handles:
        handle.remove()
    q, k, v = (seen[f"pooler.attn.hook_{key}"].unflatten(-1, (2, 8)) for key in "qkv")
    weight = model.original_model.head.attention.out_proj.weight[3].detach().unflatten(0, (2, 8))
    half = 0.5 if composite == "AttnLRP" else 1.0
    for row in range(2):
        for head in range(2):
            scores = [float(q[row, 0, head] @ k[row, j, head]) / 8**0.5 for j in range(4)]
            pattern = torch.tensor(scores, dtype=torch.float64).softmax(0)
            to_pattern = [float(v[row, j, head] @ weight[head]) for j in range(4)]
            for j in range(4):
                at_value = half * pattern[j] * v[row, j, head] * weight[head]
                torch.testing.assert_close(R[names[1]][row, j, head], at_value)
                at_key = torch.zeros(8, dtype=torch.float64)
                if composite == "AttnLRP":
                    slope = sum(
                        0.5 * to_pattern[i] * float(pattern[i]) * ((i == j) - float(pattern[j]))
                        for i in range(4)
                    )
                    at_key = slope * q[row, 0, head] / 8**0.5 * k[row, j, head]
                    torch.testing.assert_close(R[names[0]][row, j, head], at_key)
    assert ("pooler.attn.hook_k" in R) == (composite == "AttnLRP")


def test_attention_pooling_is_saved_as_it_was(tmp_path: Any) -> None:
    model = made("SiglipVisionModel")
    names = set(model.state_dict())
    loaded = lenslrp.load(model)
    loaded.original_model.save_pretrained(tmp_path)
    again = hf.SiglipVisionModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert set(again.state_dict()) == names
    pixels = media.example(loaded)["pixel_values"]
    with torch.no_grad():
        expected = made("SiglipVisionModel")(pixels).pooler_output
        torch.testing.assert_close(again.eval()(pixels).pooler_output, expected)


# ------------------------------------------------------------------- texts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*TEXTS, *PAIRS])
def test_padded_texts_are_as_they_are_alone(name: str, side: str) -> None:
    """In float32: in float64 transformers' softmax is NaN where a token sees nothing else."""
    model = lenslrp.load(made(name).float())
    read = {key: x if x.dtype is torch.long else x.float() for key, x in given(model).items()}
    tokens, mask = read["input"], torch.ones(2, 6, dtype=torch.long)
    end = int(tokens[0, -1])
    row = [7, 9, end]
    columns = slice(3, 6) if side == "left" else slice(0, 3)
    tokens[1], mask[1] = end, 0
    tokens[1, columns], mask[1, columns] = torch.tensor(row), 1
    target = Custom(lambda output: output.flatten(1)[:, -1])
    if media.is_pair(model.original_model):
        target = Logit("similarity")
    elif "Projection" not in name:
        target = Activation(last(model), 5, -1)
    if name.startswith("Siglip") and side == "right":
        with pytest.raises(lenslrp.InputError, match="reads a text at its last column"):
            explain(model, target=target, attention_mask=mask, **read)
        return
    logits, R = explain(model, target=target, attention_mask=mask, **read)
    apart = {key: x[1:] for key, x in read.items()}
    apart["input"] = torch.tensor([row])
    expected, alone = explain(model, target=target, **apart)
    if logits.ndim == 2:
        torch.testing.assert_close(logits[1], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(R.tokens[1, columns], alone.tokens[0], rtol=1e-3, atol=1e-4)
    assert float(R.tokens[1][mask[1] == 0].abs().max()) == 0
    if R.patches is not None:
        torch.testing.assert_close(R.patches[1], alone.patches[0], rtol=1e-3, atol=1e-4)
    assert R[1].str_tokens == alone.str_tokens


def test_a_text_without_its_end_is_pooled_as_it_is_alone() -> None:
    """CLIP finds no EOS and takes the first token, also where padding is made of EOS."""
    model = bridge("CLIPTextModelWithProjection")
    tokens, mask = torch.tensor([[5, 6, 7, 3], [5, 6, 3, 3]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
    target = Custom(lambda output: output[:, 4])
    logits, R = explain(model, input=tokens, target=target, attention_mask=mask)
    expected, alone = explain(model, input=tokens[1:, :2], target=target)
    torch.testing.assert_close(logits[1:], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(R.tokens[1:, :2], alone.tokens, rtol=0, atol=1e-6)


# ------------------------------------------------------------------- what is read, and named


def test_each_text_has_its_image() -> None:
    model = bridge("CLIPModel")
    read = given(model)
    with pytest.raises(lenslrp.InputError, match=r"there are 1 images .* and 2 texts; repeat"):
        explain(model, input=read["input"], pixel_values=read["pixel_values"][:1])
    with pytest.raises(lenslrp.InputError, match="there are 0 images"):
        explain(model, input=read["input"])
    _, R = explain(model, target="similarity", names_filter=None, **read)
    assert str(R.target).startswith("logit of 'similarity' = ")
    assert R.tokens.shape == (2, 6) and R.patches.shape == (2, 2, 2)
    assert set(R.to_dataframe()["side"]) == {"text", "image"}


def test_tables_name_the_stack_where_there_are_several() -> None:
    _, R = explain(bridge("CLIPModel"), names_filter=None)
    blocks = [f"{tower}_blocks.{layer}" for tower in ("vision", "text") for layer in (0, 1)]
    assert list(R.heads().index) == blocks
    assert list(R.residual().index) == [*blocks, "vision_blocks.final", "text_blocks.final"]
    for name in blocks:
        torch.testing.assert_close(
            R.residual().loc[name].dropna().to_list(),
            R[f"{name}.hook_resid_pre"][0].sum(-1).tolist(),
        )
    assert set(R.top(k=1000)["stack"]) == {"vision_blocks", "text_blocks"}
    best = R.top(k=1).iloc[0]
    hook = f"{best.stack}.{best.layer}.mlp.hook_post"
    assert R[hook][0, best.position, best.neuron] == pytest.approx(best.relevance)


def test_heads_of_windows_are_summed() -> None:
    _, R = explain(bridge("SwinModel"), names_filter=None)
    z = R["stage0_blocks.1.attn.hook_z"]  # 4 windows of 4 x 4 patches for each of two images
    assert z.shape == (8, 16, 2, 4)
    for row in range(2):
        expected = z[4 * row : 4 * row + 4].sum(dim=(0, 1, 3)).tolist()
        assert R.heads(row).loc["stage0_blocks.1"].dropna().to_list() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"])
@pytest.mark.parametrize("leaves", media.LEAVES)
def test_images_of_another_size(name: str, leaves: str) -> None:
    """Positions are interpolated: the leaves are those that were added, one for each token."""
    model = bridge(name)
    pixels = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        expected = made(name)(pixels).last_hidden_state
    for composite in (lenslrp.AttnLRP(), lenslrp.AttnLRPViT()):
        logits, R = explain(model, composite, pixel_values=pixels, leaves=leaves)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
        assert abs(R.ledger().error) <= 1e-9
        assert R.patches.shape == (2, 3, 4)
        assert R.positions is None or R.positions.shape == R.tokens.shape
        _, alone = explain(model, composite, pixel_values=pixels[1:], leaves=leaves)
        torch.testing.assert_close(R.tokens[1], alone.tokens[0])
    assert "interpolate_pos_encoding" not in vars(model.embed.original_component)


def test_registers_have_no_position() -> None:
    model = bridge("Dinov2WithRegistersModel")
    _, R = explain(model)
    assert R.str_tokens[0] == ["[CLS]", "[REG]", "[REG]", "0,0", "0,1", "1,0", "1,1"]
    assert R.positions[:, 1:3].abs().max() == 0
    assert float(R.positions[:, [0, 3, 4, 5, 6]].abs().min()) > 0
    at_leaves = R.pixels.sum() + R.special.sum() + R.positions.sum()
    assert float(at_leaves) == pytest.approx(R.ledger().leaves)


def test_an_image_of_a_size_that_is_not_read_is_refused() -> None:
    with pytest.raises(lenslrp.InputError, match=r"height=8, width=8\], not \[1, 3, 12, 12\]"):
        explain(bridge("CLIPVisionModel"), pixel_values=torch.zeros(1, 3, 12, 12).double())


def test_an_embedding_has_no_logits() -> None:
    model = bridge("CLIPVisionModelWithProjection")
    with pytest.raises(lenslrp.InputError, match="hidden states or an embedding, not logits"):
        explain(model, target=3)
    direction = torch.randn(12, generator=torch.Generator().manual_seed(2)).double()
    _, R = explain(model, target=Custom(lambda embedding: embedding @ direction, "direction"))
    assert abs(R.ledger().error) <= 1e-6


def test_two_images_are_compared_by_their_hidden_states() -> None:
    model = bridge("Dinov2Model")
    pixels = media.example(model, batch=2)["pixel_values"]
    with torch.no_grad():
        first, second = made("Dinov2Model")(pixels).last_hidden_state[:, 0]
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    _, R = explain(model, target=Similarity(pooling="cls"), pixel_values=pixels)
    assert R.target.value.tolist() == pytest.approx([cosine, cosine])
    assert abs(R.ledger().error) <= 1e-9
    vector = lenslrp.embed(model, pooling="cls", pixel_values=pixels)[1]
    _, one = explain(model, target=Similarity(vector, "cls"), pixel_values=pixels[:1])
    torch.testing.assert_close(one.pixels[0], R.pixels[0])
    with pytest.raises(lenslrp.InputError, match=r"the output is \[2, 12\]: no hidden states"):
        explain(bridge("CLIPTextModelWithProjection"), target=Similarity(pooling="cls"))


def test_what_computes_by_a_kernel_is_refused() -> None:
    config = hf.Data2VecVisionConfig(**IMAGE, attn_implementation="sdpa")
    with pytest.raises(lenslrp.LoadError, match="Data2VecVisionSdpaSelfAttention runs a fused"):
        lenslrp.load(hf.Data2VecVisionModel(config).eval())


@pytest.mark.parametrize("name", ["Swinv2Model", "Siglip2Model", "ViTMAEModel", "ConvNextModel"])
def test_other_families_are_refused_by_name(name: str) -> None:
    cls = getattr(hf, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    with pytest.raises(lenslrp.LoadError, match=f"no adapter for {name}"):
        lenslrp.load(model)
