"""Prunes a model with llm-compressor in its own Python, and says what that took.

Started as ``python -c SOURCE JOB``, a JSON file of ``model`` (a folder), ``method`` (``wanda`` or ``sparsegpt``),
``sparsity``, ``pattern`` (such as ``2:4``, or ``0:0``), ``tokens`` (a file of lists of ids), ``threads``,
``propagate_error`` (whether a block is calibrated behind the pruned ones, in a second pass), and ``out``, a safetensors
file for the weights that were pruned. The last line of stdout is JSON: ``seconds`` of pruning alone,
``loaded_mb`` and ``peak_mb`` of the process, and ``version``.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def peak_mb(process: int | str = "self") -> float:
    """Most memory that this program has held, in MB of 10^6 bytes, or, on Linux alone, another (NaN elsewhere)."""
    status = Path(f"/proc/{process}/status")
    if status.exists():  # what getrusage says begins at what the parent held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    if process != "self":
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    """Do the job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets, torch_data = __import__("datasets"), __import__("torch.utils.data", fromlist=["DataLoader"])
    oneshot = __import__("llmcompressor").oneshot
    pruning = __import__("llmcompressor.modifiers.pruning", fromlist=["WandaPruningModifier"])
    modifier = {"wanda": pruning.WandaPruningModifier, "sparsegpt": pruning.SparseGPTModifier}[job["method"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    rows = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))
    data = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    loader = torch_data.DataLoader(data.with_format("torch"), batch_size=1)
    loaded = peak_mb()
    recipe = modifier(
        sparsity=job["sparsity"], mask_structure=job["pattern"], targets=["Linear"], ignore=["re:.*lm_head"]
    )
    started = time.perf_counter()
    options = {"pipeline": "sequential", "propagate_error": job["propagate_error"]}
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(rows), **options)
    seconds = time.perf_counter() - started
    peak = peak_mb()
    weights = {
        name: weight.detach().contiguous()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and ".layers." in name
    }
    save_file(weights, job["out"])
    figures = {"seconds": seconds, "loaded_mb": loaded, "peak_mb": peak, "version": version("llmcompressor")}
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
