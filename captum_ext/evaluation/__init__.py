"""Methods x a data set x metrics: which map is better, on one picture or on a million."""

from captum_ext.evaluation.examples import Prepared
from captum_ext.evaluation.measures import Explained
from captum_ext.evaluation.results import Estimate, Summary, summary
from captum_ext.evaluation.run import evaluate

__all__ = ["Estimate", "Explained", "Prepared", "Summary", "evaluate", "summary"]
