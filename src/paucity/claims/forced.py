"""What the claims on retrieval share: how surely hidden facts are answered in one pass over prompt and answer."""

from collections.abc import Sequence

from ..measure.retrieval import retrieval_accuracy
from ..models.load import Loaded


def forced_accuracy(
    loaded: Loaded, tasks: Sequence[str], filler: str, *, length: int, num_prompts: int, seed: int = 0
) -> dict[str, float]:
    """Accuracy of each task under the policy that is on the model, the answer read with the prompt.

    Decode steps, which are dense, would find an answer whatever the prompt had read.

    Args:
        loaded: the model with its tokenizer.
        tasks: of `paucity.measure.prompts.TASKS`.
        filler: the haystack.
        length: tokens of a prompt and its answer together.
        num_prompts: of each task.
        seed: of the prompts.
    """
    return {
        task: retrieval_accuracy(
            loaded.model,
            loaded.need_tokenizer("forced_accuracy"),
            task=task,
            length=length,
            filler=filler,
            num_prompts=num_prompts,
            seed=seed,
            mode="teacher_forced",
        ).accuracy.value
        for task in tasks
    }
