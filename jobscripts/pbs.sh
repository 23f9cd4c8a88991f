#!/bin/bash
# A whole search inside one PBS allocation: Balsam's launcher and the search driver on its first node.
#
#   qsub -A PROJECT -q prod -l select=8:system=polaris -l walltime=02:00:00 -l filesystems=home:eagle \
#       -v 'BALSAM_SITE_PATH=/path/to/my-site,SEARCH="NAME --problem digits --max-evals 500",MINUTES=120' jobscripts/pbs.sh
#
# Submit the same line again to go on. SEARCH is a name and options of `deephyper-balsam search run`, MINUTES the wall time.
#PBS -N balsam-search
#PBS -l place=scatter:excl
#PBS -j oe

set -u
: "${BALSAM_SITE_PATH:?give -v BALSAM_SITE_PATH=FOLDER, the folder of a Balsam site}"
: "${SEARCH:?give -v SEARCH=\"NAME [options of deephyper-balsam search run]\"}"
: "${MINUTES:?give -v MINUTES=N, the wall time in minutes}"
cd "$PBS_O_WORKDIR" || exit 2

# Lines of your own go here: module load, proxies, source .venv/bin/activate

eval "set -- $SEARCH"
exec python -m deephyper_balsam.launcher.inside -t "$MINUTES" -j "${BALSAM_JOB_MODE:-mpi}" "$@"
