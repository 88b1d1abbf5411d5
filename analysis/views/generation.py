"""The report on what a model wrote: the matrix, and the account of every row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lenslrp.analysis.views.document import environment, html_document, provenance
from lenslrp.analysis.views.report_template import STYLE
from lenslrp.text.visible_text import visible

if TYPE_CHECKING:
    from lenslrp.generation import Generation

_BODY = """<div class="report"><header class="top">
<div class="brand">LensLRP relevance report · <bdi>{{ model_name }}</bdi></div>
<h1>What the model wrote, and what each token owes</h1>
<p class="prompt"><bdi>{{ prompt }}</bdi><strong><bdi>{{ written }}</bdi></strong></p></header>
<main><section aria-labelledby="matrix"><h2 id="matrix">Written tokens by earlier tokens</h2>
<p class="what">A row is one written token with its probability: how much each token before it
contributed to its {{ of }}. The line divides what was read from what was written. Hover over a cell
for its number.</p>{{ matrix }}</section>
<section aria-labelledby="ledger"><h2 id="ledger">Ledger</h2>
<p class="what">Where each row's value went: what reached the tokens, what the softmax rule took,
and what the other terms did.</p>
<div class="scroll"><table class="data"><thead><tr><th scope="col">token</th>
{%- for name in columns %}<th scope="col" class="n">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for token, cells in rows %}<tr><td><span class="tok">{{ token }}</span></td>
{%- for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></section>
<section aria-labelledby="provenance"><h2 id="provenance">Provenance</h2>
<table class="data"><tbody>{% for name, value in provenance %}<tr><th scope="row">{{ name }}</th>
<td>{{ value }}</td></tr>{% endfor %}</tbody></table></section></main>
<footer>Relevance is activation times modified gradient, in units of the target. One self-contained
file: no script, nothing loaded from elsewhere.</footer></div>"""


def generation_html(G: Generation) -> str:
    """The page of `write_report` on a generation, as a string."""
    from markupsafe import Markup

    rows = []
    for token, log_prob, ledger in zip(G.written, G.log_probs.tolist(), G.ledgers, strict=True):
        rest = ledger.accounted - ledger.leaves - ledger.softmax
        terms = (ledger.target, ledger.leaves, ledger.softmax, rest)
        cells = [f"{math.exp(log_prob):.3f}", *(f"{v:+.4g}" for v in terms), f"{ledger.error:+.1e}"]
        rows.append((visible(token), cells))
    prompt, written = "".join(G.str_tokens[: G.start]), "".join(G.written)
    body = environment().from_string(_BODY).render(
        model_name=G.model_name,
        prompt=visible(prompt),
        written=visible(written),
        of=G.of.replace("_", " "),
        matrix=Markup(G.html()),
        columns=["probability", "target", "leaves", "softmax", "other terms", "relative error"],
        rows=rows,
        provenance=provenance(model=G.model_name, composite=G.composite),
    )  # fmt: skip
    return html_document(f"{written} · LensLRP", body, style=STYLE)
