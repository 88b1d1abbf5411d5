"""Sparse autoencoders and transcoders, from safetensors.

A sparse coder reads the tensor at one hook point and writes a sum of a few of many vectors::

    a = f((x - b_dec?) W_enc + b_enc),        x_hat = a W_dec + b_dec

where ``f`` is a ReLU, a ReLU that keeps only what exceeds a learnt threshold (JumpReLU,
Rajamanoharan et al. 2024), or one that keeps the k largest (Gao et al. 2024). An autoencoder writes
back what it read; a transcoder reads the input of an MLP and writes its output. The names of the
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

REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """The weights of one sparse autoencoder or transcoder.

    Attributes:
        hook: the hook point that it reads.
        W_enc: [d_in, features].
        b_enc: [features].
        W_dec: [features, d_out].
        b_dec: [d_out].
        threshold: [features], of a JumpReLU; None for a plain ReLU.
        k: keep only the k largest features of a position; None for all.
        subtract_b_dec: whether ``b_dec`` is subtracted from the input first.
        name: what its features are called, as in ``blocks.5.hook_resid_post[sae 40]``.

    Raises:
        InputError: weights whose shapes do not fit each other, or a ``k`` out of range.

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

    def __post_init__(self) -> None:
        features = self.W_enc.shape[-1]
        expected = {
            "b_enc": (features,),
            "W_dec": (features, self.W_dec.shape[-1]),
            "b_dec": (self.W_dec.shape[-1],),
            "threshold": (features,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if self.subtract_b_dec and self.W_enc.shape[0] != self.b_dec.shape[0]:
            raise InputError("subtract_b_dec is for autoencoders; this coder's widths differ")
        if self.k is not None and not 1 <= self.k <= features:
            raise InputError(f"k is {self.k}, expected 1 to {features} (the features)")

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... features"]:
        """The activations of all features. Differentiable.

        Raises:
            InputError: another width than the coder reads.
        """
        if x.shape[-1] != self.W_enc.shape[0]:
            raise InputError(
                f"{self.name} reads {self.W_enc.shape[0]} values a position, "
                f"{self.hook} has {x.shape[-1]}"
            )
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

    def decode(self, activations: Float[Tensor, "... features"]) -> Float[Tensor, "... d_out"]:
        """The sum of the vectors that the features write, and ``b_dec``."""
        return activations @ self.W_dec.to(activations) + self.b_dec.to(activations)

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
