"""run(recipe) of image classifiers: train or load → steps on a copy, trained on → measure both → save → report.

Both trained models are kept in ``OUT.partial``, so that a run that was killed does not train again what was trained.
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import catalog
from .checks import InputError, fail
from .compare_images import Progress, densities, measure_images
from .folder import Folder, replacing, write_whole
from .measure.images import Images, read_images
from .models.facts import model_facts
from .models.load import Loaded
from .models.resize import fit_to
from .models.save import save
from .models.sites import find_sites
from .models.vision import BUILDERS, description, load_classifier
from .ops.formats import Masks
from .recipe import Recipe
from .recipe_images import ImageData, Training
from .report import (
    ImageMeasurement,
    Measurement,
    Report,
    StepRecord,
    TextFacts,
    TextUse,
    environment,
    image_verdict,
    render,
)
from .training import num_steps, train
from .weights.gradual import Gradual, train_sparse


def run_images(recipe: Recipe, out: str | Path, *, force: bool, resume: bool, on_progress: Progress) -> Report:
    """See `paucity.pipeline.run`, of a recipe with ``images``.

    Raises:
        InputError: if ``out`` may not be written, there are no images, or the model or a step does not fit; all before
            anything is trained.
    """
    started, tell = time.monotonic(), on_progress
    assert recipe.images is not None
    how, wanted = recipe.training or Training(), recipe.images
    folder = Folder(Path(out), "run")
    folder.check(recipe, force=force, resume=resume)
    torch.manual_seed(recipe.seed)
    training, test, notes = _images(wanted)
    dense = _model(recipe.model, how, training, notes)
    calibration = training.take(min(wanted.num_calibration, len(training))).batches(64)
    _try_steps(recipe, dense, calibration)
    folder.open(recipe, resume=resume)
    if recipe.model in BUILDERS:
        _trained(folder, "dense", dense.model, lambda: _train(dense.model, training, how, recipe.seed, tell))
    sparse = Loaded(copy.deepcopy(dense.model), None, dense.source)
    work = partial(_apply, recipe, how, sparse, dense.model, training, calibration, tell)
    records = _trained(folder, "sparse", sparse.model, work)
    facts = folder.once("measured", lambda: measure_images(wanted, dense.model, sparse.model, test, tell))
    notes += facts["notes"]
    before, after = (ImageMeasurement(**facts[name]) for name in ("dense", "sparse"))
    kept = densities(sparse.model, dense.model)
    if not (folder.partial / "model").exists():
        save(sparse, folder.partial / "model", extra=description(sparse.model) | {"steps": records})
    report = Report(
        title=recipe.title,
        seconds=time.monotonic() - started,
        recipe=recipe.model_dump(mode="json", exclude={"calibration", "measure", "dtype"}),
        environment=environment(),
        model=model_facts(dense, notes),
        text=TextUse(
            evaluated=TextFacts(names=[_named(test)]),
            calibrated=TextFacts(names=[f"{sum(map(len, calibration))} images of {training.name}"]),
        ),
        dense=Measurement(images=before, density=dict.fromkeys(kept, 1.0)),
        sparse=Measurement(images=after, density=kept),
        steps=[StepRecord(**record) for record in records],
        verdict=image_verdict(before, after),
    )
    report.write(folder.partial / "report.json")
    write_whole(folder.partial / "report.html", render(report))
    write_whole(folder.partial / "recipe.yaml", recipe.to_yaml())
    folder.publish()
    return report


def _named(images: Images) -> str:
    return f"{images.name}, {len(images):,} images"


def _images(wanted: ImageData) -> tuple[Images, Images, list[str]]:
    """Training and test images, and a note where the fallback was taken."""
    try:
        splits = [
            read_images(wanted.name, split, limit=limit)
            for split, limit in (("train", wanted.train_limit), ("test", wanted.test_limit))
        ]
        return splits[0], splits[1], []
    except FileNotFoundError as error:
        if wanted.fallback is None:
            raise InputError(f"run: images must be there or have a fallback, got none: {error}") from error
    training, test = (read_images(wanted.fallback, split) for split in ("train", "test"))
    limits = [wanted.train_limit or len(training), wanted.test_limit or len(test)]
    training, test = training.take(min(limits[0], len(training))), test.take(min(limits[1], len(test)))
    note = f"{wanted.name} is not on this machine: everything was trained and measured on {wanted.fallback}."
    return training, test, [note]


def _model(name: str, how: Training, images: Images, notes: list[str]) -> Loaded:
    shape = {"num_classes": images.num_classes, "in_channels": images.pixels.shape[1]}
    shape["image_size"] = images.pixels.shape[-1]
    if name in BUILDERS:
        try:
            return Loaded(BUILDERS[name](**(how.arguments | shape)).eval(), None, name)
        except TypeError as error:
            raise fail("run", "training.arguments", f"be arguments of a {name}", error) from error
    loaded = Loaded(load_classifier(name), None, name)
    for key, value in shape.items():
        if loaded.model.config()[key] != value:  # type: ignore[operator]
            raise fail("run", "images", f"have {key} {loaded.model.config()[key]}", value)  # type: ignore[operator]
    notes.append(f"The dense model is the one in {name}, as it is.")
    return loaded


def _try_steps(recipe: Recipe, dense: Loaded, calibration: list[Tensor]) -> None:
    """Apply the steps to a copy that nobody keeps: whatever does not fit is refused before hours of training."""
    trial = Loaded(copy.deepcopy(dense.model), None, dense.source)
    for step in recipe.steps:
        if isinstance(step.options, Gradual):
            find_sites(trial.model, step.options.sites)
        else:
            _, apply_step = catalog.get(step.method).installer()
            apply_step(trial, step.method, step.options, calibration)


def _trained(folder: Folder, name: str, model: nn.Module, make: Callable[[], Any]) -> Any:
    """What ``make`` says; the weights that it leaves in ``model`` are kept with it, and read back after a resume."""
    path = folder.partial / "stages" / f"{name}.safetensors"

    def work() -> Any:
        said = make()
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        return said

    if not path.is_file():  # or gone, with what was said left: a kill amid the publishing
        folder.keep(name, work())
    said = folder.once(name, work)
    fit_to(model, load_file(path))
    model.eval()
    return said


def _train(model: nn.Module, images: Images, how: Training, seed: int, tell: Progress) -> float:
    epochs = _epochs(how, how.epochs, images)
    tell(f"training the dense model, {epochs} epochs of {len(images):,} images")
    rate, size = how.learning_rate, how.batch_size
    return train(model, images, epochs=epochs, batch_size=size, learning_rate=rate, shift=how.shift, seed=seed).seconds


def _epochs(how: Training, asked: int, images: Images) -> int:
    """As many as asked for, or more where they are fewer than ``min_steps`` steps."""
    return max(asked, math.ceil(how.min_steps / num_steps(len(images), 1, how.batch_size)))


def _apply(
    recipe: Recipe,
    how: Training,
    sparse: Loaded,
    teacher: nn.Module,
    images: Images,
    seen: list[Tensor],
    tell: Progress,
) -> list[dict[str, Any]]:
    """The steps in their order on ``sparse``, the training of those that train, and a record of each."""
    records, prunes_alone = list[dict[str, Any]](), False
    for number, step in enumerate(recipe.steps, 1):
        tell(f"step {number} of {len(recipe.steps)}: {step.method}")
        method, started, notes = catalog.get(step.method), time.monotonic(), list[str]()
        given = step.options
        if isinstance(given, Gradual):
            train_sparse(
                sparse.model,
                images,
                sparsity=given.sparsity,
                epochs=_epochs(how, given.epochs, images),
                sites=given.sites,
                allocation=given.allocation,
                every=given.every,
                batch_size=how.batch_size,
                learning_rate=given.learning_rate,
                seed=recipe.seed,
                teacher=teacher if how.distil else None,
                shift=how.shift,
            )
        else:
            _, apply_step = method.installer()
            notes, prunes_alone = list(apply_step(sparse, step.method, given, seen).state().get("notes", [])), True
        own = densities(sparse.model, teacher, getattr(given, "sites", None)).values()
        record = StepRecord(
            method=step.method,
            family=method.family,
            options=given.model_dump(mode="json"),
            density=sum(own) / len(own) if own else None,
            seconds=time.monotonic() - started,
            notes=notes,
        )
        records.append(record.model_dump())
    if prunes_alone and how.finetune_epochs:
        kept = list(densities(sparse.model, teacher))
        tell(f"training what is left, {how.finetune_epochs} epochs")
        train(
            sparse.model,
            images,
            epochs=_epochs(how, how.finetune_epochs, images),
            batch_size=how.batch_size,
            learning_rate=how.finetune_learning_rate,
            shift=how.shift,
            seed=recipe.seed,
            masks=Masks.from_zeros(sparse.model, kept) if kept else None,
            teacher=teacher if how.distil else None,
        )
    return records
