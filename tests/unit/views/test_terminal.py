"""The terminal heatmap: colour where there is colour, numbers where not, tokens only as text."""

import io
import re

import pytest
import torch
from rich.console import Console

from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from lenslrp.views.terminal import render
from tests.unit.fake_relevance import NASTY, fake_relevance
from tests.unit.views.test_heatmap import UNSEEN


def printed(R, *, colour, **options):
    console = Console(
        file=io.StringIO(),
        width=200,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    console.print(render(R, **options))
    return console.file.getvalue()


def test_without_colour_every_token_has_its_signed_number():
    out = printed(fake_relevance(), colour=False)
    assert "The (+1.31) ·Eiffel (+4.92) ·Tower (+2.40)" in out
    assert "·located (-0.35)" in out
    assert "\x1b" not in out


def test_with_colour_red_is_positive_and_blue_negative():
    out = printed(fake_relevance(["a", "b", "c"], [2.0, -2.0, 0.01]), colour=True)
    assert "48;2;214;39;55ma" in out
    assert "48;2;43;120;205mb" in out
    assert re.search(r"\x1b\[0mc\n", out)
    assert "(+2.00)" not in out


def test_heading_names_the_target_and_its_value():
    assert "logit of ' Paris' at position -1 = 17.4" in printed(fake_relevance(), colour=False)


@pytest.mark.parametrize("colour", [True, False])
def test_no_token_drives_the_terminal_or_becomes_markup(colour):
    out = printed(fake_relevance(NASTY, None), colour=colour, k=len(NASTY))
    own = re.sub(r"\x1b\[[\d;]*m", "", out) if colour else out
    assert not re.search(UNSEEN, own)
    for token in NASTY:
        assert visible(token) in own


def test_the_largest_tokens_are_listed_with_their_positions():
    tokens = ["pad", "a", "b", "c"]
    R = fake_relevance(tokens, [0.0, 1.0, -3.0, 2.0], mask=[False, True, True, True])
    out = printed(R, colour=False, k=2)
    rows = re.findall(r"^ +(\d) +(\S+) +(\S+) +([#-]+)", out, re.MULTILINE)
    assert rows == [("1", "b", "-3.00", "-" * 12), ("2", "c", "+2.00", "#" * 8)]
    assert "1 padding tokens are not shown" in out


def test_nan_is_shown():
    assert "a (NaN)" in printed(fake_relevance(["a", "b"], [float("nan"), 1.0]), colour=False)


def test_first_token_dominance():
    R = fake_relevance(["<s>", "a"], [40.0, 1.0])
    assert "without_first=True" in printed(R, colour=False)
    assert "colours scaled without the first token" in printed(R, colour=False, without_first=True)


def test_row_out_of_range():
    R = fake_relevance()
    assert R.tokens.shape == torch.Size([1, 9])
    with pytest.raises(InputError, match="row is 1, but R holds 1 rows"):
        render(R, row=1)
