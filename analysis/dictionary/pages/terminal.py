"""One unit's page in a terminal: identity, vocabulary, statistics, sentences.

The short form of `lenslrp.analysis.dictionary.pages.page`. Text from the dictionary reaches
the terminal only as `rich.text.Text` with control characters replaced (see
`lenslrp.views.terminal`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lenslrp.analysis.dictionary.schemas import MOMENTS, kinds
from lenslrp.analysis.dictionary.unit import Page
from lenslrp.analysis.units.readability import UNRELATED, is_readable
from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import ColourScale, colour_scale, signed
from lenslrp.views.terminal import Heat


def render_unit(page: Page, criteria: Sequence[str] = ("actmax",), k: int = 5) -> RenderableType:
    """A page as a rich renderable: `rich.print(render_unit(dictionary[5, 17]))`.

    Args:
        page: of a dictionary.
        criteria: whose examples.
        k: how many of each.

    Raises:
        InputError: a criterion that was not searched.
    """
    plan = page.dictionary.plan
    model, corpus = str(plan.model["name"]), str(plan.corpus["name"])
    about = f"{page.place.kind} of {model}, over {plan.corpus['tokens']} tokens of {corpus}"
    parts: list[RenderableType] = [Text(page.name, "bold"), Text(visible(about), "dim"), ""]
    parts += [*_vocabulary(page), "", _statistics(page)]
    for criterion in criteria:
        parts += ["", *_examples(page, criterion, k)]
    return Group(*parts)


def _table(*columns: str, numbers: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if numbers and index else "left"
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _vocabulary(page: Page) -> Iterator[RenderableType]:
    try:
        frame = page.vocabulary()
    except InputError as error:
        yield Text(visible(str(error)), "dim")
        return
    table = _table("", "top tokens", "bottom tokens")
    for (role, name), some in frame.groupby(["role", "name"], sort=False):
        sides = (_tokens(some[some["side"] == side]) for side in ("top", "bottom"))
        table.add_row(f"{role} ({name})" if name != "out" else str(role), *sides)
    yield table


def _tokens(some: pd.DataFrame) -> Text:
    """The tokens of a list; dim what does not make it readable."""
    readable = is_readable(some)
    looks = ["" if readable and status == "related" else "dim" for status in some["status"]]
    names = [visible(token) for token in some["token"]]
    tokens = [Text(*part) for part in zip(names, looks, strict=True)]
    return Text("  ").join([*tokens, *([] if readable else [Text(f"({UNRELATED})", "dim")])])


def _statistics(page: Page) -> RenderableType:
    table = _table("over sampled tokens", *MOMENTS, numbers=True)
    for kind in kinds(page.dictionary.plan):
        table.add_row(kind, *(f"{page.statistics[f'{kind}_{name}']:.4g}" for name in MOMENTS))
    return table


def _examples(page: Page, criterion: str, k: int) -> Iterator[RenderableType]:
    """The first `k`, on one scale: relevance where that was searched, activation otherwise."""
    kind = "relevance" if criterion.startswith("rel") else "activation"
    frame = page.examples(criterion).head(k)
    values = [
        row.tolist() for row in frame["activations" if kind == "activation" else "relevances"]
    ]
    everything = [value for row in values for value in row]
    scale: ColourScale = colour_scale(everything, [True] * len(everything))
    yield Text.assemble((criterion, "bold"), (f"  {kind} at each token", "dim"))
    for row, shown in zip(frame.itertuples(), values, strict=True):
        heading = f"{row.rank + 1}. {signed(row.score, scale.limit)}  document {row.doc}"
        if kind == "relevance" and row.target is not None:
            heading += f", for {visible(row.target)} (logit {row.target_value:.4g})"
        yield Text(heading, "dim")
        yield Heat(row.tokens, shown, scale, mark=row.position - row.start)
