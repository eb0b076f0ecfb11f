#!/usr/bin/env bash
# Run a dataset as SLURM job arrays. No scheduler process and no open terminal is needed.
#
#   bash workflows/slurm_array.sh dataset.yaml 20
#
# submits an array of 20 tasks for site-years, another one for sites, and a job that joins the results of all sites.
# Submit it again at any time: finished steps are skipped. Options of sbatch come from the environment (SBATCH_PARTITION,
# SBATCH_ACCOUNT, ...) or from the lines below.
#SBATCH --job-name=minecube
#SBATCH --cpus-per-task=2
#SBATCH --mem=6G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A requeued task appends to its log. By default, it would empty the log first.
set -euo pipefail

if [[ ${1:-} != --task ]]; then
  dataset=$(realpath "${1:?expected dataset.yaml and a number of tasks}")
  parts=${2:?expected a number of tasks}
  minecube run "$dataset" --dry-run
  # afterany: the next stage does what it can if a site has failed, and reports the failure.
  first=$(sbatch --parsable --array="1-$parts" "$0" --task "$parts" "$dataset" --only search,build)
  second=$(sbatch --parsable --array="1-$parts" --dependency="afterany:${first%%;*}" "$0" --task "$parts" "$dataset")
  last=$(sbatch --parsable --dependency="afterany:${second%%;*}" "$0" --task "$parts" "$dataset")
  echo "submitted ${first%%;*}, ${second%%;*} and ${last%%;*}; minecube status $dataset shows how far they are"
  exit
fi

parts=$2
shift 2
this_job=$SLURM_JOB_ID
shard=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  # In the last task, SLURM_JOB_ID is the number of the whole array. To requeue it would repeat all tasks.
  this_job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
  shard=(--shard "$SLURM_ARRAY_TASK_ID/$parts")
fi

minecube run "$@" --engine local ${shard[@]+"${shard[@]}"} &
running=$!

resume() { # two minutes before the time limit: finished steps are safe, and the others get as much time again
  kill "$running" 2>/dev/null || true
  wait "$running" || true
  echo "the time limit is near: requeue $this_job"
  scontrol requeue "$this_job"
  sleep 300 # until SLURM ends this script. An exit could count as the end of the requeued task
}
trap resume USR1
wait "$running"
