"""LXT's AttnLRP and ours on SmolLM2: the same relevance, the same area between the curves?

    python -m benchmarks.faithfulness.lxt_areas compare --lxt ../lxt-env/bin/python  # ours

LXT (the reference implementation by AttnLRP's authors) runs in an environment of its own, made as
CONTRIBUTING.md says. `compare` draws the examples that `lenslrp evaluate next_word --seed 0` draws,
writes them to a file, starts `explain` with LXT's Python, reads its relevance back, and measures
the area of both (Achtibat et al. 2024, section 4.1: zeroed embeddings, eight steps). Relevance is
in float32 on both sides; perturbed passes are in `--dtype`, the same for both.

`explain` imports nothing of LensLRP: it takes the patched module from
`tests/reference/make_lxt_references.py`, the script behind the parity tests; relevance is input x
gradient, as there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "reference" / "results" / "lxt.json"
MODEL = "smollm2-135m"
STEPS = 8
BATCH = 10


def explain(options: argparse.Namespace) -> None:
    """In LXT's environment: token relevance [example, pos] and the target's value [example]."""
    sys.path.insert(0, str(ROOT / "tests" / "reference"))
    from make_lxt_references import FAMILIES, import_torchvision, patch

    torch.set_num_threads(1)
    request = json.loads(options.asked.read_text(encoding="utf-8"))
    import_torchvision()
    modeling = patch(FAMILIES["llama"])
    from transformers import LlamaConfig

    config_json = json.loads((Path(request["model"]) / "config.json").read_text(encoding="utf-8"))
    rope = config_json.pop("rope_parameters")  # the newer transformers' name
    if rope["rope_type"] != "default":
        raise SystemExit(f"rope_type is {rope['rope_type']}, which this script does not translate")
    config = LlamaConfig(**config_json, rope_theta=rope["rope_theta"])
    model = modeling.LlamaForCausalLM.from_pretrained(
        request["model"], config=config, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.requires_grad_(False)
    tokens, values = [], []
    targets = torch.tensor(request["targets"])
    for ids, wanted in zip(
        torch.tensor(request["ids"]).split(BATCH), targets.split(BATCH), strict=True
    ):
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        if not torch.equal(logits.argmax(dim=1), wanted):
            raise SystemExit("LXT's model and ours do not agree on the next token")
        value = logits.gather(1, wanted[:, None])[:, 0]
        value.sum().backward()
        tokens.append((inputs * inputs.grad).sum(-1).detach())
        values.append(value.detach())
    save_file({"tokens": torch.cat(tokens), "values": torch.cat(values)}, options.answer)


def lxt_relevance(python: Path, prompts: list[Any]) -> tuple[Any, Any]:
    """LXT's token relevance [example, pos] and target values [example], from its own process."""
    from lenslrp.models.embedded import ensure_cached

    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "asked.json", Path(folder) / "answer.safetensors"
        what = {
            "model": str(ensure_cached(MODEL)),
            "ids": [prompt.tokens.tolist() for prompt in prompts],
            "targets": [int(prompt.target.token) for prompt in prompts],
        }
        request.write_text(json.dumps(what), encoding="utf-8")
        # LXT's Python must not see our packages
        command = [str(python), "-I", __file__, "explain", str(request), str(answer)]
        subprocess.run(command, check=True)
        tensors = load_file(answer)
    return tensors["tokens"].double().numpy(), tensors["values"].double().numpy()


def compare(options: argparse.Namespace) -> None:
    """In our environment: everything else."""
    import lenslrp
    from benchmarks.faithfulness.examples import examples, keep, relevance, spread
    from lenslrp.analysis.common.statistics import spearman
    from lenslrp.analysis.evaluation.faithfulness import curves
    from lenslrp.analysis.evaluation.features import token_values, tokens_of

    torch.set_num_threads(1)
    model = lenslrp.load(MODEL, dtype=torch.float32, device="cpu")
    drawn = examples("next_word", model, options.n, data=options.data, seed=options.seed)
    prompts = [example.prompt for example in drawn]
    theirs, their_values = lxt_relevance(options.lxt, prompts)
    ours = np.stack(relevance("attnlrp", model, prompts))
    nothing = [np.zeros((1, prompt.length), dtype=bool) for prompt in prompts]
    values = np.concatenate([each.value for each in token_values(model, prompts, nothing)])
    apart = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
    ranks = [spearman(a, b) for a, b in zip(ours, theirs, strict=True)]
    orders = (np.argsort(-ours, axis=1) == np.argsort(-theirs, axis=1)).all(axis=1)
    model = lenslrp.load(MODEL, dtype=getattr(torch, options.dtype), device="cpu")
    areas: dict[str, list[float]] = {"LensLRP": [], "LXT": []}
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        features = tokens_of(model, prompt)
        by_name = curves(features, {"LensLRP": one, "LXT": other}, steps=STEPS)
        for name, curve in by_name.items():
            areas[name].append(curve.area)
    lead = np.subtract(areas["LensLRP"], areas["LXT"])
    rows = [{"implementation": name, **spread(area, options.seed)} for name, area in areas.items()]
    rows.append({"implementation": "LensLRP less LXT", **spread(lead, options.seed)})
    command = f"lxt_areas compare --lxt ../lxt-env/bin/python --n {options.n}"
    keep(
        options.results,
        "areas",
        rows,
        command,
        model=MODEL,
        task="next_word",
        n=len(prompts),
        tokens=prompts[0].length,
        baseline="zero",
        steps=STEPS,
        seed=options.seed,
        perturbed_in=options.dtype,
    )
    agreement = {
        "largest relative difference of relevance": float(apart.max()),
        "median": float(np.median(apart)),
        "largest relative difference of the target's value": float(
            np.abs(values / their_values - 1).max()
        ),
        "smallest rank correlation": float(min(ranks)),
        "prompts with the same order of tokens": int(orders.sum()),
        "prompts with the same area": int((lead == 0).sum()),
        "largest difference of area": float(np.abs(lead).max()),
    }
    rows = [{"measure": name, "value": value} for name, value in agreement.items()]
    keep(options.results, "agreement", rows, command, n=len(prompts), dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    ours = commands.add_parser("compare", help="measure, in our environment")
    ours.set_defaults(run=compare)
    ours.add_argument("--lxt", type=Path, required=True, help="Python of LXT's environment")
    data = ROOT.parent / "shared" / "data" / "wikipedia_paragraphs.jsonl"
    ours.add_argument("--data", type=Path, default=data, help="texts, as next_word reads them")
    ours.add_argument("--n", type=int, default=40, help="examples")
    ours.add_argument("--seed", type=int, default=0)
    ours.add_argument("--dtype", default="bfloat16", help="of the perturbed passes")
    ours.add_argument("--results", type=Path, default=RESULTS)
    theirs = commands.add_parser("explain", help="called by compare, in LXT's environment")
    theirs.set_defaults(run=explain)
    theirs.add_argument("asked", type=Path)
    theirs.add_argument("answer", type=Path)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
