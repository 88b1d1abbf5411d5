"""What relevance means: units and their vocabulary, lenses, evaluation, plots and reports.

Imported as ``lenslrp.analysis``; the folder is named ``analysis`` at the top of the repository.
Public names are imported when first used, as in :mod:`lenslrp`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenslrp.analysis.baselines import METHODS, Attribution, Method, attribute
    from lenslrp.analysis.circuits import NodeScores, score_nodes
    from lenslrp.analysis.coders import SparseCoder
    from lenslrp.analysis.conditions import through
    from lenslrp.analysis.dictionary import NeuronDictionary
    from lenslrp.analysis.directions import (
        mean_activation,
        mean_difference,
        relevance_direction,
        unembedding_direction,
        written_by,
    )
    from lenslrp.analysis.edges import EdgeScores, score_edges
    from lenslrp.analysis.evaluation import Perturbation, evaluate
    from lenslrp.analysis.exports import export_html, export_neuronpedia
    from lenslrp.analysis.graph import AttributionGraph, attribution_graph
    from lenslrp.analysis.launch import build_distributed, build_with_ray, explain_with_ray
    from lenslrp.analysis.lens import Lens
    from lenslrp.analysis.lens_fit import compare_lenses, fit_relevance_lens, fit_ridge_lens
    from lenslrp.analysis.page import Page
    from lenslrp.analysis.pairs import Pairs, template_pairs
    from lenslrp.analysis.pruning import (
        Circuit,
        completeness,
        faithfulness_curve,
        minimality,
        prune,
        verify,
    )
    from lenslrp.analysis.results import Results
    from lenslrp.analysis.steering import (
        Ablate,
        Add,
        Clamp,
        ProjectOut,
        Scale,
        Steering,
        steer,
    )
    from lenslrp.analysis.steering_files import (
        load_control_vector,
        load_steering,
        save_control_vector,
        save_steering,
    )
    from lenslrp.analysis.steering_sweep import sweep
    from lenslrp.analysis.sweep_result import SweepResult
    from lenslrp.analysis.tasks import TASKS, Example, Task, Unfit, image_task
    from lenslrp.analysis.transformer_lens_results import to_transformer_lens
    from lenslrp.analysis.unit_page import page_html, write_page
    from lenslrp.analysis.units import Direction, Feature, Head, Neuron, Unit, parse_unit
    from lenslrp.analysis.vocabulary import VocabularyScores, cosines, reads, sign_cases, writes

_HOMES = {
    "baselines": ("METHODS", "Attribution", "Method", "attribute"),
    "circuits": ("NodeScores", "score_nodes"),
    "coders": ("SparseCoder",),
    "conditions": ("through",),
    "dictionary": ("NeuronDictionary",),
    "directions": (
        "mean_activation",
        "mean_difference",
        "relevance_direction",
        "unembedding_direction",
        "written_by",
    ),
    "edges": ("EdgeScores", "score_edges"),
    "evaluation": ("Perturbation", "evaluate"),
    "exports": ("export_html", "export_neuronpedia"),
    "graph": ("AttributionGraph", "attribution_graph"),
    "launch": ("build_distributed", "build_with_ray", "explain_with_ray"),
    "lens": ("Lens",),
    "lens_fit": ("compare_lenses", "fit_relevance_lens", "fit_ridge_lens"),
    "page": ("Page",),
    "pairs": ("Pairs", "template_pairs"),
    "pruning": (
        "Circuit",
        "completeness",
        "faithfulness_curve",
        "minimality",
        "prune",
        "verify",
    ),
    "results": ("Results",),
    "tasks": ("TASKS", "Example", "Task", "Unfit", "image_task"),
    "steering": ("Ablate", "Add", "Clamp", "ProjectOut", "Scale", "Steering", "steer"),
    "steering_files": (
        "load_control_vector",
        "load_steering",
        "save_control_vector",
        "save_steering",
    ),
    "steering_sweep": ("sweep",),
    "sweep_result": ("SweepResult",),
    "transformer_lens_results": ("to_transformer_lens",),
    "unit_page": ("page_html", "write_page"),
    "units": ("Direction", "Feature", "Head", "Neuron", "Unit", "parse_unit"),
    "vocabulary": ("VocabularyScores", "cosines", "reads", "sign_cases", "writes"),
}

__all__ = [
    "METHODS",
    "TASKS",
    "Ablate",
    "Add",
    "Attribution",
    "AttributionGraph",
    "Circuit",
    "Clamp",
    "Direction",
    "EdgeScores",
    "Example",
    "Feature",
    "Head",
    "Lens",
    "Method",
    "Neuron",
    "NeuronDictionary",
    "NodeScores",
    "Page",
    "Pairs",
    "Perturbation",
    "ProjectOut",
    "Results",
    "Scale",
    "SparseCoder",
    "Steering",
    "SweepResult",
    "Task",
    "Unfit",
    "Unit",
    "VocabularyScores",
    "attribute",
    "attribution_graph",
    "build_distributed",
    "build_with_ray",
    "compare_lenses",
    "completeness",
    "cosines",
    "evaluate",
    "explain_with_ray",
    "export_html",
    "export_neuronpedia",
    "faithfulness_curve",
    "fit_relevance_lens",
    "fit_ridge_lens",
    "image_task",
    "load_control_vector",
    "load_steering",
    "mean_activation",
    "mean_difference",
    "minimality",
    "page_html",
    "parse_unit",
    "prune",
    "reads",
    "relevance_direction",
    "save_control_vector",
    "save_steering",
    "score_edges",
    "score_nodes",
    "sign_cases",
    "steer",
    "sweep",
    "template_pairs",
    "through",
    "to_transformer_lens",
    "unembedding_direction",
    "verify",
    "write_page",
    "writes",
    "written_by",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"lenslrp.analysis.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'lenslrp.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
