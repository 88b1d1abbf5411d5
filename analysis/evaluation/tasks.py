"""Tasks to evaluate explanations on: each makes examples of records, for a given model.

An example is a prompt, a target, the tokens that may be taken away, and, where the answer is known,
the tokens that decide it. Only what the model gets right is kept where right and wrong exist: for a
wrong answer no reason is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lenslrp import targets
from lenslrp.analysis.common.records import Record
from lenslrp.analysis.common.templates import agreement, indirect_objects
from lenslrp.analysis.evaluation.features import token_values
from lenslrp.analysis.evaluation.spans import Mask, normalise, occurrences, overlap, token_spans
from lenslrp.analysis.passes.problems import resolve
from lenslrp.analysis.passes.prompts import ExplainedPrompt, as_prompt, prompt_logits
from lenslrp.errors import InputError
from lenslrp.inputs import is_encoder_decoder
from lenslrp.media import labels_of
from lenslrp.text.spelling import Spans
from lenslrp.text.tokenization import tokenize
from lenslrp.writing import greedy

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

REVIEW = "Review: {text}\nSentiment:"
SENTIMENTS = {"positive": " positive", "negative": " negative"}
QUESTION = {
    # by whether there is a decoder of its own: Flan-T5 was tuned on such prompts; a small decoder
    # needs an example to see that the answer is short
    True: "Please answer a question about the following article:\n\n{context}\n\n{question}",
    False: "Text: The Nile flows through Egypt.\nQuestion: Where does the Nile flow?\n"
    "Answer: Egypt\n\nText: {context}\nQuestion: {question}\nAnswer:",
}
LONGEST_ANSWER = 32
IMAGES = "images"


@dataclass(frozen=True, eq=False)
class Example:
    """One thing to explain.

    Attributes:
        prompt: the input and the target.
        removable: [pos] (or [patch]), what perturbation may take away.
        key: [pos], the tokens that decide the answer, where that is known.
        distractor: [pos], the tokens that are evidence for the wrong answer, likewise.
    """

    prompt: ExplainedPrompt
    removable: Mask
    key: Mask | None = None
    distractor: Mask | None = None


class Unfit(Exception):
    """Raised for a record that makes no example for this model; the message is the reason.

    The record is skipped; `Results.unfit` counts the reasons.
    """


@dataclass(frozen=True)
class Task:
    """A kind of example: how one is made of a record of data.

    Attributes:
        name: its key in `TASKS`.
        fields: what a record must have.
        make: takes a model, a record and a length in tokens; returns an `Example`, or raises
            `Unfit` to skip the record.
        records: makes the records, where no data is needed.
        split_by: the field whose hash decides in which split, development or held-out, a record
            is.

    Examples:
        ```python
        def first_sentence(model, record, length):
            prompt = as_prompt(model, record["text"].split(".")[0])
            return Example(prompt, np.ones(len(prompt.tokens), dtype=bool))

        task = Task("first_sentence", {"text": str}, first_sentence)
        evaluate(task, model, ["attnlrp"], data=[{"text": "It rains. I sing."}], n=1, folder="r")
        ```
    """

    name: str
    fields: Mapping[str, type]
    make: Callable[[Any, Record, int], Example]
    records: Callable[[], Iterator[Record]] | None = None
    split_by: str = "text"


def next_word(model: TransformerBridge, record: Record, length: int) -> Example:
    """The model's own next token after the first ``length`` tokens of a text."""
    if labels_of(model) is not None:
        raise InputError("the task next_word needs a language model, and this one gives classes")
    ids = torch.tensor(tokenize(model, record["text"]))
    if len(ids) < length:
        raise Unfit(f"shorter than {length} tokens")
    prompt = as_prompt(model, ids[:length])
    return Example(prompt, np.ones(length, dtype=bool))


def sentiment(model: TransformerBridge, record: Record, length: int) -> Example:
    """The label of a review, as the difference of the two labels' logits; the review's tokens."""
    label = record["label"]
    if label not in SENTIMENTS:
        raise InputError(f"a review's label is one of {', '.join(SENTIMENTS)}, not {label!r}")
    right, wrong = SENTIMENTS[label], next(v for k, v in SENTIMENTS.items() if k != label)
    start = REVIEW.index("{text}")
    text = REVIEW.format(text=record["text"])
    example = _two_answers(model, text, right, wrong, [(start, start + len(record["text"]))])
    if len(example.prompt.tokens) > length:
        raise Unfit(f"longer than {length} tokens")
    return example


def classification(model: TransformerBridge, record: Record, length: int) -> Example:
    """The label that a classifier gives a text, if it is right; the text's own tokens.

    The target is the logit of the label less that of the next likely one.
    """
    labels = labels_of(model)
    if labels is None or len(labels) < 2 or not _classifies_texts(model):
        raise InputError("the task classification needs a classifier of texts, of two classes")
    if record["label"] not in labels.values():
        known = ", ".join(labels.values())
        raise InputError(f"a text's label is one of {known}, not {record['label']!r}")
    prompt = as_prompt(model, record["text"], record["label"])
    if len(prompt.tokens) > length:
        raise Unfit(f"longer than {length} tokens")
    first, second = prompt_logits(model, prompt)[0].ravel().topk(2).indices.tolist()
    if labels[first] != record["label"]:
        raise Unfit("answered otherwise")
    prompt = replace(prompt, target=targets.LogitDiff(first, second))
    special = set(model.tokenizer.all_special_ids)
    return Example(prompt, np.array([int(token) not in special for token in prompt.tokens]))


def _classifies_texts(model: TransformerBridge) -> bool:
    return type(model.original_model).__name__.endswith("ForSequenceClassification")


def known_answer(model: TransformerBridge, record: Record, length: int) -> Example:
    """A sentence with a right and a wrong next token, and the words that are evidence for each."""
    text = record["text"]
    example = _two_answers(model, text, record["answer"], record["rival"], [(0, len(text))])
    spans = token_spans(model.tokenizer, text, example.prompt.tokens.tolist())
    key = overlap(spans, occurrences(text, record["key"]))
    distractor = overlap(spans, occurrences(text, record["distractor"]))
    if not key.any() or not distractor.any():
        raise Unfit(f"{record['key']!r} or {record['distractor']!r} is not in the text")
    return Example(example.prompt, np.ones(len(spans), dtype=bool), key, distractor)


def squad(model: TransformerBridge, record: Record, length: int) -> Example:
    """The answer that the model writes to a question about a paragraph, if it is right.

    The target is the sum of the answer's logits, the paragraph's tokens may be taken away, and
    those of the answer in it are the key.
    """
    template = QUESTION[is_encoder_decoder(model)]
    text = template.format(context=record["context"], question=record["question"])
    ids = model.tokenizer(text)["input_ids"]
    if len(ids) > length:
        raise Unfit(f"longer than {length} tokens")
    answer_ids = generate(model, ids)
    answer = normalise(model.tokenizer.decode(answer_ids))
    references = {normalise(str(a.get("text", ""))): a for a in reversed(record["answers"])}
    if not answer or answer not in references:
        raise Unfit("answered otherwise")
    prompt = as_prompt(model, torch.tensor(ids), targets.Sequence(answer_ids))
    begin = template.index("{context}")
    start = begin + int(references[answer]["start"])
    spans = token_spans(model.tokenizer, text, ids)
    removable = overlap(spans, [(begin, begin + len(record["context"]))])
    key = overlap(spans, [(start, start + len(references[answer]["text"]))])
    return Example(prompt, removable, key)


def generate(model: TransformerBridge, ids: list[int]) -> list[int]:
    """What the model writes greedily: up to its end, or to the end of its first line of text."""
    written = greedy(model, ids, LONGEST_ANSWER)
    if not is_encoder_decoder(model):
        written = written[len(ids) :]
    special = set(model.tokenizer.all_special_ids)
    answer: list[int] = []
    for token in written:
        begun = bool(model.tokenizer.decode(answer).strip()) if answer else False
        if begun and (token in special or "\n" in model.tokenizer.decode([token])):
            break
        if token not in special:
            answer.append(token)
    return answer


def image_task(images: Mapping[str, Tensor]) -> Task:
    """A task of images: the class that the model gives each, and the image's patches.

    Args:
        images: name -> [channel, height, width], as the model's own processor makes it.

    Examples:
        ```python
        pixels = model.processor(images=[photo], return_tensors="pt")["pixel_values"][0]
        evaluate(image_task({"photo": pixels}), model, ["attnlrp_gamma"], n=1, folder="photo")
        ```
    """

    def digest(pixels: Tensor) -> str:
        return hashlib.sha256(pixels.float().cpu().contiguous().numpy().tobytes()).hexdigest()

    def records() -> Iterator[Record]:
        return ({"image": name, "pixels": digest(x)} for name, x in images.items())

    def make(model: TransformerBridge, record: Record, length: int) -> Example:
        pixels = images[record["image"]][None]
        prompt = as_prompt(model, pixel_values=pixels)
        patches = resolve(model, target=prompt.target, pixel_values=pixels).mask.shape[1]
        return Example(prompt, np.ones(patches, dtype=bool))

    return Task(IMAGES, {"image": str, "pixels": str}, make, records, split_by="pixels")


def _two_answers(
    model: TransformerBridge, text: str, right: str, wrong: str, removable: Spans
) -> Example:
    for word in (right, wrong):
        if len(model.tokenizer.encode(word, add_special_tokens=False)) != 1:
            raise Unfit(f"{word!r} is more than one token")
    prompt = as_prompt(model, text, targets.LogitDiff(right, wrong))
    nothing_gone = np.zeros((1, len(prompt.tokens)), dtype=bool)
    if token_values(model, [prompt], [nothing_gone])[0].value[0] <= 0:
        raise Unfit("answered otherwise")
    spans = token_spans(model.tokenizer, text, prompt.tokens.tolist())
    return Example(prompt, overlap(spans, removable))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("next_word", {"text": str}, next_word),
        Task("sentiment", {"text": str, "label": str}, sentiment),
        Task("classification", {"text": str, "label": str}, classification),
        Task(
            "squad",
            {"context": str, "question": str, "answers": list},
            squad,
            split_by="context",
        ),
        Task(
            "indirect_object",
            dict.fromkeys(("text", "answer", "rival", "key", "distractor"), str),
            known_answer,
            indirect_objects,
        ),
        Task(
            "agreement",
            dict.fromkeys(("text", "answer", "rival", "key", "distractor"), str),
            known_answer,
            agreement,
        ),
    )
}
