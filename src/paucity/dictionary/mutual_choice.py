"""Mutual choice: a batch shares one budget of entries, which go wherever pre-activations are highest.

Paper: Ayonrinde 2024, https://arxiv.org/abs/2411.02124: matching tokens with features is an allocation of ``k * batch``
entries without further constraint, so that hard tokens get more; with aux_zipf_loss (see `paucity.dictionary.usage`).
The selection is that of BatchTopK, whose threshold encodes each row for itself after training; what the paper does
then is not known to us, and no code is public.
"""

from typing import Any

from torch import Tensor

from ..ops.formats import Codes
from .base import Batch
from .batch_topk import BatchTopK
from .sae import Draft, Rule, SparseAutoencoder
from .usage import Usage


class MutualChoice(Rule):
    """Keep ``k`` a row on average of a batch of training, and what is above a threshold afterwards.

    Args:
        k: mean entries of a code, at most the atoms that there are.
        margin: share of its place on the Zipf curve below which an atom is trained on what the reconstruction misses;
            0 leaves aux_zipf_loss out, and only silent atoms are.
        rate: weight of a new batch in running means, once there were many.
    """

    def __init__(self, k: int = 32, *, margin: float = 0.5, rate: float = 0.01) -> None:
        super().__init__()
        self.choice, self.usage = BatchTopK(k, forget=rate), Usage(margin, rate)

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``."""
        self.choice.attach(sae)
        self.usage.attach(sae.dict_size)

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`; what is above the threshold, 0 before training."""
        return self.choice.encode(sae, x)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        draft = self.choice.train_codes(sae, batch)
        self.usage.observe(draft.codes)
        return draft

    def neglected(self, sae: SparseAutoencoder, batch: Batch) -> Tensor:
        """See `Rule.neglected`; aux_zipf_loss."""
        return self.usage.neglected(super().neglected(sae, batch), sae.k_aux)

    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`."""
        self.choice.rescale(factor)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.choice.k, "margin": self.usage.margin, "rate": self.usage.rate}
