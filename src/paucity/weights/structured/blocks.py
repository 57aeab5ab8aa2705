"""Whole layers of a model: taken out, with the configuration and the cache's numbering following, or zeroed."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checks import check_int, fail
from ...models.blocks import block_path
from ...models.sites import find_sites
from ...models.text_config import text_config
from .surgery import Surgery

_PROJECTIONS = ("linear", "router")


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the blocks in their order.

    Raises:
        InputError: if they are not one ``nn.ModuleList`` that the configuration counts.
    """
    sites = [site for site in find_sites(model) if site.layer is not None]
    lists = {block_path(site).rpartition(".")[0] for site in sites}
    count = getattr(text_config(model), "num_hidden_layers", None) if hasattr(model, "config") else None
    if len(lists) == 1:
        path = next(iter(lists))
        container = model.get_submodule(path)
        if isinstance(container, nn.ModuleList) and len(container) == count:
            return [f"{path}.{index}" for index in range(len(container))]
    raise fail(
        "block_paths", "model", "hold its layers in one list of num_hidden_layers", ", ".join(sorted(lists)) or "none"
    )


def check_layers(function: str, model: nn.Module, layers: Collection[int]) -> list[str]:
    """Paths of the layers to remove, checked: some are there, and at least one stays."""
    paths = block_paths(model)
    for layer in layers:
        check_int(function, "layers", layer, 0, len(paths) - 1)
    if len(set(layers)) != len(layers):
        raise fail(function, "layers", "name every layer once", list(layers))
    if len(layers) >= len(paths):
        raise fail(function, "layers", f"leave at least one of {len(paths)} layers", f"all {len(layers)}")
    return [paths[layer] for layer in layers]


def cut_layers(surgery: Surgery, model: PreTrainedModel, layers: Collection[int]) -> dict[str, object]:
    """Take layers out and number the others anew; returns what the configuration must say.

    Lists of the configuration with an entry for each layer lose those entries. Which layers of a mixture are dense
    is written out as ``mlp_only_layers``.
    """
    container_path = block_paths(model)[0].rpartition(".")[0]
    container, config = model.get_submodule(container_path), text_config(model)
    stay = [index for index in range(len(container)) if index not in set(layers)]
    values: dict[str, object] = {"num_hidden_layers": len(stay)}
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == len(container):
            values[name] = [value[index] for index in stay]
    if hasattr(config, "mlp_only_layers"):
        dense = [new for new, old in enumerate(stay) if not _is_mixture(container[old])]
        values |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    parent, _, name = container_path.rpartition(".")
    surgery.set(model.get_submodule(parent), name, nn.ModuleList([container[index] for index in stay]))
    for new, old in enumerate(stay):
        for module in container[old].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                surgery.set(module, "layer_idx", new)
    return values


def layer_masks(model: nn.Module, paths: Collection[str]) -> dict[str, Tensor]:
    """Masks that remove every projection of the blocks, with its bias: what is left of a block is its residual."""
    masks: dict[str, Tensor] = {}
    present = {site.kind for site in find_sites(model)}
    kinds = [kind for kind in _PROJECTIONS if kind == "linear" or kind in present]
    for site in find_sites(model, kinds):
        if site.layer is not None and block_path(site) in paths:
            owner = model.get_submodule(site.module)
            for name, parameter in owner.named_parameters(recurse=False):
                masks[f"{site.module}.{name}"] = torch.zeros_like(parameter, dtype=torch.bool)
    return masks


def check_passes_through(model: nn.Module, paths: Collection[str]) -> None:
    """Refuse blocks that change what goes through them: a norm behind the residual, for one, is no residual block."""
    bad: list[str] = []

    def compare(path: str, module: nn.Module, inputs: Tensor, output: Tensor | tuple[Tensor, ...]) -> None:
        if not torch.equal(inputs, output[0] if isinstance(output, tuple) else output):
            bad.append(path)

    handles = [
        model.get_submodule(path).register_forward_hook(_Compare(path, compare), with_kwargs=True) for path in paths
    ]
    try:
        with torch.no_grad():
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device), use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        raise fail("zero", "layers", "be residual blocks, which pass their input on when they are zero", ", ".join(bad))


class _Compare:
    """A forward hook with a path that finds the hidden states among the arguments."""

    def __init__(self, path: str, compare: object) -> None:
        self.path, self.compare = path, compare

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        self.compare(self.path, module, inputs, output)  # type: ignore[operator]


def _is_mixture(block: nn.Module) -> bool:
    return any("Experts" in type(module).__name__ or "SparseMoe" in type(module).__name__ for module in block.modules())
