# Sourced by the templates beside it, in the batch shell: where nano4m is, how a step is run, stopped and started again.
#
# What may be set in the environment (sbatch hands it on):
#   NANO4M_ROOT       the workspace with data/ and runs/ (default: where sbatch was called)
#   NANO4M_SETUP      a file to source first, e.g. with `module load` lines
#   NANO4M_PYTHON     the Python to use (default: that of .venv in the checkout, else python3)
#   NANO4M_PROCS      processes of train and eval per node (default: the GPUs of the node, else 1)
#   NANO4M_REQUEUES   starts of one job at most, after the first (default 100)
#   NANO4M_RETRIES    starts after a failure that fail again, without a new checkpoint, until a job ends (default 2)
#   NANO4M_RESEND     seconds between two signals to processes that are asked to stop (default 10)
set -uo pipefail

say() { echo "[nano4m $(date '+%F %T')] $*" >&2; }
die() { say "error: $1"; [ -z "${2:-}" ] || say "hint: $2"; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this runs under SLURM" >&2; echo "hint: sbatch $0 ..." >&2; exit 2; }
starts=${SLURM_RESTART_COUNT:-0}

# sbatch runs a copy of the script from its spool folder: the checkout is where the original lies.
if [ -z "${NANO4M_HOME:-}" ]; then
  NANO4M_HOME=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's|^ *Command=\(/.*\)/scripts/slurm/[a-z]*\.sbatch.*|\1|p' | head -n 1)
  [ -d "${NANO4M_HOME:-}/scripts/slurm" ] || NANO4M_HOME=$SLURM_SUBMIT_DIR
fi
[ -d "$NANO4M_HOME/scripts/slurm" ] || die "no scripts/slurm in $NANO4M_HOME" "set NANO4M_HOME to the checkout of nano4m"
export NANO4M_HOME NANO4M_ROOT="${NANO4M_ROOT:-$SLURM_SUBMIT_DIR}"
# shellcheck disable=SC1090
[ -z "${NANO4M_SETUP:-}" ] || . "$NANO4M_SETUP" || die "$NANO4M_SETUP failed"
if [ -z "${NANO4M_PYTHON:-}" ]; then
  NANO4M_PYTHON=$NANO4M_HOME/.venv/bin/python
  [ -x "$NANO4M_PYTHON" ] || NANO4M_PYTHON=$(command -v python3 || command -v python) || die "no Python here" "set NANO4M_PYTHON or NANO4M_SETUP"
fi
export NANO4M_PYTHON PYTHONPATH="$NANO4M_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# c10d warns of every connection from a node that has no name in DNS.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
cd "$SLURM_SUBMIT_DIR" || die "cannot enter $SLURM_SUBMIT_DIR"

# -- stopping ------------------------------------------------------------------------------------------------------------
# A step is asked to stop by USR1 (--signal=B:USR1@N, N seconds before the time limit; also at preemption where the
# cluster sends the user's signal) or by TERM, which may reach the step only. The batch shell hears of the first and leaves
# a flag; a run that was stopped leaves runs/RUN/stopped.json, other commands the flag of _node.sh.

flags=${TMPDIR:-/tmp}/nano4m-$SLURM_JOB_ID-$starts
rm -rf "$flags" && mkdir -p "$flags" || die "cannot write to ${TMPDIR:-/tmp}"
[ -z "${early:-}" ] || : >"$flags/stop"
export NANO4M_FLAGS=$flags
resend=

asked_to_stop() {
  say "signal $1: asking the step to save and stop"
  : >"$flags/stop"
  [ -n "$resend" ] && return
  # Again and again: the first may come before Python has its handlers (until then it is ignored).
  # It must not outlive this shell: the signals would meet the next start of the job.
  ( trap '' USR1
    trap - TERM
    while kill -0 $$ 2>/dev/null; do
      timeout 4 scancel --quiet --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null # tries for a minute otherwise
      sleep "${NANO4M_RESEND:-10}"
    done ) &
  resend=$!
}
trap '[ -z "$resend" ] || kill -KILL "$resend" 2>/dev/null; rm -rf "$flags"' EXIT
trap 'asked_to_stop USR1' USR1
trap 'asked_to_stop TERM' TERM

# step COMMAND...: run it in the background and return its exit code; `wait` returns early at every trap.
step() {
  local pid rc=0
  [ ! -e "$flags/stop" ] || return 1
  "$@" &
  pid=$!
  while :; do
    wait "$pid"; rc=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  wait "$pid" 2>/dev/null; rc=$?
  [ -z "$resend" ] || { kill -KILL "$resend" 2>/dev/null; wait "$resend" 2>/dev/null; resend=; }
  return "$rc"
}

# again WHY: put the job back into the queue and do not return; ends it where that is not possible.
again() {
  local state
  trap '' USR1
  trap 'exit 1' TERM
  if [ "$starts" -ge "${NANO4M_REQUEUES:-100}" ]; then
    die "$1, after $starts further starts" "NANO4M_REQUEUES allows ${NANO4M_REQUEUES:-100}; submit the job again to go on"
  fi
  # A job that is being cancelled must not come back.
  state=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1)
  [ "$state" = RUNNING ] || { say "$1; the job is $state: SLURM says whether it comes back"; exit 1; }
  say "$1: back into the queue (start $((starts + 1)) to come)"
  rm -rf "$flags"
  scontrol requeue "$SLURM_JOB_ID" || die "$1, and scontrol requeue was refused" "submit the job again: it goes on where it stopped"
  sleep 300 & # the requeue kills this shell long before
  wait
  exit 1
}

# -- several processes ---------------------------------------------------------------------------------------------------

nodes=() # of several processes, once they know where to meet

# address NODE: print an address by which others reach it. Its own name may be 127.0.1.1 there, and ours is here.
address() {
  local found
  found=$(getent ahostsv4 "$1" 2>/dev/null | awk 'NR == 1 {print $1}')
  case $found in
    "" | 127.*)
      found=$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
      case $found in *[!0-9.]*) found=$(getent ahostsv4 "$found" | awk 'NR == 1 {print $1}') ;; esac ;;
  esac
  case $found in "" | 127.*) found=$(hostname -I 2>/dev/null | awk '{print $1}') ;; esac
  echo "$found"
}

# processes: set NANO4M_PROCS, the processes of each node.
processes() {
  NANO4M_PROCS=${NANO4M_PROCS:-${SLURM_GPUS_ON_NODE:-1}}
  [ "$NANO4M_PROCS" -gt 0 ] || NANO4M_PROCS=1
}

# meet: set `nodes`, and say where the processes of all of them meet.
meet() {
  processes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  NANO4M_HEAD=$(address "${nodes[0]}")
  NANO4M_PEER=$(address "${nodes[1]:-${nodes[0]}}")
  # A port from the job's number, the next one where something listens there already; this shell runs on the first node.
  NANO4M_PORT=$("$NANO4M_PYTHON" - "$SLURM_JOB_ID" <<'P'
import socket
import sys

for i in range(200):
    port = 15000 + (int(sys.argv[1]) * 7 + i) % 15000
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            continue
    print(port)
    break
P
)
  NANO4M_RDZV=$SLURM_JOB_ID.$starts
  export NANO4M_HEAD NANO4M_PEER NANO4M_PORT NANO4M_PROCS NANO4M_RDZV
  [ -n "${OMP_NUM_THREADS:-}" ] || export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / NANO4M_PROCS > 0 ? ${SLURM_CPUS_PER_TASK:-1} / NANO4M_PROCS : 1))
}

# everywhere COMMAND...: run a nano4m command in NANO4M_PROCS processes on every node, after `meet`.
everywhere() {
  # --kill-on-bad-exit: where one node failed the others would wait for it. Workers that stop in order leave together.
  step srun --kill-on-bad-exit=1 --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash "$NANO4M_HOME/scripts/slurm/_node.sh" --torchrun nano4m_cli "$@"
}

# once COMMAND...: run a nano4m command that keeps what it has finished (fetch, tokenize, generate, eval), in one task; after
# `meet` in all processes of all nodes, which share its work.
once() {
  local rc=0
  if [ ${#nodes[@]} -gt 0 ]; then
    say "job $SLURM_JOB_ID, start $starts, on ${#nodes[@]} node(s) ${nodes[*]} with $NANO4M_PROCS process(es) each: nano4m $*"
    everywhere "$@" || rc=$?
  else
    say "job $SLURM_JOB_ID, start $starts, on ${SLURMD_NODENAME:-$(hostname)}: nano4m $*"
    step srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
      bash "$NANO4M_HOME/scripts/slurm/_node.sh" "$NANO4M_PYTHON" -m nano4m_cli "$@" || rc=$?
  fi
  if [ "$rc" = 0 ]; then rm -rf "$flags"; say "done"; exit 0; fi
  [ ! -e "$flags/stop" ] || again "stopped before the end"
  # TERM to the steps alone: this shell heard nothing, and torchrun does not tell by what its processes ended.
  case $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*PreemptTime=\([^ ]*\).*/\1/p' | head -n 1) in
    "" | None) ;;
    *) again "preempted" ;;
  esac
  # Killed (memory, an operator): worth another try. An error that it told of would come again.
  [ "$rc" -le 128 ] || [ "$starts" -ge "${NANO4M_RETRIES:-2}" ] || again "killed (exit code $rc)"
  rm -rf "$flags"
  die "nano4m $1 ended with exit code $rc"
}

# share: print I/N, this array task's share, counted from 0.
share() {
  local first=${SLURM_ARRAY_TASK_MIN:-0} by=${SLURM_ARRAY_TASK_STEP:-1} count=${SLURM_ARRAY_TASK_COUNT:-1} id=${SLURM_ARRAY_TASK_ID:-0}
  if [ -n "${NANO4M_SHARES:-}" ]; then
    [ "$id" -lt "$NANO4M_SHARES" ] || die "array task $id is not one of the NANO4M_SHARES=$NANO4M_SHARES, counted from 0"
    echo "$id/$NANO4M_SHARES"
  elif [ $(((${SLURM_ARRAY_TASK_MAX:-0} - first) / by + 1)) = "$count" ]; then
    echo "$(((id - first) / by))/$count"
  else
    die "a list of array tasks does not say how many shares there are" "NANO4M_SHARES=N sbatch --array=... (N as it was at first)"
  fi
}
