"""The models converted from ONNX files against onnxruntime on the same files.

    pip install onnxruntime
    python tests/reference/check_onnx_models.py

Not a test of the suite: onnxruntime is no dependency. Flan-T5's file multiplies 8-bit matrices by
activations that it rounds to 8 bits at each run, so two comparisons are made: with the graph's
matrices dequantised and its activations left alone, which must agree to rounding (the converted
weights are float16), and with the graph as it is, where the answers are compared. The vision
backbone must agree to rounding in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from transformers import AutoTokenizer, T5ForConditionalGeneration, ViTModel

from lenslrp.models.embedded import EMBEDDED, ensure_cached
from lenslrp.models.fetching import fetch
from lenslrp.quiet import quiet_transformers

QUESTIONS = (
    ("Who keeps the light?", "The lighthouse on Gull Rock is kept by Marta Olsen."),
    ("Where does the ferry go?", "A small ferry leaves at nine each morning for Kinsale."),
    ("What colour was the boat?", "He sold his red boat and bought a green bicycle."),
    ("When was the mill built?", "The old mill, built in 1742, burned down two years ago."),
    ("How many sheep are there?", "On the hill there are forty sheep and one dog."),
    ("Who wrote the letter?", "The letter that Anna read aloud was written by her uncle."),
)
NEW_TOKENS = 12


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """onnxruntime on one file or one serialised graph, without fused approximations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def dequantised(path: Path) -> bytes:
    """The same graph in float32: every 8-bit product becomes a product with (q - zero) * scale.

    ``MatMulInteger(quantised x, W) -> Cast -> Mul(scales)`` is replaced by ``MatMul(x, W)``.
    """
    model = onnx.load(str(path))
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    replaced = {}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        x = makers[node.input[0]].input[0]  # DynamicQuantizeLinear's
        base = node.input[1].removesuffix("_quantized")
        centred = stored[node.input[1]].astype(np.float32) - stored[f"{base}_zero_point"]
        weight = numpy_helper.from_array(centred * stored[f"{base}_scale"], f"{base}_float")
        graph.initializer.append(weight)
        cast = readers[node.output[0]]
        scaled = readers[cast.output[0]]
        assert (cast.op_type, scaled.op_type) == ("Cast", "Mul")
        replaced[scaled.output[0]] = helper.make_node(
            "MatMul", [x, weight.name], [scaled.output[0]], name=f"{node.name}_float"
        )
    nodes = [replaced.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def greedy(step, ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Tokens from the start token to the end token, and their logits [written, vocab]."""
    written = [0]
    while True:
        logits = step(ids, np.array([written]))[0]
        written.append(int(logits[-1].argmax()))
        if written[-1] == 1 or len(written) > NEW_TOKENS:
            return written[1:], logits


def onnx_step(encoder: Path | bytes, decoder: Path | bytes):
    first, second = session(encoder), session(decoder)

    def step(ids: np.ndarray, written: np.ndarray) -> np.ndarray:
        mask = np.ones_like(ids)
        (hidden,) = first.run(None, {"input_ids": ids, "attention_mask": mask})
        given = {
            "input_ids": written,
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
        }
        return second.run(None, given)[0]

    return step


def check_t5(scratch: Path) -> bool:
    """Print the comparison; True if the dequantised graph agrees to rounding."""
    name = "flan-t5-small-titles"
    encoder, decoder, _ = fetch(EMBEDDED[name], scratch)
    folder = ensure_cached(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_transformers():
        model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def torch_step(ids: np.ndarray, written: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = model(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(written))
        return out.logits.numpy()

    exact = onnx_step(dequantised(encoder), dequantised(decoder))
    stored = onnx_step(encoder, decoder)
    worst, same = 0.0, [0, 0]
    for question, context in QUESTIONS:
        ids = tokenizer(f"question: {question} context: {context}", return_tensors="np").input_ids
        ours, logits = greedy(torch_step, ids)
        float_answer, float_logits = greedy(exact, ids)
        int_answer, _ = greedy(stored, ids)
        same[0] += ours == float_answer
        same[1] += ours == int_answer
        if ours == float_answer:
            spread = np.abs(float_logits).max()
            worst = max(worst, float(np.abs(logits - float_logits).max() / spread))
        decode = [tokenizer.decode(a, skip_special_tokens=True) for a in (ours, int_answer)]
        print(f"  {question:28s} ours {decode[0]!r}, the 8-bit graph {decode[1]!r}")
    count = len(QUESTIONS)
    print(
        f"  logits against the dequantised graph: relative difference {worst:.1e}; greedy answers\n"
        f"  equal to the dequantised graph's {same[0]}/{count}, the 8-bit graph's {same[1]}/{count}"
    )
    return same[0] == count and worst < 2e-3


def check_vit(scratch: Path) -> bool:
    """Print the comparison; True if the hidden states agree to rounding."""
    name = "vit-s14-saliency"
    (path,) = fetch(EMBEDDED[name], scratch)
    graph = onnx.load(str(path))
    final = "/backbone/layernorm/Add_1_output_0"
    if final not in {output for node in graph.graph.node for output in node.output}:
        raise SystemExit(f"{path.name} has no node output {final}")
    graph.graph.output.append(helper.make_tensor_value_info(final, onnx.TensorProto.FLOAT, None))
    images = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    run = session(graph.SerializeToString())
    expected = run.run([final], {"input_image": images})[0]
    model = ViTModel.from_pretrained(ensure_cached(name), add_pooling_layer=False).eval()
    with torch.no_grad():
        found = model(torch.tensor(images)).last_hidden_state.numpy()
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"  hidden states {list(found.shape)}: relative difference {worst:.1e}")
    return worst < 1e-5


def main() -> int:
    passed = []
    for name, check in {"flan-t5-small-titles": check_t5, "vit-s14-saliency": check_vit}.items():
        with tempfile.TemporaryDirectory() as scratch:
            print(f"{name}, onnxruntime {onnxruntime.__version__}")
            passed.append(check(Path(scratch)))
            print("  agrees" if passed[-1] else "  DOES NOT AGREE")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
