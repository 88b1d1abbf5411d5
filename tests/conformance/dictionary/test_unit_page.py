"""A unit's page: what it shows is what the dictionary and the model say, and text stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lenslrp
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.pages.links import clamped, downstream, upstream
from lenslrp.analysis.dictionary.pages.page import fragment, page_html, write_page
from lenslrp.analysis.dictionary.pages.sentences import Scales
from lenslrp.analysis.units.kinds import Direction, Head
from lenslrp.analysis.units.lens import Lens
from lenslrp.errors import InputError
from lenslrp.text.visible_text import running, visible
from tests.conformance.dictionaries import OPTIONS, build, model, texts
from tests.unit.tiny import WORDS, tiny

SECTIONS = [
    "Sentences", "Vocabulary", "How it behaves", "Related units", "Clamping it", "Provenance",
]  # fmt: skip
NEEDS = "it takes the model; give model= to page_html or write_page."
VOID = {"meta", "input", "br"}
EVIL = "<script>document.documentElement.id='owned'</script>"
EVIL_IMAGE = "<img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """Elements, attributes, visible text and titles of a page; its tags must balance."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.titles: list[str] = []
        self.text, self.open = "", [""]
        self.feed(html)
        self.close()
        assert self.open == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [v or "" for n, v in attrs if n in ("href", "src", "action", "srcset")]
        self.titles += [value or "" for name, value in attrs if name == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def bridge() -> Any:
    return model()


def document(d: NeuronDictionary, row: Any) -> Any:
    return d.texts.documents([row.doc])[row.doc]


def test_sections_come_in_order_and_say_what_needs_the_model(built: NeuronDictionary) -> None:
    page = built[1, 17]
    seen = Parsed(page_html(page))
    places = [seen.text.index(title) for title in SECTIONS]
    assert places == sorted(places)
    assert "blocks.1.mlp.hook_post[17]" in seen.text
    assert seen.text.count(NEEDS) == 5  # cosines, attribution, upstream, downstream, clamping
    for title in ("ActMax", "ActMin", "RelMax", "RelMin", "Deciles", "Random"):
        assert title in seen.text
    for token in page.vocabulary()["token"]:
        assert visible(token) in seen.text
    for name, value in page.provenance["model"].items():
        assert f"model: {name}{value}" in seen.text
    assert f"{built.manifest['tokens_seen']}" in seen.text


def test_every_sentence_is_there_with_its_numbers(built: NeuronDictionary) -> None:
    page = built[0, 3]
    html = page_html(page)
    seen = Parsed(html)
    for criterion in page.criteria:
        for row in page.examples(criterion).itertuples():
            assert "".join(map(running, row.tokens)) in seen.text
            for i, (a, r) in enumerate(zip(row.activations, row.relevances, strict=True)):
                title = f"{row.start + i} · activation {a:+.3g} · relevance {r:+.3g}"
                assert title in seen.titles
            assert f"document {row.doc}, token {row.position}" in seen.text
    row = page.examples("relmax").iloc[0]
    assert f"explains {visible(row.target)} (logit {row.target_value:+.2f})" in re.sub(
        r"\s+", " ", seen.text
    )
    hits = re.findall(r'<bdi class="t hit[^>]*title="(\d+) ', html)
    shown = sum(len(page.examples(c)) for c in page.criteria)
    lines = shown + 2 * OPTIONS["k"]  # RelMax and RelMin show relevance and activation
    assert len(hits) == lines


def test_nothing_runs_and_nothing_is_loaded(built: NeuronDictionary, bridge: Any) -> None:
    html = page_html(built[1, 5], model=bridge)
    seen = Parsed(html)
    assert not seen.elements & {"script", "img", "link", "iframe", "object", "image", "use"}
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert seen.addresses == []
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    again = page_html(built[1, 5], model=bridge)
    assert again == html


def test_a_notebook_shows_the_page_and_keeps_its_own_looks(built: NeuronDictionary) -> None:
    html = built[1, 17]._repr_html_()
    assert html.startswith('<div class="lenslrp-unit">')
    assert html == fragment(built[1, 17])
    style = html.split("<style>")[1].split("</style>")[0]
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@(media|supports)[^{]*\{", "", style))
    assert len(rules) > 40
    for rule in rules:
        for selector in rule.split(","):
            assert ".lenslrp-unit" in selector


def test_histograms_have_a_bar_for_each_bin_that_is_not_empty(built: NeuronDictionary) -> None:
    page = built[0, 3]
    html = page_html(page)
    titles = re.findall(r"<title>([^<]*)</title></rect>", html)
    counts = [*page.histogram().counts, *page.histogram("relevance").counts]
    assert [int(t.rsplit(" ", 1)[1]) for t in titles] == [c for c in counts if c]


def test_attribution_is_that_of_the_dictionary(built: NeuronDictionary, bridge: Any) -> None:
    page = built[1, 2]
    seen = Parsed(page_html(page, model=bridge, attributed=2))
    frame = page.attributed(bridge, "actmin", 2)
    for row in frame.itertuples():
        for value in row.attributions:
            assert any(t.endswith(f"attribution {value:+.3g}") for t in seen.titles)
    with_it = sum("attribution" in t for t in seen.titles)
    expected, left_out = 0, 0
    for name in ("actmax", "actmin", "relmax", "relmin"):
        for row in page.attributed(bridge, name, 2).itertuples():
            upto = row.position - row.start + 1  # what comes after the hit cannot have made it fire
            a, b = row.attributions[:upto], row.activations[:upto]
            cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            lines = (1 if name.startswith("act") else 2) + (cosine < 0.95)
            expected, left_out = expected + lines * len(row.tokens), left_out + (cosine >= 0.95)
    assert with_it == expected
    assert left_out
    assert NEEDS in Parsed(page_html(page, model=bridge, attributed=0)).text


def test_upstream_is_relevance_for_the_activation(built: NeuronDictionary, bridge: Any) -> None:
    page = built[1, 2]
    found = upstream(bridge, page, k=3, limit=100).set_index("name")
    sums: dict[str, list[float]] = {}
    activations = []
    for row in page.examples("actmax").head(3).itertuples():
        goal = lenslrp.targets.Activation("blocks.1.mlp.hook_post", 2, row.position)
        _, R = lenslrp.run_with_relevance(bridge, document(built, row).tokens[None], goal)
        activations.append(float(R.target.value[0]))
        for unit, value in enumerate(R["blocks.0.mlp.hook_post"][0].sum(0).tolist()):
            sums.setdefault(f"blocks.0.mlp.hook_post[{unit}]", []).append(value)
        for layer in (0, 1):
            z = R[f"blocks.{layer}.attn.hook_z"][0].sum((0, 2)).tolist()
            for head, value in enumerate(z):
                sums.setdefault(f"blocks.{layer}.attn.hook_z[{head}]", []).append(value)
    assert set(found.index) <= set(sums)
    assert len(found) == sum(np.median(v) != 0 for v in sums.values())
    for name, row in found.iterrows():
        middle = float(np.median(sums[name]))
        assert row.relevance == pytest.approx(middle, rel=1e-4, abs=1e-9)
        assert row.share == pytest.approx(middle / np.median(activations), rel=1e-4, abs=1e-9)
        assert row.same_sign == sum(np.sign(v) == np.sign(middle) for v in sums[name])
    assert found["relevance"].abs().is_monotonic_decreasing


@pytest.mark.parametrize("key", [(0, 5), Head(0, 1)], ids=str)
def test_downstream_is_what_an_ablation_changes(
    key: Any, built: NeuronDictionary, bridge: Any
) -> None:
    page = built[key]
    found = downstream(bridge, page, k=3, limit=100).set_index("name")
    changes, values = [], []
    for row in page.examples("relmax").head(3).itertuples():
        tokens = document(built, row).tokens[None]

        def off(x: Any, hook: Any, at: int = row.position) -> Any:
            x = x.clone()
            x[0, at, page.index] = 0
            return x

        _, cache = bridge.run_with_cache(tokens)
        with bridge.hooks(fwd_hooks=[(page.place.hook, off)]):
            _, without = bridge.run_with_cache(tokens)
        name = "blocks.1.mlp.hook_post"
        changes.append((cache[name] - without[name])[0, row.position])
        values.append(cache[name][0])
    std = torch.cat(values).std(dim=0)
    expected = torch.stack(changes).quantile(0.5, dim=0) / std
    for unit, value in enumerate(expected.tolist()):
        assert found.loc[f"blocks.1.mlp.hook_post[{unit}]", "change"] == pytest.approx(
            value, rel=1e-3, abs=1e-5
        )
    same_layer = [name for name in found.index if name.startswith("blocks.0")]
    assert bool(same_layer) == isinstance(key, Head)  # its block's MLP comes after a head


@pytest.mark.parametrize("key", [(1, 5), Head(0, 1)], ids=str)
def test_clamping_changes_the_logit_that_was_explained(
    key: Any, built: NeuronDictionary, bridge: Any
) -> None:
    page = built[key]
    found = clamped(bridge, page, k=3)
    for row, got in zip(
        page.examples("relmax").head(3).itertuples(), found.itertuples(), strict=True
    ):
        doc = document(built, row)

        def logit(scale: float, doc: Any = doc) -> float:
            def change(x: Any, hook: Any) -> Any:
                x = x.clone()
                x[:, :, page.index] *= scale
                return x

            with bridge.hooks(fwd_hooks=[(page.place.hook, change)]), torch.no_grad():
                return float(bridge(doc.tokens[None])[0, doc.aim_position, doc.aim_token])

        assert got.logit == pytest.approx(row.target_value, rel=1e-5)
        assert got.off == pytest.approx(logit(0) - logit(1), rel=1e-3, abs=1e-6)
        assert got.doubled == pytest.approx(logit(2) - logit(1), rel=1e-3, abs=1e-6)
        assert got.score == row.score
    assert (found["placebo"] != found["off"]).all()
    text = Parsed(page_html(page, model=bridge, attributed=3)).text
    assert f"off {found['off'].mean():+.3f}, doubled {found['doubled'].mean():+.3f}" in text


def test_one_hit_does_not_fade_all_others() -> None:
    rows = [np.array(v, np.float32) for v in ([9, 1, 0.5], [0, 2, -3], [0, 50, 1])]
    frames = {
        "actmax": pd.DataFrame({"activations": rows, "start": [0, 1, 1]}),
        "actmin": pd.DataFrame({"activations": [-rows[1] / 8], "start": [1]}),
        "random": pd.DataFrame({"activations": [rows[2]], "start": [1]}),
    }
    scales = Scales.of(frames, first=1)
    assert scales.limits == {"activation": 3.0}  # of 1 (position 0 was not searched), 3 and 50
    assert scales.fraction("activation", 50.0) == 1.0
    assert scales.fraction("activation", -1.5) == -0.5
    assert scales.fraction("activation", float("nan")) == 0.0


def test_running_text_keeps_its_spaces_and_shows_what_is_not_seen() -> None:
    assert [running(t) for t in (" the", "a ", " ", "  ", "\n", "\u202e", "")] == [
        " the", "a ", " ", "··", "↵", "⟨U+202E⟩", "∅",
    ]  # fmt: skip


def test_fewer_examples_and_links(built: NeuronDictionary) -> None:
    page = built[0, 3]
    similar = page.dictionary.similar(page.name, 1)["unit"].iloc[0]
    name = built.name(int(similar))
    seen = Parsed(page_html(page, examples=1, links={name: "other.html", "": "index.html"}))
    assert set(seen.addresses) == {"other.html", "index.html"}
    assert "3 more in the dictionary" in seen.text
    full = Parsed(page_html(page))
    assert len(seen.titles) < len(full.titles) / 2


def test_the_lens_is_read_where_one_is_given(built: NeuronDictionary, bridge: Any) -> None:
    turned = -torch.eye(bridge.cfg.d_model, dtype=torch.float64)
    lens = Lens({0: turned}, {}, {}, "ridge", "tiny", "", 2, 1, 0)
    html = page_html(built[0, 3], model=bridge, lens=lens)
    part = Parsed(html).text.split("writes, through the lens")[1].split("reads")[0]
    lowest = built[0, 3].vocabulary().query("role == 'writes' and side == 'bottom'")
    order = [part.index(f"{-score:+.3f}") for score in lowest["score"].head(3)]
    assert order == sorted(order)  # what it lowered, it now raises


def test_another_model_is_refused(built: NeuronDictionary) -> None:
    with pytest.raises(InputError, match="with other weights"):
        page_html(built[0, 3], model=tiny("llama", seed=5))


def test_dictionaries_of_other_kinds_say_what_is_missing(tmp_path: Path) -> None:
    bridge = model()
    vector = torch.nn.functional.normalize(torch.randn(bridge.cfg.d_model), dim=0)
    d = build(
        tmp_path / "d", sites=[Direction("blocks.0.hook_resid_post", vector)],
        criteria=("actmax", "random"),
    )  # fmt: skip
    seen = Parsed(page_html(d.page(d.plan.places[0], 0), model=bridge))
    assert "RelMax" not in seen.text.split("Related units")[0]
    assert "is a direction; this is for neurons and heads" in seen.text
    assert seen.text.count("Left out:") == 4  # angles, upstream, downstream, clamping
    d.close()


def test_a_head_has_no_attribution_and_says_so(built: NeuronDictionary, bridge: Any) -> None:
    text = Parsed(page_html(built[Head(0, 1)], model=bridge)).text
    assert "is a head; tokens are attributed for single components" in text
    assert "reads and writes subspaces" in text
    assert "Mean change: off" in text


def test_text_is_text_wherever_it_comes_from(tmp_path: Path) -> None:
    evil = EVIL.replace(" ", "")
    words = {word: i for i, word in enumerate([*WORDS[:2], evil, *WORDS[3:]])}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="</s>")
    corpus = tmp_path / f"{EVIL_IMAGE}.txt"
    corpus.write_text("\n\n".join(t.replace("a", evil) for t in texts()), encoding="utf-8")
    bridge = tiny(tokenizer=tokenizer)
    bridge.cfg.model_name = EVIL_IMAGE
    d = NeuronDictionary.build(bridge, corpus, tmp_path / "d", **{**OPTIONS, "progress": False})
    html = page_html(d[0, 0], model=bridge)
    seen = Parsed(html)
    assert not seen.elements & {"script", "img"}
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert evil in seen.text
    assert f"corpus: name{EVIL_IMAGE}.txt" in seen.text
    assert f"LensLRP · {EVIL_IMAGE}" in seen.text
    d.close()


def test_a_page_is_written_whole(built: NeuronDictionary, tmp_path: Path) -> None:
    path = write_page(built[0, 3], tmp_path / "page.html", examples=2)
    assert path.read_text(encoding="utf-8") == page_html(built[0, 3], examples=2)
    with pytest.raises(InputError, match="does not exist"):
        write_page(built[0, 3], tmp_path / "nowhere" / "page.html")
