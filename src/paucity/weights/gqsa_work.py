"""The walk of GQSA (https://arxiv.org/abs/2412.17560) through a model: block by block, then all blocks together."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import fail
from ..models.blocks import BlockCall, block_calls
from ..models.hooks import capture_inputs
from ..models.sites import Site
from .gqsa_tuning import GroupWeight, tune_block, tune_scales
from .matrices import as_matrices, from_matrices, num_matrices
from .statistics import InputNorm

if TYPE_CHECKING:
    from .gqsa import GqsaOptions


class Work:
    """The model on its way through both stages.

    Args:
        model: changed in place.
        options: of `paucity.weights.gqsa.gqsa`.
        batches: what the model takes.
        statistic: what to gather of the inputs of each matrix.
        choose: from a weight ``[matrices, rows, cols]`` and its statistics the groups kept, bool ``[matrices, rows,
            cols / group_size]``.
        advance: called with the work just done, in steps of one block.
    """

    def __init__(
        self,
        model: nn.Module,
        options: "GqsaOptions",
        batches: Sequence[Tensor],
        statistic: type[InputNorm],
        choose: Callable[[Tensor, Sequence[InputNorm]], Tensor],
        advance: Callable[[int], None],
    ) -> None:
        self.model, self.options, self.statistic, self.choose, self.advance = model, options, statistic, choose, advance
        self.generator = torch.Generator().manual_seed(options.seed)
        device = next(model.parameters()).device
        self.batches = [batch.to(device) for batch in batches]
        self.weights: dict[str, GroupWeight] = {}
        self.sites: dict[str, Site] = {}
        self.notes: list[str] = []

    def stage_1(self, blocks: list[tuple[str, list[Site]]]) -> dict[str, tuple[float, float]]:
        """Prune, quantise and train block by block; the error of each before and after."""
        noted = _noted_calls(self.model, [path for path, _ in blocks], self.batches)
        dense = [_hidden(call) for call in noted[blocks[0][0]]] if noted else []  # states of the dense model
        states = list(dense)  # those of the compressed one
        errors = {}
        for path, group in blocks:
            block = self.model.get_submodule(path)
            if noted is None:
                calls = block_calls(self.model, path, self.batches)
                dense = [call.run(block) for call in calls]
            else:
                bare = noted.pop(path)
                calls = [_with_hidden(call, hidden) for call, hidden in zip(bare, states, strict=True)]
                dense = [_with_hidden(call, hidden).run(block) for call, hidden in zip(bare, dense, strict=True)]
            self._group(block, group, calls)
            self.advance(1)
            weights = [self.weights[site.name] for site in group]
            errors[path] = tune_block(
                path,
                block,
                partial(self._tensors, group, path),
                weights,
                calls,
                dense,
                epochs=self.options.block_epochs,
                batch_size=self.options.batch_size,
                weight_lr=self.options.weight_lr,
                scale_lr=self.options.scale_lr,
                generator=self.generator,
                on_step=partial(self.advance, 1),
            )
            for weight in weights:
                weight.freeze()
            self.write(group)
            if noted:
                states = [call.run(block) for call in calls]
        return errors

    def stage_2(self, num_blocks: int) -> tuple[float, float]:
        """Train the scales of all weights; the loss before and after."""
        sites = list(self.sites.values())
        loss = tune_scales(
            self.model,
            partial(self._tensors, sites, ""),
            list(self.weights.values()),
            self.batches,
            steps=self.options.e2e_steps,
            batch_size=self.options.batch_size,
            lr=self.options.e2e_lr,
            generator=self.generator,
            on_step=partial(self.advance, num_blocks),
        )
        self.write(sites)
        return loss

    @torch.no_grad()
    def write(self, sites: Sequence[Site]) -> None:
        """Make the model's weights those of the stored form."""
        for site in sites:
            packed = self.weights[site.name].packed().unpack()
            self.model.get_parameter(site.name).copy_(from_matrices(self.model, site, packed))

    def _group(self, block: nn.Module, sites: list[Site], calls: list[BlockCall]) -> None:
        statistics: dict[str, list[InputNorm]] = {}

        def add(site: Site, inputs: Tensor, matrix: int | None) -> None:
            if site.name not in statistics:
                count = num_matrices(self.model, site)
                statistics[site.name] = [self.statistic(inputs.shape[-1]) for _ in range(count)]
            if len(inputs):
                statistics[site.name][matrix or 0].add(inputs.float())

        with capture_inputs(self.model, sites, add, patches=True):
            for call in calls:
                call.run(block)
        for site in sites:
            if site.name not in statistics:
                raise fail("gqsa", "sites", "be run by the model's forward", f"{site.name}, which is not")
            if not all(statistic.finite for statistic in statistics[site.name]):
                found = f"NaN or infinity at the input of {site.module}"
                raise fail("gqsa", "calibration", "give finite activations", found)
            stack = as_matrices(self.model, site)
            unseen = sum(not statistic.seen for statistic in statistics[site.name])
            if unseen:
                what = f"{unseen} of its matrices" if len(stack) > 1 else "it"
                self.notes.append(f"{site.name}: {what} got nothing but zeros in calibration and went by magnitude")
            kept = self.choose(stack, statistics[site.name])
            self.weights[site.name] = GroupWeight(stack.flatten(0, 1), kept.flatten(0, 1), self.options.bits)
            self.sites[site.name] = site

    def _tensors(self, sites: Sequence[Site], path: str) -> dict[str, Tensor]:
        prefix = f"{path}." if path else ""
        return {
            site.name.removeprefix(prefix): from_matrices(self.model, site, self.weights[site.name].dense())
            for site in sites
        }


class _Reached(Exception):
    """The rest of the forward is not needed."""


@torch.no_grad()
def _noted_calls(model: nn.Module, paths: list[str], batches: Sequence[Tensor]) -> dict[str, list[BlockCall]] | None:
    """What the blocks are called with in a forward of the dense model over each batch, hidden states only of the first.

    None unless each block takes the very tensor that the one before it gave, once.
    """
    noted: dict[str, list[BlockCall]] = {path: [] for path in paths}
    given: list[Tensor] = []

    def before(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = BlockCall(args, dict(kwargs))
        hidden = _hidden(call)
        if path != paths[0]:
            if not given or hidden is not given.pop():
                raise _Unchained
            call = _with_hidden(call, None)
        noted[path].append(call)

    def after(path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given[:] = [output[0] if isinstance(output, tuple) else output]
        if path == paths[-1]:
            given.clear()
            raise _Reached

    with ExitStack() as stack:
        for path in paths:
            block = model.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(after, path)).remove)
        try:
            for batch in batches:
                with suppress(_Reached):
                    model(batch, use_cache=False) if isinstance(model, PreTrainedModel) else model(batch)
        except (_Unchained, KeyError):
            return None
    return noted if all(len(calls) == len(batches) for calls in noted.values()) else None


class _Unchained(Exception):
    """A block takes something else than the block before it gave."""


def _hidden(call: BlockCall) -> Tensor:
    hidden: Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return hidden


def _with_hidden(call: BlockCall, hidden: Tensor | None) -> BlockCall:
    if call.args:
        return BlockCall((hidden, *call.args[1:]), call.kwargs)
    return BlockCall((), call.kwargs | {"hidden_states": hidden})
