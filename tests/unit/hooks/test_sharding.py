"""Models whose weights are spread over two processes: FSDP2 is right, all else is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lenslrp.hooks.graph_walk import walk
from tests.conftest import ROOT

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that ran :mod:`tests.unit.two_processes` side by side."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.unit.two_processes", str(folder / "store")]
    outs = [folder / f"{rank}.json" for rank in range(2)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(out)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
        )
        for rank, out in enumerate(outs)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


@needs_gloo
def test_fsdp_gives_what_one_process_gives(both: list[dict[str, Any]]) -> None:
    """Relevance at every hook, the ledger and the flags of the weights, each on its own input."""
    for found in both:
        cases = {name: case for name, case in found.items() if isinstance(case, dict)}
        assert len(cases) == 10
        for name, case in cases.items():
            assert case["logits"], name
            assert case["size"] > 1e-4, name
            assert case["tokens"] <= 1e-12 * case["size"], name
            assert case["hooks"] <= 1e-12, name
            assert case["error"] < 1e-9, name
            assert case["flags"], name
            assert case["changes"] == [], name
    assert all(both[0][name]["size"] != both[1][name]["size"] for name in cases)


@needs_gloo
def test_fsdp_with_several_targets_and_training_afterwards(both: list[dict[str, Any]]) -> None:
    for found in both:
        rest = [value for value in found.values() if isinstance(value, float)]
        assert len(rest) == 4
        assert max(rest) < 1e-9


@needs_gloo
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gamma", "blocks.0.attn.q: gamma reads its weight, which FSDP gathers"),
        ("tensor parallel", "gate_proj.weight is split over processes (S(0)), as by tensor paral"),
        ("load", "model.layers.0.mlp.gate_proj.weight is split over processes (S(0))"),
        ("shard", "lm_head.weight is split over processes (S(0))"),
        ("replica", "lm_head.weight is split over processes (R)"),
    ],
)
def test_other_splits_are_refused_by_name(
    both: list[dict[str, Any]], case: str, message: str
) -> None:
    for found in both:
        assert message in found[f"refused: {case}"]


@needs_gloo
def test_what_fsdp_adds_to_the_graph_is_the_identity() -> None:
    """So the walk lets it pass; another function of that name is met as ever."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

    class Group:
        def post_backward(self) -> None:
            pass

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y, z = RegisterPostBackwardFunction.apply(Group(), x, x * 2)
    assert torch.equal(y, x) and torch.equal(z, x * 2)
    g, h = torch.randn_like(x), torch.randn_like(x)
    assert walk([y]).gaps == []
    (found,) = torch.autograd.grad([y, z], [x], [g, h])
    assert torch.equal(found, g + 2 * h)

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    Doubles.__name__ = Doubles.__qualname__ = RegisterPostBackwardFunction.__name__
    Doubles.__module__ = RegisterPostBackwardFunction.__module__
    assert len(walk([Doubles.apply(x)]).gaps) == 1
