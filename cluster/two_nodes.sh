#!/usr/bin/env bash
# A real cluster of two nodes on one machine: two network namespaces with addresses of their own, a head in one, a worker in
# the other, a token between them, and nothing shared but the file system.
#
#     cluster/two_nodes.sh ppcl compress job.yaml --address 10.77.0.1:6379
#
# runs a command on the head's node when both are up, and takes all down after it. Needs root and iproute2. The machine itself is
# 10.77.0.254 for both: a bucket's server that listens there is reached by AWS_ENDPOINT_URL=http://10.77.0.254:PORT.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 COMMAND..." >&2; exit 64; }
[ "$(id -u)" = 0 ] || { echo "$0: network namespaces need root" >&2; exit 69; }
command -v ip >/dev/null || { echo "$0: ip is not there; install iproute2" >&2; exit 69; }

name="ppcl$$"
folder="$(mktemp -d)"
nodes=()

down() {
    for pid in "${nodes[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
    sleep 1
    for pid in "${nodes[@]}"; do kill -9 -- "-$pid" 2>/dev/null || true; done
    for node in 1 2; do ip netns delete "$name-$node" 2>/dev/null || true; done
    ip link delete "$name" 2>/dev/null || true
    rm -rf "$folder"
}
trap down EXIT
trap 'exit 130' INT TERM

ip link add "$name" type bridge
ip address add 10.77.0.254/24 dev "$name"
ip link set "$name" up
for node in 1 2; do
    ip netns add "$name-$node"
    ip link add "$name-$node" type veth peer name eth0 netns "$name-$node"
    ip link set "$name-$node" master "$name" up
    ip -n "$name-$node" address add "10.77.0.$node/24" dev eth0
    ip -n "$name-$node" link set eth0 up
    ip -n "$name-$node" link set lo up
done

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
# Ray counts machines by their cores; both nodes have these, and a bucket's files in folders of their own.
RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')"
export RAY_AUTH_TOKEN
common=(--block --num-cpus=3 --object-store-memory=200000000 --disable-usage-stats)

PPCL_SCRATCH="$folder/1" setsid ip netns exec "$name-1" ray start --head --port=6379 --node-ip-address=10.77.0.1 \
    --temp-dir="$folder/head" --dashboard-host=10.77.0.1 "${common[@]}" >"$folder/head.log" 2>&1 &
nodes+=($!)

up() {
    # The nodes that the head knows of.
    ip netns exec "$name-1" python -c 'import ray, sys
ray.init(address="10.77.0.1:6379", log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))' "$1" >/dev/null 2>&1
}

wait_for() {
    for _ in $(seq 60); do up "$1" && return; sleep 2; done
    echo "$0: node $1 did not start" >&2
    tail -n 20 "$folder"/*.log >&2
    exit 1
}

wait_for 1
PPCL_SCRATCH="$folder/2" setsid ip netns exec "$name-2" ray start --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 \
    "${common[@]}" >"$folder/worker.log" 2>&1 &
nodes+=($!)
wait_for 2
PPCL_SCRATCH="$folder/1" ip netns exec "$name-1" "$@"
