"""mkdocs hook: fills ``{{ methods }}`` from the catalogue and ``{{ card }}`` and ``{{ readme }}`` from their files."""

import inspect
from pathlib import Path
from typing import Any

from griffe import Docstring, DocstringSectionKind

from paucity.catalog import METHODS, families
from paucity.models import embedded

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholders of a page."""
    for name, make in (("methods", methods), ("card", card), ("readme", readme)):
        placeholder = "{{ " + name + " }}"
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, make())
    return markdown


def _link(paper: str) -> str:
    if paper[0].isalpha() and "." in paper.split("/")[0]:
        return f"[{paper}](https://{paper})"
    if paper.startswith("10."):
        return f"[doi {paper}](https://doi.org/{paper})"
    return f"[arXiv {paper}](https://arxiv.org/abs/{paper})"


def methods() -> str:
    """Every method with its paper and its options."""
    parts = []
    for family in families():
        parts.append(f"## {family.capitalize()}\n")
        for name, method in sorted(METHODS.items()):
            if method.family == family:
                parts += [
                    f"### `{name}`\n",
                    f"*{method.title}*, {_link(method.paper)}.\n",
                ]
                if not method.step:
                    target = f"{method.package}.{method.target.replace(':', '.')}"
                    parts.append(f"No step of a recipe; called from Python: `{target}`.\n")
                    continue
                parts += ["| option | default | what it is |", "|---|---|---|"]
                options = method.installer()[0](name)
                said = attributes(options)
                for option, field in options.model_fields.items():
                    default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
                    parts.append(f"| `{option}` | {default} | {field.description or said.get(option, '')} |")
                parts.append("")
    return "\n".join(parts)


def attributes(options: type) -> dict[str, str]:
    """What the docstrings of a class and of those above it say of its attributes, each on one line."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        for section in Docstring(inspect.cleandoc(kind.__doc__ or "")).parse("google"):
            if section.kind is DocstringSectionKind.attributes:
                found |= {one.name: " ".join(one.description.split()) for one in section.value}
    return found


def card() -> str:
    """The embedded model's card without its title."""
    return (embedded.folder() / "CARD.md").read_text(encoding="utf-8").partition("\n")[2]


def readme() -> str:
    """The README, its links into this folder made relative to it."""
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
