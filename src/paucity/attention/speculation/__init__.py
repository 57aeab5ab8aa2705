"""Speculative decoding without a second model: a sparse draft of the same model, or prompt tokens in a sparse tree."""

from .fixed_trees import full_tree, random_tree, static_tree
from .ppd import TypicalAcceptance, measure_tree_latency, prompt_decode
from .prompt_tokens import PromptTokens, accept_probabilities, train_prompt_tokens
from .result import Speculation
from .sparse_tree import DynamicTree, TreeState, dynamic_tree, hardware_aware_tree
from .speculate import Drafting, speculate
from .tree import tree_attention, tree_mask, tree_positions

__all__ = [
    "Drafting",
    "DynamicTree",
    "PromptTokens",
    "Speculation",
    "TreeState",
    "TypicalAcceptance",
    "accept_probabilities",
    "dynamic_tree",
    "full_tree",
    "hardware_aware_tree",
    "measure_tree_latency",
    "prompt_decode",
    "random_tree",
    "speculate",
    "static_tree",
    "train_prompt_tokens",
    "tree_attention",
    "tree_mask",
    "tree_positions",
]
