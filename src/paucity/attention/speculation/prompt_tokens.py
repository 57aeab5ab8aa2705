"""Prompt tokens: trained embeddings behind a text whose outputs guess the tokens after the next one.

Paper: Chen et al. 2024 (PPD), https://arxiv.org/abs/2405.18628, Sec. 3. ``m`` prompt tokens follow the last token of a
text; the output at the ``i``-th guesses the token ``i`` places beyond the one that the text itself predicts. Each has
an ensemble of embeddings (EPT): the ``e``-th of a prompt token sees the text and the ``e``-th of the prompt tokens
before it, and the logits of an ensemble are averaged. The model is frozen; the embeddings alone are trained, at random
places of a text, to give the model's own distribution there:

    loss = 1/m * sum_i decay**(i-1) * KL(P_i || Q_i)

with ``P_i`` the model's output after its own greedy continuation, as in the paper's code (AdamW, 1e-2, cosine decay).

Differences: the code inserts prompt tokens once into each text; here many places of one text are trained in one pass,
as branches of a tree behind the cached text, which gives what each place alone would give. The code starts from the
embeddings of a written text, here they start from embeddings of tokens drawn at random. Custom heads, prefix tuning
and several exits, which the paper tries and does not use, are not implemented.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...checks import check_int, check_ndim, check_range, fail
from ...folder import replacing
from ...measure.tokens import Progress, device_of, evaluating
from ...models.text_config import text_config
from .lessons import embed, guesses, lesson
from .passes import tree_passes


class PromptTokens(nn.Module):
    """The embeddings ``[m, E, hidden]`` of ``m`` prompt tokens with ensembles of ``E``."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        check_ndim("PromptTokens", "embeddings", embeddings, 3)
        self.embeddings = nn.Parameter(embeddings.detach().clone())

    @property
    def num_prompts(self) -> int:
        """How many tokens ahead they guess."""
        return self.embeddings.shape[0]

    @property
    def num_ensemble(self) -> int:
        """Embeddings of a prompt token."""
        return self.embeddings.shape[1]

    def save(self, path: str | Path) -> None:
        """Write the embeddings as safetensors."""
        with replacing(Path(path)) as temporary:
            save_file({"embeddings": self.embeddings.detach().contiguous()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> "PromptTokens":
        """Read what `save` wrote.

        Raises:
            InputError: if there is no such file, or it holds something else.
        """
        constraint = "be a file that save wrote"
        if not Path(path).is_file():
            raise fail("PromptTokens.load", "path", constraint, f"{path}, which is no file")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise fail("PromptTokens.load", "path", constraint, f"{path} ({error})") from None
        found = tensors.get("embeddings")
        if len(tensors) != 1 or found is None or found.ndim != 3 or not found.is_floating_point():
            names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"
            raise fail("PromptTokens.load", "path", constraint, f"{path} with {names}")
        return cls(found)


def train_prompt_tokens(
    model: nn.Module,
    calibration: Sequence[Tensor],
    *,
    num_prompts: int = 3,
    num_ensemble: int = 1,
    num_steps: int | None = None,
    num_places: int = 64,
    learning_rate: float = 1e-2,
    decay: float = 0.8,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> tuple[PromptTokens, list[float]]:
    """Train prompt tokens for a frozen model.

    Args:
        model: a causal language model; it is left as it was.
        calibration: texts, int64 ``[B, T]``, one batch a step, from the first again when all have been seen.
        num_prompts: ``m``.
        num_ensemble: ``E``; the tree of a decode step grows with it.
        num_steps: of the optimizer, one for each batch by default.
        num_places: of each text, at most one for each token.
        learning_rate: at the first step; it falls to 0 as a cosine.
        decay: weight of each distance against the one before.
        seed: of the first embeddings and of the places.
        on_progress: called with (steps done, steps in all).

    Returns:
        The prompt tokens, and the loss of each step.

    Raises:
        InputError: if there is no text, or a number is out of range.
    """
    name = "train_prompt_tokens"
    _check_texts(name, calibration)
    numbers = {"num_prompts": num_prompts, "num_ensemble": num_ensemble, "num_places": num_places}
    for argument, number in numbers.items():
        check_int(name, argument, number)
    check_range(name, "learning_rate", learning_rate, 0, open_low=True)
    check_range(name, "decay", decay, 0, 1, open_low=True)
    num_steps = len(calibration) if num_steps is None else num_steps
    check_int(name, "num_steps", num_steps)
    generator = torch.Generator().manual_seed(seed)
    prompts = _initial(model, num_prompts, num_ensemble, generator)
    optimizer = torch.optim.AdamW(prompts.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    weights = decay ** torch.arange(num_prompts, device=device_of(model))
    losses = []
    with evaluating(model), tree_passes(model):
        for step, ids in enumerate(itertools.islice(itertools.cycle(calibration), num_steps)):
            taught = lesson(model, ids.to(device_of(model)), num_prompts, num_places, generator)
            with torch.enable_grad():
                guess = guesses(model, prompts.embeddings, taught).float().log_softmax(-1)
                lost = F.kl_div(guess, taught.teacher.float().log_softmax(-1), log_target=True, reduction="none")
                loss = (lost.sum(-1).mean((0, 2)) * weights).mean()
                (prompts.embeddings.grad,) = torch.autograd.grad(loss, [prompts.embeddings])
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
            if on_progress is not None:
                on_progress(step + 1, num_steps)
    return prompts, losses


def accept_probabilities(
    model: nn.Module,
    prompts: PromptTokens,
    calibration: Sequence[Tensor],
    *,
    top_k: int = 10,
    num_places: int = 64,
    seed: int = 0,
) -> Tensor:
    """How often the guess of each rank is the token that the model itself goes on with: float64 ``[m, top_k]``.

    Args:
        model: as in `train_prompt_tokens`.
        prompts: trained on other texts than these.
        calibration: texts, int64 ``[B, T]`` each.
        top_k: ranks, at most the size of the vocabulary.
        num_places: of each text.
        seed: of the places.
    """
    _check_texts("accept_probabilities", calibration)
    generator = torch.Generator().manual_seed(seed)
    hits, total = torch.zeros(prompts.num_prompts, top_k, dtype=torch.float64), 0
    with evaluating(model), tree_passes(model):
        for ids in calibration:
            taught = lesson(model, ids.to(device_of(model)), prompts.num_prompts, num_places, generator)
            logits = guesses(model, prompts.embeddings, taught)
            check_int("accept_probabilities", "top_k", top_k, 1, logits.shape[-1])
            right = logits.topk(top_k).indices == taught.teacher.argmax(-1, keepdim=True)
            hits += right.double().sum((0, 2)).cpu()
            total += right.shape[0] * right.shape[2]
    return hits / total


def _initial(model: nn.Module, num_prompts: int, num_ensemble: int, generator: torch.Generator) -> PromptTokens:
    """Embeddings of tokens drawn at random."""
    size = text_config(model).vocab_size
    drawn = torch.randint(size, (num_prompts, num_ensemble), generator=generator)
    return PromptTokens(embed(model, drawn.to(device_of(model))).float())


def _check_texts(name: str, calibration: Sequence[Tensor]) -> None:
    if not calibration:
        raise fail(name, "calibration", "hold at least one text", "none")
    for ids in calibration:
        check_ndim(name, "calibration", ids, 2)
        if not ids.numel():
            raise fail(name, "calibration", "hold tokens", f"shape {list(ids.shape)}")
