"""What a real browser makes of hostile tokens: shown as text, nothing executed, offline."""

import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

from lenslrp.analysis.circuitsvis_safe import Page as VisPage
from lenslrp.analysis.circuitsvis_safe import attention_heads, colored_tokens
from lenslrp.analysis.report import report_html
from lenslrp.heatmap import token_heatmap
from lenslrp.visible_text import visible
from tests.unit.fake_relevance import NASTY, fake_relevance
from tests.unit.test_heatmap import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open pages with"),
]

MARK = "document.documentElement.id='owned'"
HOSTILE = [
    f"<script>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f'" onmouseover="{MARK}" style="position:fixed;inset:0',
    f"</script><script>{MARK}</script>",
    f"<svg onload={MARK}>",
    *NASTY,
]


@pytest.fixture
def opened(tmp_path):
    """Open HTML in headless Chromium without a network and return the DOM that results."""

    def dom(html):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
        done = subprocess.run(
            [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout.decode("utf-8")

    return dom


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
