#!/usr/bin/env bash
# All tests: the package is what the notebooks export, the notebooks are clean, every lesson runs, pytest passes.
# Nothing here changes the tree: export and clean run on a copy, and any difference from it is the failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

stage=""
started=$SECONDS
copy=$(mktemp -d "${TMPDIR:-/tmp}/daisy-test.XXXXXX") || exit 1
trap 'rm -rf "$copy"' EXIT

begin() { stage=$1; started=$SECONDS; echo; echo "== $stage"; }
passed() { echo "== $stage: ok in $((SECONDS - started)) s"; }
fail() { echo >&2; echo "test.sh: FAILED at '$stage': $*" >&2; exit 1; }

same() { # same MADE KEPT: show how what was made differs from what is kept in the tree
    diff -ru -x __pycache__ -x .ipynb_checkpoints -x .last_checked "$2" "$1" >"$copy/diff" && return 0
    sed -e "s|$1|(made) $2|g" "$copy/diff" | head -n 40 | cut -c 1-200
    return 1
}

command -v nbdev_test >/dev/null || { stage=setup; fail "nbdev is missing: pip install -e '.[dev]' brings it"; }

begin "export and compare"
mkdir "$copy/export" && cp settings.ini "$copy/export" && cp -R nbs "$copy/export/nbs" && mkdir "$copy/export/daisy" || fail "can't copy the tree"
(cd "$copy/export" && nbdev_export) || fail "nbdev_export ended with an error"
same "$copy/export/daisy" daisy || fail "daisy/ isn't what the notebooks export; edit nbs/, run nbdev_export, delete modules without a notebook"
passed

begin "clean and compare"
mkdir "$copy/clean" && cp settings.ini "$copy/clean" && cp -R nbs "$copy/clean/nbs" || fail "can't copy the tree"
(cd "$copy/clean" && nbdev_clean) || fail "nbdev_clean ended with an error"
same "$copy/clean/nbs" nbs || fail "notebooks hold metadata or counts that differ from run to run; run nbdev_clean"
passed

begin "nbdev_test"
OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing 2>&1 | tee "$copy/nbdev_test" || fail "a lesson fails; its name and cell stand above"
grep -q '\.ipynb: [0-9]* secs$' "$copy/nbdev_test" || fail "no lesson was run"
passed

begin "pytest"
python -m pytest "$@" || fail "pytest ended with exit code $? (5: no test was run)"
passed

echo
echo "test.sh: all passed in $SECONDS s"
