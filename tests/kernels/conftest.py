"""The twins of a kernel, one after the other: the reference, native code for each instruction set, and Triton."""

from dataclasses import dataclass

import numpy
import pytest
import torch

from paucity.kernels import dispatch, native

TWINS = ("reference", "native-plain", "native-avx2", "native-avx512", "native-avx512bf16", "triton")


@dataclass(frozen=True)
class Twin:
    """Which twin is forced, and where its tensors live."""

    name: str
    device: str


@pytest.fixture(params=TWINS)
def twin(request, monkeypatch):
    """Force one twin for a test; skip where this machine lacks it."""
    name, _, isa = request.param.partition("-")
    if name == "native" and isa not in native.instruction_sets():
        pytest.skip(f"no native library for {isa} here")
    if name == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    monkeypatch.setenv("PAUCITY_KERNELS", name)
    monkeypatch.setenv("PAUCITY_ISA", isa)
    # Triton's interpreter computes with numpy, which would warn where a GPU silently makes NaN of 0 * inf.
    with numpy.errstate(invalid="ignore", over="ignore"):
        yield Twin(name, "cuda" if name == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[1, 2])
def threads(request):
    """Run a test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def native_twin(monkeypatch):
    """Force native code in the best instruction set; skip where it was not built."""
    if native.library() is None:
        pytest.skip("the native library was not built")
    monkeypatch.setenv("PAUCITY_KERNELS", "native")
