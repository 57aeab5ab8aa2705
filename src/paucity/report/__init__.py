"""report.json and report.html: what a run measured, dense against sparse."""

from .ability import Ability
from .console import console_table
from .environment import environment
from .page import render
from .patterns import picture_png
from .schema import (
    AttentionLayer,
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
    "Ability",
    "AttentionLayer",
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
    "picture_png",
    "render",
    "verdict",
]
