"""What relevance means: units and their vocabulary, lenses, evaluation, circuits, steering, views.

Imported as ``lenslrp.analysis``; the folder is named ``analysis`` at the top of the repository.
Its public names come from the rooms, each imported when first used, as in `lenslrp`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lenslrp.former import FormerModule

if TYPE_CHECKING:
    from lenslrp.analysis.attribution import (
        METHODS,
        Attribution,
        FeatureRelevance,
        Method,
        TokenPairs,
        attribute,
        bilrp,
        feature_relevance,
    )
    from lenslrp.analysis.circuits import (
        TARGET,
        AttributionGraph,
        Circuit,
        EdgeScores,
        GraphEstimate,
        Node,
        NodeScores,
        Pairs,
        attribution_graph,
        completeness,
        estimate_graph,
        faithfulness_curve,
        faithfulness_curves,
        head_scores,
        minimality,
        prune,
        score_edges,
        score_nodes,
        template_pairs,
        to_transformer_lens,
        verify,
    )
    from lenslrp.analysis.common import agreement, indirect_objects
    from lenslrp.analysis.dictionary import (
        LanguageModel,
        NeuronDictionary,
        Page,
        TokenRule,
        build_distributed,
        build_with_ray,
        explain_with_ray,
        export_html,
        export_neuronpedia,
        name_unit,
        page_html,
        prepare,
        scan_shard,
        write_page,
    )
    from lenslrp.analysis.evaluation import (
        TASKS,
        Example,
        Perturbation,
        Results,
        Task,
        Unfit,
        aopc,
        aopc_bounds,
        curves,
        evaluate,
        heads_of,
        image_task,
        normalised_aopc,
        perturbation_curves,
        randomisation,
        sensitivity,
        tokens_of,
        unit_relevance,
    )
    from lenslrp.analysis.passes import Edit, as_prompt, edit_units, through
    from lenslrp.analysis.steering import (
        Ablate,
        Add,
        Clamp,
        ProjectOut,
        Scale,
        Steering,
        SweepResult,
        load_control_vector,
        load_steering,
        mean_activation,
        mean_difference,
        relevance_direction,
        save_control_vector,
        save_steering,
        steer,
        sweep,
        unembedding_direction,
        written_by,
    )
    from lenslrp.analysis.units import (
        CrossLayerCoder,
        Direction,
        Feature,
        Head,
        Lens,
        Neuron,
        SparseCoder,
        Unit,
        VocabularyScores,
        compare_lenses,
        cosines,
        fit_relevance_lens,
        fit_ridge_lens,
        neuron_writes,
        parse_unit,
        reads,
        sign_cases,
        writes,
    )
    from lenslrp.analysis.views import attention_relevance, write_report

_ROOMS = {
    "common": ("agreement", "indirect_objects"),
    "units": (
        "CrossLayerCoder", "Direction", "Feature", "Head", "Lens", "Neuron", "SparseCoder", "Unit",
        "VocabularyScores", "compare_lenses", "cosines", "fit_relevance_lens", "fit_ridge_lens",
        "neuron_writes", "parse_unit", "reads", "sign_cases", "writes",
    ),
    "passes": ("Edit", "as_prompt", "edit_units", "through"),
    "attribution": (
        "METHODS", "Attribution", "FeatureRelevance", "Method", "TokenPairs", "attribute", "bilrp",
        "feature_relevance",
    ),
    "evaluation": (
        "TASKS", "Example", "Perturbation", "Results", "Task", "Unfit", "aopc", "aopc_bounds",
        "curves", "evaluate", "heads_of", "image_task", "normalised_aopc", "perturbation_curves",
        "randomisation", "sensitivity", "tokens_of", "unit_relevance",
    ),
    "circuits": (
        "TARGET", "AttributionGraph", "Circuit", "EdgeScores", "GraphEstimate", "Node",
        "NodeScores", "Pairs", "attribution_graph", "completeness", "estimate_graph",
        "faithfulness_curve", "faithfulness_curves", "head_scores", "minimality", "prune",
        "score_edges", "score_nodes", "template_pairs", "to_transformer_lens", "verify",
    ),
    "steering": (
        "Ablate", "Add", "Clamp", "ProjectOut", "Scale", "Steering", "SweepResult",
        "load_control_vector", "load_steering", "mean_activation", "mean_difference",
        "relevance_direction", "save_control_vector", "save_steering", "steer", "sweep",
        "unembedding_direction", "written_by",
    ),
    "dictionary": (
        "LanguageModel", "NeuronDictionary", "Page", "TokenRule", "build_distributed",
        "build_with_ray", "explain_with_ray", "export_html", "export_neuronpedia", "name_unit",
        "page_html", "prepare", "scan_shard", "write_page",
    ),
    "views": ("attention_relevance", "write_report"),
}  # fmt: skip

__all__ = [
    "METHODS",
    "TARGET",
    "TASKS",
    "Ablate",
    "Add",
    "Attribution",
    "AttributionGraph",
    "Circuit",
    "Clamp",
    "CrossLayerCoder",
    "Direction",
    "EdgeScores",
    "Edit",
    "Example",
    "Feature",
    "FeatureRelevance",
    "GraphEstimate",
    "Head",
    "LanguageModel",
    "Lens",
    "Method",
    "Neuron",
    "NeuronDictionary",
    "Node",
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
    "TokenPairs",
    "TokenRule",
    "Unfit",
    "Unit",
    "VocabularyScores",
    "agreement",
    "aopc",
    "aopc_bounds",
    "as_prompt",
    "attention_relevance",
    "attribute",
    "attribution_graph",
    "bilrp",
    "build_distributed",
    "build_with_ray",
    "compare_lenses",
    "completeness",
    "cosines",
    "curves",
    "edit_units",
    "estimate_graph",
    "evaluate",
    "explain_with_ray",
    "export_html",
    "export_neuronpedia",
    "faithfulness_curve",
    "faithfulness_curves",
    "feature_relevance",
    "fit_relevance_lens",
    "fit_ridge_lens",
    "head_scores",
    "heads_of",
    "image_task",
    "indirect_objects",
    "load_control_vector",
    "load_steering",
    "mean_activation",
    "mean_difference",
    "minimality",
    "name_unit",
    "neuron_writes",
    "normalised_aopc",
    "page_html",
    "parse_unit",
    "perturbation_curves",
    "prepare",
    "prune",
    "randomisation",
    "reads",
    "relevance_direction",
    "save_control_vector",
    "save_steering",
    "scan_shard",
    "score_edges",
    "score_nodes",
    "sensitivity",
    "sign_cases",
    "steer",
    "sweep",
    "template_pairs",
    "through",
    "to_transformer_lens",
    "tokens_of",
    "unembedding_direction",
    "unit_relevance",
    "verify",
    "write_page",
    "write_report",
    "writes",
    "written_by",
]

# Modules of this package that documentation of 0.1 imported from, and where they are now.
_FORMER = {
    "baselines": "lenslrp.analysis.attribution.methods",
    "circuit_plot": "lenslrp.analysis.circuits.figures",
    "circuitsvis_safe": "lenslrp.analysis.views.circuitsvis",
    "curve_plot": "lenslrp.analysis.evaluation.figures",
    "exports": "lenslrp.analysis.dictionary.export.folders",
    "faithfulness": "lenslrp.analysis.evaluation.faithfulness",
    "finding": "lenslrp.analysis.dictionary.text_search",
    "intervene": "lenslrp.edits",
    "job": "lenslrp.analysis.dictionary.job",
    "naming": "lenslrp.analysis.dictionary.naming.names",
    "nodes": "lenslrp.analysis.circuits.nodes",
    "pairs": "lenslrp.analysis.circuits.pairs",
    "perturb": "lenslrp.analysis.evaluation.features",
    "perturb_parts": "lenslrp.analysis.evaluation.model_features",
    "plots": "lenslrp.analysis.views",
    "prompts": "lenslrp.analysis.passes.prompts",
    "providers": "lenslrp.analysis.dictionary.naming.providers",
    "report": "lenslrp.analysis.views.report",
    "sanity": "lenslrp.analysis.evaluation.sanity",
    "search": "lenslrp.analysis.dictionary.scan",
    "templates": "lenslrp.analysis.common.templates",
    "unit_links": "lenslrp.analysis.dictionary.pages.links",
    "vocabulary": "lenslrp.analysis.units.projection",
}


for _name, _home in _FORMER.items():
    FormerModule(f"{__name__}.{_name}", _home, since="0.2")


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{room}"), name)
            globals()[name] = value
            return value
    if name in _FORMER:
        return sys.modules[f"{__name__}.{name}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
