"""Real launchers: two processes of torchrun, two actors of Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_twice(folder: Path, script: str, argument: Path) -> None:
    """Run a script, written into ``folder``, with one argument; it must end well."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(argument)],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray on this machine, for two actors; skips the test where Ray is not installed."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lenslrp[ray]'")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
