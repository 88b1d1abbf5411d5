"""Steering: one text with the cache on and off, alone and padded; undone; neutral is nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis.steering.operations import (
    Ablate,
    Add,
    Clamp,
    Operation,
    ProjectOut,
    Scale,
    Steering,
    steer,
)
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Direction, Feature, Head, Neuron
from lenslrp.errors import InputError
from tests.unit.tiny import TOKENS, changes, snapshot, tiny, word_tokenizer

STREAM = "blocks.0.hook_resid_post"
POST = "blocks.1.mlp.hook_post"
EARLY = "blocks.0.mlp.hook_post"
BEFORE = "blocks.0.mlp.hook_pre"


class Boom(Exception):
    """Raised inside a context."""


def vector(seed: int = 1) -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 3


def direction(seed: int = 1, at: str = STREAM) -> Direction:
    return Direction(at, vector(seed))


def coder() -> SparseCoder:
    draw = torch.Generator().manual_seed(5)
    encode, decode = (torch.randn(16, 40, generator=draw) for _ in range(2))
    return SparseCoder(STREAM, encode, torch.zeros(40), decode.T.contiguous(), torch.zeros(16))


def transcoder(layer: int = 0, *, across: bool = False) -> SparseCoder:
    """Of one layer; `across`: its features write the next layer as well."""
    out = [f"blocks.{i}.hook_mlp_out" for i in range(2)]
    later = {out[1]: coder().W_dec.flip(0)} if across else {}
    made = replace(coder(), hook=f"blocks.{layer}.mlp.hook_in", hook_out=out[layer], later=later)
    return replace(made, W_skip=torch.eye(16), b_dec=torch.ones(16))


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "scale a neuron": lambda **at: Scale(Neuron(0, 3), -20.0, **at),
    "scale a head": lambda **at: Scale(Head(0, 1), -4.0, **at),
    "scale a direction": lambda **at: Scale(direction(), -3.0, **at),
    "add to a neuron": lambda **at: Add(Neuron(0, 3), 9.0, **at),
    "add to a head": lambda **at: Add(Head(0, 0), 9.0, **at),
    "add a direction": lambda **at: Add(direction(), 2.0, **at),
    "add by the stream's size": lambda **at: Add(direction(2), 6.0, units="resid_rms", **at),
    "add a feature": lambda **at: Add(Feature(coder(), 7), 3.0, **at),
    "ablate a transcoder's feature": lambda **at: Ablate(Feature(transcoder(), 7), 9.0, **at),
    "add to a cross-layer feature": lambda **at: Add(
        Feature(transcoder(across=True), 7), 3.0, units="resid_rms", **at
    ),
    "ablate a head": lambda **at: Ablate(Head(0, 0), **at),
    "ablate to a value": lambda **at: Ablate(Neuron(0, 5), 7.0, **at),
    "clamp a neuron": lambda **at: Clamp(Neuron(0, 2), 4.0, 5.0, **at),
    "clamp a direction": lambda **at: Clamp(direction(), high=-30.0, **at),
    "project out": lambda **at: ProjectOut((direction(), direction(2), direction(3)), **at),
}
PLACES: tuple[tuple[Any, Any], ...] = (
    ("all", "all"),
    ([-1], "all"),
    ([0, -2], "none"),
    ("none", "all"),
    ("none", [0, 2]),
    ("all", "none"),
)
FAMILIES = ("llama", "gpt2", "neox")


def generated(model: TransformerBridge, tokens: Tensor = TOKENS, **options: Any) -> Any:
    return model.generate(
        tokens,
        max_new_tokens=6,
        do_sample=False,
        stop_at_eos=False,
        verbose=False,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cache_changes_nothing(family: str, name: str) -> None:
    model = tiny(family, tokenizer=word_tokenizer())
    plain = generated(model)
    differ = 0
    for prompt, generation in PLACES:
        with steer(model, [OPERATIONS[name]()], prompt=prompt, generation=generation):
            on = generated(model, use_past_kv_cache=True)
            off = generated(model, use_past_kv_cache=False)
            again = generated(model, use_past_kv_cache=True)
            hugging = model.hf_generate(
                TOKENS, max_new_tokens=6, do_sample=False, stop_at_eos=False
            )
        assert torch.equal(on.sequences, off.sequences), (prompt, generation)
        assert torch.equal(on.sequences, again.sequences)
        assert torch.equal(on.sequences, hugging)
        for a, b in zip(on.logits, off.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        differ += not torch.allclose(torch.stack(on.logits), torch.stack(plain.logits))
    assert differ == len(PLACES)  # nor is it because nothing was done


TEXTS = ["a b c", "d e f g h i", "k"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_padded_batch_equals_its_rows_alone(family: str, name: str) -> None:
    model = tiny(family, tokenizer=word_tokenizer()).to(torch.float32)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
        "prepend_bos": False,
        "return_type": "tokens",
    }
    for prompt, generation in ((("all"), "all"), ([0], [1]), ([-1], "none")):
        with steer(model, [OPERATIONS[name]()], prompt=prompt, generation=generation):
            together = model.generate(TEXTS, **options)
            uncached = model.generate(TEXTS, use_past_kv_cache=False, **options)
            alone = [model.generate(text, **options)[0, -4:] for text in TEXTS]
            forward = model(TEXTS, prepend_bos=False)  # padded on the right, with no mask
            single = [model(text, prepend_bos=False)[0] for text in TEXTS]
        assert torch.equal(together[:, -4:], torch.stack(alone))
        assert torch.equal(uncached, together)
        for row, expected in enumerate(single):
            torch.testing.assert_close(
                forward[row, : len(expected)], expected, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neutral_coefficients_change_no_bit(dtype: torch.dtype) -> None:
    model = tiny(tokenizer=word_tokenizer()).to(dtype)
    units = [Neuron(1, 3), Head(0, 1), direction(), Feature(coder(), 7)]
    neutral: list[Operation] = [Scale(unit, 1.0) for unit in units]
    neutral += [Add(unit, 0.0) for unit in units]
    neutral += [Add(unit, 0.0, units="resid_rms") for unit in units[2:]]
    neutral += [Clamp(unit, low=-1e30, high=1e30) for unit in units]
    plain, text = model(TOKENS), generated(model)
    for operation in neutral:
        with steer(model, [operation]):
            assert torch.equal(model(TOKENS), plain), operation
            steered = generated(model)
        assert torch.equal(steered.sequences, text.sequences)
        assert torch.equal(torch.stack(steered.logits), torch.stack(text.logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["generate", "generate_stream", "hf_generate"])
def test_an_exception_inside_a_generation_leaves_nothing(family: str, way: str) -> None:
    model = tiny(family, tokenizer=word_tokenizer())
    plain = generated(model).sequences
    model.hf_generate(TOKENS, max_new_tokens=1)  # transformers sets attributes at its first
    before = snapshot(model)
    calls: list[int] = []

    def fail(x: Tensor, hook: Any) -> None:
        calls.append(x.shape[1])
        if len(calls) == 3:
            raise Boom

    options: dict[str, Any] = {} if way == "hf_generate" else {"verbose": False}
    options |= {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    with (
        pytest.raises(Boom),
        steer(model, [make() for make in OPERATIONS.values()]),
        model.hooks(fwd_hooks=[("ln_final.hook_in", fail)]),
    ):
        list(getattr(model, way)(TOKENS, **options))
    assert calls == [6, 1, 1]
    assert changes(before, model) == []
    assert torch.equal(generated(model).sequences, plain)


def test_after_an_exception_inside_the_context_the_next_generation_is_a_fresh_one() -> None:
    model = tiny(tokenizer=word_tokenizer())
    steering = Steering((Add(direction(), 3.0),), prompt=[-1], generation="none")
    with steer(model, steering):
        expected = generated(model, use_past_kv_cache=False).sequences

    def fail(x: Tensor, hook: Any) -> None:
        raise Boom

    with steer(model, steering):
        with pytest.raises(Boom), model.hooks(fwd_hooks=[("ln_final.hook_in", fail)]):
            generated(model, TOKENS[:, :3], use_past_kv_cache=False)
        assert torch.equal(generated(model, use_past_kv_cache=False).sequences, expected)


def test_streams_follow_their_own_text_between_other_passes() -> None:
    model = tiny(tokenizer=word_tokenizer())
    with steer(model, [Add(direction(), 3.0)], prompt=[-1], generation=[1]):
        whole = generated(model).sequences
        logits = model(TOKENS[:, :4])
        for cached in (True, False):
            stream = model.generate_stream(
                TOKENS,
                max_new_tokens=6,
                max_tokens_per_yield=1,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                use_past_kv_cache=cached,
                return_type="tokens",
            )
            pieces = []
            for piece in stream:
                pieces.append(piece)
                assert torch.equal(model(TOKENS[:, :4]), logits)
            assert torch.equal(torch.cat(pieces, dim=1)[:, -6:], whole[:, -6:])


def test_a_cache_by_hand_is_followed_even_beside_another() -> None:
    model = tiny(tokenizer=word_tokenizer())
    first, second = TOKENS, TOKENS.flip(1)[:, :4]
    with steer(model, [Add(direction(), 3.0)], prompt=[-1], generation=[1]):
        wholes = [generated(model, tokens) for tokens in (first, second)]
        states = [model(tokens, return_type="logits_and_cache") for tokens in (first, second)]
        for step in range(6):
            for i, (logits, cache) in enumerate(states):
                last = logits[:, -1]
                torch.testing.assert_close(last, wholes[i].logits[step], rtol=1e-9, atol=1e-9)
                states[i] = model(
                    last.argmax(dim=-1, keepdim=True),
                    past_key_values=cache,
                    return_type="logits_and_cache",
                )
    cache = model(first, return_type="logits_and_cache")[1]
    seen: list[Tensor] = []
    keep = [(STREAM, lambda x, hook: seen.append(x.detach()))]
    token = torch.tensor([[4], [4]])
    with (
        steer(model, [Add(direction(), 3.0)], prompt="all", generation="none"),
        model.hooks(fwd_hooks=keep),
    ):
        model(token, past_key_values=cache)  # read before: all that follows is generated
    cache = model(first, return_type="logits_and_cache")[1]
    with model.hooks(fwd_hooks=keep):
        model(token, past_key_values=cache)
    assert torch.equal(*seen)


def test_rows_prompts_and_generations_of_one_operation() -> None:
    model = tiny()
    plain = model(TOKENS)
    with steer(model, [Add(direction(), 2.0)], prompt=[1, -1]):
        both = model(TOKENS)
    with steer(
        model,
        [
            Add(direction(), 2.0, rows=(1,), prompt=(1,)),
            Add(direction(), 2.0, rows=(1,), prompt=(5,)),
            Scale(direction(), 0.0, prompt="none", generation="all"),
        ],
    ):
        some = model(TOKENS)
    assert torch.equal(some[0], plain[0])
    torch.testing.assert_close(some[1], both[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(both[:, 0], plain[:, 0])


def activations(model: TransformerBridge, hook: str, *operations: Operation) -> tuple[Tensor, ...]:
    seen: list[Tensor] = []
    keep = [(hook, lambda x, hook: seen.append(x.detach().clone()))]
    with model.hooks(fwd_hooks=keep):
        model(TOKENS)
    with steer(model, operations), model.hooks(fwd_hooks=keep):
        model(TOKENS)
    return tuple(seen)


def test_every_operation_does_what_it_says_to_its_unit_and_to_nothing_else() -> None:
    model = tiny()
    for unit in (Neuron(0, 3), Head(0, 1), direction()):
        hook = unit.hook(model)
        for operation, told in (
            (Scale(unit, 2.5), lambda a: 2.5 * a),
            (Ablate(unit), lambda a: 0 * a),
            (Ablate(unit, 1.5), lambda a: 0 * a + 1.5),
            (Clamp(unit, 0.4, 0.5), lambda a: a.clamp(0.4, 0.5)),
        ):
            plain, steered = activations(model, hook, operation)
            torch.testing.assert_close(unit.activation(steered), told(unit.activation(plain)))
    plain, steered = activations(model, STREAM, Add(direction(), 1.5))
    torch.testing.assert_close(steered, plain + 1.5 * vector().double())
    plain, steered = activations(model, STREAM, Add(direction(), 1.5, units="resid_rms"))
    size = plain.square().mean(dim=-1, keepdim=True).sqrt()
    expected = plain + 1.5 * size * (vector() / vector().norm()).double()
    torch.testing.assert_close(steered, expected, rtol=1e-6, atol=1e-6)
    plain, steered = activations(model, POST, Add(Neuron(1, 3), 2.0))
    assert torch.equal(steered[..., 3], plain[..., 3] + 2.0)
    assert torch.equal(steered[..., 4:], plain[..., 4:])
    plain, steered = activations(model, "blocks.0.attn.hook_z", Scale(Head(0, 1), 3.0))
    torch.testing.assert_close(steered[:, :, 1], 3 * plain[:, :, 1])
    assert torch.equal(steered[:, :, 0], plain[:, :, 0])
    plain, steered = activations(model, STREAM, Add(Feature(coder(), 7), 2.0))
    torch.testing.assert_close(steered, plain + 2 * coder().W_dec[7].double())
    spanned = torch.stack([vector(1), vector(2)]).double()
    plain, steered = activations(
        model, STREAM, ProjectOut((direction(1), direction(2), Direction(STREAM, 3 * vector(2))))
    )
    torch.testing.assert_close(
        steered @ spanned.T, torch.zeros(2, 6, 2).double(), atol=1e-5, rtol=0
    )
    gone = torch.linalg.lstsq(spanned.T, (plain - steered).reshape(-1, 16).T)
    rebuilt = (spanned.T @ gone.solution).T.reshape(plain.shape)
    torch.testing.assert_close(plain - steered, rebuilt, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalization", ["none", "constant_norm_rescale", "layer_norm"])
def test_a_moved_feature_leaves_the_error_where_it_was(normalization: str) -> None:
    """``x + scale (a' - a) d``: what the coder rebuilds moves so, and the rest stays."""
    model, at = tiny(), replace(coder(), normalization=normalization)
    for operation, changed in (
        (Ablate(Feature(at, 7), 2.5), lambda a: torch.full_like(a, 2.5)),
        (Scale(Feature(at, 7), -3.0), lambda a: -3.0 * a),
        (Clamp(Feature(at, 7), high=0.1), lambda a: a.clamp(max=0.1)),
    ):
        x, steered = activations(model, STREAM, operation)
        a = at.encode(x)
        assert (a[..., 7] > 0.2).any()
        moved = a.clone()
        moved[..., 7] = changed(a[..., 7])
        error = x - at.decode(a, x)
        torch.testing.assert_close(steered, at.decode(moved, x) + error)
        assert error.norm() > 0.1 * x.norm()
    x, steered = activations(model, STREAM, Add(Feature(at, 7), 0.5, units="resid_rms"))
    size = x.square().mean(dim=-1, keepdim=True).sqrt()
    row = at.W_dec[7].to(x)
    torch.testing.assert_close(steered, x + 0.5 * size * row / row.norm(), rtol=1e-6, atol=1e-6)


def test_a_feature_of_heads_moves_those_heads() -> None:
    model, z = tiny(), "blocks.0.attn.hook_z"
    all_heads = replace(coder(), hook=z, heads="all")
    x, steered = activations(model, z, Add(Feature(all_heads, 7), 2.0))
    torch.testing.assert_close(steered, x + 2 * coder().W_dec[7].to(x).view(x.shape[2:]))
    half = x.shape[-1]
    weights = {"W_enc": coder().W_enc[:half], "W_dec": coder().W_dec[:, :half],
               "b_dec": torch.zeros(half)}  # fmt: skip
    one = replace(coder(), hook=z, heads=1, **weights)
    x, steered = activations(model, z, Ablate(Feature(one, 7), 4.0))
    a = one.encode(x)[..., 7, None]
    torch.testing.assert_close(steered[:, :, 1], x[:, :, 1] + (4 - a) * one.W_dec[7].to(x))
    assert torch.equal(steered[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transcoders_feature_moves_what_its_decoder_writes(family: str, across: bool) -> None:
    """Against a pass in which each MLP's output is put together by hand."""
    model, f, k = tiny(family), 7, 3
    at, second = transcoder(across=across), transcoder(1)
    told = {f: lambda a: 0.0 * a + 2.0, k: lambda a: 1.5 * (a + 0.25)}
    operations = [
        Scale(Feature(second, f), -2.0),
        Ablate(Feature(at, f), 2.0),
        Add(Feature(at, k), 0.25),
        Scale(Feature(at, k), 1.5),
    ]
    steps: dict[int, Tensor] = {}
    sizes: list[Tensor] = []

    def read(x: Tensor, hook: Any) -> None:
        a = at.encode(x)
        sizes.append(a[..., [f, k]].amax())
        steps.update({i: (told[i](a[..., i]) - a[..., i])[..., None] for i in told})

    def read_second(x: Tensor, hook: Any) -> None:
        steps[-1] = -3.0 * second.encode(x)[..., f, None]

    def write(y: Tensor, hook: Any) -> Tensor:
        return y + sum(steps[i] * at.W_dec[i].to(y) for i in told)

    def write_second(y: Tensor, hook: Any) -> Tensor:
        y = y + steps[-1] * second.W_dec[f].to(y)
        return y + sum(steps[i] * rows[i].to(y) for rows in at.later.values() for i in told)

    by_hand = [(at.hook, read), (at.hook_out, write)]
    by_hand += [(second.hook, read_second), (second.hook_out, write_second)]
    plain = model(TOKENS)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=by_hand)
    with steer(model, operations):
        steered = model(TOKENS)
    torch.testing.assert_close(steered, expected, rtol=1e-9, atol=1e-9)
    assert sizes[0] > 0.1 and not torch.allclose(steered, plain, atol=1e-3)
    with steer(model, operations[1]), steer(model, operations[1:]), steer(model, operations[0]):
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-9, atol=1e-9)
    neutral = [Scale(Feature(at, f), 1.0), Add(Feature(at, k), 0.0)]
    with steer(model, neutral):
        assert torch.equal(model(TOKENS), plain)
    assert torch.equal(model(TOKENS), plain)


def test_a_transcoders_feature_is_read_after_what_changes_its_input() -> None:
    model, at = tiny(), transcoder()
    pushed = Add(direction(3, at.hook), 2.0)
    with steer(model, pushed):
        _, cache = model.run_with_cache(TOKENS)
    a = at.encode(cache[at.hook])[..., 7, None]
    expected = cache[at.hook_out] - a * at.W_dec[7].to(a)
    for operations in ([pushed, Ablate(Feature(at, 7))], [Ablate(Feature(at, 7)), pushed]):
        with steer(model, operations):
            _, steered = model.run_with_cache(TOKENS)
        torch.testing.assert_close(steered[at.hook_out], expected)
        with steer(model, operations[0]), steer(model, operations[1]):
            _, steered = model.run_with_cache(TOKENS)
        torch.testing.assert_close(steered[at.hook_out], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_out": None, "W_skip": None, "W_dec": torch.ones(40, 8), "b_dec": torch.ones(8)},
         "its coder writes 8 values a position and reads 16: give it hook_out"),
        ({"hook": "blocks.1.mlp.hook_in", "hook_out": "blocks.0.hook_mlp_out"},
         "writes at blocks.0.hook_mlp_out, which runs before blocks.1.mlp.hook_in, that it reads"),
        ({"hook_out": "blocks.0.mlp.hook_post"}, "sae writes 16 values a position"),
        ({"hook_out": "blocks.0.hook_mlp_oot"}, "no hook point 'blocks.0.hook_mlp_oot'"),
        ({"later": {"blocks.1.hook_mlp_oot": torch.ones(40, 16)}}, "no hook point 'blocks.1.hook"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit_the_model_are_not_moved(
    changes: dict[str, Any], message: str
) -> None:
    model = tiny()
    plain = model(TOKENS)
    with (
        pytest.raises(InputError, match=message),
        steer(model, Scale(Feature(replace(transcoder(), **changes), 7), 0.0)),
    ):
        model(TOKENS)
    assert torch.equal(model(TOKENS), plain)


def test_operations_act_in_order_and_contexts_nest() -> None:
    model = tiny()
    set_, twice = Ablate(Neuron(1, 3), 1.0), Scale(Neuron(1, 3), 2.0)
    for order, value in (((set_, twice), 2.0), ((twice, set_), 1.0)):
        found = activations(model, POST, *order)[1][..., 3]
        torch.testing.assert_close(found, torch.full_like(found, value))
    text = [generated(model, use_past_kv_cache=cached).sequences for cached in (True, False)]
    model = tiny(tokenizer=word_tokenizer())
    with (
        steer(model, [Add(direction(1), 2.0)], prompt=[-1], generation=[0]),
        steer(model, [Add(direction(2), 2.0)], prompt=[0], generation="none"),
    ):
        on, off = (generated(model, use_past_kv_cache=c).sequences for c in (True, False))
    both = [
        Add(direction(1), 2.0, prompt=(-1,), generation=(0,)),
        Add(direction(2), 2.0, prompt=(0,), generation="none"),
    ]
    with steer(model, both):
        expected = generated(model).sequences
    assert torch.equal(on, off) and torch.equal(on, expected)
    assert not torch.equal(on, text[0])


def test_relevance_is_of_the_steered_model() -> None:
    model = tiny()
    with steer(model, [Scale(Neuron(0, 3), 0.0), Scale(direction(), 2.0)], prompt=[-1]):
        logits, R = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=EARLY)
        assert torch.equal(logits, model(TOKENS))
    assert (R[EARLY][:, -1, 3] == 0).all() and (R[EARLY][:, 0, 3] != 0).any()
    assert abs(R.ledger().error) < 1e-9
    plain = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=EARLY)[1].ledger()
    with steer(model, [Add(direction(), 2.0)]):
        _, R = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=EARLY)
    assert abs(R.ledger().error) < 1e-9  # what is added is no token's doing: it absorbs, as a bias
    assert abs(R.ledger().biases) > abs(plain.biases) + 1e-3


@pytest.mark.parametrize(
    "operation",
    [
        Ablate(Neuron(0, 3), 0.7),
        Ablate(Head(0, 1), 2.0),
        Ablate(direction(), -1.0),
        Clamp(Neuron(0, 3), low=0.5),
        Clamp(direction(), high=0.1),
        ProjectOut((direction(1), direction(2))),
        Add(Feature(coder(), 7), 3.0),
    ],
    ids=lambda operation: (
        f"{type(operation).__name__} {type(getattr(operation, 'unit', 0)).__name__}"
    ),
)
def test_every_operation_on_what_is_read_linearly_has_relevance(operation: Any) -> None:
    model = tiny()
    with steer(model, [operation]):
        logits, R = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=EARLY)
        assert torch.equal(logits, model(TOKENS))
    assert abs(R.ledger().error) < 1e-9


def test_what_was_set_has_no_relevance_before_it() -> None:
    model = tiny()
    x = activations(model, EARLY)[0][..., 3]
    middle = float(x.median())
    assert (x < middle).any() and (x > middle).any()
    for operation, still in (
        (Ablate(Neuron(0, 3), 0.7), torch.zeros_like(x, dtype=torch.bool)),
        (Clamp(Neuron(0, 3), low=middle), x >= middle),
    ):
        with steer(model, [operation]):
            _, R = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=BEFORE)
        assert torch.equal(R[BEFORE][..., 3] != 0, still)


@pytest.mark.parametrize(
    "operation",
    [
        Scale(Feature(coder(), 7), 0.0),
        Ablate(Feature(coder(), 7)),
        Clamp(Feature(transcoder(), 7), high=0.1),
    ],
)
def test_relevance_past_a_features_own_activation_is_refused(operation: Any) -> None:
    model = tiny()
    with steer(model, [operation]), pytest.raises(lenslrp.CoverageError, match="no rule for "):
        lenslrp.run_with_relevance(model, TOKENS, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Scale(Neuron(1, 99), 0.0)], "neuron is 99, but layer 1 has neurons 0 to 23"),
        (lambda: [Scale(Direction("blocks.0.hook_resid_pots", vector()), 0.0)], "nearest: "),
        (lambda: [Scale(direction(at="blocks.0.hook_resid_mid"), 0.0)], "does not stay in the"),
        (lambda: [Scale(Direction(STREAM, vector() * 0), 0.0)], "points nowhere"),
        (lambda: [Scale(Direction(STREAM, vector()[:5]), 0.0)], "has 5 components, .* has 16"),
        (lambda: [ProjectOut((Direction(STREAM, vector()[:5]),))], "has 5 components, .* has 16"),
        (lambda: [ProjectOut((direction(), direction(at=POST)))], "of one hook point, not of"),
        (lambda: [Scale(Neuron(1, 3, expert=2), 0.0)], "which expert sits in which slot"),
        (lambda: [Clamp(Neuron(1, 3))], "needs low, high or both"),
        (lambda: [Clamp(Neuron(1, 3), 2.0, 1.0)], "low is above high"),
        (lambda: [Add(Neuron(1, 3), 1.0, units="resid_rms")], "is for directions and features"),
        (lambda: [Add(direction(), 1.0, units="norm")], "units is 'raw' or 'resid_rms'"),
        (lambda: [Scale(Neuron(1, 3), 0.0, rows=(2,))], "row is 2, expected 0 to 1"),
        (lambda: [Scale(Neuron(1, 3), 0.0, prompt=(6,))], "6 is out of range.* from -6 to 5"),
        (lambda: [Scale(Neuron(1, 3), 0.0, prompt="last")], "prompt is 'all', 'none' or"),
        (lambda: [Scale(Neuron(1, 3), 0.0, generation=(-1,))], "count from 0"),
        (
            lambda: [Scale(direction(), 0.0), Scale(direction(at="blocks.0.hook_out"), 0.0)],
            "are one hook point",
        ),
    ],
)
def test_bad_steering_names_the_choice_and_leaves_nothing(
    make: Callable[[], list[Operation]], message: str
) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(InputError, match=message), steer(model, make()):
        model(TOKENS)
    assert changes(before, model) == []


def test_a_steering_says_where_it_acts() -> None:
    steering = Steering((Scale(Neuron(1, 3), 0.0),), prompt=[-1])
    with (
        pytest.raises(InputError, match="give prompt and generation there"),
        steer(tiny(), steering, prompt=[-1]),
    ):
        pass


def test_steering_that_never_happens_is_an_error() -> None:
    with (
        pytest.raises(InputError, match="nothing was edited at"),
        steer(tiny(), [Scale(Neuron(1, 3), 0.0)]),
    ):
        pass


def test_activations_that_a_model_flattens_are_steered_at_their_positions() -> None:
    config = hf.OPTConfig(
        vocab_size=23,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    model = lenslrp.load(hf.OPTForCausalLM(config).double().eval())
    plain = model(TOKENS)
    with steer(model, [Add(Neuron(0, 3), 5.0)], prompt=[-1]):
        steered = model(TOKENS)
        on, off = (generated(model, use_past_kv_cache=c).sequences for c in (True, False))
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert not torch.equal(steered[:, -1], plain[:, -1])
    assert torch.equal(on, off)


def test_encoder_decoders_are_refused() -> None:
    config = hf.T5Config(
        vocab_size=23, d_model=16, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = lenslrp.load(hf.T5ForConditionalGeneration(config).eval())
    with (
        pytest.raises(InputError, match="is an encoder-decoder"),
        steer(model, [Scale(Neuron(0, 3), 0.0)]),
    ):
        pass


def test_one_operation_needs_no_list() -> None:
    model, operation = tiny("llama"), Scale(Neuron(1, 3), 0.0)
    with steer(model, [operation]):
        listed = model(TOKENS)
    with steer(model, operation):
        assert torch.equal(model(TOKENS), listed)
    assert not torch.equal(model(TOKENS), listed)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [Neuron(1, 3), [Neuron(1, 3)]])
def test_a_unit_is_no_operation(given: Any) -> None:
    message = r"^blocks.1.mlp.hook_post\[3\] is no operation, such as Scale\(unit, 0.0\)$"
    with pytest.raises(InputError, match=message), steer(tiny("llama"), given):
        pass
