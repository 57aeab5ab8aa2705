"""PPD: trained prompt tokens guess several tokens ahead, and a dynamic sparse tree checks many guesses in one pass.

Paper: Chen et al. 2024, https://arxiv.org/abs/2405.18628. Every pass runs the tree of the state at hand
(`paucity.attention.speculation.sparse_tree`): the last known token, candidates for those after it, and behind each
candidate its prompt tokens. The longest path on which every candidate is the model's own choice after its parent is
accepted, with the choice after its last candidate; the prompt tokens of that candidate give the next guesses, and as
many as these are, that is the next state. With exact matching the tokens are those of greedy decoding, up to ties in
the rounding of the logits (a pass over many tokens rounds otherwise than one over a single token).

Typical acceptance (Cai et al. 2024, Medusa, https://arxiv.org/abs/2401.10774, as the paper's code has it) keeps a
candidate with ``p(x) > min(epsilon, alpha exp(-H(p)))`` instead, which is not lossless; what follows the last candidate
is the likeliest token. Not implemented: more than one row at a time (as in the code), exact matching when sampling,
and the paper's combination with a second, small model that drafts.
"""

import time
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ...checks import check_int, check_ndim, fail
from ...measure.tokens import check_context, device_of, evaluating
from .candidates import TreeState
from .passes import keep_path, text_pass, tree_pass, tree_passes
from .prompt_tokens import PromptTokens
from .result import Speculation, end_tokens
from .sparse_tree import DynamicTree


class TypicalAcceptance(BaseModel):
    """A candidate is kept if ``p(x) > min(epsilon, alpha * exp(-H(p)))``, at ``temperature``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epsilon: float = Field(0.09, gt=0, lt=1)
    alpha: float = Field(0.3, gt=0)
    temperature: float = Field(0.7, gt=0)

    def allowed(self, logits: Tensor) -> Tensor:
        """Which tokens are kept, bool ``[..., vocab]``; the likeliest always is."""
        prob = (logits.float() / self.temperature).softmax(-1)
        entropy = torch.special.entr(prob).sum(-1, keepdim=True)
        limit = (self.alpha * (-entropy).exp()).clamp(max=self.epsilon)
        allowed: Tensor = (prob > limit) | (prob == prob.amax(-1, keepdim=True))
        return allowed


class _Step:
    """The tree of a state as tensors."""

    def __init__(self, state: TreeState, prompts: PromptTokens, device: torch.device) -> None:
        self.state = state
        number = {path: node for node, path in enumerate(state.paths)}
        parents = [number[path[:-1]] if path else -1 for path in state.paths]
        kinds: list[tuple[int, int]] = []  # of each prompt embedding: its place ahead, and which of the ensemble
        self.guesses: list[tuple[int, int]] = []  # of each candidate: where the embeddings behind it begin and end
        for node, count in enumerate(state.prompts):
            start = len(parents)
            for ahead in range(count):
                for member in range(prompts.num_ensemble):
                    parents.append(node if not ahead else len(parents) - prompts.num_ensemble)
                    kinds.append((ahead, member))
            self.guesses.append((start, len(parents)))
        self.parents = torch.tensor(parents, device=device)
        self.depths = torch.tensor([len(path) - 1 for path in state.paths[1:]], dtype=torch.long, device=device)
        self.ranks = torch.tensor([path[-1] for path in state.paths[1:]], dtype=torch.long, device=device)
        which = torch.tensor(kinds, dtype=torch.long, device=device).view(-1, 2)
        self.embeddings = prompts.embeddings.detach().to(device)[which[:, 0], which[:, 1]].unsqueeze(0)
        self.children: list[list[int]] = [[] for _ in state.paths]
        for node, path in enumerate(state.paths[1:], start=1):
            self.children[number[path[:-1]]].append(node)


def prompt_decode(
    model: nn.Module,
    input_ids: Tensor,
    *,
    prompts: PromptTokens,
    tree: DynamicTree,
    max_new_tokens: int,
    typical: TypicalAcceptance | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Speculation:
    """Decode with prompt tokens; what `transformers` gives for greedy decoding, in fewer passes.

    Args:
        model: the causal language model that the prompt tokens were trained for.
        input_ids: int64 ``[1, T]``.
        prompts: of `train_prompt_tokens`.
        tree: of `dynamic_tree` or `hardware_aware_tree`, for as many prompt tokens.
        max_new_tokens: after the prompt.
        typical: keep what is typical instead of what is the model's choice.
        eos_token_id: tokens that end a text, those of the model by default.

    Raises:
        InputError: for more than one row, a tree for another number of prompt tokens, or more tokens than the context.
    """
    name = "prompt_decode"
    check_ndim(name, "input_ids", input_ids, 2)
    if len(input_ids) != 1 or not input_ids.numel():
        raise fail(name, "input_ids", "have one row of tokens", f"shape {list(input_ids.shape)}")
    check_int(name, "max_new_tokens", max_new_tokens)
    check_context(name, "max_new_tokens", model, input_ids.shape[1] + max_new_tokens)
    if len(tree.states) != prompts.num_prompts + 1:
        raise fail(name, "tree", f"be for {prompts.num_prompts} prompt tokens", f"{len(tree.states) - 1}")
    ends = end_tokens(model, eos_token_id)
    steps = [_Step(state, prompts, device_of(model)) for state in tree.states]
    widest = 1 + max((path[-1] for state in tree.states for path in state.paths if path), default=0)
    input_ids = input_ids.to(device_of(model))
    cache, accepted, drafted = DynamicCache(), list[int](), list[int]()
    with evaluating(model), tree_passes(model):
        started = time.perf_counter()
        found = [int(text_pass(model, cache, input_ids, keep=1).argmax())]
        prefilled = time.perf_counter()
        guesses = input_ids.new_zeros(0, widest)
        while len(found) < max_new_tokens and not ends.intersection(found):
            step = steps[len(guesses)]
            path, tokens, guesses = _advance(model, cache, prompts, step, found[-1], guesses, widest, typical)
            drafted.append(len(step.state.paths) - 1)
            accepted.append(len(path) - 1)
            found += tokens
        finished = time.perf_counter()
    found = found[:max_new_tokens]
    stop = next((i + 1 for i, token in enumerate(found) if token in ends), len(found))
    return Speculation(
        torch.cat([input_ids, input_ids.new_tensor([found[:stop]])], dim=1),
        torch.tensor(drafted, dtype=torch.long),
        torch.tensor(accepted, dtype=torch.long).unsqueeze(1),
        torch.tensor(accepted, dtype=torch.long) + 1,
        prefill_seconds=prefilled - started,
        draft_seconds=0.0,
        verify_seconds=finished - prefilled,
    )


def _advance(
    model: nn.Module,
    cache: Cache,
    prompts: PromptTokens,
    step: _Step,
    root: int,
    guesses: Tensor,
    widest: int,
    typical: TypicalAcceptance | None,
) -> tuple[list[int], list[int], Tensor]:
    """One pass: the accepted nodes from the root on, the new tokens, and the guesses for those after them."""
    tokens = torch.cat([guesses.new_tensor([root]), guesses[step.depths, step.ranks]])
    known: Tensor = model.get_input_embeddings()(tokens)  # type: ignore[operator]
    embeddings = torch.cat([known.unsqueeze(0), step.embeddings.to(known.dtype)], dim=1)
    logits = tree_pass(model, cache, embeddings, step.parents + cache.get_seq_length())[0]
    checked = logits[: len(tokens)]
    listed, choice = tokens.tolist(), checked.argmax(-1).tolist()
    if typical is None:
        allowed = [
            [child for child in found if listed[child] == choice[node]] for node, found in enumerate(step.children)
        ]
    else:
        kept = typical.allowed(checked)
        allowed = [[child for child in found if kept[node, listed[child]]] for node, found in enumerate(step.children)]
    path = _longest(allowed, 0)
    keep_path(cache, len(step.parents), torch.tensor(path, device=tokens.device))
    begin, end = step.guesses[path[-1]]
    ahead = logits[begin:end].view(-1, prompts.num_ensemble, logits.shape[-1]).mean(1)
    return path, [*(listed[node] for node in path[1:]), choice[path[-1]]], ahead.topk(widest).indices


def _longest(allowed: list[list[int]], node: int) -> list[int]:
    """The longest path down from a node, the first of equal ones."""
    behind = [_longest(allowed, child) for child in allowed[node]]
    return [node, *max(behind, key=len, default=[])]
