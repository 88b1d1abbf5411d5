"""What a dictionary costs: throughput, memory, size, look-ups, and what kills cost it.

    python -m benchmarks.dictionary.costs throughput [--layers 30] [--rounds 9]
    python -m benchmarks.dictionary.costs features [--features 16384] [--active 64] [--rounds 5]
    python -m benchmarks.dictionary.costs operations [--layers 30]
    python -m benchmarks.dictionary.costs memory
    python -m benchmarks.dictionary.costs kills [--moments 20]
    python -m benchmarks.dictionary.costs vocabulary
    python -m benchmarks.dictionary.costs build CORPUS PATH
    python -m benchmarks.dictionary.costs open PATH

``throughput`` compares tokens a second of a scan with those of the plain model over the same
blocks, in turn, in an order drawn anew in each round; ratios are formed within a round. The plain
forward pass is the bridge's, stopped before the unembedding; the plain forward and backward pass is
the bridge's too, with weights frozen, a leaf at the embeddings and the same target, and is given
twice: with all positions unembedded, as anyone would write it, and the targets' positions only, as
the scan does. Time is the process's own (CPU) time of one thread, that of its own code apart from
that of the kernel, which is spent on pages of memory; on a machine that others use, the clock tells
nothing. ``features`` does the same for the features of a random coder that keeps the ``--active``
largest, at one layer: the plain passes stop at that layer as the scan does, encode all positions
and form the relevance of all features at all of them. It then builds a dictionary of ``--texts``
texts, and says how large it is and how long it takes to open. ``operations`` puts the model on a
simulated device and counts, for one block, how often the host waits for it and how many kernels it
is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import DATA, ROOT

CORPUS = DATA / "wikipedia_paragraphs.jsonl"
BOTH = ["mlp.hook_post", "attn.hook_z"]


def smollm2(layers: int) -> Any:
    import lenslrp

    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    if layers >= len(model.blocks):
        return model
    inner = model.original_model
    inner.model.layers = inner.model.layers[:layers]
    inner.config.num_hidden_layers = layers
    tokenizer = model.tokenizer
    return lenslrp.load(type(inner)(inner.config).eval(), tokenizer=tokenizer)


ACTS, ALL = ("actmax", "actmin"), ("actmax", "actmin", "relmax", "relmin")


def prepared(model: Any, criteria: tuple[str, ...], **options: Any) -> Any:
    from lenslrp.analysis.dictionary.job import prepare

    corpus = CORPUS if CORPUS.exists() else [[i % 1000 + 5] * 128 for i in range(640)]
    options = {"sites": BOTH, **options}
    return prepare(model, corpus, Path(tempfile.mkdtemp()) / "d", criteria=criteria, **options)


def scanning(job: Any, runner: Any) -> Callable[[Any], None]:
    """One block of a scan."""
    from lenslrp.analysis.dictionary.scan import Scanner, ScanState

    scanner = Scanner(ScanState.empty(job.plan), job.plan, {})

    def scan(block: Any) -> None:
        runner.run(block, scanner.on_activation, scanner.on_relevance)
        scanner.take(block)

    return scan


def plainly(model: Any, coder: Any = None) -> dict[str, Callable[[Any], None]]:
    """The plain model over a block, without and with a backward pass.

    With a coder, up to where it reads, and with the activations and relevance of its features.
    """
    from lenslrp.analysis.dictionary.block_pass import target_positions
    from lenslrp.hooks.components import hook_points
    from lenslrp.hooks.handles import Attached
    from lenslrp.hooks.structure import components
    from lenslrp.logits import unembed_at
    from lenslrp.running import undone

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    def encode_and_stop(_: Any, __: Any, out: torch.Tensor) -> None:
        coder.encode(out)
        raise Stop

    device = next(model.parameters()).device
    point = model.embed if coder is None else hook_points(model, components(model))[coder.hook]

    def padding(block: Any) -> dict[str, torch.Tensor]:
        return {} if block.mask.all() else {"attention_mask": block.mask.long().to(device)}

    def plain(block: Any) -> None:
        if coder is None:
            handle = model.unembed.register_forward_pre_hook(stop)
        else:
            handle = point.register_forward_hook(encode_and_stop)
        tokens, mask = block.tokens.to(device), padding(block)
        try:
            with torch.no_grad():
                model(tokens, return_type="logits", use_cache=False, **mask)
        except Stop:
            pass
        finally:
            handle.remove()

    def backward(block: Any, sliced: bool) -> None:
        lengths = torch.tensor(block.lengths)
        positions = target_positions(block.docs, lengths, 0)
        tokens = block.tokens.gather(1, positions[:, None] + 1)[:, 0].to(device)
        given, mask = block.tokens.to(device), padding(block)
        kept: list[torch.Tensor] = []

        def leaf(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            kept.append(out.detach().requires_grad_())
            return kept[-1]

        frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        handle = point.register_forward_hook(leaf)
        try:
            if sliced:
                with undone(Attached()) as at:
                    unembed_at(at, model.unembed, positions[:, None], given.shape[1])
                    logits = model(given, return_type="logits", use_cache=False, **mask)
                picked = logits[:, 0].gather(1, tokens[:, None])
            else:
                logits = model(given, return_type="logits", use_cache=False, **mask)
                picked = logits[torch.arange(len(tokens)), positions, tokens]
            (g,) = torch.autograd.grad(picked.sum(), kept)
            if coder is not None:
                _ = coder.encode(kept[0].detach()) * (g @ coder.W_dec.T)
        finally:
            handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)

    return {
        "plain forward": plain,
        "forward and backward": lambda block: backward(block, False),
        "the same, sliced": lambda block: backward(block, True),
    }


def throughput(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = smollm2(arguments.layers)
    print(f"SmolLM2, {arguments.layers} layers, {arguments.rounds} rounds of a block, one thread")
    _compare(model, arguments.rounds)


def _compare(model: Any, rounds: int, coder: Any = None, **options: Any) -> None:
    """Scans beside the plain model, in turn."""
    jobs = {
        "ActMax, ActMin": prepared(model, ACTS, **options),
        "and RelMax, RelMin": prepared(model, ALL, **options),
    }
    first, second = jobs
    ways = plainly(model, coder)
    draw = random.Random(0)
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in (*ways, *jobs)}

    def timed(name: str, act: Callable[[Any], None], block: Any) -> None:
        before = os.times()
        act(block)
        after = os.times()
        spent = after.user - before.user, after.system - before.system, sum(block.lengths)
        times[name].append(spent)

    for _ in range(rounds + 1):
        block = jobs[first].corpus.block(draw.randrange(jobs[first].corpus.blocks))
        for name in draw.sample(list(times), len(times)):
            if name in ways:
                timed(name, ways[name], block)
                continue
            with jobs[name].run.open() as runner:  # so that the plain model is plain in between
                timed(name, scanning(jobs[name], runner), block)
    for name, spent in times.items():
        user, system, speed = (
            statistics.median(column)
            for column in zip(*((u, s, n / (u + s)) for u, s, n in spent[1:]), strict=True)
        )
        print(
            f"  {name:22} {speed:6.0f} tokens/s of CPU time; user {user:.2f} s, system {system:.2f}"
        )
    for mine, base in (
        (first, "plain forward"), (second, "forward and backward"), (second, "the same, sliced")
    ):  # fmt: skip
        for kind, total in (("user", lambda t: t[0]), ("user and system", lambda t: t[0] + t[1])):
            pairs = list(zip(times[mine], times[base], strict=True))[1:]
            ratios = sorted(total(b) / total(m) for m, b in pairs)
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"  {mine} / {base}: throughput {middle:.3f} ({low:.3f} to {high:.3f} quartiles, "
                f"{ratios[0]:.3f} to {ratios[-1]:.3f}) by {kind} time"
            )


def features(arguments: argparse.Namespace) -> None:
    """A dictionary of the features of a coder: as fast as the plain model, how large?"""
    from lenslrp.analysis import NeuronDictionary, SparseCoder

    torch.set_num_threads(1)
    model = smollm2(30)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(arguments.features, model.cfg.d_model, generator=draw)
    rows = torch.nn.functional.normalize(rows, dim=-1)
    coder = SparseCoder(
        "blocks.12.hook_resid_post", rows.T.contiguous(), torch.zeros(len(rows)), rows,
        torch.zeros(rows.shape[1]), k=arguments.active,
    )  # fmt: skip
    print(f"{coder}, {arguments.active} active, {arguments.rounds} rounds of a block, one thread")
    if arguments.rounds:
        _compare(model, arguments.rounds, coder, sites=coder, batch_size=arguments.batch_size)
    texts = [
        json.loads(line)["text"] for line in CORPUS.read_text().splitlines()[: arguments.texts]
    ]
    with tempfile.TemporaryDirectory() as folder:
        began = os.times()
        d = NeuronDictionary.build(
            model, texts, Path(folder) / "d", sites=coder, k=10, progress=False
        )
        ended = os.times()
        cpu = ended.user + ended.system - began.user - began.system
        print(f"  {d}: {cpu:.0f} s of CPU time")
        d.close()
        print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        opened(argparse.Namespace(path=Path(folder) / "d"))


def operations(arguments: argparse.Namespace) -> None:
    from tests.conformance.elsewhere import Waits, place

    device = torch.device("cpu:0")
    model = smollm2(arguments.layers)
    jobs = {"ActMax, ActMin": prepared(model, ACTS), "and RelMax, RelMin": prepared(model, ALL)}
    block = next(iter(jobs.values())).corpus.block(0)
    with Waits() as waits:
        place(model, device)
        model.cfg.device = device
        for name, act in plainly(model).items():
            _print_counts(name, *waits.during(lambda act=act: act(block)))
        for name, job in jobs.items():
            with job.run.open() as runner:
                scan = scanning(job, runner)
                scan(block)
                _print_counts(name, *waits.during(lambda scan=scan: scan(block)))


def _print_counts(name: str, waits: int, kernels: int) -> None:
    print(f"  {name:22} the host waits {waits:4} times; {kernels:6} kernels")


MEMORY = [sys.executable, "-W", "ignore", "-m", "benchmarks.dictionary.costs", "memory"]


def memory(arguments: argparse.Namespace) -> None:
    """Peak resident memory of a scan of a small random Llama, by the length of the corpus."""
    if arguments.documents:
        _scan_random(arguments.documents)
        return
    for documents in (1_000, 4_000, 16_000, 64_000):
        done = subprocess.run(
            [*MEMORY, "--documents", str(documents)], cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        print(done.stdout.strip())


def _scan_random(documents: int) -> None:
    import transformers as hf

    import lenslrp
    from lenslrp.analysis.dictionary.job import prepare
    from lenslrp.analysis.dictionary.scan import scan_shard

    torch.set_num_threads(1)
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = lenslrp.load(hf.LlamaForCausalLM(config).eval())
    draw = random.Random(0)
    rows = ([draw.randrange(512) for _ in range(32)] for _ in range(documents))
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(model, rows, folder, context=32, batch_size=64, criteria=("actmax", "relmax"))
        scan_shard(job, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{documents:7} documents, {documents * 32:9} tokens: peak {peak:.0f} MiB")


CHILD = """
import sys
from tests.conformance.dictionaries import build
print("ready", flush=True)
build(sys.argv[1], checkpoint_every=0.0).close()
"""


def kills(arguments: argparse.Namespace) -> None:
    """SIGKILL a build of a tiny dictionary again and again; then compare it with one left alone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD]

    def start(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, str(path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    folder = Path(tempfile.mkdtemp())
    began = time.monotonic()
    with start(folder / "whole"):
        began = time.monotonic()
    length = time.monotonic() - began
    expected = {p.name: p.read_bytes() for p in (folder / "whole").iterdir()}
    draw, stages = random.Random(arguments.seed), []
    killed, path, number = 0, folder / "0", 0
    while killed < arguments.moments:
        with start(path) as process:
            time.sleep(draw.uniform(0, 1.1 * length))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
                stages.append(_stage(path))
        if (path / "manifest.json").exists() and not (path / "work").exists():
            same = {p.name: p.read_bytes() for p in path.iterdir()} == expected
            print(f"dictionary {number}: finished after {killed} kills so far, identical: {same}")
            number += 1
            path = folder / str(number)
    if not (path / "manifest.json").exists() or (path / "work").exists():
        with start(path):
            pass
    if path.exists():
        same = {p.name: p.read_bytes() for p in path.iterdir()} == expected
        print(f"dictionary {number}: finished undisturbed in the end, identical: {same}")
    found = {stage: stages.count(stage) for stage in sorted(set(stages))}
    print(f"{killed} kills; what they found: {found}")


def _stage(path: Path) -> str:
    work = path / "work"
    for name, pattern in (
        ("publishing", "../*.*"),
        ("replaying", "replay-*"),
        ("scanning", "shard-*"),
    ):
        if list(work.glob(pattern)):
            return name
    return "preparing"


def vocabulary(arguments: argparse.Namespace) -> None:
    """What all neurons and heads write and read, and the file of it."""
    from lenslrp.analysis.dictionary.job import prepare
    from lenslrp.analysis.dictionary.vocabulary_file import write_vocabulary
    from lenslrp.analysis.dictionary.vocabulary_lists import project_places

    torch.set_num_threads(1)
    rows = [[i % 1000 + 5] * 16 for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(smollm2(30), rows, folder, sites=BOTH, criteria=("actmax",))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu, wall = time.process_time(), time.perf_counter()
        parts = project_places(job, progress=False)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_vocabulary(Path(folder) / "vocabulary.parquet", job.plan, parts)
        size = (Path(folder) / "vocabulary.parquet").stat().st_size / 2**20
    print(
        f"{job.plan.units} units: {cpu:.0f} s of CPU time of one thread ({wall:.0f} s by the "
        f"clock), {(peak - before) / 1024:.0f} MiB more memory, {size:.1f} MiB on disk"
    )


def build(arguments: argparse.Namespace) -> None:
    from lenslrp.analysis import NeuronDictionary

    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    d = NeuronDictionary.build(smollm2(30), arguments.corpus, arguments.path, sites=BOTH, k=10)
    print(d, f"{time.monotonic() - start:.0f} s")


def opened(arguments: argparse.Namespace) -> None:
    from lenslrp.analysis import NeuronDictionary

    folder = Path(arguments.path)
    for name, record in json.loads((folder / "manifest.json").read_text())["files"].items():
        print(f"  {name:24} {record['bytes'] / 2**20:8.1f} MiB")
    for verify in (True, False):
        took = _timed(lambda v=verify: NeuronDictionary.open(folder, verify=v), 3)
        print(f"  open, verify={verify}: {took}")
    d, draw = NeuronDictionary.open(folder), random.Random(0)
    print(" ", d)

    def drawn() -> Any:
        place = draw.choice(d.plan.places)
        return d.page(place, draw.randrange(place.size))

    def one() -> None:
        page = drawn()
        for criterion in d.plan.criteria:
            page.examples(criterion)

    words = ["football", "church", "energy", "law", "city", "teacher", "river", "disease", "war"]
    print(f"  one unit, one criterion: {_timed(lambda: drawn().examples('actmax'), 50)}")
    print(f"  one unit, all {len(d.plan.criteria)} criteria: {_timed(one, 50)}")
    print(f"  search_text, one word: {_timed(lambda: d.search_text(draw.choice(words)), 20)}")
    two = _timed(lambda: d.search_text("the " + draw.choice(words)), 20)
    print(f"  search_text, two words: {two}")
    print(f"  search_tokens: {_timed(lambda: d.search_tokens(draw.choice(words)), 5)}")
    for by in ("writes", "reads"):
        took = _timed(lambda by=by: d.search_tokens(draw.choice(words), by=by), 10)
        print(f"  search_tokens, by={by}: {took}")
    print(f"  vocabulary of one unit: {_timed(lambda: drawn().vocabulary(), 50)}")
    print(f"  similar: {_timed(lambda: d.similar(drawn().name), 10)}")


def _timed(act: Callable[[], Any], times: int) -> str:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        spent.append(1000 * (time.perf_counter() - start))
    rest = sorted(spent[1:] or spent)
    middle = statistics.median(rest)
    return f"first {spent[0]:.0f} ms, then median {middle:.0f} ms (up to {rest[-1]:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    for name, act in (
        ("throughput", throughput), ("features", features), ("operations", operations),
        ("memory", memory), ("kills", kills), ("vocabulary", vocabulary), ("build", build),
        ("open", opened),
    ):  # fmt: skip
        command = commands.add_parser(name)
        command.set_defaults(act=act)
        if name in ("throughput", "operations"):
            command.add_argument("--layers", type=int, default=30)
        if name == "throughput":
            command.add_argument("--rounds", type=int, default=9)
        if name == "features":
            command.add_argument("--rounds", type=int, default=5)
            command.add_argument("--features", type=int, default=16384)
            command.add_argument("--active", type=int, default=64)
            command.add_argument("--texts", type=int, default=24)
            command.add_argument("--batch-size", type=int, default=4)
        if name == "memory":
            command.add_argument("--documents", type=int, default=0)
        if name == "kills":
            command.add_argument("--moments", type=int, default=20)
            command.add_argument("--seed", type=int, default=0)
        if name == "build":
            command.add_argument("corpus")
            command.add_argument("--threads", type=int, default=1)
        if name in ("build", "open"):
            command.add_argument("path")
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
