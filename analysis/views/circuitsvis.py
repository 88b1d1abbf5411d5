"""CircuitsVis attention patterns and token views that work offline and take text as text.

CircuitsVis 1.43.3 (Cooney & Nanda) is kept for what it does well: interactive attention heads and
token colours. Used directly, it pings a web host at every display, shows nothing in exported
pages without a network, puts 1.3 MB of script into every cell, sets tokens as HTML (``<bos>``
vanishes, ``</script>`` destroys the cell), goes blank at a NaN, scales each sign by itself and
paints negative red. Here none of its Python runs. Its JavaScript bundle is read from the installed
package and inlined, once a `NotebookPage`; tokens are made inert and visible first; values
that are not finite are left blank and counted; bounds are symmetric; positive is red.

Views need JavaScript. Where it does not run (a sanitising viewer), the place of a view holds a
text or, for tokens, the script-free heatmap of `lenslrp.views.heatmap`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from lenslrp.analysis.views.document import html_document
from lenslrp.analysis.views.drawing import LIGHT
from lenslrp.errors import InputError
from lenslrp.tables import mixer_label
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import token_heatmap

if TYPE_CHECKING:
    from torch import Tensor

    from lenslrp.cache import RelevanceCache

_READY = "lenslrpCircuitsVis"


def _bundle() -> str:
    """CircuitsVis' own script, as an element that defines it once a page and draws what waits."""
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "this view needs circuitsvis, which is not installed; pip install circuitsvis"
        )
    path = Path(spec.submodule_search_locations[0]) / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise ImportError(
            f"circuitsvis is installed without its script {path.name}; this wrapper knows the "
            "layout of circuitsvis 1.43"
        )
    code = path.read_text(encoding="utf-8").rsplit("//# sourceMappingURL", 1)[0]
    # Inside a string literal, the only place where either occurs, the backslash changes nothing.
    code = code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return (
        f"<script>(function(){{if(!window.{_READY}){{{code}\nwindow.{_READY}=CircuitsVis;}}"
        f"(window.{_READY}Waiting||[]).splice(0).forEach(function(draw){{draw();}});}})();</script>"
    )


# Drawn as soon as both the element (notebooks attach it late) and the bundle (whichever view of the
# page holds it) are there.
_DRAW = """<script>(function(){{var tries=0;function draw(){{
if(!document.getElementById({id})){{if(tries++<200)setTimeout(draw,50);return;}}
window.{ready}.render({id},window.{ready}[{component}],{props});}}
if(window.{ready})draw();else(window.{ready}Waiting=window.{ready}Waiting||[]).push(draw);
}})();</script>"""


def _json(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup, whatever the strings in it."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _inert(token: str) -> str:
    """``token`` visible, and the same whether it is set as HTML or as text.

    CircuitsVis does both with one string (token as HTML, tooltip as text), so an entity would
    show as ``&lt;`` in one of them. A word joiner (no width) after ``<`` and ``&`` serves both:
    by the HTML standard neither starts a tag or a reference unless a letter, ``/``, ``!``, ``?``
    or ``#`` follows.
    """
    return visible(token).replace("<", "<\u2060").replace("&", "&\u2060")


def _isolated(token: str) -> str:
    """``token`` visible, its direction isolated, for labels drawn on a canvas."""
    return f"\u2068{visible(token)}\u2069"


@dataclass
class NotebookPage:
    """The views of one notebook or HTML file, among which the first displayed holds the bundle.

    A view made without a page holds its own copy (1.3 MB) and so stands alone.
    """

    bundled: View | None = field(default=None, repr=False)

    def _holds_bundle(self, view: View) -> bool:
        if self.bundled is None:
            self.bundled = view
        return self.bundled is view


@dataclass(eq=False)
class View:
    """One CircuitsVis component with its properties; displays itself in notebooks, offline."""

    component: str
    props: dict[str, Any] = field(repr=False)
    fallback: str = field(repr=False)
    note: str = ""
    page: NotebookPage = field(default_factory=NotebookPage, repr=False)

    def _repr_html_(self) -> str:
        return "".join(self._parts())

    def _parts(self) -> tuple[str, str, str]:
        """The view, the script that draws it, and the bundle where this view holds it."""
        element = f"lenslrp-cv-{uuid4().hex}"
        note = f'<div style="font-size:12px;color:#57606a">{escape(self.note)}</div>'
        draw = _DRAW.format(
            id=_json(element),
            ready=_READY,
            component=_json(self.component),
            props=_json(self.props),
        )
        # CircuitsVis draws dark on nothing; its own white card keeps it legible on dark pages.
        card = "background:#fff;color:#1b1f24;padding:12px;border-radius:8px;margin:8px 0"
        view = (
            f'<div style="{card}"><div id="{element}">{self.fallback}</div>'
            f"{note if self.note else ''}</div>"
        )
        return view, draw, _bundle() if self.page._holds_bundle(self) else ""

    def __html__(self) -> str:
        return self._repr_html_()

    def __str__(self) -> str:
        """A complete HTML page that needs no network."""
        parts = View(self.component, self.props, self.fallback, self.note)._parts()
        scripts = [s.removeprefix("<script>").removesuffix("</script>") for s in parts[1:]]
        return html_document("LensLRP", "".join(parts), scripts=scripts)


def _finite(values: Tensor) -> tuple[Any, float, str]:
    """``values`` as lists with None where not finite, their largest absolute value, and a note."""
    finite = torch.isfinite(values)
    bound = float(values[finite].abs().max()) if bool(finite.any()) else 0.0
    blank = int((~finite).sum())
    note = f"{blank} of {values.numel()} values are not finite and left blank. " if blank else ""

    def lists(rows: Any) -> Any:
        if isinstance(rows, list):
            return [lists(row) for row in rows]
        return rows if math.isfinite(rows) else None

    return lists(values.tolist()), bound, note


def _as_tensor(name: str, values: Any, dimensions: tuple[int, ...], tokens: int) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu().double()
    square = tensor.shape[-2:] if tensor.ndim > 1 else tensor.shape[-1:]
    if tensor.ndim not in dimensions or any(size != tokens for size in square):
        wanted = " or ".join(f"{d} dimensions" for d in dimensions)
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, expected {wanted} "
            f"whose last ones have length {tokens}, the number of tokens"
        )
    return tensor


def _bound(bound: float, scale: float | None) -> float:
    if scale is None:
        return bound or 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale is {scale!r}, expected a positive number")
    return scale


def attention_heads(
    attention: Tensor,
    tokens: Sequence[str],
    *,
    head_names: Sequence[str] | None = None,
    causal: bool = True,
    scale: float | None = None,
    page: NotebookPage | None = None,
) -> View:
    """Attention patterns, or relevance at them, head by head.

    Args:
        attention: ``[head, query, key]`` or one head's ``[query, key]``.
        tokens: ``pos`` tokens as text.
        head_names: one name a head.
        causal: grey out keys after the query.
        scale: value at the full colour; by default the largest absolute value of all heads.
        page: the page that shares one bundle; by default the view holds its own.

    Raises:
        InputError: when shapes do not fit.
        ImportError: when the view is displayed and circuitsvis is missing.
    """
    patterns = _as_tensor("attention", attention, (2, 3), len(tokens))
    patterns = patterns.reshape(-1, len(tokens), len(tokens))
    names = list(head_names) if head_names is not None else None
    if names is not None and len(names) != len(patterns):
        raise InputError(f"head_names has {len(names)} names for {len(patterns)} heads")
    values, largest, note = _finite(patterns)
    bound = _bound(largest, scale)
    props = {
        "attention": values,
        "tokens": [_isolated(token) for token in tokens],
        "attentionHeadNames": [visible(name) for name in names] if names is not None else None,
        "maxValue": bound,
        "minValue": -bound,
        "positiveColor": LIGHT.positive,
        "negativeColor": LIGHT.negative,
        "maskUpperTri": causal,
    }
    props = {name: value for name, value in props.items() if value is not None}
    fallback = f"Attention of {len(patterns)} heads over {len(tokens)} tokens; needs JavaScript."
    note += f"Red positive, blue negative, full colour at {bound:.4g}."
    return View("AttentionHeads", props, escape(fallback), note, page or NotebookPage())


def attention_relevance(
    R: RelevanceCache,
    layer: int,
    *,
    row: int = 0,
    scale: float | None = None,
    page: NotebookPage | None = None,
) -> View:
    """What of the target passed from key to query in a layer, head by head.

    Attention's is its pattern, each entry weighted by its relevance; a recurrent mixer's is the map
    of its scan. A layer that has both (FalconH1) shows both, the mixer's heads by its name.

    Args:
        R: with the relevance of ``blocks.<layer>.attn.hook_pattern``, which is the pattern times
            its coefficient, or of the layer's ``hook_scan_map``. Heads are named with their sums.
        layer: which block.
        row: which row of the batch; its padding is left out.
        scale: value at the full colour; by default the largest absolute value of all heads.
        page: the page that shares one bundle; by default the view holds its own.

    Returns:
        A view that displays itself in a notebook; ``str(view)`` is a complete HTML page.

    Raises:
        InputError: neither was read of this layer, or one was reduced.
        ImportError: when the view is displayed and circuitsvis is missing.

    Examples:
        ```python
        _, R = lenslrp.run_with_relevance(
            model, prompt, names_filter="blocks.5.attn.hook_pattern"
        )
        attention_relevance(R, 5)
        ```
    """
    pattern = f"blocks.{layer}.attn.hook_pattern"
    maps = [n for n in R if n.startswith(f"blocks.{layer}.") and n.endswith("hook_scan_map")]
    kept = R.attention_mask[row].cpu()
    values: list[Tensor] = []
    names: list[str] = []
    for hook in [pattern, *maps] if pattern in R or not maps else maps:
        if R[hook].ndim != 4:
            shape = list(R[hook].shape)
            raise InputError(f"{hook}: patterns were reduced to {shape}: no keys are left")
        values.append(R[hook][row].cpu()[:, kept][:, :, kept])
        label = str(layer) if hook == pattern else mixer_label(hook)
        names += [f"{label}.{head}: {float(v.sum()):+.3g}" for head, v in enumerate(values[-1])]
    tokens = [t for t, real in zip(R.str_tokens[row], kept.tolist(), strict=True) if real]
    return attention_heads(torch.cat(values), tokens, head_names=names, scale=scale, page=page)


def colored_tokens(
    tokens: Sequence[str],
    values: Sequence[float] | Tensor,
    *,
    scale: float | None = None,
    page: NotebookPage | None = None,
) -> View:
    """Tokens on a background of ``values`` [pos], with tooltips; see `attention_heads`."""
    row = _as_tensor("values", values, (1,), len(tokens))
    shown, largest, note = _finite(row)
    bound = _bound(largest, scale)
    props = {
        "tokens": [_inert(token) for token in tokens],
        "values": shown,
        "maxValue": bound,
        "minValue": -bound,
        "positiveColor": LIGHT.positive,
        "negativeColor": LIGHT.negative,
    }
    fallback = token_heatmap(tokens, row.tolist(), scale=scale)
    note += f"Red positive, blue negative, full colour at {bound:.4g}."
    return View("ColoredTokens", props, fallback, note, page or NotebookPage())
