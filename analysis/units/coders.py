"""Sparse autoencoders and transcoders, from safetensors.

A sparse coder reads the tensor at one hook point and writes a sum of a few of many vectors::

    z = (x - mean) / scale
    a = f((z - b_dec?) W_enc + b_enc)
    y = scale (a W_dec + b_dec) + mean + x W_skip

where ``f`` is a ReLU, a ReLU that keeps only what exceeds a learnt threshold (JumpReLU,
Rajamanoharan et al. 2024), or one that keeps the k largest (Gao et al. 2024). An autoencoder writes
back what it read; a transcoder reads the input of an MLP and writes its output, and may have a
linear skip connection (Paulo et al. 2025). Most coders have mean 0 and scale 1. The names of the
tensors are those of the files that sae-lens and Gemma Scope publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lenslrp.errors import InputError

NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")
"""What is done to each position before it is read, and undone where the coder writes: nothing; a
length of sqrt(d_in); mean 0 and standard deviation 1."""

REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """The weights of one sparse autoencoder or transcoder.

    Attributes:
        hook: the hook point that it reads: [batch, pos, d_in], or [batch, pos, head, d_head].
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
        heads: how many heads the last but one axis of ``hook`` has, for a coder of all of them
            (``hook_z``); None where the hook point has no such axis.

    Raises:
        InputError: weights whose shapes do not fit each other, a ``k`` out of range, or an unknown
            normalization.

    Examples:
        ```python
        coder = SparseCoder.load("sae.safetensors", hook="blocks.5.hook_resid_post")
        activations = coder.encode(residual)  # [batch, pos, d_in] -> [batch, pos, features]
        coder.decode(activations)             # [batch, pos, d_out]
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
    heads: int | None = None

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
        if self.normalization not in NORMALIZATIONS:
            known = ", ".join(NORMALIZATIONS)
            raise InputError(f"normalization is {self.normalization!r}, expected one of {known}")

    @property
    def writes_back(self) -> bool:
        """Whether it is an autoencoder: it writes what it read."""
        return self.hook_out is None and self.W_dec.shape[1] == self.W_enc.shape[0]

    def flat(self, x: Tensor) -> Float[Tensor, "... d_in"]:
        """``x`` without an axis of heads.

        Raises:
            InputError: another width than the coder reads.
        """
        x = x if self.heads is None else x.flatten(-2)
        if x.shape[-1] != self.W_enc.shape[0]:
            raise InputError(
                f"{self.name} reads {self.W_enc.shape[0]} values a position, "
                f"{self.hook} has {x.shape[-1]}"
            )
        return x

    def normalizer(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
        """The mean and the scale of each position. Both are constants: without a gradient."""
        x = x.detach()
        mean, scale = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.normalization == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        elif self.normalization == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            scale = x.std(dim=-1, keepdim=True) + 1e-5
        return mean, scale

    def encode(self, x: Tensor) -> Float[Tensor, "... features"]:
        """The activations of all features. Differentiable; a normalization's scale is constant.

        Args:
            x: as at ``hook``.

        Raises:
            InputError: another width than the coder reads.
        """
        x = self.flat(x)
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

    def decode(self, activations: Float[Tensor, "... features"], x: Tensor | None = None) -> Tensor:
        """The sum of the vectors that the features write, ``b_dec`` and the skip connection.

        Args:
            activations: of all features.
            x: what was read; needed by a coder with a skip connection or a normalization.

        Raises:
            InputError: no ``x`` where it is needed.
        """
        y = activations @ self.W_dec.to(activations) + self.b_dec.to(activations)
        if self.W_skip is not None or self.normalization != "none":
            if x is None:
                raise InputError(
                    f"{self.name} has a skip connection or a normalization: give x, what it read"
                )
            x = self.flat(x)
            mean, scale = self.normalizer(x)
            y = y * scale + mean
            if self.W_skip is not None:
                y = y + x @ self.W_skip.to(x)
        return y if self.heads is None else y.unflatten(-1, (self.heads, -1))

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the coder writes where it reads ``x``: `decode` of `encode`."""
        return self.decode(self.encode(x), x)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        hook: str,
        k: int | None = None,
        subtract_b_dec: bool = False,
        name: str = "sae",
    ) -> SparseCoder:
        """Read ``W_enc, b_enc, W_dec, b_dec`` and, where present, ``threshold`` from safetensors.

        Args:
            path: the file.
            hook: the hook point that the coder reads.
            k: keep only the k largest features of a position; None for all.
            subtract_b_dec: whether ``b_dec`` is subtracted from the input first.
            name: what its features are called.

        Raises:
            InputError: no such file, not safetensors, tensors missing or of shapes that do not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no file {path}")
        try:
            tensors: Mapping[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
        missing = [name for name in REQUIRED if name not in tensors]
        if missing:
            raise InputError(
                f"{path} has no {', '.join(missing)}; it holds {', '.join(sorted(tensors))}"
            )
        widths = {name: tensors[name].ndim for name in REQUIRED}
        if widths != {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}:
            raise InputError(f"{path}: W_enc and W_dec are matrices, b_enc and b_dec vectors")
        return cls(
            hook,
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            threshold=tensors.get("threshold"),
            k=k,
            subtract_b_dec=subtract_b_dec,
            name=name,
        )
