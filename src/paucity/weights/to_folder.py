"""From a model to the folder of a pruned one: block by block where the method allows it, whole where it does not."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..checks import fail
from ..folder import Folder, write_whole
from ..models.calibration import as_batches
from ..models.load import load
from ..models.save import save
from ..models.sites import find_sites
from ..models.streamed import NotStreamable, Streamed, model_folder
from .kept_sites import digest
from .layerwise import Tell, check_sites
from .pruner import Pruner
from .pruning import is_calibrated, prune_applied
from .shards import ShardsJob


class PruningPlan(BaseModel):
    """What a job is, so that only the same one goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    method: str
    options: dict[str, Any]
    calibration: str


def prune_folder(
    source: str | Path,
    out: str | Path,
    pruner: Pruner,
    *,
    calibration: Iterable[Any] = (),
    about: Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    on_progress: Tell | None = None,
) -> dict[str, Any]:
    """Prune a Hugging Face causal language model from folder to folder.

    One block is in memory at a time with the statistics of its sites, besides the embeddings and the hidden states of
    the calibration between two blocks, so that the model may be larger than memory. A method that looks at the whole
    model before it writes the first block (scope ``global``, Taylor, the allocations ``owl``, ``cfsp`` and ``greedy``),
    or twice (order ``block``), loads it whole. So is a model that is stored in other pieces than it runs in, or of
    which more is pruned than its blocks; a note says so.

    Args:
        source: ``embedded``, a folder with safetensors, or a hub id.
        out: the folder to make: an ordinary model with zeros in place, and ``paucity.json`` with what is returned.
        pruner: the method with its options.
        calibration: as for `paucity.weights.prune`.
        about: where the calibration comes from, a JSON value for the record.
        force: replace ``out``, once the new model is complete; discard an unfinished one.
        resume: go on where the same job was.
        on_progress: called with sites done, sites in all, and the site.

    Returns:
        ``{"method", "options", "source", "sparsity", "layers", "num_parameters", "calibration", "calibration_tokens",
        "seconds", "notes"}``; sparsity as achieved, ``layers`` by parameter, ``calibration`` as ``about`` says and None
        for a method that needs none.

    Raises:
        InputError: if an argument does not fit, before anything is written; if an activation is not finite.
        OSError: if it cannot be written; what was finished is kept in ``OUT.partial``.
    """
    started, tell = time.monotonic(), on_progress or _silent
    batches = list(calibration) if is_calibrated(pruner) else []
    whole = pruner.scope == "global" or pruner.needs_gradients or pruner.allocation not in ("uniform", "erk")
    whole |= pruner.order == "block"
    streamed, notes = (None, []) if whole else _streamed(source, pruner)
    loaded = load(source) if streamed is None else None
    model = loaded.model if loaded is not None else streamed.model  # type: ignore[union-attr]
    sites = find_sites(model, pruner.sites)
    check_sites(model, sites, pruner)
    ids = [batch for batch in as_batches("prune", model, batches) if isinstance(batch, Tensor)]
    if is_calibrated(pruner) and not ids:
        raise fail("prune", "calibration", "hold at least one batch of tokens for this method", "none")
    name = type(pruner).__name__.lower()
    plan = PruningPlan(source=str(source), method=name, options=pruner.model_dump(mode="json"), calibration=digest(ids))
    folder = Folder(Path(out), "prune")
    folder.check(plan, force=force, resume=resume)
    if loaded is not None:
        folder.open(plan, resume=resume)
        applied = prune_applied(loaded, name, pruner, ids, folder.partial / "stages", tell)
        report = applied.masks.achieved_in(model)
        sparsity, layers = report.achieved, report.layers
        notes += [*loaded.notes, *applied.state()["notes"]]
        del applied  # which holds the dense weights
        _save_into(folder.partial, loaded)
    else:
        assert streamed is not None
        job = ShardsJob(streamed, sites, pruner, folder.partial, tell)
        folder.open(plan, resume=resume)
        job.run(ids)
        job.finish()
        sparsity = sum(job.zeros.values()) / sum(job.sizes.values())
        notes += job.notes
        layers = {site: job.zeros[site] / job.sizes[site] for site in job.zeros}
    tell(len(sites), len(sites), "done")
    record = {
        "method": name,
        "options": pruner.model_dump(mode="json"),
        "source": str(source),
        "sparsity": sparsity,
        "layers": layers,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "calibration": dict(about) if about and ids else None,
        "calibration_tokens": sum(batch.numel() for batch in ids),
        "seconds": time.monotonic() - started,
        "notes": list(dict.fromkeys(notes)),
    }
    write_whole(folder.partial / "paucity.json", json.dumps(record, indent=2) + "\n")
    folder.publish()
    return record


def _streamed(source: str | Path, pruner: Pruner) -> tuple[Streamed | None, list[str]]:
    """The model to be read block by block, or None and the reason why it has to be loaded whole."""
    try:
        streamed = Streamed(model_folder(source))
    except NotStreamable as error:
        return None, [f"the model was loaded whole: {error}"]
    outside = next((site.name for site in find_sites(streamed.model, pruner.sites) if site.layer is None), None)
    return (streamed, []) if outside is None else (None, [f"the model was loaded whole: {outside} is in no block"])


def _save_into(folder: Path, loaded: Any) -> None:
    save(loaded, folder / "model", force=True)
    for file in (folder / "model").iterdir():
        file.replace(folder / file.name)
    (folder / "model").rmdir()


def _silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""
