"""What lesson 16 can't hold: every order of accidents, with a model so small that a run takes no time."""
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from daisy import trainer as tr
from daisy.distributed import Pending, Ranks
from daisy.loader import IGNORE, Batch
from daisy.schedules import Schedule
from daisy.trainer import (BadLoss, Evaluation, MetricsLog, Progress, Trainer, TrainingStopped, catch_signals, evaluate, peak_flops,
                           progress_bar, read_metrics)

CPU, V = torch.device("cpu"), 11
needs_signals = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, V * V, dtype=torch.float64).view(V, V).sin())

    def forward(self, inputs, targets):
        if not (targets != IGNORE).any(): return self.table.sum() * 0
        return F.cross_entropy(self.table[inputs].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class Loader:
    "Batch n is a function of n; `before(n)` runs while it is fetched. With `ignore` most targets of every third batch are IGNORE."

    def __init__(self, rows=2, position=None, before=lambda n: None, ignore=False):
        self.n, self.rows, self.before, self.ignore = (position["row"] if position else 0), rows, before, ignore

    def __iter__(self): return self

    def __next__(self):
        tokens = []
        for _ in range(self.rows):
            self.before(self.n)
            row = torch.randint(V, (9,), generator=torch.Generator().manual_seed(self.n))
            tokens.append(row)
            self.n += 1
        tokens = torch.stack(tokens)
        targets = tokens[:, 1:].clone()
        if self.ignore:
            for i, n in enumerate(range(self.n - self.rows, self.n)):
                if n % 3: targets[i, 1 + n % 5:] = IGNORE
        return Batch(tokens[:, :-1], targets, {"shard": 2, "row": self.n, "file": "train_002.bin"})


def make(steps=12, pieces=1, rows=2, model=None, loader=None, progress=None, optimizer=None, val=1.0, **settings):
    "A trainer that writes what it does, in order, to `trainer.did`."
    model, progress = model or Bigram(), progress or Progress()
    lrs = dict(lr=0.5, initial_lr=0.5, weight_decay=0.0, initial_weight_decay=0.0)
    optimizer = optimizer or torch.optim.AdamW([dict(params=[model.table], **lrs)])
    did = []

    def validate():
        did.append(("validate", progress.step))
        return Evaluation(val, None, 5)

    def snapshot(p):
        did.append(("snapshot", p.step))
        return f"run/state_step_{p.step}.pt"

    def log(**row):
        json.dumps(row, allow_nan=False)
        did.append(("log of snapshot" if "snapshot_s" in row else "log", row["step"], "val_loss" in row))
    settings = dict(val_loss_every=4) | settings
    trainer = Trainer(model, [optimizer], Schedule(steps, momentum_warmup_steps=0), loader or Loader(rows, progress.position),
                      accumulation_steps=pieces, device=CPU, validate=validate, snapshot=snapshot, log=log, progress=progress,
                      num_iterations=steps, **settings)
    trainer.did = did
    return trainer


def did(trainer, what): return [entry[1] for entry in trainer.did if entry[0] == what]


# ---- one step

@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_accumulation_equals_the_big_batch(pieces, ignore):
    whole = make(rows=6, loader=Loader(6, ignore=ignore))
    cut = make(pieces=pieces, loader=Loader(6 // pieces, ignore=ignore))
    for _ in range(12):
        a, b = whole.train_step(), cut.train_step()
        torch.testing.assert_close(a.values, b.values)  # loss and gradient norm
        assert (a.tokens, a.tokens_seen, a.step) == (b.tokens, b.tokens_seen, b.step)
    torch.testing.assert_close(whole.model.table, cut.model.table)
    assert whole.progress.position == cut.progress.position == {"shard": 2, "row": 72, "file": "train_002.bin"}


def test_a_piece_without_any_target_changes_nothing():
    class Nothing(Loader):
        def __next__(self):
            batch = super().__next__()
            return Batch(batch.inputs, torch.full_like(batch.targets, IGNORE) if self.n % 4 == 0 else batch.targets, batch.position)
    with_it, without = make(pieces=2, loader=Nothing(2)), make(pieces=1, loader=Loader(2))
    torch.testing.assert_close(with_it.train_step().values, without.train_step().values)
    only = make(loader=iter([Batch(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), IGNORE), {"row": 1})]))
    assert only.train_step().values.tolist() == [0, 0]


def test_the_windows_follow_the_schedule_from_any_step():
    seen = []
    for start in (0, 5):
        trainer = make(steps=8, progress=Progress(step=start), set_window=seen.append)
        trainer.schedule = Schedule(8, momentum_warmup_steps=0, window_start=0.25, window_warmup_frac=0.5, window_stages=4)
        trainer.train()
    stairs = [trainer.schedule.window_fraction(step) for step in range(8)]
    assert stairs == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert seen == [stairs[0], *stairs, *stairs[5:]]  # once before the first validation, then at every step


def test_the_logged_loss_is_that_of_the_weights_before_the_step():
    trainer = make()
    batch, before = next(Loader(2)), Bigram()
    assert trainer.train_step().values[0].item() == before(batch.inputs, batch.targets).item()


def test_clipping_bounds_the_gradient_and_reports_its_norm():
    seen = []

    class Look(torch.optim.SGD):
        def step(self): seen.append(self.param_groups[0]["params"][0].grad.norm().item())
    model = Bigram()
    group = dict(params=[model.table], lr=1.0, initial_lr=1.0, initial_weight_decay=0.0)
    trainer = make(model=model, optimizer=Look([group]), grad_clip=0.01)
    norm = trainer.train_step().values[1].item()
    assert norm > 0.05 and seen[0] == pytest.approx(0.01, rel=1e-3)


# ---- the loop

@pytest.mark.parametrize("steps, every, times, skip, validated, saved", [
    (12, 4, 1, 0, [0, 4, 8, 12], [4, 8, 12]), (12, 4, 2, 0, [0, 4, 8, 12], [8, 12]), (12, 4, 1, 2, [0, 4, 8, 12], [12]),
    (12, 3, 2, 2, [0, 3, 6, 9, 12], [12]), (12, 2, 2, 2, [0, 2, 4, 6, 8, 10, 12], [8, 12]), (10, 4, 1, 0, [0, 4, 8, 10], [4, 8, 10]),
    (5, 0, 1, 0, [0, 5], [5]), (5, 100, 1, 0, [0, 5], [5]), (3, 1, 1, 9, [0, 1, 2, 3], [3])])
def test_when_it_validates_and_when_it_saves(steps, every, times, skip, validated, saved):
    trainer = make(steps, val_loss_every=every, val_snapshot_every=times, snapshot_skip=skip)
    assert trainer.train() == Evaluation(1.0, None, 5)
    assert did(trainer, "validate") == validated and did(trainer, "snapshot") == saved
    assert [e[1] for e in trainer.did if e[0] == "log" and not e[2]] == list(range(1, steps + 1))
    assert did(trainer, "log of snapshot") == saved


def test_each_snapshot_follows_the_log_of_its_own_step():
    trainer = make()
    trainer.train()
    for i, entry in enumerate(trainer.did):
        if entry[0] == "snapshot":
            assert trainer.did[:i][-1] == ("log", entry[1], True) and ("log", entry[1], False) in trainer.did[:i]


def test_log_every_keeps_the_last_step():
    trainer = make(10, log_every=4)
    trainer.train()
    assert [e[1] for e in trainer.did if e[0] == "log" and not e[2]] == [4, 8, 10]


def test_save_checkpoint_false_never_saves():
    trainer = make(save_checkpoint=False)
    trainer.train()
    assert not did(trainer, "snapshot")


def test_nothing_left_to_do_only_validates():
    trainer = make(progress=Progress(step=12, position={"row": 24}))
    trainer.train()
    assert [e[0] for e in trainer.did] == ["validate", "log"]


@pytest.mark.parametrize("stop", range(1, 12))
def test_resumed_equals_uninterrupted_to_the_last_bit(stop):
    straight = make()
    straight.train()
    model, progress = Bigram(), Progress()
    first = make(model=model, progress=progress)
    for _ in range(stop): first.train_step()
    second_model = Bigram()
    second_model.load_state_dict(model.state_dict())
    second = make(model=second_model, progress=Progress(**json.loads(json.dumps(vars(progress)))))
    second.optimizers[0].load_state_dict(first.optimizers[0].state_dict())
    second.train()
    assert torch.equal(second.model.table, straight.model.table)
    assert second.progress.tokens_seen == straight.progress.tokens_seen and second.progress.position == straight.progress.position


def test_the_clock_counts_training_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tr.time, "perf_counter", lambda: now[0])
    trainer, rows = make(8, loader=Loader(2, before=lambda n: now.__setitem__(0, now[0] + 0.5))), []  # 2 rows: 1 s a step
    validate, snapshot = trainer.validate, trainer.snapshot

    def slow(function):
        def call(*args):
            now[0] += 1000
            return function(*args)
        return call
    trainer.validate, trainer.snapshot, trainer.log = slow(validate), slow(snapshot), lambda **row: rows.append(row)
    trainer.train()
    assert trainer.progress.train_seconds == 8
    assert {row["tok_s"] for row in rows if "tok_s" in row} == {16} and {row["val_s"] for row in rows if "val_s" in row} == {1000}


# ---- a loss that is no number

def spoil(trainer, value=math.nan):
    with torch.no_grad(): trainer.model.table.fill_(value)


@pytest.mark.parametrize("late", [0, 1])  # a GPU's loss is read one step later
@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 8, 12])
def test_a_bad_loss_is_named_and_no_snapshot_follows(step, late):
    trainer = make()
    trainer.read_later = late
    trainer.loader.before = lambda n: spoil(trainer) if n == 2 * (step - 1) else None
    with pytest.raises(BadLoss) as error: trainer.train()
    saved, message = [s for s in (4, 8, 12) if s < step], str(error.value)
    assert did(trainer, "snapshot") == saved and max(did(trainer, "log")) == step - 1
    assert "nan" in message and f"step {step}," in message and "shard 2" in message and "train_002.bin" in message and "\n" not in message
    assert (f"row {2 * step - 2}" if step > 1 else "beginning of the data") in message and f"row {2 * step}" in message
    assert (f"the last good checkpoint is run/state_step_{saved[-1]}.pt" if saved else "no checkpoint has been written since step 0") in message
    assert isinstance(error.value, ValueError)


def test_a_bad_loss_after_a_resume_names_the_checkpoint_it_came_from():
    trainer = make(progress=Progress(step=5, position={"row": 10}), last_checkpoint="old/state_step_5.pt")
    spoil(trainer)
    with pytest.raises(BadLoss, match="step 6.*old/state_step_5.pt"): trainer.train()
    trainer = make(progress=Progress(step=5, position={"row": 10}))
    spoil(trainer)
    with pytest.raises(BadLoss, match="since step 5"): trainer.train()


def test_a_bad_gradient_under_a_good_loss_is_noticed_before_it_is_saved():
    trainer = make()
    trainer.model.table.register_hook(lambda g: g * math.inf if trainer.progress.step == 3 else g)
    with pytest.raises(BadLoss, match="gradient's norm is (nan|inf) at step 4"): trainer.train()
    assert not did(trainer, "snapshot")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_validation_is_noticed_before_it_is_saved(value):
    trainer = make(val=value)
    trainer.progress.step = 3
    with pytest.raises(BadLoss, match=f"validation loss is {value} at step 4"): trainer.train()
    assert not did(trainer, "snapshot")


@needs_signals
@pytest.mark.parametrize("late", [0, 1])
def test_a_bad_loss_beats_a_signal(late):
    trainer = make()
    trainer.read_later = late

    def before(n):
        if n == 4:
            spoil(trainer)
            os.kill(os.getpid(), signal.SIGTERM)
    trainer.loader.before = before
    with pytest.raises(BadLoss, match="step 3"): trainer.train()
    assert not did(trainer, "snapshot")


# ---- signals

@needs_signals
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_a_signal_lets_the_step_end_and_saves_it(signum, code, step):
    trainer, before = make(), signal.getsignal(signum)
    trainer.loader.before = lambda n: os.kill(os.getpid(), signum) if n == 2 * step - 1 else None
    with pytest.raises(TrainingStopped, match=signal.Signals(signum).name) as stopped: trainer.train()
    assert stopped.value.exit_code == code and trainer.progress.step == step
    assert did(trainer, "snapshot") == sorted({s for s in (4, 8) if s < step} | {step})  # once, not twice
    assert signal.getsignal(signum) == before


@needs_signals
@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_a_second_signal_acts_as_usual(first, second):
    code = ("import os, signal\nfrom daisy.trainer import catch_signals\n"
            f"with catch_signals() as caught:\n    os.kill(os.getpid(), signal.{first})\n    print(len(caught), flush=True)\n"
            f"    os.kill(os.getpid(), signal.{second})\n    print('too late')\n")
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(tr.__file__).parents[1])
    assert died.stdout == "1\n" and died.returncode == -signal.Signals[second]


@needs_signals
def test_ranks_that_leave_are_deaf_to_what_stopped_them(monkeypatch):
    "The launcher may pass it on late, while the last checkpoint is being written; another signal still acts."
    monkeypatch.setattr(tr, "sum_over_ranks", lambda tensor, ranks: Pending(tensor))
    trainer, before = make(ranks=Ranks(0, 2)), signal.getsignal(signal.SIGTERM)
    trainer.loader.before = lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 5 else None
    try:
        with pytest.raises(TrainingStopped): trainer.train()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_room_for_snapshots_is_asked_for_once_behind_the_first_step_of_a_process():
    for start in (0, 5):
        asked = []
        trainer = make(progress=Progress(step=start), after_first_step=lambda: asked.append((trainer.progress.step, len(trainer.optimizers[0].state))))
        trainer.train()
        assert asked == [(start + 1, 1)]  # the optimizer has its state


def test_signals_outside_the_main_thread_are_left_alone():
    result = []

    def body():
        with catch_signals() as caught: result.append(caught)
        trainer = make()
        result.append(trainer.train())
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert result == [[], Evaluation(1.0, None, 5)] and signal.getsignal(signal.SIGTERM) == before


@needs_signals
def test_a_handler_that_python_does_not_know_of(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda s: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    with catch_signals() as caught: pass
    assert caught == []
    signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])


# ---- validation

def test_evaluate_counts_each_target_once():
    model, rows = Bigram(), Loader(1, ignore=True)
    batches = [next(rows) for _ in range(7)]
    lengths = torch.arange(V)
    logits = torch.cat([model.table[b.inputs].flatten(0, 1) for b in batches])
    targets = torch.cat([b.targets.flatten() for b in batches])
    kept = targets != IGNORE
    nats = F.cross_entropy(logits[kept], targets[kept], reduction="sum").item()
    got = evaluate(model, batches, CPU, lengths)
    assert got.tokens == kept.sum() and got.loss == pytest.approx(nats / kept.sum().item())
    assert got.bpb == pytest.approx(nats / math.log(2) / lengths[targets[kept]].sum().item())
    assert evaluate(model, batches, CPU).bpb is None and evaluate(model, batches, CPU, torch.zeros(V, dtype=torch.long)).bpb is None


def test_evaluate_leaves_the_mode_as_it_was_and_makes_no_gradients():
    for training in (True, False):
        model, modes = Bigram().train(training), []
        model.register_forward_hook(lambda module, args, out: modes.append((module.training, out.requires_grad)))
        evaluate(model, [next(Loader())], CPU)
        assert modes == [(False, False)] and model.training == training


def test_nothing_to_validate_on():
    batch = next(Loader())
    for batches in ([], [Batch(batch.inputs, torch.full_like(batch.targets, IGNORE), {})]):
        with pytest.raises(ValueError, match="no target token"): evaluate(Bigram(), batches, CPU)


# ---- the log

@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 9}x\n', "\0\0\0\0", "\0\0\n{", '"a word"\n', "[1]\n", "null\n", "\n\n"])
def test_a_log_survives_what_a_kill_leaves(tmp_path, tail):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(9): log.write(step=step, loss=step / 3)
    with path.open("a") as file: file.write(tail)
    log = MetricsLog(path, start_step=4)
    log.write(step=5, loss=0.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == read_metrics(path) == [dict(step=s, loss=s / 3) for s in range(5)] + [dict(step=5, loss=0.5)]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_drops_what_an_unsaved_one_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(step=3, loss=1.0)
    MetricsLog(path)
    assert read_metrics(path) == []
    MetricsLog(tmp_path / "other.jsonl", start_step=7)  # the log was lost, the checkpoint not
    assert read_metrics(tmp_path / "other.jsonl") == []


# ---- the bar, and peaks

def test_in_a_log_there_are_lines_and_no_blanks(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar(10, 40) as bar:
        bar._time = lambda: now[0]
        for step in range(11, 41):
            now[0] += 25
            bar.set_postfix(dict(loss="1.234"), refresh=False)
            bar.update()
            if step % 10 == 0: bar.write(f"step {step}: validation")
    out, err = capfd.readouterr()
    assert out == "".join(f"step {step}: validation\n" for step in (20, 30, 40))
    lines = err.splitlines()
    assert 3 <= len(lines) <= 14 and "\r" not in err and all(line.startswith("step ") and "loss=1.234" in line for line in lines)


def test_a_short_run_writes_no_bar_into_a_log(capfd):
    make().train()
    out, err = capfd.readouterr()
    assert err == "" and [line.split(":")[0].split() for line in out.splitlines()] == [["step", str(s)] for s in (0, 4, 8, 12)]


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(0, 5) as bar: bar.update(5)
    assert "\r" in terminal.getvalue() and "5/5" in terminal.getvalue()


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40", 181),
    ("NVIDIA L40S", 362), ("NVIDIA B200", 2250), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA RTX A1000", None), ("NVIDIA A1000", None), ("Tesla T4", None), ("AMD Instinct MI300X", None), ("NVIDIA H20", 148)])
def test_peaks_of_gpus(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert peak_flops(CPU) is None


def test_mfu_is_logged_only_where_the_peak_is_known():
    for peak, expected in ((None, False), (1e12, True)):
        trainer, rows = make(2, flops_per_token=lambda windows: 1e6), []
        trainer.peak_flops, trainer.log = peak, lambda **row: rows.append(row)
        trainer.train()
        assert all(("mfu" in row) == expected for row in rows if "loss" in row)
        assert not expected or all(0 < row["mfu"] and row["mfu"] == pytest.approx(row["tok_s"] * 1e6 / 1e12, rel=0.05, abs=1e-4)
                                   for row in rows if "loss" in row)


def test_mfu_counts_the_windows_of_its_step():
    trainer, rows = make(8, flops_per_token=lambda windows: 1e6 * windows), []
    trainer.schedule = Schedule(8, momentum_warmup_steps=0, window_start=0.25, window_warmup_frac=0.5, window_stages=3)
    trainer.peak_flops, trainer.log = 1e12, lambda **row: rows.append(row)
    trainer.train()
    seen = [row["mfu"] / (row["tok_s"] * 1e6 / 1e12) for row in rows if "loss" in row]
    expected = [trainer.schedule.window_fraction(step) for step in range(8)]
    assert len(set(expected)) == 3 and seen == pytest.approx(expected, rel=0.1, abs=0.02)
