"""Gradients of a loss by the weights of a model, over the calibration batches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import fail
from ..models.sites import Site

Batch = Tensor | tuple[Tensor, Tensor]


def squared_gradients(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean over the batches of the squared gradient of the loss, by parameter name, float32 in its layout.

    The loss of a language model is that of predicting each next token; of any other model the batches are
    ``(inputs, labels)`` and it is the cross-entropy of the labels.

    Raises:
        InputError: if there are no labels where they are needed, or a gradient is not finite.
    """
    parameters = {site.name: model.get_parameter(site.name) for site in sites}
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    device = next(model.parameters()).device
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameters)
        with torch.enable_grad():
            for batch in batches:
                gradients = torch.autograd.grad(_loss(model, batch, device), list(parameters.values()))
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name] += gradient.float().square() / len(batches)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    for name, value in total.items():
        if not bool(value.isfinite().all()):
            raise fail("prune", "calibration", "give finite gradients", f"NaN or infinity at {name}")
    return total


def _loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    if isinstance(batch, tuple):
        return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device))
    if not isinstance(model, PreTrainedModel):
        raise fail("prune", "calibration", "hold (inputs, labels) where gradients are needed", "inputs alone")
    ids = batch.to(device)
    if ids.shape[1] < 2:
        raise fail("prune", "calibration", "have texts of at least 2 tokens where gradients are needed", ids.shape[1])
    output: Any = model(input_ids=ids, use_cache=False)
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
