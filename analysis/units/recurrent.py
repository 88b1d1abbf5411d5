"""The units of recurrent mixers: heads, and the channels of the values that they scan.

Both live at hook points of LensLRP's own (`lenslrp.hooks.scan_points`), under the name of the
block's mixer, whatever that is; their texts leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp.analysis.units.kinds import Routing, Unit
from lenslrp.analysis.units.locations import Vectors, block_of, require_plain_weights
from lenslrp.errors import InputError
from lenslrp.hooks.scans import heads_of, mixers
from lenslrp.hooks.structure import components, layer_of, original

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OUTPUTS = ("out_proj", "linear_out", "o_proj", "output")
"""What a layer is called that writes to the residual stream, in a mixer or the block around it."""


@dataclass(frozen=True)
class RecurrentHead(Unit):
    """One head of a recurrent mixer, or its whole scan.

    Its activation is the length of what its scan gives, before gate and norm: how much it moves,
    whatever it moves, as for a `Head`.

    Attributes:
        layer: block index, from 0.
        index: which head; left out for the whole scan of a mixer without heads (Mamba, RG-LRU,
            RWKV).

    Examples:
        >>> str(RecurrentHead(5, 2)), str(RecurrentHead(5))
        ('blocks.5.hook_scan_out[2]', 'blocks.5.hook_scan_out')
    """

    layer: int
    index: int | None = None

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        return f"blocks.{self.layer}.hook_scan_out{index}"

    def hook(self, model: TransformerBridge) -> str:
        path, mixer = _mixer(model, self)
        _require_head(self, self.index, heads_of(mixer), f"RecurrentHead({self.layer})")
        return f"{path}.hook_scan_out"

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        mine = value if self.index is None else _picked(self, value, self.index, axis=-2)
        norms: Tensor = mine.norm(dim=-1)
        return norms

    def writes(self, model: TransformerBridge) -> Vectors:
        raise InputError(
            f"{self} writes no fixed vectors: its channels are scaled one by one, by a gate or a "
            "norm, before they are projected; a Channel writes along one"
        )

    def reads(self, model: TransformerBridge) -> Vectors:
        return _no_reads(self)


@dataclass(frozen=True)
class Channel(Unit):
    """One channel of the values that a recurrent mixer scans: a number at each position.

    Every scan leaves channels apart, so to switch a channel off is to switch it off in what the
    scan gives (of RG-LRU, which makes its gates of the values, but for those).

    Attributes:
        layer: block index, from 0.
        index: which channel, of its head where the mixer has heads.
        head: which head; left out for mixers without heads.

    Examples:
        >>> str(Channel(5, 17)), str(Channel(5, 17, head=2))
        ('blocks.5.hook_scan_in[17]', 'blocks.5.hook_scan_in[2, 17]')
    """

    layer: int
    index: int
    head: int | None = None

    def __str__(self) -> str:
        head = "" if self.head is None else f"{self.head}, "
        return f"blocks.{self.layer}.hook_scan_in[{head}{self.index}]"

    def hook(self, model: TransformerBridge) -> str:
        path, mixer = _mixer(model, self)
        _require_head(self, self.head, heads_of(mixer), f"Channel({self.layer}, {self.index})")
        width, count = self._output(model).shape[1], heads_of(mixer) or 1
        if not 0 <= self.index < width // count:
            raise InputError(
                f"channel is {self.index}, but layer {self.layer} has channels 0 to "
                f"{width // count - 1}{' in a head' if self.head is not None else ''}"
            )
        return f"{path}.hook_scan_in"

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        mine = value if self.head is None else _picked(self, value, self.head, axis=-2)
        return _picked(self, mine, self.index, axis=-1)

    def writes(self, model: TransformerBridge) -> Vectors:
        """``"out"``: its row of the output projection, which a gate scales, and may turn round."""
        weight = self._output(model)
        count = heads_of(_mixer(model, self)[1]) or 1
        row = (self.head or 0) * (weight.shape[1] // count) + self.index
        return {"out": weight[:, row][None]}

    def reads(self, model: TransformerBridge) -> Vectors:
        return _no_reads(self)

    def _output(self, model: TransformerBridge) -> Tensor:
        """The weight of the output projection, [d_model, channel]."""
        path, mixer = _mixer(model, self)
        around = dict(components(model)).get(path.rpartition(".")[0])
        for module in (mixer, around):
            layer = next((getattr(module, n) for n in OUTPUTS if hasattr(module, n)), None)
            if layer is not None:
                require_plain_weights(layer)
                weight: Tensor = layer.weight.detach()
                return weight
        raise InputError(f"{self}: {type(mixer).__name__} has no output projection of its own")


def _mixer(model: TransformerBridge, unit: RecurrentHead | Channel) -> tuple[str, Any]:
    """The path of the mixer in a unit's block, and the module that has its weights."""
    block = block_of(model, unit.layer)
    for path, module in mixers(components(model)):
        if layer_of(f"{path}.") == unit.layer and path.startswith("blocks."):
            return path, original(module) or module
    raise InputError(f"{unit}: this block has no recurrent mixer ({type(block).__name__})")


def _require_head(
    unit: RecurrentHead | Channel, head: int | None, heads: int | None, without: str
) -> None:
    if heads is None and head is not None:
        raise InputError(f"{unit}: the mixer of layer {unit.layer} has no heads: {without}")
    if heads is not None and (head is None or not 0 <= head < heads):
        raise InputError(f"{unit}: layer {unit.layer} has recurrent heads 0 to {heads - 1}")


def _picked(unit: Unit, value: Tensor, index: int, axis: int) -> Tensor:
    if value.ndim < -axis + 1 or not 0 <= index < value.shape[axis]:
        raise InputError(f"{unit} is not in a tensor of shape {list(value.shape)}")
    return value.select(axis, index)


def _no_reads(unit: Unit) -> Vectors:
    raise InputError(
        f"{unit}: between the residual stream and a scan stand a convolution over positions and "
        "an activation, so no single vector is what it reads"
    )
