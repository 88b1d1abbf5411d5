"""One unit's page: identity, sentences, vocabulary, behaviour, relations, clamping, provenance.

The page is HTML without a script, in which nothing is loaded: a fragment for a notebook
(`fragment`, which a `Page` shows there by itself) or a file (`write_page`). Everything from texts,
tokens and manifests is escaped by Jinja2. Parts that only the model can tell (attribution, upstream
and downstream units, clamping) are there when it is given, and say so in one line when it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.dictionary.pages.links import clamped, downstream, upstream
from lenslrp.analysis.dictionary.pages.sentences import sentences, stronger_first
from lenslrp.analysis.dictionary.pages.tables import (
    bars,
    column,
    numbers,
    text,
    token_cell,
    tokens_table,
    unit_table,
)
from lenslrp.analysis.dictionary.pages.template import AROUND, PAGE, UNIT_STYLE
from lenslrp.analysis.dictionary.schemas import MOMENTS, kinds
from lenslrp.analysis.dictionary.unit import Page, require_same_model
from lenslrp.analysis.units.kinds import Neuron
from lenslrp.analysis.units.projection import cosines, sign_cases, writes
from lenslrp.analysis.units.readability import READ_TOKENS, TokenRelations, with_status
from lenslrp.analysis.views.document import environment, html_document, section, write_document
from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.units.lens import Lens

NEEDS_MODEL = "it takes the model; give model= to page_html or write_page."
SEARCHED = ("actmax", "actmin", "relmax", "relmin")


def page_html(
    page: Page,
    *,
    model: TransformerBridge | None = None,
    attributed: int = 8,
    examples: int = 10,
    lens: Lens | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The page as a standalone HTML document.

    Args:
        page: of a dictionary, `dictionary[5, 17]`.
        model: the bridge that the dictionary was built from: adds attribution, upstream and
            downstream units, and what clamping the unit does. About a dozen forward and five
            backward passes over `attributed` documents.
        attributed: over how many examples of each criterion the model is run; 0 for none.
        examples: how many of each criterion are shown.
        lens: a relevance lens, through which what the unit writes is read too; needs the model.
        links: name of a unit -> address of its page; `""` -> the index.

    Returns:
        The document, with everything from the dictionary escaped.

    Raises:
        InputError: `model` is not the one that the dictionary was built from.
    """
    body = fragment(
        page, model=model, attributed=attributed, examples=examples, lens=lens, links=links
    )
    return html_document(f"{page.name} · {page.dictionary.plan.model['name']}", body, style=AROUND)


def write_page(
    page: Page, path: str | Path, *, model: TransformerBridge | None = None, **options: Any
) -> Path:
    """Write `page_html` to `path`, whole or not at all.

    Args:
        page: of a dictionary, `dictionary[5, 17]`.
        path: the HTML file.
        model, options: as for `page_html`.

    Returns:
        `path`.

    Raises:
        InputError: as `page_html`.
        StorageError: a file of that name that is not ours is in the way, or the disk is full.

    Examples:
        >>> write_page(dictionary[5, 17], "unit.html", model=model)
        PosixPath('unit.html')
    """
    return write_document(Path(path), page_html(page, model=model, **options))


def fragment(
    page: Page,
    *,
    model: TransformerBridge | None = None,
    attributed: int = 8,
    examples: int = 10,
    lens: Lens | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The page as one `<div>`, for a notebook; arguments as for `page_html`."""
    from markupsafe import Markup

    if model is not None:
        require_same_model(page.dictionary, model)
    asked_model = model if attributed else None
    plan = page.dictionary.plan
    html: str = (
        environment()
        .from_string(PAGE)
        .render(
            style=Markup(UNIT_STYLE),
            model_name=visible(str(plan.model["name"])),
            name=page.name,
            links=dict(links or {}),
            identity=_identity(page),
            facts=_facts(page),
            vocabulary=section(lambda: _vocabulary(page, model, lens)),
            sampled=int(page.histogram().counts.sum()),
            histograms=[bars(page.histogram(kind), kind) for kind in kinds(page.dictionary.plan)],
            moments=_moments(page),
            angles=section(lambda: _angles(page, model)),
            sentences=_sentences(page, asked_model, attributed, examples),
            similar=_similar(page),
            related=_links(page, asked_model, attributed),
            clamp=section(lambda: _clamp(page, asked_model, attributed)),
            provenance=_provenance(page),
        )
    )
    return html


def _identity(page: Page) -> str:
    kind = "MLP neuron" if "mlp" in page.place.hook else page.place.kind.capitalize()
    where = "" if page.place.layer is None else f" in layer {page.place.layer}"
    return (
        f"{kind} {page.index} of {page.place.size}{where}. Its name can be copied: it is a key of "
        "the dictionary, and names the hook point in TransformerLens."
    )


def _facts(page: Page) -> list[tuple[str, str]]:
    s = page.statistics
    facts = [("active (above 0)", f"{s['activation_density']:.1%} of tokens")]
    labels = {"actmax": "largest activation", "actmin": "lowest activation",
              "relmax": "largest relevance"}  # fmt: skip
    for name, label in labels.items():
        if name in page.criteria:
            scores = page.examples(name)["score"]
            if len(scores):
                facts.append((label, f"{scores.iloc[0]:+.3g}"))
    facts.append(
        ("activation, mean ± std", f"{s['activation_mean']:+.2g} ± {s['activation_std']:.2g}")
    )
    return [*facts, ("tokens searched", f"{page.dictionary.manifest['tokens_seen']:,}")]


def _vocabulary(page: Page, model: TransformerBridge | None, lens: Lens | None) -> dict[str, Any]:
    lists_of: dict[str, list[pd.DataFrame]] = {}
    for (role, name, _), frame in page.vocabulary().groupby(
        ["role", "name", "side"], sort=False, observed=True
    ):
        lists_of.setdefault("writes" if role == "writes" else f"reads: {name}", []).append(frame)
    if lens is not None and model is not None:
        through_lens, relations = writes(model, page.unit, lens=lens), TokenRelations.of(model)
        ends = (through_lens.top(READ_TOKENS), through_lens.bottom(READ_TOKENS))
        lists_of["writes, through the lens"] = [with_status(relations, end) for end in ends]
    return {"parts": [tokens_table(lists, title) for title, lists in lists_of.items()]}


def _moments(page: Page) -> dict[str, Any]:
    columns = [column(""), *(column(name, number=True) for name in MOMENTS)]
    rows = []
    for kind in kinds(page.dictionary.plan):
        values = [page.statistics[f"{kind}_{name}"] for name in MOMENTS]
        shown = [
            text(f"{v:.1%}" if n == "density" else f"{v:.3g}")
            for n, v in zip(MOMENTS, values, strict=True)
        ]
        rows.append([text(kind), *shown])
    return {"columns": columns, "rows": rows}


def _angles(page: Page, model: TransformerBridge | None) -> dict[str, Any]:
    if model is None:
        raise InputError(f"cosines between what it reads and writes: {NEEDS_MODEL}")
    unit = page.unit
    cosines_of = [
        (pair.replace(",", ", "), f"{value:+.2f}") for pair, value in cosines(model, unit).items()
    ]
    if not isinstance(unit, Neuron) or len(cosines_of) == 1:
        return {"cosines": cosines_of, "cases": None}
    cases = sign_cases(model, unit)
    columns = [column(title) for title in cases.columns]
    rows = [
        [text(cell) if isinstance(cell, str) else token_cell(cell) for cell in row]
        for row in cases.itertuples(index=False)
    ]
    return {"cosines": cosines_of, "cases": {"columns": columns, "rows": rows}}


def _sentences(
    page: Page, model: TransformerBridge | None, attributed: int, examples: int
) -> dict[str, Any]:
    frames = stronger_first({name: page.examples(name) for name in page.criteria})
    totals = {name: len(frame) for name, frame in frames.items()}
    frames = {name: frame.head(examples) for name, frame in frames.items()}
    absent = f"Attribution of its activation to the tokens: {NEEDS_MODEL}" if model is None else ""
    if model is not None:
        try:
            for name in set(SEARCHED) & set(frames):
                shown = min(attributed, len(frames[name]))
                values = list(page.attributed(model, name, shown)["attributions"])
                empty = [np.empty(0, np.float32)] * (len(frames[name]) - shown)
                frames[name] = frames[name].assign(attributions=[*values, *empty])
        except InputError as error:
            absent = str(error)
    return {**sentences(page, frames, totals), "absent": absent}


def _similar(page: Page) -> list[dict[str, Any]]:
    dictionary = page.dictionary
    parts = []
    for kind in kinds(page.dictionary.plan):
        sampled = int(page.histogram(kind).counts.sum())
        chance = math.sqrt(2 * math.log(max(2, len(dictionary))) / sampled)
        frame = dictionary.similar(page.name, 8, kind=kind)
        mine = dictionary.samples[kind][page.place.first + page.index].float().square()
        largest = float(mine.max() / mine.sum().clamp_min(1))
        frame["name"] = [dictionary.name(unit) for unit in frame["unit"]]
        parts.append(
            {
                "title": f"Co-active units, by {kind}",
                "table": unit_table(frame, "correlation", "correlation"),
                "what": f"Correlation over {sampled} tokens, one a document. By chance alone the "
                f"best of {len(dictionary):,} evenly spread units would reach about "
                f"{min(1.0, chance):.2f}. One token holds {largest:.0%} of this unit's variance.",
            }
        )
    return parts


def _links(page: Page, model: TransformerBridge | None, k: int) -> list[dict[str, Any]]:
    directions: list[tuple[str, str, Callable[..., pd.DataFrame], str, str]] = [
        (
            "Upstream: what made it fire",
            "relevance",
            upstream,
            "relevance",
            "Relevance of earlier neurons and heads for its activation at its best ActMax hits, "
            "summed over positions, median over {n} examples; share of the median activation.",
        ),
        (
            "Downstream: what it moved",
            "change, in std",
            downstream,
            "change",
            "Units after it at its best RelMax hits, with it less without it (scaled by 0 at that "
            "position), median over {n} examples, in standard deviations of the other unit over "
            "all tokens of these documents. Effects on later positions are not counted.",
        ),
    ]
    parts: list[dict[str, Any]] = []
    for title, heading, compute, value, what in directions:
        if model is None:
            parts.append({"title": title, "absent": NEEDS_MODEL, "what": ""})
            continue
        try:
            frame = compute(model, page, k=k)
        except InputError as error:
            parts.append({"title": title, "absent": str(error), "what": ""})
            continue
        n = int(frame["examples"].max()) if len(frame) else 0
        table = unit_table(frame, heading, value)
        parts.append({"title": title, "table": table, "what": what.format(n=n)})
    return parts


def _clamp(page: Page, model: TransformerBridge | None, k: int) -> dict[str, Any]:
    if model is None:
        raise InputError(NEEDS_MODEL)
    frame = clamped(model, page, k=k)
    tokens = [page.dictionary.texts.token(token) for token in frame["token"]]
    titles = ("logit", "off: ×0", "doubled: ×2", "placebo: another ×0", "relevance at hit")
    columns = [column("target"), *(column(title, number=True) for title in titles)]
    changes = numbers([*frame["off"], *frame["doubled"], *frame["placebo"]])
    n = len(frame)
    cells = [
        [token_cell([token]) for token in tokens],
        numbers(frame["logit"], coloured=False),
        changes[:n], changes[n : 2 * n], changes[2 * n :],
        numbers(frame["score"]),
    ]  # fmt: skip
    off, doubled, placebo = (float(frame[c].mean()) for c in ("off", "doubled", "placebo"))
    return {
        "what": "Change of the logit that its relevance explained, over its best RelMax examples, "
        "when its activation is scaled in the whole document. Placebo: another unit of the same "
        "hook point, drawn for each example, is switched off instead.",
        "table": {"columns": columns, "rows": list(zip(*cells, strict=True))},
        "note": f"Mean change: off {off:+.3f}, doubled {doubled:+.3f}, placebo {placebo:+.3f}, "
        f"over {n} examples chosen because it mattered there.",
    }


def _provenance(page: Page) -> list[tuple[str, str]]:
    entries = []
    for name, value in page.provenance.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, part in parts:
            label = f"{name}: {key}" if key else name
            entries.append((label, visible(str(part))))
    return entries
