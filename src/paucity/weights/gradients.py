"""Gradients of a loss by the weights of a model, over the calibration batches."""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import fail
from ..models.hooks import model_inputs
from ..models.sites import Site

Batch = Tensor | tuple[Tensor, Tensor]


def squared_gradients(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean over the batches of the squared gradient of the loss, by parameter name, float32 in its layout.

    The loss of a language model is that of predicting each next token; of any other model the batches are
    ``(inputs, labels)`` and it is the cross-entropy of the labels, or what a transformers model takes as its loss.

    Raises:
        InputError: if there are no labels where they are needed, the loss does not depend on a site, or a gradient is
            not finite.
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
                loss = _loss(model, batch, device)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is None:
                        raise fail("prune", "sites", "be used by the loss", name)
                    total[name] += gradient.float().square() / len(batches)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    for name, value in total.items():
        if not bool(value.isfinite().all()):
            raise fail("prune", "calibration", "give finite gradients", f"NaN or infinity at {name}")
    return total


def _loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    inputs, labels = (part.to(device) for part in batch) if isinstance(batch, tuple) else (batch.to(device), None)
    transformer = model if isinstance(model, PreTrainedModel) else None
    if labels is None and (transformer is None or transformer.main_input_name != "input_ids"):
        raise fail("prune", "calibration", "hold (inputs, labels) where gradients are needed", "inputs alone")
    if labels is None and inputs.shape[1] < 2:
        wanted = "have texts of at least 2 tokens where gradients are needed"
        raise fail("prune", "calibration", wanted, inputs.shape[1])
    if transformer is None:
        return F.cross_entropy(model(inputs), labels)  # type: ignore[arg-type]
    if "labels" not in inspect.signature(model.forward).parameters:
        raise fail("prune", "model", "have a head with a loss where gradients are needed", type(model).__name__)
    if labels is None and not transformer.config.is_encoder_decoder:
        logits: Tensor = model(**model_inputs(transformer, inputs)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())
    loss: Tensor = model(**model_inputs(transformer, inputs, inputs if labels is None else labels))[0]
    return loss
