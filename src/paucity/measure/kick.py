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
from .quality import bits_per_byte
from .stats import Estimate
from .summary import rouge_l
from .tokens import context_length

Stage = Callable[[str, Callable[[], Any]], Any]


def compare_abilities(
    options: Kick,
    jobs: Sequence[Job],
    models: dict[str, nn.Module],
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
        models: ``dense``, the one to measure against, and ``sparse``, another with the same tokenizer.
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
        length = min(512, context_length(models["dense"]) or 512)
        settings: dict[str, Any] = {"length": length, "max_tokens": options.max_tokens, "seed": seed}
        made = keep(
            "kick.agreement", lambda: asdict(agreement(models["dense"], models["sparse"], tokenizer, text, **settings))
        )
        found += agreements(_agreement(made))
    for job in jobs:
        sides = []
        for name in ("dense", "sparse"):
            say(f"{name}: {job.title.lower()}")
            sides.append(Scores(**keep(f"{name}.kick.{job.name}", partial(_asked, job, models[name]))))
        found.append(paired(job.name, job.group, job.title, job.unit, *sides, seed=seed))
        if job.name == "rouge":
            found.append(_alike(*sides, seed=seed))
    return found


def abilities_of(
    options: Kick,
    jobs: Sequence[Job],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seed: int = 0,
    tell: Callable[[str], object] | None = None,
) -> list[Ability]:
    """One model alone: its figure stands as ``sparse``, with nothing to compare it to; ``agreement`` is perplexity."""
    say = tell or (lambda _: None)
    found: list[Ability] = []
    if "agreement" in options.tasks:
        say("perplexity")
        length = min(512, context_length(model) or 512)
        read = bits_per_byte(model, tokenizer, text, length=length, stride=length, max_tokens=options.max_tokens)
        num = read.num_tokens
        found.append(Ability("perplexity", "loss", "Perplexity", "perplexity", num, None, read.perplexity, None))
        found.append(Ability("loss", "loss", "Loss per token", "nats", num, None, read.nats_per_token, None))
    for job in jobs:
        say(job.title.lower())
        scores = job.measure(model, None)
        told = (job.name, job.group, job.title, job.unit, len(scores.scores))
        found.append(Ability(*told, None, scores.estimate(seed), None, chance=scores.chance))
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
