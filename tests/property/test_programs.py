"""Random programs in tiny models are right or refused: a short run, and what once went wrong.

The long run is ``python -m tests.property.programs --count 20000``.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lenslrp.hooks.recurrence import RecurrenceIntercept
from tests.property.bridges import given, template
from tests.property.generate import generate
from tests.property.interpreter import status
from tests.property.judge import judge, right_for
from tests.property.operations import MIXERS
from tests.property.program import SIZES, UNIFORM, Node, Part, Program
from tests.property.programs import features
from tests.property.shrink import shrink
from tests.property.writer import SCANNING

COUNT, SCANS = 140, 70
REGRESSIONS = [
    Program.from_json(line)
    for line in Path(__file__).with_name("regressions.jsonl").read_text().splitlines()
]


def test_a_short_run_is_right_or_refused() -> None:
    kinds: Counter[str] = Counter()
    over = 0
    for seed in range(COUNT):
        program = generate(seed, "bfloat16" if seed % 10 == 9 else "float64")
        verdict = judge(program)
        assert verdict.kind in ("right", "refused", "rough"), (
            f"seed {seed}: {verdict.kind}: {verdict.reason}; {verdict.detail}\n{program}\n"
            f"python -m tests.property.programs --shrink {seed} --dtype {program.dtype}"
        )
        kinds[verdict.kind] += 1
        over += verdict.over
    assert kinds["right"] >= COUNT // 4, kinds
    assert over <= COUNT // 10, "much is refused although every rule is known"


def test_programs_with_scans_are_right_or_refused() -> None:
    right: Counter[str] = Counter()
    over = 0
    for seed in range(SCANS):
        program = generate(seed, "bfloat16" if seed % 10 == 9 else "float64", SCANNING)
        verdict = judge(program)
        assert verdict.kind in ("right", "refused", "rough"), f"seed {seed}: {verdict}\n{program}"
        over += verdict.over
        if verdict.kind == "right":
            nodes = [node for part in program.parts for node in part.code if node.op == "scan"]
            right.update({node.args[0] for node in nodes})
            right.update({UNIFORM} & {*program.options} if nodes else ())
    assert all(right[name] >= 4 for name in (*MIXERS, UNIFORM)), right
    assert over <= SCANS // 10, "much is refused although every rule is known"


def test_a_wrong_rule_of_a_scan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes by the skip gets half, as what passes by the state: it is all the values'."""
    code = (Node("input"), Node("scan", (0,), ("mamba2",), 7))
    part = Part("module", "act", (1,), 12, code)
    program = Program("gpt2", (part,), options=(UNIFORM,), read=("all",))
    assert judge(program).kind == "right"
    monkeypatch.setattr(RecurrenceIntercept, "skipped", lambda self, name, args: args)
    assert judge(program).kind != "right"


@pytest.mark.parametrize("program", REGRESSIONS, ids=lambda program: program.parts[0].place)
def test_what_once_went_wrong(program: Program) -> None:
    verdict = judge(program)
    assert verdict.kind in ("right", "refused"), f"{verdict}\n{program}"


@pytest.mark.parametrize("host", SIZES)
def test_hosts_by_hand_are_hugging_faces_and_the_engines(host: str) -> None:
    """Without any part: logits, tokens and every hook point that both have."""
    program = Program(host, (), read=("all",))
    right = right_for(program, torch.float64)
    model, seen = template(host, 0, torch.float64)[0], given(host, 0)
    with torch.no_grad():
        logits = model(pixel_values=seen).logits if host == "vit" else model(seen).logits
    torch.testing.assert_close(logits.reshape(right.logits.shape), right.logits, rtol=0, atol=1e-12)
    assert len(right.at) > 25
    for weights in range(3):
        verdict = judge(Program(host, (), weights=weights, target=weights, read=("all",)))
        assert verdict.kind == "right", verdict


def test_programs_are_what_their_seeds_say() -> None:
    """The same at every call, whole through JSON, and of every kind."""
    found: Counter[str] = Counter()
    for seed in range(400):
        program = generate(seed)
        assert generate(seed) == program
        assert Program.from_json(program.to_json()) == program
        found.update(features(program))
    for name in ("inplace or view", "product", "hook", "unknown", "shared module", "reduction"):
        assert found[name] >= 15, name
    assert {f"declared {rule}" for rule in ("identity", "norm", "operations", "plain")} < set(found)


def test_a_failing_program_becomes_small() -> None:
    """Shrinking keeps the verdict: here a refusal for one operation among several."""
    code = (
        Node("input"),
        Node("linear", (0,), (12, 1), 1),
        Node("unknown", (1,), ("sigmoid",), 2),
        Node("reduce", (2,), ("cumsum", -2), 3),
        Node("linear", (3,), (12, 0), 4),
        Node("activation", (0,), ("silu", "plain"), 5),
        Node("add", (4, 5), ("sub",), 6),
    )
    program = Program("gpt2", (Part("module", "act", (0, 1), 12, code, base="GELU"),), weights=2)
    small, verdict = shrink(program, judge(program))
    assert verdict.reason == "CoverageError: no rule: Sigmoid"
    assert [node.op for node in small.parts[0].code] == ["input", "unknown"]
    assert "v1 = unknown(v0, 'sigmoid')" in str(small)


def test_what_is_cut_off_decides_nothing() -> None:
    """Unknown operations below a detach are no part of what is explained."""
    seen = set()
    for seed in range(600):
        for part in generate(seed).parts:
            if part.kind == "module" and part.declared == "":
                seen.add(status(part.code, "bare"))
    assert seen == {"sure", "may", "none"}


def test_the_journal_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.property import programs

    journal = tmp_path / "journal.jsonl"
    options = ["--seed", "3", "--resume", str(journal)]
    programs.main(["--count", "2", *options])
    programs.main(["--count", "4", *options])
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [3, 4, 5, 6]
    assert "4 programs: " in capsys.readouterr().out
