"""Methods of attribution under one interface: AttnLRP, its variants and the baselines.

    attribute("integrated_gradients", model, "The capital of France is", " Paris").tokens

`METHODS` is the table. Each method gives every unit of the input (a token, a patch) one number;
the larger, the more the unit is evidence for the target. Only those that say so
(``docs/reference/baselines.md``) are in units of the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.attribution.attention import (
    atman,
    attention_rollout,
    gradient_x_attention_rollout,
)
from lenslrp.analysis.attribution.gradient import integrated_gradients, smoothgrad
from lenslrp.analysis.attribution.perturbation import kernel_shap, occlusion
from lenslrp.analysis.attribution.positional import pa_lrp
from lenslrp.analysis.attribution.softmax_ablations import (
    DistributedBiasAtSoftmax,
    IdentityAtSoftmax,
)
from lenslrp.analysis.passes.problems import (
    SEQUENCES_AT_ONCE,
    AttributionProblem,
    PassCount,
    resolve,
)
from lenslrp.errors import InputError
from lenslrp.extras import EXTRAS, require
from lenslrp.hooks.composites import (
    CPLRP,
    GIM,
    AttnLRP,
    AttnLRPViT,
    Composite,
    GradientTimesInput,
    RelP,
)
from lenslrp.hooks.rule_types import Plain
from lenslrp.targets import Explained
from lenslrp.views.batch import SHOWN_ROWS
from lenslrp.views.heatmap import token_heatmap

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MethodFunction = Callable[..., Tensor]
"""``(problem, *, seed, **options)`` to relevance of the units [batch, units], or of the pixels."""


@dataclass(frozen=True)
class Method:
    """One way to give the units of an input relevance.

    Called with a model and an input, it gives relevance [batch, units], as `attribute` does.

    Attributes:
        name: its key in `METHODS`.
        function: takes an `AttributionProblem`, ``seed=`` and the method's own keywords; returns
            relevance of the units [batch, units], or of the problem's inputs, of their shape.
        citation: the paper.
        needs: ``"patterns"`` (attention whose patterns the bridge can form at hook points),
            ``"captum"``.
        deterministic: whether the seed makes no difference.

    Examples:
        A method of your own, which rates a token by the length of its embedding:

        ```python
        def embedding_norm(problem, *, seed):
            return problem.vectors.norm(dim=-1)

        norm = Method("embedding_norm", embedding_norm, "chance, but for rare tokens")
        attribute(norm, model, "The capital of France is").tokens  # [1, 5], all >= 0
        ```
    """

    name: str
    function: MethodFunction
    citation: str
    needs: tuple[str, ...] = ()
    deterministic: bool = True

    def __call__(
        self, model: TransformerBridge, tokens: Any, target: Any = None, **context: Any
    ) -> Float[Tensor, "batch units"]:
        """Relevance of the tokens [batch, units]; arguments, errors as for `attribute`."""
        return attribute(self, model, tokens, target, **context).tokens

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its own keywords, beside those of `attribute`."""
        parameters = inspect.signature(self.function).parameters.values()
        keywords = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return tuple(name for name in keywords if name not in ("seed", "composite"))


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Relevance of the units of an input, as one method gives it.

    Attributes:
        tokens: [batch, units] relevance of each unit: a token (for an encoder-decoder, the
            encoder's), or a patch of an image, row by row. 0 for padding. In the method's own unit.
        mask: [batch, units], True where a unit is real.
        str_tokens: the units' names, for each row.
        method: the method's name.
        target: what exactly was explained, and its value in each row.
        passes: forward and backward passes of one sequence that one explanation took.
        pixels: for an image, where the method goes down to them: [batch, channel, height, width];
            ``tokens`` are their sums over patches.
        grid: rows and columns of an image's patches.
    """

    tokens: Float[Tensor, "batch units"]
    mask: Bool[Tensor, "batch units"]
    str_tokens: list[list[str]]
    method: str
    target: Explained
    passes: PassCount
    pixels: Float[Tensor, "batch channel height width"] | None = None
    grid: tuple[int, int] | None = None

    def __repr__(self) -> str:
        batch, units = self.tokens.shape
        return f"Attribution({self.method}, {self.target}, batch {batch}, {units} units)"

    def _repr_html_(self) -> str:
        """The first rows, each in a scale of its own."""
        return "".join(
            token_heatmap(
                tokens, self.tokens[row].tolist(), attention_mask=self.mask[row].tolist(),
                title=f"{self.method}: {self.target.of(row)} = {float(self.target.value[row]):.4g}",
                grid=self.grid,
            )
            for row, tokens in enumerate(self.str_tokens[:SHOWN_ROWS])
        )  # fmt: skip

    @property
    def patches(self) -> Float[Tensor, "batch rows columns"] | None:
        """``tokens`` as an image's grid; ``None`` for text."""
        return None if self.grid is None else self.tokens.unflatten(1, self.grid)


def attribute(
    method: str | Method | Composite,
    model: TransformerBridge,
    input: Any = None,
    target: Any = None,
    *,
    seed: int = 0,
    prepend_bos: bool | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
    pixel_values: Any = None,
    chunk: int = SEQUENCES_AT_ONCE,
    **options: Any,
) -> Attribution:
    """Relevance of every token (or patch) for a target, by any method.

    Args:
        method: a name in `METHODS`, a `Method`, or a composite of rules.
        model: a ``TransformerBridge``.
        input: text, token ids [batch, pos] or pixels, as for `lenslrp.run_with_relevance`.
        target: what is explained, as there; ``None`` is the top logit of the unchanged input.
        seed: for methods that draw random numbers; a row's relevance depends on its content and
            the seed, not on the batch it is in.
        prepend_bos: as for `lenslrp.run_with_relevance`.
        attention_mask: the same.
        inputs_embeds: the same.
        decoder_input: the same.
        pixel_values: the same.
        chunk: how many sequences run through the model at once.
        options: the method's own keywords, see `Method.options`.

    Returns:
        Relevance [batch, units]; padding has 0.

    Raises:
        InputError: an unknown method or option; what cannot be explained.
        MissingExtraError: the method needs a package that is not installed.
        CoverageError: an operation on the path has no rule, for methods that attach rules.

    Examples:
        ```python
        occluded = attribute("occlusion", model, "The capital of France is", " Paris")
        occluded.tokens      # [1, 5]: what the logit of " Paris" loses without each token
        occluded.str_tokens  # [["The", " capital", " of", " France", " is"]]
        ```
    """
    chosen = as_method(method)
    problem = resolve(
        model,
        input,
        target,
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        decoder_input=decoder_input,
        pixel_values=pixel_values,
        chunk=chunk,
    )
    return run_method(chosen, problem, seed=seed, **options)


def run_method(
    method: str | Method | Composite, problem: AttributionProblem, *, seed: int = 0, **options: Any
) -> Attribution:
    """`attribute`, for an input and a target that are resolved already."""
    chosen = as_method(method)
    unknown = [name for name in options if name not in chosen.options]
    if unknown:
        known = ", ".join(chosen.options) or "none"
        raise InputError(f"{chosen.name} has no option {unknown[0]!r}; its options: {known}")
    relevance = chosen.function(problem, seed=seed, **options).detach()
    relevance = relevance.to(torch.promote_types(problem.inputs.dtype, torch.float32))
    pixels = relevance if relevance.shape == problem.inputs.shape and relevance.ndim == 4 else None
    tokens = problem.summed(relevance) if relevance.ndim > 2 else relevance
    return Attribution(
        tokens.masked_fill(~problem.mask, 0.0),
        problem.mask,
        problem.units,
        chosen.name,
        problem.explained,
        problem.passes,
        pixels,
        problem.grid,
    )


def as_method(method: str | Method | Composite) -> Method:
    """A `Method`: one of `METHODS` by its name, one of a composite's rules, or as it is.

    Raises:
        InputError: an unknown name, or anything else.
        MissingExtraError: it needs a package that is not installed.
    """
    if isinstance(method, Composite):
        return Method(method.name, partial(rules, composite=method), "a composite of rules")
    if isinstance(method, str) and method in METHODS:
        method = METHODS[method]
    if not isinstance(method, Method):
        raise InputError(f"no method {method!r}; the methods are {', '.join(METHODS)}")
    for package in EXTRAS.keys() & method.needs:
        require(package, method.name)
    return method


def rules(problem: AttributionProblem, *, seed: int, composite: Composite) -> Tensor:
    """Relevance under a composite's rules: one forward and one backward pass."""
    cache = problem.relevance(composite)
    return cache.tokens if cache.pixels is None else cache.pixels


def random(problem: AttributionProblem, *, seed: int) -> Float[Tensor, "batch units"]:
    """Standard normal numbers: chance level."""
    batch, units = problem.mask.shape
    relevance = torch.zeros(batch, units)
    for row in range(batch):
        real = problem.mask[row].cpu()
        relevance[row, real] = torch.randn(int(real.sum()), generator=problem.generator(row, seed))
    return relevance.to(problem.inputs.device)


def _rules(name: str, composite: Composite, citation: str) -> Method:
    return Method(name, partial(rules, composite=composite), citation)


def epsilon_lrp() -> Composite:
    """LRP as it was before transformers: epsilon for linear layers, identity for activations.

    What it had no rule for (softmax, products, norms) has the plain gradient, as in the LRP that
    Ali et al. 2022 compare theirs with.
    """
    table = {**GradientTimesInput().rules, "activation": AttnLRP()["activation"]}
    return Composite("epsilon-LRP", table)


_ATTNLRP = "Achtibat et al. 2024, arXiv:2402.05602"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("random", random, "chance", deterministic=False),
        _rules(
            "gradient_x_input",
            GradientTimesInput(),
            "Shrikumar et al. 2016, arXiv:1605.01713",
        ),
        Method(
            "integrated_gradients",
            integrated_gradients,
            "Sundararajan et al. 2017, arXiv:1703.01365",
            needs=("captum",),
        ),
        Method(
            "smoothgrad",
            smoothgrad,
            "Smilkov et al. 2017, arXiv:1706.03825",
            deterministic=False,
        ),
        Method(
            "attention_rollout",
            attention_rollout,
            "Abnar & Zuidema 2020, arXiv:2005.00928",
            needs=("patterns",),
        ),
        Method(
            "gradient_x_attention_rollout",
            gradient_x_attention_rollout,
            "Chefer et al. 2021, arXiv:2103.15679",
            needs=("patterns",),
        ),
        Method("atman", atman, "Deb et al. 2023, arXiv:2301.08110", needs=("patterns",)),
        Method("occlusion", occlusion, "Zeiler & Fergus 2014, arXiv:1311.2901"),
        Method(
            "kernel_shap",
            kernel_shap,
            "Lundberg & Lee 2017, arXiv:1705.07874",
            deterministic=False,
        ),
        _rules("epsilon_lrp", epsilon_lrp(), "Bach et al. 2015, PLoS ONE 10(7)"),
        _rules("cp_lrp", CPLRP(), "Ali et al. 2022, arXiv:2202.07304"),
        _rules("relp", RelP(), "Rezaei Jafari et al. 2025, arXiv:2508.21258"),
        _rules("gim", GIM(), "Edin et al. 2025, arXiv:2505.17630"),
        _rules("attnlrp", AttnLRP(), _ATTNLRP),
        Method("attnlrp_positional", pa_lrp, "Bakish et al. 2025, arXiv:2506.02138"),
        _rules("attnlrp_gamma", AttnLRPViT(), f"{_ATTNLRP}, App. B.4"),
        _rules(
            "attnlrp_plain_activation",
            Composite("AttnLRP, plain activation", {"activation": Plain()}),
            f"{_ATTNLRP}, less its identity rule",
        ),
        _rules("attnlrp_softmax_identity", IdentityAtSoftmax(), f"{_ATTNLRP}, an ablation"),
        _rules(
            "attnlrp_softmax_distributed",
            DistributedBiasAtSoftmax(),
            f"{_ATTNLRP}, an ablation",
        ),
    )
}
