"""A sweep's numbers against the model by hand; placebos step as far as what is tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslrp.analysis.steering.directions import (
    mean_difference,
    relevance_direction,
    unembedding_direction,
)
from lenslrp.analysis.steering.operations import Ablate, Add, Clamp, Moving, Scale, steer
from lenslrp.analysis.steering.result import METRIC_LABELS, SweepResult
from lenslrp.analysis.steering.sweeps import sweep
from lenslrp.analysis.units.kinds import Direction, Head, Neuron
from lenslrp.errors import InputError
from tests.unit.tiny import tiny, word_tokenizer

PROMPTS = ["a b c", "d e f g", "k c"]
STREAM = "blocks.0.hook_resid_post"


def direction(layer: int = 0) -> Direction:
    draw = torch.Generator().manual_seed(layer)
    return Direction(f"blocks.{layer}.hook_resid_post", torch.randn(16, generator=draw) * 3)


def model_() -> TransformerBridge:
    return tiny(tokenizer=word_tokenizer()).to(torch.float32)


def swept(
    model: TransformerBridge, operation: Any, coefficients: list[float], **options: Any
) -> SweepResult:
    options = {"target": ("c", ["d", "e"]), "new_tokens": 5, "prepend_bos": False, **options}
    return sweep(model, operation, coefficients, PROMPTS, **options)


def test_every_number_is_what_it_is_called() -> None:
    model = model_()
    operation = Add(direction(), 0.0, units="resid_rms")
    frame = swept(model, operation, [3.0], prompt=[-1], draws=0).to_dataframe()
    assert sorted(frame.kind.unique()) == ["base", "steered"]
    for row in frame.itertuples():
        prompt = model.to_tokens(PROMPTS[row.prompt], prepend_bos=False)
        own = Add(direction(), 3.0 if row.kind == "steered" else 0.0, units="resid_rms")
        lengths: list[Tensor] = []
        keep = [(STREAM, lambda x, hook, lengths=lengths: lengths.append(x[0, -1].norm()))]
        with torch.no_grad(), model.hooks(fwd_hooks=keep):
            plain = model(prompt)[0, -1].double()
        with torch.no_grad(), steer(model, [own], prompt=[-1]):
            with model.hooks(fwd_hooks=keep):
                logits = model(prompt)[0, -1].double()
            text = model.generate(
                prompt, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
            )[0]
        assert row.text == model.tokenizer.decode(text[-5:])
        assert row.target == pytest.approx(float(logits[4] - (logits[5] + logits[6]) / 2), abs=1e-3)
        p, q = plain.softmax(0), logits.softmax(0)
        assert row.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-3)
        assert row.norm_ratio == pytest.approx(float(lengths[1] / lengths[0]), rel=1e-4)
        with torch.no_grad():
            told = model(text[None])[0].log_softmax(-1)
        nll = -told[-6:-1].gather(1, text[-5:, None]).mean()
        assert row.nll == pytest.approx(float(nll), rel=1e-3)
        assert row.perplexity == pytest.approx(float(nll.exp()), rel=1e-3)
        pairs = list(zip(text[-5:-1].tolist(), text[-4:].tolist(), strict=True))
        assert row.repetition == 1 - len(set(pairs)) / 4
    base, steered = (frame[frame.kind == kind] for kind in ("base", "steered"))
    assert (base.kl == 0).all() and (base.norm_ratio == 1).all() and (steered.kl > 0).all()


@pytest.mark.parametrize("operation", [Add(Neuron(0, 3), 0.0), Scale(Neuron(0, 3), 1.0)])
def test_a_neutral_strength_is_the_base_model_for_every_kind(operation: Moving) -> None:
    neutral = 1.0 if isinstance(operation, Scale) else 0.0
    frame = swept(model_(), operation, [neutral]).to_dataframe()
    base = frame[frame.kind == "base"]
    assert len(frame) == 3 * 6
    for _, own in frame.groupby(["kind", "draw"]):
        assert own.target.tolist() == base.target.tolist()
        assert own.text.tolist() == base.text.tolist()
        assert own.nll.tolist() == base.nll.tolist()


@pytest.mark.parametrize(
    "operation",
    [
        Add(direction(), 2.0),
        Add(direction(), 2.0, units="resid_rms"),
        Scale(direction(), 2.0),
        Ablate(direction(), 2.0),
        Scale(Neuron(0, 3), 2.0),
        Add(Neuron(0, 3), 2.0),
    ],
)
def test_placebos_step_exactly_as_far_and_elsewhere(
    operation: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lenslrp.analysis.steering.sweeps as module

    model, tried = model_(), []

    def seen(model: Any, operations: Any, **options: Any) -> Any:
        tried.extend(operations)
        return steer(model, operations, **options)

    monkeypatch.setattr(module, "steer", seen)
    swept(model, operation, [2.0], draws=2)
    assert len(tried) == 5
    tokens = model.to_tokens(PROMPTS[1], prepend_bos=False)

    def step(operations: list[Any]) -> Tensor:
        states = []
        for some in (operations, [Scale(Neuron(0, 0), 1.0)]):
            keep = [(STREAM, lambda x, hook: states.append(x[0]))]
            with torch.no_grad(), steer(model, some), model.hooks(fwd_hooks=keep):
                model(tokens)
        return states[0] - states[1]

    own, (placebos, randoms) = step(tried[:1]), ([tried[2], tried[4]], [tried[1], tried[3]])
    for placebo in placebos:
        other = step([placebo])
        torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), rtol=1e-3, atol=1e-4)
        assert (torch.cosine_similarity(other, own, dim=-1).abs() < 0.99).all()
    for random in randoms:
        assert random.unit is not operation.unit and type(random) is type(operation)
        if isinstance(operation.unit, Direction):
            assert float(random.unit.vector.norm()) == pytest.approx(
                float(direction().vector.norm())
            )


def test_the_seed_fixes_the_draws_and_the_summary_pairs_them() -> None:
    model = model_()
    results = [
        swept(model, lambda layer: Add(direction(layer), 0.0), [0.5, 1.0], layers=[0, 1], seed=seed)
        for seed in (1, 1, 2)
    ]
    frames = [r.to_dataframe() for r in results]
    assert frames[0].equals(frames[1]) and not frames[0].equals(frames[2])
    summary = results[0].summary("kl")
    assert summary[["layer", "coefficient", "n"]].to_numpy().tolist() == [
        [0, 0.5, 3], [0, 1, 3], [1, 0.5, 3], [1, 1, 3],
    ]  # fmt: skip
    frame = frames[0]
    for row in summary.itertuples():
        own = frame[(frame.layer == row.layer) & (frame.coefficient == row.coefficient)]
        mean = {kind: some.kl.mean() for kind, some in own.groupby("kind")}
        assert row.change == pytest.approx(mean["steered"])
        assert row.over_placebo == pytest.approx(mean["steered"] - mean["placebo"])
        assert row.over_random == pytest.approx(mean["steered"] - mean["random"])
        assert row.over_placebo_low <= row.over_placebo <= row.over_placebo_high
    bare = swept(model, Add(direction(), 0.0), [1.0], draws=0).summary()
    assert "over_placebo" not in bare and np.isfinite(bare.change).all()


@pytest.mark.parametrize(
    ("operation", "options", "message"),
    [
        (Clamp(Neuron(0, 3), 1.0), {}, "Clamp of .* has no strength to sweep"),
        (Scale(Head(0, 1), 1.0), {}, "has no strength to sweep"),
        (Scale(Neuron(0, 3), 1.0), {"layers": [0]}, "layers with a function"),
        (lambda layer: Scale(Neuron(layer, 3), 1.0), {}, "layers with a function"),
        (Scale(Neuron(0, 3), 1.0), {"new_tokens": 0}, "new_tokens >= 1"),
        (Scale(Neuron(0, 3), 1.0), {"target": ("c d", "c")}, "c d"),
    ],
)
def test_bad_sweeps(operation: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        swept(model_(), operation, [1.0], **options)


def test_prompts_are_a_list() -> None:
    with pytest.raises(InputError, match=r"^prompts is a list of texts, not one text: \['a b'\]$"):
        sweep(model_(), Scale(Neuron(0, 3), 1.0), [1.0], "a b", target=("c", "d"))


def test_an_unknown_metric_names_the_known() -> None:
    result = swept(model_(), Add(direction(), 0.0), [1.0], draws=0)
    with pytest.raises(InputError, match="expected one of target, kl"):
        result.summary("loss")


def test_a_metric_of_ones_own_is_summed_up_like_the_others() -> None:
    result = swept(model_(), Add(direction(), 0.0), [1.0, 8.0])
    said = result.scored("said", lambda text: "c" in text.split())
    frame = said.to_dataframe()
    assert frame.said.tolist() == ["c" in text.split() for text in frame.text]
    assert "said" not in result.to_dataframe()
    means = frame.groupby("kind").said.mean()
    assert 0 < means.mean() < 1
    row = said.summary("said").iloc[1]
    own = frame[frame.coefficient == 8].groupby("kind").said.mean()
    assert row.change == pytest.approx(own.steered - means.base)
    assert row.over_placebo == pytest.approx(own.steered - own.placebo)
    with pytest.raises(InputError, match="a column 'said' already"):
        said.scored("said", len)


def test_the_figure_draws_the_means_of_the_layer_asked_for() -> None:
    result = swept(model_(), lambda layer: Add(direction(layer), 0.0), [2.0, 1.0], layers=[0, 1])
    figure = result.plot(("kl", "repetition"), layer=1)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        METRIC_LABELS["kl"],
        "share of repeated bigrams",
    ]
    frame = result.to_dataframe()
    frame = frame[(frame.layer == 1) & (frame.kind != "base")]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for kind, own in frame.groupby("kind"):
        np.testing.assert_allclose(lines[kind], own.groupby("coefficient").kl.mean())
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "2"]
    assert list(lines["base model"]) == [0, 0]
    legend = figure.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [*lines]
    for bad in (None, 2):
        with pytest.raises(InputError, match="choose one of 0, 1"):
            result.plot(layer=bad)
    with pytest.raises(InputError, match="metric is 'loss'"):
        result.plot(("loss",), layer=0)
    bare = swept(model_(), Add(direction(), 0.0), [1.0], draws=0).plot(("nll",))
    assert [line.get_label() for line in bare.axes[0].lines] == ["steered", "base model"]


def test_a_sweep_says_what_it_swept() -> None:
    model, at = model_(), "blocks.0.hook_resid_post"
    polite = mean_difference(model, ["a b"], ["c d"], at, name="politeness")
    one = swept(model, Add(polite, 0.0), [1.0], draws=0)
    name = f"Add of {at}[direction politeness]"
    assert repr(one).startswith(f"SweepResult({name}, strengths 1 at layers [0], ")
    assert repr(SweepResult(one.frame, 0)).startswith("SweepResult(operation without a name, ")
    assert name in one._repr_html_() and one.scored("x", len).operations == (name,)
    both = swept(model, lambda k: Scale(Neuron(k, 3), 1.0), [0.0], layers=[0, 1], draws=0)
    assert "Scale of blocks.0.mlp.hook_post[3] and 1 more, strengths 0" in repr(both)
    assert unembedding_direction(model, "a", at, name="a").name == "a"
    assert relevance_direction(model, ["a b"], ["c"], at, name="c").name == "c"
