#!/bin/bash
# End what up.sh started, jobs first, so that no rank is left behind: `make slurm-down`.
set -u
DIR=${1:?the folder of its state}

[ -d "$DIR" ] || exit 0
jobs=$(squeue -h -o %i 2>/dev/null)
if [ -n "$jobs" ]; then
    scancel $jobs
    for _ in $(seq 60); do [ -z "$(squeue -h -o %i 2>/dev/null)" ] && break; sleep 1; done
fi
for file in "$DIR"/slurmd.n1.pid "$DIR"/slurmd.n2.pid "$DIR"/slurmctld.pid /run/munge/munged.pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep .2; done
done
sed '/# sidestack slurm$/d' /etc/hosts > "$DIR/hosts" && cat "$DIR/hosts" > /etc/hosts
grep -q "^# Written by sidestack" /etc/slurm/slurm.conf && rm -f /etc/slurm/slurm.conf /etc/slurm/cgroup.conf
rm -rf "$DIR"
