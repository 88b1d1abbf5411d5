"""Sparse autoencoders and transcoders: what they compute, and which part of it a feature writes.

A sparse coder reads the tensor at one hook point and writes a sum of a few of many vectors::

    z = (x - mean) / scale
    a = f((z - b_dec?) W_enc + b_enc)
    y = scale (a W_dec + b_dec) + mean + x W_skip

where ``f`` is a ReLU, a ReLU that keeps only what exceeds a learnt threshold (JumpReLU,
Rajamanoharan et al. 2024), or one that keeps the k largest (Gao et al. 2024). An autoencoder writes
back what it read; a transcoder reads the input of an MLP and writes its output, without ``scale``
and ``mean``, and may have a linear skip connection (Paulo et al. 2025). Most coders have mean 0 and
scale 1. What a coder does not reconstruct is its error: ``x = y + error``, so that moving one
feature, ``x + scale (a' - a) W_dec``, leaves the error where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from lenslrp.analysis.units.coder_files import Given, read_coder
from lenslrp.analysis.units.coder_sets import read_set
from lenslrp.analysis.units.saelens import write_saelens
from lenslrp.errors import InputError

Cache = Mapping[str, Tensor] | ActivationCache
"""What ``run_with_cache`` returns, with ``return_cache_object=False`` too."""

NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")
"""What is done to each position before it is read, and undone where an autoencoder writes: nothing;
a length of sqrt(d_in); mean 0 and standard deviation 1."""

LAYER_NORM_EPS = 1e-5
"""Added to the standard deviation that a position is divided by, and not where it is undone."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseCoder:
    """The weights of one sparse autoencoder or transcoder.

    Attributes:
        hook: the hook point that it reads: [batch, pos, d_in], or with an axis of heads.
        W_enc: [d_in, features].
        b_enc: [features].
        W_dec: [features, d_out].
        b_dec: [d_out].
        threshold: [features], of a JumpReLU; None for a plain ReLU.
        k: keep only the k largest features of a position; None for all.
        subtract_b_dec: whether ``b_dec`` is subtracted from the input first.
        name: what its features are called, as in ``blocks.5.hook_resid_post[sae 40]``.
        hook_out: the hook point that a transcoder writes; None for an autoencoder, which writes
            back to ``hook``.
        W_skip: [d_in, d_out], of a skip transcoder.
        normalization: what is done to a position before it is read: ``"none"``,
            ``"constant_norm_rescale"`` or ``"layer_norm"``.
        later: of a layer of a cross-layer transcoder, what its features write at later layers: hook
            point -> [features, d_out] (`CrossLayerCoder`).
        heads: where ``hook`` is [batch, pos, head, d_head]: ``"all"`` for a coder that reads all
            heads side by side, the number of one for a coder of that head; None without such an
            axis.

    Raises:
        InputError: weights whose shapes do not fit each other, a ``k`` out of range, or an unknown
            normalization.

    Examples:
        ```python
        coder = SparseCoder.load("google/gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_68")
        activations = coder.encode(residual)  # [batch, pos, d_in] -> [batch, pos, features]
        coder.decode(activations, residual)   # [batch, pos, d_out]
        Feature(coder, 40)                    # one feature, as a unit
        ```
    """

    hook: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    name: str = "sae"
    hook_out: str | None = None
    W_skip: Tensor | None = None
    normalization: str = "none"
    heads: int | Literal["all"] | None = None
    later: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        features = self.W_enc.shape[-1]
        expected = {
            "b_enc": (features,),
            "W_dec": (features, self.W_dec.shape[-1]),
            "b_dec": (self.W_dec.shape[-1],),
            "threshold": (features,),
            "W_skip": (self.W_enc.shape[0], self.W_dec.shape[-1]),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if self.subtract_b_dec and self.W_enc.shape[0] != self.b_dec.shape[0]:
            raise InputError("subtract_b_dec is for autoencoders; this coder's widths differ")
        if self.k is not None and not 1 <= self.k <= features:
            raise InputError(f"k is {self.k}, expected 1 to {features} (the features)")
        if self.W_skip is not None and self.hook_out is None:
            raise InputError("W_skip is of transcoders: give hook_out, the hook point it writes")
        if self.later and self.hook_out is None:
            raise InputError("later is of transcoders: give hook_out, the hook point it writes")
        for hook, rows in self.later.items():
            if len(rows) != features:
                raise InputError(
                    f"at {hook} are written {len(rows)} vectors, expected {features} (the features)"
                )
        if self.normalization not in NORMALIZATIONS:
            known = ", ".join(NORMALIZATIONS)
            raise InputError(f"normalization is {self.normalization!r}, expected one of {known}")

    def __repr__(self) -> str:
        d_in, features = self.W_enc.shape
        out = "" if self.hook_out is None else f" to {self.hook_out}"
        return f"SparseCoder({self.name} at {self.hook}{out}, {d_in} wide, {features} features)"

    @property
    def writes_back(self) -> bool:
        """Whether it is an autoencoder: it writes what it read."""
        return self.hook_out is None and self.W_dec.shape[1] == self.W_enc.shape[0]

    @property
    def written_at(self) -> str:
        """The hook point where it writes: of a layer of a cross-layer transcoder, its own."""
        return self.hook if self.hook_out is None else self.hook_out

    @property
    def decoders(self) -> dict[str, Float[Tensor, "features d_out"]]:
        """What its features write, by hook point, from its own layer on."""
        return {self.written_at: self.W_dec, **self.later}

    def writes(self, index: int) -> Float[Tensor, " d_out"]:
        """What a feature writes for each unit of its activation, summed over layers."""
        return torch.stack([rows[index] for rows in self.decoders.values()]).sum(dim=0)

    def flat(self, x: Tensor) -> Float[Tensor, "... d_in"]:
        """The part of the tensor at a hook point that the coder reads or writes: heads joined.

        Raises:
            InputError: another shape than the coder's.
        """
        if self.heads is not None and x.ndim < 2:
            raise InputError(f"{self.name} reads heads: {self.hook} is {list(x.shape)}")
        if self.heads == "all":
            return x.flatten(-2)
        if self.heads is None:
            return x
        if not 0 <= self.heads < x.shape[-2]:
            raise InputError(f"{self.name} reads head {self.heads}, {self.hook} has {x.shape[-2]}")
        return x[..., self.heads, :]

    def flat_output(self, y: Tensor) -> Float[Tensor, "... d_out"]:
        """The part of the tensor at ``hook_out`` (of an autoencoder, at ``hook``) that it writes.

        Raises:
            InputError: another shape than the coder's.
        """
        if self.hook_out is None:
            y = self.flat(y)
        if y.shape[-1] != self.W_dec.shape[1]:
            raise InputError(
                f"{self.name} writes {self.W_dec.shape[1]} values a position, "
                f"{self.written_at} has {y.shape[-1]}"
            )
        return y

    def read_from(self, x: Tensor | Cache) -> Tensor:
        """What it reads: a tensor as it is, of a cache the one at ``hook``.

        Raises:
            InputError: a cache that does not hold it.
        """
        if isinstance(x, Tensor):
            return x
        if self.hook not in x:
            raise InputError(f"this cache does not hold {self.hook}, which {self.name} reads")
        return x[self.hook]

    def encode(self, x: Tensor | Cache) -> Float[Tensor, "... features"]:
        """The activations of all features. Differentiable; a normalization's scale is constant.

        Args:
            x: as at ``hook``, or the cache of ``run_with_cache``. The result is of its type or the
                weights', whichever is wider.

        Raises:
            InputError: another width than the coder reads, or a cache that does not hold it.
        """
        x = self.flat(self.read_from(x))
        if x.shape[-1] != self.W_enc.shape[0]:
            raise InputError(
                f"{self.name} reads {self.W_enc.shape[0]} values a position, "
                f"{self.hook} has {x.shape[-1]}"
            )
        x = x.to(torch.promote_types(x.dtype, self.W_enc.dtype))
        if self.normalization != "none":
            mean, scale = self.normalizer(x)
            x = (x - mean) / scale
        if self.subtract_b_dec:
            x = x - self.b_dec.to(x)
        pre = x @ self.W_enc.to(x) + self.b_enc.to(x)
        activations = torch.relu(pre)
        if self.threshold is not None:
            activations = activations * (pre > self.threshold.to(x))
        if self.k is not None:
            best = activations.topk(self.k, dim=-1)
            activations = torch.zeros_like(activations).scatter(-1, best.indices, best.values)
        return activations

    def decode(
        self, activations: Float[Tensor, "... features"], x: Tensor | None = None
    ) -> Float[Tensor, "... d_out"]:
        """The sum of the vectors that the features write, ``b_dec`` and the skip connection.

        Args:
            activations: of all features.
            x: as at ``hook``, what was read; needed by a coder with a skip connection, or with a
                normalization that it undoes.

        Raises:
            InputError: no ``x`` where it is needed.
        """
        y = activations @ self.W_dec.to(activations) + self.b_dec.to(activations)
        if self.W_skip is None and not self.rescales:
            return y
        if x is None:
            raise InputError(
                f"{self.name} has a skip connection or a normalization: give x, what it read"
            )
        x = self.flat(x)
        if self.rescales:
            mean, scale = self.denormalizer(x)
            y = y * scale + mean
        return y if self.W_skip is None else y + x @ self.W_skip.to(x)

    def top(self, x: Tensor | Cache, k: int = 10, row: int = 0) -> pd.DataFrame:
        """The most active features of a prompt, a feature at a position each.

        Args:
            x: [batch, pos, ...] as at ``hook``, or the cache of ``run_with_cache``.
            k: how many at most; features that are not active are left out.
            row: which prompt of the batch.

        Returns:
            Columns `position` (padding counted), `feature` and `activation`.

        Examples:
            >>> _, cache = model.run_with_cache("The capital of France is")
            >>> coder.top(cache, 3)["feature"].tolist()  # doctest: +SKIP
            [9, 312, 40]
        """
        activations = self.encode(x)[row].detach()
        best = activations.flatten().topk(min(k, activations.numel()))
        kept = best.indices[best.values > 0]
        return pd.DataFrame({
            "position": (kept // activations.shape[-1]).tolist(),
            "feature": (kept % activations.shape[-1]).tolist(),
            "activation": best.values[: len(kept)].tolist(),
        })  # fmt: skip

    def reconstruct(self, x: Tensor | Cache) -> Float[Tensor, "... d_out"]:
        """What the coder writes where it reads ``x``, as at ``hook``: `decode` of `encode`."""
        x = self.read_from(x)
        return self.decode(self.encode(x), x)

    def moved(self, y: Tensor, index: int, change: Tensor, at: str | None = None) -> Tensor:
        """``y`` with ``change`` added to a feature's activation, and all else kept.

        Args:
            y: as where the coder writes.
            index: which feature.
            change: one value a position.
            at: which of ``decoders``; its own layer's, if not given.
        """
        _, scale = self.denormalizer(self.flat_output(y))
        row = self.decoders[at or self.written_at][index]
        step = (change[..., None] * scale * row.to(change)).to(y)
        if self.heads is None or self.heads == "all" or self.hook_out is not None:
            return y + step.reshape(y.shape)
        z = y.clone()
        z[..., self.heads, :] = z[..., self.heads, :] + step
        return z

    @property
    def rescales(self) -> bool:
        """Whether it undoes its normalization where it writes: a transcoder does not."""
        return self.normalization != "none" and self.hook_out is None

    def normalizer(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
        """Of each position (`flat`) the mean that is subtracted and the scale that is divided by.

        Both are constants: without a gradient.
        """
        mean, scale = self._mean_and_scale(x, self.normalization)
        return mean, scale + LAYER_NORM_EPS if self.normalization == "layer_norm" else scale

    def denormalizer(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
        """Of each position (`flat`), the mean and the scale of what is written."""
        return self._mean_and_scale(x, self.normalization if self.rescales else "none")

    @staticmethod
    def _mean_and_scale(x: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if normalization == "layer_norm":
            return x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        zero = torch.zeros_like(x[..., :1])
        if normalization == "none":
            return zero, zero + 1
        return zero, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        hook: str | None = None,
        hook_out: str | None = None,
        k: int | None = None,
        subtract_b_dec: bool = False,
        norm_scaling_factor: float | None = None,
        name: str = "sae",
    ) -> SparseCoder:
        """Read a coder of any layout that `docs/how-to/coders.md` lists.

        Args:
            path: a file, a folder, or ``owner/repo/folder`` (and ``@revision``) on the Hugging Face
                hub, taken from its cache where there is no network.
            hook: the hook point that the coder reads, where the files do not say or name another
                than this model has.
            hook_out: the hook point that a transcoder writes, likewise.
            k: of a bare safetensors file: keep only the k largest features of a position.
            subtract_b_dec: of a bare file: whether ``b_dec`` is subtracted from the input first.
            norm_scaling_factor: of a coder trained on activations times this number
                (``expected_average_only_in``): it is folded into the weights.
            name: what its features are called.

        Raises:
            InputError: no such file, a layout, architecture, key or tensor that is not understood,
                shapes that do not fit, or no ``hook`` where the files do not say it.
        """
        given = Given(hook, hook_out, k, subtract_b_dec, norm_scaling_factor)
        return cls(**read_coder(path, given), name=name)

    @classmethod
    def load_set(cls, path: str | Path) -> list[SparseCoder]:
        """The transcoders of all layers of circuit-tracer's folder, in order.

        Args:
            path: a folder with ``config.yaml``, or ``owner/repo/folder`` on the hub. The files are
                ``layer_0.safetensors`` and so on beside it, or those that its ``transcoders`` list.

        Raises:
            InputError: as for `load`, or a folder without such a configuration.
        """
        return [cls(**fields, name=f"transcoder {i}") for i, fields in enumerate(read_set(path))]

    def save(self, folder: str | Path) -> Path:
        """Write SAELens' ``cfg.json`` and ``sae_weights.safetensors``, which `load` reads.

        Args:
            folder: made where it is missing.

        Returns:
            The folder.

        Raises:
            InputError: SAELens has no such coder (a transcoder that keeps the k largest).
            StorageError: the files cannot be written, or other ones are there.
        """
        return write_saelens(self, Path(folder))
