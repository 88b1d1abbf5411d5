"""A dictionary for other readers: Neuronpedia's bulk layout, and standalone HTML pages.

The layout is what Neuronpedia's importer reads (github.com/hijohnnylin/neuronpedia): one folder a
source, with `model.jsonl`, `release.jsonl`, `sourceset.jsonl` and `source.jsonl` beside
`features/batch-*.jsonl.gz` and `activations/batch-*.jsonl.gz`
(`apps/webapp/app/api/admin/import/route.ts`). The fields are the columns of `Model`,
`SourceRelease`, `SourceSet`, `Source`, `Neuron` and `Activation` in
`apps/webapp/prisma/schema.prisma`; batches hold 1,024 units, as in
`utils/neuronpedia-utils/neuronpedia_utils/export-data.py`; `creatorId` is the user that
`apps/webapp/prisma/seed.ts` makes for what is imported. In `binMin`, `binMax` and
`binContains`, -1 marks the largest activations, as SAEDashboard's converter writes them
(`sae_dashboard/neuronpedia/neuronpedia_converter.py`).

Neuronpedia has no place for relevance beside activation, so relevance becomes a source of its own.

Names in a dictionary may come from a stranger: folders and files get names of letters, digits,
dots, dashes and underscores only.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenslrp.analysis.dictionary.export.index_page import index_html
from lenslrp.analysis.dictionary.pages.page import page_html
from lenslrp.analysis.dictionary.plan import Place
from lenslrp.analysis.dictionary.unit import Page
from lenslrp.analysis.units.readability import is_readable
from lenslrp.analysis.views.document import write_document
from lenslrp.errors import InputError, StorageError
from lenslrp.files import HTML, make_folder, remove_leftovers, require_ours, slug, whole
from lenslrp.text.visible_text import running, visible
from lenslrp.text.words import piece_at

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary

UNITS_IN_FILE = 1024
"""Units in a file."""

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that Neuronpedia's seed makes, to whom what is imported belongs."""

SEARCHED_SENTENCES = 5
"""Of each of ActMax and RelMax, in the index of pages."""

SOURCE_KINDS = {"activation": "actmax", "relevance": "relmax"}
"""What a source shows, and by which criterion its best examples are chosen."""


def export_neuronpedia(
    dictionary: NeuronDictionary,
    folder: str | Path,
    *,
    model_id: str | None = None,
    source_set: str = "lenslrp",
    creator: str = CREATOR,
) -> list[Path]:
    """Write a dictionary in the layout that Neuronpedia imports.

    For each hook point `folder/<model>/<layer>-<source set>-<site>`, and the same with `-relevance`
    where relevance was searched. The examples are the largest (`actmax`, `relmax`) and, for
    activation, those at the deciles; values are those of the window. What the unit writes to the
    vocabulary becomes `pos_str` and `neg_str`.

    Args:
        dictionary: an open one.
        folder: is made where it does not exist. An earlier export is replaced.
        model_id: Neuronpedia's name of the model; by default the dictionary's, in lower case.
        source_set: how the sources are called together, without the site.
        creator: id of the Neuronpedia user to whom the data belongs.

    Returns:
        The folders written, one a source.

    Raises:
        StorageError: the disk is full, or a file that no export made is in the way.

    Examples:
        >>> export_neuronpedia(dictionary, "out")[0]  # GPT-2, sites: mlp.hook_post
        PosixPath('out/gpt2/0-lenslrp-mlp-hook_post')
    """
    about = dictionary.plan.model["name"] or dictionary.plan.model["architecture"]
    model = slug(model_id or str(about)).replace(".", "-").lower()
    sources = []
    for place in dictionary.plan.places:
        for kind, criterion in SOURCE_KINDS.items():
            if criterion not in dictionary.plan.criteria:
                continue
            end = "" if kind == "activation" else f"-{kind}"
            name = slug(f"{source_set}-{_site(place)}{end}").replace(".", "-")
            source = slug(f"{0 if place.layer is None else place.layer}-{name}", limit=120)
            path = Path(folder) / model / source
            ids = {"modelId": model, "creatorId": creator}
            _write_metadata(path, dictionary, place, {**ids, "name": name, "source": source})
            ids["layer"] = source
            for number, pages in enumerate(_batched(dictionary.pages(place))):
                _write_batch(path, number, pages, kind, {**ids, "sourceSetName": name})
            sources.append(path)
    return sources


def _site(place: Place) -> str:
    """A hook point without its layer: `mlp.hook_post`."""
    return re.sub(r"^(\w*blocks)\.\d+\.", "", place.site if "[" in place.site else place.hook)


def _batched(pages: Iterator[Page]) -> Iterator[Iterator[Page]]:
    while (first := next(pages, None)) is not None:
        yield itertools.chain([first], itertools.islice(pages, UNITS_IN_FILE - 1))


def _write_metadata(
    path: Path, dictionary: NeuronDictionary, place: Place, ids: dict[str, str]
) -> None:
    plan = dictionary.plan
    rights = {"creatorId": ids["creatorId"], "visibility": "PUBLIC"}
    mlps = [p.size for p in plan.places if p.hook.endswith("mlp.hook_post")]
    layers = [p.layer for p in plan.places if p.layer is not None]
    title = f"LensLRP: {place.kind}s at {_site(place)}"
    records: dict[str, dict[str, Any]] = {
        "model": {
            "id": ids["modelId"],
            "displayName": str(plan.model["name"]),
            "displayNameShort": str(plan.model["name"]),
            "layers": max(layers, default=0) + 1,
            "neuronsPerLayer": max(mlps, default=0),
            "owner": "",
            **rights,
        },
        "release": {
            "name": "lenslrp",
            "description": "Units with the sentences in which they are active and relevant.",
            "creatorName": "LensLRP",
            "urls": [],
            **rights,
        },
        "sourceset": {
            "modelId": ids["modelId"],
            "name": ids["name"],
            "description": title,
            "creatorName": "LensLRP",
            "releaseName": "lenslrp",
            "urls": [],
            **rights,
        },
        "source": {
            "id": ids["source"],
            "modelId": ids["modelId"],
            "setName": ids["name"],
            "dataset": str(plan.corpus.get("name") or ""),
            "num_prompts": plan.corpus["documents"],
            "num_tokens_in_prompt": int(plan.corpus["cut"]["context"]),
            "notes": f"{place.hook}; plan {dictionary.manifest['plan_sha256']}",
            **rights,
        },
    }
    _require_own_source(path)
    # The release first: it says that the folder is ours.
    for name, record in sorted(records.items(), key=lambda item: item[0] != "release"):
        with whole(path / f"{name}.jsonl") as part:
            part.write_text(_line(record), encoding="utf-8")


def _require_own_source(path: Path) -> None:
    """A folder for a source: new, empty, or one that an earlier export made.

    Raises:
        StorageError: something else is in it.
    """
    make_folder(path)
    remove_leftovers(path)
    release = path / "release.jsonl"
    if release.is_file():
        require_ours(release, b'"LensLRP"')
    elif any(path.iterdir()):
        raise StorageError(
            f"{path} is in the way: it holds files, and was not made by an export of LensLRP. "
            "Choose another folder, or move it"
        )


def _write_batch(
    path: Path, number: int, pages: Iterator[Page], kind: str, ids: dict[str, str]
) -> None:
    for name in ("features", "activations"):
        make_folder(path / name)
    with (
        whole(path / "features" / f"batch-{number}.jsonl.gz") as features,
        whole(path / "activations" / f"batch-{number}.jsonl.gz") as activations,
        _zipped(features) as feature_file,
        _zipped(activations) as activation_file,
    ):
        for page in pages:
            unit_ids = {**ids, "index": str(page.index)}
            feature_file.write(_line(_feature(page, kind, unit_ids)).encode())
            unit_ids.pop("sourceSetName")
            for record in _activations(page, kind, unit_ids):
                activation_file.write(_line(record).encode())


@contextmanager
def _zipped(path: Path) -> Iterator[gzip.GzipFile]:
    """The same bytes for the same contents: no name and no time in the header."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        yield file


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _feature(page: Page, kind: str, ids: dict[str, str]) -> dict[str, Any]:
    best = page.examples(SOURCE_KINDS[kind])["score"]
    histogram = page.histogram(kind)
    written = _written(page)
    lists = {side: written[written["side"] == side] for side in ("top", "bottom")}
    return {
        **ids,
        "hookName": page.place.hook,
        "hasVector": False,
        "maxActApprox": _finite(best.max()) if len(best) else 0.0,
        "frac_nonzero": _finite(page.statistics[f"{kind}_density"]),
        "freq_hist_data_bar_heights": histogram.counts.tolist(),
        "freq_hist_data_bar_values": [
            _finite(v) for v in (histogram.edges[:-1] + histogram.edges[1:]) / 2
        ],
        "pos_str": lists["top"]["token"].tolist(),
        "pos_values": [_finite(v) for v in lists["top"]["score"]],
        "neg_str": lists["bottom"]["token"].tolist(),
        "neg_values": [_finite(v) for v in lists["bottom"]["score"]],
    }


def _written(page: Page) -> pd.DataFrame:
    """What the unit writes to the vocabulary; empty where the dictionary has no such lists."""
    try:
        frame = page.vocabulary()
    except InputError:
        return pd.DataFrame(columns=["side", "token", "score", "status"])
    return frame[frame["role"] == "writes"]


def _activations(page: Page, kind: str, ids: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The best examples, and for activation those at the deciles, each in its interval."""
    column = f"{kind}s"
    groups = [SOURCE_KINDS[kind]]
    if kind == "activation" and "deciles" in page.criteria:
        groups.append("deciles")
    for criterion in groups:
        low = _finite(page.statistics[f"{kind}_min"])
        for row in page.examples(criterion).to_dict("records"):
            values = [_finite(v) for v in row[column]]
            hit, score = row["position"] - row["start"], _finite(row["score"])
            interval = (low, score, 0.1) if criterion == "deciles" else (-1.0, score, -1.0)
            low = score
            yield {
                **ids,
                "id": _identifier(*ids.values(), criterion, str(row["rank"])),
                "tokens": row["tokens"],
                "values": values,
                "maxValue": values[hit],  # at positions that were not searched there may be more
                "maxValueTokenIndex": hit,
                "minValue": min(values),
                **dict(zip(("binMin", "binMax", "binContains"), interval, strict=True)),
            }


def _finite(value: Any) -> float:
    """Five digits, which is more than windows keep; JSON has no infinities."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0


def _identifier(*parts: str) -> str:
    """25 characters, the same for the same example."""
    return "l" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def export_html(
    dictionary: NeuronDictionary,
    folder: str | Path,
    units: Iterable[Any] | None = None,
    *,
    model: TransformerBridge | None = None,
    **options: Any,
) -> Path:
    """Write a page for each of many units, linked to one another, and an index with a search.

    Args:
        dictionary: an open one.
        folder: is made where it does not exist. Pages of an earlier export are replaced.
        units: keys, as for `dictionary[key]`; None for all.
        model, options: of `lenslrp.analysis.dictionary.pages.page.page_html`.

    Returns:
        `folder/index.html`.

    Raises:
        InputError: no such unit, or no units.
        StorageError: a file of one of these names that is not ours is in the way.

    Examples:
        >>> export_html(dictionary, "site", [(5, 17), (5, 18)])
        PosixPath('site/index.html')
    """
    keys = map(dictionary.name, range(len(dictionary))) if units is None else units
    located = [dictionary.unit_number(key) for key in keys]
    pages = {dictionary.name(place.first + i): (place, i) for place, i in located}
    if not pages:
        raise InputError("no units to export")
    path = make_folder(Path(folder))
    links = {name: f"{slug(name)}-{place.first + i}.html" for name, (place, i) in pages.items()}
    for href in ("index.html", *links.values()):
        require_ours(path / href, HTML)
    rows: list[dict[str, Any]] = []
    sentences: list[list[str]] = []
    for name, href in links.items():
        page = dictionary.page(*pages[name])
        html = page_html(page, model=model, links={**links, "": "index.html"}, **options)
        write_document(path / href, html)
        rows.append({"name": visible(name), "href": href, **_summary(page)})
        sentences.append(_sentences(page))
    title = f"{len(rows)} units of {dictionary.plan.model['name']}"
    what = (
        f"{dictionary.manifest['tokens_seen']:,} tokens searched, corpus: "
        f"{dictionary.plan.corpus['name']}. "
        "Active: share of tokens above 0. Tokens are those at the hits of the best examples."
    )
    return write_document(path / "index.html", index_html(title, what, rows, sentences))


def _sentences(page: Page) -> list[str]:
    """What the search of an index reads of a unit, each line once: sentences, then lists."""
    frames = [page.examples(name) for name in SOURCE_KINDS.values() if name in page.criteria]
    windows = [tokens for frame in frames for tokens in frame["tokens"][:SEARCHED_SENTENCES]]
    sentences = ["".join(map(running, tokens)).strip() for tokens in windows]
    lists = [
        f"writes ({side}): {' '.join(running(token).strip() for token in some['token'])}"
        for side, some in _written(page).groupby("side", sort=False)
    ]
    return list(dict.fromkeys([*sentences, *lists]))


def _summary(page: Page) -> dict[str, Any]:
    """A unit's row in the index."""
    hits = {}
    for criterion in SOURCE_KINDS.values():
        frame = page.examples(criterion) if criterion in page.criteria else pd.DataFrame()
        tokens = [
            piece_at(row["tokens"], row["position"] - row["start"])
            for row in frame.to_dict("records")
        ]
        hits[criterion] = [visible(token) for token in dict.fromkeys(tokens)][:5]
    frame = _written(page)
    top = frame[frame["side"] == "top"]
    related = top["token"][top["status"] == "related"] if is_readable(top) else []
    written = [visible(token) for token in related[:5]]
    best = page.statistics["activation_max"]
    if "actmax" in page.criteria:
        best = page.examples("actmax")["score"].max()
    return {
        **hits,
        "writes": written,
        "density": f"{page.statistics['activation_density']:.1%}",
        "largest": f"{best:+.3g}",
    }
