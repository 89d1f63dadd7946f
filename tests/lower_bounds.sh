#!/usr/bin/env bash
# Run the tests with the oldest releases that pyproject.toml allows; torch's takes several GB. By hand, when a bound
# changes: .ci/run does not call it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work"
oldest=$(python3 - <<'PY'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
bounds = [*project["dependencies"], *project["optional-dependencies"]["hub"], *project["optional-dependencies"]["plot"]]
print(*[bound.replace(">=", "==") for bound in bounds if ">=" in bound])
PY
)
# numpy 1.26 needs a pyarrow of its time, which does not say so.
# shellcheck disable=SC2086 # a list of words
"$work/bin/pip" install --quiet $oldest 'pyarrow<18' zstandard safetensors \
    pytest pytest-xdist hypothesis
"$work/bin/python" -m pytest -k "not muon and not quickstart" "$@"  # torch has Muon from 2.9 on
