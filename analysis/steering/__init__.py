"""Operations on units while a model reads and writes, their directions, sweeps and files."""

from lenslrp.analysis.steering.directions import (
    mean_activation,
    mean_difference,
    relevance_direction,
    unembedding_direction,
    written_by,
)
from lenslrp.analysis.steering.files import (
    load_control_vector,
    load_steering,
    save_control_vector,
    save_steering,
)
from lenslrp.analysis.steering.operations import (
    Ablate,
    Add,
    Clamp,
    ProjectOut,
    Scale,
    Steering,
    steer,
)
from lenslrp.analysis.steering.result import SweepResult
from lenslrp.analysis.steering.sweeps import sweep

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "ProjectOut",
    "Scale",
    "Steering",
    "SweepResult",
    "load_control_vector",
    "load_steering",
    "mean_activation",
    "mean_difference",
    "relevance_direction",
    "save_control_vector",
    "save_steering",
    "steer",
    "sweep",
    "unembedding_direction",
    "written_by",
]
