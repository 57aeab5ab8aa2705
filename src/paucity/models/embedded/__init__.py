"""The embedded model: a small causal language model that ships in the package, so that everything runs offline.

Llama architecture, 4.5 M parameters in bfloat16, byte-level BPE of 4,096 tokens, context 8,192 (trained to 4,096). Its
data, training and quality are stated in ``CARD.md`` beside the weights; `train.train` makes it from nothing.
"""

from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def folder() -> Path:
    """The shipped Hugging Face folder."""
    return Path(str(resources.files(__package__) / "weights"))


def load_embedded(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model (in eval mode) and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder(), local_files_only=True)
