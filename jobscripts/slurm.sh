#!/bin/bash
# A whole search inside one Slurm allocation: Balsam's launcher and the search driver on its first node.
#
#   export BALSAM_SITE_PATH=/path/to/my-site      # a site from site-configs/slurm or perlmutter-*; its agent runs elsewhere
#   sbatch -A PROJECT -p PARTITION -N 8 -t 120 jobscripts/slurm.sh NAME --problem digits --max-evals 500
#
# Submit the same line again to go on. What follows NAME are options of `deephyper-balsam search run`.
#SBATCH --job-name=balsam-search
#SBATCH --exclusive
#SBATCH --signal=B:TERM@60
# The driver is told by itself 150 s before the end; the signal above is for what is late.

set -u
: "${BALSAM_SITE_PATH:?export BALSAM_SITE_PATH, the folder of a Balsam site}"
: "${1:?sbatch ... slurm.sh NAME [options of deephyper-balsam search run]}"

# Lines of your own go here: module load, source .venv/bin/activate

# Minutes that are left of this job, days and all
left=$(squeue --noheader --job="$SLURM_JOB_ID" --format=%L)
days=0
[[ $left == *-* ]] && days=${left%%-*} && left=${left#*-}
IFS=: read -ra parts <<<"$left"
case ${#parts[@]} in
3) minutes=$((10#${parts[0]} * 60 + 10#${parts[1]})) ;;
2) minutes=$((10#${parts[0]})) ;;
*) echo "Slurm does not tell how long this job may run ($left): give --time." >&2; exit 2 ;;
esac
minutes=$((10#$days * 1440 + minutes))

exec python -m deephyper_balsam.launcher.inside -t "$((minutes > 0 ? minutes : 1))" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
