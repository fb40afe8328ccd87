"""The packages that a submitted job takes along to nodes that lack them, in the versions that are installed here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ppcl.config.schema import Config
from ppcl.errors import UserError

# Ray on the nodes is that of the cluster, with what it needs to be one; what its other extras need comes along.
_OF_THE_CLUSTER, _EXTRA_OF_THE_CLUSTER = "ray", "default"
_EXTRAS = ("jobs",)


def pinned_dependencies(config: Config) -> list[str]:
    """What a job with this configuration imports, and what that needs, as requirements of pip, sorted.

    Raises `UserError` where something is not installed from an index, so that the nodes could not find it.
    """
    tracking = config.tracking
    tracked = tracking.tensorboard is not None or tracking.mlflow is not None or tracking.wandb is not None
    extras = {*_EXTRAS, *(["tracking"] if tracked else [])}
    waiting = [(_installed("ppcl"), extra) for extra in ("", *sorted(extras))]
    pins: dict[str, str] = {}
    seen = {("ppcl", extra) for _, extra in waiting}
    while waiting:
        package, extra = waiting.pop()
        for needed in _requirements(package, extra):
            name = canonicalize_name(needed.name)
            try:
                found = distribution(name)
            except PackageNotFoundError:
                # For another system, or for who installs there to decide.
                continue
            wanted = {"", *needed.extras}
            if name == _OF_THE_CLUSTER:
                wanted -= {"", _EXTRA_OF_THE_CLUSTER}
            elif name != "ppcl":
                pins[name] = _pin(found)
            new = {(name, extra) for extra in wanted} - seen
            seen |= new
            waiting += [(found, extra) for _, extra in new]
    return [pins[name] for name in sorted(pins)]


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise UserError(
            f"--env needs {name} to be installed here, to know what it depends on; pip install it, or leave --env out"
        ) from None


def _requirements(package: Distribution, extra: str) -> Iterator[Requirement]:
    """What a package needs on this system: without an extra always, with one for that extra."""
    for text in package.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else (not always and marker is not None and marker.evaluate({"extra": extra})):
            yield requirement


def _pin(package: Distribution) -> str:
    name, source = package.metadata["Name"], json.loads(package.read_text("direct_url.json") or "{}")
    if "vcs_info" in source:
        return f"{name} @ {source['vcs_info']['vcs']}+{source['url']}@{source['vcs_info']['commit_id']}"
    if source.get("url", "").startswith("file:"):
        raise UserError(
            f"--env cannot send {name}: it is installed here from {source['url']} and not from an index, where the "
            "nodes could find it; install a release of it, or give the nodes an image that has it"
        )
    # Such as 2.13.0+cpu: which build a node needs is for its own index to say.
    return f"{name}=={Version(package.version).public}"
