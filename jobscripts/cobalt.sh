#!/bin/bash
# A whole search inside one Cobalt allocation: Balsam's launcher and the search driver on the launch node.
#
#   qsub -A PROJECT -q default -n 128 -t 120 --env BALSAM_SITE_PATH=/path/to/my-site:MINUTES=120 \
#       jobscripts/cobalt.sh NAME --problem digits --max-evals 500
#
# Submit the same line again to go on. What follows NAME are options of `deephyper-balsam search run`; MINUTES is the wall
# time, of which Cobalt does not tell a script.
#COBALT --jobname balsam-search
#COBALT --attrs filesystems=home,grand,eagle,theta-fs0

set -u
: "${BALSAM_SITE_PATH:?give --env BALSAM_SITE_PATH=FOLDER, the folder of a Balsam site}"
: "${MINUTES:?give --env MINUTES=N, the wall time in minutes}"
: "${1:?qsub ... cobalt.sh NAME [options of deephyper-balsam search run]}"

# Lines of your own go here: module load, proxies, source .venv/bin/activate
export PMI_NO_FORK=1

exec python -m deephyper_balsam.launcher.inside -t "$MINUTES" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
