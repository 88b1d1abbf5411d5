"""Make the stored references that `tests/conformance/analysis/test_coder_layouts.py` compares with.

Tiny random sparse coders of every architecture that SAELens constructs, of circuit-tracer's
transcoders, of sparsify and of Gemma Scope's files, as these tools write them, with what the tools
encode and write for random input. They are not installed beside TransformerLens 4, so this script
runs in an environment of its own, stands alone, and its results are committed:

    python -m venv coder-env
    coder-env/bin/pip install sae-lens==6.54.12 schedulefree natsort
    coder-env/bin/pip install --no-deps circuit-tracer==0.5.0 eai-sparsify==1.3.3
    export SPARSIFY_DISABLE_TRITON=1
    coder-env/bin/python tests/reference/make_coder_references.py            # write
    coder-env/bin/python tests/reference/make_coder_references.py --check    # compare

Written, for all cases together and in float32:

* `sparse_coders.safetensors`: `<case>/<file>/<tensor>` for every tensor of every file of a case's
  folder, `<case>/x` [batch, pos, ...], `<case>/activations` and `<case>/written`; of several
  layers, with `layer` as the first axis.
* `sparse_coders.json`: by case, the folder's other files as text, and by tool, its version.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
    load_relu_transcoder,
)
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
NEEDED = {"sae-lens": "6.54.12", "circuit-tracer": "0.5.0", "eai-sparsify": "1.3.3"}
D_IN, D_OUT, FEATURES, LAYERS = 8, 6, 12, 3
NORM_SCALING_FACTOR = 0.4

Reference = dict[str, Tensor]  # x, activations, written
Case = Callable[[Path], Reference]


def randomise(module: nn.Module) -> nn.Module:
    """Draw every parameter anew: thresholds between 0 and 1, decoder rows of unequal length."""
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter.float())
        value = 0.6 * noise
        if "threshold" in name:
            value = torch.rand_like(noise)
        elif name == "r_mag":
            value = 0.3 * noise
        parameter.data = value.to(parameter.dtype)
    return module


def inputs(*shape: int) -> Tensor:
    return 2 * torch.randn(shape) + 0.5


def of_sae(sae: Any, x: Tensor) -> Reference:
    with torch.no_grad():
        activations = sae.encode(x)
        return {
            "x": x,
            "activations": activations,
            "written": sae(x).reshape(x.shape[0], x.shape[1], -1),
        }


def metadata(**more: Any) -> Any:
    facts = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny", "prepend_bos": True}
    return sae_lens.saes.sae.SAEMetadata(**{**facts, **more})


def inference(sae_class: Any, config_class: Any, x: Tensor | None = None, **options: Any) -> Case:
    """A coder of SAELens' inference classes, saved by it."""

    def make(folder: Path) -> Reference:
        given = {"d_in": D_IN, "d_sae": FEATURES, "metadata": metadata(), **options}
        sae = randomise(sae_class(config_class(**given)))
        sae.save_model(folder)
        sae = sae_lens.SAE.load_from_disk(folder)  # as its users have it
        heads = options.get("reshape_activations") == "hook_z"
        return of_sae(sae, inputs(2, 3, 2, 4) if heads else inputs(2, 3, D_IN))

    return make


def transcoder(sae_class: Any, config_class: Any, **options: Any) -> Case:
    told = metadata(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out")
    return inference(
        sae_class, config_class, d_out=D_OUT, apply_b_dec_to_input=False, metadata=told, **options
    )


def trained(sae_class: Any, config_class: Any, finished: bool, **options: Any) -> Case:
    """A coder of SAELens' training classes: a checkpoint, or what is published at the end."""

    def make(folder: Path) -> Reference:
        config = config_class(d_in=D_IN, d_sae=FEATURES, metadata=metadata(), k=4.0, **options)
        sae = randomise(sae_class(config))
        sae.topk_threshold = torch.tensor(0.8, dtype=torch.double)
        with tempfile.TemporaryDirectory() as scratch:
            sae.save_inference_model(scratch)
            published = sae_lens.SAE.load_from_disk(scratch)
        (sae.save_inference_model if finished else sae.save_model)(folder)
        return of_sae(published, inputs(2, 3, D_IN))

    return make


def unscaled(folder: Path) -> Reference:
    """Weights that expect activations times a factor, which SAELens folds as it loads."""
    config = sae_lens.JumpReLUSAEConfig(
        d_in=D_IN, d_sae=FEATURES, normalize_activations="expected_average_only_in",
        metadata=metadata(),
    )  # fmt: skip
    randomise(sae_lens.JumpReLUSAE(config)).save_model(folder)
    sae = sae_lens.SAE.load_from_disk(folder)
    sae.fold_activation_norm_scaling_factor(NORM_SCALING_FACTOR)
    return of_sae(sae, inputs(2, 3, D_IN))


def before_6(**changes: Any) -> Case:
    """A folder as versions 1 to 5 wrote it."""

    def make(folder: Path) -> Reference:
        folder.mkdir()
        weights = {
            "W_enc": torch.randn(D_IN, FEATURES), "W_dec": torch.randn(FEATURES, D_IN),
            "b_enc": torch.randn(FEATURES), "b_dec": torch.randn(D_IN),
            "scaling_factor": torch.ones(FEATURES),
        }  # fmt: skip
        save_file(weights, folder / "sae_weights.safetensors")
        cfg = {
            "model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre",
            "hook_point_layer": 1, "hook_point_head_index": None, "d_in": D_IN, "d_sae": FEATURES,
            "dtype": "torch.float32", "device": "cpu", "l1_coefficient": 8e-5, "lr": 4e-4,
            "normalize_activations": False, "activation_fn_str": "relu", "prepend_bos": True,
            **changes,
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(cfg))
        heads = "hook_z" in cfg["hook_point"]
        shape = (2, 3, 2, 4) if heads else (2, 3, D_IN)
        return of_sae(sae_lens.SAE.load_from_disk(folder), inputs(*shape))

    return make


def layers(coders: list[Any], x: Tensor) -> Reference:
    with torch.no_grad():
        activations = torch.stack([c.encode(x[i]) for i, c in enumerate(coders)])
        written = torch.stack([c.decode(activations[i], x[i]) for i, c in enumerate(coders)])
    return {"x": x, "activations": activations, "written": written}


def config_of(folder: Path, kind: str, **more: Any) -> None:
    config = {
        "model_name": "tiny", "model_kind": kind, "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", **more,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML


def per_layer(jump: bool) -> Case:
    """circuit-tracer's set, written and read back by it."""

    def make(folder: Path) -> Reference:
        made = {}
        for layer in range(LAYERS):
            function = JumpReLU(torch.zeros(FEATURES), 0.1) if jump else nn.functional.relu
            made[layer] = randomise(
                SingleLayerTranscoder(
                    D_IN, FEATURES, function, layer, skip_connection=not jump, dtype=torch.float32
                )
            )
        TranscoderSet(made, "mlp.hook_in", "hook_mlp_out").to_safetensors(str(folder))
        config_of(folder, "transcoder_set", scan="tiny")
        files = [str(folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)]
        read = [load_relu_transcoder(file, i, torch.device("cpu")) for i, file in enumerate(files)]
        return layers(read, inputs(LAYERS, 5, D_IN))

    return make


def across_layers(activation_function: str) -> Case:
    def make(folder: Path) -> Reference:
        made = randomise(
            CrossLayerTranscoder(
                LAYERS, FEATURES, D_IN, activation_function, lazy_decoder=False,
                dtype=torch.float32,
            )
        )  # fmt: skip
        made.to_safetensors(str(folder))
        config_of(folder, "cross_layer_transcoder", scan="tiny")
        read = load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32)
        x = inputs(LAYERS, 5, D_IN)
        with torch.no_grad():
            activations = read.encode(x)
            return {"x": x, "activations": activations, "written": read.decode(activations)}

    return make


def gemma_scope(folder: Path) -> Reference:
    weights = {
        "W_enc": torch.randn(D_IN, FEATURES), "W_dec": torch.randn(FEATURES, D_IN),
        "b_enc": torch.randn(FEATURES), "b_dec": torch.randn(D_IN),
        "threshold": torch.rand(FEATURES),
    }  # fmt: skip
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    read = load_gemma_scope_transcoder(str(folder / "params.npz"), 0, torch.device("cpu"))
    x = inputs(5, D_IN)
    with torch.no_grad():
        return {"x": x, "activations": read.encode(x), "written": read(x)}


def gemma_scope_2(folder: Path) -> Reference:
    weights = {
        "w_enc": torch.randn(D_IN, FEATURES), "w_dec": torch.randn(FEATURES, D_IN),
        "b_enc": torch.randn(FEATURES), "b_dec": torch.randn(D_IN),
        "threshold": torch.rand(FEATURES), "affine_skip_connection": torch.randn(D_IN, D_IN),
    }  # fmt: skip
    save_file(weights, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
        "width": FEATURES, "model_name": "gemma-v3-1b-pt", "architecture": "jump_relu", "l0": 4,
        "affine_connection": True, "type": "transcoder",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    read = load_gemma_scope_2_transcoder(
        str(folder / "params.safetensors"), 4, torch.device("cpu"), torch.float32
    )
    x = inputs(5, D_IN)
    with torch.no_grad():
        return {"x": x, "activations": read.encode(x), "written": read(x)}


def sparsify(transcode: bool) -> Case:
    def make(folder: Path) -> Reference:
        config = SparseCoderConfig(
            num_latents=FEATURES, k=3, transcode=transcode, skip_connection=transcode
        )
        randomise(SparseCoder(D_IN, config)).save_to_disk(folder)
        read = SparseCoder.load_from_disk(folder)
        x = inputs(5, D_IN)
        with torch.no_grad():
            best = read.encode(x)
            activations = torch.zeros(5, FEATURES).scatter(-1, best.top_indices, best.top_acts)
            return {"x": x, "activations": activations, "written": read(x).sae_out}

    return make


STANDARD = (sae_lens.StandardSAE, sae_lens.StandardSAEConfig)
TOPK = (sae_lens.TopKSAE, sae_lens.TopKSAEConfig)
BATCHTOPK = (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig)
MATRYOSHKA = (
    sae_lens.MatryoshkaBatchTopKTrainingSAE,
    sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
)
CASES: dict[str, Case] = {
    "standard": inference(*STANDARD),
    "standard without b_dec": inference(*STANDARD, apply_b_dec_to_input=False),
    "standard constant_norm_rescale": inference(
        *STANDARD, normalize_activations="constant_norm_rescale"
    ),
    "standard layer_norm": inference(*STANDARD, normalize_activations="layer_norm"),
    "standard hook_z": inference(
        *STANDARD, reshape_activations="hook_z", metadata=metadata(hook_name="blocks.1.attn.hook_z")
    ),
    "gated": inference(sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    "jumprelu": inference(sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    "jumprelu expected_average_only_in": unscaled,
    "topk": inference(*TOPK, k=3),
    "topk rescaled": inference(*TOPK, k=3, rescale_acts_by_decoder_norm=True),
    "batchtopk": trained(*BATCHTOPK, True),
    "batchtopk checkpoint": trained(*BATCHTOPK, False),
    "matryoshka": trained(*MATRYOSHKA, True, matryoshka_widths=[4, FEATURES]),
    "matryoshka checkpoint": trained(*MATRYOSHKA, False, matryoshka_widths=[4, FEATURES]),
    "transcoder": transcoder(sae_lens.Transcoder, sae_lens.TranscoderConfig),
    "transcoder layer_norm": transcoder(
        sae_lens.Transcoder, sae_lens.TranscoderConfig, normalize_activations="layer_norm"
    ),
    "skip_transcoder": transcoder(sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig),
    "jumprelu_transcoder": transcoder(
        sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig
    ),
    "jumprelu_skip_transcoder": transcoder(
        sae_lens.JumpReLUSkipTranscoder, sae_lens.JumpReLUSkipTranscoderConfig
    ),
    "before 6": before_6(),
    "before 6 topk": before_6(activation_fn_str="topk", activation_fn_kwargs={"k": 3}),
    "before 6 hook_z": before_6(hook_point="blocks.1.attn.hook_z"),
    "circuit-tracer skip": per_layer(jump=False),
    "circuit-tracer jumprelu": per_layer(jump=True),
    "circuit-tracer across layers": across_layers("relu"),
    "circuit-tracer across layers jumprelu": across_layers("jump_relu"),
    "sparsify": sparsify(transcode=False),
    "sparsify transcoder": sparsify(transcode=True),
    "gemma scope": gemma_scope,
    "gemma scope 2": gemma_scope_2,
}


def make() -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    tensors: dict[str, Tensor] = {}
    texts: dict[str, dict[str, str]] = {}
    for number, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(number)
        texts[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / ("case" if name.startswith("before") else "")
            for what, tensor in case(folder).items():
                tensors[f"{name}/{what}"] = tensor.detach().clone().contiguous()
            for file in sorted(folder.iterdir()):
                if file.suffix == ".safetensors":
                    held = load_file(file)
                elif file.suffix == ".npz":
                    held = {k: torch.from_numpy(v) for k, v in np.load(file).items()}
                else:
                    texts[name][file.name] = file.read_text(encoding="utf-8")
                    continue
                tensors |= {f"{name}/{file.name}/{key}": value for key, value in held.items()}
    return tensors, texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored files")
    options = parser.parse_args()
    found = {package: version(package) for package in NEEDED}
    if found != NEEDED:
        raise SystemExit(f"these references need {NEEDED}, found {found}")
    tensors, texts = make()
    path = HERE / "sparse_coders.safetensors"
    if options.check:
        stored = load_file(path)
        same = stored.keys() == tensors.keys()
        worst = max(float((stored[k] - v).abs().max()) for k, v in tensors.items()) if same else 1.0
        print(f"largest difference {worst:.1e}")
        return int(not same or worst > 1e-5)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    text = json.dumps({"made_with": NEEDED, "files": texts}, indent=1) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"{len(CASES)} cases, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
