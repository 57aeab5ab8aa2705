"""Claim: conversation by conversation, a dictionary learns to reconstruct conversations better than from glued blocks.

Paper: Li et al. 2025, https://arxiv.org/abs/2506.07691, Table 1. The embedded model has not been tuned on
conversations; here a user asks for a function of Python's library by what its author says of it, and is answered with
the source. Three dictionaries see equally many activations: of conversations one by one (FAST), of the same
conversations glued and cut into blocks (BT(F)), and of plain source in blocks (BT(P)). All are measured on held-out
conversations, about modules that the model has never read, one by one, with all their tokens, as the paper does.
"""

import ast
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dictionary.fast import Conversation, concatenated, conversation_ids
from ..dictionary.live import Harvester
from ..dictionary.mixing import MixedSource
from ..dictionary.sae import SparseAutoencoder
from ..dictionary.topk import TopK
from ..dictionary.trainer import train
from ..measure.data import held_out_modules, python_documents
from ..measure.stdlib_facts import parse_quietly, shuffled
from ..measure.tokens import encode, leading_ids
from ..models.load import Loaded, load
from . import CLAIMS
from .base import ClaimResult

NAME = "fast-beats-concatenation"
TEMPLATE = "{{ bos_token }}{% for m in messages %}# {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
BLOCK, LONGEST, K = 512, 256, 16
FEEDS = ("conversations one by one", "conversations in blocks", "source in blocks")


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Train on the three feeds and reconstruct held-out conversations.

    Args:
        quick: fewer tokens, atoms and seeds.
        seed: of the first training; the others follow.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    job = _Job(loaded or load("embedded"), quick, seed)
    seeds = list(range(seed, seed + (1 if quick else 3)))
    errors = {feed: [job.error(feed, draw) for draw in seeds] for feed in FEEDS}
    fast, *others = (each for each in errors.values())
    better = [a["all"] < b["all"] for other in others for a, b in zip(fast, other, strict=True)]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"Qwen2.5-7B-Instruct, mean squared error": {"FAST": 0.6468, "BT(F)": 1.5096, "BT(P)": 5.1985}},
        measured={"mean squared error": errors, "variance of an entry": job.variance},
        holds=all(better),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": job.loaded.source,
            "hook": job.hook,
            "num_tokens": job.num_tokens,
            "text_tokens": job.text_tokens,
            "dict_size": job.dict_size,
            "k": K,
            "block": BLOCK,
            "longest conversation": LONGEST,
            "seeds": seeds,
        },
    )


class _Job:
    """The activations of the three feeds and of what is measured on."""

    def __init__(self, loaded: Loaded, quick: bool, seed: int) -> None:
        self.loaded, self.hook = loaded, "residual.1"
        self.text_tokens, self.num_tokens, self.dict_size = (8_192, 24_576, 512) if quick else (65_536, 262_144, 2048)
        tokenizer = loaded.need_tokenizer(NAME)
        documents = shuffled(python_documents(include_tests=False), random.Random(seed))
        documents = documents[: 40 if quick else 200]
        asked = shuffled([c for text in documents for c in conversations(text)], random.Random(seed))
        alone = _upto(conversation_ids(tokenizer, asked, template=TEMPLATE, max_length=LONGEST), self.text_tokens)
        head = torch.tensor([leading_ids(tokenizer)], dtype=torch.int64)
        plain = [torch.cat([head, torch.tensor([encode(tokenizer, text)])], 1) for text in documents[:40]]
        feeds = (alone, concatenated(alone, BLOCK), _upto(concatenated(plain, BLOCK), self.text_tokens))
        self.feeds = dict(zip(FEEDS, map(self._rows, feeds), strict=True))
        held_out = shuffled([c for text in held_out_modules().values() for c in conversations(text)], random.Random(0))
        ids = conversation_ids(tokenizer, held_out, template=TEMPLATE, max_length=LONGEST)
        self.test = self._rows(_upto(ids, self.text_tokens // 4))
        self.variance = float(torch.cat(self.test).float().var(0).mean())

    def _rows(self, items: Sequence[Tensor]) -> list[Tensor]:
        harvester = Harvester(self.loaded.model, self.hook, items)
        return [harvester.rows(item).cpu() for item in range(len(items))]

    def error(self, feed: str, seed: int) -> dict[str, Any]:
        """Mean squared error of an entry: over all tokens, the first of each conversation, and the others."""
        rows = self.feeds[feed]
        width = rows[0].shape[1]
        source = MixedSource(rows.__getitem__, [len(each) for each in rows], width, capacity=16_384, seed=seed)
        dictionary = SparseAutoencoder(width, self.dict_size, TopK(K), silent_after=self.num_tokens // 8, seed=seed)
        train(dictionary, source, num_tokens=self.num_tokens, batch_size=1024, learning_rate=1e-3)
        with torch.no_grad():
            missed = [(dictionary(each.float()) - each.float()).square().mean(1) for each in self.test]
        first, others = torch.stack([each[0] for each in missed]), torch.cat([each[1:] for each in missed])
        return {"all": float(torch.cat(missed).mean()), "first": float(first.mean()), "others": float(others.mean())}


def conversations(source: str) -> list[Conversation]:
    """Every function of a module, asked for by its docstring's first line, and answered with its source."""
    found: list[Conversation] = []
    for node in ast.walk(parse_quietly(source)):
        if isinstance(node, ast.FunctionDef):
            wanted, _, _ = (ast.get_docstring(node) or "").partition("\n")
            answer = ast.get_source_segment(source, node) or ""
            if len(wanted.split()) > 3 and len(answer.splitlines()) > 3:
                asked = {"role": "user", "content": f"Write {node.name}. {wanted}"}
                found.append([asked, {"role": "assistant", "content": answer}])
    return found


def _upto(items: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first of ``items`` until they hold so many tokens."""
    found, size = list[Tensor](), 0
    for item in items:
        if size >= tokens:
            break
        found.append(item)
        size += item.numel()
    return found
