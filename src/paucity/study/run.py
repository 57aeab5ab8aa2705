"""run(study): every cell measured once, kept as it is done, and put together in ``study.json`` and ``study.html``."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checks import check_int, fail
from ..folder import Folder, write_whole
from ..measure.harness import check_task
from ..models.facts import model_facts
from ..models.load import Loaded, load
from ..report import environment
from .page import render
from .plan import COST, Cell, Study
from .results import Result, summarize
from .sources import Sourced
from .verdict import verdict
from .worker import Worker

Progress = Callable[[int, int, str], object]
"""Told (cells done, cells in all, what comes next)."""


def run(
    study: Study,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    workers: int = 1,
    ray: bool = False,
    loaded: Loaded | None = None,
    on_progress: Progress | None = None,
) -> Result:
    """Measure every cell of a study and write its page.

    Args:
        study: what to compare.
        out: folder of ``study.json``, ``study.html`` and ``study.yaml``.
        force: replace ``out`` if it exists, once the study is complete; discard an unfinished one.
        resume: continue an unfinished study of the same plan on the same texts and model; cells that are done are not
            measured again.
        workers: processes that measure quality side by side, with ``ray``; times are measured in one, alone.
        ray: whether Ray runs the workers (``pip install 'paucity[ray]'``).
        loaded: the study's model, if it is there already.
        on_progress: told of every cell.

    Raises:
        InputError: if ``out`` may not be written, the model cannot be loaded, a method does not fit it, or Ray is asked
            for and not installed.
    """
    started, folder = time.monotonic(), Folder(Path(out), "study")
    check_int("study", "workers", workers)
    if workers > 1 and not ray:
        raise fail("study", "workers", "be 1 without --ray", workers)
    if ray:
        _ray()
    for task in study.lm_eval:
        check_task(task)
    plan = Sourced.of(study)
    folder.check(plan, force=force, resume=resume)
    model = loaded or load(study.model, dtype=study.dtype)
    worker = Worker(study, model)
    cells = list(study.cells())
    for cell in cells:  # whatever does not fit is refused before anything is measured
        worker.check(cell)
    folder.open(plan, resume=resume)
    left = [cell for cell in cells if not folder.has(cell.name)]
    done, tell = len(cells) - len(left), on_progress or _silent
    side_by_side = [cell for cell in left if cell.task != COST]
    alone = [cell for cell in left if cell.task == COST]
    results = _with_ray(study, side_by_side, workers) if ray else _here(worker, side_by_side)
    for source in (results, _here(worker, alone)):
        while True:
            tell(done, len(cells), str(left[done - len(cells)].name) if done < len(cells) else "the page")
            found = next(source, None)
            if found is None:
                break
            folder.keep(found[0].name, found[1])
            done += 1
    kept = {cell: folder.once(cell.name, dict) for cell in cells}
    rows, costs = summarize(study, kept)
    result = Result(
        title=study.title,
        seconds=time.monotonic() - started,
        plan=study.model_dump(mode="json"),
        environment=environment(),
        model=model_facts(model),
        rows=rows,
        costs=costs,
    )
    result = result.model_copy(update={"verdict": verdict(result)})
    write_whole(folder.partial / "study.json", result.model_dump_json(indent=1))
    write_whole(folder.partial / "study.html", render(result))
    write_whole(folder.partial / "study.yaml", study.to_yaml())
    folder.publish()
    return result


def _silent(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody watches."""


def _here(worker: Worker, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    return ((cell, worker.measure(cell)) for cell in cells)


def _with_ray(study: Study, cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells as they are done by ``workers`` processes; each loads the model itself and has its share of the threads."""
    import torch

    ray = _ray()
    threads = max(1, torch.get_num_threads() // workers)
    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actor = ray.remote(num_cpus=1)(_Remote)
        free = [actor.remote(study.model_dump(), threads) for _ in range(workers)]
        busy: dict[Any, tuple[Any, Cell]] = {}
        waiting = list(reversed(cells))
        while waiting or busy:
            while waiting and free:
                one, cell = free.pop(), waiting.pop()
                busy[one.measure.remote(cell)] = (one, cell)
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            one, cell = busy.pop(ready)
            free.append(one)
            yield cell, ray.get(ready)
    finally:
        if own:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise fail("study", "ray", "be used with the extra installed (pip install 'paucity[ray]')", True) from None
    return ray


class _Remote:
    """A worker in a process of its own."""

    def __init__(self, plan: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.worker = Worker(Study.model_validate(plan))

    def measure(self, cell: Cell) -> dict[str, Any]:
        return self.worker.measure(cell)
