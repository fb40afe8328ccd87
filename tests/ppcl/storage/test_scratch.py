"""The scratch folder is this user's own, so nobody else can put a file there that ppcl would read, and is bounded."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppcl.errors import UserError
from ppcl.storage.node_cache import mirror
from ppcl.storage.scratch import keep_used, private_temporary, reserve, scratch_bound, scratch_folder


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


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A scratch folder that may hold 1000 bytes."""
    monkeypatch.setenv("PPCL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("PPCL_SCRATCH_GB", "1e-6")
    return scratch_folder()


def put(path, size, age):
    """A file that was written some seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_was_used_longest_ago_is_removed_first_and_no_more_than_needed(scratch):
    old, newer = put(scratch / "ppcl-mirror/b/old", 400, 200), put(scratch / "ppcl-mirror/b/newer", 400, 100)
    reserve(scratch / "ppcl-mirror/b/new", 200, "s3://b/new")
    assert old.exists() and newer.exists()
    reserve(scratch / "ppcl-mirror/b/more", 300, "s3://b/more")
    assert not old.exists() and newer.exists()
    assert (scratch / "ppcl-mirror/b/more").stat().st_size == 300


def test_a_snapshot_is_removed_as_a_whole_and_by_its_last_use(scratch):
    one = [put(scratch / f"snapshots/1/{name}", 200, 100) for name in "ab"]
    two = [put(scratch / f"snapshots/2/{name}", 200, 200) for name in "ab"]
    # A process used it, and ended.
    subprocess.run([sys.executable, "-c", USE, str(scratch / "snapshots/2")], check=True)
    reserve(scratch / "snapshots/3/a", 300, "s3://b/a")
    assert not any(path.exists() for path in one) and all(path.exists() for path in two)


USE = "import sys, pathlib; from ppcl.storage.scratch import keep_used; keep_used(pathlib.Path(sys.argv[1]))"


def test_what_a_process_uses_stays_until_it_ends_or_is_killed(scratch):
    used, other = put(scratch / "ppcl-mirror/b/run/students/1", 600, 200), put(scratch / "ppcl-mirror/b/x", 300, 100)
    code = f"{USE}; print('ready', flush=True); input()"
    arguments = [sys.executable, "-c", code, str(scratch / "ppcl-mirror/b/run")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        reserve(scratch / "ppcl-mirror/b/new", 300, "s3://b/new")
        assert used.exists() and not other.exists()
        with pytest.raises(UserError, match="the scratch folder .* is full: it may hold 1e-06 GB .*PPCL_SCRATCH_GB"):
            reserve(scratch / "ppcl-mirror/b/large", 500, "s3://b/large")
        assert not (scratch / "ppcl-mirror/b/large").exists() and used.exists()
        process.kill()
    reserve(scratch / "ppcl-mirror/b/large", 500, "s3://b/large")
    assert not used.exists()


def test_what_this_process_uses_stays_too(scratch):
    used = put(mirror("s3://b/run") / "1", 600, 200)
    with pytest.raises(UserError, match="running processes use 6e-07"):
        reserve(scratch / "ppcl-mirror/b/new", 500, "s3://b/new")
    assert used.exists()


def test_more_than_the_disk_has_is_told_before_it_is_read(scratch, monkeypatch):
    monkeypatch.delenv("PPCL_SCRATCH_GB")
    monkeypatch.setattr("ppcl.storage.scratch._SHARE", 1e6)
    free = shutil.disk_usage(scratch).free
    with pytest.raises(UserError, match="the disk of the scratch folder .* GB free, and s3://b/new needs"):
        reserve(scratch / "ppcl-mirror/b/new", 2 * free, "s3://b/new")
    assert not (scratch / "ppcl-mirror/b/new").exists()


def test_what_is_on_its_way_already_takes_its_room(scratch):
    """Each of several downloads would fit alone."""
    reserve(scratch / "ppcl-mirror/b/one", 700, "s3://b/one")
    keep_used(scratch / "ppcl-mirror/b/one")
    with pytest.raises(UserError, match="is full"):
        reserve(scratch / "ppcl-mirror/b/two", 700, "s3://b/two")


@pytest.mark.parametrize("given", ["0", "-1", "many", "inf", "nan"])
def test_a_bound_that_is_none_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.setenv("PPCL_SCRATCH_GB", given)
    with pytest.raises(UserError, match=f"PPCL_SCRATCH_GB is '{given}': give a number of GB greater than 0"):
        scratch_bound(tmp_path)


def test_without_a_bound_it_is_a_share_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("PPCL_SCRATCH_GB", raising=False)
    assert scratch_bound(tmp_path) == pytest.approx(0.8 * shutil.disk_usage(tmp_path).total, abs=1)


def test_many_files_of_one_folder_take_one_mark(scratch):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        mirror(f"s3://b/run/states/{number}.parquet", is_file=True)
    mirror("s3://b/run/states")
    assert len(os.listdir("/proc/self/fd")) == before + 1


MAKE = (
    "import sys, pathlib; from ppcl.storage.scratch import private_temporary\n"
    "with private_temporary() as folder:\n"
    "    (folder / 'large').write_text('content')\n"
    "    print(folder, flush=True)\n"
    "    sys.stdin.read()"
)


@pytest.mark.parametrize("next_use", ["temporary", "download"])
def test_temporary_folders_of_killed_processes_go_at_the_next_use_and_those_of_others_stay(scratch, next_use):
    makers = [subprocess.Popen([sys.executable, "-c", MAKE], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    killed, running = (Path(maker.stdout.readline().strip()) for maker in makers)
    makers[0].kill()
    makers[0].wait()
    assert (killed / "large").exists() and len(list((scratch / "in-use").iterdir())) == 2
    if next_use == "temporary":
        with private_temporary() as own:
            assert {path.name for path in (scratch / "made").iterdir()} == {running.name, own.name}
    else:
        keep_used(scratch / "ppcl-mirror/b")
    assert not killed.exists() and (running / "large").exists()
    makers[1].stdin.close()
    assert makers[1].wait() == 0 and not running.exists()
    assert len(list((scratch / "in-use").iterdir())) == (next_use == "download")


def test_a_temporary_folder_stays_while_it_is_used_and_leaves_no_mark(scratch):
    with private_temporary() as temporary:
        kept = put(temporary / "a", 800, 100)
        with pytest.raises(UserError, match="is full"):
            reserve(scratch / "ppcl-mirror/b/new", 500, "s3://b/new")
        assert kept.exists()
    assert not temporary.exists() and not list((scratch / "in-use").iterdir())
