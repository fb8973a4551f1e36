#!/bin/bash
# A real SLURM on this machine, for tests: four nodes, each of which claims 8 GPUs, 96 cores and 1 TB.
#
#   tests/slurm_cluster.sh start DIR    install what is missing (Debian, as root), configure in DIR, start, wait
#   tests/slurm_cluster.sh stop DIR     stop what start has started
#
# SLURM_CONF=DIR/slurm.conf lets the commands (sbatch, squeue, ...) find it.

set -euo pipefail
action=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf

install_slurm() {
    command -v slurmctld munged >/dev/null && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
}

configure() {
    mkdir -p "$dir"/state "$dir"/spool-node{1,2,3,4}
    for gpu in 0 1 2 3 4 5 6 7; do touch "$dir/gpu$gpu"; done
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
$(for node in 1 2 3 4; do
        echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=2682$node CPUs=96 RealMemory=1000000 Gres=gpu:8"
    done)
PartitionName=main Nodes=ALL Default=YES State=UP
CONF
    echo "NodeName=node[1-4] Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
}

start() {
    install_slurm
    configure
    chmod o+rx "$dir"
    [ -e /etc/munge/munge.key ] || mungekey --create
    munged --force --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munged.seed"
    slurmctld
    for node in 1 2 3 4; do slurmd -N node$node; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --states=idle --format=%D)" = 4 ] && return
        sleep 1
    done
    echo "SLURM did not come up: see $dir/*.log" >&2
    exit 1
}

stop() {
    squeue --noheader --format=%i | xargs --no-run-if-empty scancel
    for _ in $(seq 60); do
        [ -z "$(squeue --noheader)" ] && break
        sleep 1
    done
    for pid in "$dir"/{slurmd-node{1,2,3,4},slurmctld,munged}.pid; do
        [ -e "$pid" ] && kill "$(cat "$pid")" || true
    done
}

"$action"
