#!/bin/bash
# A Slurm controller and some nodes on this machine, for the tests and for a try. Nothing of the system is touched:
# state, keys and logs lie in one temporary folder.
#
#   apt-get install slurm-wlm munge                          # Debian, Ubuntu
#   folder=$(sudo scripts/slurm-on-this-machine.sh start)    # prints the folder once the nodes are idle
#   export SLURM_CONF=$folder/slurm.conf                     # sbatch, squeue and eopd then speak to it
#   sudo scripts/slurm-on-this-machine.sh stop "$folder"     # ends every job and daemon, removes the folder
#
# SLURM_NODES: names of the nodes (default "one two"). SLURM_CPUS: what each of them offers (default: this machine's;
# it need not be true).
set -euo pipefail

nodes=${SLURM_NODES:-one two}

fail() { echo "slurm-on-this-machine: $*" >&2; exit 1; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

write_config() {
    local host cpus memory name
    host=$(hostname -s)
    cpus=${SLURM_CPUS:-$(nproc)}
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again once its old credential has expired: 2 minutes by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
# A node that does not answer for this long is down; its jobs are queued again.
SlurmdTimeout=10
ReturnToService=2
KillWait=5
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
CONF
    for name in $nodes; do
        echo "NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus RealMemory=$memory"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
}

idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }

start() {
    local tool name
    for tool in munged slurmctld slurmd sbatch; do
        command -v $tool >/dev/null || fail "$tool is not installed: apt-get install slurm-wlm munge"
    done
    [ "$(id -u)" = 0 ] || fail "slurmd starts jobs as their users: run this as root"
    folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm-here.XXXXXX")
    chmod 755 "$folder"
    mkdir "$folder/state"
    trap 'tail -n 5 "$folder"/*.log >&2; stop' ERR
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" &>"$folder/start.log"
    export SLURM_CONF=$folder/slurm.conf
    write_config >"$SLURM_CONF"
    slurmctld &>>"$folder/start.log"
    for name in $nodes; do slurmd -N "$name" &>>"$folder/start.log"; done
    for _ in $(seq 100); do idle && break || sleep 0.2; done
    idle
    trap - ERR
    echo "$folder"
}

stop() {
    local pids pid
    if [ -e "$folder/slurmctld.pid" ]; then
        SLURM_CONF=$folder/slurm.conf timeout 10 scancel --user=root --full --signal=KILL 2>/dev/null || true
    fi
    pids=$(cat "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munged.pid" 2>/dev/null || true)
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}

case ${1:-} in
    start) start ;;
    stop)
        folder=${2:?the folder that start printed}
        [ -e "$folder/slurm.conf" ] || fail "there is no slurm.conf in $folder"
        stop
        ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
