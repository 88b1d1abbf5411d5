"""Where relevance ends: at token embeddings, learned positions, patches, pixels, samples.

Leaves are detached copies, cut where a model embeds what it reads. With ``leaves="pixels"`` the
numbers of an image or a sound are the leaves, and the relevance of its patches (frames, for a
waveform) is read on its way down; with ``"patches"`` the embedded patches are. Learned tokens that
stand before the patches (CLS, distillation) and learned positions are constants of the model:
leaves too, so that no relevance is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.leaf_modules import MediaEmbedder, media_embedders, sites_before_sequence
from lenslrp.hooks.sites import Site, has_values
from lenslrp.hooks.structure import NamedModules


@dataclass
class Leaves:
    """Detached copies at the embeddings, where relevance ends."""

    tokens: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    decoder_tokens: list[Tensor] = field(default_factory=list)
    decoder_positions: list[Tensor] = field(default_factory=list)
    special: list[Tensor] = field(default_factory=list)  #: of an image: [batch, n, d_model]
    patch_positions: list[Tensor] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)  #: [batch, d_model, row, column]
    inputs: dict[str, Tensor] = field(default_factory=dict)  #: pixels, samples: as given
    special_names: list[str] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)  #: patches that relevance passes
    passing: dict[int, Tensor] = field(default_factory=dict)  #: and its gradient there

    def groups(self) -> dict[str, list[Tensor]]:
        names = ("tokens", "positions", "decoder_tokens", "decoder_positions", "special")
        lists = {name: getattr(self, name) for name in (*names, "patch_positions", "patches")}
        return {**lists, "inputs": list(self.inputs.values())}

    def all(self) -> list[Tensor]:
        return [leaf for group in self.groups().values() for leaf in group]


def cut_inputs(
    at: Attached,
    parts: NamedModules,
    embedded: list[tuple[nn.Module, bool]],
    leaves: Leaves,
    batch: Batch,
    sites: list[Site],
    kind: str = "pixels",
) -> dict[str, Tensor]:
    """Make all leaves of a batch; returns the images and sounds that the forward pass is given."""
    inputs = dict(batch.media)
    if inputs:
        inputs = cut_media(at, parts, leaves, sites, inputs, kind)
    cut_leaves(at, embedded, leaves, batch)  # positions, too, of given embeddings
    return inputs


def cut_leaves(
    at: Attached, embedded: Iterable[tuple[nn.Module, bool]], leaves: Leaves, prepared: Batch
) -> None:
    """Make the outputs of the embeddings (see `embeddings`) leaves of the graph.

    An encoder embeds its tokens, then its positions, before the decoder does. Tokens that a model
    adds by itself (LED fills up its last window with padding) are no input, and no leaves.
    """
    batch, two_stacks = len(prepared.tokens), prepared.decoder is not None
    read = prepared.tokens.shape[1]  # none of them where an encoder reads a sound
    sides = [prepared.tokens.shape, *([prepared.decoder.tokens.shape] if prepared.decoder else ())]
    for inner, position in embedded:

        def cut(
            _: nn.Module, args: tuple[Any, ...], out: Tensor, position: bool = position
        ) -> Tensor:
            group = leaves.positions if position else leaves.tokens
            if two_stacks and (leaves.decoder_tokens if position else leaves.tokens or not read):
                group = leaves.decoder_positions if position else leaves.decoder_tokens
            leaf = out.detach()
            if not position and leaf.ndim == 3 and leaf.shape[:2] not in sides:
                return leaf
            if group is leaves.decoder_tokens and not group and not _reads(args, prepared.decoder):
                return leaf
            if leaf.ndim == 2:  # positions without a batch
                leaf = leaf[None]
            if leaf.shape[0] == 1 and batch > 1:
                leaf = leaf.expand(batch, *leaf.shape[1:])
            leaf = leaf.clone().requires_grad_()
            group.append(leaf)
            return leaf

        at.hook(inner, cut)


def _reads(args: tuple[Any, ...], decoder: Batch | None) -> bool:
    """Whether a decoder's tokens are what is embedded: LED's padding may be as long as they are."""
    ids = args[0] if args else None
    if decoder is None or not isinstance(ids, Tensor) or ids.shape != decoder.tokens.shape:
        return True
    return not has_values(ids) or torch.equal(ids, decoder.tokens.to(ids.device))


def cut_media(
    at: Attached,
    parts: NamedModules,
    leaves: Leaves,
    sites: list[Site],
    media: Mapping[str, Tensor],
    kind: str,
) -> dict[str, Tensor]:
    """Make an image's or a sound's leaves; returns what the forward pass is given.

    Args:
        sites: those of the rules in force: what runs below patches is then off the path.
        kind: ``"pixels"`` or ``"patches"``.
    """
    patch_embedders = media_embedders(parts)
    for place in patch_embedders:
        _cut_constants(at, leaves, place)
        at.hook(place.projection, _cut_patches(leaves) if kind == "patches" else _read(leaves))
    if kind == "pixels":
        leaves.inputs.update((n, v.clone().requires_grad_()) for n, v in media.items())
        return dict(leaves.inputs)
    if not patch_embedders:
        raise InputError('leaves="patches": this model has no patch embedding; use "pixels"')
    for site in sites_before_sequence(parts, sites):
        site.cut = True
    return dict(media)


def _cut_patches(leaves: Leaves) -> Callable[..., Tensor]:
    def cut(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        leaf = _rows_last(module, out.detach()).clone().requires_grad_()
        leaves.patches.append(leaf)
        return _rows_last(module, leaf)

    return cut


def _rows_last(module: nn.Module, x: Tensor) -> Tensor:
    """[batch, frame, d_model] of a convolution's [batch, d_model, frame], and the way back."""
    return x.transpose(1, 2) if isinstance(module, nn.Conv1d) else x


def _read(leaves: Leaves) -> Callable[..., None]:
    """Keep the relevance of patches as the backward pass goes by."""

    def read(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        place, kept = len(leaves.seen), _rows_last(module, out.detach())
        leaves.seen.append(kept)

        def passing(g: Tensor) -> None:
            leaves.passing[place] = _rows_last(module, g.detach())

        if out.requires_grad:
            out.register_hook(passing)

    return read


def _cut_constants(at: Attached, leaves: Leaves, place: MediaEmbedder) -> None:
    """Shadow the owner's parameters by leaves with a row for each image, while it runs."""
    owner = place.owner
    if owner is None:
        return
    added: list[str] = []
    images: list[int] = []

    def leaf(value: Tensor, batch: int) -> Tensor:
        rows = value.detach().reshape(1, -1, value.shape[-1]).expand(batch, -1, -1)
        return rows.clone().requires_grad_()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images_in = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        images.append(len(images_in))
        for name in (*place.special, *place.positions):
            value = owner._parameters.get(name)
            if value is None:
                continue
            copy = leaf(value, len(images_in))
            owner.__dict__[name] = copy
            added.append(name)
            if name in place.special:
                leaves.special.append(copy)
                leaves.special_names += [place.special[name]] * copy.shape[1]
            else:
                leaves.patch_positions.append(copy)

    def restore(*_: Any) -> None:
        while added:
            owner.__dict__.pop(added.pop(), None)

    def embedded(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        rows = out.detach().reshape(-1, *out.shape[-2:])  # one for all images, or one for each
        copy = rows.expand(max(images[-1], len(rows)), -1, -1).clone().requires_grad_()
        leaves.patch_positions.append(copy)
        return copy

    def interpolated(*args: Any, **kwargs: Any) -> Tensor:
        """Positions of an image of another size: what is made of the table, and not the table."""
        shadows = {name: owner.__dict__.pop(name, None) for name in place.positions}
        try:
            rows = between(*args, **kwargs)
        finally:
            owner.__dict__.update((name, x) for name, x in shadows.items() if x is not None)
        tables = [id(x) for x in shadows.values()]
        kept = [x for x in leaves.patch_positions if id(x) not in tables]
        leaves.patch_positions[:] = [*kept, leaf(rows, images[-1])]
        return leaves.patch_positions[-1]

    between: Any = getattr(owner, "interpolate_pos_encoding", None)
    if between is not None and any(owner._parameters.get(n) is not None for n in place.positions):
        at.attribute(owner, "interpolate_pos_encoding", interpolated)
    at.pre_hook(owner, before, with_kwargs=True)
    at.hook(owner, restore)
    at.undo.append(restore)
    for name in place.positions:
        table = owner._modules.get(name)
        if table is not None:
            at.hook(table, embedded)
