#!/usr/bin/env bash
# A SLURM cluster on one machine, to try the templates before they meet a real one: one_machine_cluster.sh up|down|status
#
#   sudo scripts/slurm/one_machine_cluster.sh up      # two nodes; NODES=3 for more
#   eval "$(scripts/slurm/one_machine_cluster.sh env)"  # where sbatch and the others find it
#   sbatch --nodes=2 scripts/slurm/train.sbatch cfgs/demo.yaml
#   sudo scripts/slurm/one_machine_cluster.sh down
#
# Needs root, Linux and Debian's slurmctld, slurmd, slurm-client, munge and iproute2 (INSTALL=1 up: installs them). Each node
# is a slurmd with a name, network address, process table and /etc/hosts of its own, so that rendezvous, signals, requeue,
# preemption and lost nodes are real; processors, memory and GPUs are what NODES, CPUS, GPUS pretend, and no limit is enforced.
# Everything lies in FOLDER (default /var/tmp/nano4m-cluster); /etc is not touched, and `down` leaves nothing behind.
# Partitions: main (preempted jobs are requeued after 20 s) and urgent (preempts main). GRACE=0: they are requeued at once;
# PREEMPT_SIGNAL=0: the steps get TERM, as on most clusters, not the job its own signal. KILL_WAIT=15: seconds from TERM to KILL.
# `up` on a cluster that is up brings back what was lost and takes over these settings.
# Faults: LOOPBACK_NAMES=1 (a node's own name is 127.0.1.1 there, as on a fresh Debian), TWO_CARDS=1 (a second network).
# A second cluster beside this one: another FOLDER, NAME (two letters) and NET (such as 10.95).
set -euo pipefail
folder=${FOLDER:-/var/tmp/nano4m-cluster}
nodes=${NODES:-2} cpus=${CPUS:-16} gpus=${GPUS:-0} net=${NET:-10.91}.0 net2=${NET:-10.91}.1
loopback=${LOOPBACK_NAMES:-0} two=${TWO_CARDS:-0} grace=${GRACE:-20} preempt_signal=${PREEMPT_SIGNAL:-1} kill_wait=${KILL_WAIT:-15}
pre=${NAME:-nm} # of namespaces and network devices
export SLURM_CONF=$folder/slurm.conf
packages=(slurmctld slurmd slurm-client munge iproute2)

fail() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 1; }
as_root() { [ "$(id -u)" = 0 ] || fail "this needs root" "sudo $0 $*"; }

install_packages() {
  local missing=() p
  for p in "${packages[@]}"; do dpkg -s "$p" >/dev/null 2>&1 || missing+=("$p"); done
  [ ${#missing[@]} = 0 ] && return
  [ "${INSTALL:-0}" = 1 ] || fail "not installed: ${missing[*]}" "apt-get install ${missing[*]}, or INSTALL=1 $0 up"
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=1; fi # starts no daemons
  apt-get -qq update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    [ -z "$made" ] || rm -f $policy
    fail "apt-get could not install ${missing[*]}"
  }
  [ -z "$made" ] || rm -f $policy
}

# A daemon's process is known by number and start time: a number alone may be another's by now.
started() { awk '$3 != "Z" {print $22}' "/proc/$1/stat" 2>/dev/null || true; }
keep_pid() { echo "$2 $(started "$2")" >"$folder/pid/$1"; }
running() {
  local pid time
  { read -r pid time <"$folder/pid/$1"; } 2>/dev/null || return 1
  [ -n "$time" ] && [ "$(started "$pid")" = "$time" ]
}
end() { # end NAME SIGNAL
  local pid _
  running "$1" || { rm -f "$folder/pid/$1"; return 0; }
  read -r pid _ <"$folder/pid/$1"
  kill "-$2" "$pid" 2>/dev/null || true
  for _ in $(seq 50); do running "$1" || break; sleep 0.1; done
  if running "$1"; then kill -KILL "$pid" 2>/dev/null || true; fi
  rm -f "$folder/pid/$1"
}

write_config() {
  local i
  {
    cat <<CONF
ClusterName=onemachine
SlurmctldHost=control($net.2)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=6917
SlurmdPort=6918
AuthType=auth/munge
CredType=cred/munge
# A requeued job is eligible again when its credentials have expired: after 120 s usually, and 5 s are the least.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pid/slurmctld.own
SlurmdPidFile=$folder/pid/slurmd-%n.own
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=30
KillWait=$kill_wait
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
CONF
    [ "$preempt_signal" = 0 ] || echo SlurmctldParameters=preempt_send_user_signal
    [ "$gpus" = 0 ] || echo GresTypes=gpu
    for i in $(seq "$nodes"); do
      echo "NodeName=worker$i NodeHostname=worker$i NodeAddr=$net.$((10 + i)) CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=64000$([ "$gpus" = 0 ] || echo " Gres=gpu:$gpus")"
    done
    echo "PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace State=UP"
    echo "PartitionName=urgent Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP"
  } >"$folder/slurm.conf"
  : >"$folder/gres.conf"
  if [ "$gpus" != 0 ]; then
    mkdir -p "$folder/gpu"
    for i in $(seq 0 $((gpus - 1))); do [ -e "$folder/gpu/gpu$i" ] || mknod -m 666 "$folder/gpu/gpu$i" c 1 3; done
    echo "Name=gpu File=$folder/gpu/gpu$([ "$gpus" = 1 ] && echo 0 || echo "[0-$((gpus - 1))]")" >"$folder/gres.conf"
  fi
  # slurmd looks for cgroups even where none are used; told the older kind it does not insist on finding them.
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$folder/cgroup.conf"
}

# space NAME ADDRESS: a network namespace with a card eth0 on the machine's own bridge, and no way out.
space() {
  local name=$pre-$1
  [ -e "/run/netns/$name" ] || ip netns add "$name"
  ip -n "$name" link set lo up
  card "$name" eth0 "$pre-$1" $pre-bridge "$net.$2"
  [ "$two" = 0 ] || [ "$1" = control ] || card "$name" eth1 "${pre}x$1" ${pre}-bridge2 "$net2.$2"
}
card() { # card NAMESPACE NAME OUTSIDE BRIDGE ADDRESS
  if ip -n "$1" link show "$2" >/dev/null 2>&1; then ip -n "$1" link set "$2" up; return; fi
  ip link add "$3" type veth peer name "$2" netns "$1"
  ip link set "$3" master "$4" up
  ip -n "$1" addr add "$5/24" dev "$2"
  ip -n "$1" link set "$2" up
}
bridge() {
  ip link show "$1" >/dev/null 2>&1 || { ip link add "$1" type bridge; ip addr add "$2.1/24" dev "$1"; }
  ip link set "$1" up
}
hosts() { # hosts NAME: what this machine's /etc/hosts says
  local i
  echo "127.0.0.1 localhost"
  echo "$net.2 control"
  for i in $(seq "$nodes"); do
    if [ "worker$i" = "$1" ] && [ "$loopback" = 1 ]; then echo "127.0.1.1 worker$i"; else echo "$net.$((10 + i)) worker$i"; fi
  done
}

# daemon NAME COMMAND...: run a command in the namespace of a node, under its name and with its /etc/hosts.
daemon() {
  local name=$1 extra=()
  shift
  hosts "$name" >"$folder/hosts-$name"
  # A node's processes end with it; the controller must be reachable by TERM to save its state.
  [ "$name" = control ] || extra=(--pid --fork --kill-child --mount-proc)
  setsid nsenter "--net=/run/netns/$pre-$name" unshare --uts --mount "${extra[@]}" bash -c '
    hostname "$1"; mount --bind "$2" /etc/hosts; mount -t sysfs none /sys 2>/dev/null; shift 2
    [ "$1" = once ] && { shift; exec "$@"; }
    shift; while :; do "$@" & wait $! && break; sleep 1; done' _ \
    "$name" "$folder/hosts-$name" "$@" </dev/null >"$folder/log/$name.out" 2>&1 &
  local pid=$!
  sleep 0.2
  keep_pid "$name" "$pid"
}

up() {
  as_root up
  install_packages
  mkdir -p "$folder"/{state,log,spool,pid,munge}
  chmod 755 "$folder"
  local before
  before=$(cat "$folder/slurm.conf" 2>/dev/null || true)
  write_config
  for i in $(seq "$nodes"); do mkdir -p "$folder/spool/worker$i"; done
  if ! running munged; then
    [ -s "$folder/munge/key" ] || head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 600 "$folder/munge/key"
    rm -f "$folder/munge/socket"
    # its own key, socket and files: a munged that serves this machine otherwise is left alone
    setsid munged --foreground --force --num-threads=2 --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
      --pid-file="$folder/munge/pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" \
      </dev/null >"$folder/log/munged.out" 2>&1 &
    keep_pid munged $!
    for _ in $(seq 50); do [ -S "$folder/munge/socket" ] && break; sleep 0.1; done
    [ -S "$folder/munge/socket" ] || fail "munged does not start (see $folder/log/munged.out)"
  fi
  bridge $pre-bridge $net
  [ "$two" = 0 ] || bridge ${pre}-bridge2 $net2
  space control 2
  if ! running control; then
    daemon control once slurmctld -D
  elif [ "$before" != "$(cat "$folder/slurm.conf")" ]; then
    timeout 20 scontrol reconfigure || fail "the controller does not take the new settings" "down, then up"
  fi
  local i
  for i in $(seq "$nodes"); do
    space "worker$i" $((10 + i))
    running "worker$i" || daemon "worker$i" again slurmd -D -N "worker$i"
  done
  for _ in $(seq 150); do
    [ "$(timeout 5 sinfo -h -p main -N -t idle,alloc,mix -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ] && { status; return; }
    timeout 5 scontrol update nodename="worker[1-$nodes]" state=resume 2>/dev/null || true
    sleep 0.2
  done
  fail "the nodes do not come up" "see the logs in $folder/log"
}

down() {
  as_root down
  local f name
  for f in "$folder"/pid/worker*; do [ ! -e "$f" ] || end "${f##*/}" KILL; done
  end control TERM
  end munged TERM
  for name in $(ip netns list 2>/dev/null | awk -v p="^$pre-" '$1 ~ p {print $1}'); do ip netns del "$name"; done
  for name in $pre-bridge ${pre}-bridge2; do ip link del "$name" 2>/dev/null || true; done
  rm -rf "$folder"
}

lose() {
  as_root lose
  local card
  # Its kernel still says farewell to whoever talked with its processes, but for SILENT=1.
  [ "${SILENT:-0}" = 0 ] || for card in eth0 eth1; do ip -n "$pre-$1" link set "$card" down 2>/dev/null || true; done
  end "$1" KILL
}

status() { timeout 5 sinfo -N -o '%N %P %T %c %G'; }

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  lose) lose "${2:?which node}" ;; # for trials: a node that dies, with SILENT=1 as if its power went; `up` brings it back
  *) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
