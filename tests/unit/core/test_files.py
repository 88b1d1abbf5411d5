"""The writer of files: whole or not there, through what is no file, and nothing of others lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from lenslrp import files
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.storage import save_json, save_tensors
from lenslrp.analysis.dictionary.texts import write_texts
from lenslrp.errors import InputError, StorageError
from lenslrp.files import HTML, make_folder, parquet_writer, replaced, require_ours, whole
from tests.conftest import ROOT


def write(path: Path, text: str = "new", ours: bytes | None = None) -> None:
    with whole(path, ours=ours) as part:
        part.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True)
def test_a_new_file_has_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    """Whatever library wrote it: safetensors gives 0600."""
    write(tmp_path / "text")
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    with whole(tmp_path / "y.safetensors") as part:
        save_file({"a": torch.zeros(2)}, part)
    make_folder(tmp_path / "a" / "b")
    for name in ("text", "x.safetensors", "y.safetensors"):
        assert mode(tmp_path / name) == 0o666 & ~umask
    assert mode(tmp_path / "a" / "b") == mode(tmp_path / "a") == 0o777 & ~umask


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    write(path)
    assert (path.read_text(), mode(path)) == ("new", 0o640)


def test_a_protected_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to everything
    with pytest.raises(StorageError, match="cannot write .*x: Permission denied"):
        write(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("start", ["old", None])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, start: str | None) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, second = tmp_path / "elsewhere" / "t", tmp_path / "a", tmp_path / "b"
    if start is not None:
        target.write_text(start)
    link.symlink_to(Path("elsewhere") / "t")
    second.symlink_to(link)
    write(second)
    assert target.read_text() == "new"
    assert second.is_symlink() and link.is_symlink()
    assert not target.is_symlink()
    assert {p.name for p in tmp_path.rglob("*")} == {"elsewhere", "t", "a", "b"}


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    circle, gone = tmp_path / "circle", tmp_path / "gone"
    circle.symlink_to(circle)
    gone.symlink_to(tmp_path / "no" / "file")
    with pytest.raises(StorageError, match="leads in a circle"):
        write(circle)
    with pytest.raises(InputError, match="no does not exist"):
        write(gone)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a directory"):
        write(tmp_path / "link")
    assert circle.is_symlink() and gone.is_symlink()


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write(pipe, "x" * 100_000)
    reader.join()
    assert read == ["x" * 100_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_device_is_written_through(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        write(path, ours=HTML)
        assert stat.S_ISCHR(path.stat().st_mode)
    with pytest.raises(StorageError, match="no space left on the disk while writing /dev/full"):
        write(Path("/dev/full"))
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_socket_is_refused(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(StorageError, match="cannot write .*socket: No such device or address"):
            write(tmp_path / "socket")
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


TO_STDOUT = """
from pathlib import Path
from lenslrp.files import whole
print("before")
with whole(Path("/dev/stdout")) as part:
    part.write_text("written\\n")
print("after")
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux")
@pytest.mark.parametrize("how", ["pipe", "file"])
def test_standard_output_is_written_in_its_order(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", TO_STDOUT]
    if how == "pipe":
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    else:
        with (tmp_path / "out").open("w") as file:
            subprocess.run(command, cwd=ROOT, stdout=file, check=True)
        out = (tmp_path / "out").read_text()
    assert out == "before\nwritten\nafter\n"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "x").write_text("old")

    def refuse(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    for path in (tmp_path / "x", tmp_path / "y"):
        with pytest.raises(StorageError, match=f"cannot write .*: {os.strerror(number)}"):
            write(path)
    with pytest.raises(StorageError, match=f"cannot write .*: {os.strerror(number)}"):
        make_folder(tmp_path / "z")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x": "old"}


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    for folder in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(StorageError, match="cannot write .*x"):
            make_folder(folder)
    with pytest.raises(InputError, match="does not exist"):
        write(tmp_path / "x" / "y")


def json_file(path: Path) -> None:
    save_json(path, {"x": "y" * 100_000})


def tensor_file(path: Path) -> None:
    save_tensors(path, {"x": torch.zeros(100_000)}, {})


def parquet_file(path: Path) -> None:
    table = pa.table({"x": torch.rand(100_000).numpy()})
    with whole(path) as part, parquet_writer(part, table.schema) as writer:
        writer.write_table(table)


def database(path: Path) -> None:
    write_texts(path, [], iter((n, "x" * 100) for n in range(2000)))


@pytest.mark.parametrize("make", [json_file, tensor_file, parquet_file, database])
def test_a_limit_on_the_size_of_files(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The operating system's own error, in the words of each library."""
    path = tmp_path / "x"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match=r"x (would be larger|: )|cannot write .*x: "):
            make(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x": "old"}


@pytest.mark.parametrize("name", ["x" * 250, "ö" * 120 + ".html", "a b'\"<&>.html", "-rf", ".x"])
def test_any_name_that_the_disk_takes(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_names_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file can be called"):
        write(tmp_path / "a\0b")
    with pytest.raises(StorageError, match="cannot write .*: File name too long"):
        write(tmp_path / ("x" * 300))


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "x", [letter * 50_000 for letter in "abcd"]
    threads = [
        threading.Thread(target=lambda text=text: [write(path, text) for _ in range(20)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_others_made_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    write(path, f"<html>{HTML.decode()}", HTML)
    write(path, f"<p>{HTML.decode()}", HTML)
    assert path.read_text().startswith("<p>")
    path.write_text("<html>mine")
    with pytest.raises(StorageError, match=r"index\.html exists and was not made by LensLRP"):
        write(path, "x", HTML)
    with pytest.raises(StorageError, match=r"index\.html exists"):
        require_ours(path, HTML)
    assert path.read_text() == "<html>mine"
    path.write_text("")  # of mktemp, say: nothing is lost
    write(path, "x", HTML)


def test_a_file_of_the_same_contents_may_be_there_already(tmp_path: Path) -> None:
    for _ in range(2):
        with whole(tmp_path / "x", fresh=True) as part:
            part.write_text("same")
    with (
        pytest.raises(StorageError, match="x is in the way: it is another file"),
        whole(tmp_path / "x", fresh=True) as part,
    ):
        part.write_text("other")
    assert (tmp_path / "x").read_text() == "same"


@pytest.mark.parametrize("links", [True, False])
def test_an_earlier_result_is_kept(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    path = tmp_path / "r.html"
    assert replaced(path, lambda: write(path, "1")) is None
    assert replaced(path, lambda: write(path, "1")) is None  # the same
    assert replaced(path, lambda: write(path, "2")) == tmp_path / "r-1.html"
    assert replaced(path, lambda: write(path, "3")) == tmp_path / "r-2.html"
    kept = {"r.html": "3", "r-1.html": "1", "r-2.html": "2"}
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == kept

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        replaced(path, fail)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == kept


def test_hosts_and_containers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str, namespace: str) -> str:
        monkeypatch.setattr(files.socket, "gethostname", lambda: name)
        monkeypatch.setattr(os, "readlink", lambda _: namespace)
        return files.host.__wrapped__()

    first = "pid:[4026531836]"
    assert of("node-1.cluster", first) == "node-1.cluster"
    assert len({of("node-1", first), of("node-2", first), of("node-1", "pid:[4026532000]")}) == 3
    assert "/" not in of("../../x", first)


def test_what_is_written_through_is_whole(tmp_path: Path) -> None:
    """Nothing reaches a pipe of a page that could not be made."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(KeyError), whole(pipe) as part:  # noqa: PT012
        part.write_text("half")
        raise KeyError
    assert json.dumps([p.name for p in tmp_path.iterdir()]) == '["pipe"]'


@pytest.mark.parametrize("content", ["mine", "mine\n", "[1]\n", '{"other": 1}\nx'])
def test_a_journal_does_not_take_the_place_of_another_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(content)
    with (
        pytest.raises((StorageError, InputError), match=r"examples\.jsonl"),
        resumed(path, {"a": 1}),
    ):
        pass
    assert path.read_text() == content


def test_a_journal_that_a_kill_cut_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "examples.jsonl"
    path.parent.mkdir()
    path.write_text('{"a"')  # its first line
    with resumed(path, {"a": 1}) as (done, append):
        assert done == []
        append({"b": 2})
    with resumed(path, {"a": 1}) as (done, _):
        assert done == [{"b": 2}]


def test_a_full_disk_while_a_journal_is_written(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with resumed(path, {"a": 1}) as (_, append):
        append({"b": 2})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
        try:
            with pytest.raises(StorageError, match=r"examples\.jsonl would be larger"):
                append({"c": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with resumed(path, {"a": 1}) as (done, _):
        assert done == [{"b": 2}]
