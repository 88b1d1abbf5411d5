"""Chat prompts: the tokens that a chat model really reads.

A chat model sees roles and turns as special tokens laid out by its tokenizer's template. Relevance
on those tokens is part of the answer, so the whole templated prompt is given to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor

from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def chat(
    model: TransformerBridge,
    messages: str | Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    **template_arguments: Any,
) -> Int[Tensor, "1 pos"]:
    """Token ids of a conversation, for `lenslrp.run_with_relevance`.

    What is explained by default is the first token of the reply.

    Args:
        model: a bridge whose tokenizer has a chat template.
        messages: ``{"role": ..., "content": ...}`` mappings, or one user message.
        add_generation_prompt: end with the opening of the assistant's turn.
        template_arguments: passed to the tokenizer's ``apply_chat_template``.

    Returns:
        Token ids ``[1, pos]`` on the model's device. The template writes its own special tokens;
        nothing is prepended to a token tensor.

    Raises:
        InputError: no tokenizer, no chat template, no message, or a message the template refuses.

    Examples:
        >>> ids = lenslrp.chat(model, "What is the capital of France?")
        >>> logits, R = lenslrp.run_with_relevance(model, ids)
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            "the model has no tokenizer, so chat messages cannot be turned into tokens"
        )
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in template_arguments:
        raise InputError(
            f"the tokenizer of {model.cfg.model_name} has no chat template: this is not a chat "
            "model. Give its prompt as a string, or pass chat_template=..."
        )
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not turns:
        raise InputError("no messages: give at least one")
    for index, turn in enumerate(turns):
        if not {"role", "content"} <= turn.keys():
            raise InputError(f"message {index} needs 'role' and 'content', it has {sorted(turn)}")
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **template_arguments,
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long, device=model.cfg.device)
