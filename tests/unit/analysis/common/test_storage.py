"""Files: whole or not there, checked when read, bounded before they are believed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lenslrp.analysis.common import storage
from lenslrp.analysis.common.storage import (
    check_files,
    file_record,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
)
from lenslrp.errors import StorageError
from lenslrp.files import host, remove_leftovers, whole

TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.randn(4), "empty": torch.zeros(0, 2)}


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"what": "test"})
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata == {"what": "test"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"what": "test"})
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bytes(bad))
        try:
            tensors, metadata = load_tensors(path)
        except StorageError:
            continue
        # A changed space of the header's padding, say, changes nothing that is read.
        assert metadata == {"what": "test"}
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match=r"x\.safetensors is (damaged or )?truncated"):
        load_tensors(path)


@pytest.mark.parametrize("claimed", [2**22 + 1, 2**40, 2**63])
def test_an_oversized_header_is_not_read(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}" * 100)
    with pytest.raises(StorageError, match=f"claims a header of {claimed} bytes"):
        load_tensors(path)


class Payload:
    """Would make a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    bait = tmp_path / "ran"
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Payload(bait)))
    (tmp_path / "b.json").write_bytes(pickle.dumps(Payload(bait)))
    torch.save(TENSORS, tmp_path / "c.safetensors")
    for name, load in (
        ("a.safetensors", load_tensors),
        ("b.json", load_json),
        ("c.safetensors", load_tensors),
    ):
        with pytest.raises(StorageError, match=name):
            load(tmp_path / name)
    assert not bait.exists()


def test_a_full_disk_is_said_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"finished": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left .*x\.json; what was finished before is"):
        save_json(path, {"finished": 2})
    assert load_json(path) == {"finished": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_other_errors_pass_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole(tmp_path / "x") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    dead = tmp_path / f".x.lenslrp-{host()}-999999999-0.tmp"
    kept = [
        tmp_path / f".x.lenslrp-{host()}-{os.getpid()}-0.tmp",
        tmp_path / ".x.lenslrp-another-host-999999999-0.tmp",
        tmp_path / ".notes.tmp",
        tmp_path / ".notes.999999999.tmp",
    ]
    for path in (dead, *kept):
        path.mkdir()
        (path / "x").write_text("half")
    remove_leftovers(tmp_path)
    assert not dead.exists()
    assert all((path / "x").exists() for path in kept)


@pytest.mark.parametrize("text", ["[1]", "{", "", "\x00", "[" * 100_000])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(StorageError, match=r"m\.json"):
        load_json(tmp_path / "m.json")


def test_a_large_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "JSON_LIMIT", 100)
    (tmp_path / "m.json").write_text(json.dumps({"x": "y" * 200}))
    with pytest.raises(StorageError, match="at most 100 are read"):
        load_json(tmp_path / "m.json")


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "m.json").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match=r"m\.json is a symbolic link"):
        load_json(tmp_path / "m.json")


def test_files_are_compared_with_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345678")
    records = {"a.bin": file_record(tmp_path / "a.bin")}
    allowed = frozenset(records)
    check_files(tmp_path, records, allowed, contents=True)
    (tmp_path / "a.bin").write_bytes(b"12345679")
    check_files(tmp_path, records, allowed, contents=False)
    with pytest.raises(StorageError, match=r"a\.bin is damaged: its SHA-256"):
        check_files(tmp_path, records, allowed, contents=True)
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(StorageError, match=r"a\.bin has 4 bytes, but the manifest says 8"):
        check_files(tmp_path, records, allowed, contents=False)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "a/../../b", "b.bin", ""])
def test_a_manifest_cannot_name_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"1")
    records = {name: file_record(tmp_path / "a.bin")}
    with pytest.raises(StorageError, match="lists the files"):
        check_files(tmp_path, records, frozenset({"a.bin"}), contents=True)
