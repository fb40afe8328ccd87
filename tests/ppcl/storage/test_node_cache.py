"""The scratch folder is this user's own: nobody else can put a file there that ppcl would read."""

import os
import stat

import pytest

from ppcl.errors import UserError
from ppcl.storage.node_cache import scratch_folder


def mode(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_folder_is_made_private_in_the_temporary_one(tmp_path, monkeypatch):
    monkeypatch.delenv("PPCL_SCRATCH", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    os.chmod(tmp_path, 0o1777)
    folder = scratch_folder()
    assert folder == tmp_path / f"ppcl-{os.getuid()}" and mode(folder) == 0o700
    assert scratch_folder() == folder


def test_a_folder_that_is_given_is_taken_where_it_is_private(tmp_path, monkeypatch):
    for given in (tmp_path, tmp_path / "new"):
        monkeypatch.setenv("PPCL_SCRATCH", str(given))
        assert scratch_folder() == given
    assert mode(tmp_path / "new") == 0o700


def test_a_volume_that_others_can_write_to_gets_a_private_folder(tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o777)
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path))
    folder = scratch_folder()
    assert folder == tmp_path / f"ppcl-{os.getuid()}" and mode(folder) == 0o700


@pytest.mark.parametrize("trap", ["writable", "link", "file", "somebody else's"])
def test_what_somebody_else_may_have_put_there_is_refused(tmp_path, monkeypatch, trap):
    os.chmod(tmp_path, 0o777)
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path))
    folder = tmp_path / f"ppcl-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        os.chmod(folder, 0o777 if trap == "writable" else 0o700)
    if trap == "somebody else's":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match=rf"the scratch folder {folder} is not private to this user"):
        scratch_folder()
