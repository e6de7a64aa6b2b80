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


def with_root():
    "PYTHONPATH with the package, the tests, and whatever was there."
    return os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))


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


def finish(process, timeout=300):
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
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("\n") == 1 and "2 ranks" in err and ("6 is the nearest" in err or "8 is the nearest" in err), err
    assert not (here / "seven").exists()


def test_the_scaling_benchmark_compares_one_and_two(here):
    rows, words = here / "scaling.jsonl", ["--device", "cpu", "--commit", "abc", "--out", str(here / "scaling.jsonl")]
    assert real_run.bench_main(["scaling", str(here / "toy.yml"), "--ranks", "1,2", *words, *GENTLE, "num_iterations=8"]) == 0
    row = json.loads(rows.read_text())
    assert row["ranks"] == [1, 2] and row["speedup_2gpu"] > 0 and row["loss_gap"] < 1e-4 and row["batch_tokens"] == 12 * 64
    assert 0 < row["optimizer_gb"][1] < 0.7 * row["optimizer_gb"][0] and all(seconds > 0 for seconds in row["snapshot_s"])
    assert row["command"].startswith(f"daisy-bench scaling {here}/toy.yml --ranks 1,2 --device cpu embed_params_lr")


SNAPSHOT = """
import sys
from pathlib import Path
import torch
from test_ranks import GENTLE
from test_real_run import notes
from daisy.config import load_config
from daisy.distributed import join_ranks, leave_ranks
from daisy.real_run import Run
from daisy.trainer import Progress
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
ranks = join_ranks(rank, 2, torch.device(sys.argv[4], rank) if sys.argv[4] == "cuda" else torch.device("cpu"), sys.argv[3], 200)
config = load_config(folder / "toy.yml", [*GENTLE, f"checkpoint_dir={folder}/room", "num_iterations=2", f"device={sys.argv[4]}", "compile=false", "attention=sdpa"])
run, made = Run(config, ranks=ranks), []
asked = notes(run.saver) if sys.argv[4] == "cpu" else []
run._make_room = lambda: (run.is_first and run.saver.reserve(run._saved_kinds()), run.saver.wait(), made.append(len(asked)))
run.fit(Progress())
run.snapshot(Progress(step=3))
run.saver.wait()
pinned = [copy.is_pinned() for copies in run.saver.room.values() for copy in copies]
torch.save(dict(asked=[str(kind) for kind in asked], made=made, pinned=pinned), folder / f"asked_{rank}.pt")
leave_ranks(ranks)
"""


def snapshots_of_two(here, folder, device):
    "What each of two ranks asked for, and the state that the first has written down."
    (folder / "toy.yml").write_text((here / "toy.yml").read_text())
    (folder / "script.py").write_text(SNAPSHOT)
    processes = [subprocess.Popen([sys.executable, str(folder / "script.py"), str(rank), str(folder), (folder / "meeting").as_uri(), device],
                                  env={**ENVIRONMENT, "PYTHONPATH": with_root()}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(folder / f"asked_{rank}.pt", weights_only=True) for rank in range(2)], load_checkpoint(folder / "room" / "state_step_3.pt")


def tensors_of(saved): return [saved["model"][name] for name in saved["model"]] + [
    value for optimizer in saved["optimizers"] for state in optimizer["state"].values() for value in state.values()]


def test_only_the_first_rank_copies_the_state_that_it_writes(here, tmp_path):
    "Into the room that it has made ahead; the other holds no copy at all."
    (first, other), saved = snapshots_of_two(here, tmp_path, "cpu")
    assert other["asked"] == [] and other["pinned"] == []
    kinds = sorted(str((tuple(value.shape), value.dtype)) for value in tensors_of(saved))
    assert sorted(first["asked"][:first["made"][0]]) == kinds and len(first["asked"]) == len(kinds) + 2  # and two random states
    assert all(value is not None and value.device.type == "cpu" for value in tensors_of(saved))


# the same on GPUs, through NCCL

def on_two_gpus(test):
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")(test))


ON_GPUS = ["device=cuda", "attention=sdpa", "compile=false"]


@pytest.fixture(scope="module")
def gpus(here):
    "The 20 steps on one GPU and on two, in bfloat16."
    for process in [start(here, f"gpus_{number}", "-n", str(number), *GENTLE, *ON_GPUS) for number in (1, 2)]: finish(process, timeout=200)
    return {number: here / f"gpus_{number}" for number in (1, 2)}


def assert_near(directory, reference, steps=slice(None)):
    "Losses within bf16's noise; the same tokens in the same steps."
    got, expected = losses(directory), losses(reference)[steps]
    assert [step for step, _ in got] == [step for step, _ in expected]
    apart = [abs(a - b) for (_, a), (_, b) in zip(got, expected)]
    assert apart[0] < 3e-3 and max(apart) < 0.02, apart
    assert validations(directory)[-1] == pytest.approx(validations(reference)[-1], abs=0.02)


@on_two_gpus
def test_two_gpus_give_the_losses_of_one(gpus):
    assert_near(gpus[2], gpus[1])
    first, *_, last = losses(gpus[1])
    assert last[1] < first[1] - 0.1, "nothing was learned: the test would show nothing"
    assert [read_metrics(folder / "metrics.jsonl")[0]["ranks"] for folder in gpus.values()] == [1, 2]
    held = [read_metrics(folder / "metrics.jsonl")[-2]["optimizer_gb"] for folder in gpus.values()]
    assert held[1] < 0.7 * held[0]


@on_two_gpus
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_saved_on_some_gpus_goes_on_on_others(here, gpus, before, after):
    name = f"gpus_{before}_then_{after}"
    finish(start(here, name, "-n", str(after), "-p", f"{gpus[before]}/state_step_10.pt", *GENTLE, *ON_GPUS), timeout=200)
    assert_near(here / name, gpus[before], slice(10, None))
    one, other = (load_checkpoint(folder / "state_step_15.pt") for folder in (gpus[before], here / name))
    assert one["tokens_seen"] == other["tokens_seen"] and one["position"] == other["position"]
    for state, again in zip(one["optimizers"], other["optimizers"], strict=True):  # not begun anew at step 10
        for index, tensors in state["state"].items():
            for key, value in tensors.items():
                assert (again["state"][index][key] - value).norm() <= 0.2 * value.norm() + 1e-7, (index, key)


STEP_MEMORY = """
import sys
import torch
from daisy.distributed import join_ranks, leave_ranks
from daisy.gpt import GPT, GPTConfig
from daisy.optim import build_optimizers, state_bytes, take_step
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
ranks = join_ranks(rank, world_size, torch.device("cuda", rank), sys.argv[3], 200)
model = GPT(GPTConfig(vocab_size=16384, eos_token_id=0, num_layers=8, num_heads=8, head_dim=64, model_dim=512, max_seq_len=64)).cuda()
optimizers = build_optimizers(model, ranks=ranks, embed_params_lr=0.1, value_embed_lr=0.1, scalar_params_lr=0.01, hidden_matrix_params_lr=0.02, head_params_lr=0.01)
for step in range(3):
    for p in model.parameters(): p.grad = torch.randn_like(p)
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    take_step(optimizers)
    torch.cuda.synchronize()
given = 2 * sum(p.nbytes for p in model.parameters())
torch.save(dict(peak=torch.cuda.max_memory_allocated() - given, state=state_bytes(optimizers), weights=model.embed.weight.detach()[::64].cpu()), f"{sys.argv[4]}/{rank}.pt")
leave_ranks(ranks)
"""


@on_two_gpus
def test_what_the_optimizers_need_at_most_falls_with_the_ranks(tmp_path):
    "State and messages together, over weights and gradients."
    (tmp_path / "script.py").write_text(STEP_MEMORY)
    needs = {}
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        meeting = (tmp_path / f"meeting_{number}").as_uri()
        ranks = [subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(rank), str(number), meeting, str(tmp_path / str(number))],
                                  env={**ENVIRONMENT, "PYTHONPATH": with_root()}, stderr=subprocess.PIPE, text=True) for rank in range(number)]
        errors = [process.communicate(timeout=300)[1] for process in ranks]
        assert not any(process.returncode for process in ranks), "\n".join(errors)
        needs[number] = [torch.load(tmp_path / str(number) / f"{rank}.pt", weights_only=True) for rank in range(number)]
    (alone,), (first, second) = needs[1], needs[2]
    assert torch.equal(first["weights"], second["weights"])
    told = [f"{need['peak'] / 1e6:.0f} MB at most, state {need['state'] / 1e6:.0f} MB" for need in (alone, first, second)]
    print(*told, sep="\n")
    assert max(first["state"], second["state"]) < 0.6 * alone["state"], told
    assert max(first["peak"], second["peak"]) < 0.85 * alone["peak"], told


@on_two_gpus
def test_on_gpus_only_the_first_rank_copies_and_into_pinned_memory(here, tmp_path):
    (first, other), saved = snapshots_of_two(here, tmp_path, "cuda")
    assert other["pinned"] == [] and len(first["pinned"]) >= len(tensors_of(saved)) and all(first["pinned"])


@on_two_gpus
def test_mistakes_on_gpus_are_one_line_too(here):
    for words, told in ((["global_batch_size=7"], "2 ranks"), (["train_files=nowhere/*.bin"], "nowhere/*.bin")):
        process = start(here, "wrong", "-n", "2", *GENTLE, *ON_GPUS, *words)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and err.count("\n") == 1 and told in err, err


# the share of each rank in a step whose targets don't all count

UNEQUAL = """
import os, sys
import torch
from test_ranks import unequal
from daisy.distributed import join_ranks, leave_ranks
rank, world_size = int(sys.argv[1]), int(sys.argv[2])
ranks = join_ranks(rank, world_size, torch.device("cpu"), sys.argv[3], 200)
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
    env = {**ENVIRONMENT, "PYTHONPATH": with_root()}
    meeting = (tmp_path / "meeting").as_uri()
    processes = [subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(rank), str(number), meeting, str(tmp_path)], env=env,
                                  stderr=subprocess.PIPE, text=True) for rank in range(number)]
    for process in processes:
        err = process.communicate(timeout=300)[1]
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


def on_cpu_and_gpus(*values):
    "Parameters (value, more words): the first always, others where it may be slow, and the last on GPUs too."
    return [(values[0], []), *(pytest.param(value, [], marks=pytest.mark.slow) for value in values[1:]),
            pytest.param(values[-1], ON_GPUS, marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")])]


@pytest.mark.parametrize("lost, more", on_cpu_and_gpus(0, 1))
def test_a_killed_rank_ends_the_run_in_one_line(here, lost, more):
    name = f"lost_{lost}_{len(more)}"
    process = start(here, name, "-n", "2", *LONG, *more)
    wait_for_lines(process, here / name / "metrics.jsonl", 6)
    began = time.monotonic()
    os.kill(ranks_of(process)[lost], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    gone_s = time.monotonic() - began
    assert err.count("\n") == 1 and f"rank {lost} " in err and "SIGKILL" in err, err
    assert process.returncode == 128 + signal.SIGKILL and gone_s < 60, gone_s


@pytest.mark.parametrize("signum, more", on_cpu_and_gpus(signal.SIGTERM, signal.SIGINT))
def test_a_signal_to_the_launcher_saves_and_leaves(here, signum, more):
    name = f"stopped_{signum}_{len(more)}"
    process = start(here, name, "-n", "2", *LONG, *more)
    wait_for_lines(process, here / name / "metrics.jsonl", 6)
    for pid in (process.pid, *ranks_of(process).values()): os.kill(pid, signum)  # a scheduler tells all of them
    _, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signum
    assert err.count("\n") == 1 and f"stopped by {signal.Signals(signum).name}" in err, err
    last = losses(here / name)[-1][0]
    assert last < 50000 and (here / name / f"state_step_{last}.pt").is_file()
    assert load_checkpoint(here / name / f"state_step_{last}.pt")["step"] == last


def test_a_mistake_that_all_ranks_notice_is_said_once(here):
    process = start(here, "nowhere", "-n", "2", "train_files=nowhere/*.bin")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("\n") == 1 and "nowhere/*.bin" in err, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_once(here):
    process = start(here, "nowhere", "-n", "3", "device=cuda")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.count("\n") == 1 and "device=cuda needs a CUDA GPU" in err, err


def test_a_rank_on_a_gpu_leaves_an_error_at_once(monkeypatch, capsys):
    "NCCL's farewell would wait for the others; a process alone, or on gloo, returns as always."
    left, nccl = [], Ranks(1, 2, torch.device("cuda", 1))
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(real_run, "_device_name", lambda *words: "auto")
    for ranks, wrong, code in ((nccl, ValueError("no"), 1), (nccl, RuntimeError("a crash"), 1), (Ranks(1, 2), ValueError("no"), None)):
        monkeypatch.setattr(real_run, "join_run", lambda device: ranks)
        monkeypatch.setattr(real_run, "read_run_config", lambda *words, wrong=wrong: (_ for _ in ()).throw(wrong))
        assert train_main(["c.yml"]) == 1 and left == [code] * (code is not None)
        left.clear()
    err = capsys.readouterr().err
    assert err.count("train.py: no\n") == 2 and "RuntimeError: a crash" in err


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


def test_ranks_are_given_time_to_save(tmp_path, monkeypatch):
    "torchrun kills them 30 s after a signal; newer torch reads how long it should wait, and what the user has set stays."
    from torch.distributed.launcher.api import LaunchConfig
    (tmp_path / "c.yml").write_text("num_iterations: 1\n")
    waits = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(real_run, "_torchrun", lambda flags, argv: waits.append(getattr(LaunchConfig(1, 1, 1), "shutdown_timeout", None)) or 0)
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"): monkeypatch.setenv(name, "1")  # put back afterwards, like the next
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "40")
    assert launch_main("train.py", ["-n", "2", "--", str(tmp_path / "c.yml")]) == 0
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert launch_main("train.py", ["-n", "2", "--", str(tmp_path / "c.yml")]) == 0
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(real_run.SAVING_S) and waits in ([40, real_run.SAVING_S], [None, None])
