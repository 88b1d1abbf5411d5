"""Ctrl-C in a notebook: a kernel is interrupted in the middle of work, and the model is clean.

:mod:`tests.unit.hooks.test_undo_interrupted` raises at every line; here it is a signal to a kernel,
which also comes while torch's own code runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT

manager = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client")
pytest.importorskip("ipykernel", reason="needs ipykernel")


SETUP = f"""
import sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
import torch, lenslrp
from lenslrp.analysis.circuits.scores import score_nodes
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.steering.operations import Scale
from lenslrp.analysis.steering.sweeps import sweep
from lenslrp.analysis.units.kinds import Neuron
from tests.unit.tiny import TOKENS, changes, snapshot, tiny, word_tokenizer
model = tiny("llama", tokenizer=word_tokenizer())
pairs = Pairs(TOKENS[:1], TOKENS[1:], torch.ones(1, 6, dtype=torch.bool),
              torch.tensor([5]), torch.tensor([6]))
texts = ["a b c d e f g", "k c a b e", "h i j k l m"] * 20

def relevance():
    lenslrp.run_with_relevance(model, TOKENS, 5)

def in_session():
    with lenslrp.session(model, attention="fused", checkpoint=True) as session:
        for _ in range(20):
            session.run_with_relevance(TOKENS, 5)

def circuit():
    for method in ("relevance", "exact"):
        score_nodes(model, pairs, method=method, components=["heads"])

def steering():
    sweep(model, Scale(Neuron(0, 3), 0.0), [0.0, 2.0], ["a b c"], target=("c", ["d", "e"]),
          new_tokens=3, prepend_bos=False)

def dictionary():
    with tempfile.TemporaryDirectory() as folder:
        NeuronDictionary.build(model, texts, folder + "/d", progress=False, k=2, context=8,
                               sites="blocks.1.mlp.hook_post", batch_size=4)

def forever(work):
    print("begun", flush=True)
    while True:
        work()

for work in (relevance, in_session, circuit, steering, dictionary):
    work()
before = snapshot(model)
expected = lenslrp.run_with_relevance(model, TOKENS, 5)[1].tokens
print("ready")
"""

CHECK = """
left = changes(before, model)
same = torch.equal(lenslrp.run_with_relevance(model, TOKENS, 5)[1].tokens, expected)
print("clean" if not left and same else f"left: {left[:5]}, same: {same}", flush=True)
"""


class Kernel:
    """A kernel that is running, and what its cells print or raise."""

    def __init__(self) -> None:
        self.manager: Any = manager.KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv[0] = sys.executable
        self.manager.start_kernel(cwd=str(ROOT))
        self.client: Any = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, interrupt_after: float | None = None) -> str:
        """What a cell printed, or the name of what it raised."""
        cell = self.client.execute(code)
        said = ""
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                said += content["text"]
                if interrupt_after is not None and content["text"].startswith("begun"):
                    time.sleep(interrupt_after)
                    self.manager.interrupt_kernel()
            elif kind == "error":
                said += content["ename"] + ": " + content["evalue"]
            elif kind == "status" and content["execution_state"] == "idle":
                return said.strip()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    running = Kernel()
    try:
        assert running.run(SETUP).endswith("ready")
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("after", [0.031, 0.17])
@pytest.mark.parametrize("work", ["relevance", "in_session", "circuit", "steering", "dictionary"])
def test_an_interrupt_of_a_kernel_leaves_the_model_clean(
    kernel: Kernel, work: str, after: float
) -> None:
    said = kernel.run(f"forever({work})", interrupt_after=after)
    assert said.startswith("begun") and "KeyboardInterrupt" in said
    assert kernel.run(CHECK) == "clean"
