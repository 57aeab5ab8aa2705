"""What decoding costs, and what to do about it: the cost model of Kinetics for a model, a workload and a machine."""

from .predict import B200_INTENSITY, Seconds, attention_ratio, crossover, eflops, predict, total_seconds
from .reading import METHODS, Reading, block_topk, reading
from .recommend import BUDGETS, Plan, Recommendation, plans, recommend
from .shape import Shape, shape_of
from .work import Amount, Work, Workload, decode, generation, prefill

__all__ = [
    "B200_INTENSITY",
    "BUDGETS",
    "METHODS",
    "Amount",
    "Plan",
    "Reading",
    "Recommendation",
    "Seconds",
    "Shape",
    "Work",
    "Workload",
    "attention_ratio",
    "block_topk",
    "crossover",
    "decode",
    "eflops",
    "generation",
    "plans",
    "predict",
    "prefill",
    "reading",
    "recommend",
    "shape_of",
    "total_seconds",
]
