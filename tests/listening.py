"""What the processes of a command listen at, and what somebody on another host can do with it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import subprocess
import sys
import uuid

import psutil
import pytest

# Runs on the other host: prints "refused" for a closed port, and what an open one answers to a call without a token.
_CALLER = """
import socket, sys
import grpc
address, *ports = sys.argv[1:]
for port in ports:
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError:
        print(port, "refused")
        continue
    call = grpc.insecure_channel(f"{address}:{port}").unary_unary("/ray.serve.ASGIService/HandleRequestWithRejection")
    try:
        call(b"", timeout=10)
        print(port, "answered")
    except grpc.RpcError as error:
        print(port, error.code().name)
"""


def sockets(pid: int) -> list[tuple[psutil.Process, str, int]]:
    """`(process, address, port)` of everything that a process and its children listen at."""
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            found += [(process, c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def exposed(pid: int) -> list[str]:
    """What of it is not on loopback, but for the gRPC ports of Ray Serve's replicas, in words for a failed test."""
    return [
        f"{process.name()} at {address}:{port}"
        for process, address, port in sockets(pid)
        if not _is_loopback(address) and not _is_replica(process)
    ]


def _is_loopback(address: str) -> bool:
    """IPv4 addresses of a socket of both families are written as IPv6 ones."""
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _is_replica(process: psutil.Process) -> bool:
    return "ServeReplica" in " ".join(process.cmdline())


@contextlib.contextmanager
def other_host():
    """A network namespace that reaches this machine by one address of ours; gives `(namespace, address)`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make another host")
    name = f"ppcl{uuid.uuid4().hex[:6]}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip address add 10.231.77.1/30 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} address add 10.231.77.2/30 dev {name}b",
        f"ip -n {name} link set {name}b up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield name, "10.231.77.1"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def answers(namespace: str, address: str, ports: set[int]) -> dict[int, str]:
    """By port, what somebody in a namespace gets: `refused`, `answered`, or the status of a call without a token."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", _CALLER, address, *map(str, sorted(ports))]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return {int(port): answer for port, answer in (line.split() for line in said.splitlines())}


def nobody_else_gets_in(pid: int) -> None:
    """What must hold of a command that runs: nothing but loopback, and from another host no port that does anything."""
    listening = sockets(pid)
    assert len(listening) > 3, "it listens nowhere: the wrong process was looked at"
    assert exposed(pid) == []
    with other_host() as (namespace, address):
        got = answers(namespace, address, {port for _, _, port in listening})
        assert set(got.values()) <= {"refused", "UNAUTHENTICATED"}, got
