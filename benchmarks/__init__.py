"""Every measured number of the documentation, by the script that prints it.

``python -m benchmarks.GROUP.SCRIPT``, from the repository root; README.md has the list.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
"""Texts and images that are too large for the repository."""

RESULTS = ROOT / "benchmarks" / "results"
"""What takes long to measure, kept as it is made; ignored by git."""
