"""Documents of Python's standard library with reference summaries, that need no data: classes and functions.

All are of the modules that the embedded model has not read, so that a summary must come from the document.
"""

import ast
import random
from collections.abc import Callable, Iterator, Sequence

from ..checks import check_choice, check_int
from .data import held_out_modules
from .questions import Summary
from .stdlib_facts import parse_quietly, shuffled

_WORDS, _BODY_LINES = 4, (3, 40)
_METHODS, _CLASS_LINES = (2, 5), 60


def python_summaries(kind: str, num: int, *, seed: int = 0) -> list[Summary]:
    """Documents of a kind of `SUMMARIES`, drawn from the modules that the embedded model has not read.

    Args:
        kind: ``outlines`` are extractive: the signatures of a class; ``docstrings`` are abstractive: the first line of
            what the author says about a function.
        num: at most.
        seed: of those drawn.

    Raises:
        InputError: if the kind is unknown.
    """
    check_choice("python_summaries", "kind", kind, SUMMARIES)
    check_int("python_summaries", "num", num)
    found: list[Summary] = []
    for source in held_out_modules().values():
        lines = source.splitlines()
        for node in ast.walk(parse_quietly(source)):
            found += SUMMARIES[kind](node, lines)
    return shuffled(found, random.Random(seed))[:num]


def _outline(node: ast.AST, lines: Sequence[str]) -> Iterator[Summary]:
    """A class up to its fifth method, and the signatures of these."""
    if not isinstance(node, ast.ClassDef):
        return
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and _one_line(part)][: _METHODS[1]]
    if len(methods) < _METHODS[0]:
        return
    end = methods[-1].end_lineno or methods[-1].lineno
    if end - node.lineno >= _CLASS_LINES:
        return
    document = "\n".join(lines[node.lineno - 1 : end]) + "\n\n\n"
    outline = "\n".join(lines[method.lineno - 1] for method in methods)
    yield Summary(document, f"# Outline\n{lines[node.lineno - 1]}\n", outline, ("\n\n",))


def _one_line(method: ast.FunctionDef) -> bool:
    """Whether the signature fills one line and nothing else does."""
    return method.body[0].lineno > method.lineno and all(part.lineno == method.lineno for part in method.args.args)


def _docstring(node: ast.AST, lines: Sequence[str]) -> Iterator[Summary]:
    """A function without its docstring, and the docstring's first line."""
    if not isinstance(node, ast.FunctionDef):
        return
    first, _, _ = (ast.get_docstring(node) or "").partition("\n")
    body, opening = node.body[1:], lines[node.body[0].lineno - 1]
    if len(first.split()) < _WORDS or not body or not opening.lstrip().startswith(f'"""{first}'):
        return
    head, rest = lines[node.lineno - 1 : node.body[0].lineno - 1], lines[body[0].lineno - 1 : node.end_lineno]
    if head and _BODY_LINES[0] <= len(rest) <= _BODY_LINES[1]:
        asked = "\n".join(head)
        indent = " " * node.body[0].col_offset
        yield Summary("\n".join([asked, *rest]) + "\n\n", f'{asked}\n{indent}"""', first, ("\n", '"""'))


SUMMARIES: dict[str, Callable[[ast.AST, Sequence[str]], Iterator[Summary]]] = {
    "docstrings": _docstring,
    "outlines": _outline,
}
