"""Dictionaries: training steps, encoding and pursuit against SAELens and overcomplete, and sweeps against one alone.

Each side has a process of its own; they take turns, call by call. SAELens and overcomplete want libraries of their own,
so they may live in another environment: `PAUCITY_SAELENS_PYTHON` names that environment's Python; without it, this
one's is asked. What is not there is left out, and where neither is, the rows against them are.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..dictionary import Dictionary, SparseAutoencoder, TopK, train
from ..dictionary.live import live_source
from ..dictionary.sources import ActivationSource, Rows, TensorSource
from ..dictionary.trainer import Training, TrainOptions
from ..measure.machine import least_seconds
from . import BenchRow
from .dictionary_peer import data
from .llama125m import llama125m
from .llmcompressor_peer import peak_mb

VARIABLE = "PAUCITY_SAELENS_PYTHON"
WIDTH, ATOMS, K, BATCH = 768, 16384, 32, 4096
ROWS = 512
"""Of a pursuit."""
PEERS: dict[str, dict[str, Any]] = {
    "SAELens": {"who": "saelens"},
    "overcomplete": {"who": "overcomplete"},
}
AUTOCAST: dict[str, dict[str, Any]] = {"SAELens, autocast": {"who": "saelens", "autocast": True}}
HOOK, STEPS, LENGTH = "residual.5", 4, 128
SWEEP_K, SWEEP_SIZES = (16, 32, 64, 128), (2048, 4096, 8192, 16384)


def run() -> list[BenchRow]:
    """A step, an encoding and a pursuit against peers; sweeps of four against one."""
    product = 2 * BATCH * WIDTH * ATOMS
    table = 4 * ATOMS * WIDTH
    rows = [
        _against("topk_step", "step", BATCH, PEERS, 5, product + 6 * 2 * BATCH * K * WIDTH, 14 * table),
        _against("topk_step_autocast", "step", BATCH, AUTOCAST, 5, product + 6 * 2 * BATCH * K * WIDTH, 14 * table),
        _against("encode", "encode", BATCH, PEERS, 5, product, table),
        _against("mp_encode", "pursuit", ROWS, {"overcomplete": PEERS["overcomplete"]}, 3, product // 8, table),
    ]
    return [row for row in rows if row] + _sweeps()


def stepper(dictionaries: Sequence[Dictionary], batch_size: int) -> Callable[[Tensor], object]:
    """A training of ``dictionaries`` whose batches are given by hand: one step for each call."""
    width = dictionaries[0].input_size
    start = TensorSource(torch.randn(1024, width, generator=torch.Generator().manual_seed(1)))
    training = Training(list(dictionaries), start, TrainOptions(num_tokens=1000 * batch_size, batch_size=batch_size))
    for one in dictionaries:
        one.train()
    return lambda x: training.take(Rows(x))


class _Worker:
    """One process that times one job."""

    def __init__(self, python: str, job: dict[str, Any]) -> None:
        script = Path(__file__).with_name("dictionary_peer.py").read_text(encoding="utf-8")
        self.process = subprocess.Popen(
            [python, "-c", script, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.seconds: list[float] = []
        self.peak_mb = 0.0

    def once(self) -> None:
        """Let it work once."""
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None and answers is not None  # noqa: PT018
        try:
            asked.write("\n")
            asked.flush()
            answer = next(line for line in answers if line.startswith("{"))
        except (BrokenPipeError, StopIteration):
            said = self.process.communicate()[1][-2000:]
            raise RuntimeError(f"bench: must end well, got exit status {self.process.returncode}: {said}") from None
        self.seconds.append(json.loads(answer)["seconds"])
        self.peak_mb = peak_mb(self.process.pid)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def _against(
    name: str, what: str, batch: int, peers: dict[str, dict[str, Any]], rounds: int, flops: int, num_bytes: int
) -> BenchRow | None:
    """Ours and peers, in turns; the fastest of them counts. None where there is no peer."""
    sizes = {"width": WIDTH, "atoms": ATOMS, "k": K, "batch": batch, "threads": torch.get_num_threads()}
    job = sizes | {"what": what, "autocast": False}
    found = {peer: python for peer, given in peers.items() if (python := _python(given["who"]))}
    if not found:
        return None
    workers = {"ours": _Worker(sys.executable, job | {"who": "ours"})}
    workers |= {peer: _Worker(python, job | peers[peer]) for peer, python in found.items()}
    try:
        for _ in range(rounds + 1):
            for worker in workers.values():
                worker.once()
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {who: median(worker.seconds[1:]) for who, worker in workers.items()}
    fastest = min(found, key=seconds.__getitem__)
    others = ", ".join(f"{peer} {seconds[peer]:.2f} s" for peer in found if peer != fastest)
    least = least_seconds(flops=flops, num_bytes=num_bytes, dtype=torch.bfloat16)
    return BenchRow(
        f"dictionary.{name}",
        f"{batch} activations {WIDTH} wide, {ATOMS} atoms, k {K}, fp32" + (f" ({others})" if others else ""),
        f"{batch / seconds['ours']:,.0f} a second, first call {workers['ours'].seconds[0]:.1f} s, "
        f"peak {workers['ours'].peak_mb:.0f} MB",
        f"{fastest}, peak {workers[fastest].peak_mb:.0f} MB",
        seconds["ours"],
        seconds[fastest],
        seconds[fastest] / least,
    )


def _python(who: str) -> str | None:
    module = "sae_lens" if who == "saelens" else who
    return os.environ.get(VARIABLE) or (sys.executable if importlib.util.find_spec(module) else None)


def _sweeps() -> list[BenchRow]:
    """Four dictionaries together, against as many trainings of one: with the model's forwards, and without them."""
    model = llama125m(torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS * BATCH // LENGTH // 8, 8, LENGTH)
    items = list(torch.randint(model.config.vocab_size, shape, generator=generator))
    kept = torch.cat(data({"width": WIDTH, "batch": BATCH}))

    def live() -> ActivationSource:
        return live_source(model, HOOK, items, capacity=2 * BATCH)

    def at_hand() -> ActivationSource:
        return TensorSource(kept)

    by_k, by_size = [(ATOMS, k) for k in SWEEP_K], [(size, K) for size in SWEEP_SIZES]
    text = f"{STEPS} steps of {BATCH}, {{}}, {{}}"
    llama = f"as a Llama 125 M yields them at {HOOK}"
    ks = f"k {', '.join(map(str, SWEEP_K))} with {ATOMS} atoms"
    sizes = f"{', '.join(map(str, SWEEP_SIZES))} atoms"
    return [
        _sweep("sweep4", text.format(ks, llama), by_k, live),
        _sweep("sweep4_at_hand", text.format(ks, "activations at hand"), by_k, at_hand),
        _sweep("sweep4_sizes", text.format(sizes, llama), by_size, live),
    ]


def _sweep(name: str, size: str, four: list[tuple[int, int]], source: Callable[[], ActivationSource]) -> BenchRow:
    """All together, before and after each alone."""

    def seconds(sizes: list[tuple[int, int]]) -> float:
        dictionaries = [SparseAutoencoder(WIDTH, atoms, TopK(k)) for atoms, k in sizes]
        started = time.perf_counter()
        train(dictionaries, source(), num_tokens=STEPS * BATCH, batch_size=BATCH)
        return time.perf_counter() - started

    first, alone = seconds(four), [seconds([each]) for each in four]
    together = (first + seconds(four)) / 2
    how = f"together, {together * len(four) / sum(alone):.2f} times the mean cost of one"
    return BenchRow(f"dictionary.{name}", size, how, "each alone, in sum", together, sum(alone), float(len(four)))
