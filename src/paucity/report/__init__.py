"""report.json and report.html: what a run measured, dense against sparse."""

from .ability import Ability
from .console import console_table
from .environment import environment
from .images import BatchTime, ImageMeasurement, image_verdict
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
    "BatchTime",
    "Environment",
    "ImageMeasurement",
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
    "image_verdict",
    "picture_png",
    "render",
    "verdict",
]
