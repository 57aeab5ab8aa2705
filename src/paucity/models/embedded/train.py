"""Training of the embedded model, from nothing: ``python -m paucity.models.embedded.train OUT``.

Llama architecture, byte-level BPE with single digits, Muon for the matrices of the layers (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) and AdamW for the rest, a constant rate and then a linear fall, sequence
lengths that grow by stage. It continues from its last checkpoint after a kill. Needs `PAUCITY_DATA` for the prose.
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ...measure.data import gutenberg_books, python_documents
from .corpus import END, Corpus, encode_stream, sequence
from .ship import ship


@dataclass(frozen=True)
class Stage:
    """A share of the training time at one sequence length."""

    length: int
    batch: int
    minutes: float
    recall_share: float


STAGES = (Stage(256, 32, 44, 0.35), Stage(1024, 8, 14, 0.4), Stage(4096, 4, 35, 0.5))
VOCAB_SIZE = 4096


def architecture(vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """Configuration of the embedded model: 5 layers, 4 heads of 64 with 2 key-value heads, context 8192."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE whose digits stand alone, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def build_corpus(out: Path, *, seed: int = 0) -> Corpus:
    """The token streams of Python source and prose; the tokenizer is trained on both and saved to ``out``."""
    code, prose = python_documents(), gutenberg_books()
    random.Random(seed).shuffle(code)
    path = out / "tokenizer.json"
    if not path.exists():
        train_tokenizer([*code, *(book[:600_000] for book in prose)]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    return Corpus(encode_stream(tokenizer, code), encode_stream(tokenizer, prose), tokenizer)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy through the output matrix in chunks of rows, with its gradient, so that logits stay small."""

    @staticmethod
    def forward(ctx, hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        low = matrix.bfloat16()
        grad_hidden, grad_matrix = torch.empty_like(hidden), torch.zeros_like(matrix)
        total, scale = hidden.new_zeros((), dtype=torch.float32), weights / weights.sum()
        for first in range(0, len(hidden), 1024):
            rows = slice(first, first + 1024)
            part = hidden[rows].bfloat16()
            logits = (part @ low.T).float()
            lse = logits.logsumexp(-1, keepdim=True)
            target = targets[rows][:, None]
            total += ((lse - logits.gather(1, target))[:, 0] * scale[rows]).sum()
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, target, torch.full_like(lse, -1.0))
            grad = grad.mul_(scale[rows][:, None]).bfloat16()
            grad_hidden[rows] = grad @ low
            grad_matrix += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_matrix)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        grad_hidden, grad_matrix = ctx.saved_tensors
        return grad_hidden * grad, grad_matrix * grad, None, None


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy (nats) of ``ids [B, T]`` under ``weights [B, T]`` of the predicted tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    flat, targets, kept = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), weights[:, 1:].flatten()
    loss: Tensor = _HeadLoss.apply(flat, model.lm_head.weight, targets, kept)  # type: ignore[no-untyped-call]
    return loss


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def train(
    out: Path, *, stages: tuple[Stage, ...] = STAGES, rate: float = 3e-3, decay_share: float = 0.35, seed: int = 0
) -> LlamaForCausalLM:
    """Train for the minutes that ``stages`` give, with a checkpoint every five, and ship the result to ``out/weights``.

    Args:
        out: folder of the tokenizer, the log (``log.jsonl``), the checkpoint and the shipped model.
        stages: sequence lengths, batches, minutes and shares of recall tasks, in order.
        rate: learning rate of both optimizers, reached over the first 100 steps.
        decay_share: last share of the time over which the rate falls linearly to 0.
        seed: of the initial weights and of the data.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    corpus = build_corpus(out, seed=seed)
    model = LlamaForCausalLM(architecture(corpus.tokenizer.get_vocab_size()))
    opts = optimizers(model, rate)
    done = restore(out, model, opts)
    total = sum(stage.minutes for stage in stages) * 60
    rng = random.Random(seed * 1_000_003 + done["step"])
    started, last_saved = time.monotonic() - done["seconds"], time.monotonic()
    losses: list[float] = []
    with (out / "log.jsonl").open("a") as log:
        while (seconds := time.monotonic() - started) < total:
            stage = _stage_at(stages, seconds / 60)
            batch = [sequence(corpus, stage.length, rng, recall_share=stage.recall_share) for _ in range(stage.batch)]
            ids = torch.tensor([ids for ids, _ in batch])
            loss = weighted_loss(model, ids, torch.tensor([weights for _, weights in batch]))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = min(1.0, (done["step"] + 1) / 100, (1 - seconds / total) / decay_share)
            for opt in opts:
                opt.param_groups[0]["lr"] = rate * scale
                opt.step()
                opt.zero_grad()
            losses.append(float(loss.detach()))
            done = {"step": done["step"] + 1, "tokens": done["tokens"] + ids.numel(), "seconds": seconds}
            if done["step"] % 50 == 0:
                entry = done | {"length": stage.length, "loss": sum(losses) / len(losses), "scale": scale}
                print(json.dumps(entry), file=log, flush=True)
                losses.clear()
            if time.monotonic() - last_saved > 300:
                last_saved = time.monotonic()
                checkpoint(out, model, opts, done)
    record = done | {"stages": [asdict(stage) for stage in stages], "rate": rate, "seed": seed}
    ship(model, corpus.tokenizer, out / "weights", record)
    return model


def checkpoint(out: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer], done: dict[str, float]) -> None:
    """Write the model, the optimizers' tensors and how far the training is, complete or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for number, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    temporary = out / "checkpoint.tmp"
    save_file(tensors, temporary, metadata={key: str(value) for key, value in done.items()})
    temporary.replace(out / "checkpoint.safetensors")


def restore(out: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load the checkpoint in ``out`` into model and optimizers, if there is one; how far it had come."""
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return {"step": 0, "tokens": 0, "seconds": 0.0}
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        done = file.metadata()
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    for number, opt in enumerate(opts):
        saved = opt.state_dict()
        for name, value in tensors.items():
            kind, *rest = name.split(".")
            if kind == "optimizer" and rest[0] == str(number):
                saved["state"].setdefault(int(rest[1]), {})[rest[2]] = value
        opt.load_state_dict(saved)
    return {"step": int(done["step"]), "tokens": int(done["tokens"]), "seconds": float(done["seconds"])}


def _stage_at(stages: tuple[Stage, ...], minutes: float) -> Stage:
    for stage in stages:
        minutes -= stage.minutes
        if minutes < 0:
            return stage
    return stages[-1]


if __name__ == "__main__":
    train(Path(sys.argv[1]))
