"""``lenslrp dictionary``: build, merge, show, search and export dictionaries of units."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.cli.dictionary_look import (
    CRITERIA,
    add_find,
    add_path,
    add_search,
    add_show,
    unit_key,
)
from lenslrp.cli.options import (
    COMPOSITES,
    OK,
    add_model_options,
    check_writable,
    composite,
    load_model,
    own_device,
    write_keeping,
)

if TYPE_CHECKING:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.plan import Plan

TARGETS = ("next", "argmax", "logit_diff")
FORMATS = ("html", "jsonl", "neuronpedia")


def add_dictionary(commands: Any) -> None:
    """Add the command to the others (what ``add_subparsers`` returned)."""
    command = commands.add_parser(
        "dictionary",
        help="what every unit of a model does, over a corpus",
        description="Build a dictionary of all units of a model over a corpus, look at one unit, "
        "search, export.",
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    for add in (_add_build, _add_merge, add_show, add_find, add_search, _add_export):
        add(actions)


def _add_build(actions: Any) -> None:
    build = actions.add_parser(
        "build",
        help="build a dictionary, or go on with one that was interrupted",
        description="Build a dictionary, or go on with one that was interrupted: give the same "
        "arguments again. Under torchrun, accelerate launch or Slurm, all processes share the "
        "work. With --shard R/N this process scans one share, on a disk that all of them see; "
        "then 'merge' makes the dictionary.",
    )
    build.set_defaults(run=_build)
    add_model_options(build, "model")
    build.add_argument(
        "corpus",
        metavar="CORPUS",
        type=Path,
        help=".txt, .jsonl or .parquet file, or a folder of them",
    )
    add_path(build, "folder to make")
    build.add_argument(
        "--sites",
        nargs="+",
        metavar="HOOK",
        default=["mlp.hook_post"],
        help="hook points whose units are searched, in every block or by full name; attn.hook_z "
        "for heads (default: mlp.hook_post)",
    )
    build.add_argument(
        "--criteria", nargs="+", choices=CRITERIA, default=CRITERIA, help="(default: all)"
    )
    build.add_argument("--target", choices=TARGETS, default="next", help="what relevance explains")
    for name, default, text in (
        ("--k", 20, "examples a unit and criterion"),
        ("--context", 128, "tokens of a document"),
        ("--batch-size", 16, "documents at once"),
        ("--vocabulary", 10, "tokens at either end of what a unit writes and reads; 0 for none"),
    ):
        build.add_argument(
            name, type=int, metavar="N", default=default, help=f"{text} (default: %(default)s)"
        )
    build.add_argument(
        "--skip-special", action="store_true", help="do not search special tokens inside texts"
    )
    build.add_argument("--field", default="text", help="of a record (default: %(default)s)")
    build.add_argument("--shard", metavar="R/N", type=_shard, help="scan share R (from 0) of N")


def _shard(text: str) -> tuple[int, int]:
    rank, _, world = text.partition("/")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give 0/4, 1/4, 2/4 or 3/4")
    return int(rank), int(world)


def _add_merge(actions: Any) -> None:
    merge = actions.add_parser(
        "merge",
        help="make a dictionary of shards that are done",
        description="Merge the shards in PATH, replay what they cite, and publish. The options "
        "are those of the shards, except --dtype, --device and --revision of the model.",
    )
    merge.set_defaults(run=_merge)
    add_model_options(merge, "model", rules=False)
    add_path(merge, "folder of the shards")
    merge.add_argument("--vocabulary", type=int, metavar="N", default=10, help="as for build")


def _add_export(actions: Any) -> None:
    export = actions.add_parser(
        "export",
        help="as HTML pages, for Neuronpedia, or as jsonl",
        description="A folder of HTML pages with an index to search, a folder in Neuronpedia's "
        "layout, or a file with one JSON object a unit.",
    )
    export.set_defaults(run=_export)
    add_path(export)
    export.add_argument("--format", required=True, choices=FORMATS)
    export.add_argument("--out", required=True, metavar="PATH", type=Path, help="folder or file")
    export.add_argument("--units", nargs="+", metavar="UNIT", help="only these (html, jsonl)")


def _build(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.job import prepare
    from lenslrp.analysis.dictionary.launch import build_distributed, rank_and_world
    from lenslrp.analysis.dictionary.scan import scan_shard
    from lenslrp.analysis.dictionary.work_folder import shard_name, using
    from lenslrp.errors import InputError

    names = (
        "sites", "criteria", "k", "context", "batch_size", "field", "target", "skip_special",
    )  # fmt: skip
    chosen = {name: getattr(options, name) for name in names}
    chosen["composite"] = composite(options.composite)
    spread = rank_and_world()[1] > 1
    if options.shard and spread:
        raise InputError(
            "--shard is for processes started by hand; a launcher shares out by itself"
        )
    if spread and options.device is None:
        options.device = own_device()
    model = load_model(options)
    if options.shard:
        job = prepare(model, options.corpus, options.path, **chosen)
        with using(job.work, shard_name(*options.shard)):
            print(scan_shard(job, *options.shard))
        return OK
    build = build_distributed if spread else NeuronDictionary.build
    return _say(build(model, options.corpus, options.path, vocabulary=options.vocabulary, **chosen))


def _say(dictionary: NeuronDictionary | None) -> int:
    """What was made: nothing in the other ranks of a launcher."""
    if dictionary is not None:
        print(f"{dictionary.path}: {dictionary}")
        dictionary.close()
    return OK


def _merge(options: argparse.Namespace) -> int:
    from lenslrp.analysis.common.storage import load_json
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.job import prepare
    from lenslrp.analysis.dictionary.plan import Plan
    from lenslrp.errors import StorageError

    work = options.path / "work"
    path = work / "plan.json"
    if not path.exists():
        raise StorageError(f"{work} has no plan.json: there are no shards to merge")
    chosen = _options_of(Plan.from_json(load_json(path), path))
    job = prepare(load_model(options), None, options.path, **chosen)
    shards = sorted(work.glob("shard-*.safetensors"))
    return _say(NeuronDictionary.merge(job, shards, vocabulary=options.vocabulary))


def _options_of(plan: Plan) -> dict[str, Any]:
    """The options of ``prepare`` that make a plan, its corpus being there.

    Raises:
        InputError: it was made with objects that a plan does not hold, from Python.
    """
    from lenslrp.analysis.units.parsing import parse_unit
    from lenslrp.errors import InputError

    rules = {composite(name).name: composite(name) for name in COMPOSITES}
    name = None if plan.rules is None else plan.rules["name"]
    sites = [site for site, _ in plan.sites]
    custom = [site for site in sites if "[" in site]
    custom += [] if name is None or name in rules else [f"rules {name}"]
    custom += [] if plan.target in (None, *TARGETS) else [f"target {plan.target}"]
    if custom:
        raise InputError(f"these shards were made in Python; merge them there: {'; '.join(custom)}")
    names = ("criteria", "k", "sample", "window", "skip_first", "skip_special", "attention", "seed")
    return {
        **{name: getattr(plan, name) for name in names},
        "sites": sites,
        "composite": None if name is None else rules[name],
        "target": plan.target or "next",
        "through": [parse_unit(unit) for unit in plan.through],
        "revision": plan.corpus["revision"],
    }


def _export(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.export.folders import export_html, export_neuronpedia
    from lenslrp.analysis.dictionary.export.jsonl import JSONL, export_jsonl
    from lenslrp.errors import InputError

    units = None if options.units is None else [unit_key(unit) for unit in options.units]
    if options.format == "neuronpedia" and units:
        raise InputError("Neuronpedia takes all units, not --units: leave them out")
    dictionary = NeuronDictionary.open(options.path)
    if options.format == "html":
        export_html(dictionary, options.out, units)
    elif options.format == "neuronpedia":
        export_neuronpedia(dictionary, options.out)
    else:
        check_writable("--out", options.out, JSONL)
        write_keeping(options.out, lambda: export_jsonl(dictionary, options.out, units))
    dictionary.close()
    print(options.out.absolute())
    return OK
