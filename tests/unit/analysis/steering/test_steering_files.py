"""Directions by their definitions; steering and control vectors come back from files as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lenslrp
from lenslrp.analysis.steering.directions import (
    mean_activation,
    mean_difference,
    relevance_direction,
    states,
    unembedding_direction,
    written_by,
)
from lenslrp.analysis.steering.files import (
    load_control_vector,
    load_steering,
    save_control_vector,
    save_steering,
    steering_from_json,
    steering_to_json,
)
from lenslrp.analysis.steering.operations import (
    Ablate,
    Add,
    Clamp,
    ProjectOut,
    Scale,
    Steering,
    steer,
)
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Direction, Feature, Head, Neuron
from lenslrp.errors import InputError, StorageError
from tests.unit.tiny import TOKENS, tiny, word_tokenizer

STREAM = "blocks.0.hook_resid_post"
LAST = "blocks.1.hook_resid_post"


def direction(at: str = STREAM, name: str | None = None, seed: int = 0) -> Direction:
    return Direction(at, torch.randn(16, generator=torch.Generator().manual_seed(seed)), name)


def everything() -> Steering:
    return Steering(
        (
            Scale(Neuron(1, 3), 0.5, rows=(0,)),
            Scale(Neuron(1, 3, expert="shared"), 0.5),
            Ablate(Head(0, 1), 0.25, prompt=(0, -1)),
            Add(direction(), 4.0, units="resid_rms", generation="none"),
            Clamp(direction(name="glad"), low=-1.0),
            ProjectOut((direction(seed=1), direction(seed=2))),
        ),
        prompt=(-1,),
        generation=(0, 2),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Direction):
        return (a.at, a.name) == (b.at, b.name) and torch.equal(a.vector, b.vector)
    if isinstance(a, tuple) and a and not isinstance(a[0], int | str):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__module__.endswith("steering.operations"):
        return type(a) is type(b) and all(same(vars(a)[key], vars(b)[key]) for key in vars(a))
    return bool(a == b)


def test_json_and_safetensors_bring_everything_back(tmp_path: Path) -> None:
    told = everything()
    text, vectors = steering_to_json(told)
    assert same(steering_from_json(text, vectors), told)
    path = save_steering(told, tmp_path / "glad.json")
    assert {file.name for file in tmp_path.iterdir()} == {"glad.json", "glad.safetensors"}
    assert same(load_steering(path), told)
    model = tiny()
    some = Steering((told.operations[0], *told.operations[2:]), prompt=(-1,))
    with steer(model, some):
        expected = model(TOKENS)
    with steer(model, load_steering(save_steering(some, path))):
        assert torch.equal(model(TOKENS), expected)
    neurons = Steering((Scale(Neuron(1, 3), 0.0),))
    assert same(load_steering(save_steering(neurons, tmp_path / "off.json")), neurons)
    assert not (tmp_path / "off.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(schema=2), "no steering specification of schema 1"),
        (lambda said: said.update(promt="all"), "no \\['promt'\\]"),
        (lambda said: said["operations"][0].update(operation="run"), "known: scale, add"),
        (lambda said: said["operations"][0].update(factors=1), "does not know \\['factors'\\]"),
        (lambda said: said["operations"][0].pop("factor"), "lacks \\['factor'\\]"),
        (lambda said: said["operations"][0].update(factor="0"), "factor is '0', expected a number"),
        (lambda said: said["operations"][0].update(unit="here"), "'here' is no neuron or head"),
        (lambda said: said["operations"][3].update(unit={}), "is no unit"),
        (lambda said: said["operations"][3]["unit"].update(vector="x"), "no vector is called 'x'"),
        (lambda said: said.update(prompt="last"), "prompt is 'all', 'none' or positions"),
    ],
)
def test_specifications_that_say_something_else_are_refused(change: Any, message: str) -> None:
    text, vectors = steering_to_json(everything())
    said = json.loads(text)
    change(said)
    with pytest.raises(InputError, match=message):
        steering_from_json(json.dumps(said), vectors)


def test_what_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    coder = SparseCoder(STREAM, torch.ones(16, 4), torch.ones(4), torch.ones(4, 16), torch.ones(16))
    for operations, message in (
        ((Scale(Feature(coder, 1), 0.0),), "a feature's coder is in a file of its own"),
        (
            (Scale(direction(name="x"), 0.0), Scale(direction(name="x", seed=1), 0.0)),
            "two different vectors are called",
        ),
    ):
        with pytest.raises(InputError, match=message):
            save_steering(Steering(operations), tmp_path / "x.json")
    with pytest.raises(InputError, match="is for the specification"):
        save_steering(Steering((Scale(Neuron(1, 3), 0.0),)), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no JSON"):
        steering_from_json("{")
    assert list(tmp_path.iterdir()) == []


def test_a_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path: Path) -> None:
    given = [direction("blocks.3.hook_resid_pre", seed=1), direction(LAST, seed=2)]
    path = save_control_vector(tmp_path / "glad.gguf", given, model_hint="llama")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    back = load_control_vector(path)
    assert [each.at for each in back] == [LAST, "blocks.2.hook_resid_post"]
    assert torch.equal(back[0].vector, given[1].vector)
    assert torch.equal(back[1].vector, given[0].vector)
    model = tiny()
    plain, (own, _) = model(TOKENS), back
    seen: list[torch.Tensor] = []
    with (
        steer(model, [Add(own, 2.0)]),
        model.hooks(fwd_hooks=[(LAST, lambda x, hook: seen.append(x))]),
    ):
        assert not torch.equal(model(TOKENS), plain)
    with model.hooks(fwd_hooks=[(LAST, lambda x, hook: seen.append(x))]):
        model(TOKENS)
    torch.testing.assert_close(seen[0] - seen[1], (2 * own.vector.double()).expand_as(seen[0]))


def test_files_that_are_no_control_vectors_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    for directions, message in (
        ([direction(STREAM)], "refuses control vectors before block 1's output"),
        ([direction("blocks.1.mlp.hook_out")], "is not the residual stream after a block"),
        ([direction(LAST), direction("blocks.1.hook_out")], "two directions for the output of"),
        ([], "no direction was given"),
    ):
        with pytest.raises(InputError, match=message):
            save_control_vector(target, directions, model_hint="llama")
    assert not target.exists()
    with pytest.raises(StorageError, match="does not exist"):
        load_control_vector(target)
    target.write_bytes(b"no GGUF at all, but long enough to be read as one")
    with pytest.raises(StorageError, match="is no GGUF file"):
        load_control_vector(target)
    target.unlink()
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_tensor("direction.1", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StorageError, match="but no control vector"):
        load_control_vector(target)


def test_directions_are_what_they_are_defined_as() -> None:
    model = tiny(tokenizer=word_tokenizer())
    glad, sad = ["a b c", "d e f g h"], ["k", "l m"]
    own = written_by(model, Neuron(0, 3))
    assert own.at == STREAM
    assert torch.equal(own.vector, model.blocks[0].mlp.W_out[3])
    assert written_by(model, Neuron(0, 3), LAST).at == LAST
    with pytest.raises(InputError, match="writes a space of vectors"):
        written_by(model, Head(0, 1))

    def alone(text: str) -> torch.Tensor:
        _, cache = model.run_with_cache(text)
        return cache[STREAM][0].detach()

    last, every = (
        [torch.stack([part(alone(t)) for t in texts]).mean(dim=0) for texts in (glad, sad)]
        for part in (lambda x: x[-1], lambda x: x.mean(dim=0))
    )
    found = mean_difference(model, glad, sad, STREAM)
    torch.testing.assert_close(found.vector, last[0] - last[1])
    found = mean_difference(model, glad, sad, STREAM, tokens="all")
    torch.testing.assert_close(found.vector, every[0] - every[1])
    read = torch.cat([alone(text) for text in glad])
    mean = mean_activation(model, direction(), glad)
    assert mean == pytest.approx(float((read @ direction().vector.double()).mean()))

    total, weight = torch.zeros(16).double(), 0.0
    for text, target in zip(glad, ("c", "d"), strict=True):
        _, R = lenslrp.run_with_relevance(model, text, target)
        for relevance, x in zip(R[STREAM][0].sum(dim=-1), alone(text), strict=True):
            total += relevance * x / x.square().mean().sqrt()
            weight += float(relevance.abs())
    found = relevance_direction(model, glad, ["c", "d"], STREAM)
    torch.testing.assert_close(found.vector.detach(), total / weight)
    with pytest.raises(InputError, match="one target a text"):
        relevance_direction(model, glad, ["c"], STREAM)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokens_direction_raises_its_logit_most(family: str) -> None:
    model = tiny(family, tokenizer=word_tokenizer())
    against = unembedding_direction(model, "c", LAST, against="e")
    gain, row = model.ln_final.weight, model.unembed.W_U[:, 4] - model.unembed.W_U[:, 6]
    centred = gain * row - (gain * row).mean() * (family == "gpt2")
    torch.testing.assert_close(against.vector, centred.detach(), rtol=1e-3, atol=1e-3)
    plain = model(TOKENS).softmax(dim=-1)
    with steer(model, [Add(against, 8.0, units="resid_rms")]):
        steered = model(TOKENS).softmax(dim=-1)
    assert (steered[..., 4] / steered[..., 6] > plain[..., 4] / plain[..., 6]).all()


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_means_are_not_rounded_to_the_models_type(tokens: Any) -> None:
    """Of many texts, in bfloat16: where two means are alike, rounding is most of what is left."""
    model = tiny(tokenizer=word_tokenizer()).to(torch.bfloat16)
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "k", "l", "m"]
    sides = [[" ".join(words[i:] + words[:i]) for i in range(start, 11, 2)] * 8 for start in (0, 1)]
    means = []
    for texts in sides:
        rows = [row.double() for row in states(model, texts, STREAM)]
        means.append(torch.stack([x[-1] if tokens == "last" else x.mean(dim=0) for x in rows]))
    expected = means[0].mean(dim=0) - means[1].mean(dim=0)
    found = mean_difference(model, *sides, STREAM, tokens=tokens).vector
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() < 1e-5 * expected.norm()
    weighed = relevance_direction(model, sides[0][:2], ["c", "d"], STREAM)
    assert weighed.vector.dtype == torch.float32
