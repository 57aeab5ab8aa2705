"""Speculative decoding without a second model: several tokens for each pass, none of them lost.

- `speculate`: the model with sparse attention drafts, the dense model verifies. MagicDec, Chen et al. 2024,
  https://arxiv.org/abs/2408.11049; TriForce, Sun et al. 2024, https://arxiv.org/abs/2404.11912.
- `prompt_decode`: trained prompt tokens guess ahead, and a dynamic sparse tree of guesses is verified in one pass. PPD,
  Chen et al. 2024, https://arxiv.org/abs/2405.18628.
"""

from .candidates import TreeState
from .drafting import Draft
from .fixed_trees import full_tree, random_tree, static_tree
from .latency import measure_tree_latency
from .ppd import TypicalAcceptance, prompt_decode
from .prompt_tokens import PromptTokens, accept_probabilities, train_prompt_tokens
from .result import Speculation
from .sparse_tree import DynamicTree, dynamic_tree, hardware_aware_tree
from .speculate import speculate
from .tree import tree_attention, tree_mask, tree_positions

__all__ = [
    "Draft",
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
