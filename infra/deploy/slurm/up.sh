#!/bin/bash
# Start a Slurm of two nodes, n1 and n2, on this machine: `make slurm-up`. Needs root, and Debian's slurm-wlm and munge.
set -eu
DIR=${1:?the folder of its state}
HERE=$(cd "$(dirname "$0")" && pwd)
CONF=/etc/slurm/slurm.conf

for tool in slurmctld slurmd munged; do
    command -v $tool >/dev/null || { echo "$tool is not installed: apt-get install slurm-wlm munge" >&2; exit 1; }
done
if [ -s $CONF ] && ! grep -q "^# Written by sidestack" $CONF; then
    echo "$CONF is another cluster's; move it away first" >&2
    exit 1
fi
if scontrol ping 2>/dev/null | grep -q UP; then sinfo; exit 0; fi

mkdir -p "$DIR"/{controller,log,spool/n1,spool/n2} /etc/slurm
# Nodes of a job meet by these names.
for node in n1 n2; do
    grep -qw $node /etc/hosts || echo "127.0.0.1 $node # sidestack slurm" >> /etc/hosts
done

# munge runs as its own user; without an init system its socket's folder is not there.
install -d -o munge -g munge -m 755 /run/munge
if ! munge -n >/dev/null 2>&1; then
    setpriv --reuid=munge --regid=munge --clear-groups "$(command -v munged)"
fi
munge -n | unmunge >/dev/null

sed -e "s|@DIR@|$DIR|g; s|@HOST@|$(hostname -s)|g" "$HERE/slurm.conf.in" > $CONF
printf 'CgroupAutomount=no\n' > /etc/slurm/cgroup.conf

setsid slurmctld -D >"$DIR/log/slurmctld.out" 2>&1 </dev/null &
for _ in $(seq 100); do scontrol ping 2>/dev/null | grep -q UP && break; sleep .2; done
for node in n1 n2; do setsid slurmd -D -N $node >"$DIR/log/$node.out" 2>&1 </dev/null & done
for _ in $(seq 150); do [ "$(sinfo -h -o %D -t idle -p main | tail -1)" = 2 ] && break; sleep .2; done
sinfo
[ "$(sinfo -h -o %D -t idle -p main | tail -1)" = 2 ] || { echo "nodes did not come up; see $DIR/log" >&2; exit 1; }
