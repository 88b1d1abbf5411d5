"""What a real browser makes of hostile tokens: shown as text, nothing executed, offline."""

import re
from html import unescape

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.pages.page import page_html
from lenslrp.analysis.views.circuitsvis import NotebookPage as VisPage
from lenslrp.analysis.views.circuitsvis import attention_heads, colored_tokens
from lenslrp.analysis.views.report import report_html
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import token_heatmap
from tests.conformance.dictionaries import OPTIONS
from tests.unit.analysis.circuits.test_graph_views import wide
from tests.unit.conftest import NEEDS_CHROMIUM
from tests.unit.fake_relevance import NASTY, fake_relevance
from tests.unit.tiny import tiny
from tests.unit.views.test_heatmap import Page

pytestmark = NEEDS_CHROMIUM

MARK = "document.documentElement.id='owned'"
HOSTILE = [
    f"<script>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f'" onmouseover="{MARK}" style="position:fixed;inset:0',
    f"</script><script>{MARK}</script>",
    f"<svg onload={MARK}>",
    *NASTY,
]


def text_of(dom):
    """The text of a DOM, its void elements aside."""
    for tag in ("meta", "img", "source", "input"):
        dom = dom.replace(f"<{tag}", "<br data-was")
    return Page(dom.replace("<!DOCTYPE html>", "")).text


def test_the_marker_would_be_seen(opened):
    for token in HOSTILE[:2]:
        assert 'id="owned"' in opened(f"<!DOCTYPE html><body>{token}")


@pytest.mark.parametrize("policy", [True, False], ids=["as written", "without its policy"])
def test_report_executes_nothing_and_shows_every_token(opened, policy):
    R = fake_relevance(HOSTILE, None)
    R.target.text = HOSTILE[0]
    html = report_html(R)
    dom = opened(html if policy else html.replace("Content-Security-Policy", "nothing"))
    assert 'id="owned"' not in dom
    assert "<script" not in dom
    text = text_of(dom)
    for token in HOSTILE:
        assert visible(token) in text


@pytest.fixture(scope="module")
def hostile_dictionary(tmp_path_factory):
    """Of texts whose words, like the names of model and corpus, are all out to run."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", *HOSTILE_WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="</s>")
    model = tiny(tokenizer=tokenizer)
    model.cfg.model_name = HOSTILE[0]
    folder = tmp_path_factory.mktemp("hostile")
    corpus = folder / f"{HOSTILE[1]}.txt"
    corpus.write_text("\n\n".join([" ".join(HOSTILE_WORDS * 2)] * 3), encoding="utf-8")
    options = {**OPTIONS, "window": (20, 20), "progress": False}
    return NeuronDictionary.build(model, corpus, folder / "d", **options), model


HOSTILE_WORDS = [token.replace(" ", "/") for token in (HOSTILE[1], HOSTILE[4], HOSTILE[0])]


@pytest.mark.parametrize("policy", [True, False], ids=["as written", "without its policy"])
def test_a_units_page_executes_nothing_and_shows_every_token(opened, policy, hostile_dictionary):
    dictionary, model = hostile_dictionary
    html = page_html(dictionary[0, 0], model=model)
    dom = opened(html if policy else html.replace("Content-Security-Policy", "nothing"))
    assert 'id="owned"' not in dom
    assert "<script" not in dom
    for word in HOSTILE_WORDS:
        assert visible(word) in text_of(re.sub("<svg v.*?</svg>", "", dom, flags=re.DOTALL))


def test_a_units_page_in_a_host_page(opened, hostile_dictionary):
    dictionary, _ = hostile_dictionary
    dom = opened(f"<!DOCTYPE html><body>{dictionary[0, 0]._repr_html_()}")
    assert 'id="owned"' not in dom


def test_heatmap_in_a_host_page(opened):
    dom = opened(f"<!DOCTYPE html><body>{token_heatmap(HOSTILE, range(len(HOSTILE)))}")
    assert 'id="owned"' not in dom
    for token in HOSTILE:
        assert visible(token) in text_of(dom)


def test_circuitsvis_draws_offline_and_executes_no_token(opened):
    pytest.importorskip("circuitsvis")
    page = VisPage()
    values = torch.randn(len(HOSTILE), generator=torch.Generator().manual_seed(0))
    values[1] = float("nan")
    pattern = torch.outer(values, values)
    views = [
        attention_heads(pattern, HOSTILE, page=page),
        colored_tokens(HOSTILE, values, page=page),
    ]
    dom = opened("<!DOCTYPE html><body>" + "".join(view._repr_html_() for view in views))
    assert 'id="owned"' not in dom
    assert "<canvas" in dom
    body = dom.split('class="colored-tokens"')[1].split("<script")[0]
    assert "<img" not in body
    assert "<svg" not in body
    text = unescape(re.sub(r"<[^>]*>", "", f"<div{body}")).replace("\u2060", "")
    for token in HOSTILE:
        assert visible(token) in text.replace("\xa0", " ")


def test_a_graph_is_ready_to_zoom_offline_and_executes_no_token(opened):
    tokens = [token for token in HOSTILE if token != "\udc80"]
    dom = opened(f"<!DOCTYPE html><body>{wide(tokens).to_html()}")
    assert 'id="owned"' not in dom
    assert 'data-ready="1"' in dom
    svg = dom[dom.index("<svg") : dom.index("</svg>")]
    for token in tokens:
        assert visible(token) in unescape(svg)
