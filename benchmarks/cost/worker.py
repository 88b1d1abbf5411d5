"""The process of the cost benchmark in which SmolLM2 runs on Hugging Face sdpa under LXT's AttnLRP.

LXT 2.1 (Achtibat et al., AttnLRP, ICML 2024) patches transformers' classes for the whole process
and needs an older transformers than LensLRP, so it runs in a process, and an environment, of its
own. Requests and answers are JSON, one object a line, on standard input and output; the process
sleeps between requests, so that at any time one process works.

    {"op": "load", "weights": PATH} -> {"versions": {...}}
    {"op": "input", "tokens": [[...]]} -> {}
    {"op": "time", "logits": "target" | "all"} -> {"seconds": [user, system]}
    {"op": "peak", "logits": ...} -> {"mib": ...}
    {"op": "relevance", "logits": ...} -> {"relevance": [[...]]}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def name_missing_operators() -> None:
    """Let torchvision be imported where its compiled operators cannot be loaded.

    transformers and LXT import torchvision, for models that this benchmark does not use. The build
    on the package index wants CUDA; beside a CPU torch its operators stay unloaded and the import
    stops at the first operator it does not find. Declared names are enough for the import.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


name_missing_operators()

from benchmarks.cost.measure import (  # noqa: E402  (imports torchvision by way of transformers)
    SMOLLM2,
    Pass,
    build_llama,
    cpu_seconds,
    hugging_face_pass,
    peak_mib,
)


class Worker:
    """State between two requests: the model's passes and the input."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self.passes: dict[str, Pass] = {}
        self.tokens: Tensor | None = None

    def load(self, weights: str) -> dict[str, Any]:
        """Patch transformers' classes, and build the model on the given weights."""
        from lxt.efficient import monkey_patch
        from transformers.models.llama import modeling_llama

        torch.set_num_threads(1)
        monkey_patch(modeling_llama)
        model = build_llama(SMOLLM2, "sdpa", Path(weights))
        self.passes = {logits: hugging_face_pass(model, logits) for logits in ("target", "all")}
        names = ("torch", "transformers", "lxt")
        return {"versions": {name: importlib.metadata.version(name) for name in names}}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if request["op"] == "load":
            return self.load(request["weights"])
        if request["op"] == "input":
            self.tokens = torch.tensor(request["tokens"])
            return {}
        if self.tokens is None:
            raise ValueError("'load' and 'input' come before any measurement")
        run = self.passes[request["logits"]]
        if request["op"] == "time":
            return {"seconds": cpu_seconds(run, self.tokens)}
        if request["op"] == "peak":
            return {"mib": peak_mib(run, self.tokens)}
        if request["op"] == "relevance":
            return {"relevance": run(self.tokens).tolist()}
        raise ValueError(f"unknown op {request['op']!r}")


def main() -> None:
    """Serve until standard input closes. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
