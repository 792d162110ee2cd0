"""Plain generation and vispec in turn in one process: the same tokens, and how much sooner?"""

from vispec.compare.audit import Audit, Departure, audit
from vispec.compare.run import Comparison, Run, compare
from vispec.compare.verdict import TIE_STEPS, Difference, find_difference, tie_limit

__all__ = [
    "TIE_STEPS",
    "Audit",
    "Comparison",
    "Departure",
    "Difference",
    "Run",
    "audit",
    "compare",
    "find_difference",
    "tie_limit",
]
