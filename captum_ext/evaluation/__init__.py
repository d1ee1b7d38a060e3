"""Methods x a data set x metrics: which map is better, on one picture or on a million."""

from captum_ext.evaluation.examples import Prepared
from captum_ext.evaluation.records import Explained
from captum_ext.evaluation.results import Band, Estimate, Summary, summary
from captum_ext.evaluation.run import evaluate

__all__ = ["Band", "Estimate", "Explained", "Prepared", "Summary", "evaluate", "summary"]
