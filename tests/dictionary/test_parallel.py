"""Two processes that train together, each on its own part of every batch, against one."""

import os
import subprocess
import sys

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary.batch_topk import BatchTopK
from paucity.dictionary.sae import SparseAutoencoder
from paucity.dictionary.sources import ActivationSource
from paucity.dictionary.topk import TopK
from paucity.dictionary.trainer import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

DATA = torch.randn(8, 64, 12, generator=torch.Generator().manual_seed(0)) + 0.5
OPTIONS = {"num_tokens": 8 * 64, "batch_size": 64, "learning_rate": 1e-2, "checkpoint_every": 3, "clip_norm": 0.5}


class Fixed(ActivationSource):
    """Given batches, one of several parts of each."""

    def __init__(self, part=0, parts=1):
        self.input_size, self.part, self.parts = 12, part, parts

    def batches(self, batch_size, *, start=0):
        if batch_size > 64:  # what the scale and the offset are estimated on
            yield DATA.flatten(0, 1).chunk(self.parts)[self.part]
            return
        for number in range(start, 10**6):
            part = DATA[number % 8].chunk(self.parts)[self.part]
            assert len(part) == batch_size
            yield part


def make(seed=0):
    return [
        SparseAutoencoder(12, 30, TopK(3), silent_after=100, seed=seed),
        SparseAutoencoder(12, 30, TopK(30), seed=seed + 1),
    ]


def worker(folder, rank):
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"no group: {error}")
        sys.exit(77)
    each = make(seed=5 * rank)  # the first process's start counts
    trained = train(each, Fixed(rank, 2), keep=folder / "keep", **OPTIONS)
    torch.save([one.state_dict() for one in each], folder / f"end{rank}")
    assert trained.num_tokens == 8 * 64
    batch = SparseAutoencoder(12, 30, BatchTopK(3))
    train(batch, Fixed(rank, 2), **OPTIONS)
    torch.save(batch.state_dict(), folder / f"batch{rank}")
    again = make() if rank else each  # that the first was fit counts for all
    train(again, Fixed(rank, 2), **OPTIONS)
    torch.save([one.state_dict() for one in again], folder / f"again{rank}")
    with pytest.raises(InputError, match="multiple of the 2 processes"):
        train(make(), Fixed(rank, 2), **OPTIONS | {"batch_size": 63})
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    code = "import sys, pathlib; from test_parallel import worker; worker(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)], env=env, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    if any(rank.returncode == 77 for rank in ranks):
        pytest.skip("".join(said))
    assert [rank.returncode for rank in ranks] == [0, 0]
    ends = [torch.load(tmp_path / f"end{rank}") for rank in range(2)]
    alone = make()
    train(alone, Fixed(), **OPTIONS)
    for one, other, single in zip(*ends, alone, strict=True):
        for name, value in single.state_dict().items():
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name], value, atol=2e-5, rtol=1e-4)
    batches = [torch.load(tmp_path / f"batch{rank}") for rank in range(2)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    again = [torch.load(tmp_path / f"again{rank}") for rank in range(2)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(*again, strict=True) for name in one)
    assert (tmp_path / "keep" / "checkpoint.safetensors").is_file()
