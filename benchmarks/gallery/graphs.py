"""Attribution graphs of twelve prompts of 2 to 64 tokens: is everything in its frame and readable?

    python -m benchmarks.gallery.graphs --out /tmp/graphs  # --prompts 0 3 for some of them

SmolLM2-135M (embedded), default settings. `faults` reads the SVG: every box, label and curve inside
the frame, no label over another, across a box's edge or under a curve. A row for each prompt, for
what is shown at first and for the whole graph. With `--out` pages are written and photographed by
a headless Chromium at 700, 1,000 and 1,400 pixels, light and dark, to be looked at.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from matplotlib import font_manager

from benchmarks.gallery.pictures import photographed, smollm2
from lenslrp.analysis import attribution_graph
from lenslrp.analysis.circuits.graph.picture import graph_svg
from lenslrp.analysis.views.drawing import DARK, LIGHT
from lenslrp.targets import LogitDiff

PROMPTS: tuple[tuple[str, tuple[str, str] | None], ...] = (
    ("Paris is", None),
    ("Two plus two equals", None),
    ("The capital of France is", (" Paris", " Rome")),
    ("The opposite of hot is", (" cold", " warm")),
    ("She poured the milk, he poured the", None),
    ("When Mary and John went to the store, John gave a drink to", (" Mary", " John")),
    ("The keys to the old cabinet in the hallway of the house", (" are", " is")),
    ("def add(a, b):\n    return a", None),
    ("Le chat noir dort sur le canapé, et le chien dort sur le", None),
    ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday,", None),
    (
        "In 1969 the first astronauts walked on the surface of the Moon, and the whole world "
        "watched them on television. Many years later people still remember the name of the first "
        "man who stepped out, Neil",
        None,
    ),
    (
        "Water boils at one hundred degrees Celsius at sea level, but on a high mountain the "
        "pressure of the air is lower, and so the water there boils at a lower temperature; that "
        "is why cooking an egg in the mountains takes more time than cooking it by the sea. In "
        "short, at high altitude food takes longer to",
        None,
    ),
)

Box = tuple[float, float, float, float]
SPACE = "{http://www.w3.org/2000/svg}"
LETTERS = 11.0


def text_width(text: str) -> float:
    """Of a text in DejaVu Sans, wider than most browsers' fonts, in pixels; a square for a letter
    that it lacks."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    font.set_size(LETTERS, 72)
    known = "".join(char for char in text if font.get_char_index(ord(char)))
    font.set_text(known)
    width: float = font.get_width_height()[0] / 64 + LETTERS * (len(text) - len(known))
    return width


def shown(parent: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    """The children of a kind that are not hidden."""
    return (e for e in parent.findall(SPACE + tag) if e.attrib.get("display") != "none")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def curves(svg: ElementTree.Element) -> Iterator[tuple[np.ndarray, float]]:
    """Points [101, 2] of every curve that is shown, and half of its width."""
    t = np.linspace(0, 1, 101)[:, None]
    blend = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    for path in shown(svg, "path"):
        points = np.array(numbers(path.attrib["d"])).reshape(4, 2)
        yield blend @ points, float(path.attrib["stroke-width"]) / 2


def boxes(svg: ElementTree.Element) -> list[tuple[Box, Box, str]]:
    """Of every node: its box, its label's and its label."""
    found = []
    for group in shown(svg, "g"):
        x, y = numbers(group.attrib["transform"])
        rect = group.find(f"{SPACE}rect[@class='paper']")
        text = group.find(f"{SPACE}text")
        assert rect is not None and text is not None and list(group)[-1] is text
        left, top, width, height = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        label = text.text or ""
        half = text_width(label) / 2
        box = (x + left, y + top, x + left + width, y + top + height)
        found.append((box, (x - half, y + 4 - LETTERS, x + half, y + 7), label))
    return found


def names(svg: ElementTree.Element) -> list[tuple[Box, str]]:
    """Of every row: the box of its name, and the name."""
    found = []
    for text in shown(svg, "text"):
        x, y, name = float(text.attrib["x"]), float(text.attrib["y"]), text.text or ""
        found.append(((x, y - LETTERS, x + text_width(name), y + 3), name))
    return found


def inside(inner: Box, outer: Box) -> bool:
    return (
        outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )  # fmt: skip


def apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def faults(svg: ElementTree.Element) -> list[str]:
    """What leaves the frame, or cannot be read; empty for a good picture."""
    left, top, width, height = numbers(svg.attrib["viewBox"])
    frame = (left, top, left + width, top + height)
    nodes, rows, found = boxes(svg), names(svg), []
    everything = [*((box, label) for box, _, label in nodes), *rows]
    found += [f"{label!r} leaves the frame" for box, label in everything if not inside(box, frame)]
    found += [f"{label!r} leaves its box" for box, text, label in nodes if not inside(text, box)]
    for i, (a, one) in enumerate(everything):
        found += [f"{one!r} and {two!r} overlap" for b, two in everything[:i] if not apart(a, b)]
    for points, half in curves(svg):
        low, high = points.min(axis=0) - half, points.max(axis=0) + half
        if not inside((*low, *high), frame):
            found.append(f"a curve from {points[0]} leaves the frame")
        for (x0, y0, x1, y1), name in rows:
            x, y = points.T
            if ((x0 - half < x) & (x < x1 + half) & (y0 - half < y) & (y < y1 + half)).any():
                found.append(f"a curve runs through {name!r}")
    # Nodes are opaque and come after all curves, so that no curve hides a label.
    order = [child.tag.removeprefix(SPACE) for child in svg]
    if "path" in order[order.index("g") :]:
        found.append("a curve is drawn over nodes")
    return found


def behind(svg: ElementTree.Element) -> tuple[int, int]:
    """How many curves run behind a node between their ends, and how many there are."""
    count, total = 0, 0
    for points, _ in curves(svg):
        x, y = points[5:-5].T
        total += 1
        count += any(
            ((x0 < x) & (x < x1) & (y0 < y) & (y < y1)).any()
            for (x0, y0, x1, y1), _, _ in boxes(svg)
        )
    return count, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=range(len(PROMPTS)))
    parser.add_argument("--out", type=Path, help="where pages and photographs go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, bad = smollm2(), 0
    print("| tokens | nodes | shown | edges | behind a node | size | faults |")
    print("|---|---|---|---|---|---|---|")
    for index in options.prompts:
        prompt, pair = PROMPTS[index]
        graph = attribution_graph(model, prompt, LogitDiff(*pair) if pair else None)
        folded = graph.folded()
        for count in (25, len(folded.nodes)):
            svg = ElementTree.fromstring(graph_svg(folded, count))
            wrong, (hidden, edges) = faults(svg), behind(svg)
            _, _, width, height = numbers(svg.attrib["viewBox"])
            print(f"| {len(graph.str_tokens)} | {len(folded.nodes)} | {len(boxes(svg))} | {edges} "
                  f"| {hidden} | {width:.0f} x {height:.0f} | {'; '.join(wrong) or 0} |",
                  flush=True)  # fmt: skip
            bad += len(wrong)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            page = graph.to_html(options.out / f"{index}.html")
            for width in (700, 1000, 1400):
                for theme, name in ((LIGHT, "light"), (DARK, "dark")):
                    photographed(
                        page, width, 1400, theme, options.out / f"{index}-{width}-{name}.png"
                    )
    if bad:
        raise SystemExit(f"{bad} faults")


if __name__ == "__main__":
    main()
