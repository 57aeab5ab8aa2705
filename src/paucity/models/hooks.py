"""What goes into the sites of a model, seen through forward pre-hooks.

The experts of a mixture live in one module, which gets all tokens with their routing; what each expert gets is worked
out again from that: the tokens routed to it, and for its down projection the intermediate of those tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..checks import InputError, check_int, fail
from .sites import Site, experts_are_transposed, weight_view

OnInput = Callable[[Site, Tensor, int | None], None]


@contextmanager
def capture_inputs(
    model: nn.Module, sites: Sequence[Site], on_input: OnInput, *, patches: bool = False
) -> Iterator[None]:
    """While the context is open, call ``on_input(site, inputs, expert)`` whenever a site's module runs.

    ``inputs`` is ``[num_tokens, in]`` in the model's dtype, batch and positions flattened (for a convolution all places
    of all images, channels last). ``expert`` is None, or the index of the expert, called for every expert in turn with
    the tokens routed to it, possibly none. With ``patches`` a convolution gives what each of its output places reads,
    ``[places, kernel * in / groups]``, channels last, padding included, and ``expert`` counts its groups. The hooks are
    gone afterwards, also after an exception.

    Raises:
        InputError: if a site is an embedding (its input is ids) or not in the model.
    """
    with ExitStack() as stack:
        for site in sites:
            if site.kind in ("embedding", "position_embedding"):
                raise fail("capture_inputs", "sites", "not hold embeddings, whose input is ids", site.name)
            weight_view(model, site)  # raises for a site of another model
            hook = partial(_on_forward, model, site, on_input, patches)
            module = model.get_submodule(site.module)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def input_norms(model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """L2 norm of every input feature over all tokens of ``batches``: root of the summed squares.

    Args:
        model: run as it is, without gradients; set it to eval mode before.
        sites: none of them an embedding.
        batches: ``input_ids`` ``[1, T]`` int64 for a language model, else the main input of the model's forward.

    Returns:
        ``{site.name: [in]}``, ``[num_experts, in]`` for experts, float32 on the weight's device. Squares are summed in
        float32 within a batch and in float64 over batches. An expert that got no token has norm 0.

    Raises:
        InputError: if there are no batches, or the model runs without using one of the sites.
    """
    totals: dict[str, Tensor] = {}

    def add(site: Site, inputs: Tensor, expert: int | None) -> None:
        squares = inputs.float().square().sum(0).double().cpu()
        if expert is None:
            totals[site.name] = totals.get(site.name, 0) + squares
            return
        if site.name not in totals:
            totals[site.name] = torch.zeros(weight_view(model, site).shape[0], squares.numel(), dtype=torch.float64)
        totals[site.name][expert] += squares

    _run("input_norms", model, sites, batches, add)
    return {site.name: totals[site.name].sqrt().float().to(weight_view(model, site).device) for site in sites}


def input_samples(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor], *, max_tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """A uniform random sample, without replacement, of the inputs of each site over all tokens of ``batches``.

    Sites that see the same tokens are sampled at the same positions. For experts the pairs of token and expert are
    pooled over the experts. At most ``max_tokens`` rows a site are held, plus those of one batch.

    Args:
        model: as for `input_norms`.
        sites: as for `input_norms`.
        batches: as for `input_norms`.
        max_tokens: rows to keep for each site, at least 1.
        seed: of the sample.

    Returns:
        ``{site.name: [n, in]}`` with ``n = min(max_tokens, tokens seen)``, in the order seen, in the model's dtype.

    Raises:
        InputError: as for `input_norms`, or if ``max_tokens`` is not a positive integer.
    """
    check_int("input_samples", "max_tokens", max_tokens)
    generators = {site.name: torch.Generator().manual_seed(seed) for site in sites}
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def add(site: Site, inputs: Tensor, expert: int | None) -> None:
        keys = torch.rand(inputs.shape[0], dtype=torch.float64, generator=generators[site.name])
        rows = inputs.detach()
        if site.name in kept:
            keys, rows = torch.cat([kept[site.name][0], keys]), torch.cat([kept[site.name][1], rows])
        # The rows with the smallest random keys are a uniform sample, whatever the number of rows to come.
        chosen = keys.topk(min(max_tokens, keys.numel()), largest=False).indices.sort().values
        kept[site.name] = keys[chosen], rows[chosen.to(rows.device)]

    _run("input_samples", model, sites, batches, add)
    return {site.name: kept[site.name][1] for site in sites}


def _run(function: str, model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor], on_input: OnInput) -> None:
    if len(batches) == 0:
        raise fail(function, "batches", "hold at least one batch", "none")
    seen: set[str] = set()

    def note(site: Site, inputs: Tensor, expert: int | None) -> None:
        seen.add(site.name)
        on_input(site, inputs, expert)

    device = next(model.parameters()).device
    with capture_inputs(model, sites, note), torch.no_grad():
        for batch in batches:
            run_model(model, sites, batch.to(device))
    unused = [site.name for site in sites if site.name not in seen]
    if unused:
        raise InputError(
            f"{function}: sites must be run by the model's forward, got {', '.join(unused)}, which are not."
        )


def run_model(model: nn.Module, sites: Sequence[Site], batch: Tensor) -> None:
    """Run ``model`` on a batch as far as any of ``sites`` needs it; no cache is used and nothing returned."""
    if not isinstance(model, PreTrainedModel):
        model(batch)
        return
    base = model.base_model
    if all(site.module.startswith(f"{model.base_model_prefix}.") for site in sites):
        model = base  # no logits: they are the largest tensor and nobody asks for them
    model(**model_inputs(model, batch))


def model_inputs(model: PreTrainedModel, batch: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """What a forward of a transformers model over ``batch`` is called with; no cache is used.

    The decoder of a model with an encoder reads the ``labels`` shifted by one, or, as in BART, a text itself.

    Args:
        model: with or without a head.
        batch: its main input: token ids, pixels, features of sound.
        labels: for the loss of the model's head.

    Raises:
        InputError: if the model takes token ids and gets something else.
    """
    if model.main_input_name == "input_ids" and batch.is_floating_point():
        raise fail("prune", "calibration", f"hold token ids for {type(model).__name__}", batch.dtype)
    inputs: dict[str, Any] = {model.main_input_name: batch}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known:
        inputs["use_cache"] = False
    if labels is not None:
        inputs["labels"] = labels
    elif "decoder_input_ids" in known:
        start = getattr(model.config, "decoder_start_token_id", None)
        first = torch.full((len(batch), 1), 0 if start is None else start, device=batch.device)
        inputs["decoder_input_ids"] = first if batch.is_floating_point() else torch.cat([first, batch[:, :-1]], 1)
    return inputs


def _on_forward(
    model: nn.Module,
    site: Site,
    on_input: OnInput,
    patches: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    values = [*args, *kwargs.values()]
    if site.kind in ("expert_gate_up", "expert_down"):
        routing = values[1] if len(values) > 1 else None
        for expert, inputs in _expert_inputs(model, site, module, values[0], routing):
            on_input(site, inputs, expert)
        return
    inputs = values[0].detach()
    if site.kind == "conv" and patches:
        for group, rows in enumerate(conv_patches(module, inputs)):
            on_input(site, rows, group)
        return
    if site.kind == "conv":
        weight = weight_view(model, site)
        inputs = inputs.movedim(1 - weight.ndim, -1)  # channels stand before the places, with or without a batch
    on_input(site, inputs.reshape(-1, inputs.shape[-1]), None)


def conv_patches(module: Any, inputs: Tensor) -> Tensor:
    """What every output place of a convolution reads.

    Args:
        module: ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``; its stride, padding, dilation and groups count.
        inputs: ``[N, in, *spatial]`` or ``[in, *spatial]``.

    Returns:
        ``[groups, N * places, kernel * in / groups]``; columns are the places of the kernel, and within one the
        channels of the group.
    """
    dims = len(module.kernel_size)
    x = inputs if inputs.ndim == dims + 2 else inputs.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    x = x.reshape(len(x), module.groups, -1, *x.shape[2:])  # [N, groups, channels, *places, *kernel]
    x = x.movedim(1, 0).movedim(2, -1)  # [groups, N, *places, *kernel, channels]
    return x.flatten(2 + dims).flatten(1, 1 + dims)


def _expert_inputs(
    model: nn.Module, site: Site, module: nn.Module, states: Tensor, routing: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """``states`` ``[n, hidden]`` and ``routing`` ``[n, top_k]`` (indices of experts) -> the inputs of each expert.

    Without routing (Llama 4) ``states`` are ``[num_experts * n, hidden]``, those of tokens routed elsewhere zero.
    """
    states, count = states.detach().reshape(-1, states.shape[-1]), weight_view(model, site).shape[0]
    for expert in range(count):
        if routing is None:
            inputs = states.view(count, -1, states.shape[-1])[expert]
            inputs = inputs[inputs.any(-1)]
        else:
            inputs = states[(routing.reshape(len(states), -1) == expert).any(-1)]
        yield expert, inputs if site.kind == "expert_gate_up" else _intermediate(module, inputs, expert)


@torch.no_grad()
def _intermediate(module: Any, inputs: Tensor, expert: int) -> Tensor:
    weight = module.gate_up_proj[expert].mT if experts_are_transposed(module) else module.gate_up_proj[expert]
    bias = module.gate_up_proj_bias[expert] if getattr(module, "has_bias", False) else None
    both = F.linear(inputs, weight, bias)
    if hasattr(module, "_apply_gate"):  # some architectures gate in a way of their own
        gated: Tensor = module._apply_gate(both)
        return gated
    gate, up = both.chunk(2, dim=-1)
    intermediate: Tensor = module.act_fn(gate) * up
    return intermediate
