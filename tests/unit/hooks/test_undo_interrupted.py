"""Undoing that fails or is interrupted, and copies and files that are made inside a block."""

from __future__ import annotations

import copy
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.edits import Edit, edit_units
from lenslrp.hooks.handles import raise_failed, undo_all
from tests.unit.another_thread import another_thread
from tests.unit.hooks.test_undo import Boom, explain, nothing_changes
from tests.unit.tiny import TOKENS, changes, hook_order, own_relevance, snapshot, tiny

# --- undoing that fails or is interrupted --------------------------------------------------------


def test_a_step_that_fails_keeps_no_other_from_running() -> None:
    ran: list[int] = []

    def fails() -> None:
        raise Boom("in undoing")

    steps = [lambda i=i: ran.append(i) for i in range(3)]
    failed = undo_all([steps[0], fails, steps[1], fails, steps[2]])
    assert ran == [2, 1, 0]
    assert [str(error) for error in failed] == ["in undoing"] * 2
    with pytest.raises(BaseExceptionGroup, match="several steps"):
        raise_failed(failed)
    with pytest.raises(Boom, match="in undoing"):
        raise_failed(failed[:1])
    raise_failed([])


def test_a_step_that_was_interrupted_is_taken_again() -> None:
    ran: list[str] = []

    def interrupted() -> None:
        ran.append("first" if not ran else "again")
        if ran == ["first"]:
            raise KeyboardInterrupt

    (error,) = undo_all([interrupted])
    assert isinstance(error, KeyboardInterrupt)
    assert ran == ["first", "again"]


def test_a_rule_whose_undoing_fails_leaves_nothing_else() -> None:
    model = tiny("llama")

    def fails() -> None:
        raise Boom("in undoing")

    def block() -> None:
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()) as rules:
            rules._undo.insert(len(rules._undo) // 2, fails)

    with nothing_changes(model), pytest.raises(Boom, match="in undoing"):
        block()


@contextmanager
def interrupt(after: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at one line of LensLRP's own, counted from 0; yields the count.

    Not at ``with``: tracing stops there a second time before the block is left, where Python
    itself is never interrupted.
    """
    count = [0]

    def lines(frame: Any, event: str, arg: Any) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            count[0] += 1
            if count[0] == after + 1:
                raise KeyboardInterrupt
        return lines

    def calls(frame: Any, event: str, arg: Any) -> Any:
        own = Path(frame.f_code.co_filename).parent.name in ("hooks", "lenslrp")
        return lines if own and "tests" not in frame.f_code.co_filename else None

    traced = sys.gettrace()
    sys.settrace(calls)
    try:
        yield count
    finally:
        sys.settrace(traced)


def attach_and_detach(model: TransformerBridge) -> None:
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        pass


def nested(model: TransformerBridge) -> None:
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        attach_and_detach(model)


@pytest.mark.parametrize(("run", "samples"), [(attach_and_detach, 20), (nested, 12), (explain, 8)])
def test_an_interrupt_anywhere_leaves_no_trace(
    run: Callable[[TransformerBridge], Any], samples: int
) -> None:
    """Ctrl-C comes between any two lines: while attaching, in the pass, while undoing."""
    model = tiny("llama")
    run(model)
    before = snapshot(model)
    with interrupt(10**9) as count:
        run(model)
    total = count[0]
    assert total > 1000
    places = random.sample(range(total), samples) + list(range(total - samples, total))
    with another_thread() as thread:
        for place in places:
            with suppress(KeyboardInterrupt), interrupt(place):
                run(model)
            assert changes(before, model) == [], f"interrupted at line {place} of {total}"
            thread.do(attach_and_detach, model)  # it is free for others


def edited(model: TransformerBridge) -> None:
    with edit_units(model, [Edit("blocks.0.hook_resid_post", function=lambda x: -x)]):
        model(TOKENS)


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "not noted"])
def test_an_interrupt_while_a_hook_is_added_leaves_no_edit(
    noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens has put the hook in its place, and is about to note that it has."""
    model = tiny("llama")
    edited(model)
    before = snapshot(model)
    add = HookPoint.add_hook

    def interrupted(point: HookPoint, *args: Any, **options: Any) -> Any:
        add(point, *args, **options)
        if not noted:
            point.fwd_hooks.pop()
        raise KeyboardInterrupt

    monkeypatch.setattr(HookPoint, "add_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edited(model)
    assert changes(before, model) == []


# --- copies and files made inside a block --------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "native"])
def test_a_copy_made_inside_is_refused(family: str) -> None:
    """It would keep rules, and frozen weights, for good."""
    model = tiny(family)
    mlp = model.blocks[0].mlp
    parts = [model, model.blocks[1], mlp, mlp.out, model.ln_final, model.unembed]
    with nothing_changes(model):
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
            for part in parts:
                with pytest.raises(lenslrp.InputError, match="outside the relevance_rules block"):
                    copy.deepcopy(part)
        for part in parts:
            copy.deepcopy(part)
        twin = copy.deepcopy(model)
        assert torch.equal(explain(twin).tokens, explain(model).tokens)


def test_weights_saved_inside_are_as_ever(tmp_path: Path) -> None:
    model = tiny("llama")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with nothing_changes(model), lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        own_relevance(model)
        inside = model.state_dict()
        torch.save(inside, tmp_path / "weights.pt")
    for state in (inside, torch.load(tmp_path / "weights.pt", weights_only=True)):
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[name], plain[name]) for name in plain)


@pytest.mark.parametrize("made", ["built", "converted"])
def test_a_model_made_under_inference_mode_is_refused(made: str) -> None:
    """Autograd cannot use its weights, and nothing could thaw them again."""
    with torch.inference_mode(made == "built"):
        model = tiny("llama")
    if made == "converted":
        with torch.inference_mode():
            model.float()
    before = snapshot_of_inference(model)
    for attempt in (explain, attach_and_detach):
        with pytest.raises(lenslrp.InputError, match=r"torch\.inference_mode\(\), and autograd"):
            attempt(model)
    assert snapshot_of_inference(model) == before


def snapshot_of_inference(model: TransformerBridge) -> dict[str, Any]:
    """Weights made under inference mode have no version counter."""
    hooks = {f"{n}: hooks": hook_order(m) for n, m in model.named_modules(remove_duplicate=False)}
    return hooks | {n: w.requires_grad for n, w in model.named_parameters()}
