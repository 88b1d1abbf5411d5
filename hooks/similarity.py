"""The similarity of an image and a text: the dot product of two embeddings of length 1.

The length that an embedding is divided by is a denominator, and constant as a norm's is ([A]
Prop. 3.4). The dot product is one of two factors that both carry relevance, half to each ([A]
Prop. 3.3), by the role ``attention_qk``: image and text share the similarity. A learned bias
(SigLIP's) takes its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lenslrp.hooks import functions as F
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.norming import NormingIntercept, attach_norming
from lenslrp.hooks.operations import DIVISIONS, count_on_graph
from lenslrp.hooks.rule_types import Operations

SIMILARITY_CLASSES = frozenset({"CLIPModel", "MetaClip2Model", "SiglipModel"})
"""Classes of transformers whose own code compares the embeddings of two towers."""

LENGTH_FUNCTIONS = frozenset({"pow", "norm", *DIVISIONS})
"""What the length of an embedding is computed and divided by."""

SPEC = Operations(leaks=())


class SimilarityIntercept(NormingIntercept):
    """Intercepts the raw operations of a pair of towers, lengths among them."""

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in LENGTH_FUNCTIONS or not count_on_graph(args):
            return super().intercept(func, name, args, kwargs)
        if self.plain:
            return self.measured(func, *args, **kwargs)
        if name in DIVISIONS:
            return F.apply(F.Mark, func(args[0], args[1].detach()), self.norm)
        return func(args[0].detach(), *args[1:], **kwargs)


def attach_similarity(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """The rules of a pair's own operations."""
    attach_norming(at, ctx, path, module, SPEC, SimilarityIntercept)
