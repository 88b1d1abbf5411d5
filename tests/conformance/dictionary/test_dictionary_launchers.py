"""Real launchers: processes of ``torchrun``, actors of Ray. The same bytes as one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.dictionaries import OPTIONS, build, contents, model, texts
from tests.conformance.launchers import local_ray, run_twice

SCRIPT = """
import sys
from lenslrp.analysis import build_distributed
from tests.conformance.dictionaries import OPTIONS, model, texts
build_distributed(model(), texts(), sys.argv[1], progress=False, timeout=300.0, **OPTIONS)
"""


@pytest.mark.slow
def test_torchrun_makes_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "one").close()
    run_twice(tmp_path, SCRIPT, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    from lenslrp.analysis import build_with_ray

    build(tmp_path / "one").close()
    with local_ray():
        options = {**OPTIONS, "progress": False}
        d = build_with_ray(model, texts(), tmp_path / "two", workers=2, shards=3, **options)
        d.close()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
