"""Tasks of lm-eval (``pip install 'paucity[study]'``), through its wrapper for models of the transformers library."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks import InputError, fail

METRICS = ("acc", "exact_match", "f1", "em", "pass@1")
"""Metrics looked for, the first that a task has; all in [0, 1], higher is better."""


YAML = (".yaml", ".yml")


def check_task(task: str) -> None:
    """Refuse a task before any work: InputError if lm-eval is not installed, or the task's file does not exist."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise fail(
            "harness", "lm_eval", "be used with the extra installed (pip install 'paucity[study]')", task
        ) from None
    if Path(task).suffix in YAML and not Path(task).is_file():
        raise fail("harness", "lm_eval", "name a task or a YAML file that exists", task)


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, *, limit: int | None = None
) -> dict[str, Any]:
    """Run one task on the model as it is; likelihoods exercise the prefill alone.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        task: name of a task, or a YAML file that describes one.
        limit: documents used; None is all.

    Returns:
        ``{"scores": [...], "metric": name}``, a score in [0, 1] for each document, in the task's order.

    Raises:
        InputError: if lm-eval is not installed, does not know the task or cannot reach its data, or the task has none
            of `METRICS`.
    """
    check_task(task)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wanted: str | dict[str, Any] = task
    if Path(task).suffix in YAML:
        wanted = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
    try:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=[wanted],
            task_manager=TaskManager(),
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"harness: lm_eval must name a task that can be loaded, got {task} ({reason}).") from error
    (samples,) = found["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    metric = next((name for name in METRICS if name in samples[0]), None)
    if metric is None:
        raise fail("harness", "lm_eval", f"name tasks with one of the metrics {', '.join(METRICS)}", task)
    return {"scores": [float(sample[metric]) for sample in samples], "metric": metric}
