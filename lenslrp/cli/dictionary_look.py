"""``lenslrp dictionary show``, ``find`` and ``search``: looking into a dictionary that is there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.cli.options import (
    OK,
    add_model_options,
    check_writable,
    console,
    load_model,
    write_keeping,
)

if TYPE_CHECKING:
    import pandas as pd

    from lenslrp.analysis.dictionary.finding import Found

CRITERIA = ("actmax", "actmin", "relmax", "relmin", "deciles", "random")
FINDS = ("examples", "writes", "meaning")
SEARCHES = ("text", "hits", "writes", "reads")


def add_path(command: argparse.ArgumentParser, text: str = "folder of the dictionary") -> None:
    """The folder, as a command's first argument."""
    command.add_argument("path", metavar="PATH", type=Path, help=text)


def add_show(actions: Any) -> None:
    """Add the action: one unit."""
    show = actions.add_parser(
        "show", help="one unit", description="One unit's page, in the terminal or as HTML."
    )
    show.set_defaults(run=_show)
    add_path(show)
    show.add_argument(
        "unit",
        metavar="UNIT",
        help="such as 'blocks.5.mlp.hook_post[17]', or 5,17: layer and index of the first site",
    )
    show.add_argument(
        "--criterion", nargs="+", choices=CRITERIA, help="(default: actmax and relmax)"
    )
    show.add_argument(
        "--k", type=int, metavar="N", default=5, help="examples of each (default: %(default)s)"
    )
    show.add_argument("--html", metavar="FILE", type=Path, help="write the page here instead")
    add_model_options(show, "--model", rules=False, default=None)


def add_find(actions: Any) -> None:
    """Add the action: units by a concept."""
    find = actions.add_parser(
        "find",
        help="units by the words of a concept",
        description="Units by the share and strength of their examples that hold one of the "
        "words, beside chance; by what they write; or by the meaning of their examples.",
    )
    find.set_defaults(run=_find)
    add_path(find)
    find.add_argument("words", metavar="WORD", nargs="+", help="words or phrases")
    find.add_argument(
        "--by",
        choices=FINDS,
        default="examples",
        help="examples: they hold the words; writes: weights raise the words' tokens (takes "
        "--model); meaning: a sentence encoder finds the examples near (default: %(default)s)",
    )
    find.add_argument("--criterion", choices=CRITERIA, help="whose examples (default: actmax)")
    find.add_argument(
        "--limit", type=int, metavar="N", default=10, help="units (default: %(default)s)"
    )
    find.add_argument("--json", action="store_true", help="print a JSON array of records")
    add_model_options(find, "--model", rules=False, default=None)


def add_search(actions: Any) -> None:
    """Add the action: units by words or tokens."""
    search = actions.add_parser(
        "search",
        help="units by words or by tokens",
        description='Units by words and "phrases" of their sentences, or by a token.',
    )
    search.set_defaults(run=_search)
    add_path(search)
    search.add_argument("query", metavar="QUERY", help="words, or with --by a token")
    search.add_argument(
        "--by",
        choices=SEARCHES,
        default="text",
        help="text: sentences; hits: at which token a unit fires; writes, reads: the lists of its "
        "weights (default: %(default)s)",
    )
    search.add_argument(
        "--tokens", dest="by", action="store_const", const="hits", help="short for --by hits"
    )
    search.add_argument("--criterion", choices=CRITERIA, help="whose examples, of text and hits")
    search.add_argument(
        "--limit", type=int, metavar="N", default=20, help="rows (default: %(default)s)"
    )
    search.add_argument("--json", action="store_true", help="print a JSON array of records")


def unit_key(text: str) -> Any:
    """A unit of the command line as a key of a dictionary: ``5,17``, or its text."""
    layer, _, index = text.partition(",")
    return (int(layer), int(index)) if layer.isdecimal() and index.isdecimal() else text


def _show(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.errors import InputError
    from lenslrp.files import HTML

    if options.model is not None and options.html is None:
        raise InputError("--model adds to the page what only the model can tell: give --html too")
    if options.html is not None:
        check_writable("--html", options.html, HTML)
    dictionary = NeuronDictionary.open(options.path)
    page = dictionary[unit_key(options.unit)]
    if options.html is not None:
        from lenslrp.analysis.dictionary.pages.page import write_page

        model = None if options.model is None else load_model(options)
        write_keeping(options.html, lambda: write_page(page, options.html, model=model))
        print(options.html.absolute())
    else:
        from lenslrp.analysis.dictionary.pages.terminal import render_unit

        criteria = options.criterion or [c for c in ("actmax", "relmax") if c in page.criteria]
        console().print(render_unit(page, criteria, options.k))
    dictionary.close()
    return OK


def _find(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.export.jsonl import records
    from lenslrp.analysis.dictionary.finding import Found
    from lenslrp.errors import InputError

    if (options.by == "writes") != (options.model is not None):
        raise InputError("--by writes reads the weights: give --model with it, and only with it")
    model = None if options.model is None else load_model(options)
    dictionary = NeuronDictionary.open(options.path)
    criterion = options.criterion or dictionary.plan.criteria[0]
    found = dictionary.find(
        *options.words, criterion=criterion, limit=options.limit, by=options.by, model=model
    )
    dictionary.close()
    if options.json:
        print(json.dumps(records(found.units)))
    elif not len(found):
        print("nothing found", file=sys.stderr)
    elif isinstance(found, Found):
        console().print(_grouped(found))
    else:
        console().print(_near(found.units) if "sentence" in found.units else _table(found.units))
    return OK


def _grouped(found: Found) -> Any:
    """Units that are shown with the same places together, with the strongest examples."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from lenslrp.text.visible_text import running

    parts: list[Any] = []
    for head, others, matches in found.groups():
        parts.append(Text(head, "bold"))
        if others:
            parts.append(Text(f"the same places: {', '.join(others)}", "dim"))
        for match in matches:
            pieces = [
                (running(text), "underline bold" if marked else "") for text, marked in match.pieces
            ]
            parts.append(Padding(Text.assemble(*pieces), (0, 0, 0, 4)))
    return Group(*parts)


def _near(frame: pd.DataFrame) -> Any:
    """Units with the nearest of their examples below each."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from lenslrp.text.visible_text import running

    parts: list[Any] = []
    for row in frame.to_dict("records"):
        about = f"{row['score']:+.3f}, document {row['doc']}"
        parts.append(Text(f"{row['hook']}[{row['index']}]  {about}", "bold"))
        parts.append(Padding(Text(running(row["sentence"].strip())), (0, 0, 0, 4)))
    return Group(*parts)


def _search(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.export.jsonl import records

    dictionary = NeuronDictionary.open(options.path)
    if options.by == "text":
        results = dictionary.search_text(
            options.query, criterion=options.criterion, limit=options.limit
        )
    else:
        criterion = options.criterion or dictionary.plan.criteria[0]
        results = dictionary.search_tokens(
            options.query, by=options.by, criterion=criterion, limit=options.limit
        )
    dictionary.close()
    if options.json:
        print(json.dumps(records(results)))
    elif results.empty:
        print("nothing found", file=sys.stderr)
    else:
        console().print(_cited(results) if "window" in results else _table(results))
    return OK


def _cited(frame: pd.DataFrame) -> Any:
    """Units with the text around the hit below each: a text needs the width of the terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from lenslrp.text.visible_text import visible

    parts: list[Any] = []
    for row in frame.to_dict("records"):
        unit, place = f"{row['hook']}[{row['index']}]", f"document {row['doc']}"
        text = f"{row['criterion']} {row['rank']}, {row['score']:.4g}, {place}"
        parts.append(Text(f"{unit}  {text}, position {row['position']}"))
        parts.append(Padding(Text(visible(row["window"].strip())), (0, 0, 0, 4)))
    return Group(*parts)


def _table(frame: pd.DataFrame) -> Any:
    from rich.table import Table
    from rich.text import Text

    from lenslrp.text.visible_text import visible

    table = Table(box=None, pad_edge=False, header_style="dim")
    names = [name for name in frame if name not in ("unit", "hook", "index")]
    for name in ("unit", *names):
        table.add_column(str(name), no_wrap=True, overflow="fold")
    for row in frame.to_dict("records"):
        cells = [f"{row['hook']}[{row['index']}]", *(row[name] for name in names)]
        shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        table.add_row(*(Text(visible(cell)) for cell in shown))
    return table
