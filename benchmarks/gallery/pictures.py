"""The pictures of README.md, from the embedded models: docs/images/NAME.png and NAME-dark.png.

    python -m benchmarks.gallery.pictures [NAME ...]  # all of them, or those named

Each is what the library itself draws, in its light and its dark theme; pages of HTML are taken by a
headless Chromium. `photograph` needs scikit-image, `steering` takes two minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import lenslrp
from benchmarks import ROOT
from benchmarks.knowledge.steering import OPENINGS, astronomy, speaks_of
from benchmarks.vision.photographs import cifar, classifier, explain, photographs
from lenslrp.analysis import (
    NeuronDictionary,
    SweepResult,
    attribution_graph,
    bilrp,
    score_nodes,
    template_pairs,
)
from lenslrp.analysis.circuits.figures import head_scores
from lenslrp.analysis.dictionary.pages.page import fragment
from lenslrp.analysis.views.drawing import DARK, LIGHT, Theme
from lenslrp.analysis.views.report import report_html
from lenslrp.targets import LogitDiff
from lenslrp.views.heatmap import token_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = ROOT / "docs" / "images"
LIMIT = 100_000  # bytes
TALLEST = 1200  # pixels of a figure
SCALE = 1.5  # pixels to a CSS pixel
PROMPT = "The Eiffel Tower is located in the city of"


def smollm2() -> Any:
    return lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")


Picture = Callable[[Theme], "Figure | tuple[str, int, int]"]
"""What is drawn in a theme: a figure, or a page and its size in CSS pixels."""


def report() -> Picture:
    model = smollm2()
    _, R = lenslrp.run_with_relevance(model, PROMPT, target=" Paris")
    page = report_html(R, model=model)
    return lambda theme: (page, 1000, 1442)


def difference() -> Picture:
    _, R = lenslrp.run_with_relevance(smollm2(), PROMPT, target=LogitDiff(" Paris", " Rome"))
    shown = token_heatmap(R.str_tokens[0], R.tokens[0], title="logit of Paris less logit of Rome")
    return lambda theme: (shown, 440, 138)


def generation() -> Picture:
    """The matrix of docs/how-to/generation.md."""
    written = lenslrp.explain_generation(smollm2(), "The capital of France is", max_new_tokens=8)
    return lambda theme: (written.html(), 620, 278)


def photograph() -> Picture:
    name = "chelsea"
    _, R = explain(classifier(), photographs()[name])
    sharp = photographs(cifar.SIZE)[name]
    return lambda theme: R.plot("image", image=sharp, of="patches", theme=theme)


def neuron() -> Picture:
    texts = str(ROOT / "tutorials" / "sentences.txt")
    with tempfile.TemporaryDirectory() as folder:
        made = NeuronDictionary.build(
            smollm2(),
            texts,
            f"{folder}/layer23.dict",
            sites="blocks.23.mlp.hook_post",
            k=8,
            context=32,
            progress=False,
        )
        page = fragment(made[23, 1368])
        made.close()
    return lambda theme: (page, 700, 776)


def steering() -> Picture:
    """The sweep of tutorial 07."""
    openings = [OPENINGS[i] for i in (0, 1, 3, 7, 9, 12, 14, 16, 20, 24)]
    result = astronomy(smollm2(), openings, new_tokens=12)
    return lambda theme: drawn(result, theme)


def drawn(result: SweepResult, theme: Theme) -> Figure:
    said = result.scored("texts about the sky", speaks_of("astronomy"))
    return said.plot(("texts about the sky", "nll"), theme=theme)


def circuit() -> Picture:
    """The heads' scores of tutorial 06."""
    model = smollm2()
    find = template_pairs(model, "indirect_object", 48)[:24]
    scores = score_nodes(model, find, method="integrated", steps=1, composite=lenslrp.RelP())
    return lambda theme: head_scores(scores, theme=theme)


def graph() -> Picture:
    """The graph of docs/how-to/graph.md."""
    found = attribution_graph(
        smollm2(), "The capital of France is", LogitDiff(" Paris", " Rome"), k=48, node_share=0.8,
        edge_share=0.8,
    )  # fmt: skip
    return lambda theme: found.draw(theme=theme)


def similarity() -> Picture:
    """The pairs of words of docs/how-to/similarity.md."""
    encoder = lenslrp.load("all-minilm-l6-v2", device="cpu")
    pairs = bilrp(encoder, "A cat sat on the mat.", "The kitten is resting on a rug.").words()
    return lambda theme: pairs.plot(theme=theme)


DRAWN = (report, difference, generation, photograph, neuron, circuit, graph, similarity, steering)
PICTURES = {f.__name__: f for f in DRAWN}


def browser(folder: str, theme: Theme) -> list[str]:
    """The command of a headless Chromium without a network, its profile in `folder`."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise SystemExit("pages are photographed by Chromium, which is not installed")
    return [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--proxy-server=127.0.0.1:9", f"--user-data-dir={folder}/profile",
        f"--blink-settings=preferredColorScheme={0 if theme is DARK else 1}",
    ]  # fmt: skip


def page(html: str, theme: Theme) -> str:
    """A page in a theme, around what is no page itself."""
    if "<html" in html:
        return html
    body = f'<body style="margin:0;background:{theme.paper}">{html}</body>'
    scheme = "dark" if theme is DARK else "light"
    return f'<!DOCTYPE html><html theme="{scheme}">{body}</html>'


def photographed(
    html: str, width: int, height: int, theme: Theme, path: Path, scale: float
) -> None:
    """A page as the browser shows it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page(html, theme), encoding="utf-8")
        subprocess.run(
            [*browser(folder, theme), f"--window-size={width},{height + 200}",
             f"--force-device-scale-factor={scale}", f"--screenshot={path}", file.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    with Image.open(path) as taken:  # the browser leaves the lower end of a small window empty
        taken.crop((0, 0, round(width * scale), round(height * scale))).save(path)


def save_picture(
    drawn: Figure | tuple[str, int, int], theme: Theme, path: Path, scale: float = SCALE
) -> None:
    """A small PNG of a figure, or of a page."""
    if isinstance(drawn, tuple):
        photographed(*drawn, theme, path, scale)
    else:
        drawn.savefig(path, dpi=min(130, TALLEST / drawn.get_figheight()))
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {small.width} x {small.height}, {size / 1000:.0f} kB")
    if size > LIMIT:
        raise SystemExit(f"{path.name} is larger than {LIMIT} bytes")


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PICTURES:
        draw = PICTURES[name]()
        for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
            save_picture(draw(theme), theme, OUT / f"{name}{suffix}.png")


if __name__ == "__main__":
    main()
