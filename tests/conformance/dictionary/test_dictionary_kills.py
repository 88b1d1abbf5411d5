"""Kills, a full disk and damage while a dictionary is being made: nothing finished is lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lenslrp.analysis.dictionary.block_pass import Runner
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.scan import scan_shard
from lenslrp.errors import StorageError
from tests.conformance.dictionaries import OPTIONS, build, contents, model, texts
from tests.conftest import ROOT

BUILD = """
import sys
from tests.conformance.dictionaries import build
print("ready", flush=True)
build(sys.argv[1], checkpoint_every=0.0).close()
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "d"
    build(path).close()
    return contents(path)


def start(path: Path) -> subprocess.Popen[str]:
    """A process that builds the tiny dictionary, past its imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(path)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_sigkill_at_random_moments_then_the_same_bytes(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """A few moments; ``benchmarks/dictionary/costs.py kills`` does twenty."""
    path, draw = tmp_path / "d", random.Random(0)
    for _ in range(2):
        with start(path) as process:
            time.sleep(draw.uniform(0.2, 3.0))
            process.send_signal(signal.SIGKILL)
    if not (path / "manifest.json").exists() or (path / "work" / "plan.json").exists():
        build(path).close()
    assert contents(path) == undisturbed


class Died(BaseException):
    """What stands for the end of the process: no code of ours can catch it by accident."""


def writes_until(number: int) -> Any:
    """``os.replace`` that dies at the given call: after the file is written, before it counts."""
    left = [number]
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if left[0] == 0:
            raise Died
        left[0] -= 1
        real(source, target)

    return replace


def test_death_at_every_file_that_is_written(
    undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each build gets one file further than the last, from whatever that one left behind."""
    path, deaths = tmp_path / "d", 0
    real = os.replace
    for number in range(1, 60, 2):
        monkeypatch.setattr(os, "replace", writes_until(number))
        try:
            build(path, checkpoint_every=0.0).close()
            break
        except Died:
            deaths += 1
        finally:
            monkeypatch.setattr(os, "replace", real)
    assert deaths > 3
    assert contents(path) == undisturbed


def test_a_scan_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = model()
    job = prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    ran: list[int] = []
    real = Runner.run

    def count(self: Any, block: Any, *visits: Any) -> Any:
        if len(ran) == 5:
            raise Died
        ran.append(block.index)
        return real(self, block, *visits)

    monkeypatch.setattr(Runner, "run", count)
    with pytest.raises(Died):
        scan_shard(job, checkpoint_every=0.0, progress=False)
    monkeypatch.setattr(Runner, "run", lambda s, b, *v: (ran.append(b.index), real(s, b, *v))[1])
    scan_shard(job, checkpoint_every=0.0, progress=False)
    assert ran == list(range(job.corpus.blocks))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that has room for so many more files."""
    room, real = [10**9], os.replace

    def replace(source: Any, target: Any) -> None:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return room


@pytest.mark.parametrize("files", [0, 2, 4, 7, 10])
def test_a_full_disk_is_said_and_loses_nothing(
    undisturbed: dict[str, bytes], tmp_path: Path, full_disk: list[int], files: int
) -> None:
    full_disk[0] = files
    with pytest.raises(StorageError, match="no space left on the disk while writing"):
        build(tmp_path / "d", checkpoint_every=0.0)
    assert not list((tmp_path / "d").rglob("*.tmp"))
    full_disk[0] = 10**9
    build(tmp_path / "d").close()
    assert contents(tmp_path / "d") == undisturbed


def test_a_damaged_checkpoint_is_named_and_not_gone_on_with(tmp_path: Path) -> None:
    bridge = model()
    job = prepare(bridge, texts(), tmp_path / "d", **OPTIONS)
    path = scan_shard(job, progress=False)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.write_bytes(bytes(damaged))
    with pytest.raises(StorageError, match=r"shard-00000-of-00001\.safetensors is damaged"):
        scan_shard(job, progress=False)
    with pytest.raises(StorageError, match=r"shard-00000-of-00001\.safetensors is damaged"):
        NeuronDictionary.merge(job, [path], progress=False)
