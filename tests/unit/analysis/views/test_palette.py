"""Colours that everyone can read: contrast of text, red apart from blue for colour-blind eyes.

Contrast is that of WCAG 2.2 (success criterion 1.4.3, level AA: 4.5 for text). How colours look
without one kind of cone is after Machado, Oliveira & Fernandes 2009 ("A physiologically-based model
for simulation of color vision deficiency", severity 1), their distance that of CIELAB (1976).
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from lenslrp.analysis.circuits.graph.page import GRAPH_STYLE
from lenslrp.analysis.dictionary.pages.template import DARK_VARIABLES, LIGHT_VARIABLES, UNIT_STYLE
from lenslrp.analysis.views.drawing import DARK, LIGHT, colour_map
from lenslrp.analysis.views.report_template import STYLE as REPORT_STYLE
from lenslrp.views.cards import Face
from lenslrp.views.heatmap import NEGATIVE, POSITIVE, STRONGEST, card, token_heatmap

Colour = tuple[float, ...]

TEXT = 4.5
SIGNS = 3.0
DIMMED = 0.65
"""Opacity of the signs that stand for white space."""

APART = 40.0  # 2.3 is a difference that is just seen

LACKING = {
    "nothing": np.eye(3),
    "long cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "middle cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "short cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def rgb(colour: str) -> Colour:
    """0 to 255, of ``#fff`` or ``#ffffff``."""
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return tuple(float(int(digits[i : i + 2], 16)) for i in (0, 2, 4))


def over(colour: Colour, opacity: float, paper: Colour) -> Colour:
    return tuple(opacity * c + (1 - opacity) * p for c, p in zip(colour, paper, strict=True))


def linear(colour: Colour) -> np.ndarray:
    c = np.array(colour) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: Colour, b: Colour) -> float:
    one, two = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (two + 0.05) / (one + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB, white D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ light / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: Colour, b: Colour, lacking: str) -> float:
    seen = [np.clip(np.array(LACKING[lacking]) @ linear(c), 0, 1) for c in (a, b)]
    return float(np.linalg.norm(lab(seen[0]) - lab(seen[1])))


def variables(style: str) -> dict[str, Colour]:
    return {name: rgb(value) for name, value in re.findall(r"--([\w-]+):(#\w+)", style)}


def themes(style: str) -> tuple[dict[str, Colour], dict[str, Colour]]:
    """A style's variables, light and dark."""
    light, dark = style.split("prefers-color-scheme:dark")[:2]
    return variables(light), variables(dark)


CARD = themes(card("x"))
REPORT = themes(REPORT_STYLE)
UNIT = variables(LIGHT_VARIABLES), variables(DARK_VARIABLES)
FIGURES = [{k: rgb(getattr(t, k)) for k in ("paper", "ink", "muted", "positive", "negative")}
           for t in (LIGHT, DARK)]  # fmt: skip


def texts() -> dict[str, tuple[Colour, Colour]]:
    """Every pair of a text's colour and what is behind it."""
    pairs = {}
    for dark in (0, 1):
        paper, ink, muted = (CARD[dark][f"llrp-{k}"] for k in ("bg", "fg", "muted"))
        figure = FIGURES[dark]
        pairs |= {
            f"card {dark}, {name}": pair
            for name, pair in {
                "text": (ink, paper),
                "notes": (muted, paper),
                "text on red": (ink, over(POSITIVE, STRONGEST, paper)),
                "text on blue": (ink, over(NEGATIVE, STRONGEST, paper)),
                "dimmed": (over(ink, DIMMED, paper), paper),
                "figure": (figure["ink"], figure["paper"]),
                "figure, muted": (figure["muted"], figure["paper"]),
            }.items()
        }
        for page, styles, papers in (
            ("report", REPORT, ("bg", "card")),
            ("unit", UNIT, ("bg", "card")),
        ):
            names = [n for n in ("fg", "muted", "accent", "pos", "neg", "good", "bad")
                     if n in styles[dark]]  # fmt: skip
            pairs |= {
                f"{page} {dark}, {name} on {behind}": (styles[dark][name], styles[dark][behind])
                for name in names
                for behind in papers
            }
    return pairs


@pytest.mark.parametrize(("name", "pair"), texts().items(), ids=texts())
def test_text_can_be_read(name: str, pair: tuple[Colour, Colour]) -> None:
    assert contrast(*pair) >= TEXT


def test_signs_for_white_space_can_be_seen_on_any_tile() -> None:
    for style in CARD:
        for colour in (POSITIVE, NEGATIVE):
            tile = over(colour, STRONGEST, style["llrp-bg"])
            assert contrast(over(style["llrp-fg"], DIMMED, tile), tile) >= SIGNS
    for style in (token_heatmap([" a\n"], [1.0]), UNIT_STYLE):
        opacities = set(re.findall(r"(?<![-\w])opacity:([\d.]+)", style)) - {"0"}
        assert opacities == {f"{DIMMED:.2f}".lstrip("0")}


@pytest.mark.parametrize("lacking", LACKING)
def test_red_and_blue_are_apart_for_everyone(lacking: str) -> None:
    pairs = [(POSITIVE, NEGATIVE)]
    pairs += [(figure["positive"], figure["negative"]) for figure in FIGURES]
    pairs += [(style["pos"], style["neg"]) for style in (*REPORT, *UNIT)]
    for theme in (LIGHT, DARK):
        ends = [tuple(255 * c for c in colour_map(theme)(end)[:3]) for end in (0.05, 0.95)]
        pairs.append((ends[0], ends[1]))
    for style in CARD:
        paper = style["llrp-bg"]
        pairs.append((over(POSITIVE, STRONGEST, paper), over(NEGATIVE, STRONGEST, paper)))
    assert min(distance(*pair, lacking) for pair in pairs) >= APART


def test_what_cannot_be_read_would_be_found() -> None:
    assert (
        contrast(rgb("#8c959f"), rgb("#ffffff")) < TEXT < 21 == contrast(rgb("#000"), rgb("#fff"))
    )
    red, green = rgb("#c0392b"), rgb("#7d7a00")
    assert distance(red, green, "nothing") > APART > distance(red, green, "middle cones")


def test_every_colour_of_a_text_is_among_them() -> None:
    """No style of ours names a colour for text but by the variables above."""
    heatmap = token_heatmap(["a", "b"], [1.0, -1.0])
    for style in (GRAPH_STYLE, Face("title").html(), heatmap, REPORT_STYLE):
        for rule in re.findall(r"(?<![-\w])(?:color|fill):([^;}\"]+)", style):
            assert re.fullmatch(r"var\(--[\w-]+\)|inherit|none|rgba\(.*", rule), rule
