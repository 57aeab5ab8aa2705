"""The native library: absent, of another version or loaded, the package says which and goes on."""

import ctypes
from types import SimpleNamespace

import pytest

from paucity.checks import InputError
from paucity.kernels import native


@pytest.fixture(autouse=True)
def _fresh():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(native.resources, "files", lambda _: tmp_path)
    assert native.library() is None
    assert native.status()["native"] == "not built"


@pytest.mark.parametrize(("version", "found"), [(native.ABI_VERSION, True), (native.ABI_VERSION + 1, False)])
def test_only_its_own_version_is_taken(monkeypatch, tmp_path, version, found):
    (tmp_path / "paucity_native.so").touch()
    set_of = SimpleNamespace(restype=None)
    loaded = SimpleNamespace(paucity_abi_version=lambda: version, paucity_instruction_set=set_of)
    monkeypatch.setattr(native.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: loaded)
    assert (native.library() is loaded) == found
    assert set_of.restype is ctypes.c_char_p


def test_the_request_is_read_and_checked(monkeypatch):
    monkeypatch.delenv("PAUCITY_KERNELS", raising=False)
    assert native.requested() == "auto"
    monkeypatch.setenv("PAUCITY_KERNELS", "fast")
    with pytest.raises(InputError, match="must be one of auto, native, reference, triton, got fast"):
        native.requested()
