"""Edits of units: exact against weights set to zero, per row, and undone however a context ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.edits import Edit, edit_units
from lenslrp.errors import InputError
from tests.unit.tiny import FAMILIES, TOKENS, changes, snapshot, tiny

HOOK = "blocks.1.mlp.hook_post"
EARLY = "blocks.0.mlp.hook_post"
OUT = {
    "llama": ("model.layers.1.mlp.down_proj.weight", 1),
    "qwen3": ("model.layers.1.mlp.down_proj.weight", 1),
    "gemma2": ("model.layers.1.mlp.down_proj.weight", 1),
    "gpt2": ("transformer.h.1.mlp.c_proj.weight", 0),
    "phi": ("model.layers.1.mlp.fc2.weight", 1),
    "neox": ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", 1),
}
"""Hugging Face's name of the second block's W_out, and the axis that counts neurons."""


class Boom(Exception):
    """Raised inside a context."""


def weight_of(model: TransformerBridge, family: str) -> tuple[nn.Parameter, int]:
    name, axis = OUT[family]
    plain = {
        key.replace("_original_component.", ""): value
        for key, value in model.original_model.named_parameters(remove_duplicate=False)
    }
    return plain[name], axis


def logits_of(model: TransformerBridge, *edits: Edit, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad(), edit_units(model, edits):
        logits: Tensor = model(tokens)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_a_row_of_w_out_set_to_zero(family: str) -> None:
    model = tiny(family)
    plain = logits_of(model)
    off = logits_of(model, Edit(HOOK, (3, 20)))
    weight, axis = weight_of(model, family)
    with torch.no_grad():
        weight.index_fill_(axis, torch.tensor([3, 20]), 0.0)
        zeroed = model(TOKENS)
    torch.testing.assert_close(off, zeroed, rtol=1e-12, atol=1e-12)
    assert (off - plain).abs().max() > 1e-3


def test_factor_is_a_row_of_w_out_times_it() -> None:
    model = tiny()
    five = logits_of(model, Edit(HOOK, (3,), scale=5.0))
    weight, _ = weight_of(model, "llama")
    with torch.no_grad():
        weight[:, 3] *= 5
        expected = model(TOKENS)
    torch.testing.assert_close(five, expected, rtol=1e-12, atol=1e-12)


def test_shift_sets_a_value() -> None:
    model = tiny()
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        edit_units(model, [Edit(HOOK, (3,), shift=0.5), Edit(HOOK, (4,), scale=1.0, shift=2.0)]),
        model.hooks(fwd_hooks=[(HOOK, lambda x, hook: seen.append(x.clone()))]),
    ):
        model(TOKENS)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    plain, (edited,) = cache[HOOK], seen
    assert (edited[..., 3] == 0.5).all()
    assert torch.equal(edited[..., 4], plain[..., 4] + 2)
    rest = [i for i in range(plain.shape[-1]) if i not in (3, 4)]
    assert torch.equal(edited[..., rest], plain[..., rest])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_one_is_bit_identical(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    everything = tuple(range(24))
    edits = [Edit(HOOK, everything, scale=1.0), Edit(EARLY, everything, scale=1.0)]
    assert torch.equal(logits_of(model, *edits), logits_of(model))


def test_rows_are_independent() -> None:
    model = tiny()
    tokens = TOKENS[:1].expand(4, -1)
    plain = logits_of(model, tokens=tokens)
    edits = [
        Edit(HOOK, (3,), rows=(1,)),
        Edit(HOOK, (3, 5), scale=2.0, rows=(2,)),
        Edit(EARLY, (7,), rows=(2, 3)),
    ]
    mixed = logits_of(model, *edits, tokens=tokens)
    assert torch.equal(mixed[0], plain[0])
    alone = [
        [Edit(HOOK, (3,))],
        [Edit(HOOK, (3, 5), scale=2.0), Edit(EARLY, (7,))],
        [Edit(EARLY, (7,))],
    ]
    for row, own in enumerate(alone, start=1):
        torch.testing.assert_close(
            mixed[row], logits_of(model, *own, tokens=tokens)[row], rtol=1e-12, atol=1e-12
        )


def test_positions_are_independent() -> None:
    model = tiny()
    plain, whole = logits_of(model), logits_of(model, Edit(HOOK, (3,)))
    last = logits_of(model, Edit(HOOK, (3,), positions=(-1,)))
    assert torch.equal(last[:, :-1], plain[:, :-1])
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-12, atol=1e-12)
    every = logits_of(
        model, Edit(HOOK, (3,), positions=(0, 1, 2)), Edit(HOOK, (3,), positions=(-3, 4, -1))
    )
    torch.testing.assert_close(every, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_undone_after_exceptions(family: str, error: type[BaseException]) -> None:
    model = tiny(family)
    plain = logits_of(model)
    before = snapshot(model)

    def fail(x: Tensor, hook: Any) -> None:
        raise error

    with pytest.raises(error), edit_units(model, [Edit(HOOK, (3,)), Edit(EARLY, (1,))]):
        raise error
    assert changes(before, model) == []
    with (
        pytest.raises(error),
        torch.no_grad(),
        edit_units(model, [Edit(HOOK, (3,))]),
        model.hooks(fwd_hooks=[("ln_final.hook_in", fail)]),
    ):
        model(TOKENS)
    assert changes(before, model) == []
    assert torch.equal(logits_of(model), plain)


def test_the_users_hooks_survive() -> None:
    model = tiny()
    calls: list[str] = []
    model.add_hook(HOOK, lambda x, hook: calls.append("user"))
    logits_of(model, Edit(HOOK, (3,)))
    assert calls == ["user"]
    logits_of(model)
    assert calls == ["user", "user"]


def test_nested_contexts_compose() -> None:
    model = tiny()
    with torch.no_grad(), edit_units(model, [Edit(HOOK, (3,))]):
        with edit_units(model, [Edit(EARLY, (7,))]):
            both = model(TOKENS)
        one = model(TOKENS)
    assert torch.equal(both, logits_of(model, Edit(HOOK, (3,)), Edit(EARLY, (7,))))
    assert torch.equal(one, logits_of(model, Edit(HOOK, (3,))))


def test_relevance_of_a_neuron_that_is_off_is_zero() -> None:
    model = tiny()
    with edit_units(model, [Edit(HOOK, (3,), rows=(0,))]):
        logits, R = lenslrp.run_with_relevance(model, TOKENS, 5, names_filter=HOOK)
    assert torch.equal(logits, logits_of(model, Edit(HOOK, (3,), rows=(0,))))
    assert (R[HOOK][0, :, 3] == 0).all()
    assert R[HOOK][1, :, 3].abs().sum() > 0
    assert abs(R.ledger().error) < 1e-9


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit("blocks.1.mlp.hook_pots", (3,))], "nearest: .*blocks.1.mlp.hook_post"),
        ([Edit(HOOK, (24,))], "unit of blocks.1.mlp.hook_post is 24, expected 0 to 23"),
        ([Edit(HOOK, (-1,))], "is -1, expected 0 to 23"),
        ([Edit(HOOK, (3,), rows=(2,))], "row of the edit at .* is 2, expected 0 to 1"),
        (
            [Edit(HOOK, (3,)), Edit(HOOK, (3,), rows=(1,))],
            "unit 3 of .* is edited twice in row 1 at column 0",
        ),
        ([Edit(HOOK, (3, 3))], "unit 3 of .* is edited twice in row 0"),
        (
            [Edit(HOOK, (3,), positions=(6,))],
            "position of the edit .* 6 is out of range: .* positions go from -6 to 5",
        ),
        ([Edit(HOOK, (3,)), Edit("blocks.1.mlp.out.hook_in", (4,))], "are one hook point"),
        ([Edit("blocks.0.hook_resid_mid", (3,))], "does not stay in the residual stream"),
        (
            [Edit("blocks.0.attn.hook_z", (2,))],
            "unit of blocks.0.attn.hook_z is 2, expected 0 to 1",
        ),
        ([Edit("unembed.hook_in", (0,)), Edit("blocks.0.hook_attn_out", (99,))], "is 99, expected"),
    ],
)
def test_bad_edits_name_the_choice_and_leave_nothing(edits: list[Edit], message: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        logits_of(model, *edits)
    assert changes(before, model) == []


def test_a_head_is_edited_as_a_whole() -> None:
    model = tiny()

    def by_hand(scale: float, shift: float) -> Tensor:
        def change(z: Tensor, hook: object) -> Tensor:
            z = z.clone()
            z[1, :, 0] = z[1, :, 0] * scale + shift
            return z

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", change)]):
            return model(TOKENS)

    for scale, shift in ((0.0, 0.0), (2.0, 0.5)):
        edit = Edit("blocks.0.attn.hook_z", (0,), scale, shift, rows=(1,))
        torch.testing.assert_close(logits_of(model, edit), by_hand(scale, shift))
    neutral = Edit("blocks.0.attn.hook_z", (0, 1), scale=1.0)
    assert torch.equal(logits_of(model, neutral), logits_of(model))


def test_an_edit_that_never_happens_is_an_error() -> None:
    model = tiny()
    with (
        pytest.raises(InputError, match="nothing was edited at blocks.1.mlp.hook_post"),
        edit_units(model, [Edit(HOOK, (3,))]),
    ):
        pass
