"""A dictionary built by many processes that never talk: they share a folder.

The unit of work is a shard of a scan, then of a replay; each leaves files and reads those of the
others, so there are no collectives and the result equals a single process's bit for bit (on CPUs of
one kind, in float32 with one number of threads). `build_distributed` runs under `torchrun`,
`accelerate launch` or Slurm, where each process finds its rank in the environment; `build_with_ray`
hands shards to a pool of Ray actors, which may come and go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.publish import finish
from lenslrp.analysis.dictionary.replay import Entries, replay, replayed
from lenslrp.analysis.dictionary.scan import Job, merge_shards, scan_shard
from lenslrp.analysis.dictionary.vocabulary_file import LISTED_TOKENS
from lenslrp.analysis.dictionary.vocabulary_lists import project_places
from lenslrp.analysis.dictionary.work_folder import BUILD, PLAN, begin_work, shard_name, using
from lenslrp.errors import InputError, StorageError
from lenslrp.explaining_file import Explanations, explain_to
from lenslrp.extras import require
from lenslrp.logits import Target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Where launchers say which process this is, and of how many."""

LOCAL = ("checkpoint_every", "progress")
"""Options of each process, which are no part of the plan."""


def rank_and_world(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where no launcher says.

    Raises:
        InputError: numbers that do not fit.
    """
    variables = os.environ if environment is None else environment
    for rank_name, world_name in RANKS:
        if rank_name in variables and world_name in variables:
            rank, world = variables[rank_name], variables[world_name]
            if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
                raise InputError(f"{rank_name}={rank} of {world_name}={world} is no rank")
            return int(rank), int(world)
    return 0, 1


def _apart_from_plan(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that are no part of the plan, taken out: of each process, and of publishing."""
    local = {name: options.pop(name) for name in LOCAL if name in options}
    keep_work, tokens = options.pop("keep_work", False), options.pop("vocabulary", LISTED_TOKENS)
    return local, {"keep_work": keep_work, "vocabulary": tokens}


def build_distributed(
    model: TransformerBridge,
    corpus: Any,
    path: str | Path,
    *,
    timeout: float | None = None,
    **options: Any,
) -> NeuronDictionary | None:
    """Build one dictionary from all processes of a `torchrun` (or Slurm) job.

    Call it in every process with the same arguments; `path` is on a disk that all of them see. Rank
    0 tokenises, merges and publishes; all scan and replay. A job that was killed goes on when it is
    started again with as many processes.

    Args:
        model: the bridge of this process, on its own device.
        corpus: read by rank 0 only.
        path: the dictionary's folder.
        timeout: seconds to wait for other processes; None for ever (`torchrun` ends all processes
            when one fails).
        options: of `NeuronDictionary.build`.

    Returns:
        The dictionary in rank 0, None elsewhere.

    Raises:
        InputError: as `NeuronDictionary.build`.
        StorageError: another process's files did not come in time; see also `build`.

    Examples:
        In a script that `torchrun --nproc-per-node 8` starts:

        >>> d = build_distributed(model, "texts.jsonl", "/shared/model.dict")
    """
    rank, world = rank_and_world()
    folder = Path(path)
    local, publishing = _apart_from_plan(options)
    if rank == 0:
        job = prepare(model, corpus, folder, **options)
    else:
        _wait([folder / "work" / PLAN], timeout, lambda plan: plan.exists())
        job = prepare(model, None, folder, **options)
    with using(job.work, shard_name(rank, world)):
        scan_shard(job, rank, world, **local)
        shards = [job.shard(r, world) for r in range(world)]
        _wait(shards, timeout, _is_done)
        entries = Entries.of(merge_shards(job, shards), job.plan)
        project_places(
            job, rank, world, tokens=publishing["vocabulary"], progress=local.get("progress", True)
        )
        replay(job, entries, rank, world, **local)
        if rank > 0:
            return None
        ranks = list(range(world))
        _wait(ranks, timeout, lambda r: _has_replayed(job, r, world))
        parts = [path for r in ranks for path in replayed(job, r, world)]
        finish(job, shards, parts=parts, **publishing, **local)
    return NeuronDictionary.open(folder)


def _has_replayed(job: Job, rank: int, world: int) -> bool:
    files = replayed(job, rank, world)
    return bool(files) and _is_done(files[-1])


def _is_done(path: Path) -> bool:
    """Whether a shard's file says that it is finished; its header is read, no more."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("done") == "True")
    except (FileNotFoundError, SafetensorError):  # not there yet
        return False


def _wait(items: list[Any], timeout: float | None, ready: Callable[[Any], bool]) -> None:
    start, pause = time.monotonic(), 0.05
    for item in items:
        while not ready(item):
            if timeout is not None and time.monotonic() - start > timeout:
                raise StorageError(f"waited {timeout:g} seconds for another process: {item}")
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


class Worker:
    """What a Ray actor holds: a model, and the job that it found in the shared folder."""

    def __init__(self, make_model: Callable[[], Any], path: str, options: dict[str, Any]) -> None:
        self.job = prepare(make_model(), None, path, **options)

    def scan(self, rank: int, world: int, local: dict[str, Any]) -> str:
        return str(scan_shard(self.job, rank, world, **local))

    def replay(
        self, files: list[str], rank: int, world: int, tokens: int, local: dict[str, Any]
    ) -> list[str]:
        project_places(self.job, rank, world, tokens=tokens, progress=False)
        entries = Entries.of(merge_shards(self.job, files), self.job.plan)
        return [str(path) for path in replay(self.job, entries, rank, world, **local)]


def build_with_ray(
    make_model: Callable[[], Any],
    corpus: Any,
    path: str | Path,
    *,
    workers: int,
    shards: int | None = None,
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> NeuronDictionary:
    """Build one dictionary with a pool of Ray actors (extra `ray`).

    An actor that dies is started again and takes its shard up where the last checkpoint left it.

    Args:
        make_model: makes the bridge, in each actor.
        corpus: read by the calling process.
        path: the dictionary's folder, on a disk that all of them see.
        workers: how many actors.
        shards: how many pieces of work; four a worker if not given, so that a slow one is helped.
        resources: of an actor, as for `ray.remote`: `{"num_gpus": 1}`.
        options: of `NeuronDictionary.build`.

    Returns:
        The finished dictionary, opened.

    Raises:
        InputError: as `NeuronDictionary.build`.
        MissingExtraError: Ray is not installed.
        StorageError: as `NeuronDictionary.build`.
    """
    require("ray", "build_with_ray")
    local, publishing = _apart_from_plan(options)
    local["progress"] = False
    world = shards or 4 * workers
    # The calling process holds the folder for all actors, which may come and go on any host.
    with using(begin_work(Path(path)), BUILD):
        job = prepare(make_model(), corpus, path, **options)
        folder = str(Path(path).resolve())
        ranks = list(range(world))
        tokens = publishing["vocabulary"]
        with _actors(Worker, workers, resources, make_model, folder, options) as pool:
            files = list(pool.map(lambda a, r: a.scan.remote(r, world, local), ranks))
            parts = list(
                pool.map(lambda a, r: a.replay.remote(files, r, world, tokens, local), ranks)
            )
        paths = [Path(path) for some in parts for path in some]
        finish(job, files, parts=paths, **publishing, **local)
    return NeuronDictionary.open(path)


@contextmanager
def _actors(
    kind: type, workers: int, resources: dict[str, Any] | None, *arguments: Any
) -> Iterator[Any]:
    """A pool of Ray actors that are started again when they die, and end with the block."""
    import ray
    from ray.util import ActorPool

    remote = ray.remote(max_restarts=-1, max_task_retries=-1, **(resources or {}))(kind)
    actors = [remote.remote(*arguments) for _ in range(workers)]
    yield ActorPool(actors)
    for actor in actors:
        ray.kill(actor)


class Explainer:
    """What a Ray actor holds that explains many prompts: a model, and what is asked of it."""

    def __init__(self, make_model: Callable[[], Any], path: str, options: dict[str, Any]) -> None:
        self.model, self.path, self.options = make_model(), path, options

    def explain(self, share: int, shares: int) -> Explanations:
        problems = {name: _made(self.options[name]) for name in ("inputs", "targets")}
        options = {**self.options, **problems}
        return explain_to(self.path, self.model, shard=(share, shares), **options)


def _made(value: Any) -> Any:
    """Inputs or targets, where a function makes them."""
    return value() if callable(value) and not isinstance(value, Target) else value


def explain_with_ray(
    make_model: Callable[[], Any],
    path: str | Path,
    inputs: Any,
    targets: Any = None,
    *,
    workers: int,
    shards: int | None = None,
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> Explanations:
    """`lenslrp.explain_to` with a pool of Ray actors (extra `ray`).

    An actor that dies is started again and makes the parts of its share that are missing.

    Args:
        make_model: makes the bridge, in each actor.
        path: the table, on a disk that all of them see.
        inputs, targets: as for `explain_to`, or a function that returns them, called in each actor.
        workers, shards, resources: as for `build_with_ray`.
        options: of `explain_to`.

    Returns:
        The complete table.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    require("ray", "explain_with_ray")
    shares = shards or 4 * workers
    arguments = {"inputs": inputs, "targets": targets, **options}
    table = str(Path(path).resolve())
    with _actors(Explainer, workers, resources, make_model, table, arguments) as pool:
        parts = list(pool.map(lambda a, share: a.explain.remote(share, shares), range(shares)))
    whole: Explanations = max((p for p in parts if p.complete), key=lambda part: part.prompts)
    return whole
