#!/usr/bin/env bash
# The package on the other Pythons that it supports, as far as this machine has them: a new environment without setuptools,
# the tests of what a version may change, and a search on a local server. What is not here is named.
#
#   .ci/pythons.sh EMPTY_FOLDER [VERSION...]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath "${1:?usage: .ci/pythons.sh EMPTY_FOLDER [VERSION...]}")
shift
[ $# -gt 0 ] || set -- 3.10 3.12 3.13 3.14

# On the path, or pyenv's; a shim of pyenv may be there without its Python
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
        command -v "$candidate"
        return
    done
    return 1
}

for version in "$@"; do
    if ! python=$(find_python "$version"); then
        echo "There is no Python $version here: only the metadata of what it would install are checked."
        continue
    fi
    echo "Python $version: $python"
    environment=$folder/$version
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$python" "$environment"
        uv pip install --quiet --python "$environment/bin/python" "${here}[test]"
    else
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip --quiet --disable-pip-version-check install "${here}[test]"
        # Python 3.10 and 3.11 give one to each environment
        "$environment/bin/python" -m pip --quiet uninstall --yes setuptools
    fi
    (cd "$here" && "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/unit/test_python_versions.py \
        tests/unit/test_problem.py tests/unit/test_imports.py tests/unit/test_cli_help.py)
    (cd "$folder" && "$environment/bin/deephyper-balsam" quickstart --dir "quickstart-$version" --max-evals 4)
done
