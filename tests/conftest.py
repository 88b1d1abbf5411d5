"""What all tests share: fixed seeds, checked shapes, the embedded model, optional data.

Set before torch, transformers or lenslrp are imported: no test asks a model hub for anything, and
annotated shapes are checked at run time (jaxtyping with beartype).
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping
import numpy as np
import pytest
import torch
import transformers.modeling_utils  # noqa: F401 - the hook below compiles anew what it imports
from jaxtyping import install_import_hook

# The models are tiny and the workers several: more threads than cores only wait for one another.
torch.set_num_threads(1)

# Not the public entry points, which answer arguments of a wrong type with messages of their own.
install_import_hook(
    [
        # Not the files that attach rules: each closure they make would be compiled anew.
        "lenslrp.hooks.rules",
        "lenslrp.hooks.functions",
        "lenslrp.hooks.sites",
        "lenslrp.analysis",
        "lenslrp.cache",
        "lenslrp.text.conversation",
        "lenslrp.ledger",
    ],
    "beartype.beartype",
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SEED = 20_240_611
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of a wrong type get the message that a user sees, not a type checker's."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_report_header() -> list[str]:
    return [
        f"seed: {SEED} (python, numpy, torch; set before each test)",
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
    ]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - for code under test that draws from the global state
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    """The embedded model in float32 on the CPU: loaded once, so leave it as you found it."""
    import lenslrp

    return lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of evaluation texts beside the repository, or a skip that names it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the evaluation texts in {SHARED_DATA}, which are not in the repository")
    return SHARED_DATA


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to look up or reach another host fails the test."""
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
