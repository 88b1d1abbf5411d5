"""From a model, a corpus and options to a job: the corpus tokenised, the plan decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.analysis.common.storage import load_json, save_json
from lenslrp.analysis.dictionary.block_pass import CORPUS_TARGETS, BlockPass, find_places
from lenslrp.analysis.dictionary.corpus import Corpus, Cut, tokenise
from lenslrp.analysis.dictionary.plan import DICTIONARY_SCHEMA, TOP_CRITERIA, Plan
from lenslrp.analysis.dictionary.scan import Job
from lenslrp.analysis.dictionary.sources import describe_corpus
from lenslrp.analysis.dictionary.work_folder import (
    PLAN,
    TURNS,
    begin_work,
    clear_corpus,
    found_work,
)
from lenslrp.analysis.units.cross_layer import require_one_layer
from lenslrp.analysis.units.kinds import Unit
from lenslrp.analysis.units.readers import FeatureReader, Sites, searched_hooks
from lenslrp.errors import InputError, StorageError
from lenslrp.files import taking_turns
from lenslrp.fingerprints import describe_model, describe_rules, describe_tokenizer
from lenslrp.hooks.composites import AttnLRP, Composite, as_composite
from lenslrp.hooks.install import require_bridge
from lenslrp.hooks.rule_types import Rule
from lenslrp.inputs import is_encoder_decoder
from lenslrp.logits import Target
from lenslrp.media import labels_of, reads_no_text
from lenslrp.text.tokenization import beginning

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT_CRITERIA = ("actmax", "actmin", "relmax", "relmin", "deciles", "random")


def prepare(
    model: TransformerBridge,
    corpus: Any,
    path: str | Path,
    *,
    sites: Sites = "mlp.hook_post",
    criteria: Iterable[str] = DEFAULT_CRITERIA,
    k: int = 20,
    context: int = 128,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    skip_first: bool = True,
    field: str = "text",
    revision: str | None = None,
    target: str | Target = "next",
    composite: Composite | Mapping[str, Rule] | None = None,
    attention: str = "bridge",
    through: Iterable[Unit] = (),
    sample: int = 100,
    window: tuple[int, int] = (16, 8),
    seed: int = 0,
) -> Job:
    """Tokenise the corpus and decide the plan: what every shard starts from.

    Called again with the same options it finds what it left; with others it refuses.

    Args:
        model: a `TransformerBridge` of a decoder or an encoder, with text as its input.
        corpus: as for `NeuronDictionary.build`. `None` takes the corpus that lies there tokenised,
            as every worker but the first does.
        path: the dictionary's folder.
        sites, criteria, k, context, batch_size, prepend_bos, skip_first, field, revision, target,
            composite, attention, through, sample, window, seed: as for `NeuronDictionary.build`.

    Returns:
        What `scan_shard` and `NeuronDictionary.merge` take.

    Raises:
        InputError: an option that does not hold for this model or corpus.
        StorageError: `path` holds work on another dictionary or what LensLRP did not make, or the
            disk is full.

    Examples:
        >>> job = prepare(model, "texts.jsonl", "model.dict")
        >>> files = [scan_shard(job, rank, 2) for rank in range(2)]
        >>> d = NeuronDictionary.merge(job, files)
    """
    require_bridge(model)
    if reads_no_text(model) or is_encoder_decoder(model):
        raise InputError(
            "a dictionary is built from token sequences of one stack; this model reads "
            + ("no text" if reads_no_text(model) else "two of them (encoder and decoder)")
        )
    folder = Path(path)
    work = found_work(folder) if corpus is None else begin_work(folder)
    bos = _bos(model, prepend_bos)
    with taking_turns(work / TURNS):
        tokenised = _tokenised(corpus, model, work, Cut(context, batch_size, bos, field))
    searched = tuple(searched_hooks(sites))
    places = find_places(model, searched, tokenised.block(0).tokens[:1])
    chosen, units = tuple(criteria), tuple(through)
    relevance = any(TOP_CRITERIA.get(c, ("",))[0] == "relevance" for c in chosen)
    for site in searched:
        if relevance and isinstance(site.reader, FeatureReader):
            require_one_layer(site.reader.coder, "relevance in a dictionary")
    table = as_composite(AttnLRP() if composite is None else composite)
    about = {k: v for k, v in tokenised.about.items() if k not in ("parts", "identity")}
    plan = Plan(
        schema=DICTIONARY_SCHEMA,
        model=describe_model(model),
        tokenizer=describe_tokenizer(model.tokenizer),
        corpus={**about, "name": _corpus_name(corpus, work), "revision": revision},
        places=places,
        sites=tuple((site.name, site.fingerprint) for site in searched),
        criteria=chosen,
        k=k,
        sample=sample,
        window=(int(window[0]), int(window[1])),
        skip_first=skip_first,
        target=_target_text(model, target) if relevance else None,
        rules=describe_rules(table) if relevance else None,
        attention=attention,
        through=tuple(map(str, units)),
        seed=seed,
    )
    with taking_turns(work / TURNS):
        if (work / PLAN).exists():
            plan.require_same(Plan.from_json(load_json(work / PLAN), work / PLAN), str(work))
        else:
            save_json(work / PLAN, plan.to_json())
    custom_target = target if isinstance(target, Target) and not isinstance(target, str) else None
    return Job(BlockPass(model, plan, searched, table, custom_target, units), tokenised, folder)


def _bos(model: TransformerBridge, prepend_bos: bool | None) -> int | None:
    wanted = bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos
    token = beginning(model.tokenizer)
    if prepend_bos and token is None:
        raise InputError("prepend_bos: this model's tokenizer has no beginning-of-sequence token")
    return token if wanted else None


def _target_text(model: TransformerBridge, target: Any) -> str:
    if isinstance(target, str):
        if target not in CORPUS_TARGETS:
            raise InputError(
                f"target is one of {', '.join(CORPUS_TARGETS)} or a lenslrp.targets object, "
                f"not {target!r}"
            )
        bidirectional = getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
        if bidirectional or labels_of(model) is not None:
            raise InputError(
                f"target={target!r} is the next token, and this model predicts none; give a "
                "lenslrp.targets object"
            )
        return target
    if not isinstance(target, Target):
        raise InputError(f"target must be a name or a lenslrp.targets object, not {target!r}")
    return repr(target)


def _corpus_name(corpus: Any, work: Path) -> str:
    if corpus is None:
        return str(load_json(work / PLAN)["corpus"]["name"])
    if isinstance(corpus, str | Path):
        return Path(corpus).name
    info = getattr(corpus, "info", None)
    return str(getattr(info, "dataset_name", None) or "from memory")


def _tokenised(corpus: Any, model: TransformerBridge, work: Path, cut: Cut) -> Corpus:
    """The corpus on disk: as it lies there if it is the same one, or cut anew beside it."""
    folder = work / "corpus"
    if corpus is None:
        return Corpus.open(folder)
    identity = describe_corpus(corpus, describe_tokenizer(model.tokenizer), cut)
    if not (folder / "corpus.json").exists():
        return tokenise(corpus, model.tokenizer, folder, cut, identity)
    old = Corpus.open(folder)
    if identity is not None and old.about.get("identity") == identity:
        return old
    again = work / "corpus.again"
    try:
        new = tokenise(corpus, model.tokenizer, again, cut, identity)
        if (new.about["digest"], new.cut) != (old.about["digest"], old.cut):
            raise StorageError(
                f"{work} holds another corpus ({old.documents} documents, "
                f"{old.about['tokens']} tokens in blocks of {old.cut.block}; given are "
                f"{new.documents} documents, {new.about['tokens']} tokens in blocks of "
                f"{new.cut.block}). Choose another path, or delete it"
            )
    finally:
        clear_corpus(again)
    return old
