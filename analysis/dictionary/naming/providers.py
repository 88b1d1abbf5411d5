"""Providers of names for units that run anywhere: a list of tokens, and a language model of yours.

What a provider is, and how its names are scored, is in
`lenslrp.analysis.dictionary.naming.names`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenslrp.analysis.dictionary.naming.names import MARK, NamingExample
from lenslrp.batch import Batch
from lenslrp.forward import forward
from lenslrp.text.tokenization import tokenize

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class TokenRule:
    """A provider without a language model: the tokens on which the unit fires, as a list.

    A baseline that runs anywhere: an explanation that does no better than a list of tokens has
    found no concept.

    Attributes:
        tokens: how many the list has at most.
    """

    tokens: int = 10
    name: str = "token-rule"

    def explain(self, examples: Sequence[NamingExample], writes: Sequence[str]) -> str:
        """The tokens on which the unit fires more than elsewhere, as a list."""
        at, elsewhere = Counter[str](), Counter[str]()
        for example in examples:
            peaks = set(example.peaks())
            for i, token in enumerate(example.tokens):
                (at if i in peaks else elsewhere)[_plain(token)] += 1
        common = sorted(at, key=lambda t: (-at[t] / (1 + elsewhere[t]), -at[t], t))
        return "fires on: " + "; ".join([t for t in common if t][: self.tokens])

    def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
        """How many of the listed tokens are in each text."""
        rule = self._rule(explanation)
        return [float(sum(token in text.lower() for token in rule)) for text in texts]

    def fuzz(self, explanation: str, marked: Sequence[str]) -> list[float]:
        """Which share of the marked tokens is listed."""
        rule = self._rule(explanation)
        judged = []
        for text in marked:
            parts = [part.split(MARK[1])[0] for part in text.split(MARK[0])[1:]]
            judged.append(sum(_plain(p) in rule for p in parts) / max(1, len(parts)))
        return judged

    @staticmethod
    def _rule(explanation: str) -> list[str]:
        return [t for t in explanation.removeprefix("fires on: ").split("; ") if t]


def _plain(token: str) -> str:
    return token.strip().lower().replace(";", "")


@dataclass(frozen=True)
class LanguageModel:
    """A provider that uses a language model that you run: any causal bridge with a tokenizer.

    A small model answers no questions about texts, but it knows how likely a text is. So an
    explanation is judged by its pointwise mutual information with a text: how much likelier, in
    nats, the text becomes when the explanation stands before it as the topic. The explanation is
    the candidate under which the shown examples gain most: what the unit writes to the vocabulary,
    or what the model itself gives as their topic.

    Attributes:
        model: the bridge.
        shown: how many examples it reads.
        answer: how many tokens a topic of its own has at most.
        batch_size: texts in one forward pass.
    """

    model: TransformerBridge
    shown: int = 8
    answer: int = 16
    batch_size: int = 16
    name: str = "language-model"

    def explain(self, examples: Sequence[NamingExample], writes: Sequence[str]) -> str:
        """The candidate under which the shown examples gain most, in nats."""
        texts = [example.text for example in examples[: self.shown]]
        candidates = [self._topic(texts), ", ".join(token.strip() for token in writes)]
        gains = {c: sum(self.detect(c, texts)) for c in candidates if c}
        return max(gains, key=gains.__getitem__, default="")

    def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
        """Nats that each text gains by the explanation as its topic."""
        return self._gains(explanation, [[(text, True)] for text in texts])

    def fuzz(self, explanation: str, marked: Sequence[str]) -> list[float]:
        """Nats that the marked tokens of each text gain."""
        return self._gains(explanation, [_pieces(text) for text in marked])

    def _topic(self, texts: Sequence[str]) -> str:
        lines = "\n".join(f"- {text.strip()}" for text in texts)
        prompt = (
            "Texts:\n- The cat sat on the mat.\n- My dog barks at night.\nShared topic: pets\n\n"
            "Texts:\n- They flew to Rome.\n- Berlin has four airports.\nShared topic: cities\n\n"
            f"Texts:\n{lines}\nShared topic:"
        )
        tokens = torch.tensor([tokenize(self.model, prompt)], device=self.model.cfg.device)
        written: list[int] = []
        for _ in range(self.answer):
            last = torch.tensor([[tokens.shape[1] - 1]])
            best = self._logits(tokens, last).argmax().view(1, 1)
            if "\n" in self.model.tokenizer.decode([int(best)]):
                break
            written.append(int(best))
            tokens = torch.cat([tokens, best], dim=1)
        return str(self.model.tokenizer.decode(written)).strip()

    def _logits(self, tokens: Tensor, columns: Tensor | None = None) -> Tensor:
        tokens = tokens.to(self.model.cfg.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        batch = Batch(tokens, mask, [tokens.shape[1]] * len(tokens))
        with forward(self.model, batch, columns=columns) as run:
            assert run.logits is not None
            return run.logits

    def _gains(self, explanation: str, texts: Sequence[Sequence[tuple[str, bool]]]) -> list[float]:
        """Nats that the counted pieces of each text gain by the explanation as their topic."""
        explained, neutral = (
            self._likelihoods(f"Topic: {topic}\nText:", texts)
            for topic in (explanation, "anything")
        )
        return [a - b for a, b in zip(explained, neutral, strict=True)]

    def _likelihoods(self, before: str, texts: Sequence[Sequence[tuple[str, bool]]]) -> list[float]:
        """Log-probability of the counted pieces of each text after `before`, in nats."""
        start = tokenize(self.model, before)
        encode = partial(self.model.tokenizer.encode, add_special_tokens=False)
        likelihoods: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            rows, counted = [], []
            for text in texts[first : first + self.batch_size]:
                pairs = [(i, on) for piece, on in text for i in encode(piece)]
                rows.append(torch.tensor([*start, *(i for i, _ in pairs)]))
                counted.append(torch.tensor([0.0] * len(start) + [float(on) for _, on in pairs]))
            # padding stands behind, where no earlier token of a causal model sees it
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            weight = torch.nn.utils.rnn.pad_sequence(counted, batch_first=True)
            logits = self._logits(tokens)[:, :-1].float().cpu()
            chosen = logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.logsumexp(dim=2)
            likelihoods += (chosen * weight[:, 1:]).sum(dim=1).tolist()
        return likelihoods


def _pieces(marked: str) -> list[tuple[str, bool]]:
    """A marked text as pieces that are marked or not."""
    first, *rest = marked.split(MARK[0])
    pieces = [(first, False)]
    for part in rest:
        inside, _, outside = part.partition(MARK[1])
        pieces += [(inside, True), (outside, False)]
    return [(text, on) for text, on in pieces if text]
