#!/bin/bash
# A whole search in one PBS allocation, with nothing outside: a Balsam server, site, agent, launcher and driver of its own.
#
#   qsub -A PROJECT -q prod -l select=8:system=polaris -l walltime=02:00:00 -l filesystems=home:eagle \
#       -v 'SEARCH="NAME --problem digits --max-evals 500",MINUTES=120' jobscripts/pbs-standalone.sh
#
# Submit the same line again to go on. SEARCH is a name and options of `deephyper-balsam search run`; Balsam is in NAME.balsam/.
#PBS -N balsam-search
#PBS -l place=scatter:excl
#PBS -j oe
cd "$PBS_O_WORKDIR" || exit 2

# Lines of your own go here: module load, source .venv/bin/activate
: "${MINUTES:?give -v MINUTES=N, the wall time in minutes}"
eval "set -- ${SEARCH:?give -v SEARCH=\"NAME [options of deephyper-balsam search run]\"}"

exec python -m deephyper_balsam standalone --config "${BALSAM_CONFIG:-polaris-pbs}" -t "$MINUTES" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
