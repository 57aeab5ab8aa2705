"""Pruning a model of 125 million weights from folder to folder, against llm-compressor in a process of its own.

Each job runs in a fresh process, ours and theirs in turns. Our seconds hold reading the model and writing it; theirs
are of the pruning alone. Memory is the peak of the process. Ours calibrates in the dense model, in one pass; theirs, as
it comes, behind pruned blocks, in two. One more row has both in the dense model.

Llm-compressor wants libraries of its own, so it may live in another environment: `PAUCITY_LLMCOMPRESSOR_PYTHON` names
that environment's Python; without it, this one's is asked. Where it is nowhere, the baseline is what calibrating all
sites of a block before pruning them takes at least: two passes of the dense model over the calibration.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..models.load import byte_tokenizer
from ..models.sites import find_sites
from ..models.streamed import Streamed
from ..weights import SparseGPT, Wanda
from ..weights.to_folder import prune_folder
from . import BenchRow
from .llama125m import llama125m
from .llmcompressor_peer import peak_mb

VARIABLE = "PAUCITY_LLMCOMPRESSOR_PYTHON"
NUM_SAMPLES, LENGTH = 32, 512
METHODS = {"wanda": Wanda, "sparsegpt": SparseGPT}


def run() -> list[BenchRow]:
    """Both methods at 2:4 and at 50 %."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = llama125m()
        model.save_pretrained(folder / "model")
        byte_tokenizer(model.config.vocab_size).save_pretrained(folder / "model")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (NUM_SAMPLES, LENGTH), generator=generator)
        (folder / "tokens.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
        with torch.no_grad():
            model.model(ids[:4], use_cache=False)
            started = time.perf_counter()
            for batch in torch.split(ids, 4):
                model.model(batch, use_cache=False)
            forward = time.perf_counter() - started
        del model
        rows = [_row(folder, method, pattern, forward) for pattern in ("2:4", "0:0") for method in METHODS]
        return [*rows, _row(folder, "wanda", "2:4", forward, propagate_error=False)]


def ours(job: str) -> None:
    """One job of ours, in this process; prints what `llmcompressor_peer` prints."""
    given: dict[str, Any] = json.loads(Path(job).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    n, m = map(int, given["pattern"].split(":"))
    options: dict[str, Any] = {"n": n, "m": m} if m else {"sparsity": given["sparsity"]}
    rows = json.loads(Path(given["tokens"]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    batches = [torch.tensor([row]) for row in rows]
    prune_folder(given["model"], given["out"], METHODS[given["method"]](**options), calibration=batches)
    seconds = time.perf_counter() - started
    print("\n" + json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


def _row(folder: Path, method: str, pattern: str, forward: float, *, propagate_error: bool = True) -> BenchRow:
    job = {"model": str(folder / "model"), "tokens": str(folder / "tokens.json"), "method": method, "sparsity": 0.5}
    job |= {"pattern": pattern, "threads": torch.get_num_threads(), "propagate_error": propagate_error}
    label = "2:4" if pattern == "2:4" else "50 %"
    mine = _ask(
        sys.executable,
        "from paucity.bench.prune import ours; import sys; ours(sys.argv[1])",
        folder,
        job | {"out": str(folder / f"ours-{method}-{label[:2]}-{propagate_error}")},
    )
    size = f"Llama 125 M, {NUM_SAMPLES} x {LENGTH} tokens, {label}"
    name = f"prune.{method}" + ("" if pattern == "2:4" else "50") + ("" if propagate_error else "_alike")
    what = f"folder to folder, peak {mine['peak_mb']:.0f} MB"
    python = os.environ.get(VARIABLE) or (sys.executable if importlib.util.find_spec("llmcompressor") else None)
    if python is None:
        return BenchRow(
            name, size, what, "dense passes", mine["seconds"], (1 + propagate_error) * forward, 1.0 + propagate_error
        )
    script = Path(__file__).with_name("llmcompressor_peer.py").read_text(encoding="utf-8")
    theirs = _ask(python, script, folder, job | {"out": str(folder / "theirs.safetensors")})
    agree = _agreement(folder / f"ours-{method}-{label[:2]}-{propagate_error}", folder / "theirs.safetensors")
    peer = f"llm-compressor {theirs['version']}, peak {theirs['peak_mb']:.0f} MB"
    return BenchRow(
        name,
        f"{size}, masks agree {agree:.1%}",
        what,
        peer,
        mine["seconds"],
        theirs["seconds"],
        theirs["seconds"] / forward,
    )


def _ask(python: str, script: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [python, "-c", script, str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"bench: pruning must end well, got exit status {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _agreement(folder: Path, theirs: Path) -> float:
    """Share of the pruned weights on which both say the same."""
    streamed, same, total = Streamed(folder), 0, 0
    with safe_open(theirs, "pt") as file:
        for site in find_sites(streamed.model, "linear"):
            streamed.fill([site.name])
            kept = streamed.model.get_parameter(site.name) != 0
            same += int((kept == (file.get_tensor(site.name) != 0)).sum())
            total += kept.numel()
            streamed.drop([site.name])
    return same / total
