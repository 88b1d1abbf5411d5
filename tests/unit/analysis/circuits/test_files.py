"""Results of circuits as files: the same comes back, and what is something else is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lenslrp import InputError, StorageError
from lenslrp.analysis.circuits.edges import EdgeScores, score_edges
from lenslrp.analysis.circuits.files import ENTRY
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import Circuit, Verdict, prune, verify
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from lenslrp.analysis.common.storage import save_tensors
from tests.unit.analysis.circuits.test_alignment import CLEAN, CORRUPT, bridge, made
from tests.unit.analysis.circuits.test_circuits import some_pairs
from tests.unit.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

Z = "blocks.0.attn.hook_z"


def results() -> list[Any]:
    model, pairs = tiny("llama"), some_pairs()
    scores = score_nodes(model, pairs, metric="kl", by_position=True)
    partly = score_nodes(
        model, pairs, method="exact", components=["heads"], only=[Node(Z, 1)], direction="noising"
    )
    edges = score_edges(model, pairs, into=[Node("blocks.1.attn.hook_z", 1)])
    circuit = prune(score_nodes(model, pairs), 0.3)
    verdict = verify(model, pairs, [circuit, circuit.complement()], metric="margin")
    aligned = made(bridge(), CLEAN, CORRUPT, "span")
    return [pairs, aligned, scores, partly, edges, circuit, verdict]


def require_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
        assert torch.equal(a.isnan(), b.isnan())
    elif isinstance(a, Mapping):
        assert list(a) == list(b)
        for key, value in a.items():
            require_equal(value, b[key])
    else:
        assert type(a) is type(b) and a == b


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    kinds = []
    for index, result in enumerate(results()):
        path = tmp_path / f"{index}.safetensors"
        assert result.save(path) == path
        again = type(result).load(str(path))
        for item in fields(result):
            require_equal(getattr(result, item.name), getattr(again, item.name))
        assert result.save(path) == path  # in place of its own file
        kinds.append(type(result))
    assert set(kinds) == {Pairs, NodeScores, EdgeScores, Circuit, Verdict}


def test_what_is_loaded_works_as_before(tmp_path: Path) -> None:
    model = tiny("llama")
    pairs, _, _, _, edges, circuit, verdict = results()
    again = Pairs.load(pairs.save(tmp_path / "pairs"))
    same = Circuit.load(circuit.save(tmp_path / "circuit"))
    assert torch.equal(again.measured(model), pairs.measured(model))
    assert verify(model, again, [same]).faithfulness == verify(model, pairs, [circuit]).faithfulness
    assert same.nodes() == circuit.nodes()
    read = EdgeScores.load(edges.save(tmp_path / "edges"))
    assert read.top(3).equals(edges.top(3)) and read.best(2) == edges.best(2)
    assert Verdict.load(verdict.save(tmp_path / "verdict")).interval(1) == verdict.interval(1)


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "circuit.safetensors"
    circuit = Circuit({Z: "heads"}, {Z: torch.tensor([True, False])})
    circuit.save(path)
    with pytest.raises(InputError) as caught:
        NodeScores.load(path)
    assert str(caught.value) == f"{path} holds Circuit, not NodeScores"
    foreign = tmp_path / "foreign"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(InputError) as caught:
        Circuit.load(foreign)
    assert str(caught.value) == f"{foreign} holds something else, not Circuit"
    with pytest.raises(StorageError, match="exists and was not made by LensLRP"):
        circuit.save(foreign)
    later = tmp_path / "later"
    entry = {"kind": "Circuit", "version": 2, "plain": {}, "groups": {}}
    save_tensors(later, {"x": torch.zeros(2)}, {ENTRY: json.dumps(entry)})
    with pytest.raises(InputError) as caught:
        Circuit.load(later)
    assert str(caught.value) == f"{later} is Circuit of version 2; this reads 1"
    with pytest.raises(StorageError, match="does not exist or is not a file"):
        Circuit.load(tmp_path / "missing")
    with pytest.raises(InputError, match="the folder .* does not exist"):
        circuit.save(tmp_path / "nowhere" / "circuit")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "circuit"
    Circuit({Z: "heads"}, {Z: torch.tensor([True, False])}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match="do not match the SHA-256 stored in it"):
        Circuit.load(path)
    path.write_bytes(b"text")
    with pytest.raises(StorageError, match="too short for a header"):
        Circuit.load(path)
    path.write_bytes((10).to_bytes(8, "little") + b"not a json")
    with pytest.raises(StorageError, match="is damaged, or no safetensors file"):
        Circuit.load(path)
