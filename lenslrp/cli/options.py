"""What the commands share: exit codes, how a model is asked for, where results are shown.

Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_MODEL = "smollm2-135m"
COMPOSITES = ("AttnLRP", "AttnLRPViT", "CPLRP", "GradientTimesInput", "RelP", "GIM")
DTYPES = ("float16", "bfloat16", "float32", "float64")
OK, NOT_COVERED, BAD_INPUT = 0, 1, 2


def add_model_options(
    command: argparse.ArgumentParser, name: str, *, rules: bool = True, **settings: Any
) -> None:
    """How a command finds its model, and the rules that it is given."""
    default = f" (default: {settings['default']})" if settings.get("default") else ""
    command.add_argument(
        name,
        metavar="MODEL",
        help=f"embedded model ({DEFAULT_MODEL}), Hugging Face id or directory{default}",
        **settings,
    )
    if rules:
        command.add_argument(
            "--composite",
            choices=COMPOSITES,
            help="rules (default: AttnLRP; AttnLRPViT for a model that reads images)",
        )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)"
    )
    command.add_argument("--device", help="such as cpu or cuda (default: an accelerator if any)")
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")


def load_model(options: argparse.Namespace) -> TransformerBridge:
    """The bridge that the options ask for.

    Raises:
        InputError: no such device.
        LoadError: no such model.
    """
    import torch

    from lenslrp.errors import InputError
    from lenslrp.models.loading import load

    device = options.device
    if device is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise InputError(f"no such device: {device!r}") from error
    dtype = getattr(torch, options.dtype)
    return load(options.model, dtype=dtype, device=device, revision=options.revision)


def own_device() -> str | None:
    """Each process of a launcher has a GPU of its own, where there are any."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def composite(name: str | None) -> Any:
    """Rules by the name that the command line gives them; ``None`` for those of the model."""
    from lenslrp.hooks import composites

    return None if name is None else getattr(composites, name)()


def console() -> Console:
    """Standard output."""
    from rich.console import Console

    return Console(highlight=False)


def check_writable(option: str, path: Path, ours: bytes) -> None:
    """Before the work, not after it: a file can be written there.

    Args:
        ours: what a file that LensLRP made holds; see `lenslrp.files.require_ours`.

    Raises:
        InputError: a directory, in none, or in one that may not be written to.
        StorageError: a file that LensLRP did not make is there.
    """
    from lenslrp.errors import InputError
    from lenslrp.files import require_ours

    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory, give a file")
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no directory {folder}")
    if not path.exists() and not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: the directory {folder} may not be written to")
    require_ours(path, ours)


def write_keeping(path: Path, write: Callable[[], object]) -> None:
    """Write a result; one that was there is kept under another name, and the user is told."""
    from lenslrp.files import replaced

    renamed = replaced(path, write)
    if renamed is not None:
        print(f"lenslrp: the earlier {path.name} is kept as {renamed}", file=sys.stderr)


def require_utf8(arguments: Sequence[str]) -> None:
    """Text of the command line is Unicode.

    Raises:
        InputError: an argument's bytes are not UTF-8.
    """
    from lenslrp.errors import InputError

    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raw = os.fsencode(argument)
            raise InputError(
                f"argument {number} is not UTF-8: {raw[:60]!r}. Give text and names of files in "
                "UTF-8"
            ) from None
