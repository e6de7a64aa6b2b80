"""Real processes on gloo: the whole program on 1, 2 and 3 ranks, saved on some and resumed on others, stopped, killed, on two nodes.

Rows 2, 7, 8, 13 and 16 of the contract as several ranks see them; lessons 11 and 12 have tests of their parts in test_distributed.py.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_real_run import CONFIG, ROOT, losses, wait_for_lines
from test_trainer import Bigram, Loader, make

from daisy import real_run
from daisy.checkpoint import load_checkpoint
from daisy.distributed import Ranks
from daisy.loader import Batch
from daisy.real_run import first_to_say, launch_main, processes_to_start, train_main
from daisy.trainer import read_metrics

pytestmark = pytest.mark.skipif(os.name != "posix" or not Path("/proc").is_dir(), reason="finds the ranks in /proc")
# Ranks add in another order than one process; at full rates AdamW and Muon make much of the last digit (see test_distributed.py).
GENTLE = ["embed_params_lr=0.01", "value_embed_lr=0.002", "scalar_params_lr=0.001", "hidden_matrix_params_lr=0.002", "head_params_lr=0.001",
          "x0_gates_lr=0.002", "residual_gates_lr=0.0005", "adamw_eps=1e-8", "global_batch_size=12", "num_iterations=20",
          "schedule_total_iters=20", "val_loss_every=5", "keep_checkpoints=9", "sample_tokens=0", "grad_clip=1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with a few texts, shards of them, and what one rank makes of them in 20 steps."
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "texts").mkdir()
    for number in range(30):
        words = [f"{n} times {number} is {n * number}." for n in range(200)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "toy.yml").write_text(CONFIG.format(here=folder))
    assert train_main([str(folder / "toy.yml"), f"checkpoint_dir={folder}/one", *GENTLE]) == 0
    return folder


def start(here, name, *words):
    return subprocess.Popen([str(ROOT / "run.sh"), str(here / "toy.yml"), f"checkpoint_dir={here / name}", *words], cwd=here,
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def validations(directory): return [row["val_loss"] for row in read_metrics(Path(directory) / "metrics.jsonl") if "val_loss" in row]


def assert_same(directory, reference, steps=slice(None)):
    "The first losses nearly equal, all within 1e-4 nats; the same tokens in the same steps."
    got, expected = losses(directory), losses(reference)[steps]
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert abs(got[0][1] - expected[0][1]) < 2e-6
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected)) < 1e-4
    assert max(abs(a - b) for a, b in zip(validations(directory), validations(reference)[-len(validations(directory)):])) < 1e-4
    one, other = (load_checkpoint(Path(folder) / "state_step_20.pt") for folder in (reference, directory))
    assert one["tokens_seen"] == other["tokens_seen"] and one["position"] == other["position"]
    for name, weights in one["model"].items(): torch.testing.assert_close(other["model"][name], weights, atol=1e-4, rtol=0)


# the same run on any number of ranks

@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_give_the_losses_of_one(here, ranks):
    name = f"on_{ranks}"
    said = finish(start(here, name, "-n", str(ranks), "device_batch_size=2", *GENTLE))
    assert f"{ranks} ranks x {12 // ranks // 2} x 2 rows" in said and said.count("step      0: validation loss") == 1
    assert_same(here / name, here / "one")
    first = json.loads((here / name / "metrics.jsonl").read_text().splitlines()[0])
    assert first["ranks"] == ranks and len(losses(here / name)) == 20  # one rank logs


def test_saved_on_two_resumed_on_one_and_back(here):
    "After step 10 of two ranks one goes on alone; after its step 15 two do."
    process = start(here, "two_first", "-n", "2", *GENTLE, "num_iterations=10")
    finish(process)
    alone = [str(here / "toy.yml"), *GENTLE, "num_iterations=20", f"init_checkpoint={here}/two_first/state_step_10.pt"]
    assert train_main([*alone, f"checkpoint_dir={here}/then_one"]) == 0
    assert_same(here / "then_one", here / "one", slice(10, None))
    finish(start(here, "then_two", "-n", "2", "-p", f"{here}/then_one/state_step_15.pt", *GENTLE))
    assert_same(here / "then_two", here / "one", slice(15, None))


def test_a_batch_that_does_not_divide_is_one_line(here):
    process = start(here, "seven", "-n", "2", *GENTLE, "global_batch_size=7")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and "2 ranks" in err and ("6 is the nearest" in err or "8 is the nearest" in err), err
    assert not (here / "seven").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(here):
    for number in (1, 2):
        finish(start(here, f"gpus_{number}", "-n", str(number), *GENTLE, "device=cuda", "attention=sdpa", "compile=false"), timeout=300)
    one, two = (losses(here / f"gpus_{number}") for number in (1, 2))
    assert [step for step, _ in one] == [step for step, _ in two] and max(abs(a - b) for (_, a), (_, b) in zip(one, two)) < 0.02  # bf16


# the share of each rank in a step whose targets don't all count

UNEQUAL = """
import os, sys
import torch
from test_ranks import unequal
from daisy.distributed import join_ranks, leave_ranks
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
ranks = join_ranks(rank, world_size, torch.device("cpu"), sys.argv[3], 60)
torch.save(unequal(ranks), f"{sys.argv[4]}/{rank}.pt")
leave_ranks(ranks)
"""


class Share(Loader):
    "The rows of one rank, of batches whose rows have 1 to 8 targets."

    def __init__(self, ranks, rows): (super().__init__(rows, ignore=True), setattr(self, "ranks", ranks))

    def __next__(self):
        batch, size = super().__next__(), self.rows // self.ranks.world_size
        mine = slice(self.ranks.rank * size, (self.ranks.rank + 1) * size)
        return Batch(batch.inputs[mine], batch.targets[mine], batch.position)


def unequal(ranks):
    "Loss and norm of each of 12 steps, and the weights after them."
    from daisy.optim import Sharded
    model = Bigram()
    group = dict(params=[model.table], name="embed", lr=0.5, initial_lr=0.5, weight_decay=0.0, initial_weight_decay=0.0)
    optimizer = torch.optim.AdamW([group], eps=1e-3) if ranks.world_size == 1 else \
        Sharded([group], lambda groups: torch.optim.AdamW(groups, eps=1e-3), ranks)
    trainer = make(model=model, optimizer=optimizer, pieces=2, loader=Share(ranks, 6), ranks=ranks)
    return dict(values=torch.stack([trainer.train_step().values for _ in range(12)]), table=model.table.data)


@pytest.mark.parametrize("number", [2, 3])
def test_the_mean_is_over_the_targets_of_all_ranks(tmp_path, number):
    (tmp_path / "script.py").write_text(UNEQUAL)
    env = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    meeting = (tmp_path / "meeting").as_uri()
    processes = [subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(rank), str(number), meeting, str(tmp_path)], env=env,
                                  stderr=subprocess.PIPE, text=True) for rank in range(number)]
    for process in processes:
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 0, err
    alone = unequal(Ranks())
    for rank in range(number):
        mine = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(mine["values"], alone["values"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine["table"], alone["table"], rtol=1e-6, atol=1e-6)


# accidents

LONG = ["num_iterations=50000", "schedule_total_iters=24", "val_loss_every=40000", "sample_tokens=0"]


def ranks_of(launcher) -> dict[int, int]:
    "rank → process id of what the launcher has started."
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher.pid:
            found |= {int(word[5:]): int(folder.name) for word in environment if word.startswith(b"RANK=")}
    return found


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_in_one_line(here, lost):
    name = f"lost_{lost}"
    process = start(here, name, "-n", "2", *LONG)
    wait_for_lines(process, here / name / "metrics.jsonl", 6)
    began = time.monotonic()
    os.kill(ranks_of(process)[lost], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - began < 60
    assert err.count("\n") == 1 and f"rank {lost} " in err and "SIGKILL" in err, err


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_leaves(here, signum):
    name = f"stopped_{signum}"
    process = start(here, name, "-n", "2", *LONG)
    wait_for_lines(process, here / name / "metrics.jsonl", 6)
    for pid in (process.pid, *ranks_of(process).values()): os.kill(pid, signum)  # a scheduler tells all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert err.count("\n") == 1 and f"stopped by {signal.Signals(signum).name}" in err, err
    last = losses(here / name)[-1][0]
    assert last < 50000 and (here / name / f"state_step_{last}.pt").is_file()
    assert load_checkpoint(here / name / f"state_step_{last}.pt")["step"] == last


def test_a_mistake_that_all_ranks_notice_is_said_once(here):
    process = start(here, "nowhere", "-n", "2", "train_files=nowhere/*.bin")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and "nowhere/*.bin" in err, err


def test_who_says_it_first():
    class Store:
        said = {}
        def add(self, key, number): return self.said.setdefault(key, []).append(number) or len(self.said[key])
    a, b = (Ranks(rank, 2, store=Store()) for rank in (0, 1))
    assert [first_to_say(error, ranks) for error in (ValueError("x"), ValueError("y")) for ranks in (a, b)] == [True, False, True, False]
    assert first_to_say(ValueError("x"), Ranks())

    class Gone:
        def add(self, key, number): raise RuntimeError("connection closed")
    assert first_to_say(ValueError("x"), Ranks(0, 2, store=Gone()))


# several machines

@pytest.mark.parametrize("way", ["rdzv_endpoint", pytest.param("node_rank", marks=pytest.mark.slow)])
def test_two_nodes_of_one_process(here, way):
    "Two launchers meet at a port of this machine and train as two ranks."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = {"rdzv_endpoint": lambda node: [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"],
            "node_rank": lambda node: [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]}[way]
    name = f"nodes_{way}"
    nodes = [start(here, name, "-n", "1", "--nnodes=2", *meet(node), *GENTLE) for node in range(2)]
    said = [finish(node) for node in nodes]
    assert sorted("2 ranks x 1 x 6 rows" in words for words in said) == [False, True]  # only rank 0 speaks
    assert_same(here / name, here / "one")


# how many processes

def test_the_default_is_the_gpus_and_an_explicit_number_is_obeyed_or_refused():
    assert [processes_to_start(None, "auto", gpus) for gpus in (0, 1, 4, 8, 16)] == [1, 1, 4, 8, 8]
    assert [processes_to_start(None, device, 8) for device in ("cpu", "mps", "cuda")] == [1, 1, 8]
    assert processes_to_start(2, "auto", 0) == processes_to_start(2, "cpu", 1) == processes_to_start(2, "cuda", 2) == 2
    with pytest.raises(ValueError, match="-n 8: only 1 GPU is visible here; use -n 1"): processes_to_start(8, "auto", 1)
    with pytest.raises(ValueError, match="only 4 GPUs are"): processes_to_start(8, "cuda", 4)
    with pytest.raises(ValueError, match="mps"): processes_to_start(2, "mps", 0)


@pytest.mark.parametrize("gpus, words, said, started", [
    (0, ["--"], "processes: 1, not the usual 8, since no GPUs can be used", "here"),
    (1, ["--"], "processes: 1, not the usual 8, since 1 GPU can be used", "here"),
    (2, ["--"], "processes: 2, not the usual 8, since 2 GPUs can be used", 2), (8, ["--"], "", 8), (0, ["-n", "1", "--"], "", "here"),
    (0, ["-n", "3", "--"], "", 3), (1, ["-n", "8", "--"], "-n 8: only 1 GPU is visible here; use -n 1", None),
    (1, ["-n", "1", "--nnodes=2", "--rdzv_endpoint=a:1", "--"], "", 1)])
def test_what_is_launched_and_what_is_said_of_it(tmp_path, monkeypatch, capsys, gpus, words, said, started):
    (tmp_path / "c.yml").write_text("num_iterations: 1\n")
    calls = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(real_run, "train_main", lambda argv: calls.append(("here", argv)) or 0)
    monkeypatch.setattr(real_run, "_torchrun", lambda flags, argv: calls.append((flags, argv)) or 0)
    code = launch_main("train.py", [*words, str(tmp_path / "c.yml"), "lr=1"][:len(words) + 1])
    out, err = capsys.readouterr()
    assert said in (out if started else err) and (said or not out + err) and code == (0 if started else 1)
    if started == "here": assert calls == [("here", [str(tmp_path / "c.yml")])]
    elif started: assert f"--nproc-per-node={started}" in calls[0][0] and ("--standalone" in calls[0][0]) == ("--nnodes=2" not in words)
    else: assert not calls
