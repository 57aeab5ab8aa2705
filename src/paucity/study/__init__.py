"""Studies that compare many methods on many tasks: frontiers of quality against what is read, and against cost."""

from .methods import METHODS_AT, Knob
from .plan import Cell, Line, Study, default_study
from .results import CostRow, Result, Row
from .run import run
from .worker import Worker

__all__ = ["METHODS_AT", "Cell", "CostRow", "Knob", "Line", "Result", "Row", "Study", "Worker", "default_study", "run"]
