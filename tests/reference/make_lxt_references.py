"""Make the stored LXT references that `tests/conformance/hooks/test_lxt_parity.py` compares with.

For a tiny random model of each family, LXT 2.1 (its AttnLRP map, `lxt.efficient`) computes the
relevance of the input tokens for the top logit of the last position: input x gradient, with the
AttnLRP rules (Achtibat et al., ICML 2024) inside the gradient. LXT 2.1 does not import under the
transformers that TransformerLens 4.3 needs, so this script runs in an environment of its own,
stands alone (it imports nothing of LensLRP), and its results are committed:

    python -m venv lxt-env
    lxt-env/bin/pip install torch==2.13.0 transformers==4.52.4 lxt==2.1
    lxt-env/bin/python tests/reference/make_lxt_references.py            # all families
    lxt-env/bin/python tests/reference/make_lxt_references.py --check    # compare, write nothing

LXT replaces classes and functions of whole modules and cannot undo it; hence one process a family,
patched before its model exists. A torchvision whose compiled operators do not load (the CUDA build
of the index beside a CPU torch) does not matter: see `import_torchvision`.

Written for each family, all in float32:

* `lxt_<family>.safetensors`: `weights.<name>` for every entry of the state dict,
  `input_ids` [pos], `target_id` [1], `logits` [pos, vocab], `inputs` [pos, d_model] (input x
  gradient at the token embeddings, in logits) and `tokens` [pos] (`inputs` summed over features).
  Learned positions (GPT-2) are not part of either.
* `lxt_<family>.json`: model class, configuration class and its keywords under transformers 5.23
  (`config`), what differed under 4.52 (`config_4_52`), and the versions that made the file.
"""

import argparse
import importlib
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
SEED = 20240717
N_TOKENS = 9
NEEDED = {"torch": "2.13.0", "transformers": "4.52.4", "lxt": "2.1"}
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


@dataclass(frozen=True)
class Family:
    """A model to make: class names, shared configuration, and the keys that changed with 5.x."""

    module: str
    model: str
    config: str
    shared: dict[str, Any]
    keys_4_52: dict[str, Any] = field(default_factory=dict)
    keys_5: dict[str, Any] = field(default_factory=dict)
    norm_centre: float = 1.0


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_DECODER = {
    "vocab_size": 79,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The rope bases are far from every default, so a key that is not understood shows in the logits.
FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": False},
        {"rope_theta": 300.0},
        {"rope_parameters": _rope(300.0)},
    ),
    "qwen2": Family(  # biases on q, k, v
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_DECODER, "vocab_size": 83, "tie_word_embeddings": False, "use_sliding_window": False},
        {"rope_theta": 400.0, "sliding_window": None},
        {"rope_parameters": _rope(400.0)},
    ),
    "qwen3": Family(  # norms on q and k; heads wider than d_model / n_heads
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            **_DECODER,
            "vocab_size": 89,
            "head_dim": 12,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        {"rope_theta": 500.0, "sliding_window": None},
        {"rope_parameters": _rope(500.0)},
    ),
    "gemma3": Family(  # layers: sliding, full, sliding; the window is shorter than the prompt
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_DECODER,
            "vocab_size": 97,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
        {"rope_theta": 600.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2},
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": _rope(600.0), "sliding_attention": _rope(50.0)},
        },
        norm_centre=0.0,  # Gemma's norms multiply by 1 + weight
    ),
    "gpt2": Family(  # biases everywhere, tied embeddings
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 71,
            "n_embd": 36,
            "n_layer": 3,
            "n_head": 3,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def import_torchvision() -> None:
    """Import torchvision, which transformers and LXT import for models that are not made here.

    Where its operators stay unloaded, the import stops at the first one that it wants to describe;
    declaring their names is enough, since none is ever called.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def patch(family: Family) -> Any:
    """Apply LXT's AttnLRP map to the family's module; return the module. Any LXT warning raises."""
    name = f"transformers.models.{family.module}.modeling_{family.module}"
    modeling = importlib.import_module(name)
    maps = importlib.import_module(f"lxt.efficient.models.{family.module}")
    monkey_patch = importlib.import_module("lxt.efficient").monkey_patch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkey_patch(modeling, maps.attnLRP)
    return modeling


def randomise(model: nn.Module, norm_centre: float, generator: torch.Generator) -> None:
    """Draw every parameter anew: norm weights and biases too, and matrices large enough that
    attention is uneven and activations are far from linear."""
    output = model.get_output_embeddings()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or (module is output and model.config.tie_word_embeddings):
            continue
        for name, parameter in own.items():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "bias":
                value = 0.3 * noise
            elif isinstance(module, nn.Embedding):
                value = 0.5 / float(getattr(module, "embed_scale", 1.0)) * noise
            elif parameter.ndim == 2:
                fan_in = parameter.shape[1 if isinstance(module, nn.Linear) else 0]
                value = 1.4 * fan_in**-0.5 * noise
            else:
                value = norm_centre + 0.3 * noise
            with torch.no_grad():
                parameter.copy_(value)


def explain(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [pos, vocab], target id [1] and input x gradient [pos, d_model] for one prompt."""
    inputs = model.get_input_embeddings()(input_ids[None]).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
    target = logits[-1].argmax()
    logits[-1, target].backward()
    return logits.detach(), target[None], (inputs * inputs.grad)[0].detach()


def make(name: str, attention: str = "eager") -> dict[str, Tensor]:
    """All tensors of the reference of family `name`, patching this process on the way."""
    family = FAMILIES[name]
    modeling = patch(family)
    configs = importlib.import_module(f"transformers.models.{family.module}")
    config = getattr(configs, family.config)(**family.shared, **family.keys_4_52)
    config._attn_implementation = attention
    generator = torch.Generator().manual_seed(SEED)
    model = getattr(modeling, family.model)(config).eval()
    randomise(model, family.norm_centre, generator)
    model.requires_grad_(False)
    input_ids = torch.randint(3, config.vocab_size, (N_TOKENS,), generator=generator)
    logits, target, inputs = explain(model, input_ids)
    weights = {f"weights.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    return {
        **weights,
        "input_ids": input_ids,
        "target_id": target,
        "logits": logits,
        "inputs": inputs,
        "tokens": inputs.sum(-1),
    }


def write(name: str, tensors: dict[str, Tensor]) -> None:
    """Write the two files of family `name` beside this script."""
    family = FAMILIES[name]
    description = {
        "family": name,
        "model_class": family.model,
        "config_class": family.config,
        "config": {**family.shared, **family.keys_5},
        "config_4_52": family.keys_4_52,
        "seed": SEED,
        "made_with": NEEDED,
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / f"lxt_{name}.safetensors")
    text = json.dumps(description, indent=2) + "\n"
    (HERE / f"lxt_{name}.json").write_text(text, encoding="utf-8")


def compare(name: str, tensors: dict[str, Tensor]) -> float:
    """Largest difference from the stored file, relative to each tensor's largest entry."""
    stored = load_file(HERE / f"lxt_{name}.safetensors")
    if stored.keys() != tensors.keys():
        raise SystemExit(f"{name}: stored and made tensors differ in name")
    return max(
        float((stored[k].double() - v.double()).abs().max() / v.double().abs().max())
        for k, v in tensors.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, help="only this one, in this process")
    parser.add_argument("--check", action="store_true", help="compare with the stored files")
    options = parser.parse_args()
    found = {package: version(package).split("+")[0] for package in NEEDED}
    if found != NEEDED:
        raise SystemExit(f"these references need {NEEDED}, found {found}")
    if options.family is None:
        flags = ["--check"] if options.check else []
        for name in FAMILIES:
            subprocess.run([sys.executable, __file__, "--family", name, *flags], check=True)
        return 0
    torch.set_num_threads(1)
    import_torchvision()
    tensors = make(options.family)
    if options.check:
        difference = compare(options.family, tensors)
        print(f"{options.family}: largest relative difference {difference:.1e}")
        return int(difference > 1e-5)
    write(options.family, tensors)
    total = float(tensors["tokens"].sum())
    print(f"{options.family}: target {int(tensors['target_id'])}, sum of relevance {total:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
