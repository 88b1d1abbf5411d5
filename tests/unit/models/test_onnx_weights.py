"""Weights read out of ONNX graphs: names, orientation, 8 bits, LayerScale, and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lenslrp.errors import LoadError
from lenslrp.models.onnx_weights import _positions, convert_vit, read_onnx

onnx = pytest.importorskip("onnx", reason='needs the onnx package: pip install "lenslrp[demo]"')


def write_graph(path: Path, stored: dict[str, np.ndarray], nodes: list[object]) -> Path:
    values = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in stored.items()]
    graph = onnx.helper.make_graph(nodes, "tiny", [], [], initializer=values)
    onnx.save(onnx.helper.make_model(graph), str(path))
    return path


def multiply(module: str, matrix: str, op: str = "MatMul") -> object:
    name = f"/{module.replace('.', '/')}/MatMul" + ("_quant" if op == "MatMulInteger" else "")
    return onnx.helper.make_node(op, ["x", matrix], ["y"], name=name)


def test_a_matrix_is_named_by_the_node_that_multiplies_by_it(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"onnx::MatMul_7": matrix, "block.norm.weight": np.ones(2, np.float32)}
    found = read_onnx(write_graph(tmp_path / "a", stored, [multiply("block.q", "onnx::MatMul_7")]))
    assert sorted(found) == ["block.norm.weight", "block.q.weight"]
    np.testing.assert_array_equal(found["block.q.weight"], matrix.T)


def test_eight_bits_are_dequantised(tmp_path: Path) -> None:
    stored = {
        "onnx::MatMul_7_quantized": np.array([[-128, 127, 3]], np.int8),
        "onnx::MatMul_7_scale": np.float32(0.5),
        "onnx::MatMul_7_zero_point": np.int8(3),
        "embed.weight_quantized": np.array([[0, 255]], np.uint8),
        "embed.weight_scale": np.float32(2),
        "embed.weight_zero_point": np.uint8(138),
    }
    nodes = [multiply("block.q", "onnx::MatMul_7_quantized", "MatMulInteger")]
    found = read_onnx(write_graph(tmp_path / "a", stored, nodes))
    assert sorted(found) == ["block.q.weight", "embed.weight"]
    assert found["block.q.weight"].tolist() == [[-65.5], [62.0], [0.0]]
    assert found["embed.weight"].tolist() == [[-276.0, 234.0]]


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    stored = {
        "backbone.layernorm.weight": np.ones(384, np.float32),
        "onnx::Concat_1957": np.zeros((1, 1, 384), np.float32),
        "onnx::Reshape_1962": np.zeros((1, 37 * 37, 384), np.float32),
    }
    path = write_graph(tmp_path / "a", stored, [])
    (tmp_path / "out").mkdir()
    with pytest.raises(LoadError, match=r"do not make a ViTModel.*missing.*embeddings\.cls_token"):
        convert_vit([path], tmp_path / "out")


def test_layer_scale_is_folded_into_the_layer_before_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prefix = "backbone.encoder.layer.0"
    stored = {
        f"{prefix}.layer_scale1.lambda1": rng.normal(size=384).astype(np.float32),
        f"{prefix}.attention.output.dense.bias": rng.normal(size=384).astype(np.float32),
        "onnx::MatMul_1": rng.normal(size=(384, 384)).astype(np.float32),
        "onnx::Concat_1957": np.zeros((1, 1, 384), np.float32),
        "onnx::Reshape_1962": np.zeros((1, 37 * 37, 384), np.float32),
    }
    nodes = [multiply(f"{prefix}.attention.output.dense", "onnx::MatMul_1")]
    path = write_graph(tmp_path / "a", stored, nodes)
    (tmp_path / "out").mkdir()
    with pytest.raises(LoadError, match="do not make a ViTModel"):  # the rest is not there
        convert_vit([path], tmp_path / "out")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out" / "model.safetensors")
    x = torch.from_numpy(rng.normal(size=(5, 384)).astype(np.float32))
    dense = "encoder.layer.0.attention.output.dense"
    folded = x @ written[f"{dense}.weight"].T + written[f"{dense}.bias"]
    plain = x.numpy() @ stored["onnx::MatMul_1"] + stored[f"{prefix}.attention.output.dense.bias"]
    scaled = plain * stored[f"{prefix}.layer_scale1.lambda1"]
    np.testing.assert_allclose(folded.numpy(), scaled, rtol=1e-4, atol=1e-4)


def test_positions_keep_the_class_token_and_the_corners_order() -> None:
    patches = np.zeros((1, 37, 37, 2), np.float32)
    patches[..., 0] = np.arange(37)[:, None]  # rows
    patches[..., 1] = np.arange(37)[None]  # columns
    small = _positions(np.full((1, 1, 2), 99, np.float32), patches.reshape(1, 37 * 37, 2))
    assert small.shape == (1, 1 + 16 * 16, 2)
    assert small[0, 0].tolist() == [99, 99]
    grid = small[0, 1:].reshape(16, 16, 2)
    assert (np.diff(grid[:, 3, 0]) > 0).all()
    assert (np.diff(grid[3, :, 1]) > 0).all()
    np.testing.assert_allclose(grid[:, :, 0].mean(), 18, atol=0.05)
