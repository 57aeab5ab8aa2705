"""From a model to a folder of trained dictionaries, and from such a folder to its figures."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..checks import InputError, fail
from ..folder import Folder, write_whole
from ..measure.data import read_text
from ..models.load import Loaded, load
from .base import Dictionary
from .examine import against_truth, letters, over_seeds, over_trainings, read_truth
from .files import SETTINGS, load_dictionary, read_facts, save_dictionary
from .job import Fitted, Options, Tell, fit_on, text_windows
from .judge import judge

RESULT = "training.json"


@dataclass(frozen=True)
class Asked:
    """What `eval_folder` measures beyond the figures of `judge`.

    Attributes:
        truth: a safetensors file of true atoms.
        against: folders of other trainings.
        letters: whether first letters of words are read off features.
        seed: of intervals and of the words' order.
    """

    truth: str | None = None
    against: tuple[str, ...] = ()
    letters: bool = False
    seed: int = 0


class TrainingPlan(BaseModel):
    """What a job is, so that only the same one goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    method: str
    options: Options
    texts: dict[str, Any]


def train_folder(
    source: str,
    out: Path,
    method: str,
    options: Options,
    texts: Mapping[str, Any],
    *,
    force: bool = False,
    resume: bool = False,
    on_progress: Tell | None = None,
) -> dict[str, Any]:
    """Train dictionaries on a model and measure them on text that is not trained on.

    Args:
        source: ``embedded``, a folder or a hub id.
        out: the folder to make: one folder for each dictionary, and ``training.json`` with what is returned.
        method: one of `build.learned`.
        options: see `Options`.
        texts: ``text``, ``text_tokens``, ``eval_text``, ``eval_tokens`` and ``length`` (of a window).
        force: replace ``out``, once the new one is complete; discard an unfinished one.
        resume: go on where the same job was.
        on_progress: told what is done, of how much, and in words.

    Returns:
        ``{"model", "method", "options", "texts", "dictionaries": [{"name", "hook", "method", "input_size",
        "dict_size", "options", "training", "metrics"}]}``.

    Raises:
        InputError: if an argument does not fit, before anything is trained.
    """
    plan = TrainingPlan(source=source, method=method, options=options, texts=dict(texts))
    folder = Folder(Path(out), "dictionary")
    folder.check(plan, force=force, resume=resume)
    words = read_text(texts["text"], role="training")
    held_out = read_text(texts["eval_text"], role="eval")
    loaded = load(source)
    tokenizer = loaded.need_tokenizer("dictionary")
    items = text_windows(tokenizer, words, texts["length"], max_tokens=texts["text_tokens"])
    other = text_windows(tokenizer, held_out, texts["length"], max_tokens=texts["eval_tokens"])
    special = tuple(tokenizer.all_special_ids)
    folder.open(plan, resume=resume)
    work = folder.partial / "work"
    work.mkdir(exist_ok=True)
    try:
        fitted = fit_on(
            loaded.model,
            method,
            options,
            items,
            source=source,
            texts=f"{texts['text_tokens']} tokens of {texts['text']} in windows of {texts['length']}",
            skip_ids=special,
            keep=work,
            on_progress=on_progress,
        )
    except InputError:
        if not resume:
            folder.discard()
        raise
    found = []
    for one in fitted:
        figures = judge(loaded.model, one.hook, one.dictionary, other, skip_ids=special, on_progress=on_progress)
        facts = {"name": one.name, "model": source, "hook": one.hook, "method": method, "options": one.options}
        facts |= {"training": _training(one), "metrics": figures}
        save_dictionary(one.dictionary, folder.partial / one.name, facts=facts)
        found.append(_described(one.dictionary, facts))
    record: dict[str, Any] = {
        "model": source,
        "method": method,
        "options": options.model_dump(mode="json"),
        "texts": dict(texts),
    }
    record |= {"notes": loaded.notes, "dictionaries": found}
    write_whole(folder.partial / RESULT, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(work)
    folder.publish()
    return record


def read_records(source: str | Path) -> list[tuple[Dictionary, dict[str, Any]]]:
    """Each dictionary in a folder, or the one that ``source`` is, and what is known of it.

    Raises:
        InputError: if there is none, or one is not whole.
    """
    folder = Path(source)
    inner = sorted(path.parent for path in folder.rglob(SETTINGS)) if folder.is_dir() else []
    found = []
    each: list[str | Path] = [*inner] or [source]
    for one in each:
        dictionary = load_dictionary(one)
        facts = read_facts(one) if inner else {}
        found.append((dictionary, _described(dictionary, {"name": Path(one).name} | facts)))
    return found


def eval_folder(
    folder: str | Path,
    *,
    model: str | None,
    hook: str | None,
    texts: Mapping[str, Any],
    asked: Asked | None = None,
    on_progress: Tell | None = None,
) -> dict[str, Any]:
    """Measure the dictionaries of a folder again.

    Args:
        folder: see `read_records`.
        model: instead of the one that they were trained on.
        hook: instead of the place that they were trained at; what another tool wrote needs both.
        texts: ``eval_text``, ``eval_tokens`` and ``length``.
        asked: what else is measured.
        on_progress: told what is done, of how much, and in words.

    Returns:
        ``{"texts", "dictionaries", "seeds"}`` with new ``metrics``, what was ``asked`` among them; ``seeds`` has the
        mean figures, and the stability, of dictionaries that differ in their seed alone. One that does not say its
        model and place has no other figures than those that need neither.

    Raises:
        InputError: if there is no dictionary, or it does not fit the model.
    """
    held, asked = read_records(folder), asked or Asked()
    words = read_text(texts["eval_text"], role="eval")
    truths = [None if asked.truth is None else read_truth(asked.truth, one.atoms.shape[1]) for one, _ in held]
    others = [one for source in asked.against for one, _ in read_records(source)]
    for other, (one, _) in product(others, held):
        if other.atoms.shape[1] != one.atoms.shape[1]:
            raise fail("dictionary", "--against", f"have atoms {one.atoms.shape[1]} wide", other.atoms.shape[1])
    models: dict[str, Loaded] = {}
    found = []
    for (dictionary, record), truth in zip(held, truths, strict=True):
        more: dict[str, Any] = {}
        if truth is not None:
            more |= against_truth(dictionary, truth, seed=asked.seed)
        if others:
            more |= over_trainings([dictionary, *others], seed=asked.seed)
        name, place = model or record["model"], hook or record["hook"]
        if name is None and place is None and more and not asked.letters:
            found.append(record | {"metrics": None, "asked": more})
            continue
        for what, value in (("model", name), ("hook", place)):
            if value is None:
                raise fail("dictionary", f"--{what}", "be given for a dictionary that does not say its own", "none")
        loaded = models.setdefault(name, models.get(name) or load(name))
        tokenizer = loaded.need_tokenizer("dictionary")
        items = text_windows(tokenizer, words, texts["length"], max_tokens=texts["eval_tokens"])
        skip = tuple(tokenizer.all_special_ids)
        figures = judge(loaded.model, place, dictionary, items, skip_ids=skip, on_progress=on_progress)
        if asked.letters:
            more["letters"] = letters(loaded, place, dictionary, seed=asked.seed)
        found.append(record | {"model": name, "hook": place, "metrics": figures, "asked": more})
    return {"texts": dict(texts), "dictionaries": found, "seeds": _seeds([one for one, _ in held], found)}


def _seeds(dictionaries: Sequence[Dictionary], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that differ in their seed alone, together."""
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        options = {name: value for name, value in record["options"].items() if name != "seed"}
        same = [record["model"], record["hook"], record["method"], record["dict_size"], options]
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(number)
    return [
        {
            "names": [records[number]["name"] for number in group],
            "metrics": over_seeds([records[number]["metrics"] for number in group]),
            **over_trainings([dictionaries[number] for number in group]),
        }
        for group in groups.values()
        if len(group) > 1 and all(records[number]["metrics"] for number in group)
    ]


def _described(dictionary: Dictionary, facts: Mapping[str, Any]) -> dict[str, Any]:
    blank: dict[str, Any] = {
        "name": "",
        "model": None,
        "hook": None,
        "method": type(dictionary).__name__,
        "options": {},
    }
    sizes = {"input_size": dictionary.input_size, "dict_size": dictionary.dict_size}
    return blank | {"training": None, "metrics": None} | dict(facts) | sizes


def _training(one: Fitted) -> dict[str, Any]:
    """What is worth keeping of a training: its size, and how it went."""
    mine = one.number
    history = [
        {"step": each.step, "fvu": each.fvu[mine], "l0": each.l0[mine], "silent": each.silent[mine]}
        for each in one.trained.history
    ]
    return {"num_tokens": one.trained.num_tokens, "seconds": one.trained.seconds, "history": history}
