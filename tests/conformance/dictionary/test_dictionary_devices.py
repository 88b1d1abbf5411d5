"""A scan on several devices, and how often the host waits for one of them.

Devices are simulated (:mod:`tests.conformance.elsewhere`), so that what would leave a device is
seen: a number, a condition, a list, a tensor that goes to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lenslrp.analysis.common.storage import load_tensors
from lenslrp.analysis.dictionary.block_pass import Runner
from lenslrp.analysis.dictionary.corpus import Block
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.scan import Job, Scanner, ScanState, sampled_columns, scan_shard
from lenslrp.errors import InputError
from tests.conformance.core.test_devices import FIRST, spread
from tests.conformance.dictionaries import OPTIONS, model, texts
from tests.conformance.elsewhere import Waits, devices

ACTIVATIONS = ("actmax", "actmin", "deciles")
ALL = (*ACTIVATIONS, "relmax", "relmin")


def begun(path: Path, criteria: tuple[str, ...]) -> Job:
    return prepare(model(), texts(), path, **{**OPTIONS, "criteria": criteria})


def nothing(*_: Any) -> None:
    """What takes in a block and does nothing with it."""


def scanner_of(job: Job) -> Scanner:
    return Scanner(ScanState.empty(job.plan), job.plan, sampled_columns(job.plan))


def scan(runner: Runner, scanner: Scanner, block: Block) -> None:
    runner.run(block, scanner.on_activation, scanner.on_relevance)
    scanner.take(block)


@pytest.mark.parametrize("criteria", [ACTIVATIONS, ALL], ids=["activations", "relevance"])
def test_the_host_waits_once_a_block(criteria: tuple[str, ...], tmp_path: Path) -> None:
    job = begun(tmp_path / "d", criteria)
    scanner, bridge = scanner_of(job), job.run.model
    blocks = [job.corpus.block(index) for index in (0, 1, job.corpus.blocks - 1)]
    assert len({bool(block.mask.all()) for block in blocks}) == 2

    def once(act: Callable[[], Any]) -> int:
        return waits.during(act)[0]

    with Waits() as waits:
        spread(bridge, back=False)
        with job.run.open() as runner:
            scan(runner, scanner, blocks[0])
            for block in blocks:
                bare = once(partial(runner.run, block, nothing, nothing))
                assert once(partial(scan, runner, scanner, block)) == bare + 1
                if not job.plan.relevance:
                    mask = {} if block.mask.all() else {"attention_mask": block.mask.to(FIRST)}
                    options = {"return_type": "logits", "use_cache": False, **mask}
                    plain = partial(bridge, block.tokens.to(FIRST), **options)
                    assert bare <= once(plain)


def test_what_waits_is_seen() -> None:
    with Waits() as waits:
        x = torch.ones(3, device="cpu:1")
        for act in (
            lambda: float(x[0]), lambda: bool((x > 0).all()), x.tolist, x.cpu, lambda: x[x > 0],
            x.nonzero, lambda: torch.empty(3).copy_(x), lambda: torch.equal(x, x),
        ):  # fmt: skip
            assert waits.during(act)[0] == 1
        for act in (lambda: x + 1, lambda: x[torch.tensor([1])], lambda: x.to("cpu:0"), x.amax):
            assert waits.during(act)[0] == 0


@pytest.mark.parametrize("criteria", [ACTIVATIONS, ALL], ids=["activations", "relevance"])
def test_two_devices_make_the_same_file(criteria: tuple[str, ...], tmp_path: Path) -> None:
    expected, said = load_tensors(scan_shard(begun(tmp_path / "one", criteria), progress=False))
    job = begun(tmp_path / "two", criteria)
    scanner = scanner_of(job)
    with devices():
        spread(job.run.model, back=True)
        with job.run.open() as runner:
            for index in range(job.corpus.blocks):
                scan(runner, scanner, job.corpus.block(index))
                scanner.collect()
    assert len(scanner.parts) == 2
    state = scanner.state
    state.next, state.tokens = job.corpus.blocks, job.plan.corpus["tokens"]
    state.save(tmp_path / "file", job.plan, 0, 1, done=True)
    found, metadata = load_tensors(tmp_path / "file")
    assert metadata == said
    for name, tensor in expected.items():
        assert tensor.numpy().tobytes() == found.pop(name).numpy().tobytes(), name
    assert not found


@pytest.mark.parametrize("criteria", [ACTIVATIONS, ALL], ids=["activations", "relevance"])
def test_where_activations_overflow_is_named(criteria: tuple[str, ...], tmp_path: Path) -> None:
    """By the first hook and document, though it is found out at the end of the block."""
    job = begun(tmp_path / "d", criteria)
    lengths = job.corpus.block(0).lengths
    doc = int(job.corpus.block(0).docs[1])

    def spoil(_: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[1, lengths[1] - 1, 3] = torch.inf
        return out

    job.run.model.blocks[1].mlp.hook_post.register_forward_hook(spoil)
    with pytest.raises(InputError, match=rf"blocks\.1\.mlp\.hook_post is NaN .* document {doc}:"):
        scan_shard(job, progress=False)
