"""Compare attribution methods on a data set, from one picture to millions, by several metrics."""

from typing import TYPE_CHECKING, Any

from captum_ext._deprecation import old_name
from captum_ext.evaluation.columns import ExplainedBatch
from captum_ext.evaluation.examples import PreparedExample
from captum_ext.evaluation.results import Band, Estimate, Summary, summary
from captum_ext.evaluation.run import evaluate

__all__ = [
    "Band",
    "Estimate",
    "ExplainedBatch",
    "PreparedExample",
    "Summary",
    "evaluate",
    "summary",
]

if not TYPE_CHECKING:  # for a type checker, unknown names stay errors

    def __getattr__(name: str) -> Any:
        """The classes by the names that they had in version 0.1."""
        return old_name(
            __name__, {"Prepared": "PreparedExample", "Explained": "ExplainedBatch"}, name
        )
