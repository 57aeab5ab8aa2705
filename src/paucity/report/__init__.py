"""report.json and report.html: what a run measured, dense against sparse."""

from .console import console_table
from .environment import environment
from .page import render
from .schema import (
    Environment,
    Measurement,
    ModelFacts,
    PrefillTime,
    Report,
    Retrieval,
    StepRecord,
    TextFacts,
    TextUse,
    verdict,
)

__all__ = [
    "Environment",
    "Measurement",
    "ModelFacts",
    "PrefillTime",
    "Report",
    "Retrieval",
    "StepRecord",
    "TextFacts",
    "TextUse",
    "console_table",
    "environment",
    "render",
    "verdict",
]
