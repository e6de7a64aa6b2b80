#!/usr/bin/env bash
# Train a model from one config: this script's own options become overrides of train.py, which does the work.
# Written for any bash from 3.2 (macOS) on: no associative arrays, no mapfile, no bare expansion of an empty array.
set -euo pipefail

here=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'USAGE'
usage: ./run.sh CONFIG_FILE [-n NUM_PROCS] [-p CHECKPOINT_PATH] [-s BEGIN_SHARD] [--ignore-prior-schedule] [key=value ...]

  CONFIG_FILE               YAML file that describes the run, for example config/tiny.yml; always first
  -n NUM_PROCS              processes on this machine (default 1; more than 1 comes with lesson 11)
  -p CHECKPOINT_PATH        start from this checkpoint: resume it, or fine-tune it with --ignore-prior-schedule
  -s BEGIN_SHARD            training shard to begin with, counted from 1 (exported as BEGIN_SHARD)
  --ignore-prior-schedule   load only the weights; schedules and step counter start at 0
                            (also --ignore_prior_schedule, --ignore-prior-steps, --ignore_prior_steps)
  key=value, --key=value    override any key of the config: num_iterations=6000 max_seq_len=32768
  -h, --help                this text; `python train.py --help` lists every key

After CONFIG_FILE, options and overrides come in any order; where a key is given twice, the last one counts.

examples:
  ./run.sh config/tiny.yml
  ./run.sh config/tiny.yml num_iterations=20 val_loss_every=10
  ./run.sh config/tiny.yml -p checkpoints/state_step_100.pt --ignore-prior-schedule
USAGE
}

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

is_count() { # a whole number from 1 on, without leading zeros
    case $1 in
        '' | 0* | *[!0-9]*) return 1 ;;
    esac
}

for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
    esac
done

if [ $# -eq 0 ]; then
    usage >&2
    exit 2
fi
config=$1
shift
case $config in
    -* | *=*)
        usage >&2
        fail "the config file comes first, before '$config'"
        ;;
esac
if [ ! -f "$config" ]; then
    known=""
    for file in "$here"/config/*.yml; do
        [ -f "$file" ] && known="$known config/${file##*/}"
    done
    fail "no config file '$config'; there are:${known:- none in $here/config}"
fi

num_procs=1
overrides=()
unknown=""
while [ $# -gt 0 ]; do
    case $1 in
        -n | -p | -s)
            [ $# -ge 2 ] || fail "$1 needs a value after it"
            case $1 in
                -n)
                    is_count "$2" || fail "-n $2: the number of processes is a whole number from 1 on"
                    num_procs=$2
                    ;;
                -p)
                    [ -f "$2" ] || fail "-p $2: no such checkpoint file"
                    overrides+=("--init_checkpoint=$2")
                    ;;
                -s)
                    is_count "$2" || fail "-s $2: shards are counted from 1, so this is a whole number from 1 on"
                    export BEGIN_SHARD=$2
                    ;;
            esac
            shift
            ;;
        --ignore[-_]prior[-_]schedule | --ignore[-_]prior[-_]steps)
            overrides+=("--ignore_prior_schedule=true")
            ;;
        --ignore[-_]prior[-_]schedule=* | --ignore[-_]prior[-_]steps=*)
            overrides+=("--ignore_prior_schedule=${1#*=}")
            ;;
        --[A-Za-z_]*=*) overrides+=("$1") ;;
        [A-Za-z_]*=*) overrides+=("--$1") ;;
        *) unknown="$unknown '$1'" ;;
    esac
    shift
done
[ -z "$unknown" ] || fail "not an option and not key=value:$unknown (./run.sh --help lists what there is)"
[ "$num_procs" = 1 ] || fail "-n $num_procs: several processes come with lesson 11 (distributed); until then use -n 1"

python=$(command -v python || command -v python3) || fail "no python found; daisy needs Python 3.10 to 3.13"
missing=$("$python" -c 'from importlib.util import find_spec
print(*(name for name in ("torch", "numpy", "tiktoken", "yaml", "tqdm") if find_spec(name) is None))') ||
    fail "$python doesn't start; daisy needs Python 3.10 to 3.13"
[ -z "$missing" ] || fail "$python lacks $missing: install daisy first, with: (cd $here && pip install -e .)"

# One process may use every core, and a thread that waits lets other programs have its core: on a busy machine that is
# several times faster, on an idle one about the same. What the user has set stays.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
    export OMP_NUM_THREADS
fi

exec "$python" -u "$here/train.py" "$config" ${overrides[@]+"${overrides[@]}"}
