"""A Llama of 125 million random weights, on which pruning and decoding with packed weights are timed."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""113 million weights in the layers and 12 in the embedding, which is the output head as well."""


def llama125m(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> LlamaForCausalLM:
    """The model in eval mode, the same at every call; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, dtype=dtype))
    return model.to(dtype).eval()
