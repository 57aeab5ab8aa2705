import os

import pytest

from paucity.checks import InputError
from paucity.measure import data

needs_data = pytest.mark.skipif("PAUCITY_DATA" not in os.environ, reason="PAUCITY_DATA is not set")


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A standard library of a few files, without a test package."""
    monkeypatch.setattr(data, "_stdlib_root", lambda: tmp_path)
    for name in ("argparse.py", "ast.py", "json/decoder.py", "encodings/cp437.py", "site-packages/x.py", "queues.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" + "x = 1\n" * 50)
    (tmp_path / "same.py").write_text((tmp_path / "ast.py").read_text())
    (tmp_path / "short.py").write_text("x\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 50)
    (tmp_path / "big.py").write_text("x = 1\n" * 100_000)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    return tmp_path


def test_documents_without_a_test_package(stdlib):
    assert [text.split("\n")[0] for text in data.python_documents()] == ["# ast.py", "# json/decoder.py"]
    assert data.held_out_python() == (stdlib / "argparse.py").read_text()


def test_tests_can_be_left_out(stdlib):
    (stdlib / "test").mkdir()
    (stdlib / "test/test_ast.py").write_text("# test_ast.py\n" + "y = 1\n" * 50)
    (stdlib / "test/test_argparse.py").write_text("# test_argparse.py\n" + "y = 1\n" * 50)
    assert [text.split("\n")[0] for text in data.python_documents()][-1] == "# test_ast.py"
    assert len(data.python_documents(include_tests=False)) == 2


def test_held_out_python_of_this_machine():
    text = data.held_out_python()
    assert len(text.encode()) > 300_000
    assert "class ArgumentParser" in text
    assert text.endswith("\n")


def test_absent_data(tmp_path, monkeypatch):
    monkeypatch.delenv("PAUCITY_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"PAUCITY_DATA is not set; the set is public at https://"):
        data.tiny_stories()
    monkeypatch.setenv("PAUCITY_DATA", str(tmp_path))
    for load in (data.gutenberg_books, data.tiny_stories, data.wiki_text):
        with pytest.raises(FileNotFoundError, match=r"holds no .*; the set is public at https://"):
            load()
    with pytest.raises(InputError, match="split must be one of test, valid, got train"):
        data.wiki_text("train")


def test_loaders_read_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAUCITY_DATA", str(tmp_path))
    (tmp_path / "tinystories_sample").mkdir()
    (tmp_path / "tinystories_sample/tinystories_1000.json").write_text('["Once", "Twice é"]', encoding="utf-8")
    assert data.tiny_stories() == ["Once", "Twice é"]


@needs_data
def test_real_sets():
    assert len(data.tiny_stories()) == 1000
    assert len(data.wiki_text("valid").replace("\n", " <eos> ").split()) == 217_646
