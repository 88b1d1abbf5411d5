"""The Jinja2 templates of a unit's page, without a script, and of an index of pages.

Every style rule names the page's own class, so that the page can be shown inside a notebook; `§`
stands for that class. Tabs are radio buttons: the panel after the checked one is shown. Where
styles are dropped, or a browser does not know `:has`, all panels are shown one after another.
Rendered with autoescape on; only markup that this package made is passed as `Markup`.
"""

from lenslrp.views.heatmap import themed

LIGHT_VARIABLES = (
    "--bg:#fff;--card:#fff;--fg:#1b1f24;--muted:#57606a;--line:#d8dee4;--accent:#0a58ca;"
    "--pos:#b2182b;--neg:#1f62ad;--bar:#8fa3b8;color-scheme:light"
)
DARK_VARIABLES = (
    "--bg:#0e1014;--card:#15181d;--fg:#e6e9ed;--muted:#9aa4b0;--line:#2f363f;--accent:#79b8ff;"
    "--pos:#ff7b86;--neg:#79b8ff;--bar:#5d6f83;color-scheme:dark"
)

# Background and text change together, as in the heatmap: dark text never meets a dark page.
UNIT_STYLE = f"""
{themed("lenslrp-unit", LIGHT_VARIABLES, DARK_VARIABLES)}
.lenslrp-unit{{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,\
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;padding:16px;text-align:left;\
overflow-wrap:anywhere}}
§ *{{box-sizing:border-box}}
§ .wide{{max-width:1040px;margin:0 auto}}
§ .brand,§ .what,§ .note{{color:var(--muted);font-size:.9em}}
§ .brand{{margin:0}}
§ h1{{font-size:1.45em;line-height:1.3;margin:.1em 0 .3em;color:inherit}}
§ h1 code{{user-select:all;font-size:1em}}
§ h2{{font-size:1.1em;margin:0 0 .2em;color:inherit}}
§ summary{{cursor:pointer}}
§ summary h2,§ summary h3{{display:inline}}
§ h3{{font-size:.92em;margin:0 0 .3em;color:var(--muted);font-weight:600}}
§ .what{{margin:0 0 .9em;max-width:88ch}}
§ .note{{margin:.6em 0 0;max-width:88ch}}
§ section{{background:var(--card);border:1px solid var(--line);border-radius:10px;\
padding:16px 20px 18px;margin:14px 0}}
§ dl.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:10px;\
margin:14px 0 0}}
§ dl.facts div{{background:var(--card);border:1px solid var(--line);border-radius:8px;\
padding:8px 12px;min-width:0}}
§ dl.facts dt{{font-size:.8em;color:var(--muted);font-weight:400;float:none;width:auto;\
padding:0}}
§ dl.facts dd{{margin:0;padding:0;float:none;width:auto;font-size:1.1em;\
font-weight:600;font-variant-numeric:tabular-nums}}
§ .columns{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(260px,100%),1fr));\
gap:18px 28px}}
§ .columns.two{{grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));\
margin-top:.6em}}
§ .columns>*{{min-width:0}}
§ .scroll{{overflow-x:auto}}
§ table{{border-collapse:collapse;table-layout:auto;font-size:.92em;width:100%;\
font-variant-numeric:tabular-nums;color:inherit;background:none;margin:0}}
§ th,§ td{{padding:.25em .9em .25em 0;border:0;border-bottom:1px solid var(--line);\
text-align:left;vertical-align:top;background:none;color:inherit}}
§ tbody tr{{background:none}}
§ tr:last-child>td,§ tbody tr:last-child>th{{border-bottom:0}}
§ th{{color:var(--muted);font-weight:600;font-size:.92em;white-space:nowrap}}
§ td,§ th{{overflow-wrap:normal}}
§ .long td{{overflow-wrap:anywhere}}
§ .n{{text-align:right;white-space:nowrap}}
§ td.n,§ th.n{{padding-right:.9em;width:1%}}
§ .pos{{color:var(--pos)}}
§ .neg{{color:var(--neg)}}
§ .faint{{opacity:.65}}
§ code,§ .tok{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;\
color:inherit;background:none;padding:0}}
§ .tok{{display:inline-block;border:1px solid var(--line);border-radius:5px;padding:0 .35em;\
margin:0 .25em .2em 0;white-space:pre-wrap;overflow-wrap:anywhere}}
§ td code{{white-space:nowrap}}
§ a{{color:var(--accent)}}
§ .absent{{color:var(--muted);border:1px dashed var(--line);border-radius:8px;padding:.5em .9em;\
margin:0;font-size:.92em}}
§ svg{{display:block;width:100%;height:auto;max-width:460px}}
§ svg rect{{fill:var(--bar)}}
§ svg line{{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 2}}
§ .ticks{{display:flex;justify-content:space-between;max-width:460px;font-size:.82em;\
color:var(--muted);font-variant-numeric:tabular-nums}}
§ form.tabs{{display:flex;flex-wrap:wrap;gap:0 4px;margin:0}}
§ .tabs label{{order:0;border:1px solid var(--line);border-bottom:0;border-radius:8px 8px 0 0;\
padding:.3em .9em;cursor:pointer;color:var(--muted);font-size:.93em;position:relative;margin:0}}
§ .tabs input{{position:absolute;opacity:0;margin:0}}
§ .tabs label:has(:checked){{color:var(--fg);font-weight:600;box-shadow:inset 0 3px var(--accent)}}
§ .tabs label:has(:focus-visible){{outline:2px solid var(--accent)}}
§ .panel{{order:1;flex:0 0 100%;min-width:0;border-top:1px solid var(--line);padding-top:10px}}
@supports selector(:has(a)){{§ .panel{{display:none}}
§ .tabs label:has(:checked)+.panel{{display:block}}}}
§ .example{{padding:.5em 0 .6em;border-bottom:1px solid var(--line)}}
§ .example:last-child{{border-bottom:0}}
§ .head{{font-size:.85em;color:var(--muted);margin:0 0 .15em}}
§ .head b{{color:var(--fg)}}
§ .line{{display:grid;grid-template-columns:6.2em minmax(0,1fr);gap:.6em;margin:.15em 0}}
§ .line>small{{color:var(--muted);font-size:.8em;padding-top:.2em}}
§ .line.alone{{grid-template-columns:minmax(0,1fr)}}
§ .t{{border-radius:3px;padding:1px 0;white-space:pre-wrap;line-height:1.65;\
print-color-adjust:exact;-webkit-box-decoration-break:clone;box-decoration-break:clone}}
§ .t.hit{{outline:2px solid var(--fg);outline-offset:0;margin:0 2px}}
§ .t.aim{{border-bottom:2px dashed var(--accent)}}
§ .bar{{display:inline-block;width:7em;height:.75em;vertical-align:-.05em;border-radius:3px;\
print-color-adjust:exact}}
§ input[type=search]{{font:inherit;width:min(30em,100%);padding:.35em .7em;color:inherit;\
background:var(--card);border:1px solid var(--line);border-radius:8px}}
§ .found{{max-width:60ch}}
§ .found:empty{{display:none}}
§ mark{{background:none;color:inherit;font-weight:700;text-decoration:underline}}
§ ul.scales{{list-style:none;display:flex;flex-wrap:wrap;gap:.2em 1.6em;margin:0 0 .8em;padding:0;\
font-size:.86em;color:var(--muted)}}
@media (max-width:560px){{.lenslrp-unit{{padding:8px}}§ section{{padding:12px}}
§ .line{{grid-template-columns:minmax(0,1fr);gap:0}}}}
@media print{{§ .panel{{display:block!important}}}}
"""
# Named thrice, a rule is more specific than a notebook's own for its tables and lists.
UNIT_STYLE = UNIT_STYLE.replace("§", ".lenslrp-unit" * 3)

# Of the page around it, where it is a page of its own.
AROUND = (
    "html{background:#fff}@media (prefers-color-scheme:dark){html{background:#0e1014}}"
    "body{margin:0}"
)

PAGE = """<div class="lenslrp-unit"><style>{{ style }}</style><div class="wide">
{%- macro absent(why) -%}<p class="absent">Left out: {{ why }}</p>{%- endmacro %}
{%- macro unit(name) -%}{% if links.get(name) %}<a href="{{ links[name] }}"><code>{{ name }}\
</code></a>{% else %}<code>{{ name }}</code>{% endif %}{%- endmacro %}
{%- macro table(frame) -%}<div class="scroll"><table><thead><tr>
{%- for column in frame.columns %}<th scope="col"{% if column.number %} class="n"{% endif %}>\
{{ column.title }}</th>{% endfor %}</tr></thead><tbody>
{% for row in frame.rows %}<tr>{% for column in frame.columns %}{% set cell = row[loop.index0] %}\
<td{% if column.number %} class="n"{% endif %}>
{%- if column.unit %}{{ unit(cell.text) }}{% elif cell.tokens is defined %}
{%- for token in cell.tokens %}<bdi class="tok {{ cell.look }}">{{ token }}</bdi>\
{%- endfor %}
{%- else %}<span class="{{ cell.look }}">{{ cell.text }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{%- endmacro %}
<header><p class="brand">LensLRP · <bdi>{{ model_name }}</bdi>
{%- if links.get("") %} · <a href="{{ links[""] }}">all pages</a>{% endif %}</p>
<h1><code>{{ name }}</code></h1>
<p class="what">{{ identity }}</p>
<dl class="facts">{% for key, value in facts %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}</dl></header>

<section><h2>Sentences</h2>
<p class="what">{{ sentences.what }}</p>
<ul class="scales">{% for scale in sentences.scales %}<li>{{ scale.name }}
{{ scale.low }} <span class="bar" style="background:linear-gradient(90deg,{{ scale.left }},\
transparent,{{ scale.right }})"></span> {{ scale.high }}</li>{% endfor %}
<li>outlined: the hit</li>{% if sentences.aims %}<li>dashed: where the target is predicted</li>
{%- endif %}</ul>
{% if sentences.absent %}<p class="note">{{ sentences.absent }}</p>{% endif %}
<form class="tabs">{% for tab in sentences.tabs %}
<label><input type="radio" name="criterion"{% if loop.first %} checked{% endif %}>\
{{ tab.title }}</label><div class="panel"><p class="what"><b>{{ tab.title }}</b>: {{ tab.what }}</p>
{% for example in tab.examples %}<div class="example"><p class="head"><b>{{ example.score }}</b>
{{- example.about }}{% if example.target is not none %} · explains \
<bdi class="tok">{{ example.target }}</bdi>{{ example.aim }}{% endif %}</p>
{% for line in example.lines %}<div class="line{% if tab.alone %} alone{% endif %}">
{%- if not tab.alone %}<small>{{ line.name }}</small>{% endif %}<div dir="auto">\
{{ line.tokens }}</div></div>{% endfor %}</div>{% else %}<p class="absent">No examples.</p>
{%- endfor %}{% if tab.more %}<p class="note">{{ tab.more }}</p>{% endif %}</div>{% endfor %}
</form></section>

<section><h2>Vocabulary</h2>
{% if vocabulary.absent is defined %}{{ absent(vocabulary.absent) }}{% else %}
<p class="what">What it writes: tokens whose logits it raises and lowers when it is active.
What it reads: tokens whose embeddings push its input up and down. Through the model's own norms;
scores are logits up to one positive factor. Where four tokens of ten are related to one another,
they are plain and the others faint.</p>
<div class="columns two">{% for part in vocabulary.parts %}<div>\
<h3>{{ part.title }}</h3>{{ table(part.table) }}</div>{% endfor %}</div>{% endif %}\
</section>

<section><h2>How it behaves</h2>
<p class="what">At {{ sampled }} tokens drawn from the corpus, one a document. Bars are counts on a
logarithmic scale; the dashed line is 0.</p>
<div class="columns">{% for part in histograms %}<div><h3>{{ part.title }}</h3>
<svg viewBox="0 0 460 120" role="img" aria-label="{{ part.alt }}">
{%- for bar in part.bars %}<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" \
height="{{ bar.height }}"><title>{{ bar.title }}</title></rect>{% endfor %}
{%- if part.zero is not none %}<line x1="{{ part.zero }}" x2="{{ part.zero }}" y1="0" y2="120"/>
{%- endif %}</svg><div class="ticks"><span>{{ part.low }}</span><span>{{ part.high }}</span></div>
</div>{% endfor %}</div>
{{ table(moments) }}
{% if angles.absent is defined %}{{ absent(angles.absent) }}{% else %}
<p class="note">Cosines between what it reads and what it writes:
{% for key, value in angles.cosines %}cos({{ key }}) = <b>{{ value }}</b>{{ ", " if not loop.last }}
{%- endfor %}. Near 1 it strengthens what it finds, near -1 it removes it.</p>
{% if angles.cases %}<h3 style="margin-top:1em">The four ways in which a gated neuron fires:
activation = f(gate) × in</h3>{{ table(angles.cases) }}{% endif %}{% endif %}</section>

<section><h2>Related units</h2>
{% for parts in (similar, related) %}<div class="columns two">{% for part in parts %}<div>
<h3>{{ part.title }}</h3>{% if part.absent is defined %}{{ absent(part.absent) }}{% else %}
{{ table(part.table) }}<p class="note">{{ part.what }}</p>{% endif %}</div>{% endfor %}</div>
{% endfor %}</section>

<section><h2>Clamping it</h2>
{% if clamp.absent is defined %}{{ absent(clamp.absent) }}{% else %}
<p class="what">{{ clamp.what }}</p>{{ table(clamp.table) }}<p class="note">{{ clamp.note }}</p>
{% endif %}</section>

<section><details><summary><h2>Provenance</h2></summary>
<div class="scroll"><table class="long"><tbody>
{% for key, value in provenance %}<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div></details></section>
</div></div>
"""

INDEX = """<div class="lenslrp-unit"><style>{{ style }}</style><div class="wide">
<header><p class="brand">LensLRP</p><h1><bdi>{{ title }}</bdi></h1>
<p class="what">{{ what }}</p>
<p hidden><input type="search" aria-label="Search" placeholder="words of names, tokens and \
sentences"> <output class="note"></output></p></header>
<section><div class="scroll"><table><thead><tr><th scope="col">unit</th>
<th scope="col" class="n">active</th><th scope="col" class="n">largest</th>
{%- for title in lists %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr><td><a href="{{ row.href }}"><code>{{ row.name }}</code></a>\
<p class="found note"></p></td>
<td class="n">{{ row.density }}</td><td class="n">{{ row.largest }}</td>
{% for name in lists.values() %}<td>{% for token in row[name] %}\
<bdi class="tok">{{ token }}</bdi>{% endfor %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></section></div></div>
<script type="application/json" id="sentences">{{ sentences }}</script>
<script>{{ script }}</script>
"""
