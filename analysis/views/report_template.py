"""The Jinja2 template of the report: one page, no script, no remote asset, light and dark.

A string in a module rather than a data file, so that every way of installing the package carries
it. Rendered with autoescape on; only markup that this package made is passed as ``Markup``.
"""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--fg:#1b1f24;--muted:#57606a;
--line:#d8dee4;--accent:#0a58ca;--good:#1a7f37;--bad:#b2182b;--pos:#d62737;--neg:#1f62ad}
@media (prefers-color-scheme:dark){:root{--bg:#0e1014;--card:#15181d;--fg:#e6e9ed;
--muted:#9aa4b0;--line:#2b313a;--accent:#79b8ff;--good:#56d364;--bad:#ff7b86;--pos:#ff5f6b;
--neg:#58a6ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header.top,footer{max-width:1040px;margin:0 auto;padding:0 20px}
header.top{padding-top:36px;padding-bottom:8px}
.brand{font-size:.9em;color:var(--muted);
font-weight:600}
h1{font-size:1.75em;line-height:1.25;margin:.15em 0 .5em;text-wrap:balance}
.prompt{font-size:1.1em;margin:0;padding:.1em 0 .1em .9em;border-left:3px solid var(--line);
white-space:pre-wrap;overflow-wrap:anywhere;color:var(--muted)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:22px 0 6px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px 14px;min-width:0}
.facts dt{font-size:.8em;color:var(--muted)}
.facts dd{margin:.1em 0 0;font-size:1.25em;font-weight:600;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:20px 22px 22px;margin:18px 0}
h2{font-size:1.15em;margin:0 0 .15em}
.what{color:var(--muted);margin:0 0 1em;max-width:85ch;font-size:.95em}
.report .lenslrp-heatmap{background:none;border:0;padding:0;max-width:none;margin-top:14px;
font-size:16px!important;--llrp-fg:var(--fg);--llrp-muted:var(--muted);--llrp-line:var(--line)}
figure{margin:0;text-align:center}
figure img{max-width:100%;height:auto}
figcaption{color:var(--muted);font-size:.88em;text-align:left;margin-top:.4em}
.scroll{overflow-x:auto}
table.data{border-collapse:collapse;width:100%;font-size:.93em;font-variant-numeric:tabular-nums}
table.data caption{text-align:left;color:var(--muted);font-size:.92em;padding:0 0 .5em}
table.data th,table.data td{padding:.4em .9em .4em 0;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top}
table.data th{font-weight:600;color:var(--muted);font-size:.9em;white-space:nowrap}
table.data .n{text-align:right;padding-right:1.4em;white-space:nowrap}
table.data tr:last-child td,table.data tr:last-child th{border-bottom:0}
table.data tr.sum td,table.data tr.sum th{border-top:2px solid var(--line);font-weight:600;
color:var(--fg)}
.pos{color:var(--pos)}.neg{color:var(--neg)}.good{color:var(--good)}.bad{color:var(--bad)}
.tok{display:inline-block;border:1px solid var(--line);border-radius:5px;padding:0 .4em;
margin:0 .3em .15em 0;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
font-size:.9em;overflow-wrap:anywhere}
.columns{display:grid;grid-template-columns:minmax(220px,1fr) minmax(0,2fr);gap:10px 36px}
@media (max-width:720px){.columns{grid-template-columns:minmax(0,1fr)}}
.columns .what{margin:.8em 0 0}
.words{margin:1em 0 0;padding-left:1.2em}
.absent{color:var(--muted);border:1px dashed var(--line);border-radius:8px;padding:.7em 1em;
margin:0}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;
overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent);margin-top:.8em;font-size:.93em}
summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
details ul{columns:18em;font-size:.9em;color:var(--muted);margin:.5em 0 0;padding-left:1.2em}
footer{color:var(--muted);font-size:.85em;padding-top:4px;padding-bottom:40px}
@media print{body{background:none}section{break-inside:avoid}}
"""

TEMPLATE = """<div class="report">
{%- macro picture(figure) -%}
<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{{ figure.dark }}">
<img src="{{ figure.light }}" alt="{{ figure.alt }}"></picture>
{%- if figure.caption %}<figcaption>{{ figure.caption }}</figcaption>{% endif %}</figure>
{%- endmacro %}
{%- macro absent(part) -%}<p class="absent">Left out: {{ part.absent }}</p>{%- endmacro %}
<header class="top"><div class="brand">LensLRP relevance report · <bdi>{{ model_name }}</bdi></div>
<h1>What produced the <bdi>{{ target }}</bdi>?</h1>
<p class="prompt"><bdi>{{ prompt }}</bdi></p>
<dl class="facts">{% for name, value in facts %}<div><dt>{{ name }}</dt>
<dd><bdi>{{ value }}</bdi></dd></div>{% endfor %}</dl></header>
<main>
<section aria-labelledby="tokens"><h2 id="tokens">Tokens</h2>
<p class="what">How much each token of the prompt contributed to the target. Red is evidence for it,
blue against it; hover over a token for its number.</p>
{{ heatmap }}{{ rescaled }}</section>
{% if picture_of %}
<section aria-labelledby="image"><h2 id="image">Image</h2>
<p class="what">The same relevance where it lies in the image, by patch and by pixel; learned
tokens and positions have theirs outside it.</p>
{{ picture(picture_of) }}</section>
{% endif %}

<section aria-labelledby="checks"><h2 id="checks">Is it so?</h2>
{% if checks.absent is defined %}{{ absent(checks) }}{% else %}
<p class="what">What the model gives there, and what becomes of the probability of
<bdi>{{ checks.token }}</bdi> when the most relevant head is switched off or the most relevant token
replaced, each beside a control of the same size: a head of the same layer, and a token of the
prompt, of middling relevance.</p>
<div class="columns"><div><table class="data"><thead><tr><th scope="col">{{ checks.of }}</th>
<th scope="col" class="n">probability</th></tr></thead><tbody>
{% for token, probability in checks.predictions %}<tr><td><span class="tok">{{ token }}</span></td>
<td class="n">{{ probability }}</td></tr>{% endfor %}
{% if checks.rank_note %}<tr><td><span class="tok">{{ checks.token }}</span> {{ checks.rank_note }}
</td><td class="n">{{ checks.probability }}</td></tr>{% endif %}</tbody></table></div>
<div class="scroll"><table class="data"><thead><tr><th scope="col">change</th>
<th scope="col" class="n">probability</th><th scope="col">control</th>
<th scope="col" class="n">probability</th><th scope="col"></th></tr></thead><tbody>
{% for trial in checks.trials %}<tr><td>{{ trial.what }}</td><td class="n">{{ trial.after }}</td>
<td>{{ trial.control }}</td><td class="n">{{ trial.control_after }}</td>
<td>{% if trial.agrees %}<strong class="good">agrees</strong>
{%- else %}<strong class="bad">does not agree</strong>{% endif %}</td></tr>{% endfor %}
</tbody></table>
<p class="what">Agrees: the probability, {{ checks.probability }}, falls, and by more than under the
control. {{ checks.known }}</p></div></div>
{% if checks.heads %}<ul class="words">{% for head in checks.heads %}<li>{{ head }}</li>
{%- endfor %}</ul>{% endif %}{% endif %}</section>

<section aria-labelledby="residual"><h2 id="residual">Layer by position</h2>
<p class="what">Total relevance of the residual stream: where in the text the evidence sits, and
at which layer it moves on to the position that predicts.</p>
{% if residual.absent is defined %}{{ absent(residual) }}
{%- else %}{{ picture(residual.figure) }}{% endif %}
</section>

<section aria-labelledby="heads"><h2 id="heads">Heads</h2>
<p class="what">Relevance that passes through the output of each head.</p>
{% if heads.absent is defined %}{{ absent(heads) }}
{%- else %}{{ picture(heads.figure) }}{% endif %}</section>

<section aria-labelledby="neurons"><h2 id="neurons">Neurons</h2>
<p class="what">The MLP neurons, each at one token, with the largest relevance
{%- if writes %}, and the tokens that their output direction promotes (a negative activation
demotes them), where at least four of the ten highest are related to one another{% endif %}.</p>
{% if neurons.absent is defined %}{{ absent(neurons) }}{% else %}
<div class="scroll"><table class="data"><thead><tr><th scope="col">neuron</th>
<th scope="col">at token</th><th scope="col" class="n">relevance</th>
<th scope="col" class="n">activation</th>
{%- if writes %}<th scope="col">writes</th>{% endif %}</tr></thead><tbody>
{% for n in neurons.rows %}<tr><td><code>blocks.{{ n.layer }}.mlp.hook_post[{{ n.neuron }}]</code>
</td><td><span class="tok">{{ n.token }}</span> {{ n.position }}</td>
<td class="n"><span class="{{ n.sign }}">{{ n.relevance }}</span></td>
<td class="n">{{ n.activation }}</td>
{%- if writes %}<td>{% for text in n.writes %}<span class="tok">{{ text }}</span>
{%- else %}<small>no related tokens</small>{% endfor %}</td>{% endif %}</tr>
{% endfor %}</tbody></table></div>{% endif %}</section>

<section aria-labelledby="ledger"><h2 id="ledger">Ledger</h2>
<p class="what">Where the whole target went: what reached the tokens, and what biases, the softmax
and the other terms took. The terms add up to the target, or the error says by how much not.</p>
{% if ledger.absent is defined %}{{ absent(ledger) }}{% else %}<p>{{ ledger.sentence }}</p>
{{ picture(ledger.figure) }}
<div class="scroll"><table class="data"><caption>In units of the target
{%- if ledger.rows > 1 %}, summed over the {{ ledger.rows }} rows of the batch{% endif %}</caption>
<thead><tr><th scope="col">term</th><th scope="col" class="n">value</th>
<th scope="col" class="n">share of the target</th></tr></thead><tbody>
{% for term in ledger.terms %}<tr><th scope="row">{{ term.name }}</th>
<td class="n"><span class="{{ term.sign }}">{{ term.value }}</span></td>
<td class="n">{{ term.share }}</td></tr>
{% endfor %}<tr class="sum"><th scope="row">target</th><td class="n">{{ ledger.target }}</td>
<td class="n">relative error {{ ledger.error }}</td></tr></tbody></table></div>
{% if ledger.layers %}<details><summary>Layer by layer</summary><div class="scroll">
<table class="data"><thead><tr><th scope="col">layer</th>
{%- for name in ledger.columns %}<th scope="col" class="n">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for layer in ledger.layers %}<tr><th scope="row">{{ layer.name }}</th>
{%- for value in layer.cells %}<td class="n">{{ value }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></details>{% endif %}{% endif %}</section>

<section aria-labelledby="coverage"><h2 id="coverage">Coverage</h2>
<p class="what">Which rule sat where. Every operation on the path needs a rule, or the relevance
behind it means nothing.</p>
<p>{% if coverage.uncovered %}<strong class="bad">{{ coverage.uncovered|length }} operations have no
rule.</strong>{% else %}<strong class="good">Every operation on the path has a rule, is linear,
or is marked plain.</strong>
{%- endif %} {{ coverage.count }} rules attached{% if coverage.off_path %}; \
{{ coverage.off_path|length }} hook points are off the path{% endif %}.</p>
{% if coverage.uncovered %}<ul>{% for name in coverage.uncovered %}<li><code>{{ name }}</code></li>
{%- endfor %}</ul>{% endif %}
{% if coverage.notes %}<ul>{% for note in coverage.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}<div class="scroll"><table class="data"><thead><tr><th scope="col">role</th>
<th scope="col">rule</th><th scope="col">component</th><th scope="col" class="n">sites</th>
<th scope="col" class="n">fired</th></tr></thead><tbody>
{% for rule in coverage.rules %}<tr><td>{{ rule.role }}</td><td>{{ rule.rule }}</td>
<td><code>{{ rule.component }}</code></td><td class="n">{{ rule.sites }}</td>
<td class="n">{{ rule.fired }}</td></tr>{% endfor %}</tbody></table></div>
{% if coverage.off_path %}<details><summary>Hook points off the path</summary><ul>
{%- for name in coverage.off_path %}<li><code>{{ name }}</code></li>{% endfor %}</ul></details>
{% endif %}</section>

<section aria-labelledby="provenance"><h2 id="provenance">Provenance</h2>
<table class="data"><tbody>{% for name, value in provenance %}<tr><th scope="row">{{ name }}</th>
<td>{{ value }}</td></tr>{% endfor %}</tbody></table></section>
</main>
<footer>Relevance is activation times modified gradient, in units of the target. One self-contained
file: no script, nothing loaded from elsewhere.</footer>
</div>"""
