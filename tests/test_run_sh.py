"""run.sh as its user meets it: what it refuses, and the exact command that it becomes.

A stand-in for `python` on the PATH prints the arguments and the environment that it was started with, so that
these tests need neither torch nor a second.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = f"""#!{sys.executable}
import json, os, sys, time
if sys.argv[1] == "-c":
    print(os.environ.get("PRETEND_MISSING", ""))
elif os.environ.get("PRETEND_TO_TRAIN"):
    print("training", os.getpid(), flush=True)
    time.sleep(60)
else:
    keys = ("BEGIN_SHARD", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    print(json.dumps(dict(argv=sys.argv[1:], env={{key: os.environ.get(key) for key in keys}})))
    sys.exit(int(os.environ.get("PRETEND_EXIT", 0)))
"""


@pytest.fixture
def run(tmp_path):
    "run(*arguments, **environment) starts run.sh in a folder that holds c.yml and a.pt."
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "c.yml").write_text("num_iterations: 1\n")
    (tmp_path / "a.pt").write_bytes(b"")

    def start(*arguments, popen=subprocess.run, **environment):
        env = {key: value for key, value in os.environ.items() if key not in ("BEGIN_SHARD", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
        env.update(environment, PATH=f"{stand_in.parent}{os.pathsep}{env['PATH']}")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return popen([str(ROOT / "run.sh"), *arguments], cwd=tmp_path, env=env, **pipes)

    return start


def launched(done) -> dict:
    "What the training process was started with."
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def flags(done) -> list[str]:
    "What the launcher is told about processes."
    argv = launched(done)["argv"]
    assert argv[:2] == ["-u", str(ROOT / "launch.py")]
    return argv[2:argv.index("--")]


def overrides(done) -> list[str]:
    argv = launched(done)["argv"]
    config, *words = argv[argv.index("--") + 1:]
    assert argv[:2] == ["-u", str(ROOT / "launch.py")] and config == "c.yml"
    return words


def refused(done) -> str:
    "The one line that says why nothing was started."
    assert done.returncode == 2 and done.stdout == ""
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("run.sh: ")
    return message


# the config comes first

def test_without_a_config_the_usage_goes_to_stderr(run):
    done = run()
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("usage: ./run.sh CONFIG_FILE")


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["c.yml", "-h"], ["c.yml", "-n", "8", "a=1", "--help"], ["-n", "-h"]])
def test_help_anywhere_launches_nothing(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ./run.sh CONFIG_FILE")


@pytest.mark.parametrize("first", ["-n", "-p", "--ignore-prior-schedule", "num_iterations=3"])
def test_anything_else_first_is_refused(run, first):
    assert first in refused(run(first, "1", "c.yml"))


def test_a_config_that_is_not_there_lists_those_that_are(run):
    message = refused(run("config/tny.yml"))
    assert "config/tny.yml" in message
    assert all(f"config/{path.name}" in message for path in (ROOT / "config").glob("*.yml"))


def test_a_config_with_a_space_in_its_name(run, tmp_path):
    (tmp_path / "my run.yml").write_text("num_iterations: 1\n")
    assert launched(run("my run.yml"))["argv"][2:] == ["--", "my run.yml"]


# options and overrides

def test_the_plain_line(run):
    assert overrides(run("c.yml")) == []


def test_overrides_with_and_without_dashes(run):
    done = run("c.yml", "num_iterations=6000", "--max_seq_len=32768", "train_files=a b/*.bin", "note=x=y", "empty=")
    assert overrides(done) == ["--num_iterations=6000", "--max_seq_len=32768", "--train_files=a b/*.bin", "--note=x=y", "--empty="]


@pytest.mark.parametrize("spelling", ["--ignore-prior-schedule", "--ignore_prior_schedule", "--ignore-prior-steps", "--ignore_prior_steps"])
def test_four_spellings_are_one_flag(run, spelling):
    assert overrides(run("c.yml", spelling)) == ["--ignore_prior_schedule=true"]
    assert overrides(run("c.yml", f"{spelling}=false")) == ["--ignore_prior_schedule=false"]


def test_any_order(run):
    expected = {"--init_checkpoint=a.pt", "--ignore_prior_schedule=true", "--lr=1e-3"}
    for order in (["-p", "a.pt", "--ignore-prior-schedule", "lr=1e-3", "-n", "1", "-s", "2"],
                  ["lr=1e-3", "-s", "2", "-n", "1", "--ignore-prior-schedule", "-p", "a.pt"]):
        done = run("c.yml", *order)
        assert set(overrides(done)) == expected and launched(done)["env"]["BEGIN_SHARD"] == "2"


def test_the_last_of_two_stays_last(run):
    assert overrides(run("c.yml", "lr=1", "--lr=2")) == ["--lr=1", "--lr=2"]


@pytest.mark.parametrize("shard", ["0", "-1", "two", "1.5", "", "1 2"])
def test_begin_shard_counts_from_one(run, shard):
    assert "counted from 1" in refused(run("c.yml", "-s", shard))


def test_begin_shard_is_exported_only_when_asked_for(run):
    assert launched(run("c.yml"))["env"]["BEGIN_SHARD"] is None
    assert launched(run("c.yml", BEGIN_SHARD="5"))["env"]["BEGIN_SHARD"] == "5"
    assert launched(run("c.yml", "-s", "103", BEGIN_SHARD="5"))["env"]["BEGIN_SHARD"] == "103"


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_a_process_count_that_is_none(run, count):
    assert f"-n {count}" in refused(run("c.yml", "-n", count))


def test_the_number_of_processes_is_handed_on_only_where_it_is_given(run):
    assert flags(run("c.yml", "num_iterations=6000")) == []
    done = run("c.yml", "num_iterations=6000", "-n", "8")
    assert flags(done) == ["-n", "8"] and overrides(done) == ["--num_iterations=6000"]


def test_torchruns_flags_for_several_machines_are_handed_on(run):
    given = ["--nnodes=2", "--node_rank=1", "--master-addr=10.0.0.1", "--master_port=29500"]
    done = run("c.yml", *given[:2], "lr=1", *given[2:], "-n", "4")
    assert flags(done) == [*given, "-n", "4"] and overrides(done) == ["--lr=1"]
    assert flags(run("c.yml", "--nnodes=2", "--rdzv_endpoint=host:29500")) == ["--nnodes=2", "--rdzv_endpoint=host:29500"]
    assert overrides(run("c.yml", "--nnodez=2")) == ["--nnodez=2"]  # train.py will say that there is no such key


@pytest.mark.parametrize("spelling", ["--print-config", "--print_config"])
def test_print_config_is_handed_on(run, spelling):
    assert overrides(run("c.yml", spelling, "lr=1")) == ["--print-config", "--lr=1"]


@pytest.mark.parametrize("option", ["-n", "-p", "-s"])
def test_an_option_without_its_value(run, option):
    assert f"{option} needs a value" in refused(run("c.yml", option))


def test_a_checkpoint_that_is_not_there(run):
    assert "b.pt" in refused(run("c.yml", "-p", "b.pt"))


def test_unknown_options_are_all_named(run):
    message = refused(run("c.yml", "-q", "lr=1", "--resume", "word", "--lr", "-n", "1"))
    assert all(f"'{name}'" in message for name in ("-q", "--resume", "word", "--lr")) and "'lr=1'" not in message


# what is started, and how

def test_thread_settings_are_made_only_where_the_user_has_not(run):
    assert launched(run("c.yml"))["env"]["OMP_WAIT_POLICY"] == "PASSIVE"
    kept = launched(run("c.yml", OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE"))["env"]
    assert (kept["OMP_NUM_THREADS"], kept["OMP_WAIT_POLICY"]) == ("3", "ACTIVE")


def test_what_is_missing_is_named_with_the_way_to_install_it(run):
    message = refused(run("c.yml", PRETEND_MISSING="torch tiktoken"))
    assert "lacks torch tiktoken" in message and "pip install -e ." in message


def test_the_exit_status_is_the_training_process_own(run):
    assert run("c.yml", PRETEND_EXIT="7").returncode == 7


def test_signals_arrive(run):
    process = run("c.yml", popen=subprocess.Popen, PRETEND_TO_TRAIN="1")
    assert process.stdout.readline().split() == ["training", str(process.pid)], "run.sh has to become the training process"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == -signal.SIGTERM and time.monotonic() - began < 30  # of 60
    process.stdout.close(), process.stderr.close()


# the real thing, once

def test_the_same_line_twice_gives_the_same_losses(tmp_path):
    "The second run of a finished line starts afresh, keeps the old files in a numbered folder, and repeats every digit."
    line = [str(ROOT / "run.sh"), str(ROOT / "config" / "tiny.yml"), "num_iterations=3", "val_loss_every=3", "val_tokens=4096"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    def losses(metrics):
        rows = map(json.loads, metrics.read_text().splitlines())
        return [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows]

    second, first = tmp_path / "checkpoints" / "metrics.jsonl", tmp_path / "checkpoints" / "run_1" / "metrics.jsonl"
    assert len(losses(first)) >= 4 and losses(first) == losses(second)


# recipes: what a scheduler runs ends in the same command

def stand_in_for_run_sh(folder):
    (folder / "run.sh").write_text(f'#!/bin/sh\nexec "{ROOT}/run.sh" "$@"\n')
    (folder / "run.sh").chmod(0o755)


def test_the_slurm_recipe_starts_run_sh_on_every_node(run, tmp_path):
    for name, text in (("scontrol", 'echo node7; echo node8'), ("srun", 'echo "srun $*" >&2; shift; exec "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    stand_in_for_run_sh(tmp_path)
    env = os.environ | dict(PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2",
                            SLURM_GPUS_ON_NODE="4", SLURM_JOB_ID="123")
    recipe = ROOT / "recipes" / "slurm.sbatch"
    done = subprocess.run([str(recipe), "c.yml", "lr=1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert set(flags(done)) == {"-n", "4", "--nnodes=2", "--rdzv_id=123", "--rdzv_endpoint=node7:29500"}
    assert overrides(done) == ["--lr=1"] and done.stderr.startswith("srun --kill-on-bad-exit=1 ./run.sh c.yml")
    assert "#SBATCH --signal=TERM@" in recipe.read_text()
    assert subprocess.run([str(recipe)], cwd=tmp_path, env=env, capture_output=True).returncode == 2


def test_the_skypilot_recipe_starts_run_sh_on_every_node(run, tmp_path):
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "recipes" / "skypilot.yaml").read_text().replace("/shared", str(tmp_path / "shared")))
    stand_in_for_run_sh(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "ready-7").touch()
    env = os.environ | recipe["envs"] | dict(
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", CONFIG="c.yml", SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NUM_NODES="2", SKYPILOT_NUM_GPUS_PER_NODE="8", SKYPILOT_TASK_ID="7")
    done = subprocess.run(["bash", "-c", recipe["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert flags(done) == ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500", "-n", "8"]
    assert overrides(done) == [f"--checkpoint_dir={tmp_path}/shared/checkpoints/daisy"]
    assert recipe["num_nodes"] == 2 and (tmp_path / "data" / "fineweb").resolve() == tmp_path / "shared" / "data"
