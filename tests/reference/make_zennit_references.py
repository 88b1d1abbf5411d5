"""Make the stored zennit references that `tests/unit/hooks/test_convolution.py` compares with.

zennit 0.5.1 (Anders et al., 2106.13200) computes the relevance of the inputs of linear layers and
convolutions under its `Gamma`, `ZPlus` and `AlphaBeta` rules. Its `Gamma` is the generalised one,
for inputs and outputs of either sign (Andeol et al. 2021): the rule that LensLRP calls `Gamma` (Eq.
24 of AttnLRP's paper). The first gamma rule (Montavon et al. 2019) is what it is for inputs and
outputs that are not negative. zennit's `ZPlus` is our `AlphaBeta(1, 0)`, `AlphaBeta` our own.

zennit is LGPL and no dependency of LensLRP: this script runs in an environment of its own, stands
alone, and only numbers are committed:

    python -m venv zennit-env
    zennit-env/bin/pip install torch==2.13.0 numpy safetensors pillow
    zennit-env/bin/pip install --no-deps zennit==0.5.1 torchvision==0.28.0
    zennit-env/bin/python tests/reference/make_zennit_references.py            # write
    zennit-env/bin/python tests/reference/make_zennit_references.py --check    # compare only

A torchvision whose compiled operators do not load does not matter: none is ever called.

Written to `zennit_rules.safetensors`, in float64, for each layer of `LAYERS`: `<layer>.weight`,
`<layer>.bias`, `<layer>.x`, `<layer>.relevance` (of the output), and `<layer>.<rule>`, which is the
relevance of the input. `zennit_rules.json` has the layers' settings and the versions.
"""

import argparse
import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
NEEDED = {"torch": "2.13.0", "zennit": "0.5.1"}
TINY = 1e-20  # zennit's stabiliser: only a guard against an exact zero

# name: (class, settings, shape of the input)
LAYERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "linear": ("Linear", {"in_features": 9, "out_features": 7}, [3, 9]),
    "linear_no_bias": ("Linear", {"in_features": 9, "out_features": 7, "bias": False}, [3, 9]),
    "patches": (
        "Conv2d",
        {"in_channels": 3, "out_channels": 8, "kernel_size": 4, "stride": 4},
        [2, 3, 8, 12],
    ),
    "overlapping": (
        "Conv2d",
        {"in_channels": 2, "out_channels": 5, "kernel_size": 3, "stride": 2, "padding": 1},
        [2, 2, 7, 6],
    ),
    "grouped": (
        "Conv1d",
        {
            "in_channels": 6,
            "out_channels": 4,
            "kernel_size": 3,
            "padding": 2,
            "dilation": 2,
            "groups": 2,
            "bias": False,
        },
        [2, 6, 11],
    ),
    "waveform": (
        "Conv1d",
        {"in_channels": 1, "out_channels": 6, "kernel_size": 5, "stride": 3},
        [2, 1, 20],
    ),
}
RULES: dict[str, tuple[str, dict[str, float]]] = {
    "gamma_0.25": ("Gamma", {"gamma": 0.25}),
    "gamma_0.05": ("Gamma", {"gamma": 0.05}),
    "z_plus": ("ZPlus", {}),
    "alpha_beta": ("AlphaBeta", {"alpha": 2.0, "beta": 1.0}),
}
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def zennit_rules() -> Any:
    """`zennit.rules`; zennit imports torchvision, which stops at an operator that is not loaded."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("zennit.rules")


def explain(module: nn.Module, x: Tensor, relevance: Tensor, rule: Any) -> Tensor:
    """zennit's relevance of `x`: what its hook hands down as the gradient."""
    leaf = x.clone().requires_grad_()
    handles = rule.register(module)
    (received,) = torch.autograd.grad(module(leaf), leaf, relevance)
    handles.remove()
    return received.detach()


def make() -> dict[str, Tensor]:
    torch.manual_seed(20240717)
    stored = {}
    for name, (kind, settings, shape) in LAYERS.items():
        module = getattr(nn, kind)(**settings).double()
        x = torch.randn(shape, dtype=torch.float64)  # of either sign, as behind a LayerNorm
        relevance = torch.randn_like(module(x).detach())
        stored |= {f"{name}.{key}": value.detach() for key, value in module.named_parameters()}
        stored |= {f"{name}.x": x, f"{name}.relevance": relevance}
        for key, (rule, values) in RULES.items():
            hook = getattr(zennit_rules(), rule)(**values, stabilizer=TINY)
            stored[f"{name}.{key}"] = explain(module, x, relevance, hook)
    return {key: value.contiguous() for key, value in stored.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    check = parser.parse_args().check
    found = {name: version(name).split("+")[0] for name in NEEDED}
    if found != NEEDED:
        raise SystemExit(f"needs {NEEDED}, found {found}")
    path, stored = HERE / "zennit_rules.safetensors", make()
    if check:
        before = load_file(path)
        worst = max(float((before[key] - value).abs().max()) for key, value in stored.items())
        print(f"largest difference from {path.name}: {worst:.1e}")
        return
    save_file(stored, path)
    settings = {name: {"class": c, "settings": s} for name, (c, s, _) in LAYERS.items()}
    text = json.dumps({"versions": NEEDED, "layers": settings}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path.name}: {len(stored)} tensors")


if __name__ == "__main__":
    main()
