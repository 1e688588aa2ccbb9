#!/usr/bin/env bash
# Trains over a network between two "hosts", each a network namespace with one end of a veth pair, and
# compares with one process. Needs root, Debian's iproute2 and openmpi-bin, and gd built with the feature
# mpi: scripts/ci/mpi_netns.sh target/release/gd
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gd="$(realpath "${1:?usage: $0 GD}")"
work="$(mktemp -d)"
one="gd-one-$$" two="gd-two-$$"
trap 'ip netns del "$one" 2>/dev/null || true; ip netns del "$two" 2>/dev/null || true; rm -rf "$work"' EXIT

ip netns add "$one"
ip netns add "$two"
ip link add gd0 netns "$one" type veth peer name gd0 netns "$two"
host=1
for name in "$one" "$two"; do
    ip -n "$name" addr add "10.77.0.$host/24" dev gd0
    ip -n "$name" link set gd0 up
    ip -n "$name" link set lo up
    host=$((host + 1))
done

# Replaces ssh: enters the namespace of the host that the first argument names.
cat >"$work/agent" <<AGENT
#!/bin/sh
[ "\$1" = 10.77.0.2 ] || { echo "no host \$1" >&2; exit 1; }
shift
exec ip netns exec $two sh -c "\$*"
AGENT
chmod +x "$work/agent"

train=(train --config crates/gd-model/tests/fixtures/small.json --steps 10 --seed 3 --device cpu --json)
export RAYON_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"$gd" "${train[@]}" --out "$work/alone" >/dev/null
sent() { ip -n "$one" -s -j link show gd0 | sed 's/.*"tx":{"bytes":\([0-9]*\).*/\1/'; }
before=$(sent)
# No shared memory: the ranks communicate over TCP, as on two machines.
ip netns exec "$one" mpirun -n 2 --host 10.77.0.1:1,10.77.0.2:1 --map-by node --bind-to none \
    --mca plm_rsh_agent "$work/agent" --mca oob_tcp_if_include gd0 --mca btl_tcp_if_include gd0 \
    --mca btl self,tcp --mca pml ob1 \
    "$gd" "${train[@]}" --out "$work/together" >/dev/null
bytes=$(($(sent) - before))

# Only the events of steps; the last event has a loss, too.
losses() { grep '"grad_norm"' "$1/train.jsonl" | grep -o '"loss":[0-9.]*' | cut -d: -f2; }
paste <(losses "$work/alone") <(losses "$work/together") | awk -v bytes="$bytes" '
    { d = ($1 - $2) / $1; if (d < 0) d = -d; if (d > worst) worst = d; n++ }
    END {
        printf "%d steps over two namespaces, %d bytes sent: losses differ by at most %.1e of one process\n", n, bytes, worst
        # The gradients alone are n times half of 30,076 numbers of 4 bytes.
        exit !(n == 10 && worst <= 1e-6 && bytes > n * 60000)
    }'
