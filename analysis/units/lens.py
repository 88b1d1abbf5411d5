"""The relevance lens: what a layer's residual stream becomes at the end, under LRP.

The logit lens unembeds a residual vector as if the layers in between did nothing. Under a
composite's rules every layer is linear at one input, with norms, patterns and gates held as the
rules say, so that the final residual at a position responds to the same position after layer l by
a matrix. Its mean over prompts and positions,

    J_l = E[ d resid_final[t] / d resid_l[t] ],        lens_l(h) = unembed(norm(J_l h + b_l)),

is the relevance lens. (A Jacobian lens, Gurnee et al. 2026, averages the plain Jacobian, summed
over later positions.) ``b_l`` is what the mean residual lacks, ``E[resid_final] - J_l E[resid_l]``;
it counts for states, not for a unit's vector.

How it is fitted is in `lenslrp.analysis.units.lens_fit`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenslrp.analysis.units.locations import blocks_name
from lenslrp.errors import InputError
from lenslrp.files import whole
from lenslrp.inputs import is_encoder_decoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import JacobianLens

LENS_FORMAT = "lenslrp.lens"
VERSION = 1
_FACTS = ("kind", "model", "composite", "layers", "positions", "seed")


@dataclass(frozen=True, eq=False)
class Lens:
    """One linear map a layer, from the residual stream after it to the final residual.

    Attributes:
        matrices: layer -> J, [d_model, d_model], acting on columns; the last layer has none, its
            map is the identity.
        biases: layer -> b, [d_model].
        noise: layer -> half the relative distance of the lenses of two splits of the prompts: the
            standard error of J, as a share of J, in the Frobenius norm.
        kind: ``"relevance"``, ``"ridge"`` or ``"jacobian"``.
        model: the name of the model that it was fitted on.
        composite: the rules under which it was fitted; empty for ridge.
        layers: how many blocks the model has.
        positions: over how many positions it was fitted.
        seed: of the random vectors of the fit.

    Examples:
        ```python
        lens = fit_relevance_lens(model, texts)
        lens.state(5, residual)     # [pos, d_model] after block 5 -> the expected final residual
        lens.transport(5, vectors)  # vectors that block 5 writes, as they arrive there
        Lens.load(lens.save("lens.safetensors"), model)
        ```
    """

    matrices: Mapping[int, Float[Tensor, "d_model d_model"]] = field(repr=False)
    biases: Mapping[int, Float[Tensor, " d_model"]] = field(repr=False)
    noise: Mapping[int, float] = field(repr=False)
    kind: str
    model: str
    composite: str
    layers: int
    positions: int
    seed: int

    def transport(
        self, layer: int, vectors: Float[Tensor, "*n d_model"]
    ) -> Float[Tensor, "*n d_model"]:
        """A unit's vectors, written by block ``layer``, as they arrive at the final residual.

        Raises:
            InputError: the lens has no such layer.
        """
        matrix = self._matrix(layer)
        return vectors if matrix is None else vectors @ matrix.to(vectors).mT

    carry = transport  # its name in 0.1

    def transport_back(
        self, layer: int, vectors: Float[Tensor, "*n d_model"]
    ) -> Float[Tensor, "*n d_model"]:
        """Directions of the final residual as directions of that after block ``layer``: v J.

        Raises:
            InputError: the lens has no such layer.
        """
        matrix = self._matrix(layer)
        return vectors if matrix is None else vectors @ matrix.to(vectors)

    def state(
        self, layer: int, residual: Float[Tensor, "*n d_model"]
    ) -> Float[Tensor, "*n d_model"]:
        """The final residual to expect from the residual stream after block ``layer``.

        Raises:
            InputError: the lens has no such layer.
        """
        final = self.transport(layer, residual)
        return final if layer == self.layers - 1 else final + self.biases[layer].to(final)

    def _matrix(self, layer: int) -> Tensor | None:
        if layer == self.layers - 1:
            return None
        if layer not in self.matrices:
            raise InputError(
                f"the lens has no layer {layer}; it has {', '.join(map(str, self.matrices))}"
            )
        return self.matrices[layer]

    def to_transformer_lens(self) -> JacobianLens:
        """TransformerLens' lens with the same matrices: its readouts and its hooks.

        It has no biases, so its readouts of states are those of `transport`, not of `state`.

        Raises:
            InputError: a model of one layer, of which TransformerLens has no lens.

        Examples:
            >>> theirs = lens.to_transformer_lens()
            >>> with model.hooks(fwd_hooks=theirs.swap_hooks(model, " France", " China", [12])):
            ...     logits = model(prompt)
        """
        from transformer_lens.tools.analysis import JacobianLens

        if not self.matrices:
            raise InputError("a lens of TransformerLens has one layer at least; this has none")
        about = {"model_name": self.model, "target_layer": self.layers - 1,
                 "estimator": f"lenslrp {self.kind}", "composite": self.composite,
                 "positions": self.positions, "seed": self.seed}  # fmt: skip
        width = next(iter(self.matrices.values())).shape[0]
        return JacobianLens(dict(self.matrices), n_prompts=0, d_model=width, metadata=about)

    @classmethod
    def from_transformer_lens(cls, lens: JacobianLens, model: TransformerBridge) -> Lens:
        """A lens that TransformerLens has fitted or loaded, for `writes` and what takes a `Lens`.

        Its biases are 0, and ``noise``, which it does not say, is not a number.

        Raises:
            InputError: a lens of a model of another name or size than this one's.
        """
        found = cls(
            {layer: lens.jacobians[layer] for layer in lens.source_layers},
            {layer: torch.zeros(lens.d_model) for layer in lens.source_layers},
            dict.fromkeys(lens.source_layers, float("nan")),
            kind="jacobian",
            model=str(lens.metadata.get("model_name") or model.cfg.model_name),
            composite="",
            layers=int(lens.metadata.get("target_layer", len(blocks_of(model)) - 1)) + 1,
            positions=0,
            seed=0,
        )
        found.require(model)
        return found

    def save(self, path: str | Path) -> Path:
        """Write safetensors with the lens' facts as metadata; the file is replaced when complete.

        Raises:
            InputError: the folder does not exist.
        """
        path = Path(path)
        tensors = {f"matrix.{k}": v.cpu().contiguous() for k, v in self.matrices.items()}
        tensors |= {f"bias.{k}": v.cpu().contiguous() for k, v in self.biases.items()}
        facts = {name: getattr(self, name) for name in _FACTS}
        facts["noise"] = {str(k): v for k, v in self.noise.items()}
        manifest = {"format": LENS_FORMAT, "version": VERSION, **facts}
        with whole(path, ours=b'"manifest"') as part:
            save_file(tensors, part, metadata={"manifest": json.dumps(manifest)})
        return path

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge | None = None) -> Lens:
        """Read what `save` wrote.

        Args:
            model: refuse a lens of a model of another name or size than this one's.

        Raises:
            InputError: no such file, another kind of file, tensors that do not fit the manifest,
                or another model.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no file {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                manifest = _manifest(path, file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
        parts: dict[str, dict[int, Tensor]] = {"matrix": {}, "bias": {}}
        for name, tensor in tensors.items():
            part, _, layer = name.partition(".")
            if part not in parts or not layer.isdigit() or int(layer) >= manifest["layers"]:
                raise InputError(f"{path} holds a tensor that no lens has: {name!r}")
            parts[part][int(layer)] = tensor
        widths = {t.shape[-1] for t in tensors.values()}
        shapes = {tuple(t.shape) for t in parts["matrix"].values()}
        if parts["matrix"].keys() != parts["bias"].keys() or len(widths) != 1:
            raise InputError(f"{path}: matrices and biases are not of the same layers and widths")
        if shapes != {(next(iter(widths)),) * 2}:
            raise InputError(f"{path}: matrices of shapes {sorted(shapes)}, expected square ones")
        facts = {name: manifest[name] for name in _FACTS}
        noise = {int(layer): float(value) for layer, value in manifest["noise"].items()}
        order = sorted(parts["matrix"])
        lens = cls({k: parts["matrix"][k] for k in order}, {k: parts["bias"][k] for k in order},
                   noise, **facts)  # fmt: skip
        if model is not None:
            lens.require(model)
        return lens

    def require(self, model: TransformerBridge) -> None:
        """Refuse a model that is not the one it was fitted on, by name and size.

        Raises:
            InputError: another model.
        """
        width = next(iter(self.biases.values())).shape[0]
        actual = (str(model.cfg.model_name), len(blocks_of(model)), int(model.cfg.d_model))
        fitted = (self.model, self.layers, width)
        if actual != fitted:
            raise InputError(
                f"the lens was fitted on {fitted[0]!r} ({fitted[1]} layers, d_model {fitted[2]}); "
                f"this is {actual[0]!r} ({actual[1]} layers, d_model {actual[2]})"
            )


def blocks_of(model: TransformerBridge) -> Any:
    """The blocks of a model of one stack.

    Raises:
        InputError: an encoder-decoder.
    """
    if is_encoder_decoder(model):
        raise InputError(
            "lenses are for models of one stack: in an encoder-decoder the final residual depends "
            "on the encoder too"
        )
    return getattr(model, blocks_name(model))


def _manifest(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        manifest = json.loads((metadata or {}).get("manifest", "null"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no lens: its manifest is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != LENS_FORMAT:
        raise InputError(f"{path} is no lens: it has no {LENS_FORMAT} manifest")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} is a lens of version {manifest.get('version')!r}; this reads {VERSION}"
        )
    kinds = {"layers": int, "positions": int, "seed": int, "noise": dict}
    for name in (*_FACTS, "noise"):
        if not isinstance(manifest.get(name), kinds.get(name, str)):
            raise InputError(f"{path}: the manifest has no {name}, or of a wrong type")
    return manifest
