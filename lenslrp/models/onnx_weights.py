"""Models from ONNX files: weights read out of the graph and written under Hugging Face's names.

An exporter keeps the names of embeddings, norms and biases, but calls the matrices of linear
layers by number; the node that multiplies by a matrix still bears its module's path, so that is
where the name comes from. Files that onnxruntime quantised to 8 bits hold ``W_quantized``,
``W_scale`` and ``W_zero_point``, and W = (quantised - zero point) * scale.

Each converter writes a directory for ``from_pretrained`` and loads it once to see that nothing is
missing. ``tests/reference/check_onnx_models.py`` compares the results with onnxruntime.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from lenslrp.errors import LoadError
from lenslrp.files import whole
from lenslrp.quiet import quiet_transformers

Weights = dict[str, NDArray[np.float32]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_onnx(path: Path) -> Weights:
    """Every weight of an ONNX file in float32, by the path of its module.

    Matrices come as ``torch.nn.Linear`` keeps them, [out, in]. Initialisers that neither have a
    name nor are a matrix (``onnx::Reshape_7``) keep the one that they have.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights: Weights = {}
    for name, value in stored.items():
        base = name.removesuffix("_quantized")
        if base != name:
            centred = value.astype(np.float32) - stored[f"{base}_zero_point"].astype(np.float32)
            weights[base] = centred * stored[f"{base}_scale"]
        elif value.dtype == np.float32 and not name.endswith("_scale"):
            weights[name] = value
    for node in graph.node:
        matrix = node.input[1].removesuffix("_quantized") if len(node.input) > 1 else ""
        if node.op_type in ("MatMul", "MatMulInteger") and matrix in weights:
            module = node.name.strip("/").replace("/", ".").removesuffix("_quant")
            weights[f"{module.removesuffix('.MatMul')}.weight"] = weights.pop(matrix).T
    return weights


def convert_t5(files: list[Path], folder: Path) -> None:
    """Flan-T5-small from ``encoder.onnx``, ``decoder.onnx`` and ``tokenizer.json``, in float16.

    Flan-T5's ``lm_head`` is a matrix of its own, which transformers 5 keeps untied when it finds
    both in a file. The file's tokenizer cuts after 48 tokens, which was right for its first use
    only, so that is dropped.

    Raises:
        LoadError: a weight is missing.
    """
    encoder, decoder, tokenizer = files
    weights = {
        "shared.weight" if name == "m.shared.weight" else name.removeprefix("m."): value
        for name, value in read_onnx(decoder).items()
    }
    # the encoder's embeddings are the shared ones
    weights |= {
        re.sub("^enc", "encoder", name): value
        for name, value in read_onnx(encoder).items()
        if name != "enc.embed_tokens.weight"
    }
    config = T5Config.from_dict(
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,  # so the decoder's output is not scaled
            "decoder_start_token_id": 0,
        }
    )
    description = json.loads(tokenizer.read_text(encoding="utf-8"))
    description["truncation"] = description["padding"] = None
    cleaned = folder / "tokenizer.json"
    cleaned.write_text(json.dumps(description), encoding="utf-8")
    PreTrainedTokenizerFast(
        tokenizer_file=str(cleaned),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
    ).save_pretrained(folder)
    _write(T5ForConditionalGeneration, config, weights, folder, torch.float16)


# ONNX names after "backbone." -> those of ViT checkpoints
_VIT_NAMES = {
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
# LayerScale multiplies what these give, so it can be part of them
_LAYER_SCALES = {
    "layer_scale1.lambda1": "attention.output.dense",
    "layer_scale2.lambda1": "mlp.fc2",
}


def convert_vit(files: list[Path], folder: Path) -> None:
    """A DINOv2-shaped ViT-S/14 backbone as an exactly equal ``ViTModel``, in float32.

    DINOv2 is a ViT with LayerScale, a factor per feature after attention and after the MLP: folded
    into the linear layers before it. Its positions are for 37 x 37 patches and are interpolated
    once, as the graph does at each run, to the 16 x 16 of an image of 224 pixels.

    Raises:
        LoadError: a weight is missing.
    """
    stored = read_onnx(files[0])
    inside = {
        name.removeprefix("backbone."): value
        for name, value in stored.items()
        if name.startswith("backbone.")
    }
    for name in [name for name in inside if "layer_scale" in name]:
        scale = inside.pop(name)
        layer, kind = re.match(r"(encoder\.layer\.\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        for part in (f"{layer}.{_LAYER_SCALES[kind]}.{end}" for end in ("weight", "bias")):
            inside[part] = (inside[part].T * scale).T
    weights: Weights = {}
    for name, value in inside.items():
        for pattern, replacement in _VIT_NAMES.items():
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    weights["embeddings.position_embeddings"] = _positions(
        stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]
    )
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        patch_size=14,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 224, "width": 224},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(preprocessing, indent=1), encoding="utf-8")
    _write(ViTModel, config, weights, folder, torch.float32, add_pooling_layer=False)


def _positions(class_token: NDArray[np.float32], patches: NDArray[np.float32]) -> NDArray[Any]:
    """Learned positions [1, 1 + 37 * 37, d_model] -> [1, 1 + 16 * 16, d_model]."""
    width = patches.shape[-1]
    grid = torch.from_numpy(patches.copy()).reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(
        grid, size=(16, 16), mode="bicubic", align_corners=False
    )
    return np.concatenate([class_token, small.flatten(2).transpose(1, 2).numpy()], axis=1)


def _write(
    cls: type[PreTrainedModel],
    config: Any,
    weights: Weights,
    folder: Path,
    dtype: torch.dtype,
    **arguments: Any,
) -> None:
    """Write weights and configuration, and load them once.

    Raises:
        LoadError: the model needs what the weights do not have, or the other way round.
    """
    tensors = {
        name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")).to(dtype)
        for name, value in weights.items()
    }
    with whole(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    config.architectures = [cls.__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    with quiet_transformers():
        loaded: Any = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **arguments
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in loaded[1].items() if names}
    if wrong:
        raise LoadError(f"the weights do not make a {cls.__name__}: {wrong}")
