"""Units: their hook, text, activation and vectors, and what they say when there is no such unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from lenslrp.analysis import (
    CrossLayerCoder,
    Direction,
    Feature,
    Head,
    Neuron,
    Scale,
    SparseCoder,
    mean_activation,
    mean_difference,
    parse_unit,
    reads,
    relevance_direction,
    steer,
    writes,
    written_by,
)
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.units.projection import cosines
from lenslrp.analysis.units.readers import FeatureReader, searched_hooks
from lenslrp.errors import InputError
from tests.conformance import zoo
from tests.unit.tiny import tiny

NAMES = {
    "LlamaForCausalLM": {
        Neuron(1, 3): "blocks.1.mlp.hook_post",
        Head(0, 1): "blocks.0.attn.hook_z",
    },
    "MixtralForCausalLM": {Neuron(1, 3, expert=2): "blocks.1.mlp.hook_expert_post"},
    "DeepseekV3ForCausalLM": {
        Neuron(1, 3, expert="shared"): "blocks.1.mlp.shared_experts.hook_post",
        Head(1, 1): "blocks.1.attn.hook_z",
    },
    "Qwen2MoeForCausalLM": {
        Neuron(1, 3, expert="shared"): "blocks.1.mlp.shared_expert.hook_post",
    },
    "T5ForConditionalGeneration": {
        Neuron(1, 3): "decoder_blocks.1.mlp.hook_post",
        Neuron(1, 3, side="encoder"): "encoder_blocks.1.mlp.hook_post",
        Head(1, 1): "decoder_blocks.1.self_attn.hook_z",
        Head(1, 1, cross=True): "decoder_blocks.1.cross_attn.hook_z",
        Head(1, 1, side="encoder"): "encoder_blocks.1.attn.hook_z",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_hooks_exist_and_texts_come_back(name: str) -> None:
    model = zoo.build(name)
    for unit, hook in NAMES[name].items():
        assert unit.hook(model) == hook
        assert hook in model.hook_dict or hook.endswith("hook_expert_post")
        assert parse_unit(str(unit)) == unit


def test_texts_can_be_copied() -> None:
    assert str(Neuron(5, 17)) == "blocks.5.mlp.hook_post[17]"
    assert str(Neuron(5, 17, expert=3)) == "blocks.5.mlp.hook_expert_post[3, 17]"
    assert str(Head(5, 2)) == "blocks.5.attn.hook_z[2]"
    assert parse_unit("decoder_blocks.5.self_attn.hook_z[2]") == Head(5, 2)
    assert (parse_unit("N5.17"), parse_unit("H5.2")) == (Neuron(5, 17), Head(5, 2))
    vector = torch.tensor([1.0, 2.0])
    assert str(Direction("blocks.0.hook_resid_post", vector, "joy")).endswith("[direction joy]")
    text = str(Direction("blocks.0.hook_resid_post", vector))
    assert text == str(Direction("blocks.0.hook_resid_post", vector.clone()))
    assert text != str(Direction("blocks.0.hook_resid_post", -vector))


@pytest.mark.parametrize(
    "text",
    ["", "blocks.5.mlp.hook_post", "blocks.x.mlp.hook_post[1]", "blocks.5.mlp.hook_post[-1]"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no neuron or head; expected, for example"):
        parse_unit(text)


@pytest.mark.parametrize(
    ("name", "unit", "message"),
    [
        ("LlamaForCausalLM", Neuron(2, 0), "layer is 2, but the model has layers 0 to 1"),
        ("LlamaForCausalLM", Neuron(-1, 0), "layer is -1"),
        ("LlamaForCausalLM", Neuron(0, 24), "neuron is 24, but layer 0 has neurons 0 to 23"),
        ("LlamaForCausalLM", Neuron(0, -1), "neuron is -1"),
        ("LlamaForCausalLM", Neuron(0, 0, expert=1), "no mixture of experts; leave expert out"),
        ("LlamaForCausalLM", Neuron(0, 0, side="encoder"), "this model has one stack"),
        ("LlamaForCausalLM", Head(0, 2), "head is 2, but layer 0 has heads 0 to 1"),
        ("LlamaForCausalLM", Head(0, 0, cross=True), "no cross-attention heads"),
        ("MixtralForCausalLM", Neuron(0, 0), "is a mixture of experts; give expert="),
        ("MixtralForCausalLM", Neuron(0, 0, expert=4), "expert is 4, but layer 0 has experts 0 to"),
        ("MixtralForCausalLM", Neuron(0, 24, expert=1), "neuron is 24, but layer 0"),
        ("MixtralForCausalLM", Neuron(0, 0, expert="shared"), "no shared expert"),
        ("LlamaForCausalLM", Direction("blocks.0.hook_resid", torch.ones(16)), "no hook point"),
    ],
)
def test_no_such_unit(name: str, unit: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unit.hook(zoo.build(name))


def test_activations_are_read_from_the_hooks_tensor() -> None:
    post = torch.randn(2, 5, 7)
    assert torch.equal(Neuron(0, 3).activation(post), post[..., 3])
    flat = post.view(10, 7)
    assert torch.equal(Neuron(0, 3).activation(flat), flat[:, 3])
    slots = torch.randn(2, 5, 2, 7)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1], [0, 3]]).expand(2, 5, 2)
    found = Neuron(0, 3, expert=1).activation(slots, chosen)
    assert torch.equal(found[0], torch.stack([slots[0, 0, 1, 3], slots[0, 1, 0, 3],
                                              torch.tensor(0.0), slots[0, 3, 1, 3],
                                              torch.tensor(0.0)]))  # fmt: skip
    with pytest.raises(InputError, match=r"needs \[batch, pos, slot, neuron\] and the routing"):
        Neuron(0, 3, expert=1).activation(slots)
    z = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(Head(0, 2).activation(z), z[:, :, 2].norm(dim=-1))
    with pytest.raises(InputError, match=r"hook_z is \[batch, pos, head, d_head\]"):
        Head(0, 3).activation(z)
    vector = torch.randn(7)
    torch.testing.assert_close(Direction("x", vector).activation(post), post @ vector)
    with pytest.raises(InputError, match="the direction has 7 components, x has 4"):
        Direction("x", vector).activation(z)


def coder(**changes: Any) -> SparseCoder:
    torch.manual_seed(0)
    weights = {"W_enc": torch.randn(16, 9), "b_enc": torch.randn(9), "W_dec": torch.randn(9, 16),
               "b_dec": torch.randn(16)}  # fmt: skip
    return SparseCoder("blocks.0.hook_resid_post", **{**weights, **changes})


def test_features_encode_as_their_coder_says() -> None:
    x = torch.randn(2, 5, 16)
    plain = coder()
    pre = x @ plain.W_enc + plain.b_enc
    torch.testing.assert_close(plain.encode(x), pre.relu())
    jump = coder(threshold=torch.full((9,), 0.7))
    torch.testing.assert_close(jump.encode(x), torch.where(pre > 0.7, pre, 0.0))
    few = coder(k=2).encode(x)
    assert int((few != 0).sum(dim=-1).max()) <= 2
    torch.testing.assert_close(few.amax(-1), pre.relu().amax(-1))
    centred = coder(subtract_b_dec=True)
    torch.testing.assert_close(
        centred.encode(x), ((x - plain.b_dec) @ plain.W_enc + plain.b_enc).relu()
    )
    torch.testing.assert_close(plain.decode(few), few @ plain.W_dec + plain.b_dec)
    assert torch.equal(Feature(plain, 4).activation(x), plain.encode(x)[..., 4])
    half = x.bfloat16()  # a model in half precision does not round the coder's weights
    assert torch.equal(jump.encode(half), jump.encode(half.float()))
    assert jump.moved(half, 4, torch.ones(2, 5)).dtype == torch.bfloat16


def test_coders_write_with_their_skip_and_their_scale() -> None:
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    W = {n: getattr(coder(), n).double() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    skip = torch.randn(16, 16, dtype=torch.float64)
    transcoder = coder(W_skip=skip, hook_out="blocks.0.hook_mlp_out")
    written = (x @ W["W_enc"] + W["b_enc"]).relu() @ W["W_dec"] + W["b_dec"] + x @ skip
    torch.testing.assert_close(transcoder.reconstruct(x), written)
    assert not transcoder.writes_back and coder().writes_back
    with pytest.raises(InputError, match="has a skip connection or a normalization: give x"):
        transcoder.decode(transcoder.encode(x))
    scale = x.square().mean(dim=-1, keepdim=True).sqrt()
    rescaled = coder(normalization="constant_norm_rescale")
    a = (x / scale @ W["W_enc"] + W["b_enc"]).relu()
    torch.testing.assert_close(rescaled.encode(x), a)
    torch.testing.assert_close(rescaled.decode(a, x), scale * (a @ W["W_dec"] + W["b_dec"]))
    z = x.unflatten(-1, (4, 4))
    torch.testing.assert_close(coder(heads="all").reconstruct(z), coder().reconstruct(x))
    with pytest.raises(InputError, match="sae reads head 4, blocks.0.hook_resid_post has 4"):
        coder(heads=4).encode(z)
    with pytest.raises(InputError, match="W_skip is of transcoders: give hook_out"):
        coder(W_skip=skip)
    with pytest.raises(InputError, match="normalization is 'l2', expected one of none, constant"):
        coder(normalization="l2")


def test_a_feature_is_searched_with_its_coders_scale() -> None:
    x, g = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    marks = set()
    for changes in ({}, {"normalization": "layer_norm"}, {"subtract_b_dec": True}, {"k": 2}):
        one = coder(**changes)
        [site] = searched_hooks(one)
        scale = x.std(dim=-1, keepdim=True) if "normalization" in changes else 1.0
        expected = scale * one.encode(x) * (g @ one.W_dec.T)
        reader = cast(FeatureReader, site.reader)
        written = reader.written(reader.activation(x), x)
        torch.testing.assert_close(reader.relevance(written, g), expected)
        marks.add(site.fingerprint)
    assert len(marks) == 4  # a search is not resumed with another function of the same weights


def test_a_feature_reads_its_encoder_and_writes_its_decoder() -> None:
    model, feature = zoo.build("LlamaForCausalLM"), Feature(coder(), 4)
    assert feature.hook(model) == "blocks.0.hook_resid_post"
    assert str(feature) == "blocks.0.hook_resid_post[sae 4]"
    assert torch.equal(feature.reads(model)["in"][0], feature.coder.W_enc[:, 4])
    assert torch.equal(feature.writes(model)["out"][0], feature.coder.W_dec[4])
    with pytest.raises(
        InputError, match="is of heads' values, which are not the residual stream's"
    ):
        Feature(coder(heads="all"), 4).writes(model)
    with pytest.raises(InputError, match="feature is 9, but sae has 0 to 8"):
        Feature(coder(), 9)


def test_coders_load_from_safetensors_only(tmp_path: Any) -> None:
    own = coder(threshold=torch.rand(9))
    tensors = {n: getattr(own, n) for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    save_file(tensors, tmp_path / "sae.safetensors")
    found = SparseCoder.load(tmp_path / "sae.safetensors", hook="blocks.0.hook_resid_post")
    assert all(torch.equal(getattr(found, n), t) for n, t in tensors.items())
    torch.save(tensors, tmp_path / "pickle.safetensors")
    with pytest.raises(InputError, match="is not a safetensors file"):
        SparseCoder.load(tmp_path / "pickle.safetensors", hook="x")
    save_file({"W_enc": own.W_enc}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="has no b_enc, W_dec, b_dec; it holds W_enc"):
        SparseCoder.load(tmp_path / "part.safetensors", hook="x")
    with pytest.raises(InputError, match="no file"):
        SparseCoder.load(tmp_path / "none.safetensors", hook="x")
    save_file({**tensors, "b_enc": torch.zeros(8)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"b_enc is \[8\], expected \[9\]"):
        SparseCoder.load(tmp_path / "odd.safetensors", hook="x")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [Node("blocks.1.attn.hook_z", 0, -1), "blocks.1.attn.hook_z[0]"])
@pytest.mark.parametrize(
    "call",
    [
        writes,
        reads,
        cosines,
        written_by,
        lambda model, unit: mean_activation(model, unit, ["a b"]),
        lambda model, unit: steer(model, Scale(unit, 0.0)).__enter__(),
    ],
)
def test_what_is_no_unit_is_named(call: Any, given: Any) -> None:
    with pytest.raises(InputError) as error:
        call(zoo.build("LlamaForCausalLM"), given)
    assert str(error.value) == (
        f"{given!r} is no unit, such as Neuron(5, 17) or Head(5, 2): parse_unit(text) makes one of "
        "a text, and node.as_unit() of a node"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "example"), [(1, "blocks.1.hook_resid_post"), (None, r"blocks.\d.hook_resid_p")]
)
def test_a_hook_point_has_a_name_and_not_a_number(given: Any, example: str) -> None:
    model = zoo.build("LlamaForCausalLM")
    for call in (
        lambda: mean_difference(model, ["a"], ["b"], given),
        lambda: relevance_direction(model, ["a"], ["b"], given),
        lambda: Direction(given, torch.ones(3)).hook(model),
    ):
        with pytest.raises(
            InputError, match=f"^{given} is not the name of a hook point, such as {example}"
        ):
            call()


def test_texts_are_a_list() -> None:
    model, stream = zoo.build("LlamaForCausalLM"), "blocks.1.hook_resid_post"
    with pytest.raises(InputError, match="texts and targets are lists, with one target for each"):
        relevance_direction(model, "abc", "def", stream)
    with pytest.raises(InputError, match="give a list of texts, at least one"):
        mean_difference(model, "abc", "def", stream)


def test_coders_read_what_they_need_from_a_cache() -> None:
    model, tokens = tiny(), torch.tensor([[3, 17, 5, 8], [2, 9, 2, 21]])
    outs = [f"blocks.{i}.hook_mlp_out" for i in range(2)]
    draw = torch.Generator().manual_seed(0)
    layers = [
        SparseCoder(
            f"blocks.{i}.mlp.hook_in", torch.randn(16, 30, generator=draw), torch.zeros(30),
            torch.randn(30, 16, generator=draw), torch.zeros(16), hook_out=out, name=f"clt {i}",
            later={later: torch.randn(30, 16, generator=draw) for later in outs[i + 1 :]},
        )
        for i, out in enumerate(outs)
    ]  # fmt: skip
    one, across = (
        replace(layers[0], later={}, normalization="layer_norm"),
        CrossLayerCoder((*layers,)),
    )
    for as_object in (True, False):
        _, cache = model.run_with_cache(tokens, return_cache_object=as_object)
        x = cache[one.hook]
        assert torch.equal(one.encode(cache), one.encode(x))
        assert torch.equal(one.reconstruct(cache), one.reconstruct(x))
        read = [cache[layer.hook] for layer in layers]
        for found, expected in (
            (across.encode(cache), across.encode(read)),
            (across.reconstruct(cache), across.reconstruct(read)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    table, a = one.top(cache, 5, row=1), one.encode(x)[1]
    assert list(table["activation"]) == a.flatten().topk(5).values.tolist()
    for row in table.itertuples():
        assert float(a[row.position, row.feature]) == row.activation
    assert len(one.top(cache, 10**6)) == int((one.encode(x)[0] > 0).sum())
    _, cache = model.run_with_cache(tokens, names_filter=outs)
    with pytest.raises(InputError, match="does not hold blocks.0.mlp.hook_in, which clt 0 reads"):
        one.encode(cache)
