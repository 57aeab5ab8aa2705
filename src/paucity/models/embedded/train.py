"""Training of the embedded model, from nothing to the shipped files: ``python -m paucity.models.embedded.train OUT``.

Llama architecture, byte-level BPE with single digits, Muon for the matrices of the layers (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) and AdamW for the rest, a constant rate and then a linear decay, sequence
lengths growing by stage. It resumes from ``OUT/checkpoint.pt`` after a kill.
"""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ...measure.data import gutenberg_books, held_out_python, python_documents
from ...measure.prompts import TASKS, interleave, scatter
from .corpus import END, Corpus, encode_stream, sequence


@dataclass(frozen=True)
class Stage:
    """A share of the training time at one sequence length."""

    length: int
    batch: int
    minutes: float
    recall_share: float


STAGES = (Stage(256, 32, 35, 0.3), Stage(1024, 8, 25, 0.4), Stage(4096, 4, 35, 0.5))
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
    """Cross-entropy through the output matrix in row chunks, its gradient taken on the way, so that logits stay small."""

    @staticmethod
    def forward(ctx, hidden: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        low = matrix.bfloat16()
        grad_hidden, grad_matrix = torch.empty_like(hidden), torch.zeros_like(matrix)
        total, scale = hidden.new_zeros((), dtype=torch.float32), weights / weights.sum()
        for rows in torch.arange(len(hidden)).split(1024):
            part = hidden[rows[0] : rows[-1] + 1].bfloat16()
            logits = (part @ low.T).float()
            lse = logits.logsumexp(-1, keepdim=True)
            target = targets[rows][:, None]
            total += ((lse - logits.gather(1, target))[:, 0] * scale[rows]).sum()
            grad = logits.sub_(lse).exp_()
            grad.scatter_add_(1, target, torch.full_like(lse, -1.0))
            grad = grad.mul_(scale[rows][:, None]).bfloat16()
            grad_hidden[rows[0] : rows[-1] + 1] = grad @ low
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
    loss: Tensor = _HeadLoss.apply(flat, model.lm_head.weight, targets, kept)
    return loss


@torch.inference_mode()
def probe(model: LlamaForCausalLM, corpus: Corpus, length: int, *, count: int = 20, seed: int = 1) -> dict[str, float]:
    """Share of exact answers by task at ``length`` tokens, teacher-forced (equal to greedy decoding for exact answers)."""
    rng = random.Random(seed)
    right = dict.fromkeys(TASKS, 0)
    for task, make in TASKS.items():
        for _ in range(count):
            fact = make(rng)
            encode = lambda text: corpus.tokenizer.encode(text).ids  # noqa: E731
            lines = [encode(line) for line in interleave(fact, rng)]
            tail, answer = encode("\n" + fact.question), encode(" " + ", ".join(fact.answers))
            room = length - 1 - len(tail) - len(answer) - sum(map(len, lines))
            body = scatter(corpus.window("code", room, rng), lines, rng, line_ends=corpus.line_ends)
            ids = torch.tensor([[0, *body, *tail, *answer]])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
            right[task] += int((logits[0, :-1].argmax(-1) == ids[0, -len(answer) :]).all())
    return {task: hits / count for task, hits in right.items()}


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, corpus: Corpus, text: str, *, length: int = 1024) -> float:
    """Bits per UTF-8 byte of ``text`` in windows of ``length`` tokens, half of them context."""
    ids = torch.tensor([0, *corpus.tokenizer.encode(text).ids])
    nats, half = 0.0, length // 2
    for start in range(0, len(ids) - 1, half):
        first = max(0, start + half - length)
        window = ids[first : start + half + 1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        new = len(window) - 1 - (start - first)
        nats += float(torch.nn.functional.cross_entropy(logits[-new:], window[-new:], reduction="sum"))
    return nats / math.log(2) / len(text.encode())


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def train(
    out: Path, *, stages: tuple[Stage, ...] = STAGES, rate: float = 3e-3, decay_share: float = 0.35, seed: int = 0
) -> LlamaForCausalLM:
    """Train for the minutes that ``stages`` give, with a checkpoint every five minutes, and save to ``out``.

    Args:
        out: folder of the tokenizer, the log (``log.jsonl``), the checkpoint and the model.
        stages: sequence lengths, batches, minutes and shares of recall tasks, in order.
        rate: learning rate of both optimizers.
        decay_share: last share of the time over which the rate falls linearly to 0.
        seed: of the initial weights and of the data.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    corpus = build_corpus(out, seed=seed)
    model = LlamaForCausalLM(architecture(corpus.tokenizer.get_vocab_size()))
    opts = optimizers(model, rate)
    spent, step, tokens = 0.0, 0, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        spent, step, tokens = state["spent"], state["step"], state["tokens"]
    total = sum(stage.minutes for stage in stages) * 60
    rng = random.Random(seed * 1_000_003 + step)
    log = (out / "log.jsonl").open("a")
    started, last_saved, last_probed, running = time.monotonic() - spent, time.monotonic(), time.monotonic(), 0.0
    while (spent := time.monotonic() - started) < total:
        stage = _stage_at(stages, spent / 60)
        batch = [sequence(corpus, stage.length, rng, recall_share=stage.recall_share) for _ in range(stage.batch)]
        ids = torch.tensor([b[0] for b in batch])
        loss = weighted_loss(model, ids, torch.tensor([b[1] for b in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / 100, (1 - spent / total) / decay_share)
        for opt in opts:
            opt.param_groups[0]["lr"] = rate * scale
            opt.step()
            opt.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        running = 0.98 * running + 0.02 * float(loss.detach())
        now = time.monotonic()
        if step % 50 == 0:
            entry = {"step": step, "tokens": tokens, "minutes": spent / 60, "length": stage.length}
            entry |= {"loss": running / (1 - 0.98 ** min(step, 500)), "scale": scale}
            print(json.dumps(entry), file=log, flush=True)
        if now - last_probed > 420:
            last_probed = now
            print(json.dumps({"step": step, **probe(model, corpus, stage.length, count=12)}), file=log, flush=True)
        if now - last_saved > 300:
            last_saved = now
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
            torch.save(state | {"spent": spent, "step": step, "tokens": tokens}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").rename(checkpoint)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    card = {
        "stages": [asdict(stage) for stage in stages],
        "steps": step,
        "tokens": tokens,
        "seed": seed,
        "minutes": total / 60,
        "held_out_bits_per_byte": bits_per_byte(model, corpus, held_out_python()),
        "retrieval": {length: probe(model, corpus, length, count=100) for length in (1024, 2048, 4096)},
    }
    (out / "card.json").write_text(json.dumps(card, indent=2))
    return model


def _stage_at(stages: tuple[Stage, ...], minutes: float) -> Stage:
    for stage in stages:
        minutes -= stage.minutes
        if minutes < 0:
            return stage
    return stages[-1]
