"""How a model is called, and what stands for logits where its output has none by that name.

A question answerer gives the logits of start and end apart; a tower with a projection gives an
embedding; a pair of towers gives the similarity of every image with every text.
"""

from __future__ import annotations

import inspect
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

EMBEDDINGS = ("image_embeds", "text_embeds")


def named_logits(output: Any) -> Tensor | None:
    """The tensor that targets are read from, ``None`` where the output has nothing of the kind.

    Returns:
        Of a question answerer [batch, pos, 2], start and end; of a pair of towers [batch, 1], each
        image with the text of its own row ([image, text] where they are not as many); of a tower
        with a projection [batch, d], its embedding.
    """
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    if getattr(output, "logits_per_image", None) is not None:
        similarity: Tensor = output.logits_per_image
        row = torch.arange(len(similarity), device=similarity.device)
        paired = similarity.shape == (len(row), len(row))
        return similarity[row, row][:, None] if paired else similarity
    return next((x for name in EMBEDDINGS if (x := getattr(output, name, None)) is not None), None)


def give_logits(model: Any) -> None:
    """Let a model's output have ``logits`` of :func:`named_logits`."""
    forward = type(model).forward

    @wraps(forward)
    def joined(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output["logits"] = named_logits(output)
        return output

    model.forward = MethodType(joined, model)  # of a copy of the model, the copy's


def score_rows(model: Any) -> None:
    """Let each row of tokens [batch, pos] be one choice, its score the only logit: [batch, 1].

    Choices [batch, choice, pos] are taken as ever. They do not see each other: a choice's score is
    of its own tokens alone.
    """
    forward = type(model).forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def scored(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        for name, value in given.arguments.items():
            if isinstance(value, Tensor) and value.ndim == (3 if name == "inputs_embeds" else 2):
                given.arguments[name] = value[:, None]
        return forward(*given.args, **given.kwargs)

    model.forward = MethodType(scored, model)


def without_cache(model: Any) -> None:
    """Let a head that has its base model run without a cache not be told so as well (T5Gemma)."""
    forward = type(model).forward

    @wraps(forward)
    def run(self: Any, *args: Any, use_cache: bool = False, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    model.forward = MethodType(run, model)
