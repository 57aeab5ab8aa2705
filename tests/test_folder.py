import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from paucity.checks import InputError
from paucity.folder import Folder, replacing


class Plan(BaseModel):
    number: int = 1


def test_a_published_folder_replaces_the_older_one_and_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/before").touch()
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old/mine").write_text("kept")
    folder = Folder(tmp_path / "out", "job")
    with pytest.raises(InputError, match="out must not exist"):
        folder.check(Plan(), force=False, resume=False)
    folder.open(Plan(), resume=False)
    folder.keep("stage", 3)
    (folder.partial / "after").touch()
    folder.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["after"]
    assert (tmp_path / "out.old/mine").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.old"}


def test_a_kill_while_it_is_opened_or_published_leaves_no_dead_end(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "out", "job")
    folder.partial.mkdir()
    (folder.partial / "plan.json.tmp").write_text("{")  # killed before the first plan was whole
    for resume in (False, True):
        folder.check(Plan(), force=False, resume=resume)
    folder.open(Plan(), resume=True)
    folder.keep("stage", 3)

    def killed(*_, **__):
        raise KeyboardInterrupt

    for kind, name in ((Path, "rename"), (shutil, "rmtree"), (Path, "unlink")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, killed)
            with pytest.raises(KeyboardInterrupt):
                folder.publish()
        if not folder.out.exists():
            folder.check(Plan(), force=False, resume=True)
            assert folder.once("stage", killed) == 3
        else:
            assert not folder.partial.exists()
            folder.out.rename(folder.partial)


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def half():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_safetensors_cannot_write_is_an_os_error(tmp_path):
    def full():
        with replacing(tmp_path / "file"):
            raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(OSError, match=r"file could not be written: I/O error: No space left"):
        full()
    assert not list(tmp_path.iterdir())
