"""Times dictionaries in a process of its own, one call at a time: of SAELens, of overcomplete, or ours.

Started as ``python -c SOURCE JOB`` with JSON of ``who`` (``ours``, ``saelens``, ``overcomplete``), ``what`` (``step``,
``encode``, ``pursuit``), ``threads``, the sizes ``width``, ``atoms``, ``k`` and ``batch``, and ``autocast``, a way of
SAELens to be faster (its sparse activations do not train on a CPU). After each line on stdin it does its work once and
prints ``seconds`` as JSON.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

Job = dict[str, Any]
Call = Callable[[Tensor], object]
CHUNKS = 4


def data(job: Job) -> list[Tensor]:
    """Batches of sums of a few hidden directions, with noise."""
    generator = torch.Generator().manual_seed(0)
    width, batch = job["width"], job["batch"]
    hidden = torch.randn(4 * width, width, generator=generator) / width**0.5
    found = []
    for _ in range(CHUNKS):
        codes = torch.randn(batch, 4 * width, generator=generator).relu_()
        codes *= torch.rand(batch, 4 * width, generator=generator) < 0.02
        found.append(codes @ hidden + 0.02 * torch.randn(batch, width, generator=generator))
    return found


def ours(job: Job) -> Call:
    """Ours."""
    dictionary, trainer = (
        importlib.import_module("paucity.dictionary"),
        importlib.import_module("paucity.bench.dictionary"),
    )
    if job["what"] == "pursuit":
        pursuit = dictionary.MatchingPursuit(job["width"], job["atoms"], job["k"], centre=False).eval()
        return without_gradient(pursuit.encode)
    sae = dictionary.SparseAutoencoder(job["width"], job["atoms"], dictionary.TopK(job["k"]))
    if job["what"] == "encode":
        return without_gradient(sae.eval().encode)
    step: Call = trainer.stepper([sae], job["batch"])
    return step


def saelens(job: Job) -> Call:
    """Of SAELens: what its trainer does in a step, or an encoding by the dictionary as it is loaded."""
    module = importlib.import_module("sae_lens.saes.topk_sae")
    sizes = {"d_in": job["width"], "d_sae": job["atoms"], "k": job["k"], "device": "cpu"}
    if job["what"] == "encode":
        return without_gradient(module.TopKSAE(module.TopKSAEConfig(**sizes)).encode)
    inputs = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    sae = module.TopKTrainingSAE(module.TopKTrainingSAEConfig(**sizes))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))
    since = torch.zeros(job["atoms"])
    scores = torch.zeros(job["atoms"])

    def step(x: Tensor) -> None:
        sae.train()
        with torch.autocast("cpu", torch.bfloat16) if job["autocast"] else nullcontext():
            out = sae.training_forward_pass(
                step_input=inputs(
                    sae_in=x,
                    dead_neuron_mask=(since > 1000).bool(),
                    coefficients={},
                    n_training_steps=1,
                    is_logging_step=False,
                )
            )
            with torch.no_grad():
                firing = out.feature_acts.bool().float()
                fired = firing.sum(-2).bool()
                fired = fired.to_dense() if fired.is_sparse else fired
                since.add_(1)
                since[fired] = 0
                scores.add_(firing.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def overcomplete(job: Job) -> Call:
    """Of overcomplete: its training step with the loss of its examples, or its encodings."""
    for unused in ("models", "visualization"):  # which want older libraries than it asks for
        sys.modules[f"overcomplete.{unused}"] = MagicMock()
    module = importlib.import_module("overcomplete.sae")
    if job["what"] == "pursuit":
        pursuit = module.MpSAE(job["width"], nb_concepts=job["atoms"], k=job["k"]).eval()
        return without_gradient(pursuit.encode)
    sae = module.TopKSAE(job["width"], nb_concepts=job["atoms"], top_k=job["k"])
    if job["what"] == "encode":
        return without_gradient(sae.eval().encode)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        _, _, reconstruction = sae(x)
        loss = (x - reconstruction).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step


def without_gradient(call: Call) -> Call:
    """``call``, keeping nothing for a backward pass."""
    return torch.no_grad()(call)


def main() -> None:
    """Do the job, once for each line."""
    job: Job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    call = {"ours": ours, "saelens": saelens, "overcomplete": overcomplete}[job["who"]](job)
    batches = data(job)
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        call(batches[number % CHUNKS])
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
