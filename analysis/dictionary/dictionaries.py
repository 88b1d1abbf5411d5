"""A dictionary of all units of a model: built over a corpus, opened, searched.

Example:
    >>> d = NeuronDictionary.build(model, "texts.jsonl", "model.dict", sites=["mlp.hook_post"])
    >>> d = NeuronDictionary.open("model.dict")
    >>> d[5, 17].examples("actmax")
    >>> d.search_text("Eiffel Tower")

The layout of the files is in docs/how-to/dictionary.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.common.storage import (
    check_files,
    load_json,
    load_tensors,
    require_forms,
)
from lenslrp.analysis.dictionary import lookup
from lenslrp.analysis.dictionary.finding import Found
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.plan import DICTIONARY_SCHEMA, Place, Plan
from lenslrp.analysis.dictionary.publish import finish
from lenslrp.analysis.dictionary.ranking import RankedUnits, find_units
from lenslrp.analysis.dictionary.scan import Job, scan_shard
from lenslrp.analysis.dictionary.schemas import (
    EXAMPLE_GROUP,
    UnitTables,
    kinds,
    read_slots,
    require_manifest,
    sampled_tokens,
)
from lenslrp.analysis.dictionary.texts import Document, Texts
from lenslrp.analysis.dictionary.unit import Page
from lenslrp.analysis.dictionary.vocabulary_file import LISTED_TOKENS, Projections
from lenslrp.analysis.dictionary.work_folder import BUILD, FILES, MANIFEST, begin_work, using
from lenslrp.analysis.units.kinds import Unit
from lenslrp.errors import InputError, StorageError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class NeuronDictionary:
    """A dictionary in a folder. Nothing in it is ever executed or unpickled.

    Attributes:
        path: the folder.
        plan: everything that decided its contents.
        manifest: `manifest.json`.
        slots: (criterion, rank) of each example of a unit.
        projections: the lists of tokens that units write and read.
        texts: the documents that examples reference.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.plan = plan = Plan.from_json(manifest["plan"], path / MANIFEST)
        require_manifest(path / MANIFEST, manifest)
        self.slots = read_slots(path / MANIFEST, manifest["slots"], plan)
        self._tables = UnitTables(path, plan, self.slots)
        self.projections = Projections(
            path / "vocabulary.parquet", manifest["vocabulary"], plan.units
        )
        self.texts = Texts(path / "texts.sqlite")

    @classmethod
    def build(
        cls,
        model: TransformerBridge,
        corpus: Any,
        path: str | Path,
        *,
        checkpoint_every: float = 60.0,
        progress: bool = True,
        keep_work: bool = False,
        vocabulary: int = LISTED_TOKENS,
        **options: Any,
    ) -> NeuronDictionary:
        """Build a dictionary, or go on with one that was interrupted.

        Args:
            model: a `TransformerBridge`.
            corpus: see `lenslrp.analysis.dictionary.sources.texts_of`.
            path: the folder to make. Work in progress lies in `work` inside it.
            checkpoint_every: seconds of work that a kill can cost.
            progress: show bars with tokens a second and the time left.
            keep_work: keep `work`, with the tokenised corpus, afterwards.
            vocabulary: tokens to list at either end of what a unit writes and reads; 0 for none.
            options: what the dictionary is made of:

                - `sites`: hook names (`"mlp.hook_post"` in every block, `"attn.hook_z"` for heads,
                    `"hook_scan_out"` for those of recurrent mixers, `"hook_scan_in"` for channels
                    of mixers without heads, any other), `SparseCoder` or `Direction`, or a list;
                - `criteria`: of `actmax, actmin, relmax, relmin, deciles, random`;
                - `k`: examples for each of the first four; `sample`: documents that deciles and
                    random examples are drawn from; `window`: tokens shown before and after;
                - `context`, `batch_size`, `prepend_bos`, `field`, `revision`: of the corpus;
                  `skip_first`: do not search the first position of a document, where many units do
                  nothing but hold the attention sink;
                - `target`: what relevance explains, `"next"`, `"argmax"`, `"logit_diff"` or a
                    target object; `composite`, `attention`: the rules;
                - `through`: units through which alone relevance is counted;
                - `seed`.

        Returns:
            The finished dictionary, opened.

        Raises:
            InputError: an option that does not hold for this model or corpus.
            StorageError: `path` holds something else, or is in use by another process, or something
                in it is damaged, or the disk is full.

        Examples:
            >>> d = NeuronDictionary.build(gpt2, texts, "gpt2.dict", k=20)  # sites: mlp.hook_post
            >>> len(d)  # 12 layers of 3,072 neurons
            36864
        """
        folder = Path(path)
        with using(begin_work(folder), BUILD):
            job = prepare(model, corpus, folder, **options)
            shard = scan_shard(job, checkpoint_every=checkpoint_every, progress=progress)
            finish(
                job,
                [shard],
                checkpoint_every=checkpoint_every,
                progress=progress,
                keep_work=keep_work,
                vocabulary=vocabulary,
            )
        return cls.open(folder)

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
        vocabulary: int = LISTED_TOKENS,
    ) -> NeuronDictionary:
        """Merge the shards of a scan, replay what they reference, project all units, and publish.

        Args:
            job: of `prepare`, with the options of the shards.
            files: the files of all shards.
            parts: the files of the replay, where it was done already.
            checkpoint_every, progress, keep_work, vocabulary: as for `build`.

        Returns:
            The finished dictionary, opened.

        Raises:
            StorageError: shards that do not make a whole, or were made otherwise; another process
                is still at work on them.
        """
        with using(job.work, BUILD):
            finish(
                job,
                files,
                parts=parts,
                checkpoint_every=checkpoint_every,
                progress=progress,
                keep_work=keep_work,
                vocabulary=vocabulary,
            )
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
        if not (folder / MANIFEST).exists():
            state = "unfinished: build it again" if (folder / "work").exists() else "not there"
            raise StorageError(f"{folder} has no manifest.json: the dictionary is {state}")
        manifest = load_json(folder / MANIFEST)
        if manifest.get("schema") != DICTIONARY_SCHEMA:
            raise StorageError(
                f"{folder / MANIFEST} is of schema {str(manifest.get('schema'))[:20]}; this "
                f"version of LensLRP reads schema {DICTIONARY_SCHEMA}"
            )
        check_files(folder, manifest.get("files"), FILES, verify)
        try:
            if (
                manifest["plan_sha256"]
                != Plan.from_json(manifest["plan"], folder / MANIFEST).fingerprint()
            ):
                raise StorageError(f"{folder / MANIFEST} was changed: its plan is another")
            return cls(folder, manifest)
        except KeyError as error:
            raise StorageError(f"{folder / MANIFEST} is damaged: it has no {error}") from error

    def close(self) -> None:
        """Close the files."""
        self.texts.close()
        self._tables.close()
        self.projections.close()

    def __len__(self) -> int:
        return self.plan.units

    def __repr__(self) -> str:
        places = f"{len(self.plan.places)} hook points"
        model, tokens = self.plan.model["name"], self.plan.corpus["tokens"]
        return f"NeuronDictionary({model}: {len(self)} units at {places}, {tokens} tokens)"

    @cached_property
    def units(self) -> pd.DataFrame:
        """`units.parquet` as a DataFrame: one row a unit, with its statistics."""
        frame: pd.DataFrame = self._tables.units(range(len(self))).to_pandas()
        return frame

    def unit_number(self, key: Any) -> tuple[Place, int]:
        """The place of a unit, and its index there.

        Args:
            key: `(layer, index)` of the first site, `(site, layer, index)`, a unit, or its text.

        Raises:
            InputError: no such unit, with what there is.

        Examples:
            >>> place, index = d.unit_number("blocks.5.mlp.hook_post[17]")
            >>> place.hook, place.layer, index
            ('blocks.5.mlp.hook_post', 5, 17)
        """
        return self.plan.unit_at(str(key) if isinstance(key, Unit) else key)

    def __getitem__(self, key: Any) -> Page:
        """The page of one unit; keys as for `unit_number`."""
        place, index = self.unit_number(key)
        return self.page(place, index)

    def page(self, place: Place, index: int) -> Page:
        """The page of the unit with this index there."""
        return next(self.pages(place, range(index, index + 1)))

    def pages(self, place: Place, indices: range | None = None) -> Iterator[Page]:
        """The pages of units at one hook point, in order; a few are in memory at a time."""
        chosen, slots = range(place.size) if indices is None else indices, len(self.slots)
        for first in range(chosen.start, chosen.stop, EXAMPLE_GROUP):
            some = range(place.first + first, place.first + min(first + EXAMPLE_GROUP, chosen.stop))
            rows = self._tables.examples(some)
            for i, about in enumerate(self._tables.units(some).to_pylist()):
                yield Page(place, first + i, about, rows.slice(i * slots, slots), self)

    def to_dataframe(self, criterion: str | None = None) -> pd.DataFrame:
        """All examples of one criterion, or of all, without their windows.

        Args:
            criterion: which; all if not given.

        Returns:
            Columns `unit, hook, index, criterion, rank, score, doc, position`; scores are
            activations, or relevances in units of the target.

        Raises:
            InputError: a criterion that was not searched.
        """
        self.require_criterion(criterion)
        columns = ["unit", "criterion", "rank", "score", "document", "position"]
        table = self._tables.examples(range(len(self)), columns)
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
        """Refuse a criterion that this dictionary does not have.

        Raises:
            InputError: naming those that it has.
        """
        if criterion is not None and criterion not in self.plan.criteria:
            raise InputError(
                f"criterion {criterion!r} was not searched; there are "
                f"{', '.join(self.plan.criteria)}"
            )

    def find(self, *words: str, **options: Any) -> Found | RankedUnits:
        """Units by the words of a concept: by their examples, what they write, or meaning.

        Options and errors are those of `lenslrp.analysis.dictionary.ranking.find_units`.

        Examples:
            >>> list(d.find("church", by="writes", model=model).top(1).columns)[3:]
            ['side', 'score', 'token', 'rank']
        """
        return find_units(self, words, **options)

    def search_text(
        self, query: str, *, criterion: str | None = None, limit: int = 50
    ) -> pd.DataFrame:
        """Units by the sentences they are shown with: see `lookup.search_text`.

        Examples:
            >>> list(d.search_text("Eiffel Tower").columns)
            ['unit', 'hook', 'index', 'criterion', 'rank', 'score', 'doc', 'position', 'window']
        """
        return lookup.search_text(self, query, criterion, limit)

    def search_tokens(
        self, token: str, *, by: str = "hits", criterion: str = "actmax", limit: int = 50
    ) -> pd.DataFrame:
        """Units by a token that they fire at, write or read.

        Arguments, columns and errors are those of
        `lenslrp.analysis.dictionary.lookup.search_tokens`.

        Examples:
            >>> list(d.search_tokens(" Paris", by="writes").columns)
            ['unit', 'hook', 'index', 'name', 'side', 'rank', 'token', 'score']
        """
        return lookup.search_tokens(self, token, by, criterion, limit)

    def similar(self, key: Any, k: int = 10, *, kind: str = "activation") -> pd.DataFrame:
        """Units that do the same at the sampled tokens: see `lookup.similar`.

        Examples:
            >>> list(d.similar((5, 17), 3).columns)
            ['unit', 'hook', 'index', 'correlation']
        """
        return lookup.similar(self, key, k, kind)

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """What the units did at the sampled tokens: kind -> int8 [unit, token]."""
        path = self.path / "samples.safetensors"
        samples, _ = load_tensors(path)
        shape = (len(self), sampled_tokens(self.plan))
        require_forms(path, samples, dict.fromkeys(kinds(self.plan), (torch.int8, shape)))
        return samples

    @cached_property
    def citations(self) -> lookup.Citations:
        """Which examples reference a document."""
        path, examples = self.path / "citations.safetensors", len(self) * len(self.slots)
        return lookup.Citations(path, examples)

    def named(self, unit: int) -> tuple[int, str, int]:
        """A unit's number, hook point and index there."""
        place = self.plan.place_of(unit)
        return unit, place.hook, unit - place.first

    def name(self, unit: int) -> str:
        """A unit's number as text."""
        return (place := self.plan.place_of(unit)).name(unit - place.first)

    def window(self, document: Document, position: int) -> tuple[int, list[str]]:
        """Where the window around a position begins, and its tokens as text."""
        if not 0 <= position < len(document.tokens):
            raise StorageError(
                f"{self.path} is damaged: it references position {position} of document "
                f"{document.id}, which has {len(document.tokens)} tokens"
            )
        before, after = self.plan.window
        start = max(0, position - before)
        return start, self.texts.pieces(document)[start : position + after + 1]

    def shown(self, document: Document, positions: NDArray[np.int64]) -> list[str]:
        """The text of the window around each position."""
        before, after = self.plan.window
        spans = document.spans.numpy()
        first = spans[np.maximum(positions - before, 0), 0].tolist()
        last = spans[np.minimum(positions + after, len(spans) - 1), 1].tolist()
        return [document.text[a:b] for a, b in zip(first, last, strict=True)]
