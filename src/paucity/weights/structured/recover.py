"""Recovery after pruning: low-rank adapters, trained on a text and merged, with ranks by importance.

Paper: Wang et al. 2024 (CFSP), https://arxiv.org/abs/2409.13199: a block that turns the hidden states more gets
adapters of a higher rank, in proportion, out of the same total. The adapters are those of ``peft`` (extra ``lora``), on
every projection of every block; stacks of experts are left alone. The authors train on instructions; what they do not
say (optimizer, schedule) is AdamW with a linear warm-up over a tenth of the steps and a cosine to zero here.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import InputError, check_int, fail
from ...measure.data import read_text
from ...models.calibration import calibration_batches
from ...models.load import Loaded
from ...models.sites import GROUPS, find_sites
from .cfsp import largest_remainder
from .options import RecoveryOptions


def adaptive_ranks(importance: Sequence[float], rank: int) -> list[int]:
    """Ranks of blocks in proportion to their importance, at least 1 each, that sum to ``rank * len(importance)``.

    Rounded by `largest_remainder`.

    Examples:
        >>> adaptive_ranks([3.0, 1.0], rank=8)
        [12, 4]
    """
    check_int("adaptive_ranks", "rank", rank)
    if any(not math.isfinite(value) or value < 0 for value in importance):
        raise fail("adaptive_ranks", "importance", "be finite and not negative", list(importance))
    if sum(importance) == 0:
        return [rank] * len(importance)
    return largest_remainder([rank * len(importance) * value / sum(importance) for value in importance])


def recover(
    loaded: Loaded,
    options: RecoveryOptions,
    calibration: Sequence[Tensor],
    importance: Sequence[float],
    on_step: Callable[[int, float], object] | None = None,
) -> tuple[Callable[[], None], dict[str, object]]:
    """Train adapters on ``loaded.model`` and merge them into its weights, in place.

    Args:
        loaded: with a tokenizer where ``options.text`` names a text.
        options: see there.
        calibration: ``input_ids [B, T]`` int64, what is trained on where there is no text.
        importance: of every block that is there, in order.
        on_step: called with (steps done, loss).

    Returns:
        (what writes the weights of before back, ``{"ranks", "loss_first", "loss_last", "trained"}``; the losses are
        means over a tenth of the steps at each end, in nats a token).

    Raises:
        InputError: if peft is missing, there is no text, or the loss is not finite; then the weights are as before.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("recover: recovery must have peft installed (pip install 'paucity[lora]').") from None
    model, windows = loaded.model, _windows(loaded, options, calibration)
    ranks = (
        adaptive_ranks(importance, options.rank) if options.ranks == "adaptive" else [options.rank] * len(importance)
    )
    kinds = (*GROUPS["attention"], *GROUPS["mlp"])
    sites = [site for site in find_sites(model) if site.kind in kinds and site.layer is not None and not site.tied]
    if not sites or max(site.layer or 0 for site in sites) >= len(ranks):
        raise fail("recover", "importance", "have an entry for every block", len(importance))
    by_module = {site.module: ranks[site.layer or 0] for site in sites}
    before = {site.name: model.get_parameter(site.name).detach().clone() for site in sites}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    conv = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in by_module)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        rank_pattern=by_module,
        alpha_pattern={name: 2 * rank for name, rank in by_module.items()},
        target_modules=list(by_module),
        fan_in_fan_out=conv,
    )

    def restore() -> None:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is to change
        torch.manual_seed(options.seed)
        adapted = get_peft_model(model, config)
    losses: list[float] = []
    try:
        _train(adapted, windows, options, losses, on_step)
        adapted.merge_and_unload()
    except BaseException:
        adapted.unload()
        restore()
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        model.eval()
        if hasattr(model, "peft_config"):
            del model.peft_config
    tenth = max(1, len(losses) // 10)
    trained = sum(by_module[site.module] * sum(before[site.name].shape) for site in sites)
    ends = {"loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth}
    return restore, {"ranks": ranks, "trained": trained, **ends}


def _windows(loaded: Loaded, options: RecoveryOptions, calibration: Sequence[Tensor]) -> list[Tensor]:
    """Rows to train on, each ``[T]`` of at least two tokens."""
    rows = [row for batch in calibration for row in batch if row.numel() > 1]
    if options.text is None:
        if not rows:
            raise fail("recover", "calibration", "hold a text of at least two tokens, or text be given", "none")
        return rows
    length = max((row.numel() for row in rows), default=256)
    text, number = read_text(options.text, role="recovery"), options.steps * options.batch_size
    tokenizer = loaded.need_tokenizer("recover")
    windows = calibration_batches(tokenizer, text, num_samples=number, length=length, seed=options.seed)
    return [window[0] for window in windows]


def _train(
    model: nn.Module,
    windows: Sequence[Tensor],
    options: RecoveryOptions,
    losses: list[float],
    on_step: Callable[[int, float], object] | None,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    generator, device = torch.Generator().manual_seed(options.seed), parameters[0].device
    warm = max(1, options.steps // 10)
    order: list[int] = []
    model.train()
    for step in range(options.steps):
        rate = min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        while len(order) < options.batch_size:
            order += torch.randperm(len(windows), generator=generator).tolist()
        chosen, order = [windows[i] for i in order[: options.batch_size]], order[options.batch_size :]
        length = min(row.numel() for row in chosen)
        ids = torch.stack([row[:length] for row in chosen]).to(device)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            if not bool(loss.isfinite()):
                raise InputError(f"recover: learning_rate must keep the loss finite, got {options.learning_rate}.")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, losses[-1])
