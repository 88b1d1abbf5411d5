"""The vectors of texts, as the targets ``Embedding`` and ``Similarity`` see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from lenslrp import media
from lenslrp.errors import InputError
from lenslrp.forward import forward, require_readable
from lenslrp.hooks.install import require_bridge
from lenslrp.leaves import Leaves
from lenslrp.sentences import Embedding, SentenceEmbedding, embedding_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def embed(
    model: TransformerBridge,
    input: Any = None,
    pooling: str | SentenceEmbedding | None = None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Tensor | None = None,
    pixel_values: Any = None,
) -> Float[Tensor, "batch d"]:
    """The vectors of texts: hidden states of a bare model, pooled.

    Args:
        model: a ``TransformerBridge`` of a model without a head.
        input: a string, strings, or a token tensor [batch, pos].
        pooling: as for `lenslrp.targets.Embedding`; ``None`` for what the checkpoint says.
        prepend_bos: as for `lenslrp.run_with_relevance`.
        attention_mask: likewise.
        pixel_values: likewise, for a model of images.

    Returns:
        One vector a row, detached; normalised where the checkpoint does so.

    Raises:
        InputError: the model has a head, nothing says how to pool, or see there.

    Examples:
        >>> query = lenslrp.embed(encoder, "Who wrote Faust?", "mean")[0]
        >>> _, R = lenslrp.run_with_relevance(
        ...     encoder, documents, targets.Similarity(query, "mean")
        ... )  # each document's similarity to the query, in its own row
    """
    require_bridge(model)
    require_readable(model, Embedding(0))
    floats = media.floats_given(model, pixel_values, None, None)
    batch = media.prepare_batch(
        model, input, floats, prepend_bos=prepend_bos, attention_mask=attention_mask
    )
    leaves = Leaves()
    with forward(model, batch, leaves=leaves) as run:
        if media.reads_no_text(model):
            run.batch = media.with_sequence(batch, leaves)
        outputs = run.outputs()
        vectors = embedding_of(outputs.embedding, pooling).vectors(outputs).detach()
    broken = (~vectors.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
    if broken:
        raise InputError(
            f"the vectors of rows {broken} are NaN or infinite ({vectors.dtype}): activations "
            "overflowed, or, in float64, a column sees nothing but padding on the left; pad on the "
            "right, or give rows of one length"
        )
    return vectors
