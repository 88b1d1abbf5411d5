"""Families that read a picture or a sound beside text: relevance ends at both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lenslrp
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.readers import ON_REQUEST
from lenslrp.hooks.structure import components
from lenslrp.models.images import image_models
from tests.conformance import zoo, zoo_media
from tests.conformance.zoo_configs import family
from tests.unit.tiny import changes, snapshot

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = list(zoo_media.MEDIA)
COVERED = [row.name for row in zoo.read() if row.result == "covered"]
READERS = [name for name in COVERED if zoo_media.reads(name)]
COMPOSITES: dict[str, Any] = {
    "AttnLRP": lenslrp.AttnLRP,
    "CPLRP": lenslrp.CPLRP,
    "GradientTimesInput": lenslrp.GradientTimesInput,
}


def forward(model: Any, name: str, **changed: Any) -> torch.Tensor:
    """The model's own logits, on the graph."""
    row, floats, others = zoo_media.example(name, next(model.parameters()).dtype)
    extra = zoo.decoder(model, "decoder_input_ids")
    logits: torch.Tensor = model(row, use_cache=False, **{**floats, **others, **extra, **changed})
    return logits


@pytest.mark.parametrize("name", READERS)
def test_covered_with_a_picture_or_a_sound(name: str) -> None:
    """Forward identity, coverage, ledger, every hook readable or off the path, undo."""
    model = zoo.build(name)
    with torch.no_grad():
        logits = forward(model, name)
    before = snapshot(model)
    for composite in COMPOSITES.values():
        ruled, cache = zoo.explain_media(model, name, composite(), None)
        assert torch.equal(ruled, logits)
        assert cache.coverage.uncovered == []
        ledger = cache.ledger()
        assert zoo.miss(ledger) <= 1e-6, str(ledger)
        (at_values,) = cache.inputs.values()
        assert float(at_values.abs().sum()) > 0
        read = {hook for hook in cache if bool(torch.isfinite(cache[hook]).all())}
        names = hook_points(model, components(model))
        points = {name for name in names if not name.endswith(ON_REQUEST)}
        assert read | set(cache.coverage.off_path) == points
    assert changes(before, model) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("composite", list(COMPOSITES))
def test_what_float32_rounds_is_all_that_is_missed(name: str, composite: str) -> None:
    model = zoo.build(name)
    with zoo.Widened():
        _, cache = zoo.explain_media(model, name, COMPOSITES[composite]())
    assert zoo.miss(cache.ledger()) <= 1e-12, str(cache.ledger())


@pytest.mark.parametrize("name", NAMES)
def test_plain_gradients_are_those_of_calculus(name: str) -> None:
    """Of the values that were given, through the whole tower, against a pass without any rule."""
    model = zoo.build(name)
    _, cache = zoo.explain_media(model, name, lenslrp.GradientTimesInput())
    ((key, relevance),) = cache.inputs.items()
    values = zoo_media.example(name)[1][key].requires_grad_()
    kept: list[torch.Tensor] = []
    handle = model.unembed.hook_out.register_forward_hook(lambda _, args, x: kept.append(x))
    logits = forward(model, name, **{key: values})
    handle.remove()
    started = kept[0] if zoo.capped(model) else logits
    (g,) = torch.autograd.grad(started[:, -1, 5].sum(), values)
    torch.testing.assert_close(relevance, values.detach() * g, rtol=1e-4, atol=1e-9)


def test_every_covered_family_with_a_tower_is_here() -> None:
    """Rows that say nothing of images or sounds are of families that read none."""
    rows = {row.name: row.detail for row in zoo.read() if row.result == "covered"}
    towers = {
        name
        for name in rows
        if {"vision_config", "audio_config", "vq_config"}
        & set(getattr(type(zoo.config(name)), "sub_configs", ()))
        if name not in image_models({}) and zoo_media.takes_media(name)  # pairs always read one
    }
    assert towers == {*READERS, *(n for n in rows if family(n) in zoo_media.TEXT_ONLY)}
    assert all("with a" in rows[n] or family(n) in zoo_media.TEXT_ONLY for n in towers)


def test_what_a_forward_pass_does_not_take_is_refused() -> None:
    model = zoo.build("LlavaForConditionalGeneration")
    row, floats, _ = zoo_media.example("LlavaForConditionalGeneration")
    with pytest.raises(lenslrp.InputError, match="takes no image_grid_thw; it takes input_ids"):
        lenslrp.run_with_relevance(model, row, 5, **floats, model_kwargs={"image_grid_thw": row})
    with pytest.raises(lenslrp.InputError, match="pixel_values has a keyword of its own"):
        lenslrp.run_with_relevance(model, row, 5, model_kwargs=floats)
    scale = torch.ones(2, requires_grad=True)
    with pytest.raises(lenslrp.InputError, match="image_sizes would be a leaf of its own"):
        lenslrp.run_with_relevance(model, row, 5, **floats, model_kwargs={"image_sizes": scale})


def test_a_cut_inside_a_tower_is_noticed() -> None:
    """What a tower computes above the features that are taken is not missed; what is cut is."""
    model = zoo.build("LlavaForConditionalGeneration")
    point = model.vision_encoder.encoder_layers[0].attn.o.hook_out
    handle = point.register_forward_hook(lambda _, args, y: y.detach())
    with pytest.raises(lenslrp.CoverageError, match="the graph is cut"):
        zoo.explain_media(model, "LlavaForConditionalGeneration", lenslrp.AttnLRP())
    handle.remove()
    zoo.explain_media(model, "LlavaForConditionalGeneration", lenslrp.AttnLRP())
