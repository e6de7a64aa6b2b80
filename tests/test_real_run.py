"""Promises 1 to 18 where they need the whole program: the command line, resuming, being killed. Lesson 23 shows the rest."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from daisy.checkpoint import load_checkpoint, save_checkpoint
from daisy.corpus import python_docs
from daisy.real_run import load_model, train_main

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


def wait_for_lines(process, path, count, timeout_s=120):
    "Until the log has so many lines, or the process has ended."
    end = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.002)


def test_losses_cover_every_step(reference):
    assert [step for step, _ in reference] == list(range(1, 25))
    assert reference[-1][1] < reference[0][1] - 0.5


@pytest.mark.parametrize("lines", [3, 9, 17])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(here, reference, lines):
    name = f"killed_{lines}"
    process = start(here, name)
    wait_for_lines(process, here / name / "metrics.jsonl", lines)
    process.kill()
    process.communicate()
    again = start(here, name)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    # killed before its first snapshot (step 4), a run begins anew and its few rows are written again
    assert losses(here / name) == reference


def test_sigterm_saves_and_leaves_with_its_code(here, reference):
    # this many steps would take minutes: only the signal can end it in time
    process = start(here, "terminated", "num_iterations=5000", "schedule_total_iters=24", "val_loss_every=4000")
    wait_for_lines(process, here / "terminated" / "metrics.jsonl", 6)
    process.terminate()
    out, err = process.communicate(timeout=120)
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
    for flag in ("--ignore-prior-schedule", "--ignore_prior_schedule=true", "ignore_prior_steps=true"):
        directory = here / f"tuned{len(flag)}"
        assert train_main([str(here / "toy.yml"), f"init_checkpoint={finished}", flag, f"checkpoint_dir={directory}", "num_iterations=8"]) == 0
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
