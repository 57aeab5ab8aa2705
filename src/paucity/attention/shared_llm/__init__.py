"""SharedLLM: context compressed into trees by a model's first layers and injected into the same layers.

Paper: Han et al. 2024, Two are better than one: Context window extension with multi-grained self-injection,
https://arxiv.org/abs/2410.19318.

    C_left = first b of the l tokens of C_parent, b = floor(l / 2 - eps)                  (1, `tree`)
    P_Q = n, P_K = 0 .. 0, 1 .. 1, .., n-1 .. n-1                                         (2, `lower`)
    O = cross_attn(Q, [K'_1; ..; K'_n], [V'_1; ..; V'_n])                                 (3, `inject`)

Not a step of a recipe: it is trained, and reads context and running text apart.

Differs from the paper: see `tree` (how a split's noise is drawn, which tokens stay). Not said there, and chosen here:
the cross-attention starts from copies of its layer's norm and query projection, and its output from zero. Differs from
the authors' code, which follows the paper elsewhere: queries stand at ``n`` (there at ``n + 1``), keys at the number of
their chunk alone (there turned on top of their place in the node), and the self-attention above the injected layers
learns too (there only the cross-attention).

Left out: padding in the context, and training of the lower model.
"""

from .inject import Memory
from .model import SharedLLM
from .options import SharedOptions
from .train import SharedTraining

__all__ = ["Memory", "SharedLLM", "SharedOptions", "SharedTraining"]
