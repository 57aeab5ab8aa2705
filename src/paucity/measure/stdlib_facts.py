"""Facts of Python's standard library, found by `ast` in the running Python's source, as questions that need no data.

No paper: knowledge recall after Jaiswal et al. 2023 (LLM-KICK), https://arxiv.org/abs/2310.01382, Section 3.1, asks for
facts of the world; a model trained on source knows facts of source. ``socket.`` is followed by ``AF_INET``, ``from grp
import`` by ``getgrnam``, ``class Request(`` by its base, ``def set_protocol(self,`` by ``protocol``. The wrong choices
are answers to other questions of the same kind, so that no answer is known by its looks. Facts of the modules that the
embedded model has not read are the control: what of them is answered right was guessed.
"""

import ast
import functools
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checks import check_int, fail
from .data import held_out_modules, python_documents
from .questions import Item, Question

KINDS = ("member", "import", "base", "argument")
NUM_CHOICES = 4
MIN_COUNT = 8
"""How often a fact stands in the library before it is asked for; what was read once is hardly learnt."""

_CONTEXT_LINES = 8
_NEXT_LINES = 12


@dataclass
class _Found:
    """One kind of facts: how often each (prompt, answer) stands in the documents, and the lines around the first."""

    counts: Counter[tuple[str, str]]
    contexts: dict[tuple[str, str], str]


def python_facts(num: int, *, known: bool = True, min_count: int = MIN_COUNT, seed: int = 0) -> list[Question]:
    """Questions about the standard library, of all kinds in turn, each with four choices and the lines it comes from.

    Args:
        num: at most; of a kind that runs out the others take the places.
        known: facts of the modules that the embedded model was trained on, that stand there ``min_count`` times at
            least; otherwise facts of `held_out_modules` that stand in no other module.
        min_count: see ``known``; held-out facts need one place only.
        seed: of the questions drawn and their wrong choices.

    Raises:
        InputError: if there are no such facts.
    """
    check_int("python_facts", "num", num)
    check_int("python_facts", "min_count", min_count)
    rng, read = random.Random(seed), _library(held_out=False)
    found = read if known else _library(held_out=True)
    by_kind: dict[str, list[Question]] = {}
    for kind in KINDS:
        accepted: dict[str, set[str]] = defaultdict(set)
        for source in (read, found):
            for prompt, answer in source[kind].counts:
                accepted[prompt].add(answer)
        pairs = sorted(
            pair
            for pair, count in found[kind].counts.items()
            if (count >= min_count if known else pair not in read[kind].counts)
        )
        by_kind[kind] = [q for pair in shuffled(pairs, rng) if (q := _ask(pair, pairs, accepted, found[kind], rng))]
    drawn: list[Question] = []
    while len(drawn) < num and any(by_kind.values()):
        drawn += [waiting.pop() for waiting in by_kind.values() if waiting][: num - len(drawn)]
    if not drawn:
        raise fail("python_facts", "min_count", "leave at least one fact", min_count)
    return drawn


def next_lines(num: int, *, seed: int = 0) -> list[Question]:
    """Which of four lines goes on the source of `held_out_modules`; the wrong ones stand elsewhere in the same module.

    They are indented alike, so that the choice is not made by white space.
    """
    check_int("next_lines", "num", num)
    rng, questions = random.Random(seed), []
    modules = [source.splitlines() for source in held_out_modules().values()]
    places = [(m, i) for m, lines in enumerate(modules) for i in range(_NEXT_LINES, len(lines))]
    for m, i in shuffled(places, rng):
        right, before = modules[m][i], modules[m][i - _NEXT_LINES : i]
        others = {line for line in modules[m] if _indent(line) == _indent(right) and len(line.split()) > 1}
        others -= {right, *before}
        if len(right.split()) > 1 and len(others) >= NUM_CHOICES - 1:
            choices = shuffled([right, *rng.sample(sorted(others), NUM_CHOICES - 1)], rng)
            questions.append(Question("\n".join(before) + "\n", (right,), tuple(choices)))
        if len(questions) == num:
            break
    return questions


def _ask(
    pair: tuple[str, str],
    pairs: Sequence[tuple[str, str]],
    accepted: dict[str, set[str]],
    found: _Found,
    rng: random.Random,
) -> Question | None:
    """A question with wrong choices, or None where there are too few of those."""
    prompt, answer = pair
    others = sorted({other for _, other in pairs} - accepted[prompt])
    if len(others) < NUM_CHOICES - 1:
        return None
    choices = shuffled([answer, *rng.sample(others, NUM_CHOICES - 1)], rng)
    also = sorted(accepted[prompt] - {answer})
    return Question(f"\n{prompt}", (answer, *also), tuple(choices), found.contexts[pair])


@functools.cache
def _library(*, held_out: bool) -> dict[str, _Found]:
    named = dict(enumerate(python_documents(include_tests=False))) if not held_out else held_out_modules()
    found = {kind: _Found(Counter(), {}) for kind in KINDS}
    for name, document in named.items():
        try:
            tree = parse_quietly(document)
        except SyntaxError:  # fixtures of tools that read broken source
            continue
        lines = document.splitlines()
        own = _own_members(str(name), tree) if held_out else ()
        for kind, prompt, answer, line in (*_facts(tree), *own):
            found[kind].counts[prompt, answer] += 1
            if found[kind].counts[prompt, answer] == 1:
                around = lines[max(0, line - 1 - _CONTEXT_LINES) : line + _CONTEXT_LINES]
                found[kind].contexts[prompt, answer] = "\n".join(around) + "\n"
    return found


def parse_quietly(source: str) -> ast.Module:
    """`ast.parse` without warnings about old spellings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(source)


def _facts(tree: ast.Module) -> Iterator[tuple[str, str, str, int]]:
    """(kind, prompt, answer, line) of everything that a module says of others and of itself."""
    modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names if not a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and len(node.bases) == 1 and not node.keywords:
            yield "base", f"class {node.name}(", ast.unparse(node.bases[0]), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and node.names[0].name != "*":
            yield "import", f"from {node.module} import", f" {node.names[0].name}", node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield "member", f"{node.value.id}.", node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef) and len(node.args.args) > 1 and node.args.args[0].arg == "self":
            yield "argument", f"def {node.name}(self,", f" {node.args.args[1].arg}", node.lineno


def _own_members(module: str, tree: ast.Module) -> Iterator[tuple[str, str, str, int]]:
    """What a module defines, asked for as its members."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield "member", f"{module}.", node.name, node.lineno


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def shuffled(items: Sequence[Item], rng: random.Random) -> list[Item]:
    """A copy in random order."""
    return rng.sample(list(items), len(items))
