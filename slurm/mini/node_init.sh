#!/bin/bash
# First process of a node of the root form, in namespaces of its own: NODE CLUSTER_ROOT ADDRESS.
# It starts slurmd and reaps; when it is killed, the kernel kills everything on the node.
set -u
node=$1 root=$2 address=$3
hostname "$node"
mount --make-rprivate /
mount --bind "$root/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.02; done   # plugged in from outside
ip addr add "$address/24" dev eth0
export SLURM_CONF=$root/slurm.conf
trap : TERM
DAPO_MINI_DAEMON=slurmd-$node slurmd -b -D -N "$node" </dev/null >>"$root/log/slurmd-$node.out" 2>&1 &
while :; do wait -n 2>/dev/null || sleep 0.5; done
