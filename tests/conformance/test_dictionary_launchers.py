"""Real launchers: processes of ``torchrun``, actors of Ray. The same bytes as one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.dictionaries import OPTIONS, build, contents, model, texts
from tests.conftest import ROOT

SCRIPT = """
import sys
from lenslrp.analysis import build_distributed
from tests.conformance.dictionaries import OPTIONS, model, texts
build_distributed(model(), texts(), sys.argv[1], progress=False, timeout=300.0, **OPTIONS)
"""


@pytest.mark.slow
def test_torchrun_makes_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "one").close()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lenslrp[ray]'")
    from lenslrp.analysis import build_with_ray

    build(tmp_path / "one").close()
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    try:
        options = {**OPTIONS, "progress": False}
        d = build_with_ray(model, texts(), tmp_path / "two", workers=2, shards=3, **options)
        d.close()
    finally:
        ray.shutdown()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
