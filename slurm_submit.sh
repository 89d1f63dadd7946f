#!/bin/bash
# Train on a SLURM cluster. One file: run by hand it submits, and it is the batch script that it submits.
#
#   ./slurm_submit.sh [options] CONFIG [key=value ...]         check the config, copy the code, submit
#   sbatch [options] slurm_submit.sh CONFIG [key=value ...]    the same, but checked and copied when the job starts
#
#   --n_gpus N         GPUs, and so processes, on each node; 0: one process on the CPU
#   --nodes N          --partition P      --time 72:00:00      --job_name J
#   --array-seeds 0-4  an array of jobs: element N trains with seed=N, in a run folder of its own that ends in -seedN;
#                      %a in another override is N as well (init_seed=%a: other initial weights too)
#   --local            torchrun here and now, on --n_gpus GPUs or as many as there are
#   --dry-run          print the command and the script, and do nothing
#
# At preemption and before the time limit the job saves, requeues itself and goes on in the same run folder and log.

# A site changes the first two lines; the third is what this file needs: a signal, to it alone, before the time limit,
# requeueing, one torchrun a node, one log.
#SBATCH --job-name=pretrain --time=72:00:00
#SBATCH --nodes=1 --gpus-per-node=1 --cpus-per-gpu=4
#SBATCH --signal=B:USR1@120 --requeue --ntasks-per-node=1 --open-mode=append
set -euo pipefail
die() { echo "slurm_submit: $*" >&2 && exit 2; }

check() { # RANKS NAME: train.py finds what is wrong; sets `run`, the run's folder, called NAME if it is a new one
    [ -n "$config" ] || die "name a config, such as configs/quickstart.yaml"
    command -v torchrun >/dev/null || die "no torchrun in PATH: activate the Python environment, then submit"
    run=$(WORLD_SIZE=$1 python "$code/train.py" --check "$config" "${overrides[@]//'%a'/0}")
    [[ $run != */ ]] || run+=$2
    run=$(realpath -m "$run")
}

snapshot() ( # copy config and code to $folder, with git's commit and diff: later edits do not reach the job
    mkdir -p "$folder/code"; cp -f "$config" "$folder/config.yaml"; echo '*' >"$folder/.gitignore"; cd "$code"
    { git ls-files -z; git ls-files -zo --exclude-standard -- '*.py'; } 2>/dev/null |
        xargs -0r cp -pft "$folder/code" --parents 2>/dev/null || : # git lists deleted files, too
    cp -pf ./*.py ./*.sh "$folder/code"                             # all that there is without git
    git rev-parse -q --verify HEAD >"$folder/git_commit" 2>/dev/null || :
    git diff --no-color --no-ext-diff --binary --src-prefix=a/ --dst-prefix=b/ HEAD >"$folder/git.diff" 2>/dev/null || :
    find "$folder/code" "$folder/config.yaml" -type f -exec chmod a-w {} +; echo "$run" >"$folder/run_dir"
)

on_node() { # STOP TORCHRUN_ARGS...: one process a GPU, with the CPUs that the job has and that are really there
    [ ! -e "$1" ] || exit 75
    local n=$((${SLURM_GPUS_ON_NODE:-0} > 0 ? SLURM_GPUS_ON_NODE : 1)) cpus
    cpus=$( (env -u OMP_NUM_THREADS nproc && echo "${SLURM_CPUS_ON_NODE:-1}") | sort -n | head -n1)
    OMP_NUM_THREADS=$((cpus > n ? cpus / n : 1)) exec torchrun --nproc_per_node="$n" "${@:2}"
}

job() {
    task=${SLURM_ARRAY_TASK_ID:-} # the last element of an array has the whole array's number as SLURM_JOB_ID
    id=${task:+${SLURM_ARRAY_JOB_ID}_}${task:-$SLURM_JOB_ID}
    mine=$(realpath -m "${SPD_OUT_DIR:-out}/slurm/job_$id") now=$(date +%F_%H-%M-%S)
    # the time limit is near: SIGTERM the steps, since SIGUSR1 kills torchrun; one that is only starting sees the file
    trap ': >"$mine/stop"; scancel --signal=TERM "$id"' USR1
    trap : TERM # from scancel and scontrol requeue: the steps have it too, and are waited for while they save
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ ! -e "$mine" ] || mv "$mine" "$mine.until.$now" # another cluster's
    mkdir -p "$mine"; rm -f "$mine/stop"; touch "$mine/begun"
    code=$(scontrol show job "$id" | sed -n 's/^ *Command=//p')
    code=$(dirname "${code%" $*"}") folder=${code%/code}
    [ -f "$folder/run_dir" ] || folder=$mine # submitted by sbatch, from no snapshot: this job makes one, once
    [ -f "$folder/run_dir" ] || { check $((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1})) "$now-$id"; snapshot; }
    run=$(<"$folder/run_dir")${task:+-seed$task}
    [ -z "$task" ] || overrides=("${overrides[@]//'%a'/$task}" "seed=$task")
    echo "slurm_submit: job $id on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $run"
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600 # SLURM decides how long saving may take
    [ -n "${SLURM_GPUS_ON_NODE:-}" ] || unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU # srun refuses them for no GPUs
    srun --kill-on-bad-exit=1 --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --export=ALL \
        bash -c "$(declare -f on_node); on_node \"\$@\"" on_node "$mine/stop" --nnodes="$SLURM_NNODES" \
        --rdzv_backend=c10d --rdzv_endpoint="$SLURMD_NODENAME:$((10000 + SLURM_JOB_ID % 20000))" --rdzv_id="$id" \
        "$folder/code/train.py" "$folder/config.yaml" "${overrides[@]}" "run_dir=$run" &
    while kill -0 $! 2>/dev/null; do wait $! || true; done # a trap ends a wait early
    failed=0 && wait $! || failed=$? # by torchrun's exit code, whether the state was saved or not
    status=$(cat "$run/status" 2>/dev/null || :) about=$(scontrol show job "$id")
    [ $failed != 0 ] && [ "$status" != finished ] || exit 0
    [[ $about = *JobState=RUNNING* ]] || exit $failed # scancel or scontrol requeue: SLURM has decided
    [ ! "$run/resume.pt" -nt "$mine/begun" ] || { status+=-saved && : >"$mine/in_vain"; }
    # a time limit is told to this script; a preemption with grace time, and scancel --signal, to the steps alone
    [ -e "$mine/stop" ] || [[ $about =~ PreemptTime=[0-9] || $status = interrupted-saved ]] || exit $failed
    echo "$status" >>"$mine/in_vain" # a crash that meets a signal each time must end
    (($(wc -l <"$mine/in_vain") < 10)) || die "stopped 10 times in a row before anything was saved: giving up"
    echo "slurm_submit: stopped by SLURM: job $id is queued again, to go on from the last saved state"
    scontrol requeue "$id"
}

declare -A given=() && options=() words=()
[ "${0##*/}" != slurm_script ] || { config=${1:-} overrides=("${@:2}"); job "$@"; exit; } # SLURM's name for it
while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
    -h | --help) sed -n '2,/^$/s/^# \?//p' "$0" && exit ;;
    --local | --dry-run) given[$1]=yes ;;
    --n_gpus | --nodes | --partition | --time | --job_name | --array-seeds)
        (($# > 1)) || die "$1 needs a value"
        option=${1/n_gpus/gpus-per-node} option=${option/array-seeds/array}
        given[$option]=$2 && options+=("${option/_/-}=$2") && shift ;;
    -*) die "there is no option $1: see $0 --help" ;;
    *) words+=("$1") ;;
    esac
    shift
done
config=${words[0]:-} overrides=("${words[@]:1}") code=$(dirname "$(realpath "$0")")
default() { sed -n "s/^#SBATCH.* --$1=\([^ ]*:\)\?\([0-9]*\).*/\2/p" "$0"; }
n=${given[--gpus-per-node]:-$(default gpus-per-node)} nodes=${given[--nodes]:-$(default nodes)}
stamp=$(date +%F_%H-%M-%S)-$$ && folder=$(realpath -m "${SPD_OUT_DIR:-out}/slurm/$stamp")
log=$folder/%j.log && [ -z "${given[--array]:-}" ] || log=$folder/%A_%a.log
command=(sbatch --parsable --export=ALL --output="$log" "${options[@]}")
command+=("$folder/code/slurm_submit.sh" "$folder/config.yaml" "${overrides[@]}")
if [ -n "${given[--local]:-}" ]; then
    [ -z "${given[--array]:-}${given[--nodes]:-}" ] || die "--local is one run, here: no --nodes, no --array-seeds"
    n=${given[--gpus-per-node]:-$(python -c 'import torch; print(torch.cuda.device_count())')} nodes=1
    command=(torchrun --standalone --nproc_per_node=$((n > 0 ? n : 1)) "$code/train.py" "$config" "${overrides[@]}")
fi
[[ -z ${given[--array]:-} || " ${words[*]}" != *" seed="* ]] || die "--array-seeds sets the seed: leave out seed="
[[ $n$nodes =~ ^[0-9]+$ ]] || die "--n_gpus and --nodes take numbers, not $n and $nodes"
check $((nodes * (n > 0 ? n : 1))) "$stamp"
[ -z "${given[--dry-run]:-}" ] || { printf '%q ' "${command[@]}" && echo && cat "$0" && exit; }
[ -z "${given[--local]:-}" ] || exec "${command[@]}"
command -v sbatch >/dev/null || die "no sbatch in PATH: submit where SLURM is, or train here with --local"
snapshot; job=$("${command[@]}") || { rm -rf "$folder" && exit 1; }
printf '%s\n' "job ${job%%;*}" "log ${log/\%[jA]/${job%%;*}}" "run $run"
