"""Training: the target writes answers, a draft learns them, and what it gains is measured."""

from vispec.train.collect import CollectConfig, collect
from vispec.train.config import FitConfig, read_config
from vispec.train.evaluate import evaluate
from vispec.train.fit import FitReport, fit
from vispec.train.sources import open_source

__all__ = ["CollectConfig", "FitConfig", "FitReport", "collect", "evaluate", "fit", "open_source", "read_config"]
