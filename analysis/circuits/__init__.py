"""Which components carry a behaviour: node and edge scores, pruning, path patching."""

from lenslrp.analysis.circuits.curves import faithfulness_curve
from lenslrp.analysis.circuits.edges import EdgeScores, score_edges
from lenslrp.analysis.circuits.ensembles import ensemble
from lenslrp.analysis.circuits.export import to_transformer_lens
from lenslrp.analysis.circuits.figures import faithfulness_curves, head_scores
from lenslrp.analysis.circuits.graph.cost import GraphEstimate
from lenslrp.analysis.circuits.graph.graphs import attribution_graph, estimate_graph
from lenslrp.analysis.circuits.graph.result import AttributionGraph
from lenslrp.analysis.circuits.greedy import GreedySelection, greedy_circuit
from lenslrp.analysis.circuits.masks import learn_masks
from lenslrp.analysis.circuits.metrics import METRICS, Metric
from lenslrp.analysis.circuits.mib import from_mib, to_mib
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.analysis.circuits.pairs import Pairs, template_pairs
from lenslrp.analysis.circuits.pruning import (
    Circuit,
    Verdict,
    completeness,
    minimality,
    prune,
    verify,
)
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from lenslrp.analysis.circuits.solved import TaskWarning

__all__ = [
    "METRICS",
    "TARGET",
    "AttributionGraph",
    "Circuit",
    "EdgeScores",
    "GraphEstimate",
    "GreedySelection",
    "Metric",
    "Node",
    "NodeScores",
    "Pairs",
    "TaskWarning",
    "Verdict",
    "attribution_graph",
    "completeness",
    "ensemble",
    "estimate_graph",
    "faithfulness_curve",
    "faithfulness_curves",
    "from_mib",
    "greedy_circuit",
    "head_scores",
    "learn_masks",
    "minimality",
    "prune",
    "score_edges",
    "score_nodes",
    "template_pairs",
    "to_mib",
    "to_transformer_lens",
    "verify",
]
