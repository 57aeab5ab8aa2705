"""What LLM-KICK in small asks: options, as they stand in a recipe under ``measure.kick``."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .prompts import TASKS

Count = Annotated[int, Field(ge=1)]
Task = Literal["knowledge", "written", "control", "open_book", "retrieval", "summary", "choice", "lm_eval", "agreement"]
if TYPE_CHECKING:
    RetrievalTask = str
else:
    RetrievalTask = Literal[tuple(TASKS)]
ALL: tuple[Task, ...] = (
    "agreement", "knowledge", "written", "control", "open_book", "retrieval", "summary", "choice", "lm_eval",
)  # fmt: skip


class Kick(BaseModel):
    """What is asked of both models. Counts are of questions, prompts or documents; lengths are in tokens.

    Attributes:
        tasks: ``agreement`` of the likeliest tokens, with perplexity; ``knowledge`` by choice and ``written`` answers
            in a closed book; ``control`` by questions whose answers were never read (Python only); ``open_book``: the
            same questions with the answer in the prompt; ``retrieval`` from long prompts; ``summary``; ``choice`` of
            what goes on; ``lm_eval``.
        questions: ``python``, or a file of `paucity.measure.questions`.
        summaries: ``outlines`` or ``docstrings`` of Python, or a file.
        choices: ``next_lines`` of Python, or files of questions with choices.
        lm_eval: tasks of lm-eval, by name or as YAML files.
        retrieval: tasks of `paucity.measure.prompts`.
        written_summaries: whether summaries are written, too, and compared by ROUGE-L; writing takes long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[Task, ...] = ALL
    questions: str = "python"
    num_questions: Count = 200
    num_written: Count = 40
    num_open: Count = 80
    retrieval: tuple[RetrievalTask, ...] = ("key_value",)
    length: Count = 1024
    num_prompts: Count = 40
    summaries: str = "outlines"
    num_summaries: Count = 36
    written_summaries: bool = False
    choices: tuple[str, ...] = ("next_lines",)
    num_choices: Count = 100
    lm_eval: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(ge=2)] = 16384

    def quick(self) -> "Kick":
        """At most about a quarter of everything."""
        counts = {name: max(8, getattr(self, name) // 4) for name in type(self).model_fields if name.startswith("num_")}
        return self.model_copy(update=counts | {"max_tokens": min(self.max_tokens, 4096)})
