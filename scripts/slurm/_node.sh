#!/usr/bin/env bash
# One per node, run by srun: the step's own shell. Usage: _node.sh COMMAND...  or  _node.sh --torchrun MODULE ARGUMENTS...
#
# Signals to a step reach every process of it. USR1 would kill torchrun, and TERM makes torchrun kill its workers before
# they have saved. So for torchrun both are ignored before anything is started, which children inherit; Python's handlers,
# in the workers, replace that. Any other command is ended by TERM: it keeps what is finished. This shell notes that it was
# asked to stop.
set -u
trap '' USR1 TERM
mkdir -p "$NANO4M_FLAGS" 2>/dev/null
repeating=

if [ "$1" = --torchrun ]; then
  shift
  here=${SLURMD_NODENAME:-$(hostname)}
  arguments=(--nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${NANO4M_PROCS:-1}" --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT)
  if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
    arguments+=(--rdzv-backend=c10d --rdzv-endpoint="127.0.0.1:$NANO4M_PORT" --rdzv-id="$NANO4M_RDZV" --rdzv-conf=is_host=1 --local-addr=127.0.0.1)
  else
    # The address and card by which this node reaches the others; not what its name says, which may be 127.0.1.1.
    is_host=0; peer=$NANO4M_HEAD
    if [ "$SLURM_NODEID" = 0 ]; then is_host=1; peer=$NANO4M_PEER; fi
    address=$NANO4M_HEAD card=
    if command -v ip >/dev/null; then
      read -r card address < <(ip -4 -o route get "$peer" | sed -n 's/.* dev \([^ ]*\) .*src \([^ ]*\).*/\1 \2/p')
    else
      address=$("$NANO4M_PYTHON" -c 'import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[1], 9)); print(s.getsockname()[0])' "$peer")
    fi
    [ -n "$address" ] || { echo "error: $here has no way to $peer" >&2; exit 1; }
    if [ -n "$card" ]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$card}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$card}"; fi
    arguments+=(--rdzv-backend=c10d --rdzv-endpoint="$NANO4M_HEAD:$NANO4M_PORT" --rdzv-id="$NANO4M_RDZV" --local-addr="$address"
      --rdzv-conf="is_host=$is_host,join_timeout=${NANO4M_JOIN:-600}")
    echo "[nano4m] $here is node $SLURM_NODEID of $SLURM_JOB_NUM_NODES, at $address${card:+ by $card}" >&2
  fi
  # After --, what looks like an option of torchrun is one of the command: --run is not short for its --run-path.
  set -- "$NANO4M_PYTHON" -m torch.distributed.run "${arguments[@]}" -m -- "$@"
  "$@" &
  child=$!
  # The workers see to it, once they listen; of TERM (a preemption) the batch shell may not know, which repeats what it hears.
  repeat() {
    [ -z "$repeating" ] && [ "$SLURM_NODEID" = 0 ] || return
    ( trap '' USR1 TERM
      while sleep "${NANO4M_RESEND:-10}" && kill -0 "$child"; do
        timeout 4 scancel --quiet --signal=USR1 "$SLURM_JOB_ID.$SLURM_STEP_ID"
      done ) >/dev/null 2>&1 &
    repeating=$!
  }
  trap : USR1
  trap repeat TERM
else
  set -m  # a process group of its own: workers of the command are ended with it
  (trap - TERM; exec "$@") &
  child=$!
  trap ': >"$NANO4M_FLAGS/stop"; kill -TERM -- "-$child" 2>/dev/null' USR1 TERM
fi
while :; do
  wait "$child"
  kill -0 "$child" 2>/dev/null || break
done
wait "$child" 2>/dev/null; rc=$?
[ -z "$repeating" ] || kill -KILL "$repeating"
exit "$rc"
