"""The configuration of the part of a model that reads text."""

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """That of a Hugging Face model, or of the language model within one of images or sound and text."""
    return model.config.get_text_config()  # type: ignore[operator, union-attr]
