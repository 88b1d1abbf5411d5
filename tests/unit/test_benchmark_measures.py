"""What the benchmarks measure with: hits, areas, flipped patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cost import measure, overhead
from benchmarks.faithfulness import examples, sanity, squad
from benchmarks.vision import cifar, patch_flipping
from lenslrp.analysis.attribution.methods import attribute
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.passes.prompts import as_prompt
from tests.unit.tiny import TOKENS, tiny


def test_random_top_1_is_the_exact_expectation() -> None:
    offsets = [(i, i + 1) for i in range(10)]
    item = squad.Item(
        "q", "cd", True, True, offsets, (2, 4), {"AttnLRP": [float(i) for i in range(10)]}
    )
    judged = squad.judge(item, "abcdefghij", np.random.default_rng(0))
    assert judged["random"]["top-1"] == 0.2
    assert judged["AttnLRP"]["top-1"] == 0.0


def test_flipped_patches_are_whole_and_in_order() -> None:
    image, baseline = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    steps = patch_flipping.flipped(
        image, baseline, np.array([5, 0, *range(1, 5), *range(6, 16)]), [1, 2]
    )
    assert steps.shape == (2, 3, 8, 8)
    assert steps[0].sum() == 3 * (64 - 4)
    assert (steps[0][:, 2:4, 2:4] == 0).all()
    assert (steps[1][:, :2, :2] == 0).all()


def test_area_is_between_lerf_and_morf() -> None:
    assert patch_flipping.area([[4.0, 0.0, 0.0], [4.0, 4.0, 0.0]]) == pytest.approx(2.0)
    assert patch_flipping.area([[4.0, 4.0, 0.0], [4.0, 0.0, 0.0]]) == pytest.approx(-2.0)


def test_curves_follow_the_target_and_share_their_ends() -> None:

    class Mean:  # the logit of class 1 is the sum of the first channel of patch 0
        dtype = torch.float32

        def __call__(self, pixel_values: torch.Tensor) -> Any:
            logits = torch.stack([torch.zeros(len(pixel_values)), pixel_values[:, 0, 0, 0]], dim=1)
            return type("Output", (), {"logits": logits})()

    image, baseline = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    maps = {"right": np.eye(1, 16).reshape(4, 4), "wrong": -np.eye(1, 16).reshape(4, 4)}
    found = patch_flipping.curves(Mean(), image, baseline, maps, 1, steps=4, batch=3)
    assert found["right"] == [[1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]
    assert found["wrong"] == [[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert (
        patch_flipping.area(found["right"])
        == -patch_flipping.area(found["wrong"])
        == pytest.approx(0.75)
    )


def test_the_split_goes_by_content_not_by_order() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 4, 4, 3), dtype=np.uint8)
    images = cifar.Images(pixels, rng.integers(0, 10, 400))
    shuffled = images.take(rng.permutation(400))
    held_out, training = (
        cifar.split(images, held_out=side, per_class=99) for side in (True, False)
    )
    names = {cifar.name_of(image) for image in held_out.pixels}
    assert names == {
        cifar.name_of(image) for image in cifar.split(shuffled, held_out=True, per_class=99).pixels
    }
    assert not names & {cifar.name_of(image) for image in training.pixels}
    assert len(held_out) + len(training) == 400
    assert 100 <= len(held_out) <= 180
    few = cifar.split(images, held_out=True, per_class=2)
    assert np.bincount(few.labels).max() == 2


def test_images_are_normalised_for_the_backbone() -> None:
    prepared = cifar.prepare(np.full((1, 32, 32, 3), (255, 128, 0), np.uint8))
    assert prepared.shape == (1, 3, 224, 224)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(prepared[0, :, 100, 7].numpy(), expected, rtol=1e-5)


def test_every_format_gives_the_same_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), np.array([3, 1, 0, 9, 3])
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels, names=np.array(cifar.NAMES))
    rows = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(5, -1)], axis=1)
    (tmp_path / "a.bin").write_bytes(rows.astype(np.uint8).tobytes())
    first, second = cifar.read(tmp_path / "a.npz"), cifar.read(tmp_path / "a.bin")
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.labels, second.labels)
    with pytest.raises(SystemExit, match=r"give one of \.npz, \.bin, \.json"):
        cifar.read(tmp_path / "a.txt")


def test_a_table_takes_its_place_beside_the_others(tmp_path: Path) -> None:
    keep, path = examples.keep, tmp_path / "new" / "sanity.json"
    keep(path, "one", [{"method": "random", "n": 3, "mean": 0.123456}], "sanity one", seed=0)
    keep(path, "two", [], "sanity two")
    keep(path, "one", [{"method": "random", "n": 4, "mean": -1.0}], "sanity one", seed=1)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "one": {
            "command": "python -m benchmarks.faithfulness.sanity one",
            "seed": 1,
            "rows": [{"method": "random", "n": 4, "mean": -1.0}],
        },
        "two": {"command": "python -m benchmarks.faithfulness.sanity two", "rows": []},
    }
    keep(path, "two", [{"mean": 0.123456}], "sanity two")
    assert json.loads(path.read_text(encoding="utf-8"))["two"]["rows"] == [{"mean": 0.1235}]


def test_differences_from_attnlrp_are_paired() -> None:
    own = np.array([1.0, 5.0, 9.0])
    columns = {"attnlrp": own, "cp_lrp": own + 2, "few": own[:2] - 1}
    attnlrp, cp, few = sanity.leads(columns, 0, "share_")
    assert attnlrp == {"method": "attnlrp", "n": 3, "share_mean": 5.0} | {
        key: attnlrp[key] for key in ("share_low", "share_high")
    }
    names = [f"share_less_attnlrp_{end}" for end in ("mean", "low", "high")]
    assert [cp[name] for name in names] == [2.0, 2.0, 2.0]
    assert (few["n"], [few[name] for name in names]) == (2, [-1.0, -1.0, -1.0])


def test_relevance_of_many_prompts_is_that_of_each() -> None:
    model = tiny("native", n_layers=2)
    rows = [TOKENS[0], TOKENS[0].flip(0), TOKENS[0][:3]]
    prompts = [as_prompt(model, row) for row in rows]
    for prompt, found in zip(prompts, examples.relevance("attnlrp", model, prompts), strict=True):
        alone = attribute("attnlrp", model, prompt.given, prompt.target).tokens[0]
        np.testing.assert_allclose(found, alone.numpy(), rtol=1e-9)


def test_every_set_of_a_short_prompt_has_its_own_value() -> None:
    model = tiny("native", n_layers=2)
    prompts = [as_prompt(model, TOKENS[0][:3]), as_prompt(model, TOKENS[1][:4])]
    masks = np.random.default_rng(0).random((5, 4)) < 0.5
    for prompt, features in zip(prompts, sanity.every_set(model, prompts), strict=True):
        asked = masks[:, : prompt.length]
        found, expected = features.without(asked), tokens_of(model, prompt).without(asked)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-9)
        np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-9)


def test_an_interrupted_run_measures_the_rounds_that_are_left() -> None:
    calls: list[str] = []
    kept: list[dict[str, Any]] = [
        {"length": 12, "seconds": {"a": [1.0, 0.0], "b": [2.0, 0.0]}},
        {"length": 64, "seconds": {"a": [9.0, 0.0], "b": [9.0, 0.0]}},
    ]

    def timer(name: str) -> Any:
        return lambda: calls.append(name) or (len(calls), 0.5)

    timers = {name: timer(name) for name in "ab"}
    added: list[dict[str, Any]] = []
    done = overhead.interleaved(timers, 12, 3, kept, added.append)
    assert sorted(calls[:4]) == ["a", "a", "b", "b"]  # not timed
    assert [set(calls[i : i + 2]) for i in (4, 6)] == [{"a", "b"}] * 2
    assert done[0] == kept[0]["seconds"]
    assert added == [{"length": 12, "seconds": row} for row in done[1:]]
    assert {value for row in done[1:] for value, _ in row.values()} == {5, 6, 7, 8}
    calls.clear()
    assert overhead.interleaved(timers, 12, 3, [kept[0], *added], added.append) == done
    assert calls == []


def test_costs_of_passes_that_explain_something_else_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, same = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.0002, -4.0]])
    overhead.require_agreement(12, {"ours": ours, "theirs": same})
    assert "differs from theirs's by (of its largest): ours 5e-05" in capsys.readouterr().out
    for other in (ours + 0.01, ours * torch.nan):
        with pytest.raises(SystemExit, match="12 tokens: the cases do not explain the same"):
            overhead.require_agreement(12, {"ours": ours, "theirs": other})


def test_peak_memory_is_that_of_one_pass() -> None:

    def run(tokens: torch.Tensor) -> torch.Tensor:
        torch.ones(4 * 2**18)  # 4 MiB, freed before the next ones are taken
        first, second = torch.ones(2 * 2**18), torch.ones(2**18)
        return first[:1] + second[:1]

    found = measure.peak_mib(run, torch.zeros(1, 1))
    assert found == pytest.approx(4, abs=0.01)
    assert measure.verdict(0.9, 0.9) == "<= 0.90 | yes"
    assert measure.verdict(0.91, 0.9) == "<= 0.90 | **no**"
