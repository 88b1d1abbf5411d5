"""Published layouts of sparse coders: read, they compute what the tools that wrote them compute.

The references are of SAELens, circuit-tracer and sparsify themselves (`tests/reference/`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lenslrp.analysis import CrossLayerCoder, SparseCoder
from lenslrp.errors import InputError, StorageError

REFERENCE = Path(__file__).parents[2] / "reference"
STORED = load_file(REFERENCE / "sparse_coders.safetensors")
TEXTS: dict[str, dict[str, str]] = json.loads(
    (REFERENCE / "sparse_coders.json").read_text(encoding="utf-8")
)["files"]
ACROSS = [name for name in TEXTS if "across layers" in name]
SETS = [name for name in TEXTS if name.startswith("circuit-tracer") and name not in ACROSS]
ONE = [name for name in TEXTS if name not in (*ACROSS, *SETS)]
HOOK = "blocks.1.hook_resid_post"


def unpacked(case: str, folder: Path) -> Path:
    """The folder of a case, as its tool wrote it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in TEXTS[case].items():
        (folder / file).write_text(text, encoding="utf-8")
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in STORED.items():
        of, file, *key = name.split("/")
        if of == case and key:
            held.setdefault(file, {})[key[0]] = tensor
    for file, tensors in held.items():
        if file.endswith(".npz"):
            np.savez(folder / file, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            save_file(tensors, folder / file)
    return folder


def given(case: str) -> dict[str, Any]:
    """What the files of a case do not say."""
    if "expected_average_only_in" in case:
        return {"norm_scaling_factor": 0.4}
    out = {"hook_out": "blocks.1.hook_mlp_out"} if case == "sparsify transcoder" else {}
    told = case not in ("gemma scope", "sparsify", "sparsify transcoder")
    return {} if told else {"hook": HOOK, **out}


def close(actual: Tensor, case: str, what: str, layer: int | None = None) -> None:
    expected = STORED[f"{case}/{what}"]
    expected = expected if layer is None else expected[layer]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ONE)
def test_one_coder_computes_what_its_tool_computes(case: str, tmp_path: Path) -> None:
    coder, x = SparseCoder.load(unpacked(case, tmp_path), **given(case)), STORED[f"{case}/x"]
    close(coder.encode(x), case, "activations")
    close(coder.reconstruct(x), case, "written")
    assert 0 < (coder.encode(x) != 0).float().mean() < 0.8  # both happen: on and off
    if case == "gemma scope 2":
        assert (coder.hook, coder.hook_out) == ("blocks.4.mlp.hook_in", "blocks.4.hook_mlp_out")
    assert (coder.hook_out is not None) == ("transcoder" in case or case == "gemma scope 2")


@pytest.mark.parametrize("case", [case for case in ONE if case != "sparsify transcoder"])
def test_what_is_saved_is_read_back_equal(case: str, tmp_path: Path) -> None:
    coder = SparseCoder.load(unpacked(case, tmp_path / "a"), **given(case))
    again = SparseCoder.load(coder.save(tmp_path / "b"))
    for field in fields(SparseCoder):
        one, other = getattr(coder, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


def test_sparsify_says_its_hook_points_by_the_folders_name(tmp_path: Path) -> None:
    for case, name, hooks in (
        ("sparsify", "layers.7", ("blocks.7.hook_resid_post", None)),
        ("sparsify", "model.layers.7.mlp", ("blocks.7.mlp.hook_out", None)),
        ("sparsify transcoder", "layers.7.mlp", ("blocks.7.mlp.hook_in", "blocks.7.mlp.hook_out")),
    ):
        coder = SparseCoder.load(unpacked(case, tmp_path / name))
        assert (coder.hook, coder.hook_out) == hooks
    with pytest.raises(InputError, match="does not say which hook point it reads: give hook="):
        SparseCoder.load(unpacked("sparsify", tmp_path / "embed_tokens"))
    elsewhere = unpacked("sparsify transcoder", tmp_path / "layers.7.attn")
    with pytest.raises(InputError, match="does not say which hook point it writes: give hook_out="):
        SparseCoder.load(elsewhere, hook="blocks.7.attn.hook_in")


@pytest.mark.parametrize("case", SETS)
def test_a_transcoder_a_layer(case: str, tmp_path: Path) -> None:
    folder = unpacked(case, tmp_path)
    coders = SparseCoder.load_set(folder)
    assert [coder.hook for coder in coders] == [f"blocks.{i}.mlp.hook_in" for i in range(3)]
    assert [coder.hook_out for coder in coders] == [f"blocks.{i}.hook_mlp_out" for i in range(3)]
    for layer, coder in enumerate(coders):
        x = STORED[f"{case}/x"][layer]
        close(coder.encode(x), case, "activations", layer)
        close(coder.reconstruct(x), case, "written", layer)
    one = SparseCoder.load(folder / "layer_2.safetensors")
    assert one.hook == coders[2].hook and torch.equal(one.W_enc, coders[2].W_enc)
    with pytest.raises(InputError, match="is a set of transcoders: SparseCoder.load_set reads it"):
        SparseCoder.load(folder)


@pytest.mark.parametrize("case", ACROSS)
def test_a_transcoder_across_layers(case: str, tmp_path: Path) -> None:
    folder = unpacked(case, tmp_path)
    coder, x = CrossLayerCoder.load(folder), list(STORED[f"{case}/x"])
    close(torch.stack(coder.encode(x)), case, "activations")
    close(torch.stack(coder.reconstruct(x)), case, "written")
    assert coder.writes(1, 4).shape == (2, 8)
    with pytest.raises(InputError, match="a cross-layer transcoder: CrossLayerCoder.load reads it"):
        SparseCoder.load(folder)


def test_sets_of_gemma_scope_that_circuit_tracer_lists(tmp_path: Path) -> None:
    """Files named in `config.yaml`: an .npz and a file of Gemma Scope 2, each a layer."""
    unpacked("gemma scope", tmp_path / "0")
    unpacked("gemma scope 2", tmp_path / "1")
    config = {
        "model_kind": "transcoder_set", "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
        "transcoders": ["0/params.npz", "1/params.safetensors"],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    first, second = SparseCoder.load_set(tmp_path)
    assert (first.hook, second.hook_out) == (
        "blocks.0.ln2.hook_normalized",
        "blocks.1.hook_mlp_out",
    )
    for case, coder in (("gemma scope", first), ("gemma scope 2", second)):
        close(coder.reconstruct(STORED[f"{case}/x"]), case, "written")


def test_gemma_scope_2_across_layers(tmp_path: Path) -> None:
    """Against sums written out: each layer's file writes all layers, zeros before its own."""
    torch.manual_seed(0)
    layers, weights = 3, []
    for layer in range(layers):
        weights.append({
            "w_enc": torch.randn(8, 12), "w_dec": torch.randn(12, layers, 8),
            "b_enc": torch.randn(12), "b_dec": torch.randn(8), "threshold": torch.rand(12),
            "affine_skip_connection": torch.randn(8, 8),
        })  # fmt: skip
        weights[layer]["w_dec"][:, :layer] = 0
        save_file(weights[layer], tmp_path / f"params_layer_{layer}.safetensors")
    config = {
        "model_kind": "cross_layer_transcoder", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "transcoders": [f"params_layer_{layer}.safetensors" for layer in range(layers)],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    coder, x = CrossLayerCoder.load(tmp_path), list(torch.randn(layers, 5, 8))
    expected = [x[m] @ w["affine_skip_connection"] + w["b_dec"] for m, w in enumerate(weights)]
    for layer, w in enumerate(weights):
        pre = x[layer] @ w["w_enc"] + w["b_enc"]
        activations = pre.relu() * (pre > w["threshold"])
        for m in range(layer, layers):
            expected[m] = expected[m] + activations @ w["w_dec"][:, m]
    for actual, sums in zip(coder.reconstruct(x), expected, strict=True):
        torch.testing.assert_close(actual, sums)


@pytest.mark.parametrize(
    ("repository", "hooks"),
    [
        ("gemma-scope-2b-pt-res", ("blocks.12.hook_resid_post", None, None)),
        ("gemma-scope-9b-pt-att", ("blocks.12.attn.hook_z", None, "all")),
        ("gemma-scope-2b-pt-mlp", ("blocks.12.hook_mlp_out", None, None)),
        (
            "gemma-scope-2b-pt-transcoders",
            ("blocks.12.ln2.hook_normalized", "blocks.12.hook_mlp_out", None),
        ),
    ],
)
def test_hub_paths_are_read_from_its_cache(
    repository: str, hooks: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, inside = "0" * 40, "layer_12/width_16k/average_l0_82"
    cached = tmp_path / f"models--google--{repository}"
    unpacked("gemma scope", cached / "snapshots" / commit / inside)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    coder = SparseCoder.load(f"google/{repository}/{inside}")
    assert (coder.hook, coder.hook_out, coder.heads) == hooks
    one = SparseCoder.load(f"hf://google/{repository}/{inside}/params.npz?revision=main")
    assert torch.equal(one.W_enc, coder.W_enc)
    with pytest.raises(InputError, match="has no layer_13, or its cache has not"):
        SparseCoder.load(f"google/{repository}/layer_13")
    with pytest.raises(InputError, match="and the Hugging Face hub did not give it"):
        SparseCoder.load("google/another/layer_13@main")


def changed(**changes: Any) -> Callable[[Path], None]:
    """A change to ``cfg.json``."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**config, **changes}))

    return change


def not_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")


def with_tensor(name: str, tensor: Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "sae_weights.safetensors"
        save_file({**load_file(path), name: tensor}, path)

    return change


def renamed(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / file).touch()

    return change


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("standard", changed(architecture="temporal"), "architecture is 'temporal', which is not"),
        ("standard", changed(architecture="matching_pursuit"), "architecture is 'matching_pursuit"),
        ("standard", changed(architecture="abstopk", k=3), "architecture is 'abstopk', which"),
        ("standard", changed(novelty=1), "cfg.json has novelty, which is not understood"),
        ("standard", changed(one=1, two=2), "cfg.json has one, two, which are not understood"),
        ("standard", changed(normalize_activations="covariance_whitening"), "covariance_whitening"),
        ("standard", changed(normalize_activations="constant_scalar_rescale"), "is 'constant_scal"),
        ("standard", changed(normalize_activations="expected_average_only_in"), "give norm_sc"),
        ("standard", changed(activation_fn="tanh-relu"), "activation_fn is 'tanh-relu', which is"),
        ("standard", changed(reshape_activations="flat"), "reshape_activations is 'flat', which"),
        ("standard", changed(dtype="int8"), "dtype is 'int8', which is not understood"),
        ("standard", changed(k=3), "k is 3, which is not understood: a standard coder has none"),
        ("standard", changed(d_sae=13), "d_sae is 13, the weights have 12"),
        ("standard", with_tensor("scaling_factor", torch.rand(12)), "scaling_factor, a finetuned"),
        ("standard", with_tensor("b_mag", torch.rand(12)), "a standard coder has W_enc, W_dec, b"),
        ("topk", changed(k=None), "k is None, which is not understood: how many features"),
        ("before 6 topk", changed(activation_fn_kwargs={"k": 3, "signed": True}), "'signed': True"),
        ("transcoder", changed(apply_b_dec_to_input=True), "a transcoder's b_dec is of its output"),
        ("transcoder", changed(metadata={"sae_lens_version": "6", "hook_name": "x"}), "hook_out="),
        ("transcoder", changed(hook_head_index_out=1), "hook_head_index_out is 1, which is not"),
        ("standard", not_json, "cfg.json is not JSON"),
        ("standard", renamed("ae.pt"), "dictionary_learning's layout, a pickle; nothing is"),
        ("standard", renamed("hyperparams.json"), "is Llama Scope's layout, which is not read"),
        ("sparsify", changed(signed=True), "signed or groupmax activations are not understood"),
        ("sparsify", changed(activation="groupmax"), "signed or groupmax activations are not"),
        ("sparsify", changed(novelty=1), "cfg.json has novelty, not understood"),
        ("standard", renamed("latest_ckpt.safetensors"), "is a temporal coder, which reads other"),
        ("standard", renamed("README.md"), "holds no coder: it has README.md"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(
    case: str, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = unpacked(case, tmp_path / "coder")
    change(folder)
    with pytest.raises(InputError, match=message):
        SparseCoder.load(folder)


def test_other_layouts_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    two = unpacked("gemma scope 2", tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    for changes, message in (
        ({"novelty": 1}, "config.json has novelty, not understood"),
        ({"architecture": "relu"}, "architecture is 'relu', expected 'jump_relu'"),
        ({"affine_connection": False}, "affine_connection does not agree with the tensors"),
        ({"hf_hook_point_in": "model.norm.output"}, "'model.norm.output' is not understood"),
    ):
        (two / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=message):
            SparseCoder.load(two)
    tracer = unpacked("circuit-tracer jumprelu", tmp_path / "tracer")
    for text, message in (
        ("novelty: 1", "config.yaml has novelty, not understood"),
        ("model_kind: transcoder_set", "does not say feature_input_hook and feature_output_hook"),
        ("model_kind: [", "config.yaml cannot be read"),
        ("transcoders: [{layer: 0}]", "transcoders is a list of files, a layer each"),
        ("model_kind: cross_layer_transcoder", "model_kind is 'cross_layer_transcoder', expected"),
    ):
        (tracer / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            SparseCoder.load_set(tracer)
    tensors = load_file(tracer / "layer_0.safetensors")
    tensors["activation_function.threshold"] -= 2
    save_file(tensors, tracer / "layer_0.safetensors")
    (tracer / "config.yaml").write_text(TEXTS["circuit-tracer jumprelu"]["config.yaml"])
    with pytest.raises(
        InputError, match="a threshold is below 0, where features would be negative"
    ):
        SparseCoder.load_set(tracer)
    (tmp_path / "params.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="params.npz is not an .npz of numbers"):
        SparseCoder.load(tmp_path / "params.npz", hook="x")
    embedding = unpacked("gemma scope", tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "w")
    with pytest.raises(InputError, match="coders of the token embeddings are not read"):
        SparseCoder.load(embedding, hook="hook_embed")


def test_a_bare_file_needs_a_hook_and_others_no_keywords(tmp_path: Path) -> None:
    folder = unpacked("standard", tmp_path / "coder")
    weights = folder / "sae_weights.safetensors"
    assert SparseCoder.load(weights).hook == HOOK  # its cfg.json lies beside it
    for keywords in ({"k": 3}, {"subtract_b_dec": True}):
        with pytest.raises(InputError, match="k and subtract_b_dec are for bare files"):
            SparseCoder.load(folder, **keywords)
    with pytest.raises(InputError, match="norm_scaling_factor is for 'expected_average_only_in'"):
        SparseCoder.load(folder, norm_scaling_factor=2.0)
    assert SparseCoder.load(folder, hook="blocks.2.hook_resid_pre").hook.startswith("blocks.2.")
    bare = tmp_path / "bare.safetensors"
    weights.rename(bare)
    with pytest.raises(InputError, match="does not say which hook point it reads: give hook="):
        SparseCoder.load(bare)
    assert SparseCoder.load(bare, hook="x", k=3, subtract_b_dec=True).k == 3
    save_file({**load_file(bare), "b_gate": torch.ones(12)}, bare)
    with pytest.raises(InputError, match="bare.safetensors holds b_gate, not understood"):
        SparseCoder.load(bare, hook="x")
    (tmp_path / "ae.pt").touch()
    with pytest.raises(InputError, match="is a pickle; nothing is unpickled here"):
        SparseCoder.load(tmp_path / "ae.pt", hook="x")


def test_weights_of_a_processed_model_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = unpacked("before 6", tmp_path)
    changed(model_from_pretrained_kwargs={"center_writing_weights": True})(folder)
    with caplog.at_level(logging.WARNING, "lenslrp"):
        SparseCoder.load(folder)
    assert "trained on a model loaded with {'center_writing_weights': True}" in caplog.text


def test_what_saelens_has_no_layout_for_is_not_written(tmp_path: Path) -> None:
    weights = {"W_enc": torch.ones(4, 6), "b_enc": torch.ones(6), "W_dec": torch.ones(6, 4),
               "b_dec": torch.ones(4)}  # fmt: skip
    for more in (
        {"k": 2, "hook_out": "y"},
        {"k": 2, "threshold": torch.ones(6)},
        {"subtract_b_dec": True, "hook_out": "y"},
    ):
        with pytest.raises(InputError, match="SAELens has no layout for sae"):
            SparseCoder("x", **weights, **more).save(tmp_path)
    head = SparseCoder("blocks.0.attn.hook_z", **weights, heads=1)
    assert SparseCoder.load(head.save(tmp_path / "head")).heads == 1
    assert head.save(tmp_path / "head") == tmp_path / "head"  # its own files are replaced
    with pytest.raises(StorageError, match="exists and was not made by LensLRP"):
        head.save(unpacked("standard", tmp_path / "others"))
