#!/bin/bash
# A whole search in one Cobalt allocation, with nothing outside: a Balsam server, site, agent, launcher and driver of its own.
#
#   qsub -A PROJECT -q default -n 128 -t 120 --env MINUTES=120 \
#       jobscripts/cobalt-standalone.sh NAME --problem digits --max-evals 500
#
# Submit the same line again to go on. What follows NAME are options of `deephyper-balsam search run`; Balsam is in NAME.balsam/.
#COBALT --jobname balsam-search
#COBALT --attrs filesystems=home,grand,eagle,theta-fs0

# Lines of your own go here: module load, source .venv/bin/activate
: "${MINUTES:?give --env MINUTES=N, the wall time in minutes}"
: "${1:?qsub ... cobalt-standalone.sh NAME [options of deephyper-balsam search run]}"
export PMI_NO_FORK=1

exec python -m deephyper_balsam standalone --config "${BALSAM_CONFIG:-theta-knl-cobalt}" -t "$MINUTES" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
