"""One tiny dictionary a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from tests.conformance.dictionaries import build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeuronDictionary]:
    d = build(tmp_path_factory.mktemp("built") / "d")
    yield d
    d.close()
