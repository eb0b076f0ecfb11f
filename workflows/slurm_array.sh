#!/usr/bin/env bash
# One site per task: sbatch --array=1-$(wc -l < sites.txt) workflows/slurm_array.sh
# sites.txt holds one name of a site per line. Submit it again to build only what is missing; a requeued task resumes.
#SBATCH --job-name=minecube
#SBATCH --cpus-per-task=2
#SBATCH --mem=6G
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

SITES=${SITES:-sites.txt}
YEARS=${YEARS:-2015-2024}
SOURCE=${SOURCE:-earth-search}
STORE=${STORE:-cubes.zarr}

site=$(sed -n "${SLURM_ARRAY_TASK_ID:?is set by sbatch --array}p" "$SITES")
exec minecube build --sites "$site" --years "$YEARS" --source "$SOURCE" --store "$STORE" ${CATALOG:+--catalog "$CATALOG"}
