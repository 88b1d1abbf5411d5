"""What several rooms use: tensors and tables on disk, records, statistics, templates."""

from lenslrp.analysis.common.templates import agreement, indirect_objects

__all__ = ["agreement", "indirect_objects"]
