"""The configuration of the part of a model that reads text, and its attention."""

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """That of a Hugging Face model, or of the language model within one of images or sound and text."""
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def set_implementation(model: nn.Module, name: str) -> None:
    """Set the attention of the language model; towers for images or sound keep theirs."""
    config, text = model.config, text_config(model)
    keys = [key for key in config.sub_configs if getattr(config, key) is text]  # type: ignore[union-attr]
    model.set_attn_implementation({keys[0]: name} if keys else name)  # type: ignore[operator]
