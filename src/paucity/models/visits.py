"""One forward over all calibration batches that halts in front of each block, so that blocks are looked at in turn.

Every batch goes on in a coroutine of its own. When all batches that reach a block wait in front of it, the caller lets
them through one by one, and they wait again in front of the next. So one pass shows each block all that it reads, in
any model, and what is held meanwhile is what passes from block to block. Weights of a block that all have left may be
changed, or taken out of memory, without the batches noticing.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import InputError
from .hooks import run_model
from .sites import Site


def visits(
    model: nn.Module, blocks: Mapping[str, Sequence[Site]], batches: Sequence[Tensor]
) -> Generator[tuple[str, Iterator[None]], None, None]:
    """Run ``model`` on all ``batches`` and yield each block's path when all that reach it wait in front of it.

    With the path comes an iterator that lets the batches through, one at each step; the caller exhausts it. The blocks
    have to be `in_turn`. Behind the last block the forwards end. Close the generator, whatever happens: its hooks go
    then.

    Args:
        model: run as it is, without gradients.
        blocks: the sites that are of interest by path of their block, in the order of the model.
        batches: what the model takes: ``input_ids [B, T]`` int64 of a language model.

    Raises:
        InputError: if the model runs without a block that has sites.
    """
    rank = {path: number for number, path in enumerate(blocks)}
    sites = [site for group in blocks.values() for site in group]
    device, left = next(model.parameters()).device, set[str]()

    def wait(path: str, *_: Any) -> None:
        me = getcurrent()
        if path not in left and me.parent is not None:
            me.parent.switch(path)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code cannot wait
        for path in blocks:  # in front of other hooks, which shall not see a batch before it is let through
            hook = partial(wait, path)
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook, prepend=True).remove)
        runs = [greenlet(partial(run_model, model, sites, batch.to(device))) for batch in batches]
        stack.callback(_drop, runs)
        waiting = {run: _step(run) for run in runs}
        while places := {place for place in waiting.values() if place is not None}:
            # Batches that pass a block by (a module of an expert) wait further on until the others are there.
            path = min(places, key=rank.__getitem__)
            left.add(path)
            yield path, _let_through(path, waiting)
            if len(left) == len(blocks):
                break
    unused = [site.name for path, group in blocks.items() if path not in left for site in group]
    if unused:
        raise InputError(f"prune: sites must be run by the model's forward, got {', '.join(unused)}, which are not.")


@torch.no_grad()
def in_turn(model: nn.Module, paths: Sequence[str], batch: Tensor) -> bool:
    """Whether a forward over the beginning of ``batch`` can be halted in front of each block, and comes back to none.

    It cannot where blocks run within a context of the thread (autocast, inference mode), which would hold for whoever
    else runs meanwhile.
    """
    entered, outside, same = list[str](), _context(), True

    def note(path: str, *_: Any) -> None:
        nonlocal same
        same &= _context() == outside
        if entered[-1:] != [path]:
            entered.append(path)

    part = batch[:1, :8] if isinstance(model, PreTrainedModel) and not batch.is_floating_point() else batch[:1]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path in paths:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(note, path))
            stack.callback(hook.remove)
        run_model(model, (), part.to(next(model.parameters()).device))
    return same and len(entered) == len(set(entered))


def _context() -> tuple[Any, ...]:
    """What PyTorch keeps for a thread."""
    kinds = ("cpu", "cuda")
    casts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    stacks = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return *casts, torch.is_inference_mode_enabled(), *stacks


def _let_through(path: str, waiting: dict[greenlet, str | None]) -> Iterator[None]:
    for run, place in waiting.items():
        if place == path:
            waiting[run] = _step(run)
            yield


def _step(run: greenlet) -> str | None:
    """Let a batch go on to the block where it waits next, None at its end."""
    with torch.no_grad():  # around each step: the mode is the thread's, not the coroutine's
        place: str = run.switch()
    return None if run.dead else place


def _drop(runs: Sequence[greenlet]) -> None:
    """End what still waits; its hooks and contexts are left in order."""
    for run in runs:
        if not run.dead:
            run.throw()
