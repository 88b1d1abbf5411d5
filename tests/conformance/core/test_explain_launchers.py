"""Many prompts under real launchers: the table of one process, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lenslrp
from tests.conformance.launchers import local_ray, run_twice
from tests.unit.core.test_explaining import texts
from tests.unit.tiny import tiny, word_tokenizer

PROMPTS = texts(1030)  # two windows


def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("one") / "r.parquet"
    lenslrp.explain_to(path, model(), PROMPTS, 5)
    return path.read_bytes()


SCRIPT = """
import sys
import lenslrp
from lenslrp.analysis.dictionary.launch import rank_and_world
from tests.conformance.core.test_explain_launchers import PROMPTS, model
lenslrp.explain_to(sys.argv[1], model(), PROMPTS, 5, shard=rank_and_world())
"""


@pytest.mark.slow
def test_torchrun_shares_the_prompts(tmp_path: Path, expected: bytes) -> None:
    run_twice(tmp_path, SCRIPT, tmp_path / "r.parquet")
    assert (tmp_path / "r.parquet").read_bytes() == expected
    assert not (tmp_path / "r.parquet.parts").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_shares_the_prompts(tmp_path: Path, expected: bytes) -> None:
    from lenslrp.analysis import explain_with_ray

    with local_ray():
        made = explain_with_ray(
            model, tmp_path / "r.parquet", lambda: iter(PROMPTS), 5, workers=2, shards=3
        )
    assert made.prompts == len(PROMPTS)
    assert made.path.read_bytes() == expected
