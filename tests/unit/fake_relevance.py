"""A stand-in for RelevanceCache: the interface that pictures read, filled with seeded numbers."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pandas as pd
import torch

from lenslrp.errors import InputError
from lenslrp.ledger import Ledger

EIFFEL = ["The", " Eiffel", " Tower", " is", " located", " in", " the", " city", " of"]
EIFFEL_RELEVANCE = [1.31, 4.92, 2.40, 0.42, -0.35, 0.61, -0.83, 1.77, 2.05]

# What a page must show as text: markup, quotes, direction, invisible and broken characters.
NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "<img src=x onerror=alert(2)>",
    "</span></div></td>",
    '" onmouseover="alert(3)',
    "{{ 7*7 }}{% raw %}",
    "&lt;b&gt;&amp;",
    "[bold red]x[/]",
    "$\\alpha$ $",
    "\u05e9\u05dc\u05d5\u05dd",
    " \u0645\u0631\u062d\u0628\u0627",
    "\u202eevil\u202c",
    "\U0001f600",
    "\u65e5\u672c",
    "\x00\x07\x1b[31m",
    "\u200b",
    "\ufeff",
    "",
    "\n",
    "\r\n\t",
    " ",
    "   ",
    "\u0301",
    "\ufffd",
    "\udc80",
]


@dataclass
class FakeRelevance:
    str_tokens: list
    tokens: torch.Tensor
    attention_mask: torch.Tensor
    layers: int = 12
    n_heads: int = 9
    missing: tuple = ()
    grid: None = None  # text
    seed: int = 0
    model_name: str = "HuggingFaceTB/SmolLM2-135M"
    dtype: str = "float32"
    composite: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="AttnLRP"))
    target: SimpleNamespace = None

    def __post_init__(self):
        if self.target is None:
            value = torch.full((len(self.str_tokens),), 17.4)
            text = "logit of ' Paris' at position -1"
            self.target = SimpleNamespace(text=text, value=value, asked=())

    @property
    def prompts(self):
        return ["".join(row) for row in self.str_tokens]

    def _need(self, name):
        if name in self.missing:
            raise InputError(f"{name} was not read")

    def _random(self, *shape, salt):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + salt))

    def heads(self, row=0):
        self._need("heads")
        values = self._random(self.layers, self.n_heads, salt=1) ** 3 * 0.2
        return pd.DataFrame(values.double().numpy())

    def residual(self, row=0):
        self._need("residual")
        tokens = self.tokens[row].nan_to_num()
        last = torch.zeros_like(tokens)
        last[-1] = tokens.sum()
        mix = torch.linspace(0, 1, self.layers + 1)[:, None] ** 2
        noise = 0.25 * self._random(self.layers + 1, len(tokens), salt=2) * (1 - mix)
        index = [*map(str, range(self.layers)), "final"]
        values = (tokens * (1 - mix) + last * mix + noise)[:, self.attention_mask[row].bool()]
        return pd.DataFrame(values.double().numpy(), index=index)

    def top(self, name, k=10, row=0):
        self._need(name)
        size = torch.linspace(1.4, 0.2, k) * torch.where(torch.arange(k) % 4 == 2, -1, 1)
        tokens = self.str_tokens[row]
        where = [(3 * index + 1) % len(tokens) for index in range(k)]
        return pd.DataFrame(
            {
                "layer": [(5 * index + 7) % self.layers for index in range(k)],
                "position": where,
                "token": [tokens[index] for index in where],
                "neuron": [(977 * index + 41) % 1536 for index in range(k)],
                "relevance": size.double().numpy(),
                "activation": (2 * self._random(k, salt=3)).double().numpy(),
            }
        )

    def ledger(self):
        self._need("ledger")
        table = pd.DataFrame(
            {"biases": [0.0] * self.layers, "softmax": [0.36] * self.layers},
            index=range(self.layers),
        )
        return Ledger(
            target=17.4, leaves=12.3 - 17.4 * 3.1e-8, biases=0.0, softmax=4.32, recurrence=0.0,
            positional=0.0, stabiliser=0.0, plain=0.0, nonlinear_target=0.78, table=table,
        )  # fmt: skip

    @property
    def coverage(self):
        sites = [
            {
                "hook": f"blocks.{layer}.{hook}",
                "component": component,
                "role": role,
                "rule": rule,
                "fired": 1,
            }
            for layer in range(self.layers)
            for hook, component, role, rule in (
                ("ln1.hook_out", "RMSNormalizationBridge", "norm", "normalisation_identity"),
                ("mlp.out.hook_in", "GatedMLPBridge", "gate", "uniform"),
                ("mlp.out.hook_in", "GatedMLPBridge", "activation", "identity"),
                ("attn.o.hook_in", "AttentionBridge", "attention_av", "uniform"),
            )
        ]
        off_path = ["blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"]
        return SimpleNamespace(
            sites=pd.DataFrame(sites), uncovered=[], off_path=off_path, notes=["a <note>"]
        )


def fake_relevance(tokens=EIFFEL, relevance=EIFFEL_RELEVANCE, mask=None, **options):
    """One row of tokens; relevance is seeded noise where it is None."""
    if relevance is None:
        relevance = torch.randn(len(tokens), generator=torch.Generator().manual_seed(7)).tolist()
    mask = [True] * len(tokens) if mask is None else mask
    return FakeRelevance([list(tokens)], torch.tensor([relevance]), torch.tensor([mask]), **options)
