"""A dictionary of all units of a model: built over a corpus, opened, searched.

::

    d = NeuronDictionary.build(model, "texts.jsonl", "model.dict", sites=["mlp.hook_post"])
    d = NeuronDictionary.open("model.dict")
    d[5, 17].examples("actmax")
    d.search_text("Eiffel Tower")

The layout of the files is in docs/dictionary.md.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from lenslrp.analysis.block_pass import TARGETS, BlockPass, find_places
from lenslrp.analysis.corpus import Corpus, Cut, tokenise
from lenslrp.analysis.corpus_files import describe_corpus
from lenslrp.analysis.page import Page
from lenslrp.analysis.plan import (
    CRITERIA,
    SCHEMA,
    Place,
    Plan,
    describe_model,
    describe_rules,
    describe_tokenizer,
)
from lenslrp.analysis.publish import FILES, publish
from lenslrp.analysis.readouts import Sites, sites_of
from lenslrp.analysis.replay import Entries, replay
from lenslrp.analysis.search import Job, merge_shards, scan_shard
from lenslrp.analysis.storage import (
    StorageError,
    check_files,
    load_json,
    load_tensors,
    require_header,
    require_plain,
    save_json,
)
from lenslrp.analysis.texts import Document, Texts, terms
from lenslrp.analysis.units import Unit
from lenslrp.errors import InputError
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import require_bridge
from lenslrp.hooks.rules import Rule
from lenslrp.inputs import is_encoder_decoder
from lenslrp.media import reads_no_text
from lenslrp.targets import Target

DEFAULT_CRITERIA = ("actmax", "actmin", "relmax", "relmin", "deciles", "random")


def prepare(
    model: Any,
    corpus: Any,
    path: str | Path,
    *,
    sites: Sites = "mlp.hook_post",
    criteria: Iterable[str] = DEFAULT_CRITERIA,
    k: int = 20,
    context: int = 128,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    skip_first: bool = True,
    field: str = "text",
    revision: str | None = None,
    target: str | Target = "next",
    composite: Composite | Mapping[str, Rule] | None = None,
    attention: str = "bridge",
    through: Iterable[Unit] = (),
    sample: int = 100,
    window: tuple[int, int] = (16, 8),
    seed: int = 0,
) -> Job:
    """Tokenise the corpus and decide the plan: what every shard starts from.

    Options as for :meth:`NeuronDictionary.build`. Called again with the same options it finds what
    it left; with others it refuses. ``corpus=None`` takes the corpus that lies there tokenised, as
    every worker but the first does.

    Raises:
        InputError: an option that does not hold for this model or corpus.
        StorageError: ``path`` holds work on another dictionary, or the disk is full.
    """
    require_bridge(model)
    if reads_no_text(model) or is_encoder_decoder(model):
        raise InputError(
            "a dictionary is built from token sequences of one stack; this model reads "
            + ("no text" if reads_no_text(model) else "two of them (encoder and decoder)")
        )
    folder = Path(path)
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    bos = _bos(model, prepend_bos)
    tokenised = _tokenised(corpus, model, work, Cut(context, batch_size, bos, field))
    found = tuple(sites_of(sites))
    places = find_places(model, found, tokenised.block(0).tokens[:1])
    chosen, units = tuple(criteria), tuple(through)
    relevance = any(CRITERIA.get(c, ("",))[0] == "relevance" for c in chosen)
    table = as_composite(AttnLRP() if composite is None else composite)
    about = {k: v for k, v in tokenised.about.items() if k not in ("parts", "identity")}
    plan = Plan(
        schema=SCHEMA,
        model=describe_model(model),
        tokenizer=describe_tokenizer(model.tokenizer),
        corpus={**about, "name": _corpus_name(corpus, work), "revision": revision},
        places=places,
        sites=tuple((site.name, site.fingerprint) for site in found),
        criteria=chosen,
        k=k,
        sample=sample,
        window=(int(window[0]), int(window[1])),
        skip_first=skip_first,
        target=_target_text(model, target) if relevance else None,
        rules=describe_rules(table) if relevance else None,
        attention=attention,
        through=tuple(map(str, units)),
        seed=seed,
    )
    if (work / "plan.json").exists():
        plan.require_same(Plan.from_json(load_json(work / "plan.json")), str(work))
    else:
        save_json(work / "plan.json", plan.to_json())
    own = target if isinstance(target, Target) and not isinstance(target, str) else None
    return Job(BlockPass(model, plan, found, table, own, units), tokenised, folder)


def _bos(model: Any, prepend_bos: bool | None) -> int | None:
    wanted = bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
    token = getattr(model.tokenizer, "bos_token_id", None)
    if prepend_bos and token is None:
        raise InputError("prepend_bos: this model's tokenizer has no beginning-of-sequence token")
    return token if wanted else None


def _target_text(model: Any, target: Any) -> str:
    if isinstance(target, str):
        if target not in TARGETS:
            raise InputError(
                f"target is one of {', '.join(TARGETS)} or a lenslrp.targets object, not {target!r}"
            )
        if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
            raise InputError(
                f"target={target!r} is the next token, and this model predicts none; give a "
                "lenslrp.targets object"
            )
        return target
    if not isinstance(target, Target):
        raise InputError(f"target must be a name or a lenslrp.targets object, not {target!r}")
    return repr(target)


def _corpus_name(corpus: Any, work: Path) -> str:
    if corpus is None:
        return str(load_json(work / "plan.json")["corpus"]["name"])
    if isinstance(corpus, str | Path):
        return Path(corpus).name
    info = getattr(corpus, "info", None)
    return str(getattr(info, "dataset_name", None) or "from memory")


def _tokenised(corpus: Any, model: Any, work: Path, cut: Cut) -> Corpus:
    """The corpus on disk: as it lies there if it is the same one, or cut anew beside it."""
    folder = work / "corpus"
    if corpus is None:
        return Corpus.open(folder)
    identity = describe_corpus(corpus, describe_tokenizer(model.tokenizer), cut)
    if not (folder / "corpus.json").exists():
        return tokenise(corpus, model.tokenizer, folder, cut, identity)
    old = Corpus.open(folder)
    if identity is not None and old.about.get("identity") == identity:
        return old
    again = work / "corpus.again"
    try:
        new = tokenise(corpus, model.tokenizer, again, cut, identity)
        if (new.about["digest"], new.cut) != (old.about["digest"], old.cut):
            raise StorageError(
                f"{work} holds another corpus ({old.documents} documents, "
                f"{old.about['tokens']} tokens in blocks of {old.cut.block}; given are "
                f"{new.documents} documents, {new.about['tokens']} tokens in blocks of "
                f"{new.cut.block}). Choose another path, or delete it"
            )
    finally:
        shutil.rmtree(again, ignore_errors=True)
    return old


class NeuronDictionary:
    """A dictionary that lies in a folder. Nothing in it is ever executed or unpickled.

    Attributes:
        path: the folder.
        plan: everything that decided its contents.
        manifest: ``manifest.json``.
        units: ``units.parquet`` as a DataFrame.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.plan = Plan.from_json(manifest["plan"])
        self.slots = tuple((str(c), int(r)) for c, r in manifest["slots"])
        self.texts = Texts(path / "texts.sqlite")
        self._examples = _open_parquet(path / "examples.parquet")
        self._unit_file = _open_parquet(path / "units.parquet")
        groups = self._examples.metadata
        rows = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        if self._starts[-1] != self.plan.units * len(self.slots):
            raise StorageError(f"{path / 'examples.parquet'} does not have a row for each example")

    @classmethod
    def build(
        cls,
        model: Any,
        corpus: Any,
        path: str | Path,
        *,
        checkpoint_every: float = 60.0,
        progress: bool = True,
        keep_work: bool = False,
        **options: Any,
    ) -> NeuronDictionary:
        """Build a dictionary, or go on with one that was interrupted.

        Args:
            model: a ``TransformerBridge``.
            corpus: see :func:`lenslrp.analysis.corpus.texts_of`.
            path: the folder to make. Work in progress lies in ``work`` inside it.
            checkpoint_every: seconds of work that a kill can cost.
            progress: show bars with tokens a second and the time left.
            keep_work: keep ``work``, with the tokenised corpus, afterwards.
            options: what the dictionary is made of:

                - ``sites``: hook names (``"mlp.hook_post"`` in every block, ``"attn.hook_z"`` for
                  heads, any other), ``SparseCoder`` or ``Direction``, or a list of these;
                - ``criteria``: of ``actmax, actmin, relmax, relmin, deciles, random``;
                - ``k``: examples for each of the first four; ``sample``: documents that deciles
                  and random examples are drawn from; ``window``: tokens shown before and after;
                - ``context``, ``batch_size``, ``prepend_bos``, ``field``, ``revision``: of the
                  corpus; ``skip_first``: do not search the first position of a document, where
                  many units do nothing but hold the attention sink;
                - ``target``: what relevance explains, ``"next"``, ``"argmax"``, ``"logit_diff"``
                  or a target object; ``composite``, ``attention``: the rules;
                - ``through``: units through which alone relevance is counted;
                - ``seed``.

        Raises:
            InputError: an option that does not hold for this model or corpus.
            StorageError: ``path`` holds something else, is damaged, or the disk is full.
        """
        folder = Path(path)
        if (folder / "manifest.json").exists() and not (folder / "work" / "plan.json").exists():
            raise StorageError(
                f"{folder} holds a finished dictionary already: open it, or choose another path"
            )
        job = prepare(model, corpus, folder, **options)
        shard = scan_shard(job, checkpoint_every=checkpoint_every, progress=progress)
        return cls.merge(
            job, [shard], checkpoint_every=checkpoint_every, progress=progress, keep_work=keep_work
        )

    @classmethod
    def merge(
        cls,
        job: Job,
        files: Iterable[str | Path],
        *,
        parts: list[Path] | None = None,
        checkpoint_every: float = 60.0,
        progress: bool = True,
        keep_work: bool = False,
    ) -> NeuronDictionary:
        """Merge the shards of a scan, replay what they cite, and publish.

        Args:
            job: of :func:`prepare`, with the options of the shards.
            files: the files of all shards.
            parts: the files of the replay, where it was done already.
            checkpoint_every, progress, keep_work: as for :meth:`build`.

        Raises:
            StorageError: shards that do not make a whole, or were made otherwise.
        """
        state = merge_shards(job, files)
        entries = Entries.of(state, job.plan)
        if parts is None:
            parts = replay(job, entries, checkpoint_every=checkpoint_every, progress=progress)
        publish(job, state, entries, parts)
        if not keep_work:
            # The plan goes first: without it, what is left of the work is not gone on with.
            (job.work / "plan.json").unlink()
            shutil.rmtree(job.work)
        return cls.open(job.folder)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> NeuronDictionary:
        """Open a finished dictionary.

        Args:
            path: its folder.
            verify: compare every file with the SHA-256 in the manifest. Without it sizes are
                compared, and the pages of the parquet files as they are read.

        Raises:
            StorageError: not a dictionary, unfinished, of another schema, or damaged: the message
                names the file.
        """
        folder = Path(path)
        if not (folder / "manifest.json").exists():
            state = "unfinished: build it again" if (folder / "work").exists() else "not there"
            raise StorageError(f"{folder} has no manifest.json: the dictionary is {state}")
        manifest = load_json(folder / "manifest.json")
        if manifest.get("schema") != SCHEMA:
            raise StorageError(
                f"{folder / 'manifest.json'} is of schema {str(manifest.get('schema'))[:20]}; this "
                f"version of LensLRP reads schema {SCHEMA}"
            )
        check_files(folder, manifest.get("files"), FILES, verify)
        try:
            if manifest["plan_sha256"] != Plan.from_json(manifest["plan"]).fingerprint():
                raise StorageError(f"{folder / 'manifest.json'} was changed: its plan is another")
            return cls(folder, manifest)
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise StorageError(f"{folder} is damaged: {str(error)[:200]}") from error

    def close(self) -> None:
        """Close the files."""
        self.texts.close()
        self._examples.close()
        self._unit_file.close()

    def __len__(self) -> int:
        return self.plan.units

    def __repr__(self) -> str:
        places = f"{len(self.plan.places)} hook points"
        model, tokens = self.plan.model["name"], self.plan.corpus["tokens"]
        return f"NeuronDictionary({model}: {len(self)} units at {places}, {tokens} tokens)"

    @cached_property
    def units(self) -> pd.DataFrame:
        frame: pd.DataFrame = _read(self.path / "units.parquet", self._unit_file, None).to_pandas()
        return frame

    def unit_number(self, key: Any) -> tuple[Place, int]:
        """The place of a unit, and its index there.

        Args:
            key: ``(layer, index)`` of the first site, ``(site, layer, index)``, a unit, or its
                text, such as ``"blocks.5.mlp.hook_post[17]"``.

        Raises:
            InputError: no such unit, with what there is.
        """
        if isinstance(key, Unit):
            key = str(key)
        if isinstance(key, str):
            found = re.fullmatch(r"(.+)\[(?:[\w.-]+ )?(\d+)\]", key)
            places = [p for p in self.plan.places if found and p.hook == found[1]]
        else:
            parts = key if isinstance(key, tuple) else (key,)
            site = parts[0] if len(parts) == 3 else self.plan.sites[0][0]
            if len(parts) not in (2, 3) or not all(isinstance(p, int) for p in parts[-2:]):
                raise InputError(f"a unit is (layer, index) or (site, layer, index), not {key!r}")
            places = [p for p in self.plan.places if p.site == site and p.layer == parts[-2]]
        index = int(found[2]) if isinstance(key, str) and found else None
        index = parts[-1] if index is None and not isinstance(key, str) else index
        if not places or index is None or not 0 <= index < places[0].size:
            layers = sorted({p.layer for p in self.plan.places if p.layer is not None})
            sizes = sorted({p.size for p in self.plan.places})
            raise InputError(
                f"no unit {key!r} in this dictionary: it has {', '.join(n for n, _ in self.plan.sites)} in "
                f"layers {layers[:1]} to {layers[-1:]}, with {sizes} units a layer"
            )
        return places[0], index

    def __getitem__(self, key: Any) -> Page:
        """The page of one unit: see :meth:`unit_number` for ``key``."""
        place, index = self.unit_number(key)
        return self.page(place, index)

    def page(self, place: Place, index: int) -> Page:
        number = place.first + index
        rows = self._rows(range(number * len(self.slots), (number + 1) * len(self.slots)))
        return Page(place, index, self._unit_row(number), rows, self)

    def _unit_row(self, number: int) -> dict[str, Any]:
        group, start = 0, 0
        metadata = self._unit_file.metadata
        while start + metadata.row_group(group).num_rows <= number:
            start += metadata.row_group(group).num_rows
            group += 1
        table = _read(self.path / "units.parquet", self._unit_file, [group])
        return dict(table.slice(number - start, 1).to_pylist()[0])

    def _rows(self, rows: range) -> pa.Table:
        """Some rows of ``examples.parquet``, from the row groups that hold them."""
        a = int(np.searchsorted(self._starts, rows.start, side="right")) - 1
        b = int(np.searchsorted(self._starts, rows.stop, side="left"))
        table = _read(self.path / "examples.parquet", self._examples, list(range(a, b)))
        return table.slice(rows.start - int(self._starts[a]), len(rows))

    def to_dataframe(self, criterion: str | None = None) -> pd.DataFrame:
        """All examples of one criterion, or of all, without their windows.

        Columns ``unit, hook, index, criterion, rank, score, doc, position``.
        """
        self.require_criterion(criterion)
        columns = ["unit", "criterion", "rank", "score", "document", "position"]
        table = _read(self.path / "examples.parquet", self._examples, None, columns)
        if criterion is not None:
            table = table.filter(pc.equal(table["criterion"].cast(pa.string()), criterion))
        frame = table.to_pandas().rename(columns={"document": "doc"})
        ends = np.array([place.end for place in self.plan.places])
        place = np.searchsorted(ends, frame["unit"].to_numpy(), side="right")
        firsts = np.array([p.first for p in self.plan.places])
        frame.insert(1, "hook", np.array([p.hook for p in self.plan.places], dtype=object)[place])
        frame.insert(2, "index", frame["unit"].to_numpy() - firsts[place])
        return frame

    def require_criterion(self, criterion: str | None) -> None:
        """Raises :class:`InputError` for a criterion that this dictionary does not have."""
        if criterion is not None and criterion not in self.plan.criteria:
            raise InputError(
                f"criterion {criterion!r} was not searched; there are {', '.join(self.plan.criteria)}"
            )

    def search_text(
        self, query: str, *, criterion: str | None = None, limit: int = 50
    ) -> pd.DataFrame:
        """Units by the sentences they are shown with.

        Args:
            query: words that must all occur in what is shown around the hit; ``"..."`` is a phrase.
            criterion: only examples of this one.
            limit: how many rows.

        Returns:
            ``unit, hook, index, criterion, rank, score, doc, position, window``: best ranks
            first, then the best match.

        Raises:
            InputError: an empty query, or an unknown criterion.
        """
        self.require_criterion(criterion)
        wanted = [term.casefold() for term in terms(query)]
        documents = [doc for doc, _ in self.texts.matching(query, limit)]
        return self._citing(
            documents, criterion, limit, lambda text: all(w in text for w in wanted)
        )

    def search_tokens(
        self, token: str, *, criterion: str = "actmax", limit: int = 50
    ) -> pd.DataFrame:
        """Units whose hits are at a token: rows as for :meth:`search_text`, with ``share``.

        Args:
            token: the token's text; white space around it does not matter.
            criterion: whose examples.
            limit: how many rows.

        Returns:
            ``unit, hook, index, share``: the share of the unit's examples whose hit is at the
            token, largest first.
        """
        self.require_criterion(criterion)
        wanted = self.texts.tokens_called(token)
        if not wanted:
            return pd.DataFrame(columns=["unit", "hook", "index", "share"])
        frame = self.to_dataframe(criterion)
        documents = self.texts.documents(sorted(set(frame["doc"].tolist())))
        width = int(self.plan.corpus["cut"]["context"])
        ids = np.fromiter(documents, dtype=np.int64)
        tokens = np.full((len(ids), width), -1, dtype=np.int64)
        for row, doc in enumerate(documents.values()):
            tokens[row, : len(doc.tokens)] = doc.tokens.numpy()
        row = np.searchsorted(ids, frame["doc"].to_numpy())
        at = tokens[row, frame["position"].to_numpy()]
        frame["share"] = np.isin(at, wanted)
        found = frame.groupby(["unit", "hook", "index"], as_index=False)["share"].mean()
        found = found[found["share"] > 0].sort_values(["share", "unit"], ascending=[False, True])
        best: pd.DataFrame = found.head(limit).reset_index(drop=True)
        return best

    def similar(self, key: Any, k: int = 10, *, kind: str = "activation") -> pd.DataFrame:
        """Units that fire (or matter) at the same tokens: correlation over the sampled tokens.

        Args:
            key: a unit, as for ``dictionary[key]``.
            k: how many.
            kind: ``"activation"`` or ``"relevance"``.

        Returns:
            ``unit, hook, index, correlation``, largest first, the unit itself left out.
        """
        place, index = self.unit_number(key)
        if kind not in self._samples:
            raise InputError(f"kind is one of {', '.join(self._samples)}, not {kind!r}")
        values = self._samples[kind]
        mine = values[place.first + index].float()
        dots = torch.cat([some.float() @ mine for some in values.split(8192)])
        lengths = torch.cat([some.float().norm(dim=1) for some in values.split(8192)])
        correlation = dots / (lengths * mine.norm()).clamp_min(1e-9)
        correlation[place.first + index] = -torch.inf
        best = correlation.topk(min(k, len(self) - 1))
        rows = [self._named(int(unit)) for unit in best.indices]
        return pd.DataFrame(
            [(*row, float(c)) for row, c in zip(rows, best.values, strict=True)],
            columns=["unit", "hook", "index", "correlation"],
        )

    @cached_property
    def _samples(self) -> dict[str, Tensor]:
        return load_tensors(self.path / "samples.safetensors")[0]

    @cached_property
    def _citations(self) -> Citations:
        return Citations(self.path / "citations.safetensors")

    def _named(self, unit: int) -> tuple[int, str, int]:
        place = next(p for p in self.plan.places if unit < p.end)
        return unit, place.hook, unit - place.first

    def _citing(
        self, documents: list[int], criterion: str | None, limit: int, keep: Callable[[str], bool]
    ) -> pd.DataFrame:
        """The examples that cite documents, of which ``keep`` takes the window."""
        allowed = np.array([criterion in (None, name) for name, _ in self.slots])
        ranks = np.array([rank for _, rank in self.slots])
        windows: dict[tuple[int, int], str] = {}
        found: list[NDArray[Any]] = []
        for order, document in enumerate(self.texts.documents(documents).values()):
            entries, positions, scores = self._citations.of(document.id)
            shown = np.zeros(len(document.tokens), dtype=bool)
            for position in np.unique(positions).tolist():
                text = "".join(self.window(document, position)[1])
                windows[document.id, position] = text
                shown[position] = keep(text.casefold())
            slot = entries % len(self.slots)
            some = shown[positions] & allowed[slot]
            rank, at = ranks[slot[some]], positions[some]
            columns = [rank, np.full(len(rank), order), entries[some], scores[some]]
            found.append(np.stack([*columns, np.full(len(rank), document.id), at], axis=1))
        rows = np.concatenate(found) if found else np.zeros((0, 6))
        rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))][:limit]
        made = []
        for rank, _, entry, score, doc, position in rows.tolist():
            unit, slot = divmod(int(entry), len(self.slots))
            text = windows[int(doc), int(position)]
            about = self.slots[slot][0], int(rank), score, int(doc), int(position), text
            made.append((*self._named(unit), *about))
        names = ["criterion", "rank", "score", "doc", "position", "window"]
        return pd.DataFrame(made, columns=["unit", "hook", "index", *names])

    def window(self, document: Document, position: int) -> tuple[int, list[str]]:
        """Where the window around a position begins, and its tokens as text."""
        before, after = self.plan.window
        start = max(0, position - before)
        tokens = document.tokens[start : position + after + 1].tolist()
        return start, [self.texts.token(token) for token in tokens]


class Citations:
    """Which examples cite a document; read from disk as it is asked for."""

    def __init__(self, path: Path) -> None:
        require_header(path)
        self._file: Any = safe_open(path, framework="np").__enter__()
        self._documents = self._file.get_tensor("documents")
        self._offsets = self._file.get_tensor("offsets")

    def of(self, document: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Examples (rows of ``examples.parquet``), positions and scores."""
        at = int(np.searchsorted(self._documents, document))
        known = at < len(self._documents) and int(self._documents[at]) == document
        a, b = (int(self._offsets[at]), int(self._offsets[at + 1])) if known else (0, 0)
        names = ("entries", "positions", "scores")
        entries, positions, scores = (self._file.get_slice(name)[a:b] for name in names)
        return entries.astype(np.int64), positions.astype(np.int64), scores


def _open_parquet(path: Path) -> pq.ParquetFile:
    require_plain(path)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is damaged: {str(error)[:200]}") from error


def _read(
    path: Path, file: pq.ParquetFile, groups: list[int] | None, columns: list[str] | None = None
) -> pa.Table:
    """Some row groups, or all.

    Raises:
        StorageError: a page's checksum is not what it should be; names the file.
    """
    chosen = list(range(file.metadata.num_row_groups)) if groups is None else groups
    try:
        return file.read_row_groups(chosen, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is damaged: {str(error)[:200]}") from error
