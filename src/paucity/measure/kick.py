"""LLM-KICK in small: what a sparse model still knows, reads, sums up and chooses, beside its perplexity.

Paper: Jaiswal et al. 2023, https://arxiv.org/abs/2310.01382. Its tasks are question answering over data sets, judged in
part by GPT-4. Here every task has a form that needs no data and no judge, made of Python's standard library, and takes
the user's own questions and documents instead; tasks of lm-eval come with the extra ``study``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .abilities import Ability, Scores, agreements, paired
from .agreement import Agreement, agreement
from .kick_jobs import Job
from .kick_options import Kick
from .stats import Estimate
from .summary import rouge_l
from .tokens import context_length

Stage = Callable[[str, Callable[[], Any]], Any]


def compare_abilities(
    options: Kick,
    jobs: Sequence[Job],
    dense: nn.Module,
    sparse: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seed: int = 0,
    stage: Stage | None = None,
    tell: Callable[[str], object] | None = None,
) -> list[Ability]:
    """Both models on every job, and on the same tokens of ``text``.

    Args:
        options: as for `prepare`.
        jobs: from `prepare`.
        dense: the one that others are measured against.
        sparse: another with the same tokenizer.
        tokenizer: of both.
        text: of the agreement.
        seed: of the intervals.
        stage: keeps what is done under a name, as JSON; for runs that go on after a kill.
        tell: told what is being done.
    """
    keep = stage or (lambda _, make: make())
    say = tell or (lambda _: None)
    found: list[Ability] = []
    if "agreement" in options.tasks:
        say("agreement with dense")
        length = min(512, context_length(dense) or 512)
        settings: dict[str, Any] = {"length": length, "max_tokens": options.max_tokens, "seed": seed}
        made = keep("kick.agreement", lambda: asdict(agreement(dense, sparse, tokenizer, text, **settings)))
        found += agreements(_agreement(made))
    for job in jobs:
        sides = []
        for name, model in (("dense", dense), ("sparse", sparse)):
            say(f"{name}: {job.title.lower()}")
            sides.append(Scores(**keep(f"{name}.kick.{job.name}", partial(_asked, job, model))))
        found.append(paired(job.name, job.group, job.title, job.unit, *sides, seed=seed))
        if job.name == "rouge":
            found.append(_alike(*sides, seed=seed))
    return found


def _asked(job: Job, model: nn.Module) -> dict[str, Any]:
    return asdict(job.measure(model, None))


def _alike(dense: Scores, sparse: Scores, *, seed: int) -> Ability:
    """ROUGE-L between what both models wrote."""
    alike = [rouge_l(ours, theirs) for ours, theirs in zip(sparse.texts, dense.texts, strict=True)]
    estimate = Scores(alike, None, None).estimate(seed)
    change = estimate.mapped(lambda share: share - 1)
    title = "Written summary against dense, ROUGE-L"
    return Ability("rouge_dense", "agreement", title, "share", len(alike), None, estimate, change)


def _agreement(made: dict[str, Any]) -> Agreement:
    """An `Agreement` from its JSON."""

    def estimates(value: Any) -> Any:
        if isinstance(value, dict):
            return Estimate(**value)
        return tuple(map(estimates, value)) if isinstance(value, list | tuple) else value

    return Agreement(**{name: estimates(value) for name, value in made.items()})
