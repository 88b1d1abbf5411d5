"""One standalone HTML page about one prompt: what produced the output, and whether to believe it.

Prompt and target, tokens, layer x position, heads, neurons with what they write, the ledger, the
rules that were used, and the versions of everything. No script runs and nothing is loaded:
figures are inlined as SVG images, which cannot execute, in a light and a dark rendering. Text
from the model or the user is escaped by Jinja2 (autoescape on). Sections whose hook points were
not read say so and are left out. The figures need the extra ``report``.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.analysis.units.projection import neuron_writes
from lenslrp.analysis.units.readability import TokenRelations
from lenslrp.analysis.units.unembedding import unembedding
from lenslrp.analysis.views import figures as plots
from lenslrp.analysis.views.checks import checked
from lenslrp.analysis.views.document import (
    environment,
    html_document,
    provenance,
    section,
    write_document,
)
from lenslrp.analysis.views.drawing import DARK, LIGHT, Theme, require_row
from lenslrp.analysis.views.generation import generation_html
from lenslrp.analysis.views.images import image_map
from lenslrp.analysis.views.report_template import STYLE, TEMPLATE
from lenslrp.errors import InputError
from lenslrp.extras import require
from lenslrp.generation import Generation
from lenslrp.media import labels_of
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import colour_scale, signed, token_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.cache import RelevanceCache

_NEURONS = 12
SOFTMAX = (
    " The softmax's part is evidence for where heads look, which no single token holds: normal "
    "under AttnLRP."
)


def _signed(value: float) -> str:
    """Four significant digits with the sign."""
    return f"{value:+.4g}"


def _column(values: Iterable[float]) -> list[str]:
    """Numbers of one column with the same number of digits, those that its largest one needs."""
    numbers = list(values)
    limit = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    return [signed(number, limit) for number in numbers]


def _image(figure: Figure) -> str:
    """``figure`` as a data URI: SVG with its text as text, the same bytes for the same input."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lenslrp"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _picture(draw: Callable[..., Figure], *args: Any, alt: str, **options: Any) -> dict[str, str]:
    """The figure in both themes, without its title: the page has a heading."""

    def image(theme: Theme) -> str:
        figure = draw(*args, **options, theme=theme)
        figure.axes[0].set_title("", loc="left")
        return _image(figure)

    return {
        "light": image(LIGHT),
        "dark": image(DARK),
        "alt": alt,
        "caption": "",
    }


def _residual(R: RelevanceCache, row: int, dominated: bool) -> dict[str, Any]:
    table = R.residual(row)
    alt = f"Grid of {table.shape[0]} layers by {table.shape[1]} positions of residual relevance."
    figure = _picture(plots.residual_map, R, row, without_first=dominated, alt=alt)
    if dominated:
        figure["caption"] = (
            "The first token outweighs the others, so colours are scaled without it; it is drawn."
        )
    return {"figure": figure}


def _heads(R: RelevanceCache, row: int) -> dict[str, Any]:
    table = R.heads(row)
    alt = f"Grid of {table.shape[0]} layers by {table.shape[1]} heads"
    if table.notna().to_numpy().any():
        layer, head = table.abs().stack().idxmax()
        alt += f"; the largest is layer {layer} head {head} with {table.loc[layer, head]:+.3g}"
    return {"figure": _picture(plots.head_grid, R, row, alt=alt)}


def _sign(value: float) -> str:
    """The style class of a number's colour."""
    return "pos" if value > 0 else "neg" if value < 0 else ""


def _has_vocabulary(model: TransformerBridge | None) -> bool:
    """Whether what neurons write can be read as tokens."""
    if model is None:
        return False
    with contextlib.suppress(InputError):
        unembedding(model)
        return True
    return False


def _neurons(R: RelevanceCache, row: int, model: TransformerBridge | None) -> dict[str, Any]:
    table = R.top("mlp.hook_post", k=_NEURONS, row=row)
    relevance = _column(map(float, table["relevance"]))
    rows = []
    readable = model if _has_vocabulary(model) else None
    relations = None
    if readable is not None and labels_of(readable) is None:  # classes need no reading
        relations = TokenRelations.of(readable)
    for n, entry in enumerate(table.itertuples()):
        writes = []
        if readable is not None:
            layer, neuron = int(entry.layer), int(entry.neuron)
            tokens = neuron_writes(readable, layer, neuron, relations=relations)
            writes = [visible(token) for token in tokens]
        rows.append(
            {
                "layer": entry.layer,
                "neuron": entry.neuron,
                "token": visible(str(entry.token)),
                "position": entry.position,
                "sign": _sign(float(entry.relevance)),
                "relevance": relevance[n],
                "activation": "-" if math.isnan(entry.activation) else _signed(entry.activation),
                "writes": writes,
            }
        )
    return {"rows": rows}


AGREEMENT = (
    "On 50 prompts fixed beforehand, with SmolLM2-135M, the head's check agreed with relevance on "
    "45, and so did the token's (benchmarks/faithfulness/report_checks.py)."
)


def _checks(R: RelevanceCache, row: int, model: TransformerBridge | None) -> dict[str, Any]:
    if model is None:
        raise InputError("it takes the model; give model= to write_report.")
    found = checked(model, R, row)
    relevance = _column(head.relevance for head in found.heads)
    return {
        "token": visible(found.token),
        "of": "next token" if labels_of(model) is None else "class",
        "probability": f"{found.probability:.3f}",
        "rank_note": f"rank {found.rank:,}" if found.rank > len(found.predictions) else "",
        "predictions": [(visible(token), f"{p:.3f}") for token, p in found.predictions],
        "trials": [
            {
                "what": visible(trial.what),
                "after": f"{trial.after:.3f}",
                "control": visible(trial.control),
                "control_after": f"{trial.control_after:.3f}",
                "agrees": trial.agrees,
            }
            for trial in found.trials
        ],
        "heads": [
            f"Head {head.layer}.{head.head} ({value})"
            + (", from the explained position, attends to " if head.attends else "")
            + " and ".join(f"{visible(token)} ({share:.0%})" for token, share in head.attends)
            for head, value in zip(found.heads, relevance, strict=True)
        ],
        "known": AGREEMENT,
    }


def _ledger(R: RelevanceCache) -> dict[str, Any]:
    ledger = R.ledger()
    target = float(ledger.target)
    values = [float(getattr(ledger, name)) for name, _ in plots.LEDGER_TERMS]
    terms = [
        {
            "name": label,
            "sign": _sign(value),
            "value": _signed(value) if value else "0",
            "share": f"{value / target:.1%}" if target else "-",
        }
        for (_, label), value in zip(plots.LEDGER_TERMS, values, strict=True)
    ]
    alt = "Waterfall of the ledger: " + ", ".join(
        f"{term['name']} {term['value']}"
        for term, value in zip(terms, values, strict=True)
        if value
    )
    cells = [
        {
            "name": str(name),
            "cells": [_signed(v) if isinstance(v, float) else str(v) for v in line],
        }
        for name, line in zip(ledger.table.index, ledger.table.to_numpy().tolist(), strict=True)
    ]
    return {
        "figure": _picture(plots.ledger_bars, R, alt=f"{alt}; target {target:+.4g}."),
        "sentence": ledger.sentence + (SOFTMAX if abs(ledger.softmax) > 0.1 * abs(target) else ""),
        "terms": terms,
        "rows": len(R.str_tokens),
        "target": _signed(target),
        "error": f"{float(ledger.error):+.1e}",
        "columns": [str(name) for name in ledger.table.columns],
        "layers": cells,
    }


def _coverage(R: RelevanceCache) -> dict[str, Any]:
    sites = R.coverage.sites
    rules = [
        {
            "role": str(role),
            "rule": str(rule),
            "component": str(component),
            "sites": len(group),
            "fired": int(group["fired"].astype(bool).sum()),
        }
        for (role, rule, component), group in sites.groupby(["role", "rule", "component"])
    ]
    return {
        "count": len(sites),
        "rules": rules,
        "uncovered": [str(name) for name in R.coverage.uncovered],
        "off_path": [str(name) for name in R.coverage.off_path],
        "notes": [str(note) for note in R.coverage.notes],
    }


def _facts(R: RelevanceCache, row: int, values: list[float], ledger: Mapping[str, Any]) -> Any:
    total = math.fsum(value for value in values if math.isfinite(value))
    facts = [
        ("target value", f"{float(R.target.value[row]):.4g}"),
        ("token relevance, sum", _signed(total)),
    ]
    if "error" in ledger:
        facts.append(("ledger error, relative", ledger["error"]))
    return [*facts, ("composite", R.composite.name)]


def require_report() -> None:
    """Refuse to write a report without figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "an HTML report", "report")


def _explained_image(R: RelevanceCache, row: int, image: Any) -> dict[str, str]:
    """The image that was explained, in both themes; its panels keep their titles."""
    light, dark = (_image(image_map(R, row, image=image, theme=theme)) for theme in (LIGHT, DARK))
    alt = f"Relevance of {R.grid[0]} by {R.grid[1]} patches." if R.grid else ""
    return {"light": light, "dark": dark, "alt": alt, "caption": ""}


def report_html(
    R: RelevanceCache, *, model: TransformerBridge | None = None, row: int = 0, image: Any = None
) -> str:
    """The page of `write_report` as a string."""
    require_report()
    template = environment().from_string(TEMPLATE)
    from markupsafe import Markup

    require_row(R, row)
    tokens, mask = R.str_tokens[row], [bool(kept) for kept in R.attention_mask[row]]
    values = [float(value) for value in R.tokens[row]]
    scale = colour_scale(values, mask)
    rescaled = ""
    if scale.dominated:
        rescaled = token_heatmap(
            tokens,
            values,
            attention_mask=mask,
            without_first=True,
            grid=R.grid,
            title="Colours scaled without the first token",
        )
    ledger = section(lambda: _ledger(R))
    text = visible(R.prompts[row])
    if R.grid is not None:
        text = f"an image of {R.grid[0]} x {R.grid[1]} patches"
    body: str = template.render(
        target=visible(R.target.text),
        prompt=text,
        model_name=visible(R.model_name),
        facts=_facts(R, row, [v for v, kept in zip(values, mask, strict=True) if kept], ledger),
        heatmap=Markup(token_heatmap(tokens, values, attention_mask=mask, grid=R.grid)),
        picture_of=None if R.grid is None else _explained_image(R, row, image),
        rescaled=Markup(rescaled),
        checks=section(lambda: _checks(R, row, model)),
        residual=section(lambda: _residual(R, row, scale.dominated)),
        heads=section(lambda: _heads(R, row)),
        neurons=section(lambda: _neurons(R, row, model)),
        writes=_has_vocabulary(model),
        ledger=ledger,
        coverage=_coverage(R),
        provenance=provenance(
            model=R.model_name, composite=R.composite.name, dtype=R.dtype.removeprefix("torch.")
        ),
    )
    title = f"{R.target.text} · LensLRP"
    return html_document(title, body, style=STYLE, allow="; img-src data:")


def write_report(
    R: RelevanceCache | Generation,
    path: str | Path,
    *,
    model: TransformerBridge | None = None,
    row: int = 0,
    image: Any = None,
) -> Path:
    """Write the report on one batch row of ``R`` and return where it is.

    Args:
        R: the result of `lenslrp.run_with_relevance`; or of `lenslrp.explain_generation`, whose
            report is the matrix and the account of each row, without figures.
        path: the HTML file; replaced when the new one is complete.
        model: the bridge that was explained; with it, neurons show what they write.
        row: which batch row.
        image: what a vision model saw, to be drawn under the relevance (see ``R.plot("image")``).

    Returns:
        The path of the file: one page of HTML without scripts, figures inlined.

    Raises:
        InputError: a list or a pair of results; when ``row`` is out of range or the folder of
            ``path`` does not exist.
        MissingExtraError: matplotlib is not installed, for figures.

    Examples:
        ```python
        _, R = lenslrp.run_with_relevance(model, "The capital of France is", " Paris")
        write_report(R, "paris.html", model=model)
        ```
    """
    if isinstance(R, list | tuple):
        raise InputError(
            f"a report is of one result, not a {type(R).__name__}: give R, the second of what "
            "run_with_relevance returns; of a batch, row= says which prompt"
        )
    if isinstance(R, Generation):
        return write_document(Path(path), generation_html(R))
    page = report_html(R, model=model, row=row, image=image)
    return write_document(Path(path), page)
