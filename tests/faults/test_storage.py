"""Whole jobs whose storage fails: a bucket that is out of order, a folder that becomes read-only."""

import subprocess

import pytest

from tests import bucket
from tests.faults.jobs import Job, checkpoints, same, students, trained_no_more_than_needed

pytestmark = pytest.mark.faults


def test_a_bucket_that_fails_for_long_ends_in_one_sentence_and_the_job_goes_on_later(values, undisturbed, s3, tmp_path):
    from ppcl.storage.node_cache import mirror
    from ppcl.storage.object_store import Store

    url = f"{s3.bucket}/result"
    with s3.failing(bucket.error(503, "SlowDown"), lambda r: "students" in r.path and r.method == "PUT"):
        ended = Job(values, url, beside=tmp_path / "job").end(2)
    assert (
        ended.error.startswith("ppcl: the store of s3://") and "it answers 503 SlowDown; tried 3 times" in ended.error
    )
    assert "Traceback" not in ended.said
    said = Store(url).read("log.txt").decode()
    assert "students: 11 replacements" in said
    # And now and then it is slow.
    with s3.failing(bucket.slow(2), times=20):
        ended = Job(values, url, beside=tmp_path / "job").until("variants: ")
    assert "probes: complete, skipped" in ended.said
    assert "manifest.json" in Store(url).objects() and Store(url).read("log.txt").decode().startswith(said)
    same(students(mirror(url)), undisturbed)


def test_a_folder_that_becomes_read_only_is_told_and_the_job_goes_on_later(values, result, undisturbed):
    job, folder = Job(values, result), result / "students"
    job.wait_until(lambda: checkpoints(result))
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        job.kill()
        pytest.skip("this user may not mount a folder read-only")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        assert "cannot be written: Read-only file system" in job.end(2).error and "Traceback" not in job.said
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    job = Job(values, result).until("variants: ")
    same(students(result), undisturbed)
    trained_no_more_than_needed(job.tally, at_any_moment=True)
