"""What passes along each edge of a circuit: from one node's output straight to another's.

The effect of an edge ``u -> d`` is what the gap between answer and rival gains when ``d``, and it
alone, is computed from ``u`` as ``u`` is in the other run: along the residual stream and through
norms, past every other node. As for nodes (:mod:`lenslrp.analysis.circuits`) it is estimated by
activation difference times coefficient, or measured:

* **relevance patching** and **attribution patching**: the coefficient is that of relevance (or of
  the gradient; Syed et al. 2023) conditional on ``d``: a backward pass that starts at ``d`` with
  ``d``'s own coefficient and ends at the first nodes that it meets
  (:mod:`lenslrp.analysis.cut_pass`). One backward pass a downstream node, on a row of its own,
  gives the edges from all upstream nodes; what leaves a node sums to its node score;
* **exact** path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023): a forward pass in which
  ``u`` is as in the other run and all other nodes are held tells what ``d`` becomes, and a second
  one, with that ``d``, what the gap becomes. Norms are computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits import CHUNK, DIRECTIONS
from lenslrp.analysis.cut_pass import EMBEDDINGS, CutPass, coefficients, cut
from lenslrp.analysis.nodes import COMPONENTS, Node, Units, masking, place_components, read
from lenslrp.analysis.pairs import Pairs
from lenslrp.analysis.path_patching import exact_edges
from lenslrp.analysis.question import Passes
from lenslrp.analysis.block_pass import unembedding_at
from lenslrp.analysis.replaced import repeated
from lenslrp.errors import InputError
from lenslrp.hooks import Composite, GradientTimesInput, RelP
from lenslrp.hooks.components import layer_of
from lenslrp.inputs import prepare

Edge = tuple[Node, Node]

GAP = Node("gap", 0)
"""The downstream end of edges into the gap itself."""

METHODS = {"relevance": RelP, "attribution": GradientTimesInput, "exact": GradientTimesInput}
"""Method -> the rules of its coefficients (``"exact"`` has none)."""

MOST = 4096
"""More downstream nodes than this must be asked for by name."""
