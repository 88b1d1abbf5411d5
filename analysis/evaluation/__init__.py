"""How faithful attributions are: the harness, perturbation curves, sanity checks, tasks."""

from lenslrp.analysis.evaluation.faithfulness import aopc, aopc_bounds, curves, normalised_aopc
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.evaluation.figures import perturbation_curves
from lenslrp.analysis.evaluation.harness import Perturbation, evaluate
from lenslrp.analysis.evaluation.hop_check import check_hops
from lenslrp.analysis.evaluation.model_features import heads_of, unit_relevance
from lenslrp.analysis.evaluation.results import Results
from lenslrp.analysis.evaluation.sanity import randomisation, sensitivity
from lenslrp.analysis.evaluation.tasks import TASKS, Example, Task, Unfit, image_task

__all__ = [
    "TASKS",
    "Example",
    "Perturbation",
    "Results",
    "Task",
    "Unfit",
    "aopc",
    "aopc_bounds",
    "check_hops",
    "curves",
    "evaluate",
    "heads_of",
    "image_task",
    "normalised_aopc",
    "perturbation_curves",
    "randomisation",
    "sensitivity",
    "tokens_of",
    "unit_relevance",
]
