"""The tasks of LLM-KICK in small as jobs that one model at a time is given; see `paucity.measure.kick`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks import InputError, fail
from .abilities import Scores
from .harness import check_task, evaluate
from .kick_options import ALL, Kick
from .knowledge import Answers, check_questions, multiple_choice, question_length, written_answers
from .questions import Question, draw, read_questions, read_summaries
from .retrieval import build_prompts, retrieval_accuracy
from .stdlib_facts import next_lines, python_facts
from .stdlib_summaries import SUMMARIES, python_summaries
from .summary import check_summaries, summarise, summary_length
from .tokens import Progress, context_length


@dataclass(frozen=True)
class Job:
    """Something that one model is asked; ``measure(model, progress)`` gives its scores."""

    name: str
    group: str
    title: str
    unit: str
    measure: Callable[[nn.Module, Progress | None], Scores]


def prepare(options: Kick, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, seed: int = 0) -> list[Job]:
    """The jobs of all tasks but ``agreement``, with their questions drawn and looked at.

    Args:
        options: what is asked.
        model: whose context everything must fit into.
        tokenizer: the model's.
        text: the haystack of the retrieval prompts.
        seed: of everything that is drawn.

    Raises:
        InputError: if a file cannot be read or holds nothing to ask, or a question does not fit into the context.
    """
    asked = Asked(options, model, tokenizer, text, seed)
    makers: dict[str, Callable[[], list[Job]]] = {
        "knowledge": asked.knowledge,
        "written": asked.written,
        "control": asked.control,
        "open_book": asked.open_book,
        "retrieval": asked.retrieval,
        "summary": asked.summary,
        "choice": asked.choice,
        "lm_eval": asked.lm_eval,
    }
    jobs = [job for name, make in makers.items() if name in options.tasks for job in make()]
    if not jobs and "agreement" not in options.tasks:
        raise fail("kick", "tasks", f"hold at least one of {', '.join(ALL)} that has something to ask", options.tasks)
    return jobs


class Asked:
    """Makes the jobs of each task."""

    def __init__(
        self, options: Kick, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, seed: int
    ) -> None:
        self.options, self.model, self.tokenizer, self.text, self.seed = options, model, tokenizer, text, seed
        self.needed = {"knowledge", "written", "open_book"} & set(options.tasks)
        self.questions = self._questions() if self.needed else []

    def _questions(self) -> list[Question]:
        if self.options.questions == "python":
            return self._fitting(python_facts(self.options.num_questions, seed=self.seed))
        return draw(read_questions(self.options.questions), self.options.num_questions, self.seed)

    def _fits(self, size: int) -> bool:
        limit = context_length(self.model)
        return limit is None or size <= limit

    def _fitting(self, questions: Sequence[Question], *, open_book: bool = False) -> list[Question]:
        """Those of the built-in questions that fit into the model's context."""
        return [q for q in questions if self._fits(question_length(self.tokenizer, q, open_book=open_book))]

    def _chosen(self, name: str, group: str, title: str, questions: Sequence[Question], **how: bool) -> list[Job]:
        check_questions(
            name, self.model, self.tokenizer, questions, open_book=how.get("open_book", False), choices=True
        )

        def measure(model: nn.Module, progress: Progress | None) -> Scores:
            return _scores(multiple_choice(model, self.tokenizer, questions, **how, on_progress=progress))

        return [Job(name, group, title, "share", measure)]

    def knowledge(self) -> list[Job]:
        """Closed book, by choice; nothing where the user's questions have no choices."""
        questions = [q for q in self.questions if q.choices]
        return self._chosen("knowledge", "knowledge", "Knowledge, by choice", questions) if questions else []

    def written(self) -> list[Job]:
        """Closed book, in the model's own words, each prompt once."""
        questions = list({q.prompt: q for q in self.questions}.values())[: self.options.num_written]
        check_questions("written", self.model, self.tokenizer, questions, open_book=False, choices=False)

        def measure(model: nn.Module, progress: Progress | None) -> Scores:
            return _scores(written_answers(model, self.tokenizer, questions, on_progress=progress))

        return [Job("written", "knowledge", "Knowledge, written", "share", measure)]

    def control(self) -> list[Job]:
        """What cannot be known; there is no control for the user's own questions."""
        if self.options.questions != "python":
            return []
        questions = self._fitting(python_facts(self.options.num_open, known=False, seed=self.seed))
        return self._chosen("control", "control", "Control: facts never read", questions)

    def open_book(self) -> list[Job]:
        """The same questions with their contexts; nothing where there are none."""
        questions = [q for q in self.questions if q.context and q.choices]
        if self.options.questions == "python":
            questions = self._fitting(questions, open_book=True)
        questions = questions[: self.options.num_open]
        title = "Knowledge with the answer in the prompt"
        return self._chosen("open_book", "context", title, questions, open_book=True) if questions else []

    def retrieval(self) -> list[Job]:
        """Facts hidden in long prompts."""
        length = min(self.options.length, context_length(self.model) or self.options.length)
        jobs = []
        for task in self.options.retrieval:
            title = f"{task.replace('_', ' ').capitalize()} from a prompt of {length:,} tokens"
            settings: dict[str, Any] = {"task": task, "length": length, "filler": self.text}
            settings |= {"num_prompts": self.options.num_prompts, "seed": self.seed}
            try:
                build_prompts(self.tokenizer, **settings)
            except InputError:
                if length == self.options.length:
                    raise
                continue  # the model's context is too short for it

            def measure(model: nn.Module, progress: Any, settings: dict[str, Any] = settings) -> Scores:
                found = retrieval_accuracy(
                    model, self.tokenizer, **settings, mode="teacher_forced", on_progress=progress
                )
                return Scores(list(found.scores))

            jobs.append(Job(f"retrieval.{task}", "context", title, "share", measure))
        return jobs

    def summary(self) -> list[Job]:
        """What documents tell of their summaries, and what is written of them."""
        kind, num = self.options.summaries, self.options.num_summaries
        if kind in SUMMARIES:
            items = [
                i for i in python_summaries(kind, num, seed=self.seed) if self._fits(summary_length(self.tokenizer, i))
            ]
            if not items:
                return []
        else:
            items = draw(read_summaries(kind), num, self.seed)
        check_summaries("summary", self.model, self.tokenizer, items)
        write = self.options.written_summaries

        def gain(model: nn.Module, progress: Any) -> Scores:
            found = summarise(model, self.tokenizer, items, write=False, seed=self.seed, on_progress=progress)
            return Scores([without - given for without, given in found.bits], [float(n) for n in found.num_bytes], None)

        def rouge(model: nn.Module, progress: Any) -> Scores:
            found = summarise(model, self.tokenizer, items, seed=self.seed, on_progress=progress)
            return Scores(list(found.scores), None, None, list(found.written))

        jobs = [Job("summary", "summary", "What a document tells of its summary", "bits", gain)]
        return [*jobs, Job("rouge", "summary", "Written summary, ROUGE-L", "share", rouge)] if write else jobs

    def choice(self) -> list[Job]:
        """What goes on, and the user's own questions with choices."""
        jobs, num = [], self.options.num_choices
        for number, source in enumerate(self.options.choices):
            if source == "next_lines":
                made = self._fitting(next_lines(num, seed=self.seed))
                jobs += self._chosen(
                    "choice.next_lines", "choice", "Which line of code comes next", made, per_byte=True
                )
            else:
                made = draw(read_questions(source), num, self.seed)
                jobs += self._chosen(f"choice.{number}", "choice", f"Choices of {source}", made)
        return jobs

    def lm_eval(self) -> list[Job]:
        """Tasks of lm-eval."""
        jobs = []
        for number, task in enumerate(self.options.lm_eval):
            check_task(task)

            def measure(model: nn.Module, _: Any, task: str = task) -> Scores:
                return Scores(evaluate(model, self.tokenizer, task, limit=self.options.num_choices)["scores"])

            jobs.append(Job(f"lm_eval.{number}", "choice", f"lm-eval: {task}", "share", measure))
        return jobs


def _scores(answers: Answers) -> Scores:
    return Scores(list(answers.scores), None, answers.chance, list(answers.given))
