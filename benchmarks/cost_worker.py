"""One process of the cost benchmark: a Hugging Face Llama, with or without LXT's AttnLRP rules.

LXT 2.1 (Achtibat et al., AttnLRP, ICML 2024) patches transformers' classes for the whole process
and needs an older transformers than LensLRP, so it runs in a process, and an environment, of its
own. Requests and answers are JSON, one object a line, on standard input and output; the process
sleeps between requests, so that at any time one process works.

    {"op": "load", "shape": {...}, "weights": PATH, "attention": "sdpa", "rules": "lxt" | "none",
     "threads": N}
    {"op": "input", "tokens": [[...]], "target": ID}
    {"op": "time"} -> {"ms": ...}    {"op": "peak"} -> {"mib": ...}
    {"op": "relevance"} -> {"relevance": [[...]]}
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

from cost_measure import (  # noqa: E402  (imports torchvision by way of transformers)
    Pass,
    Shape,
    build_llama,
    hugging_face_pass,
    peak_mib,
    wall_ms,
)


class Worker:
    """State between two requests: the model's pass and the input."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self.run: Pass | None = None
        self.tokens: Tensor | None = None
        self.target = 0

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build the model on the given weights; with rules "lxt", patch transformers first."""
        torch.set_num_threads(request["threads"])
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        if request["rules"] == "lxt":
            from lxt.efficient import monkey_patch
            from transformers.models.llama import modeling_llama

            monkey_patch(modeling_llama)
            versions["lxt"] = importlib.metadata.version("lxt")
        model = build_llama(
            Shape(**request["shape"]), request["attention"], Path(request["weights"])
        )
        self.run = hugging_face_pass(model)
        return {"versions": versions, "threads": torch.get_num_threads()}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if request["op"] == "load":
            return self.load(request)
        if request["op"] == "input":
            self.tokens, self.target = torch.tensor(request["tokens"]), request["target"]
            return {}
        if self.run is None or self.tokens is None:
            raise ValueError("'load' and 'input' come before any measurement")
        if request["op"] == "time":
            return {"ms": wall_ms(self.run, self.tokens, self.target)}
        if request["op"] == "peak":
            return {"mib": peak_mib(self.run, self.tokens, self.target)}
        if request["op"] == "relevance":
            return {"relevance": self.run(self.tokens, self.target).tolist()}
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
