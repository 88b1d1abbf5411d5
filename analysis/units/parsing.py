"""The unit that a text stands for: what `str` of a unit gives, read back."""

from __future__ import annotations

import re

from lenslrp.analysis.units.kinds import Head, Neuron, Unit
from lenslrp.analysis.units.locations import Side
from lenslrp.analysis.units.recurrent import Channel, RecurrentHead
from lenslrp.errors import InputError

_PATTERN = re.compile(
    r"(?P<stack>blocks|encoder_blocks|decoder_blocks)\.(?P<layer>\d+)\."
    r"(?:mlp\.(?P<shared>shared_experts?\.)?hook_post\[(?P<neuron>\d+)\]"
    r"|mlp\.hook_expert_post\[(?P<expert>\d+), ?(?P<of_expert>\d+)\]"
    r"|(?:(?:self_)?attn|(?P<cross>cross_attn))\.hook_z\[(?P<head>\d+)\])"
)
_SCAN = re.compile(  # with or without the name of the mixer
    r"blocks\.(?P<layer>\d+)\.(?:\w+\.)*hook_scan_"
    r"(?:out(?:\[(?P<head>\d+)\])?|in\[(?:(?P<of_head>\d+), ?)?(?P<channel>\d+)\])"
)


NODE_LABEL = re.compile(r"(?P<kind>[NH])(?P<layer>\d+)\.(?P<index>\d+)")
"""What graphs write in the boxes of neurons and heads."""


def parse_unit(text: str) -> Unit:
    """The neuron, head or channel that a text like ``"blocks.5.mlp.hook_post[17]"`` stands for.

    ``"N5.17"`` and ``"H5.2"``, labels of nodes in graphs, are a decoder's neuron and head.

    Raises:
        InputError: any other text; directions and features hold vectors, which no text does.

    Examples:
        >>> parse_unit("blocks.5.attn.hook_z[2]")
        Head(layer=5, index=2, cross=False, side='decoder')
    """
    scan = _SCAN.fullmatch(text)
    if scan is not None:
        layer, head, of_head = int(scan["layer"]), scan["head"], scan["of_head"]
        if scan["channel"] is None:
            return RecurrentHead(layer, None if head is None else int(head))
        return Channel(layer, int(scan["channel"]), None if of_head is None else int(of_head))
    label = NODE_LABEL.fullmatch(text)
    if label is not None:
        kind: type[Neuron | Head] = Neuron if label["kind"] == "N" else Head
        return kind(int(label["layer"]), int(label["index"]))
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text!r} is no neuron or head; expected, for example, blocks.5.mlp.hook_post[17], "
            "blocks.5.mlp.hook_expert_post[3, 17], blocks.5.attn.hook_z[2], "
            "blocks.5.hook_scan_out[2], N5.17 or H5.2"
        )
    layer, side = int(match["layer"]), _side(match["stack"])
    if match["head"] is not None:
        return Head(layer, int(match["head"]), bool(match["cross"]), side)
    if match["expert"] is not None:
        return Neuron(layer, int(match["of_expert"]), int(match["expert"]), side)
    return Neuron(layer, int(match["neuron"]), "shared" if match["shared"] else None, side)


def _side(stack: str) -> Side:
    return "encoder" if stack == "encoder_blocks" else "decoder"
