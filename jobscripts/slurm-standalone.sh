#!/bin/bash
# A whole search in one Slurm allocation, with nothing outside: a Balsam server, site, agent, launcher and driver of its own.
#
#   sbatch -A PROJECT -p PARTITION -N 8 -t 120 jobscripts/slurm-standalone.sh NAME --problem digits --max-evals 500
#
# Submit the same line again to go on. What follows NAME are options of `deephyper-balsam search run`; Balsam is in NAME.balsam/.
#SBATCH --job-name=balsam-search
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@60

# Lines of your own go here: module load, source .venv/bin/activate
: "${1:?sbatch ... slurm-standalone.sh NAME [options of deephyper-balsam search run]}"

exec python -m deephyper_balsam standalone --config "${BALSAM_CONFIG:-slurm}" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
