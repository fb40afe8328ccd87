"""Who uses the CPUs or GPUs of a cluster, by the records that Ray's head keeps of actors, placement groups and jobs.

The head answers without a dashboard, which Ray's state API would need. What single tasks use is in none of its records:
it is what remains of that which is not free. An answer takes time in proportion to the live actors and placement groups
of the cluster.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import ray
from ray._private import state
from ray.core.generated import gcs_pb2

# Of what a user is told at most, those that use most.
_TOLD = 3
_SUBMISSION_ID = "job_submission_id"  # of Ray's job API, in a job's metadata


@dataclass(frozen=True)
class Usage:
    """What jobs use of one resource: `by_job` by id, in hexadecimal digits, and what is in no record, by tasks."""

    by_job: dict[str, float]
    by_tasks: float


def free(kind: str) -> int:
    """How many whole CPUs or GPUs no one uses; parts on several nodes make no whole one."""
    return sum(math.floor(node.get(kind, 0)) for node in state.available_resources_per_node().values())


def usage(kind: str) -> Usage:
    """Who uses a resource, such as `GPU`, now."""
    accessor = state.state._connect_and_get_accessor()
    by_job: Counter[str] = Counter()
    for record in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        if group.state == group.CREATED:
            by_job[group.creator_job_id.hex()] += sum(bundle.unit_resources.get(kind, 0) for bundle in group.bundles)
    # One whose constructor runs has what it needs, and a worker's address with it.
    for record in [*accessor.get_actor_table(None, "ALIVE"), *accessor.get_actor_table(None, "PENDING_CREATION")]:
        actor = gcs_pb2.ActorTableData.FromString(record)
        if actor.address.worker_id and not actor.placement_group_id:  # else the group counts
            by_job[actor.job_id.hex()] += actor.required_resources.get(kind, 0)
    used = ray.cluster_resources().get(kind, 0) - ray.available_resources().get(kind, 0)
    return Usage({job: amount for job, amount in by_job.items() if amount > 0}, max(0.0, used - by_job.total()))


def told(used: Usage) -> str:
    """`6 are in use by job raysubmit_x (train.py on 10.0.0.4)`, or `none is in use`."""
    names = _names(set(used.by_job))
    shares = sorted(used.by_job.items(), key=lambda item: -item[1])
    users = [(amount, names.get(job, f"job {job}")) for job, amount in shares[:_TOLD]]
    users += [(sum(amount for _, amount in shares[_TOLD:]), "other jobs"), (used.by_tasks, "tasks")]
    users = [(amount, user) for amount, user in users if amount > 0]
    total = sum(amount for amount, _ in users)
    if not users:
        return "none is in use"
    in_use = f"{_number(total)} {'is' if total == 1 else 'are'} in use"
    if len(users) == 1:
        return f"{in_use} by {users[0][1]}"
    return f"{in_use}: {', '.join(f'{_number(amount)} by {user}' for amount, user in users)}"


def _names(jobs: set[str]) -> dict[str, str]:
    """By id, what a job's owner would know it by: its id at the job API, its program and its driver's address."""
    accessor, own = state.state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    names = {}
    for record in accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True):
        job = gcs_pb2.JobTableData.FromString(record)
        if (identity := job.job_id.hex()) in jobs:
            name = job.config.metadata.get(_SUBMISSION_ID) or identity
            where = "ended" if job.is_dead else f"{_program(job.entrypoint)} on {job.driver_address.ip_address}"
            names[identity] = "this job" if identity == own else f"job {name} ({where})"
    return names


def _program(entrypoint: str) -> str:
    """The script or module of a command; its arguments may hold what is nobody else's business."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        words = entrypoint.split()
    rest = words[1:] if words and PurePosixPath(words[0]).name.startswith("python") else words
    if rest[:1] == ["-m"] and len(rest) > 1:
        return rest[1]
    if rest[:1] == ["-c"]:
        rest = []
    first = next((word for word in rest if not word.startswith("-")), words[0] if words else "a driver")
    return PurePosixPath(first).name


def _number(amount: float) -> str:
    return f"{amount:.2f}".rstrip("0").rstrip(".")
