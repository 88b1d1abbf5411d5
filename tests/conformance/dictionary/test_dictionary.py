"""A dictionary of a tiny model against the same in plain loops; shards; statistics; search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lenslrp
from lenslrp import targets
from lenslrp.analysis.dictionary.block_pass import target_positions
from lenslrp.analysis.dictionary.corpus import Corpus
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.launch import build_distributed, rank_and_world
from lenslrp.analysis.dictionary.replay import ReplayError
from lenslrp.analysis.dictionary.scan import merge_shards, scan_shard
from lenslrp.analysis.units.kinds import Head, Neuron
from lenslrp.errors import InputError, StorageError
from tests.conformance import zoo
from tests.conformance.dictionaries import OPTIONS, build, contents, model, texts

FAMILIES = ["llama", "gpt2", "phi", "gemma2", "neox", "native"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeuronDictionary]:
    d = build(tmp_path_factory.mktemp("built") / "d", keep_work=True)
    yield d
    d.close()


def slow_scores(d: NeuronDictionary, bridge: Any) -> dict[str, dict[int, list[Any]]]:
    """Every document by itself in its block: hook kind -> unit -> [(score, document, position)]."""
    corpus = Corpus.open(d.path / "work" / "corpus")
    found: dict[str, dict[int, list[Any]]] = {"activation": {}, "relevance": {}}
    for index in range(corpus.blocks):
        block = corpus.block(index)
        mask = None if bool(block.mask.all()) else block.mask.long()
        lengths = torch.tensor(block.lengths)
        aims = target_positions(block.docs, lengths, 0)
        goal = [
            targets.Logit(int(block.tokens[r, p + 1]), int(p)) for r, p in enumerate(aims.tolist())
        ]
        _, R = lenslrp.run_with_relevance(
            bridge, block.tokens, goal, names_filter=["mlp.hook_post", "attn.hook_z"],
            attention_mask=mask,
        )  # fmt: skip
        with torch.no_grad():
            kwargs = {} if mask is None else {"attention_mask": mask}
            _, cache = bridge.run_with_cache(block.tokens, **kwargs)
        for place in d.plan.places:
            a, r = cache[place.hook], R[place.hook]
            a = a.norm(dim=-1) if place.kind == "head" else a
            r = r.sum(dim=-1) if place.kind == "head" else r
            for row, doc in enumerate(block.docs.tolist()):
                ends = {"activation": block.lengths[row], "relevance": int(aims[row]) + 1}
                for what, x in (("activation", a), ("relevance", r)):
                    for unit in range(place.size):
                        values = x[row, 1 : ends[what], unit].float().tolist()
                        hits = found[what].setdefault(place.first + unit, [])
                        hits.append([(v, doc, p) for p, v in enumerate(values, start=1)])
    return found


def best(hits: list[Any], sign: int, k: int) -> list[Any]:
    ones = [min((-sign * v, doc, p) for v, doc, p in document) for document in hits]
    return [(-sign * v, doc, p) for v, doc, p in sorted(ones)[:k]]


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_equal_a_full_sort_ties_included(family: str, tmp_path: Path) -> None:
    bridge = model(family)
    d = build(tmp_path / "d", family=family, keep_work=True)
    slow = slow_scores(d, bridge)
    ties = 0
    for place in d.plan.places:
        for index in range(place.size):
            page = d.page(place, index)
            for criterion, what, sign in (
                ("actmax", "activation", 1),
                ("actmin", "activation", -1),
                ("relmax", "relevance", 1),
                ("relmin", "relevance", -1),
            ):
                frame = page.examples(criterion)
                expected = best(slow[what][place.first + index], sign, 4)
                given = frame[["score", "doc", "position"]].to_numpy().tolist()
                # A head's relevance is a sum, which another order of summing rounds otherwise.
                np.testing.assert_allclose(given, expected, rtol=2e-6, atol=1e-12)
                ties += len({score for score, _, _ in expected}) < 4
    assert ties > 0  # ten texts are there twice
    d.close()


def test_a_page_shows_what_the_unit_did(built: NeuronDictionary) -> None:
    bridge = model()
    page = built[1, 17]
    assert page.name == "blocks.1.mlp.hook_post[17]"
    assert page.unit == Neuron(1, 17)
    frame = page.examples("relmax")
    assert frame["rank"].tolist() == [0, 1, 2, 3]
    corpus = Corpus.open(built.path / "work" / "corpus")
    for row in frame.itertuples():
        tokens = corpus.part_of(row.doc).document(row.doc)
        start, stop = max(0, row.position - 3), row.position + 3
        assert row.start == start
        words = [bridge.tokenizer.decode([int(i)]) for i in tokens[start:stop]]
        assert [token.strip() for token in row.tokens] == words
        assert "".join(row.tokens).strip() == " ".join(words)  # the window's text
        _, R = lenslrp.run_with_relevance(
            bridge, tokens[None],
            targets.Logit(int(tokens[row.target_position + 1]), row.target_position),
            names_filter="blocks.1.mlp.hook_post",
        )  # fmt: skip
        relevance = R["blocks.1.mlp.hook_post"][0, :, 17]
        assert row.score == pytest.approx(float(relevance[row.position]), rel=1e-5)
        np.testing.assert_allclose(
            row.relevances, relevance[start:stop].float(), rtol=1e-3, atol=1e-9
        )
        _, cache = bridge.run_with_cache(tokens[None])
        activation = cache["blocks.1.mlp.hook_post"][0, start:stop, 17]
        np.testing.assert_allclose(row.activations, activation.float(), rtol=1e-3, atol=1e-9)
        assert row.target == bridge.tokenizer.decode([int(tokens[row.target_position + 1])])
        assert row.target_value == pytest.approx(float(R.target.value[0]), rel=1e-5)


def test_deciles_go_up_and_random_is_the_same_sample_for_all(built: NeuronDictionary) -> None:
    drawn = {tuple(built[0, unit].examples("random")["doc"]) for unit in range(24)}
    assert len(drawn) == 1
    for unit in range(24):
        page = built[0, unit]
        deciles = page.examples("deciles")["score"].tolist()
        assert deciles == sorted(deciles)
        assert len(deciles) == 10
        top = page.examples("actmax")["score"].iloc[0]
        assert max(deciles) <= top
        assert page.examples("random")["score"].max() <= top


def test_statistics_are_those_of_the_sampled_tokens(built: NeuronDictionary) -> None:
    page = built[0, 3]
    histogram = page.histogram("activation")
    assert int(histogram.counts.sum()) == min(512, built.plan.corpus["documents"])
    assert histogram.edges[0] == pytest.approx(page.statistics["activation_min"])
    assert 0 <= page.statistics["activation_density"] <= 1
    assert page.statistics["activation_min"] >= page.examples("actmin")["score"].iloc[0]
    assert page.statistics["activation_max"] <= page.examples("actmax")["score"].iloc[0]
    middle = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    estimate = float((middle * histogram.counts).sum() / histogram.counts.sum())
    width = float(histogram.edges[1] - histogram.edges[0])
    assert page.statistics["activation_mean"] == pytest.approx(estimate, abs=width)


def test_units_by_every_key_and_none_that_is_not_there(built: NeuronDictionary) -> None:
    name = "blocks.1.mlp.hook_post[5]"
    keys = [(1, 5), ("mlp.hook_post", 1, 5), name, Neuron(1, 5), "N1.5"]
    assert {built[key].name for key in keys} == {name}
    assert built[Head(0, 1)].name == "blocks.0.attn.hook_z[1]"
    assert built["attn.hook_z", 1, 0].name == built["H1.0"].name == "blocks.1.attn.hook_z[0]"
    for key in [(1, 24), (2, 0), (1, -1), "blocks.1.mlp.hook_post[24]", "nonsense", 5, (1, "a")]:
        with pytest.raises(InputError, match=r"no unit|a unit is"):
            built[key]
    with pytest.raises(InputError, match="criterion 'best' was not searched; there are actmax"):
        built[1, 5].examples("best")


@pytest.mark.usefixtures("unchecked")
def test_search_finds_words_tokens_and_neighbours(built: NeuronDictionary) -> None:
    document = built[0, 0].examples("actmax").iloc[0]
    word = document.tokens[-1].strip()
    found = built.search_text(word, criterion="actmax")
    assert len(found)
    assert all(word in window for window in found["window"])
    assert set(found["criterion"]) == {"actmax"}
    assert built.search_text("zzzz").empty
    with pytest.raises(InputError, match="nothing to search for"):
        built.search_text('" * ')
    for call in (built.search_text, built.search_tokens):
        message = rf"is one string, not \['{word}'\]; d.find\(\"a\", \"b\"\) takes several words"
        with pytest.raises(InputError, match=message):
            call([word])
    # Operators of the query language are words: none of these is an error, or matches everything.
    for query in ('a OR b"', "text:a", "NEAR(a b)", "a* -b", "'; DROP TABLE documents; --"):
        built.search_text(query)
    frame = built.to_dataframe("actmax")
    assert len(frame) == len(built) * 4
    by_token = built.search_tokens(word)
    for row in by_token.itertuples():
        hits = built[row.hook + f"[{row.index}]"].examples("actmax")
        at = [
            tokens[p - s].strip()
            for tokens, p, s in zip(hits.tokens, hits.position, hits.start, strict=True)
        ]
        assert row.share == pytest.approx(at.count(word) / 4)
    near = built.similar((0, 0), k=5)
    assert near["correlation"].is_monotonic_decreasing
    assert 0 not in near["unit"].tolist()


def test_tokens_are_attributed_to_a_units_activation(built: NeuronDictionary) -> None:
    bridge = model()
    frame = built[1, 2].attributed(bridge, "actmax", 3)
    row = frame.iloc[1]
    corpus = Corpus.open(built.path / "work" / "corpus")
    tokens = corpus.part_of(int(row.doc)).document(int(row.doc))
    goal = targets.Activation("blocks.1.mlp.hook_post", 2, int(row.position))
    _, R = lenslrp.run_with_relevance(bridge, tokens[None], goal, names_filter=[])
    expected = R.tokens[0, row.start : row.start + len(row.tokens)]
    np.testing.assert_allclose(row.attributions, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="is a head; tokens are attributed for single components"):
        built[Head(0, 0)].attributed(bridge)


@pytest.mark.parametrize("world", [2, 3, 50])
def test_shards_merge_to_the_same_bytes(
    built: NeuronDictionary, world: int, tmp_path: Path
) -> None:
    bridge = model()
    job = prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    files = [scan_shard(job, rank, world, progress=False) for rank in range(world)]
    NeuronDictionary.merge(job, files[::-1], progress=False).close()
    assert contents(tmp_path / "d") == contents(built.path)
    assert not job.work.exists()


def test_ranks_of_a_launcher_make_the_same_bytes(
    built: NeuronDictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: a rank that waits for another one finds out by its timeout, and goes on."""
    bridge = model()
    options = {**OPTIONS, "progress": False, "timeout": 0.0}
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="waited 0 seconds for another process"):
        build_distributed(bridge, texts(), tmp_path / "d", **options)
    monkeypatch.setenv("RANK", "1")
    assert build_distributed(bridge, None, tmp_path / "d", **options) is None
    monkeypatch.setenv("RANK", "0")
    d = build_distributed(bridge, texts(), tmp_path / "d", **options)
    assert d is not None
    d.close()
    assert contents(tmp_path / "d") == contents(built.path)


def test_launchers_say_who_one_is() -> None:
    assert rank_and_world({}) == (0, 1)
    assert rank_and_world({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    assert rank_and_world({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}) == (1, 3)
    with pytest.raises(InputError, match="RANK=4 of WORLD_SIZE=4 is no rank"):
        rank_and_world({"RANK": "4", "WORLD_SIZE": "4"})


def test_shards_that_do_not_make_a_whole_are_refused(tmp_path: Path) -> None:
    bridge = model()
    job = prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    one = scan_shard(job, 0, 2, progress=False)
    with pytest.raises(StorageError, match=r"given are ranks \[0\] of \[2\]"):
        merge_shards(job, [one])
    with pytest.raises(StorageError, match="are both shard 0"):
        merge_shards(job, [one, one])
    with pytest.raises(StorageError, match="given are ranks"):
        merge_shards(job, [])
    other = prepare(bridge, texts(), tmp_path / "e", **{**OPTIONS, "seed": 1})
    with pytest.raises(StorageError, match="another dictionary .* seed differ"):
        merge_shards(other, [one])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 5}, "k differ"),
        ({"criteria": ("actmax",)}, "criteria, target, rules differ"),
        ({"composite": lenslrp.CPLRP()}, "rules differ"),
        ({"target": "argmax"}, "target differ"),
        ({"sites": "mlp.hook_post"}, "places, sites differ"),
        ({"context": 13}, "holds another corpus"),
        ({"batch_size": 8}, "holds another corpus"),
        ({"window": (1, 1)}, "window differ"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_options_are_not_mixed_in(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    bridge = model()
    prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    before = contents(tmp_path / "d" / "work" / "corpus")
    with pytest.raises(StorageError, match=named):
        prepare(bridge, texts(), tmp_path / "d", **{**OPTIONS, **change})
    assert contents(tmp_path / "d" / "work" / "corpus") == before
    prepare(bridge, texts(), tmp_path / "d", **OPTIONS)


def test_another_corpus_or_model_is_not_mixed_in(tmp_path: Path) -> None:
    bridge = model()
    prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    with pytest.raises(StorageError, match="holds another corpus"):
        prepare(bridge, texts(seed=1), tmp_path / "d", **OPTIONS)
    with pytest.raises(StorageError, match="model differ"):
        prepare(model(seed=1), texts(), tmp_path / "d", **OPTIONS)
    prepare(bridge, iter(texts()), tmp_path / "d", **OPTIONS)  # read again, and found the same


def test_a_replay_that_finds_something_else_publishes_nothing(tmp_path: Path) -> None:
    bridge = model()
    job = prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    shard = scan_shard(job, progress=False)
    with torch.no_grad():
        bridge.blocks[0].mlp.W_in[0, 0] += 1e-3
    with pytest.raises(ReplayError, match=r"blocks\.0\.mlp\.hook_post\[\d+\], .* the scan found"):
        NeuronDictionary.merge(job, [shard], progress=False)
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(StorageError, match="the dictionary is unfinished"):
        NeuronDictionary.open(tmp_path / "d")


def test_activations_alone_need_no_backward_pass(
    built: NeuronDictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a backward pass was run")

    monkeypatch.setattr("lenslrp.analysis.dictionary.block_pass.Session", refuse)
    d = build(tmp_path / "d", criteria=("actmax", "deciles"))
    for criterion in ("actmax", "deciles"):
        mine, theirs = d[1, 3].examples(criterion), built[1, 3].examples(criterion)
        assert mine["score"].tolist() == theirs["score"].tolist()
        assert mine["doc"].tolist() == theirs["doc"].tolist()
    assert "relevances" not in mine
    with pytest.raises(InputError, match="no statistics of 'relevance'"):
        d[1, 3].histogram("relevance")
    d.close()


def test_the_unembedding_and_later_layers_do_not_run(tmp_path: Path) -> None:
    bridge = model()
    ran = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("unembed", bridge.unembed), ("second", bridge.blocks[1].mlp))
    ]
    job = prepare(
        bridge, texts(), tmp_path / "d",
        **{**OPTIONS, "sites": "blocks.0.mlp.hook_post", "criteria": ("actmax",)},
    )  # fmt: skip
    ran.clear()
    scan_shard(job, progress=False)
    assert ran == []
    for handle in handles:
        handle.remove()


def test_models_and_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    bridge = model()
    for options, message in (
        ({"criteria": ("best",)}, "criteria are one or more of actmax"),
        ({"sites": "mlp.hook_pots"}, "nearest: "),
        ({"sites": "attn.hook_pattern"}, r"units are searched at hook points of shape"),
        ({"sites": []}, "one or more different ones"),
        ({"target": "previous"}, "target is one of next, argmax, logit_diff"),
        ({"k": 0}, "k and sample must be at least 1"),
        ({"attention": "slow"}, "attention must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "d", **options)
    del bridge


@pytest.mark.parametrize(
    ("architecture", "site", "message"),
    [
        ("MixtralForCausalLM", "mlp.hook_expert_post", "experts' neurons cannot be searched"),
        ("MixtralForCausalLM", "mlp.hook_post", "is another name of blocks.0.mlp.hook_out"),
        ("T5ForConditionalGeneration", "mlp.hook_post", "two of them"),
        ("ViTForImageClassification", "mlp.hook_post", "reads no text"),
    ],
)
def test_models_without_one_stack_of_neurons_are_refused(
    architecture: str, site: str, message: str, tmp_path: Path
) -> None:
    rows = [[5, 6, 7, 8], [6, 5, 8, 7]]
    with pytest.raises(InputError, match=message):
        NeuronDictionary.build(zoo.build(architecture), rows, tmp_path / "d", sites=site)


def test_a_finished_dictionary_is_not_overwritten(tmp_path: Path) -> None:
    build(tmp_path / "d").close()
    with pytest.raises(StorageError, match="holds a finished dictionary already"):
        build(tmp_path / "d")
