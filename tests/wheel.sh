#!/usr/bin/env bash
# A user of the wheel, outside the checkout: the command works, and apps/, site-configs/ and jobscripts/ came along.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: tests/wheel.sh EMPTY_FOLDER}

"$here/.venv/bin/python" -m pip --quiet --disable-pip-version-check wheel --no-deps -w "$folder" "$here"
"$here/.venv/bin/python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install "$folder"/deephyper_balsam-*.whl
cd "$folder"
venv/bin/deephyper-balsam --version
venv/bin/deephyper-balsam problem check ackley
venv/bin/deephyper-balsam site configs
test -e "$(venv/bin/python -c 'from deephyper_balsam.common.bundled_files import folder; print(folder("jobscripts"))')/README.md"
test -e "$(venv/bin/python -c 'from deephyper_balsam.results import analysis; print(analysis.__path__[0])')/report.js"
# An error points to the line of the FAQ that came along
if said=$(venv/bin/deephyper-balsam problem show no/such/thing 2>&1); then exit 1; fi
test -e "$(sed -n 's/^See \(.*\)#.*/\1/p' <<<"$said")"
# Without the extras, what is missing is said
if said=$(venv/bin/deephyper-balsam search report x 2>&1); then
    echo "search report works without its package: $said"
    exit 1
fi
grep -F "deephyper-balsam[report]" <<<"$said"
if said=$(venv/bin/deephyper-balsam server up --dir balsam 2>&1); then
    echo "server up works without its packages: $said"
    exit 1
fi
grep -F "deephyper-balsam[local]" <<<"$said"
