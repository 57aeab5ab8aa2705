"""What the claims on decoding share: how surely facts are answered in steps, after a prompt that is read whole."""

import statistics
from collections.abc import Sequence

from ..attention import DecodePolicy, Flash, apply
from ..measure.retrieval import retrieval_accuracy
from ..models.load import Loaded


def decoded_accuracy(
    loaded: Loaded,
    policy: DecodePolicy | None,
    tasks: Sequence[str],
    filler: str,
    *,
    length: int,
    num_prompts: int,
    seed: int = 0,
) -> tuple[dict[str, float], float]:
    """Accuracy of each task, and the share of the cache that steps read, mean over layers.

    Prompts are read by the exact kernel, which is faster than SDPA.

    Args:
        loaded: the model with its tokenizer, and no decode policy.
        policy: of the steps; None is dense.
        tasks: of `paucity.measure.prompts.TASKS`.
        filler: the haystack.
        length: tokens of a prompt and its answer together.
        num_prompts: of each task.
        seed: of the prompts.
    """
    exact = apply(loaded.model, Flash())
    applied = None if policy is None else apply(loaded.model, policy)
    try:
        accuracy = {
            task: retrieval_accuracy(
                loaded.model,
                loaded.need_tokenizer("decoded_accuracy"),
                task=task,
                length=length,
                filler=filler,
                num_prompts=num_prompts,
                seed=seed,
            ).accuracy.value
            for task in tasks
        }
        return accuracy, 1.0 if applied is None else statistics.mean(applied.density().values())
    finally:
        exact.remove()
        if applied is not None:
            applied.remove()
