"""A policy for each head: what an offline search finds, what is written down by hand, what a layer leaves dense.

Papers: Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.2, for heads of different patterns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, SerializeAsAny, field_serializer, field_validator, model_validator
from torch import Tensor

from ..checks import fail
from ..kernels.attention import Pattern
from .compute import Attended, Part, attend_exactly, even_groups, take_heads
from .policy import PrefillPolicy
from .portable import from_json, read_mapping, to_json
from .prompt import Prompt


class PerHead(PrefillPolicy):
    """Options of ``per_head``. In JSON and YAML a choice is a mapping of ``method`` and its options.

    ``min_length`` and ``layers`` of the choices are not looked at; those of this policy hold for all.

    Attributes:
        choices: the policies that heads are ruled by.
        assignment: for each layer of the model the index of a choice for each of its query heads, or one index for all.
        file: a JSON file with ``choices`` and ``assignment``, as `paucity.attention.save_policy` writes it, instead of
            them; what else is given stands over the file's.
    """

    choices: list[SerializeAsAny[PrefillPolicy]] = Field(min_length=1)
    assignment: list[list[int] | int] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "file" not in data:
            return data
        found = read_mapping(data["file"])
        if found.pop("method", None) != "per_head":
            raise fail("per_head", "file", "hold a per_head policy", data["file"])
        return found | {key: value for key, value in data.items() if key != "file"}

    @field_validator("choices", mode="before")
    @classmethod
    def _choices(cls, value: Any) -> Any:
        return [from_json(one) if isinstance(one, dict) else one for one in value] if isinstance(value, list) else value

    @field_serializer("choices")
    def _plain(self, value: list[PrefillPolicy]) -> list[dict[str, Any]]:
        return [to_json(one) for one in value]

    @model_validator(mode="after")
    def _within(self) -> "PerHead":
        for row in self.assignment:
            for index in [row] if isinstance(row, int) else row:
                if not 0 <= index < len(self.choices):
                    raise fail("per_head", "assignment", f"index one of the {len(self.choices)} choices", index)
        return self

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless there is a row for every layer, and an entry in it for every head."""
        if len(self.assignment) != max(layers) + 1:
            raise fail("per_head", "assignment", f"have {max(layers) + 1} layers", len(self.assignment))
        for row in self.assignment:
            if not isinstance(row, int) and len(row) != num_heads:
                raise fail("per_head", "assignment", f"have {num_heads} heads in every layer", len(row))
        for choice in self.choices:
            choice.check_model(layers, num_heads, num_kv_heads)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Pattern:
        """The pattern of a prompt whose heads are all ruled by one choice.

        Raises:
            InputError: if they are not; then `attend` computes each by its own.
        """
        ruling = set(self._ruling(prompt, query))
        if len(ruling) > 1:
            raise fail("per_head", "select", "be asked for heads of one choice", f"{len(ruling)} choices")
        return self.choices[ruling.pop()].select(query, key, prompt)

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Each head by its own choice."""
        return attend_by_head(self.choices, self._ruling(prompt, query), query, key, value, prompt)

    @property
    def decodes(self) -> bool:
        """Whether any of the choices has decode steps of its own."""
        return any(choice.decodes for choice in self.choices)

    def lookahead(self, length: int) -> int:
        """The longest of the choices."""
        return max(choice.lookahead(length) for choice in self.choices)

    def _ruling(self, prompt: Prompt, query: Tensor) -> list[int]:
        row = self.assignment[prompt.layer]
        heads = prompt.head_indices(query)
        return [row] * len(heads) if isinstance(row, int) else [row[head] for head in heads]


def attend_by_head(
    choices: Sequence[PrefillPolicy],
    assignment: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: Prompt,
) -> Attended:
    """Let every head be ruled by a policy of its own; shapes as in `attend_pattern`.

    Args:
        choices: the policies.
        assignment: for each head of ``query`` the index of its policy.
        query: as there.
        key: as there; keys are never repeated for grouped queries.
        value: as there.
        prompt: of the layer.
    """
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, heads, queries, value.shape[-1])
    kept = torch.zeros(batch, heads, dtype=torch.int64, device=query.device)
    parts: list[Part] | None = []
    is_prompt = queries > 1  # a step with a single query is dense, unless the choice has its own
    seconds, indices = 0.0, prompt.head_indices(query)
    for choice in sorted(set(assignment)):
        ruled = [head for head in range(heads) if assignment[head] == choice]
        for mine, theirs in even_groups(ruled, heads // key.shape[1]):
            sub = replace(prompt, heads=tuple(indices[h] for h in mine), num_heads=prompt.num_heads or heads)
            taken = (take_heads(query, mine), take_heads(key, theirs), take_heads(value, theirs))
            own = is_prompt or choices[choice].decodes
            done = choices[choice].compute(*taken, sub) if own else attend_exactly(*taken, sub)
            out[:, mine], kept[:, mine] = done.out, done.kept.expand(batch, len(mine))
            seconds += done.select_seconds
            if parts is not None and done.parts is not None:
                parts += [_outer(part, mine, theirs) for part in done.parts]
            else:
                parts = None
    return Attended(out, kept, None if parts is None else tuple(parts), seconds)


def _outer(part: Part, heads: Sequence[int], kv_heads: Sequence[int]) -> Part:
    """A part of some heads, told by their places among all."""
    mine = heads if part.heads is None else [heads[h] for h in part.heads]
    theirs = kv_heads if part.kv_heads is None else [kv_heads[h] for h in part.kv_heads]
    return Part(part.pattern, tuple(mine), tuple(theirs))
