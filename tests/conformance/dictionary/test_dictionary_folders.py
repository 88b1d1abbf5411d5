"""Building where others keep files, and while others build: nothing of theirs is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lenslrp import files
from lenslrp.analysis import export_html, export_neuronpedia, write_page
from lenslrp.analysis.dictionary import work_folder as work
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.export.jsonl import export_jsonl
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.launch import build_distributed
from lenslrp.analysis.dictionary.scan import scan_shard
from lenslrp.analysis.dictionary.work_folder import FILES, begin_work, shard_name, using
from lenslrp.cli import commands as cli
from lenslrp.errors import StorageError
from tests.conformance.dictionaries import OPTIONS, model, texts
from tests.conformance.dictionary_damage import make
from tests.conftest import ROOT


def everything(folder: Path) -> dict[str, Any]:
    """All that lies there, and where links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("finished") / "d"
    make(path)
    return everything(path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LOCK_PATIENCE", 0.1)


def notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "data").mkdir()
    (folder / "data" / "work.csv").write_text("mine")
    (folder / "link").symlink_to("data")
    (folder / ".x.lenslrp-elsewhere-7-0.tmp").mkdir()
    (folder / ".notes.1234.tmp").write_text("mine")


def test_other_files_are_left_alone(finished: dict[str, Any], tmp_path: Path) -> None:
    notes(tmp_path)
    before = everything(tmp_path)
    make(tmp_path)
    assert everything(tmp_path) == before | finished


def _work(folder: Path, *names: str) -> None:
    (folder / "work").mkdir()
    for name in names:
        (folder / "work" / name).parent.mkdir(exist_ok=True)
        (folder / "work" / name).write_text("mine")


def _links(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "lenslrp.json").write_text("{}")
    (folder / "work").symlink_to("elsewhere")


IN_THE_WAY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a folder": ("work", lambda f: _work(f, "thesis.tex")),
    "an empty folder": ("work", lambda f: _work(f)),
    "our names in it": ("work", lambda f: _work(f, "plan.json", "corpus/corpus.json")),
    "a file": ("work", lambda f: (f / "work").write_text("mine")),
    "a link": ("work", _links),
    "a dangling link": ("work", lambda f: (f / "work").symlink_to("nowhere")),
    "a manifest": ("manifest.json", lambda f: (f / "manifest.json").write_text('{"name": "app"}')),
    "no JSON": ("manifest.json", lambda f: (f / "manifest.json").write_text("mine")),
    **{name: (name, lambda f, name=name: (f / name).write_text("mine")) for name in sorted(FILES)},
    "a folder of our name": ("units.parquet", lambda f: (f / "units.parquet").mkdir()),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_is_in_the_way_is_named_and_left(tmp_path: Path, case: str) -> None:
    name, put = IN_THE_WAY[case]
    notes(tmp_path)
    put(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(StorageError, match=f"{name} is in the way: LensLRP did not make it"):
        make(tmp_path)
    assert everything(tmp_path) == before


def test_a_finished_dictionary_is_not_built_again(tmp_path: Path) -> None:
    make(tmp_path)
    before = everything(tmp_path)
    for begin in (lambda: make(tmp_path), lambda: prepare(model(), texts(), tmp_path, **OPTIONS)):
        with pytest.raises(StorageError, match="holds a finished dictionary already"):
            begin()
    assert everything(tmp_path) == before


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("mine")
    for path in (tmp_path / "d", tmp_path / "d" / "e"):
        with pytest.raises(StorageError, match="cannot write .*d"):
            make(path)
    assert (tmp_path / "d").read_text() == "mine"


def test_what_comes_into_the_work_folder_stays(finished: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d"
    kept = {
        "work/notes.txt": "mine",
        "work/corpus/mine.jsonl": "mine",
        "work/shard-results.safetensors": "mine",
        "work/more/plan.json": "mine",
    }
    begin_work(path)
    for name, text in kept.items():
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_text(text)
    make(path)
    found = everything(path)
    left = {n: v for n, v in found.items() if n not in finished and v is not None}
    assert left == {name: text.encode() for name, text in kept.items()}
    assert {name: found[name] for name in finished} == finished


def test_what_comes_in_place_of_a_result_stays(tmp_path: Path) -> None:
    """Somebody copies a file into the folder while the dictionary is being built."""
    job = prepare(model(), texts(), tmp_path, **OPTIONS)
    shard = scan_shard(job, progress=False)
    (tmp_path / "texts.sqlite").write_text("mine")
    with pytest.raises(StorageError, match=r"texts\.sqlite is in the way: it is another file"):
        NeuronDictionary.merge(job, [shard], progress=False)
    assert (tmp_path / "texts.sqlite").read_text() == "mine"
    (tmp_path / "texts.sqlite").unlink()
    NeuronDictionary.merge(job, [shard], progress=False).close()


# who is using it

BEGIN = """
import sys
from pathlib import Path
from lenslrp.analysis.dictionary.work_folder import begin_work, using
with using(begin_work(Path(sys.argv[1])), sys.argv[2]):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Another process that uses the dictionary ``d`` until its input ends."""
    begun: list[subprocess.Popen[str]] = []

    def begin(what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(tmp_path / "d"), what],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def test_the_second_builder_is_told_who_the_first_is(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]]
) -> None:
    first = other("build")
    before = everything(tmp_path)
    who = rf"in use \(build\) by process {first.pid} on host {files.host()} since 20\d\d-"
    with pytest.raises(StorageError, match=who):
        make(tmp_path / "d")
    assert everything(tmp_path) == before
    first.communicate("")  # it ends well
    make(tmp_path / "d")


def test_a_builder_that_was_killed_is_followed(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]]
) -> None:
    first = other("build")
    first.kill()
    first.wait()
    assert (tmp_path / "d" / "work" / "build.holder.json").exists()
    make(tmp_path / "d")
    assert not (tmp_path / "d" / "work").exists()


def test_shards_exclude_their_like_and_builders(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]]
) -> None:
    path = tmp_path / "d"
    first = other(shard_name(0, 2))
    with using(path / "work", shard_name(1, 2)):
        pass
    for what in ("build", shard_name(0, 2)):
        with (
            pytest.raises(
                StorageError, match=f"in use .shard-00000-of-00002. by process {first.pid}"
            ),
            using(path / "work", what),
        ):
            pass
    job = prepare(model(), texts(), path, **OPTIONS)
    shards = [scan_shard(job, rank, 2, progress=False) for rank in (0, 1)]
    with pytest.raises(StorageError, match=f"in use .* by process {first.pid}"):
        NeuronDictionary.merge(job, shards, progress=False)
    first.communicate("")
    other("build")
    with (
        pytest.raises(StorageError, match="in use .build."),
        using(path / "work", shard_name(1, 2)),
    ):
        pass
    with pytest.raises(StorageError, match="in use .build."):
        build_distributed(model(), texts(), path, progress=False, **OPTIONS)


def test_two_threads_of_one_process(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            make(tmp_path / "d")
        except StorageError as error:
            found.append(str(error))

    with using(begin_work(tmp_path / "d"), "build"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"in use (build) by process {os.getpid()}" in found[0]


def elsewhere(path: Path, host: str = "node-7", process: int = 1) -> Path:
    """A note that another host's process left."""
    said = {"process": process, "host": host, "since": "2026-01-01 00:00:00 UTC"}
    note = begin_work(path) / "build.holder.json"
    note.write_text(json.dumps(said))
    return note


def test_another_host_is_asked_about(tmp_path: Path) -> None:
    """Its locks may not be seen here, so nobody can know whether it is still at work."""
    note = elsewhere(tmp_path / "d")
    before = everything(tmp_path / "d" / "work")
    message = (
        "was in use .build. by process 1 on host node-7 since 2026-01-01 .* delete .*build.holder"
    )
    with pytest.raises(StorageError, match=message):
        make(tmp_path / "d")
    after = everything(tmp_path / "d" / "work")
    assert {n: v for n, v in after.items() if not n.endswith(".lock")} == before
    note.unlink()  # as the message says
    make(tmp_path / "d")


def test_a_host_works_on_what_another_host_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards on two hosts that share a disk, neither of which sees the other's processes."""
    path = tmp_path / "d"
    job = prepare(model(), texts(), path, **OPTIONS)
    with using(job.work, shard_name(0, 2)):
        monkeypatch.setattr(work, "host", lambda: "node-8")
        with using(job.work, shard_name(1, 2)):
            scan_shard(job, 1, 2, progress=False)
        with pytest.raises(StorageError, match="on host node-8|in use"), using(job.work, "build"):
            pass
    assert not list(job.work.glob("*.holder.json"))


@pytest.mark.parametrize("alive", [True, False])
def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """There the note alone says who is at work, and the host whether that process is alive."""

    class NoLock:
        def __init__(self, path: Path) -> None:
            pass

        def acquire(self, **_: float) -> None:
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(work, "FileLock", NoLock)
    elsewhere(tmp_path / "d", files.host(), os.getppid() if alive else 999_999_999)
    if alive:
        with pytest.raises(StorageError, match=rf"in use \(build\) by process {os.getppid()}"):
            make(tmp_path / "d")
    else:
        make(tmp_path / "d")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"process": "x", "host": 1, "since": null}'])
def test_a_damaged_note_stops_nobody(tmp_path: Path, content: str) -> None:
    elsewhere(tmp_path / "d").write_text(content)
    make(tmp_path / "d")


def test_shards_from_the_command_line_are_held(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lenslrp.models import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: model())
    (tmp_path / "c.txt").write_text("\n\n".join(texts(20)))
    first = other(shard_name(0, 2))
    command = ["dictionary", "build", "x", str(tmp_path / "c.txt"), str(tmp_path / "d")]
    options = ["--context", "12", "--k", "2", "--criteria", "actmax", "--batch-size", "4"]
    assert cli.main([*command, *options, "--shard", "0/2"]) == 2
    assert f"in use (shard-00000-of-00002) by process {first.pid}" in capsys.readouterr().err
    assert cli.main([*command, *options, "--shard", "1/2"]) == 0


# exports

EXPORTS: dict[str, tuple[str, Callable[[NeuronDictionary, Path], object]]] = {
    "pages": ("index.html", lambda d, f: export_html(d, f, [(0, 0), (0, 1)])),
    "a page": ("blocks.0.mlp.hook_post_0-2.html", lambda d, f: export_html(d, f, [(0, 0)])),
    "page": ("page.html", lambda d, f: write_page(d[0, 0], f / "page.html")),
    "lines": ("units.jsonl", lambda d, f: export_jsonl(d, f / "units.jsonl", [(0, 0)])),
    "neuronpedia": (
        "llamaforcausallm/0-lenslrp-mlp-hook_post/source.jsonl",
        export_neuronpedia,
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_replace_themselves_and_nothing_else(tmp_path: Path, case: str) -> None:
    name, export = EXPORTS[case]
    make(tmp_path / "d")
    d = NeuronDictionary.open(tmp_path / "d")
    clean, taken = tmp_path / "clean", tmp_path / "taken"
    for folder in (clean, taken):
        folder.mkdir()
        notes(folder)
    before = everything(clean)
    export(d, clean)
    first = everything(clean)
    assert before.items() <= first.items()
    assert name in first
    export(d, clean)
    assert everything(clean) == first
    (taken / name).parent.mkdir(parents=True, exist_ok=True)
    (taken / name).write_text("mine")
    before = everything(taken)
    with pytest.raises(StorageError, match="not made by (LensLRP|an export)|in the way"):
        export(d, taken)
    assert before.items() <= everything(taken).items()
    d.close()
