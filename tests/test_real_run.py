"""Promises 1 to 18 where they need the whole program: the command line, resuming, being killed. Lesson 23 shows the rest."""
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from daisy.checkpoint import load_checkpoint, random_state, save_checkpoint
from daisy.corpus import python_docs
from daisy.config import KEYS, ConfigError, load_config
from daisy.real_run import Run, checkpoint_file, load_model, one_line_errors, plot_main, starting_checkpoint, train_main
from daisy.shards import read_shard, write_shard
from daisy.trainer import Progress

ROOT = Path(__file__).parent.parent
CONFIG = """
corpus: {here}/texts
train_files: {here}/shards/train_*.bin
val_files: {here}/shards/val_*.bin
vocab_size: 300
num_layers: 2
num_heads: 2
head_dim: 16
model_dim: 32
max_seq_len: 64
global_batch_size: 8
num_iterations: 24
val_tokens: 1000
val_loss_every: 4
device: cpu
sample_prompt: "The"
sample_tokens: 5
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with texts, and a config whose shards are built by the first run."
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts").mkdir()
    for document in islice(python_docs(), 40):
        (folder / "texts" / f"{document.name.replace(' ', '_')}.txt").write_text(document.text, encoding="utf-8")
    (folder / "toy.yml").write_text(CONFIG.format(here=folder))
    return folder


def losses(directory):
    rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def reference(here):
    "The losses of a run that nobody disturbed."
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/reference"]) == 0
    return losses(here / "reference")


def start(here, name, *overrides):
    "The command in a process of its own."
    return subprocess.Popen([sys.executable, "-u", "train.py", str(here / "toy.yml"), f"checkpoint_dir={here / name}", *overrides],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_lines(process, path, count, timeout_s=300):
    "Until the log has so many lines, or the process has ended."
    end = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.002)
    assert process.poll() is not None, f"{path} hasn't got {count} lines within {timeout_s} s"


def test_a_snapshot_taken_while_windows_grow_is_sampled_with_those_windows(here, reference):
    "Promise 26: what a checkpoint computes is what training computed at its step."
    config = load_config(here / "toy.yml", [f"checkpoint_dir={here}/growing", "num_iterations=6", "schedule_total_iters=24", "window_start=0.25",
                                            "window_warmup_frac=0.5", "window_stages=4", "window_short=32", "sample_tokens=0"])
    run = Run(config)
    assert run.train() and run.model.window_fraction == 0.5
    model, _ = load_model(here / "growing" / "state_step_6.pt", torch.device("cpu"))
    tokens = torch.randint(1, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained, full = run.model.eval()(tokens), (model.set_window_fraction(1.0), model(tokens))[1]
        model, _ = load_model(here / "growing" / "state_step_6.pt", torch.device("cpu"))
        cache = model.new_cache(1, 64)
        assert torch.equal(model(tokens), trained) and not torch.allclose(full, trained, atol=1e-3)
        pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split(16, dim=1)], dim=1)
    torch.testing.assert_close(pieces, trained, rtol=1e-4, atol=1e-4)
    saved = load_checkpoint(here / "growing" / "state_step_6.pt")
    del saved["window_fraction"]  # an older file
    save_checkpoint(here / "older", saved.pop("step"), saved)
    assert load_model(here / "older" / "state_step_6.pt", torch.device("cpu"))[0].window_fraction == 1.0


def test_losses_cover_every_step(reference):
    assert [step for step, _ in reference] == list(range(1, 25))
    assert reference[-1][1] < reference[0][1] - 0.5


@pytest.mark.parametrize("lines", [9])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(here, reference, lines):
    name = f"killed_{lines}"
    process = start(here, name)
    wait_for_lines(process, here / name / "metrics.jsonl", lines)
    process.kill()
    process.communicate()
    again = start(here, name)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    # killed before its first snapshot (step 4), a run begins anew and its few rows are written again
    assert losses(here / name) == reference


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("number", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_while_saving_too(here, reference, tmp_path, number):
    "Every second kill falls into a save. Each run is killed up to three times and then ends as one that never was, bit for bit."
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kills.py"), str(here / "toy.yml"), str(tmp_path), str(number), "7"], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, saving, runs = map(int, done.stdout.split())
    assert kills >= number and saving >= number // 3
    expected = load_checkpoint(tmp_path / "undisturbed" / "state_step_24.pt")
    for run in (tmp_path / str(n) for n in range(1, runs + 1)):
        assert losses(run) == losses(tmp_path / "undisturbed") == reference
        saved = load_checkpoint(run / "state_step_24.pt")
        assert all(torch.equal(saved["model"][name], weights) for name, weights in expected["model"].items())


def test_sigterm_saves_and_leaves_with_its_code(here, reference):
    # this many steps would take minutes: only the signal can end it in time
    process = start(here, "terminated", "num_iterations=5000", "schedule_total_iters=24", "val_loss_every=4000")
    wait_for_lines(process, here / "terminated" / "metrics.jsonl", 6)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "the same command goes on from here" in err and "Traceback" not in err
    last = losses(here / "terminated")[-1][0]
    assert (here / "terminated" / f"state_step_{last}.pt").is_file()


def test_the_same_line_after_a_finished_run_starts_afresh(here, reference):
    for _ in range(2):
        assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/twice"]) == 0
    assert losses(here / "twice") == losses(here / "twice" / "run_1") == reference


def test_another_configs_folder_is_refused(here, reference, capsys):
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/reference", "num_iterations=25"]) == 1
    assert "num_iterations = 24 (now 25)" in (said := capsys.readouterr().err) and "checkpoint_dir=" in said
    assert losses(here / "reference") == reference


def test_resuming_finished_training_says_there_is_nothing_left(here, reference, capsys):
    finished = here / "reference" / "state_step_24.pt"
    assert train_main([str(here / "toy.yml"), f"init_checkpoint={finished}", f"checkpoint_dir={here}/nothing"]) == 0
    assert "nothing left to do" in (said := capsys.readouterr().out) and "--ignore-prior-schedule" in said
    assert not (here / "nothing").exists()


def test_a_fresh_schedule_really_trains(here, reference, capsys):
    finished = here / "reference" / "state_step_24.pt"
    (here / "tune.yml").write_text((here / "toy.yml").read_text() + f"init_checkpoint: {finished}\nignore_prior_steps: true\n")
    for name, flag in (("toy", "--ignore-prior-schedule"), ("toy", "--ignore_prior_schedule=true"), ("toy", "ignore_prior_steps=true"), ("tune", "seed=1337")):
        directory = here / f"tuned{len(flag)}"
        assert train_main([str(here / f"{name}.yml"), f"init_checkpoint={finished}", flag, f"checkpoint_dir={directory}", "num_iterations=8"]) == 0
        tuned = losses(directory)
        assert [step for step, _ in tuned] == list(range(1, 9)), "the schedule begins at 0 and runs to its end"
        assert tuned[0][1] < reference[0][1] - 0.5, "the weights were loaded"
        saved = load_checkpoint(directory / "state_step_8.pt")
        assert saved["tokens_seen"] == (24 + 8) * 8 * 64, "tokens seen before still count"


def test_accumulation_takes_the_same_steps(here, reference):
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/accumulated", "device_batch_size=2"]) == 0
    for (step, a), (_, b) in zip(losses(here / "accumulated"), reference):
        assert abs(a - b) < 2e-3, step


def test_begin_shard_comes_from_the_environment_and_wraps(here, reference, monkeypatch):
    monkeypatch.setenv("BEGIN_SHARD", "2")  # of one shard: wraps to the first
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/shard2"]) == 0
    assert losses(here / "shard2") == reference


def test_save_checkpoint_false_writes_none(here, reference):
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={here}/unsaved", "save_checkpoint=false"]) == 0
    assert not list((here / "unsaved").glob("*.pt"))


@pytest.mark.parametrize("arguments,words", [
    (["missing.yml"], "no config file"),
    (["toy.yml", "num_iteration=5"], "num_iterations"),
    (["toy.yml", "num_iterations=3.5"], "whole number"),
    (["toy.yml", "num_layers=two"], "whole number"),
    (["toy.yml", "train_files=nowhere/*.bin"], "nowhere/*.bin"),
    (["toy.yml", "init_checkpoint=toy.yml"], "not a usable checkpoint"),
    (["toy.yml", "train_files=cut/train_*.bin"], "cut/train_000.bin"),
    (["toy.yml", "model_type=gpt9"], "gpt2"),
    (["toy.yml", "vocab_size=400"], "vocab_size=300"),
    (["toy.yml", "device_batch_size=3"], "nearest"),
    (["toy.yml", "attention=flex"], "CUDA"),
    (["toy.yml", "loss_kernel=triton", "device=cpu"], "loss_kernel 'triton' needs a CUDA GPU"),
])
def test_a_mistake_is_one_line(here, reference, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(here)
    shutil.copytree(here / "shards", here / "cut", dirs_exist_ok=True)
    (here / "cut" / "train_000.bin").write_bytes((here / "shards" / "train_000.bin").read_bytes()[:-100])
    before = {path: path.read_bytes() for path in (here / "reference").iterdir() if path.is_file()}
    assert train_main([*arguments, f"checkpoint_dir={here}/reference"]) not in (0, None)
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1, said
    assert before == {path: path.read_bytes() for path in (here / "reference").iterdir() if path.is_file()}


def test_help_lists_every_key_without_a_gpu(capsys):
    from dataclasses import fields

    from daisy.config import TrainConfig
    assert train_main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(field.name in said for field in fields(TrainConfig))


def test_no_config_is_usage_and_2(capsys):
    assert train_main([]) == 2
    assert "CONFIG_FILE" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain", "pretrain_124m", "pretrain_350m", "pretrain_1.6B"])
def test_without_shards_one_line_names_the_download(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_main([str(ROOT / "config" / f"{name}.yml"), "device=cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data/fineweb/fineweb_train_*.bin" in error and "`python data/cached_fineweb100B.py`" in error
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_an_older_daisy_loads(here, reference, tmp_path):
    "Its model_config lacks the switches that came later: they take their defaults, which are off."
    saved = load_checkpoint(here / "reference" / "state_step_24.pt")
    newer = {"smear", "backout", "attention_gate", "long_every", "value_layers", "activation_checkpointing"}
    assert newer < set(saved["model_config"])
    saved["model_config"] = {name: value for name, value in saved["model_config"].items() if name not in newer}
    path = save_checkpoint(tmp_path, 24, {name: value for name, value in saved.items() if name not in ("format", "version", "step")})
    models = [load_model(file, torch.device("cpu"))[0] for file in (here / "reference" / "state_step_24.pt", path)]
    tokens = torch.arange(40)[None]
    assert torch.equal(*(model(tokens) for model in models)) and models[0].config == models[1].config


def test_windows_that_grow_are_resumed_where_they_were(here, tmp_path):
    "Stopped in the middle of the growth, and gone on with: the same losses as without the stop."
    growing = [str(here / "toy.yml"), "window_start=0.25", "window_stages=3", "num_iterations=8", "schedule_total_iters=8", "val_loss_every=2"]
    assert train_main([*growing, f"checkpoint_dir={tmp_path}/whole"]) == 0
    assert train_main([*growing, f"checkpoint_dir={tmp_path}/cut", "keep_checkpoints=9"]) == 0
    again = [*growing, f"init_checkpoint={tmp_path}/cut/state_step_2.pt", f"checkpoint_dir={tmp_path}/again"]
    assert train_main(again) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[2:]
    assert train_main([str(here / "toy.yml"), "num_iterations=4", "schedule_total_iters=8", f"checkpoint_dir={tmp_path}/full"]) == 0
    assert losses(tmp_path / "full") != losses(tmp_path / "whole")[:4]  # the window shows in the loss


# what is said of a run: --print-config, the log, the checkpoint, TensorBoard, a picture

def test_print_config_shows_the_run_and_starts_nothing(here, tmp_path, capsys):
    for flag in ("--print-config", "--print_config"):
        assert train_main([str(here / "toy.yml"), "num_iterations=7", flag, f"checkpoint_dir={tmp_path}/none"]) == 0
        printed = capsys.readouterr().out
        assert not (tmp_path / "none").exists()
        (tmp_path / "resolved.yml").write_text(printed)
        assert load_config(tmp_path / "resolved.yml") == load_config(here / "toy.yml", ["num_iterations=7", f"checkpoint_dir={tmp_path}/none"])
        lines = {line.split(":")[0]: line for line in printed.splitlines()}
        assert list(lines) == list(KEYS)
        for name, source in (("num_iterations", "command line"), ("num_layers", "YAML"), ("seed", "default")): assert lines[name].endswith(f"# {source}")
    assert train_main([str(here / "toy.yml"), "num_iteration=7", "--print-config"]) == 1
    assert "num_iterations" in capsys.readouterr().err


def test_log_and_checkpoint_say_what_made_them(here, reference):
    first = json.loads((here / "reference" / "metrics.jsonl").read_text().splitlines()[0])
    saved = load_checkpoint(here / "reference" / "state_step_24.pt")
    facts = saved["made_by"]
    assert facts["torch"] == torch.__version__ and facts["ranks"] == 1 and set(facts) == {"commit", "python", "torch", "machine", "ranks"}
    assert first == {"step": 0, **facts, "config": saved["config"]}


def test_tensorboard_draws_what_is_logged_and_is_asked_for_by_name(here, reference, tmp_path, monkeypatch, capsys):
    drawn = []

    class Writer:
        def __init__(self, directory, purge_step): drawn.append((directory, purge_step))
        def add_scalar(self, name, value, step): drawn.append((name, value, step))
        def flush(self): pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("torch.utils.tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    assert train_main([str(here / "toy.yml"), "tensorboard=true", f"checkpoint_dir={tmp_path}/drawn"]) == 0
    assert drawn[0] == (f"{tmp_path}/drawn", 1) and [(step, loss) for name, loss, step in drawn[1:] if name == "loss"] == reference
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train_main([str(here / "toy.yml"), "tensorboard=true", f"checkpoint_dir={tmp_path}/not"]) == 1
    assert "pip install 'daisy[tensorboard]'" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "not").exists()


def test_runs_are_drawn_over_each_other(here, reference, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for x in ("step", "tokens_seen", "train_s"):
        assert plot_main([str(here / "reference"), str(here / "reference" / "metrics.jsonl"), "--x", x, "--out", str(tmp_path / f"{x}.png")]) == 0
        assert (tmp_path / f"{x}.png").read_bytes()[:4] == b"\x89PNG"
    assert "2 runs" in capsys.readouterr().out
    assert plot_main([str(tmp_path / "nothing")]) == 1
    assert "no log at" in (said := capsys.readouterr().err) and said.count("\n") == 1


# accidents around a run: the last good checkpoint stays, and one line says what to do

def ends_in_one_line(arguments, words, capsys):
    assert train_main([str(argument) for argument in arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and all(word in said[0] for word in words), said


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(here, reference, tmp_path, monkeypatch, capsys):
    real, saves = torch.save, []

    def save(checkpoint, file):
        saves.append(checkpoint["step"])
        if len(saves) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(checkpoint, file)
    monkeypatch.setattr(torch, "save", save)
    ends_in_one_line([here / "toy.yml", f"checkpoint_dir={tmp_path}"], ["state_step_12.pt", "No space left", "untouched", "checkpoint_dir"], capsys)
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state_step_4.pt", "state_step_8.pt"]
    monkeypatch.undo()
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={tmp_path}"]) == 0 and "at step 8" in capsys.readouterr().out
    assert losses(tmp_path) == reference


def test_a_shard_that_vanishes_is_named(here, reference, tmp_path, monkeypatch, capsys):
    tokens = read_shard(next((here / "shards").glob("train_*.bin")))
    shutil.copytree(here / "shards", tmp_path / "shards")
    for old in (tmp_path / "shards").glob("train_*.bin"): old.unlink()
    for number, part in enumerate((tokens[:5000], tokens[5000:10000], tokens[10000:])):  # the loader opens the next one early
        write_shard(tmp_path / "shards" / f"train_00{number}.bin", part)
    real = Run.snapshot

    def snapshot(run, progress):
        (tmp_path / "shards" / "train_002.bin").unlink(missing_ok=True)
        return real(run, progress)
    monkeypatch.setattr(Run, "snapshot", snapshot)
    ends_in_one_line([here / "toy.yml", f"train_files={tmp_path}/shards/train_*.bin", f"val_files={tmp_path}/shards/val_*.bin",
                      f"checkpoint_dir={tmp_path}/run"], ["train_002.bin"], capsys)
    assert load_checkpoint(max((tmp_path / "run").glob("state_step_*.pt"), key=os.path.getmtime))["step"] >= 4


class Evil:
    def __reduce__(self): return (os.system, ("touch was_run",))


def spoil(path, how):
    "Put something else where a checkpoint is expected."
    if how == "cut": path.write_bytes(path.read_bytes()[:-1000])
    elif how == "flipped": path.write_bytes(bytes(byte ^ (i == path.stat().st_size // 2) for i, byte in enumerate(path.read_bytes())))
    elif how == "pickle": path.write_bytes(pickle.dumps(Evil()))
    elif how == "evil": torch.save({"format": "daisy", "version": 1, "model": Evil()}, path)
    elif how == "foreign": torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    elif how == "older": torch.save({**load_checkpoint(path), "version": 0}, path)


@pytest.mark.parametrize("how, words", [
    ("cut", "cut off"), ("flipped", "checksum"), ("pickle", "run code"), ("evil", "run code"), ("foreign", "daisy didn't write it"),
    ("older", "version 0")])
def test_a_checkpoint_that_is_none_is_refused(here, reference, tmp_path, how, words, monkeypatch, capsys):
    "The last good one of an interrupted run is named, and stays; nothing in the file is run."
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(here / "reference", run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | dict(state="running", config=record["config"] | dict(checkpoint_dir=str(run)))))
    spoil(run / "state_step_24.pt", how)
    before = {path.name: path.read_bytes() for path in run.glob("state*")}
    ends_in_one_line([here / "toy.yml", f"checkpoint_dir={run}"], ["state_step_24.pt is not a usable checkpoint", words, "try", "state_step_20.pt"], capsys)
    assert before == {path.name: path.read_bytes() for path in run.glob("state*")} and not (tmp_path / "was_run").exists()
    assert train_main([str(here / "toy.yml"), f"checkpoint_dir={run}", f"init_checkpoint={run}/state_step_20.pt"]) == 0
    assert losses(run) == reference


@pytest.mark.skipif(os.name != "posix", reason="POSIX rights")
def test_a_folder_that_cannot_be_written_is_one_line(here, reference, tmp_path, capsys):
    "A file stands where the folder should be: that stops even the root user."
    (tmp_path / "taken").write_text("")
    ends_in_one_line([here / "toy.yml", f"checkpoint_dir={tmp_path}/taken/run"], ["taken/run", "checkpoint_dir"], capsys)


def test_the_command_line_beats_the_checkpoint_where_the_weights_allow_it(here, reference, tmp_path, capsys):
    finished = here / "reference" / "state_step_24.pt"
    line = [str(here / "toy.yml"), f"init_checkpoint={finished}", "--ignore-prior-schedule", "num_iterations=2", f"checkpoint_dir={tmp_path}/longer"]
    assert train_main([*line, "max_seq_len=256", "global_batch_size=2"]) == 0
    assert load_checkpoint(tmp_path / "longer" / "state_step_2.pt")["tokens_seen"] == 24 * 8 * 64 + 2 * 2 * 256
    capsys.readouterr()
    ends_in_one_line([*line[:-1], f"checkpoint_dir={tmp_path}/wider", "model_dim=64"], ["model_dim = 64", "model_dim = 32", str(finished)], capsys)
    assert not (tmp_path / "wider").exists()


@pytest.mark.parametrize("error, where", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU"), (MemoryError(), "main"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "main")])
def test_memory_that_does_not_fit_names_the_setting_to_lower(error, where, capsys):
    def body(): raise error
    assert one_line_errors("train.py", body) == 1
    said = capsys.readouterr().err
    assert f"out of {where} memory" in said and "device_batch_size" in said and said.count("\n") == 1

    def other(): raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"): one_line_errors("train.py", other)


# the room for snapshots

def notes(saver):
    "What `saver` allocates from now on, as memory of a machine with a GPU would be asked for."
    asked, saver.pinned = [], True
    saver.allocate = lambda shape, dtype, pinned: asked.append((tuple(shape), dtype)) or torch.empty(shape, dtype=dtype)
    return asked


def kinds_of_chance():
    state = random_state()
    return Counter((tuple(value.shape), value.dtype) for value in (state["torch"], state["numpy"][1]))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_room_made_ahead_is_what_a_snapshot_takes(here, reference, tmp_path, optimizer):
    "All but a few kilobytes of random state; when the first step is done, and for any snapshot after it."
    run = Run(load_config(here / "toy.yml", [f"checkpoint_dir={tmp_path}", "num_iterations=3", f"optimizer={optimizer}"]))
    asked = notes(run.saver)
    made = []
    run._make_room = lambda: (run.saver.reserve(run._saved_kinds()), run.saver.wait(), made.append(len(asked)))
    run.fit(Progress())
    assert made == [len(run._saved_kinds())] and Counter(asked[:made[0]]) == Counter((tuple(shape), dtype) for shape, dtype in run._saved_kinds())
    assert Counter(asked[made[0]:]) == kinds_of_chance()
    run.snapshot(Progress(step=4))
    run.saver.wait()
    assert len(asked) == made[0] + 2 and load_checkpoint(tmp_path / "state_step_4.pt")["step"] == 4


def test_room_is_made_on_the_first_rank_of_a_run_on_gpus_that_saves(here, reference):
    run = Run(load_config(here / "toy.yml", []))
    reserved = []
    run.saver.reserve = reserved.append
    run._make_room()
    assert not reserved
    run.device = SimpleNamespace(type="cuda")
    run._make_room()
    assert [len(kinds) for kinds in reserved] == [len(run.model.state_dict())]  # no step has been done
    run.is_first = False
    run._make_room()
    run.is_first, run.config = True, load_config(here / "toy.yml", ["save_checkpoint=false"])
    run._make_room()
    assert len(reserved) == 1


def test_the_checkpoint_to_start_from(here, reference, tmp_path):
    newest = here / "reference" / "state_step_24.pt"
    assert starting_checkpoint(here / "reference") == checkpoint_file(here / "reference") == newest == starting_checkpoint(newest)
    assert starting_checkpoint("gone.pt") == Path("gone.pt")  # loading it says more
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match="name a state_step_N.pt"): checkpoint_file(path)
        with pytest.raises(ConfigError, match="train one first"): starting_checkpoint(path)
