#!/usr/bin/env bash
# From a source to a report, as jobs that wait for each other: scripts/slurm/pipeline.sh [options] CONFIG [key.sub=value ...]
#
#   scripts/slurm/pipeline.sh --fetch "scenes" --shares 8 --train-options "--nodes=2 --gpus-per-node=4" cfgs/demo.yaml
#
#   --fetch "SOURCE key=value ..."   fetch it first (without: the data are there)
#   --tokenize "ARGUMENTS"           of nano4m tokenize (--no-tokenize: the tokens are there)
#   --shares N                       array tasks of tokenize and generate (default 4)
#   --generate "REQUESTS OUT ..."    make these requests with the run (without: nothing is generated)
#   --eval "ARGUMENTS"               of nano4m eval (--no-eval: no evaluation)
#   --all-options "..."              options of sbatch for every job; --fetch-options, --tokenize-options,
#                                    --train-options, --generate-options, --eval-options "...": for one
#   --dry-run                        print the sbatch commands only
#
# Prints "STAGE JOBID" lines. A job that fails cancels those that depend on it. Account, partition and the like may also be
# SBATCH_* variables. Logs go to logs/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
declare -A option=()
fetch='' tokenize='' shares=4 generate='' eval='' dry='' with_tokenize=1 with_eval=1
usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
bad() { echo "error: $1" >&2; echo "hint: see $0 --help" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --no-tokenize) with_tokenize=; shift; continue ;;
    --no-eval) with_eval=; shift; continue ;;
    --dry-run) dry=1; shift; continue ;;
    --fetch | --tokenize | --shares | --generate | --eval | --*-options) [ $# -ge 2 ] || bad "$1 needs a value" ;;
    -*) bad "unknown option '$1'" ;;
    *) break ;;
  esac
  case $1 in
    --fetch) fetch=$2 ;;
    --tokenize) tokenize=$2 ;;
    --shares) shares=$2; [[ $shares =~ ^[1-9][0-9]*$ ]] || bad "--shares $shares is no number" ;;
    --generate) generate=$2 ;;
    --eval) eval=$2 ;;
    --all-options | --fetch-options | --tokenize-options | --train-options | --generate-options | --eval-options) option[$1]=$2 ;;
    *) bad "unknown option '$1'" ;;
  esac
  shift 2
done
[ $# -gt 0 ] || bad "no config"
[ -f "$1" ] || [ -f "cfgs/$1.yaml" ] || [ -f "cfgs/$1" ] || bad "no config file '$1' in $PWD"
[ -n "$dry" ] || command -v sbatch >/dev/null || { echo "error: no sbatch here" >&2; echo "hint: run this on a login node" >&2; exit 1; }
[ -n "$dry" ] || mkdir -p logs # a log whose folder is missing fails the job without a word

after='' jobs=()
# submit STAGE OPTIONS -- ARGUMENTS: submit a template after the stage before it.
submit() {
  local stage=$1 words=() extra=()
  shift
  read -ra words <<<"${option[--all-options]:-} ${option[--$stage-options]:-}"
  while [ "$1" != -- ]; do extra+=("$1"); shift; done
  shift
  [ -z "$after" ] || extra+=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
  local log=%x-%j.out
  case $stage in tokenize | generate) log=%x-%A_%a.out ;; esac
  local command=(sbatch --parsable --output="logs/$log" "${extra[@]}" "${words[@]}" "$here/$stage.sbatch" "$@")
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"; echo
    after="JOBID_OF_${stage^^}"
    return
  fi
  # What was submitted would wait for nothing if a later stage is refused.
  after=$("${command[@]}") || { [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"; echo "error: sbatch refused $stage; nothing is left in the queue" >&2; exit 1; }
  after=${after%%;*}
  jobs+=("$after")
  echo "$stage $after"
}
name() { # the run's name: name=... among the overrides, else the config's own, else the file's
  local file=$1 word found=''
  shift
  for word; do case $word in name=*) found=${word#name=} ;; esac; done
  [ -f "$file" ] || { [ -f "cfgs/$file.yaml" ] && file=cfgs/$file.yaml || file=cfgs/$file; }
  [ -n "$found" ] || found=$(sed -n 's/^name: *\([^ #]*\).*/\1/p' "$file" | head -n 1)
  [ -n "$found" ] || { found=${file##*/}; found=${found%.*}; }
  echo "$found"
}
run=$(name "$@")
read -ra words <<<"$fetch"
[ -z "$fetch" ] || submit fetch -- "${words[@]}"
read -ra words <<<"$tokenize"
[ -z "$with_tokenize" ] || submit tokenize "--array=0-$((shares - 1))" -- "${words[@]}"
submit train -- "$@"
trained=$after
read -ra words <<<"$generate"
[ -z "$generate" ] || submit generate "--array=0-$((shares - 1))" -- "${words[@]}" --run "$run"
after=$trained
read -ra words <<<"$eval"
[ -z "$with_eval" ] || submit eval -- "${words[@]}" --run "$run"
