"""One forward pass: what is read, edited, kept and replayed on the way, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.edits import Edit, edit_units
from lenslrp.errors import InputError
from lenslrp.forward import forward, reading
from lenslrp.inputs import prepare_text
from lenslrp.leaves import Leaves
from tests.unit.tiny import FAMILIES, TOKENS, changes, snapshot, tiny

FIRST, SECOND = "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def by_hand(model: Any, hook: str) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, lambda x, hook: 2 * x)]):
        logits: Tensor = model(TOKENS)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_by_a_function_is_that_of_a_hook_and_readers_see_it(family: str) -> None:
    model = tiny(family)
    plain, edited = list[Tensor](), list[Tensor]()
    batch = prepare_text(model, TOKENS)
    with forward(model, batch, read={SECOND: plain.append}):
        pass
    edits = [Edit(SECOND, function=doubled)]
    with forward(model, batch, edits=edits, read={SECOND: edited.append}) as made:
        pass
    assert made.logits is not None
    assert torch.equal(made.logits, by_hand(model, SECOND))
    assert torch.equal(edited[0], 2 * plain[0])


def test_functions_act_on_what_is_done_to_units_in_the_order_given() -> None:
    model, seen = tiny(), list[Tensor]()
    edits = [
        Edit(SECOND, function=lambda x: x + 1),
        Edit(SECOND, (3,), shift=5.0),
        Edit(SECOND, function=doubled),
    ]
    with forward(model, prepare_text(model, TOKENS), edits=edits, read={SECOND: seen.append}):
        pass
    assert (seen[0][..., 3] == 12).all()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"units": (3,), "function": doubled},
        {"function": doubled, "rows": (0,)},
        {"function": doubled, "scale": 2.0},
    ],
)
def test_an_edit_is_of_units_or_by_a_function(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="of units, or by a function"):
        Edit(SECOND, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_blocks_return_what_they_returned_and_do_not_run(family: str) -> None:
    model = tiny(family)
    batch, outputs = prepare_text(model, TOKENS), dict[int, Any]()
    with forward(model, batch, record=outputs) as made:
        whole = made.logits
    assert sorted(outputs) == [0, 1]
    ran: list[str] = []
    hooks = [(h, lambda x, hook, name=h: ran.append(name)) for h in (FIRST, SECOND)]
    with model.hooks(fwd_hooks=hooks):
        with forward(model, batch, replay={0: outputs[0]}) as made:
            assert torch.equal(made.logits, whole)
        assert ran == [SECOND]
        with forward(model, batch, replay=outputs) as made:
            assert torch.equal(made.logits, whole)
        assert ran == [SECOND]


def test_an_edit_before_which_all_is_replayed_is_that_of_a_whole_pass() -> None:
    model, outputs = tiny(), dict[int, Any]()
    batch = prepare_text(model, TOKENS)
    with forward(model, batch, record=outputs):
        pass
    edit = Edit(SECOND, function=doubled)
    with forward(model, batch, edits=[edit], replay={0: outputs[0]}) as made:
        pass
    assert torch.equal(made.logits, by_hand(model, SECOND))


def test_what_is_asked_for_and_does_not_happen_is_an_error() -> None:
    model, outputs = tiny(), dict[int, Any]()
    batch = prepare_text(model, TOKENS)
    with forward(model, batch, record=outputs):
        pass
    before = snapshot(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"read": {FIRST: doubled}}, f"{FIRST} does not fire"),
        ({"edits": [Edit(FIRST, function=doubled)]}, f"nothing was edited at {FIRST}"),
        ({"read": {"mlp.hook_post": doubled}}, "in every block; name one: blocks.0.mlp.hook_post"),
        ({"read": {"blocks.1.mlp.hook_pots": doubled}}, "nearest: blocks.1.mlp.hook_post"),
        ({"edits": [Edit("blocks.0.hook_resid_mid", function=doubled)]}, "does not stay in the"),
    ]
    for given, message in wrong:
        with (
            pytest.raises(InputError, match=message),
            forward(model, batch, replay={0: outputs[0]}, **given),
        ):
            pass
        assert changes(before, model) == []


def test_nothing_is_left_after_an_interrupt() -> None:
    model = tiny()
    before = snapshot(model)

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), forward(
        model, prepare_text(model, TOKENS), edits=[Edit(SECOND, function=interrupt)], record={},
        read={FIRST: doubled},
    ):  # fmt: skip
        pass
    assert changes(before, model) == []


def test_reading_sees_every_pass_inside_and_none_after() -> None:
    model, seen = tiny(), list[Tensor]()
    with torch.no_grad(), reading(model, {FIRST: seen.append, "unembed.hook_in": doubled}) as fired:
        assert fired == set()
        model(TOKENS)
        model(TOKENS[:, :3])
    model(TOKENS)
    assert [x.shape[1] for x in seen] == [6, 3]
    assert fired == {FIRST, "unembed.hook_in"}


def test_an_edit_entered_inside_a_session_is_part_of_what_is_explained() -> None:
    model = tiny()
    edit = Edit(SECOND, function=doubled)
    with lenslrp.session(model) as session:
        plain, _ = session.run_with_relevance(TOKENS, 5, names_filter=SECOND)
        with edit_units(model, [edit]):
            edited, found = session.run_with_relevance(TOKENS, 5, names_filter=SECOND)
            with edit_units(model, [Edit(FIRST, (3,))]):
                both, _ = session.run_with_relevance(TOKENS, 5, names_filter=SECOND)
        after, _ = session.run_with_relevance(TOKENS, 5, names_filter=SECOND)
    assert torch.equal(edited, by_hand(model, SECOND))
    assert abs(found.ledger().error) < 1e-9
    assert torch.equal(plain, after)
    assert not torch.equal(both, edited)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_stops_after_what_it_captures_there_and_keeps_weights_off_its_graph(
    family: str,
) -> None:
    model, after = tiny(family), list[Tensor]()
    batch, before = prepare_text(model, TOKENS), snapshot(model)
    with forward(model, batch, capture_at=[SECOND]) as whole:
        pass
    point = model.hook_dict["unembed.hook_out"]
    point.add_hook(lambda x, hook: after.append(x))
    places = [FIRST, SECOND]
    with forward(
        model, batch, capture_at=places, stop_after=SECOND, leaves=Leaves(), gradients=True
    ) as made:
        first, second = (made.captured[place] for place in places)
        (gradient,) = torch.autograd.grad(second.sum(), first)
        assert not any(weight.requires_grad for weight in model.parameters())
    assert made.logits is None and not after
    assert torch.equal(second, whole.captured[SECOND])
    assert bool(gradient.abs().sum() > 0)
    point.remove_hooks()
    assert not changes(before, model)


def test_embeddings_are_replaced_once_or_that_is_an_error() -> None:
    model = tiny()
    batch, leaves = prepare_text(model, TOKENS), Leaves()
    with forward(model, batch, leaves=leaves) as plain:
        pass
    (embedded,) = leaves.tokens
    others = TOKENS.flip(1)
    with forward(model, prepare_text(model, others), embed=lambda _, out: embedded) as made:
        pass
    assert plain.logits is not None and made.logits is not None
    assert torch.equal(made.logits, plain.logits)
    with (
        pytest.raises(InputError, match=r"embedded no tokens of shape \[2, 6\]: nothing was repl"),
        forward(model, batch, embed=lambda _, out: None),
    ):
        pass


@pytest.mark.parametrize("hooked", [False, True])
def test_logits_at_columns_are_those_of_all_positions(hooked: bool) -> None:
    model = tiny("gemma2")
    batch = prepare_text(model, TOKENS)
    if hooked:  # sees them all
        model.unembed.hook_out.add_hook(lambda x, hook: x - x.mean(dim=1, keepdim=True))
    columns = torch.tensor([[5, 0], [2, 3]])
    with forward(model, batch) as whole, forward(model, batch, columns=columns) as some:
        pass
    assert whole.logits is not None and some.logits is not None
    expected = torch.stack([row[own] for row, own in zip(whole.logits, columns, strict=True)])
    torch.testing.assert_close(some.logits, expected, rtol=1e-12, atol=1e-12)
