"""run(recipe): load → apply the steps to a copy → measure dense and sparse side by side → save → report.

Work goes on in ``OUT.partial``, where every finished measurement is kept as JSON, so that a run that was killed
resumes; only a complete result takes the place of ``OUT``. The steps are applied before anything is measured, so that
whatever does not fit the model is refused at once; they draw from seeds alone, so a resumed run applies the same again,
and a long one goes on behind what it had finished.
"""

import copy
import time
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from . import catalog
from .checks import InputError
from .compare import Progress, compare, fit
from .folder import Folder, write_whole
from .measure.data import read_text
from .measure.kick import compare_abilities
from .measure.kick_jobs import prepare
from .measure.tokens import context_length
from .models.applied import Combined, Work, Written, working
from .models.calibration import calibration_batches
from .models.facts import model_facts
from .models.load import Loaded, load
from .models.save import save
from .pipeline_images import run_images
from .recipe import Recipe
from .report import Ability, Report, StepRecord, TextFacts, TextUse, environment, render


def run(
    recipe: Recipe, out: str | Path, *, force: bool = False, resume: bool = False, on_progress: Progress | None = None
) -> Report:
    """Make a model sparse by a recipe and measure it beside the dense one.

    Args:
        recipe: what to do.
        out: folder of ``report.json``, ``report.html``, ``recipe.yaml`` and ``model``.
        force: replace ``out`` if it exists, once the new run is complete; discard an unfinished one.
        resume: continue an unfinished run of the same recipe.
        on_progress: called with a line about what is being done.

    Raises:
        InputError: if ``out`` may not be written, a text is absent or empty, the model cannot be loaded, or a step does
            not fit it; all before anything is measured.
    """
    started, tell = time.monotonic(), on_progress or _silent
    if recipe.images is not None:
        return run_images(recipe, out, force=force, resume=resume, on_progress=tell)
    folder = Folder(Path(out), "run")
    folder.check(recipe, force=force, resume=resume)
    text = read_text(recipe.measure.text, role="measure")
    calibration_text = read_text(recipe.calibration.text, role="calibration")
    tell(f"loading {recipe.model}")
    dense = load(recipe.model, dtype=recipe.dtype)
    plan = fit(recipe, dense, text)
    kick, tokenizer = recipe.measure.kick, dense.need_tokenizer("run")
    jobs = [] if kick is None else prepare(kick, dense.model, tokenizer, text, recipe.seed)
    sparse = replace(dense, model=copy.deepcopy(dense.model), notes=[])
    calibration = _calibration(recipe, dense, calibration_text)
    folder.open(recipe, resume=resume)
    try:
        applied, records = _apply(recipe, sparse, calibration, folder.partial / "stages", tell)
    except InputError:
        if not resume:
            folder.discard()
        raise
    before, after, facts = compare(plan, dense, sparse, applied, text, folder.once, tell)
    found = []
    if kick is not None:
        models = {"dense": dense.model, "sparse": sparse.model}
        found = compare_abilities(kick, jobs, models, tokenizer, text, seed=recipe.seed, stage=folder.once, tell=tell)
    tell("saving")
    if not (folder.partial / "model").exists():
        save(sparse, folder.partial / "model", extra=applied.state())
    for step in applied.steps:
        if isinstance(step, Written):
            step.write(folder.partial)
    for record, step, notes in zip(records, applied.steps, facts["notes"], strict=True):
        record.notes += notes
        kept = [facts["density"][site] for site in step.density() if site in facts["density"]]
        record.density = sum(kept) / len(kept) if kept else None
    ran_dense = [f"{count} times while measured, {why}." for why, count in facts["dense_runs"].items()]
    evaluated = TextFacts(names=[recipe.measure.text], tokens=facts["num_tokens"], bytes=facts["num_bytes"])
    calibrated = TextFacts(names=[recipe.calibration.text], tokens=sum(ids.numel() for ids in calibration))
    report = Report(
        title=recipe.title,
        seconds=time.monotonic() - started,
        recipe=recipe.model_dump(mode="json"),
        environment=environment(),
        model=model_facts(dense, [*plan.notes, *ran_dense]),
        text=TextUse(evaluated=evaluated, calibrated=calibrated),
        dense=before,
        sparse=after,
        steps=records,
        head_density=facts["head_density"],
        attention=facts["attention"],
        abilities=[Ability(**asdict(ability)) for ability in found],
    )
    report.write(folder.partial / "report.json")
    write_whole(folder.partial / "report.html", render(report))
    write_whole(folder.partial / "recipe.yaml", recipe.to_yaml())
    folder.publish()
    return report


def _silent(_: str) -> None:
    """Progress that nobody watches."""


def _calibration(recipe: Recipe, loaded: Loaded, text: str) -> list[Tensor]:
    wanted = recipe.calibration
    length = min(wanted.length, context_length(loaded.model) or wanted.length)
    tokenizer = loaded.need_tokenizer("run")
    return calibration_batches(tokenizer, text, num_samples=wanted.num_samples, length=length, seed=recipe.seed)


def _apply(
    recipe: Recipe, sparse: Loaded, calibration: list[Tensor], keep: Path, on_progress: Progress
) -> tuple[Combined, list[StepRecord]]:
    """The steps in their order, in force on ``sparse``, and a record of each."""
    applied, records = [], []
    for number, step in enumerate(recipe.steps, 1):
        on_progress(f"step {number} of {len(recipe.steps)}: {step.method}")
        method = catalog.get(step.method)
        _, apply_step = method.installer()
        started = time.monotonic()
        with working(Work(keep / f"step-{number}", on_progress)):
            applied.append(apply_step(sparse, step.method, step.options, calibration))
        records.append(
            StepRecord(
                method=step.method,
                family=method.family,
                options=step.options.model_dump(mode="json"),
                seconds=time.monotonic() - started,
                notes=list(applied[-1].state().get("notes", [])),
            )
        )
    return Combined(applied), records
