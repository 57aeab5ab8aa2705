"""The native library: absent, of another version or loaded, the package says which and goes on."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels import dispatch, native


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("PAUCITY_KERNELS", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def absent(monkeypatch, tmp_path):
    monkeypatch.setattr(native.resources, "files", lambda _: tmp_path)


def test_a_missing_library_is_said_and_the_reference_computes(monkeypatch, tmp_path):
    absent(monkeypatch, tmp_path)
    assert native.library() is None
    assert native.instruction_sets() == []
    facts = dispatch.status()
    assert facts["native"] == "not built"
    assert facts["sparse attention"] == "reference"
    assert dispatch.twin("sparse attention", torch.ones(1)) == "reference"
    with pytest.raises(InputError, match="the native library must be built, got none"):
        native.function("zz")()


@pytest.mark.parametrize(("version", "found"), [(native.ABI_VERSION, True), (native.ABI_VERSION + 1, False)])
def test_only_its_own_version_is_taken(monkeypatch, tmp_path, version, found):
    (tmp_path / "paucity_native.so").touch()
    sets_of = SimpleNamespace(restype=None)
    loaded = SimpleNamespace(paucity_abi_version=lambda: version, paucity_instruction_sets=sets_of)
    absent(monkeypatch, tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: loaded)
    assert (native.library() is loaded) == found
    assert sets_of.restype is ctypes.c_char_p


def test_the_request_is_read_checked_and_followed(monkeypatch, tmp_path):
    assert dispatch.requested() == "auto"
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    assert dispatch.twin("codes", torch.ones(1)) == "reference"
    monkeypatch.setenv("PAUCITY_KERNELS", "fast")
    with pytest.raises(InputError, match="must be one of auto, native, reference, triton, got fast"):
        dispatch.requested()
    monkeypatch.setenv("PAUCITY_KERNELS", "native")
    absent(monkeypatch, tmp_path)
    with pytest.raises(InputError, match="got native, which was not built"):
        dispatch.twin("codes", torch.ones(1))
    monkeypatch.setenv("PAUCITY_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(InputError, match="got triton, which is not installed"):
        dispatch.twin("codes", torch.ones(1))


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_dtypes_and_instruction_sets(monkeypatch):
    assert dispatch.twin("codes", torch.ones(1)) == "native"
    assert dispatch.twin("codes", torch.ones(1).double()) == "reference"
    assert dispatch.twin("codes", torch.ones(1, device="meta")) == "reference"
    monkeypatch.setenv("PAUCITY_ISA", "plain")
    assert native.instruction_set() == "plain"
    assert dispatch.status()["codes"] == "native, plain"
    monkeypatch.setenv("PAUCITY_ISA", "sse9")
    with pytest.raises(InputError, match="PAUCITY_ISA must be one of"):
        native.instruction_set()


def test_dense_runs_are_counted_where_someone_listens():
    dispatch.note_dense("codes", "nobody listens")
    with dispatch.dense_runs() as counted:
        dispatch.note_dense("codes", "too small")
        dispatch.note_dense("codes", "too small")
    assert dict(counted) == {"codes ran dense: too small": 2}
