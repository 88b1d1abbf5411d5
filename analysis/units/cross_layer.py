"""Cross-layer transcoders: a feature reads one layer and writes that layer and all later ones.

Ameisen et al. 2025, "Circuit Tracing". With ``a_l`` the activations of layer l, what is written to
layer m is ``sum over l <= m of a_l W_dec[l to m]``, and ``b_dec`` of layer m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.coder_sets import read_cross_layer
from lenslrp.analysis.units.coders import Cache, SparseCoder
from lenslrp.errors import InputError


@dataclass(frozen=True, eq=False)
class CrossLayerCoder:
    """A cross-layer transcoder, as one `SparseCoder` a layer and what it writes later.

    Attributes:
        layers: of each layer the transcoder of that layer to itself, whose ``later`` is what its
            features write to the layers after it. `Feature(layers[l], index)` is a feature as a
            unit.

    Raises:
        InputError: a layer that does not write to itself and to every layer after it.

    Examples:
        ```python
        coder = CrossLayerCoder.load("mntss/clt-gemma-2-2b-426k")
        written = coder.reconstruct(cache)  # of run_with_cache: one [batch, pos, d_out] a layer
        ```
    """

    layers: tuple[SparseCoder, ...]

    def __post_init__(self) -> None:
        outs = [coder.hook_out for coder in self.layers]
        for layer, coder in enumerate(self.layers):
            if list(coder.decoders) != outs[layer:]:
                raise InputError(
                    f"layer {layer} writes at {', '.join(coder.decoders)}, expected "
                    f"{', '.join(map(str, outs[layer:]))}"
                )

    def encode(self, x: Sequence[Tensor] | Cache) -> list[Float[Tensor, "... features"]]:
        """The activations of all features, by layer, from what each reads or a cache."""
        return [coder.encode(read) for coder, read in zip(self.layers, self._read(x), strict=True)]

    def decode(
        self, activations: Sequence[Tensor], x: Sequence[Tensor] | None = None
    ) -> list[Float[Tensor, "... d_out"]]:
        """What is written to each layer.

        Args:
            activations: of all features, by layer.
            x: what each layer read; needed with skip connections.
        """
        read = [None] * len(self.layers) if x is None else x
        written = []
        for layer, coder in enumerate(self.layers):
            y = coder.decode(activations[layer], read[layer])
            for before in range(layer):
                rows = self.layers[before].later[coder.written_at]
                y = y + activations[before] @ rows.to(y)
            written.append(y)
        return written

    def reconstruct(self, x: Sequence[Tensor] | Cache) -> list[Float[Tensor, "... d_out"]]:
        """`decode` of `encode`."""
        read = self._read(x)
        return self.decode(self.encode(read), read)

    def _read(self, x: Sequence[Tensor] | Cache) -> Sequence[Tensor]:
        return x if isinstance(x, Sequence) else [coder.read_from(x) for coder in self.layers]

    def writes(self, layer: int, index: int) -> Float[Tensor, "layers d_out"]:
        """What a feature writes to its own layer and to each later one."""
        return torch.stack([rows[index] for rows in self.layers[layer].decoders.values()])

    @classmethod
    def load(cls, path: str | Path) -> CrossLayerCoder:
        """Read circuit-tracer's folder, or the files of Gemma Scope 2 that its configuration lists.

        Args:
            path: a folder with ``config.yaml``, or ``owner/repo/folder`` on the hub.

        Raises:
            InputError: no such folder, a key or tensor that is not understood, or shapes that do
                not fit.
        """
        read = read_cross_layer(path)
        outs = [fields["hook_out"] for fields, _ in read]
        return cls(
            tuple(
                SparseCoder(
                    **fields,
                    name=f"clt {layer}",
                    later=dict(zip(outs[layer + 1 :], rest.unbind(1), strict=True)),
                )
                for layer, (fields, rest) in enumerate(read)
            )
        )


def require_one_layer(coder: SparseCoder, what: str) -> None:
    """Refuse a layer of a cross-layer transcoder.

    Raises:
        InputError: saying that ``what`` is of one hook point.
    """
    if coder.later:
        raise InputError(
            f"{what} is of one hook point, and features of {coder.name} write at "
            f"{len(coder.decoders)}: attribution_graph(coders=) has all of them"
        )
