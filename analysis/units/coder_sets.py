"""circuit-tracer's folders: a transcoder a layer, or one transcoder across layers.

``config.yaml`` says ``feature_input_hook`` and ``feature_output_hook`` inside each block, and lists
files under ``transcoders`` where they are not beside it. A transcoder a layer is
``layer_L.safetensors``. Across layers, ``W_enc_L.safetensors`` has ``W_enc_L`` [features, d_in] and
the biases, ``W_dec_L.safetensors`` has ``W_dec_L`` [features, layers from L on, d_out]; a file of
Gemma Scope 2 has ``w_dec`` [features, layers, d_out].
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lenslrp.analysis.units.coder_files import (
    checked,
    gemma_scope_2_tensors,
    hooks_of,
    local,
    require_positive,
    tensors_of,
    transcoder,
    yaml_of,
)
from lenslrp.analysis.units.saelens import Fields
from lenslrp.errors import InputError


def read_set(path: str | Path) -> list[Fields]:
    """See `SparseCoder.load_set`."""
    folder, files = _files(path, "transcoder_set", "layer_{}.safetensors")
    config = folder / "config.yaml"
    return [transcoder(file) | hooks_of(config, layer) for layer, file in enumerate(files)]


def read_cross_layer(path: str | Path) -> list[tuple[Fields, Tensor]]:
    """A layer each: what a `SparseCoder` to its own layer is, and ``W_dec`` to the later layers.

    Raises:
        InputError: as for `CrossLayerCoder.load`.
    """
    folder, files = _files(path, "cross_layer_transcoder", "W_enc_{}.safetensors")
    read = []
    for layer, file in enumerate(files):
        tensors = tensors_of(file)
        if "w_enc" in tensors:
            decoder = _decoder(file, tensors, "w_dec")[:, layer:]
            fields = gemma_scope_2_tensors(file, {**tensors, "w_dec": decoder[:, 0]})
        else:
            name = f"W_dec_{layer}"
            decoder = _decoder(file, tensors_of(file.with_name(f"{name}.safetensors")), name)
            named = {key.removesuffix(f"_{layer}"): tensor for key, tensor in tensors.items()}
            fields = checked(file, {**named, "W_dec": decoder[:, 0]}, "threshold")
            fields["W_enc"] = fields["W_enc"].T.contiguous()
        if decoder.shape[1] != len(files) - layer:
            raise InputError(
                f"{file} writes {decoder.shape[1]} layers; from layer {layer} of {len(files)} on "
                f"it is {len(files) - layer}"
            )
        require_positive(file, fields.get("threshold"))
        read.append((fields | hooks_of(folder / "config.yaml", layer), decoder[:, 1:]))
    return read


def _decoder(file: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    decoder = tensors.get(name)
    if decoder is None or decoder.ndim != 3:
        raise InputError(f"{file} has no {name} of [features, layers, d_out]")
    return decoder


def _files(path: str | Path, kind: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder, and the files of layers 0, 1, ... that its configuration lists or that lie in it.

    Raises:
        InputError: no configuration, one of another kind, or no files.
    """
    folder = local(path)
    config = yaml_of(folder / "config.yaml")
    if config.get("model_kind", kind) != kind:
        raise InputError(f"{folder / 'config.yaml'}: model_kind is {config['model_kind']!r}, "
                         f"expected {kind!r}")  # fmt: skip
    listed = config.get("transcoders") or []
    if any(not isinstance(one, str) for one in listed):
        raise InputError(f"{folder / 'config.yaml'}: transcoders is a list of files, a layer each")
    files = [local(one if "://" in one else folder / one) for one in listed]
    if not files:
        count = len(list(folder.glob(pattern.format("*"))))
        files = [folder / pattern.format(layer) for layer in range(count)]
    if not files:
        raise InputError(f"{folder} holds no {pattern.format('L')}, nor does config.yaml list any")
    return folder, files
