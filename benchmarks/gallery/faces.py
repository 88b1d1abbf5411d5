"""What every result shows of itself: the size of its line and of its card, and their pictures.

    python -m benchmarks.gallery.faces [NAME ...]            # the table of docs/gallery.md
    python -m benchmarks.gallery.faces --pictures [NAME ...] # and the page's pictures

Each line of `LINES` is what makes one result on the embedded models; the names in it are other
lines. `line` is the characters of its `repr`, `height` that of its card in pixels, in a page of 900
pixels in headless Chromium, and `bare` the same where a viewer drops scripts and style sheets and
keeps inline styles. A face is a line of 300 characters or is in `LONG`, and one screen.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import lenslrp
from benchmarks import ROOT
from benchmarks.gallery.pictures import browser, page, save_picture
from lenslrp import analysis
from lenslrp.analysis.views.drawing import DARK, LIGHT

WIDTH, SCREEN, LINE = 900, 900, 300
LONG = {"diagnosis": "printed as a report", "unit": "a page"}
"""What is larger by purpose."""

SETUP = {
    "model": 'lenslrp.load("smollm2-135m", device="cpu")',
    "encoder": 'lenslrp.load("all-minilm-l6-v2", device="cpu")',
    "prompt": '"The Eiffel Tower is located in the city of"',
    "neuron": "Neuron(23, 1368)",
    "openings": '["At the end of the street stands", "The picture on the wall shows"]',
    "moods": '(["I am happy", "She is glad"], ["I am sad", "She is grim"])',
    "d": 'NeuronDictionary.build(model, texts, folder + "/d", sites="blocks.23.mlp.hook_post", '
    "k=8, context=32, progress=False)",
}
LINES = {
    "relevance": 'lenslrp.run_with_relevance(model, prompt, target=" Paris")[1]',
    "difference": 'relevance - lenslrp.run_with_relevance(model, prompt, target=" Rome")[1]',
    "batch": 'lenslrp.run_with_relevance(model, [prompt, "Rome is the capital of"])[1]',
    "baseline": 'attribute("gradient_x_input", model, prompt, " Paris")',
    "ledger": "relevance.ledger()",
    "coverage": "relevance.coverage",
    "survey": "lenslrp.survey(model.original_model.config)",
    "diagnosis": "lenslrp.examine(model)",
    "generation": 'lenslrp.explain_generation(model, "The capital of France is", max_new_tokens=8)',
    "hops": 'explain_hops(model, "The capital of France is", max_new_tokens=8)',
    "vocabulary": "writes(model, neuron)",
    "similarity": 'bilrp(encoder, "A cat sat on the mat.", "The kitten is resting on a rug.")',
    "pairs": 'template_pairs(model, "indirect_object", 16)',
    "nodes": "score_nodes(model, pairs)",
    "edges": 'score_edges(model, pairs[:2], into=[Node("blocks.23.attn.hook_z", 4), TARGET])',
    "circuit": "prune(nodes, 0.05)",
    "verdict": "verify(model, pairs, [circuit])",
    "curve": "faithfulness_curve(model, pairs, nodes, shares=[0.01, 0.1, 1.0])",
    "graph": 'attribution_graph(model, "The capital of France is", " Paris", k=24)',
    "dictionary": "d",
    "unit": "d[23, 1368]",
    "found": 'd.find("moon", "star")',
    "direction": 'mean_difference(model, *moods, "blocks.14.hook_resid_post", name="happy")',
    "steering": "sweep(model, Add(neuron, 1.0), [-40.0, 40.0], openings, "
    'target=(" moon", " house"), new_tokens=12, draws=1)',
    "results": 'evaluate("agreement", model, ["random", "attnlrp"], n=4, folder=folder, '
    "progress=False)",
}


SCOPE = {"lenslrp": lenslrp, **{name: getattr(analysis, name) for name in analysis.__all__}}


class Made(dict[str, Any]):
    """What the lines make, each when it is first named."""

    def __missing__(self, name: str) -> Any:
        self[name] = eval({**SETUP, **LINES}[name], SCOPE, self)  # noqa: S307
        return self[name]


def bare(html: str) -> str:
    """Markup as a viewer leaves it that drops scripts and style sheets, and keeps inline styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def height(html: str) -> int:
    """How high a browser makes it, in CSS pixels."""
    measure = (
        "<script>addEventListener('load', () => document.title = "
        "document.getElementById('face').offsetHeight)</script>"
    )
    whole = page(f'<div id="face">{html}</div>{measure}', LIGHT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(whole, encoding="utf-8")
        command = [*browser(folder, LIGHT), f"--window-size={WIDTH},{SCREEN}", "--dump-dom"]
        command += ["--virtual-time-budget=4000", path.as_uri()]
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+)</title>", told.stdout)
    if found is None:
        raise SystemExit("the browser did not say how high the page is")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--pictures", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed, gallery = [], (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    print("| | made by | line | height | bare |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        made = Made(folder=folder, texts=str(ROOT / "tutorials" / "sentences.txt"))
        for name in options.names or LINES:
            result = made[name]
            said, html = repr(result), getattr(result, "_repr_html_", lambda: None)()
            sizes = [height(html), height(bare(html))] if html else []
            shown = [*map(str, sizes), "-", "-"][:2]
            print(
                f"| {name} | `{LINES[name]}` | {len(said)} | {shown[0]} | {shown[1]} |", flush=True
            )
            fits = len(said) <= LINE and "\n" not in said and max(sizes, default=0) <= SCREEN
            if not fits and name not in LONG:
                failed.append(name)
            if options.pictures and f"face-{name}.png" in gallery:
                for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
                    path = ROOT / "docs" / "images" / f"face-{name}{suffix}.png"
                    save_picture((html, WIDTH, min(sizes[0], SCREEN)), theme, path, 1.0)
        if "d" in made:
            made["d"].close()
    if failed:
        raise SystemExit(f"larger than a line, or than a screen: {', '.join(failed)}")


if __name__ == "__main__":
    main()
