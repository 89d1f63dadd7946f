#!/bin/bash
# Train on a SLURM cluster. Run by hand, this file submits itself; SLURM then runs it as the batch script.
# The job runs a copy of code and config in RUN/code. At preemption and before the time limit it saves a checkpoint and
# is requeued. `sbatch --array=0-4 slurm_submit.sh CONFIG seed=%a` trains five seeds: %a is the number of the element.
#
#   ./slurm_submit.sh [options] CONFIG [key=value ...]        check the config, copy the code, submit
#   sbatch [options] slurm_submit.sh CONFIG [key=value ...]   the same, but checked and copied when the job first starts
#   --n_gpus N   GPUs, and therefore processes, on each node; 0: one process on each node, on the CPU
#   --nodes N    --partition P    --time 72:00:00    --job_name J
#   --local      train on this machine with torchrun         --dry-run    print the command, and change nothing

# The defaults of your cluster. --ntasks-per-node must be the number of GPUs on each node, or 1 without GPUs.
#SBATCH --job-name=pretrain --time=72:00:00 --nodes=1 --gpus-per-node=1 --ntasks-per-node=1 --cpus-per-task=4
#SBATCH --signal=USR1@120 --requeue --open-mode=append
set -eu
mode="" new="" status=0

prepare() { # RANKS NAME: check the config, set `run` to the run's folder (NAME, if it is a new run), fill RUN/code
    run=$(WORLD_SIZE=$1 python "$code/train.py" --check "$config" "${overrides[@]}")
    [[ $run != */ ]] || { run+=$2 && new=$run; }
    if [ -z "$mode" ] && [ ! "$code" -ef "$run/code" ]; then
        mkdir -p "$run/code"
        cp "$code"/*.py "$code"/*.sh "$config" "$run/code"
        { cat "$code/git_commit" || git -C "$code" rev-parse HEAD || true; } >"$run/code/git_commit" 2>/dev/null
    fi
}

if [ "${0##*/}" = slurm_script ]; then # this is the job: SLURM gives its copy of this file that name
    id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} # 12, or 12_3 in an array
    ((${SLURM_GPUS_ON_NODE:-0} <= SLURM_NTASKS_PER_NODE)) || { echo "set --ntasks-per-node=GPUs of a node" && exit 1; }
    config=${1:?name a config} overrides=("${@:2}")
    overrides=("${overrides[@]//%a/${SLURM_ARRAY_TASK_ID:-}}")
    record=slurm-$id.run # holds the run folder, for the starts after the first one
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -e "$record" ]; then
        code=$(scontrol show job "$id" | sed -n 's|^ *Command=\(.*\)/slurm_submit.sh .*|\1|p')
        prepare "$SLURM_NTASKS" "job-$id"
        echo "$run" >"$record"
    fi
    run=$(<"$record")
    echo "job $id, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $run"
    export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
    export MASTER_ADDR=$SLURMD_NODENAME MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # this is the first node
    # shellcheck disable=SC2016 # the variables in quotes are those of each process
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --export=ALL \
        bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' bash \
        "$run/code/train.py" "$run/code/${config##*/}" "${overrides[@]}" "run_dir=$run" || status=$?
    case $status in
    75 | 138) ;; # after a signal train.py has saved a checkpoint, or it was still importing when SIGUSR1 came
    143) # SIGTERM during imports: from a preemption, or from srun, which ends all processes when one has failed
        scontrol show job "$id" | grep -q 'PreemptTime=[0-9]' || exit 143 ;;
    *) exit "$status" ;;
    esac
    # A job that makes no progress must end: after five restarts, there must be a checkpoint of the last 24 hours.
    ((${SLURM_RESTART_COUNT:-0} < 5)) || [ "$(find "$run" -name 'optim_step_*' -mtime -1)" ] || exit "$status"
    exec scontrol requeue "$id"
fi

arguments=$(getopt -n slurm_submit -o h -l help,local,dry-run,n_gpus:,nodes:,partition:,time:,job_name: -- "$@")
eval set -- "$arguments"
n_gpus=1 nodes=1 options=()
while [ "$1" != -- ]; do
    case $1 in
    -h | --help) sed -n '2,/^$/s/^# \?//p' "$0" && exit ;;
    --local | --dry-run) mode+=$1 ;;
    --n_gpus) n_gpus=$2 && shift ;;
    --nodes) nodes=$2 && shift ;;
    *) options+=("${1/_/-}=$2") && shift ;;
    esac
    shift
done
config=${2:?name a config} overrides=("${@:3}") code=$(dirname "$(realpath "$0")")
n=$((n_gpus > 0 ? n_gpus : 1)) # processes on each node
prepare $((nodes * n)) "$(date +%Y-%m-%d_%H-%M-%S)-$$"
command=(sbatch --export=ALL --nodes="$nodes" --gpus-per-node="$n_gpus" --ntasks-per-node="$n" "${options[@]}"
    "$run/code/slurm_submit.sh" "$run/code/${config##*/}" "${overrides[@]}" "run_dir=$run")
[[ $mode != *--local* ]] || command=(torchrun --standalone --nproc_per_node="$n" "$code/train.py" "${@:2}")
[[ $mode != *--dry-run* ]] || command=(echo "${command[@]@Q}")
[ -z "$mode" ] || exec "${command[@]}"
"${command[@]}" || { rm -rf ${new:+"$new"} && exit 1; }
echo "run folder: $run"
