"""What a dictionary is made of, to the last option: what must agree before results are mixed.

A plan is decided once, from the model and the tokenised corpus. Every shard, checkpoint and merge
carries it; two that differ are refused, by the names of what differs.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenslrp.analysis.units.parsing import NODE_LABEL, parse_unit
from lenslrp.errors import InputError, StorageError
from lenslrp.fingerprints import canonical

DICTIONARY_SCHEMA = 3

MAX_UNITS = 1 << 27
"""Units that a dictionary has at most."""

TOP_CRITERIA: dict[str, tuple[str, int]] = {
    "actmax": ("activation", 1),
    "actmin": ("activation", -1),
    "relmax": ("relevance", 1),
    "relmin": ("relevance", -1),
}
"""Criteria with a running top-k: what is compared, and its sign."""

SAMPLED_CRITERIA = ("deciles", "random")
"""Criteria drawn from a sample of documents that a hash decides."""

LIBRARIES = ("lenslrp", "torch", "transformers", "transformer-lens", "numpy", "pyarrow")


@dataclass(frozen=True)
class Place:
    """Units at one hook point: numbers `first` to `first + size - 1` of the dictionary."""

    hook: str
    site: str
    kind: str
    layer: int | None
    first: int
    size: int

    @property
    def end(self) -> int:
        return self.first + self.size

    def name(self, index: int) -> str:
        """A unit here as text: `blocks.5.mlp.hook_post[17]`, `...[sae 40]`."""
        label = self.site.partition("[")[2].removesuffix("]")
        return f"{self.hook}[{label} {index}]" if label else f"{self.hook}[{index}]"


@dataclass(frozen=True)
class Plan:
    """Everything that decides a dictionary's contents.

    Attributes:
        schema: version of the layout.
        model: `name, revision, architecture, dtype, weights` (a fingerprint), `compatibility`.
        tokenizer: a fingerprint of its vocabulary and rules.
        corpus: `digest, documents, blocks, tokens, texts, skipped, name, revision` and the cut.
        places: where the units are.
        sites: name, and fingerprint of its weights, of each site, in the order given.
        criteria: see `TOP_CRITERIA` and `SAMPLED_CRITERIA`.
        k: entries a unit and criterion.
        sample: documents drawn for deciles, random examples and statistics.
        window: tokens shown before and after the position of a hit.
        skip_first: whether a document's first position is masked.
        skip_special: whether special tokens inside documents are masked.
        target: what relevance explains; None where it is not searched.
        rules: name and fingerprint of the composite; None likewise.
        attention: `"bridge"` or `"fused"`.
        through: conditions: only relevance through these units is counted.
        seed: of the sample and of the target positions.
    """

    schema: int
    model: dict[str, Any]
    tokenizer: str
    corpus: dict[str, Any]
    places: tuple[Place, ...]
    sites: tuple[tuple[str, str], ...]
    criteria: tuple[str, ...]
    k: int
    sample: int
    window: tuple[int, int]
    skip_first: bool
    skip_special: bool
    target: str | None
    rules: dict[str, str] | None
    attention: str
    through: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        require_criteria(self.criteria)
        if self.k < 1 or self.sample < 1 or min(self.window) < 0:
            raise InputError(
                f"k and sample must be at least 1 and the window not negative: k={self.k}, "
                f"sample={self.sample}, window={self.window}"
            )

    @property
    def units(self) -> int:
        return self.places[-1].end

    @property
    def relevance(self) -> bool:
        """Whether a backward pass is needed."""
        return any(TOP_CRITERIA.get(c, ("",))[0] == "relevance" for c in self.criteria)

    @property
    def block(self) -> int:
        return int(self.corpus["cut"]["block"])

    def unit_at(self, key: Any) -> tuple[Place, int]:
        """The place of a unit, and its index there.

        Args:
            key: `(layer, index)` of the first site, or of the one site that has this layer;
                `(site, layer, index)`; a unit's text; or a graph's label, `"N5.17"`.

        Raises:
            InputError: no such unit, with what there is.
        """
        places, index = self._places_at(key)
        if len(places) != 1 or not 0 <= index < places[0].size:
            layers = sorted({p.layer for p in self.places if p.layer is not None})
            sizes = ", ".join(map(str, sorted({p.size for p in self.places})))
            raise InputError(
                f"no unit {key!r} in this dictionary: it has "
                f"{', '.join(name for name, _ in self.sites)} in layers {layers[:1]} to "
                f"{layers[-1:]}, with {sizes} units each"
            )
        return places[0], index

    def _places_at(self, key: Any) -> tuple[list[Place], int]:
        """The places that a key may mean, and the index there."""
        if isinstance(key, str):
            key = str(parse_unit(key)) if NODE_LABEL.fullmatch(key) else key
            parsed = re.fullmatch(r"(?P<hook>.+)\[(?:(?P<label>[\w.-]+) )?(?P<index>\d+)\]", key)
            if parsed is None:
                return [], -1
            places = [p for p in self.places if p.hook == parsed["hook"]]
            if parsed["label"]:
                places = [p for p in places if p.site.endswith(f"[{parsed['label']}]")]
            return places[:1], int(parsed["index"])
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) not in (2, 3) or not all(isinstance(p, int) for p in parts[-2:]):
            raise InputError(
                "a unit is (layer, index), (site, layer, index), a Neuron, a Head (of a node: "
                f"node.as_unit()) or a name as 'blocks.5.mlp.hook_post[17]', not {key!r}"
            )
        there = [p for p in self.places if p.layer == parts[-2]]
        site = parts[0] if len(parts) == 3 else self.sites[0][0]
        chosen = [p for p in there if p.site == site]
        if len(parts) == 2 and not chosen:  # sites named in full, a layer each
            chosen = there
        if len(chosen) > 1:
            raise InputError(
                f"{key!r} may be in {', '.join(p.hook for p in chosen)}; give (site, layer, index)"
            )
        return chosen, parts[-1]

    def place_of(self, unit: int) -> Place:
        """Where the unit of this number is."""
        return next(place for place in self.places if unit < place.end)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, path: Path) -> Plan:
        """A plan read back, from the file at `path`.

        Raises:
            StorageError: of another schema, or not a plan.
        """
        if not isinstance(value, dict) or value.get("schema") != DICTIONARY_SCHEMA:
            schema = value.get("schema") if isinstance(value, dict) else value
            raise StorageError(
                f"{path} was made with schema {str(schema)[:20]}; this version of LensLRP reads "
                f"schema {DICTIONARY_SCHEMA}"
            )
        try:
            fields = dict(value)
            fields["places"] = tuple(Place(**place) for place in fields["places"])
            for name in ("criteria", "window", "through"):
                fields[name] = tuple(fields[name])
            fields["sites"] = tuple((str(name), str(mark)) for name, mark in fields["sites"])
            plan = cls(**fields)
            _require_types(plan)
        except (TypeError, KeyError, ValueError, IndexError, OverflowError) as error:
            raise StorageError(
                f"{path} is damaged: not the plan of a dictionary: {str(error)[:200]}"
            ) from error
        return plan

    def fingerprint(self) -> str:
        return hashlib.sha256(canonical(self.to_json()).encode()).hexdigest()

    def require_same(self, other: Plan, where: str) -> None:
        """Refuse to mix what was made otherwise.

        Raises:
            StorageError: naming what differs, with both values.
        """
        mine, theirs = self.to_json(), other.to_json()
        differ = [name for name in mine if canonical(mine[name]) != canonical(theirs[name])]
        if differ:
            shown = "; ".join(
                f"{n}: {str(theirs[n])[:120]} there, {str(mine[n])[:120]} here" for n in differ[:3]
            )
            raise StorageError(
                f"{where} was made for another dictionary and is not mixed into this one: "
                f"{', '.join(differ)} differ ({shown}). Choose another path, or delete it"
            )


_NUMBER, _TEXT, _TEXT_OR_NONE = (int,), (str,), (str, type(None))

_MODEL = {"name": _TEXT, "architecture": _TEXT, "dtype": _TEXT, "weights": _TEXT}
_CUT = {"context": _NUMBER, "block": _NUMBER, "bos": (int, type(None)), "field": _TEXT}
_CORPUS = {
    "documents": _NUMBER,
    "blocks": _NUMBER,
    "tokens": _NUMBER,
    "digest": _TEXT,
    "name": _TEXT,
    "revision": _TEXT_OR_NONE,
}
_PLACE = {
    "hook": _TEXT,
    "site": _TEXT,
    "kind": _TEXT,
    "layer": (int, type(None)),
    "first": _NUMBER,
    "size": _NUMBER,
}
_OPTIONS = {
    "k": _NUMBER,
    "sample": _NUMBER,
    "seed": _NUMBER,
    "tokenizer": _TEXT,
    "attention": _TEXT,
    "skip_first": (bool,),
    "skip_special": (bool,),
    "target": _TEXT_OR_NONE,
}


def _require_types(plan: Plan) -> None:
    """Raises `TypeError` or `ValueError` for what no plan of ours says."""
    _require_scalars("model", plan.model, _MODEL)
    cut = plan.corpus["cut"]
    _require_scalars("corpus", {k: v for k, v in plan.corpus.items() if k != "cut"}, _CORPUS)
    _require_scalars("corpus.cut", cut, _CUT)
    _require_scalars("plan", {name: getattr(plan, name) for name in _OPTIONS}, _OPTIONS)
    if plan.rules is not None:
        _require_scalars("rules", plan.rules, {"name": _TEXT, "sha256": _TEXT})
    if not all(isinstance(name, str) for name in (*plan.criteria, *plan.through)):
        raise TypeError("criteria and through must be strings")
    if len(plan.window) != 2 or not all(type(n) is int and 0 <= n < 1 << 20 for n in plan.window):
        raise ValueError(f"window is {plan.window!r:.60}")
    if not (0 < cut["context"] < 1 << 15 and 0 < plan.corpus["documents"] < 1 << 32):
        raise ValueError("no documents, or none of their length")
    sites, first = {name for name, _ in plan.sites}, 0
    for place in plan.places:
        _require_scalars("places", asdict(place), _PLACE)
        if place.first != first or not 0 < place.size <= MAX_UNITS or place.site not in sites:
            raise ValueError("places must follow one another, each of a site")
        first = place.end
    if not 0 < first <= MAX_UNITS or not plan.k < 1 << 20 > plan.sample:
        raise ValueError(f"{first} units, k={plan.k}, sample={plan.sample}")
    if (plan.relevance, plan.relevance) != (plan.target is not None, plan.rules is not None):
        raise ValueError("target and rules belong to relevance")


def _require_scalars(where: str, values: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where} must be an object")
    if missing := kinds.keys() - values.keys():
        raise TypeError(f"{where} lacks {sorted(missing)}")
    for name, value in values.items():
        if type(value) not in kinds.get(name, (str, int, float, bool, type(None))):
            raise TypeError(f"{where}.{name} is {value!r:.40}")


def require_criteria(criteria: tuple[str, ...]) -> None:
    """Raises `InputError` for a criterion that does not exist, or none, or one twice."""
    known = (*TOP_CRITERIA, *SAMPLED_CRITERIA)
    if not criteria or not set(criteria) <= set(known) or len(set(criteria)) < len(criteria):
        raise InputError(f"criteria are one or more of {', '.join(known)}, not {criteria!r}")


def describe_libraries() -> dict[str, str]:
    """Versions of what computed a dictionary, and on what."""
    versions: dict[str, str] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def sampled_documents(documents: int, sample: int, seed: int) -> Tensor:
    """The documents of the sample, by hash priority: the same whoever asks.

    Computed in pieces, so that memory does not grow with the corpus. The order is that of the
    priorities: a prefix of a larger sample is a smaller one.
    """
    from lenslrp.analysis.dictionary.topk import priorities

    best = torch.empty(0, dtype=torch.int64)
    docs = torch.empty(0, dtype=torch.int64)
    for start in range(0, documents, 1 << 20):
        some = torch.arange(start, min(documents, start + (1 << 20)))
        best, docs = torch.cat([best, priorities(some, seed)]), torch.cat([docs, some])
        order = np.lexsort((docs.numpy(), best.numpy()))[:sample].copy()
        best, docs = best[order], docs[order]
    return docs
