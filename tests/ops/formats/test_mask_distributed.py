"""Masks on two processes: replicated (DistributedDataParallel) and sharded (fully_shard), against one process."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from paucity.ops.formats import Masks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from paucity.ops.formats import Masks

folder, rank = sys.argv[1], int(sys.argv[2])
try:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
except (RuntimeError, ValueError, OSError) as error:
    print(f"no group: {error}")
    sys.exit(77)
from torch.distributed.fsdp import fully_shard

masks = Masks.load(f"{folder}/masks.safetensors")
x = torch.load(f"{folder}/x", weights_only=True)
for kind in ("replicated", "sharded"):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    model.load_state_dict(torch.load(f"{folder}/start", weights_only=True))
    wrapped = fully_shard(model, mesh=mesh) if kind == "sharded" else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    masks.install(optimizer, wrapped)
    for step in range(3):
        optimizer.zero_grad()
        (wrapped(x[step].chunk(2)[rank]) - 1).square().mean().backward()
        optimizer.step()
        assert masks.violations(wrapped) == {}, masks.violations(wrapped)
    assert masks.achieved_in(wrapped) == masks.sparsity(wrapped)
    assert Masks.from_zeros(wrapped) == masks
    whole = lambda tensor: tensor.full_tensor() if kind == "sharded" else tensor.detach().clone()
    end = {name.removeprefix("module."): whole(value) for name, value in wrapped.named_parameters()}
    end["state"] = whole(optimizer.state[next(wrapped.parameters())]["exp_avg"])
    torch.save(end, f"{folder}/{kind}{rank}")
    with torch.no_grad():
        first = next(wrapped.parameters())
        (first.to_local() if kind == "sharded" else first).fill_(float("nan"))
    assert masks.violations(wrapped) == {"0.weight": int((~masks["0.weight"]).sum())}
    masks.apply_(wrapped)
    assert masks.violations(wrapped) == {}
dist.destroy_process_group()
"""


def test_two_processes_train_as_one_and_obey(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    x = torch.randn(3, 8, 6)
    masks = Masks({f"{i}.weight": torch.rand(model[i].weight.shape) < 0.5 for i in (0, 2)}, nominal=0.5)
    masks.save(tmp_path / "masks.safetensors")
    torch.save(model.state_dict(), tmp_path / "start")
    torch.save(x, tmp_path / "x")
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), str(rank)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode == 77 for worker in workers):
        pytest.skip(f"no group of two processes here: {outputs}")
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    masks.install(optimizer, model)
    for step in range(3):
        optimizer.zero_grad()
        (model(x[step]) - 1).square().mean().backward()
        optimizer.step()
    expected = model.state_dict() | {"state": optimizer.state[model[0].weight]["exp_avg"]}
    for name in ("replicated0", "replicated1", "sharded0", "sharded1"):
        end = torch.load(tmp_path / name, weights_only=True)
        for key, value in end.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
        assert not end["state"][~masks["0.weight"]].any()
        assert all(not end[key][~mask].any() for key, mask in masks.items())
