"""The walk of GQSA (https://arxiv.org/abs/2412.17560) through a model: block by block, then all blocks together."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.blocks import BlockCall, block_calls, open_chain
from ..models.sites import Site
from .gqsa_tuning import GroupWeight, tune_block, tune_scales
from .matrices import as_matrices, from_matrices
from .statistics import InputNorm, gather

if TYPE_CHECKING:
    from .gqsa import GqsaOptions


class Work:
    """The model on its way through both stages.

    Args:
        model: changed in place.
        options: of `paucity.weights.gqsa.gqsa`.
        calibration: ``input_ids [1, T]``.
        statistic: what to gather of the inputs of each matrix.
        choose: from a weight ``[matrices, rows, cols]`` and its statistics the groups kept, bool ``[matrices, rows,
            cols / group_size]``.
        advance: called with the work just done, in steps of one block.
    """

    def __init__(
        self,
        model: nn.Module,
        options: "GqsaOptions",
        calibration: Sequence[Tensor],
        statistic: type[InputNorm],
        choose: Callable[[Tensor, Sequence[InputNorm]], Tensor],
        advance: Callable[[int], None],
    ) -> None:
        self.model, self.options, self.statistic, self.choose, self.advance = model, options, statistic, choose, advance
        self.generator = torch.Generator().manual_seed(options.seed)
        device = next(model.parameters()).device
        self.batches = [batch.to(device) for batch in calibration]
        self.weights: dict[str, GroupWeight] = {}
        self.sites: dict[str, Site] = {}
        self.notes: list[str] = []

    def stage_1(self, blocks: list[tuple[str, list[Site]]]) -> dict[str, tuple[float, float]]:
        """Prune, quantise and train block by block; the error of each before and after."""
        chain = open_chain(self.model, [path for path, _ in blocks], self.batches)
        states = list(chain.hidden) if chain else []  # of the dense model; the chain's are those of the compressed one
        errors = {}
        for path, group in blocks:
            block = self.model.get_submodule(path)
            if chain is None:
                calls = block_calls(self.model, path, self.batches)
                states = [call.run(block) for call in calls]
            else:
                calls = [call.with_hidden(hidden) for call, hidden in zip(chain.calls[path], chain.hidden, strict=True)]
                states = [call.with_hidden(hidden).run(block) for call, hidden in zip(calls, states, strict=True)]
            self._group(block, group, calls)
            self.advance(1)
            own = {site.name: self.weights[site.name] for site in group}
            errors[path] = tune_block(
                block,
                partial(self._tensors, group, path),
                list(own.values()),
                calls,
                states,
                epochs=self.options.block_epochs,
                batch_size=self.options.batch_size,
                weight_lr=self.options.weight_lr,
                scale_lr=self.options.scale_lr,
                generator=self.generator,
                on_step=partial(self.advance, 1),
            )
            for weight in own.values():
                weight.freeze()
            self.write(group)
            if chain is not None:
                chain.advance(path)
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
        def run() -> Iterator[None]:
            for call in calls:
                call.run(block)
                yield

        statistics = gather(self.model, sites, self.statistic, run)
        for site in sites:
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
