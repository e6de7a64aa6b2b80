#!/usr/bin/env bash
# Train a model from one config: this script's own options become overrides of train.py, which does the work.
# Written for any bash from 3.2 (macOS) on: no associative arrays, no mapfile, no bare expansion of an empty array.
set -euo pipefail

here=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'USAGE'
usage: ./run.sh CONFIG_FILE [-n NUM_PROCS] [-p CHECKPOINT_PATH] [-s BEGIN_SHARD] [--ignore-prior-schedule] [key=value ...]

  CONFIG_FILE               YAML file that describes the run, for example config/tiny.yml; always first
  -n NUM_PROCS              processes on this machine (default: one a GPU, at most 8; 1 where there is no GPU)
  -p CHECKPOINT_PATH        start from this checkpoint: resume it, or fine-tune it with --ignore-prior-schedule
  -s BEGIN_SHARD            training shard to begin with, counted from 1 (exported as BEGIN_SHARD)
  --ignore-prior-schedule   load only the weights; schedules and step counter start at 0
                            (also --ignore_prior_schedule, --ignore-prior-steps, --ignore_prior_steps)
  key=value, --key=value    override any key of the config: num_iterations=6000 max_seq_len=32768
  --print-config            only print the run that this line describes, key by key, and where each value came from
  -h, --help                this text; `python train.py --help` lists every key

several machines: the same line on each, with the same -n and torchrun's own flags, written --name=value
  --nnodes=MACHINES --rdzv_endpoint=HOST:PORT                  HOST is one of them; PORT is free there
  --nnodes=MACHINES --node_rank=I --master_addr=HOST --master_port=PORT        the same with a number I for each, 0 on HOST
  also --rdzv_id --rdzv_backend --rdzv_conf --local_addr. The data, the config and checkpoint_dir are to be where all see them.

After CONFIG_FILE, options and overrides come in any order; where a key is given twice, the last one counts.

examples:
  ./run.sh config/tiny.yml
  ./run.sh config/tiny.yml num_iterations=20 val_loss_every=10
  ./run.sh config/tiny.yml -n 2
  ./run.sh config/tiny.yml -p checkpoints/state_step_100.pt --ignore-prior-schedule
  ./run.sh config/pretrain_350m.yml -n 8 --nnodes=2 --rdzv_endpoint=node0:29500
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

processes=""
launch=()
overrides=()
unknown=""
while [ $# -gt 0 ]; do
    case $1 in
        -n | -p | -s)
            [ $# -ge 2 ] || fail "$1 needs a value after it"
            case $1 in
                -n)
                    is_count "$2" || fail "-n $2: the number of processes is a whole number from 1 on"
                    processes=$2
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
        --print[-_]config) overrides+=("--print-config") ;;
        --nnodes=?* | --node[-_]rank=?* | --master[-_]addr=?* | --master[-_]port=?* | --rdzv[-_]endpoint=?* | --rdzv[-_]id=?* | \
            --rdzv[-_]backend=?* | --rdzv[-_]conf=?* | --local[-_]addr=?*)
            launch+=("$1")
            ;;
        --[A-Za-z_]*=*) overrides+=("$1") ;;
        [A-Za-z_]*=*) overrides+=("--$1") ;;
        *) unknown="$unknown '$1'" ;;
    esac
    shift
done
[ -z "$unknown" ] || fail "not an option and not key=value:$unknown (./run.sh --help lists what there is)"
[ -z "$processes" ] || launch+=(-n "$processes")

python=$(command -v python || command -v python3) || fail "no python found; daisy needs Python 3.10 to 3.13"
missing=$("$python" -c 'from importlib.util import find_spec
print(*(name for name in ("torch", "numpy", "tiktoken", "yaml", "tqdm") if find_spec(name) is None))') ||
    fail "$python doesn't start; daisy needs Python 3.10 to 3.13"
[ -z "$missing" ] || fail "$python lacks $missing: install daisy first, with: (cd $here && pip install -e .)"

# A thread that waits lets other programs have its core: on a busy machine that is several times faster, on an idle one
# about the same. What the user has set stays. How many threads a process may use is seen to where their number is known.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

exec "$python" -u "$here/launch.py" ${launch[@]+"${launch[@]}"} -- "$config" ${overrides[@]+"${overrides[@]}"}
