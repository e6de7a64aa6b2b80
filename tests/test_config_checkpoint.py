"""What lessons 14 and 15 can't hold: kills at every stage of a save, full disks, hostile files, odd configs."""
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from daisy import checkpoint as ck
from daisy.checkpoint import (CheckpointError, Saver, finish_run, latest_checkpoint, load_checkpoint, open_run,
                              random_state, save_checkpoint, set_random_state)
from daisy.config import (DEFAULTS, FREE_KEYS, KEYS, ConfigError, TrainConfig, accumulation_steps, config_from_dict, config_help,
                          config_sources, config_to_dict, load_config, parse_overrides, read_yaml)

REQUIRED = dict(train_files="t_*.bin", val_files="v_*.bin", num_iterations=100, global_batch_size=64, max_seq_len=64,
                vocab_size=512, num_layers=2, num_heads=4, head_dim=16, model_dim=64)
PAYLOAD = {"model": {"weight": torch.arange(250_000, dtype=torch.float32)}, "config": {"seed": 1, "corpus": None}}
CONFIG = config_to_dict(TrainConfig(**REQUIRED))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.fixture
def yml(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in REQUIRED.items()))
    return path


# ---- configs

@pytest.mark.parametrize("text, key, value", [
    ("1e-3", "final_lr_frac", 1e-3), ("0", "final_lr_frac", 0.0), ("1", "final_lr_frac", 1.0), (".5", "cooldown_frac", 0.5),
    ("6e3", "num_iterations", 6000), ("6_000", "num_iterations", 6000), ("010", "num_iterations", 10), ("no", "sample_prompt", "no"),
    ("010", "sample_prompt", "010"), ("'a: b'", "sample_prompt", "a: b"), ("true", "compile", "true"), ("No", "save_checkpoint", False),
    ("on", "value_embeds", True), ("null", "corpus", None), ("~", "init_checkpoint", None), ("", "eos_token_id", None),
    ("50256", "eos_token_id", 50256)])
def test_a_word_takes_its_keys_type_in_yaml(tmp_path, text, key, value):
    path = tmp_path / "a.yml"
    path.write_text(f"{key}: {text}\n")
    read = read_yaml(path)[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("argument, key, value", [
    ("num_iterations=6000", "num_iterations", 6000), ("--num-iterations=20", "num_iterations", 20), ("final_lr_frac=1e-3", "final_lr_frac", 1e-3),
    ("--ignore-prior-schedule", "ignore_prior_schedule", True), ("--ignore_prior_schedule", "ignore_prior_schedule", True),
    ("--ignore-prior-steps", "ignore_prior_schedule", True), ("--ignore_prior_steps=true", "ignore_prior_schedule", True),
    ("ignore_prior_schedule=false", "ignore_prior_schedule", False), ("sample_prompt=a = b", "sample_prompt", "a = b"),
    ("--init_checkpoint=x/y.pt", "init_checkpoint", "x/y.pt"), ("sample_prompt=", "sample_prompt", "")])
def test_overrides(argument, key, value):
    assert parse_overrides([argument]) == {key: value}


@pytest.mark.parametrize("argument, words", [
    ("num_layer=3", "did you mean num_layers?"), ("lr=1", "hidden_matrix_params_lr"), ("learning_rate=1e-3", "hidden_matrix_params_lr"), ("head_learning_rate=1", "did you mean head_params_lr?"), ("num_iterations=3.5", "whole number"),
    ("num_iterations=many", "whole number"), ("num_iterations", "num_iterations="), ("save_checkpoint", "save_checkpoint="),
    ("num_iterations=0", "at least 1"), ("num_iterations=-1", "at least 1"), ("num_iterations=", "whole number"), ("grad_clip=nan", "finite"),
    ("grad_clip=inf", "finite"), ("grad_clip=1e999", "finite"), ("adamw_beta2=1", "below 1"), ("adamw_eps=0", "above 0"),
    ("cooldown_frac=1.1", "at most 1"), ("optimizer=moun", "did you mean muon?"), ("attention=Flux", "flex"), ("window_pattern=", "letters"),
    ("begin_shard=0", "begin_shard"), ("checkpoint_dir=", "checkpoint_dir"), ("vocab_size=65537", "at most 65536"), ("seed=-1", "at least 0"),
    ("=3", "unknown key"), ("--=3", "unknown key"), ("-n", "unknown key"), ("keep_checkpoints=0", "at least 1"), ("qk_norm=maybe", "true or false")])
def test_bad_overrides_are_one_line(argument, words):
    with pytest.raises(ConfigError) as error:
        parse_overrides([argument])
    assert words in one_line(error)


@pytest.mark.parametrize("text, words", [
    ("seed: 1\nnum_layer: 2\n", "a.yml:2: unknown key num_layer; did you mean num_layers?"), ("seed: 1\nseed: 1\n", "a.yml:2: seed stands there twice"),
    ("ignore_prior_steps: true\nignore_prior_schedule: true\n", "twice"), ("seed: [1]\n", "one value"), ("model:\n  num_layers: 2\n", "unknown key model"),
    ("just words\n", "key: value"), ("- a\n- b\n", "key: value"), ("a: b: c\n", "not YAML"), ("seed: 'x\n", "not YAML"), ("seed:\n", "whole number"),
    ("? [1]\n: 2\n", "unknown key"), ("seed: 1\n---\nseed: 2\n", "not YAML"), ("\tseed: 1\n", "not YAML")])
def test_bad_yaml_names_file_line_and_rule(tmp_path, text, words):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "a.yml")
    assert words in one_line(error)


def test_unreadable_files(tmp_path, yml):
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yml").write_text("# nothing yet\n")
    for path, words in [(tmp_path / "rum.yml", "did you mean"), (tmp_path, "can't read"), (tmp_path / "binary.yml", "UTF-8"),
                        (tmp_path / "empty.yml", "train_files"), (tmp_path / "none" / "x.yml", "no config file")]:
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert words in str(error.value)


def test_precedence(yml):
    saved = config_to_dict(load_config(yml, ["rope_base=5000", "logit_softcap=30", "grad_clip=9", "window_short=8", "window_long=16"]))
    yml.write_text(yml.read_text() + "logit_softcap: 20\ninit_checkpoint: c.pt\nseed: 7\n")
    arguments = ["max_seq_len=32768", "seed=8", "seed=9"]
    config, sources = (f(yml, arguments, lambda path: saved) for f in (load_config, config_sources))
    assert (config.max_seq_len, config.seed, config.logit_softcap, config.rope_base, config.window_long) == (32768, 9, 20, 5000, 16)
    assert config.grad_clip == 0, "a checkpoint speaks about the model only"
    assert [sources[k] for k in ("max_seq_len", "logit_softcap", "rope_base", "grad_clip")] == ["command line", "YAML", "checkpoint", "default"]
    assert set(sources) == set(KEYS)
    with pytest.raises(ConfigError) as error:
        load_config(yml, ["model_dim=128"], lambda path: saved)
    assert "model_dim = 128" in one_line(error) and "model_dim = 64" in str(error.value)


def test_the_checkpoint_is_asked_only_when_one_is_named(yml):
    def refuse(path):
        raise AssertionError(path)
    load_config(yml, [], refuse)


def test_zero_means_the_same_as():
    config = TrainConfig(**REQUIRED)
    assert (config.val_seq_len, config.num_kv_heads, config.schedule_total_iters) == (64, 4, 100)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    with pytest.raises(ConfigError):
        config_from_dict(config_to_dict(config) | {"num_layer": 3})
    with pytest.raises(ConfigError):
        config_from_dict({"num_layers": 3})


@pytest.mark.parametrize("changes", [dict(num_kv_heads=3), dict(head_dim=15), dict(eos_token_id=512), dict(window_long=8), dict(window_short=9, window_long=8),
                                     dict(num_iterations=True), dict(num_iterations=2.5), dict(seed="x"), dict(train_files=["a"]), dict(train_files="")])
def test_rules_hold_for_python_too(changes):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**REQUIRED | changes)
    assert next(iter(changes)) in one_line(error)


def test_accumulation_against_brute_force():
    for batch in range(1, 40):
        for at_once in range(0, 9):
            for world_size in (1, 2, 3, 4, 8):
                config = TrainConfig(**REQUIRED | dict(global_batch_size=batch, device_batch_size=at_once))
                works = [n for n in range(1, 200) if n % world_size == 0 and (
                    not at_once or n // world_size <= at_once or (n // world_size) % at_once == 0)]
                if batch in works:
                    steps = accumulation_steps(config, world_size)
                    assert batch % (steps * world_size) == 0 and (not at_once or batch // steps // world_size <= at_once)
                else:
                    with pytest.raises(ConfigError) as error:
                        accumulation_steps(config, world_size)
                    distance = min(abs(n - batch) for n in works)
                    assert any(f"; {n} is the nearest" in one_line(error) for n in (batch - distance, batch + distance))


@pytest.mark.parametrize("argument, words", [
    ("value_layers=4", "value_layers = 4 names layer 4, but num_layers is 2; use 0 to 1, or -1 to -2 counted from the end"),
    ("value_layers=0,1", "value_layers = '0,1' must be layer numbers with spaces between them"),
    ("activation_checkpointing=block", "activation_checkpointing = block is not one of none, cheap, full"),
    ("window_start=0", "window_start = 0 must be above 0 and at most 1"), ("window_stages=1", "window_stages = 1 must be at least 2"),
    ("long_every=-1", "long_every = -1 must be at least 0"), ("attention=flashy", "attention = flashy is not one of auto, reference, sdpa, flex, flash; "
     "did you mean flash?"), ("smear=maybe", "smear = maybe must be true or false")])
def test_the_models_switches_say_what_would_do(yml, argument, words):
    with pytest.raises(ConfigError) as error:
        load_config(yml, [argument])
    assert words in one_line(error)


CONFIGS = sorted((Path(__file__).parent.parent / "config").glob("*.yml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_batch_comes_out_even(path):
    tuned = {"instruct_sft": "pretrain_350m", "instruct_sft_1.6B": "pretrain_1.6B", "tiny_sft": "tiny"}.get(path.stem)  # from its checkpoint
    config = load_config(path) if tuned is None else load_config(
        path, ["init_checkpoint=c.pt"], lambda checkpoint: config_to_dict(load_config(path.with_name(f"{tuned}.yml"))))
    for world_size in (1,) if config.corpus else (1, 2, 4, 8):
        rows = config.global_batch_size // (world_size * accumulation_steps(config, world_size))
        assert rows * config.max_seq_len <= 65_536, "more tokens at a time than 80 GB hold"
    assert config.window_long <= config.max_seq_len


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_read_alone(path):
    "Its comments say how to run it; a line that sets a key says no more than one."
    text = path.read_text()
    assert f"./run.sh config/{path.name}" in text and "--help" in text
    assert text.count("\n# ") >= 5, "sections with a word about each"


@pytest.mark.parametrize("name, millions", [("pretrain", 124), ("pretrain_124m", 124), ("pretrain_350m", 253), ("pretrain_1.6B", 1512)])
def test_the_shapes_are_those_of_their_names(name, millions):
    from daisy.gpt import GPT, GPTConfig, count_parameters
    config = next(path for path in CONFIGS if path.stem == name)
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(config_to_dict(load_config(config)) | dict(eos_token_id=50_256)))
    counts = count_parameters(model)
    assert round(sum(counts[role] for role in ("attention", "mlp", "head")) / 1e6) == millions


def test_help_lists_every_key_with_type_and_default():
    for name, key in KEYS.items():
        line = next(line for line in config_help().splitlines() if line.startswith(f"  {name} "))
        assert key.metadata["help"] in line and (name in DEFAULTS or "required" in line)


def test_defaults_pass_their_own_rules():
    TrainConfig(**REQUIRED)
    assert set(FREE_KEYS) < set(KEYS)


def test_import_and_help_need_no_torch():
    code = "import sys, daisy.config as c; c.config_help(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- checkpoints

def test_round_trip_and_order(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    payload = {"model": model.state_dict(), "optimizers": [optimizer.state_dict()], "random": random_state(), "config": config_to_dict(TrainConfig(**REQUIRED))}
    path = save_checkpoint(tmp_path, 3, payload)
    loaded = load_checkpoint(path)
    assert path.name == "state_step_3.pt" and loaded["step"] == 3 and (loaded["format"], loaded["version"]) == ("daisy", 1)
    torch.testing.assert_close(loaded["model"], model.state_dict(), rtol=0, atol=0)
    optimizer.load_state_dict(loaded["optimizers"][0])
    assert config_from_dict(loaded["config"]) == TrainConfig(**REQUIRED)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_last_written(tmp_path, keep):
    for step in (9, 10, 11, 100, 12):  # 12 after going back from 100
        save_checkpoint(tmp_path, step, {}, keep=keep)
        assert latest_checkpoint(tmp_path).name == f"state_step_{step}.pt"
    assert len(list(tmp_path.glob("state_step_*.pt"))) == keep


def test_latest_ignores_what_is_not_whole(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None and latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, 1, {})
    (tmp_path / "state_step_2.pt.tmp").write_bytes(b"torn")
    (tmp_path / "state_step_x.pt").write_bytes(b"?")
    assert latest_checkpoint(tmp_path) == path
    for pointer in (b"", b"state_step_7.pt", b"../state_step_1.pt", b"\xff\xff", b"state_step_2.pt.tmp"):
        (tmp_path / "latest").write_bytes(pointer)
        assert latest_checkpoint(tmp_path) == path
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == path


def test_random_state_brings_back_every_generator(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second number in store
    path = save_checkpoint(tmp_path, 0, {"random": random_state()})
    draws = [(random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()) for _ in range(2)]
    set_random_state(load_checkpoint(path)["random"])
    assert (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()) == draws[0] != draws[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_state_of_the_gpu(tmp_path):
    torch.rand(1, device="cuda")
    path = save_checkpoint(tmp_path, 0, {"random": random_state()})
    first = torch.rand(3, device="cuda")
    set_random_state(load_checkpoint(path, map_location="cuda")["random"])
    assert torch.equal(first, torch.rand(3, device="cuda"))


class Crafted:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_bad_files_are_refused_by_name_and_reason(tmp_path):
    whole = save_checkpoint(tmp_path / "run", 5, PAYLOAD).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    raw = {"cut": whole[:-1], "half": whole[:len(whole) // 2], "stub": whole[:3], "empty": b"", "text": b"hello", "flipped": bytes(flipped),
           "pickle": pickle.dumps(Crafted(tmp_path / "hacked")), "padded": b"x" * 100 + whole}
    for name, data in raw.items(): (tmp_path / f"{name}.pt").write_bytes(data)
    crafted = Crafted(tmp_path / "hacked")
    objects = {"crafted": {"format": "daisy", "version": 1, "step": 1, "model": crafted}, "bare": crafted, "module": torch.nn.Linear(2, 2),
               "foreign": {"model": {}}, "tensor": torch.ones(2), "newer": {"format": "daisy", "version": 2, "step": 1}, "odd": {"format": torch.ones(2)}}
    for name, thing in objects.items(): torch.save(thing, tmp_path / f"{name}.pt")
    torch.save(crafted, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive: archive.writestr("hello", "x")
    (tmp_path / "folder.pt").mkdir()
    for path in [*tmp_path.glob("*.pt"), tmp_path / "missing.pt", tmp_path / "no" / "folder.pt", tmp_path / "text.pt" / "x.pt"]:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(path) in one_line(error) and "not a usable checkpoint: " in str(error.value)
    assert not (tmp_path / "hacked").exists(), "code from a file ran"
    with pytest.raises(CheckpointError, match="mkdir"):
        load_checkpoint(tmp_path / "crafted.pt")


def test_no_single_bit_of_the_weights_flips_unseen(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"model": {"weight": torch.ones(64)}})
    whole = path.read_bytes()
    start = whole.index(torch.ones(64).numpy().tobytes())
    for at in range(start, start + 256, 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            load_checkpoint(path)


def test_objects_are_refused_when_saving(tmp_path):
    for value in (Path("x"), np.float64(1), np.zeros(2), {1, 2}, object(), TrainConfig(**REQUIRED)):
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(tmp_path, 1, {"a": [{"b": value}]})
        assert "payload['a'][0]['b']" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path):
    save_checkpoint(tmp_path, 1, PAYLOAD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # the kernel refuses bytes past this, as a full disk does
    try:
        for step in (1, 2):
            with pytest.raises(CheckpointError) as error:
                save_checkpoint(tmp_path, step, PAYLOAD)
            assert f"state_step_{step}.pt" in one_line(error) and "checkpoint_dir" in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for function in (lambda: save_checkpoint(tmp_path / "file", 1, {}), lambda: save_checkpoint(tmp_path / "file" / "sub", 1, {}),
                     lambda: open_run(tmp_path / "file", {}), lambda: open_run(tmp_path / "file" / "sub", {})):
        with pytest.raises(CheckpointError) as error:
            function()
        assert str(tmp_path / "file") in one_line(error)
    assert (tmp_path / "file").read_text() == "mine"


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function) -> int:
    "Run `function` in a forked process; its exit code, or minus the signal that killed it."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
def test_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        open_run(folder, CONFIG)
        path = save_checkpoint(folder, 1, {})
        os.chmod(folder, 0o555)

        def save_as_nobody():
            if os.geteuid() == 0: os.setuid(65534)  # root may write anywhere
            for function in (lambda: save_checkpoint(folder, 2, {}), lambda: finish_run(folder)):
                with pytest.raises(CheckpointError, match="ermission"):
                    function()
            assert load_checkpoint(latest_checkpoint(folder))["step"] == 1

        assert in_child(save_as_nobody) == 0
        os.chmod(folder, 0o755)
        assert load_checkpoint(path)["step"] == 1


@needs_fork
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 999_999, 1_000_500])
def test_killed_after_so_many_bytes(tmp_path, size):
    save_checkpoint(tmp_path, 1, PAYLOAD)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # now the kernel kills us at the first byte beyond
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save_checkpoint(tmp_path, 2, PAYLOAD)

    assert in_child(save) == -signal.SIGXFSZ
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1
    save_checkpoint(tmp_path, 2, PAYLOAD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "state_step_1.pt", "state_step_2.pt"]


@needs_fork
@pytest.mark.parametrize("call", range(1, 8))
def test_killed_at_each_call_of_a_save(tmp_path, call):
    for step in (1, 2): save_checkpoint(tmp_path, step, PAYLOAD)
    calls = 0

    def deadly(function):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call: die()
            return function(*args, **kwargs)
        return run

    def save():  # sync, rename, sync the folder, twice; then removing the oldest
        ck.os.fsync, ck.os.replace, Path.unlink = deadly(os.fsync), deadly(os.replace), deadly(Path.unlink)
        save_checkpoint(tmp_path, 3, PAYLOAD)

    assert in_child(save) == -signal.SIGKILL
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == (2 if call <= 5 else 3)
    for path in tmp_path.glob("state_step_*.pt"): load_checkpoint(path)


def test_killed_at_a_random_moment(tmp_path):
    code = ("import torch, sys, daisy.checkpoint as ck\npayload = {'w': torch.randn(1_000_000)}\nfor step in range(10**9):\n"
            "    ck.save_checkpoint(sys.argv[1], step, payload)\n    print(step, flush=True)")
    saver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert saver.stdout.readline() == "0\n"
    time.sleep(random.random())
    saver.kill()
    told = saver.communicate()[0].split()
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] >= int(told[-1] if told else 0)
    for path in tmp_path.glob("state_step_*.pt"): load_checkpoint(path)


# ---- whose run is it

def test_unfinished_run_continues(tmp_path):
    assert open_run(tmp_path, CONFIG) is None
    assert open_run(tmp_path, CONFIG) is None, "killed before its first checkpoint"
    path = save_checkpoint(tmp_path, 7, {})
    assert open_run(tmp_path, CONFIG) == path
    assert open_run(tmp_path, CONFIG | dict(device_batch_size=2, device="cpu", log_every=5, attention="sdpa")) == path
    assert open_run(tmp_path, CONFIG) == path


@pytest.mark.parametrize("finished", [False, True])
def test_another_config_is_refused_and_nothing_touched(tmp_path, finished):
    folder = tmp_path / "checkpoints"
    open_run(folder, CONFIG)
    save_checkpoint(folder, 7, {})
    if finished: finish_run(folder)
    (tmp_path / "checkpoints_2").mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for changes in (dict(num_layers=6), dict(num_iterations=99), dict(hidden_matrix_params_lr=0.03), dict(init_checkpoint="x.pt")):
        for resume in ("auto", "never"):
            with pytest.raises(CheckpointError) as error:
                open_run(folder, CONFIG | changes, resume)
            key, value = next(iter(changes.items()))
            assert f"{key} = {CONFIG[key]} (now {value})" in one_line(error) and "checkpoints_3" in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_finished_run_moves_aside(tmp_path):
    for n in (1, 2, 3):
        assert open_run(tmp_path, CONFIG) is None
        (tmp_path / "metrics.jsonl").write_text(f"{n}")
        (tmp_path / "notes.txt").write_text("mine")
        save_checkpoint(tmp_path, n, {})
        finish_run(tmp_path)
    assert open_run(tmp_path, CONFIG) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "run.json", "run_1", "run_2", "run_3"]
    assert (tmp_path / "run_2" / "metrics.jsonl").read_text() == "2" and load_checkpoint(latest_checkpoint(tmp_path / "run_3"))["step"] == 3


def test_going_back_to_a_checkpoint_of_the_same_folder(tmp_path):
    open_run(tmp_path, CONFIG)
    first, second = save_checkpoint(tmp_path, 1, {}), save_checkpoint(tmp_path, 2, {})
    assert open_run(tmp_path, CONFIG | dict(init_checkpoint=str(first))) == first
    assert open_run(tmp_path, CONFIG) == second, "the same run still"
    finish_run(tmp_path)
    assert open_run(tmp_path, CONFIG | dict(init_checkpoint=str(second))) == second and second.exists()
    with pytest.raises(CheckpointError, match="init_checkpoint"):
        open_run(tmp_path, CONFIG | dict(init_checkpoint=str(first), ignore_prior_schedule=True))


def test_never_means_afresh(tmp_path):
    open_run(tmp_path, CONFIG)
    save_checkpoint(tmp_path, 1, {})
    assert open_run(tmp_path, CONFIG, resume="never") is None
    assert latest_checkpoint(tmp_path) is None and (tmp_path / "run_1" / "state_step_1.pt").exists()


def test_strange_folders(tmp_path):
    save_checkpoint(tmp_path / "a", 1, {})
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="no run.json"):
        open_run(tmp_path / "a", CONFIG)
    for record in ("", "{", "[]", "{}", '{"format": "daisy run", "state": "odd", "config": {}}', '{"format": "daisy run", "state": "running", "config": 3}'):
        (tmp_path / "b" / "run.json").write_text(record)
        with pytest.raises(CheckpointError) as error:
            open_run(tmp_path / "b", CONFIG)
        assert "run.json" in one_line(error)
    with pytest.raises(CheckpointError):
        finish_run(tmp_path / "none")


def test_a_key_added_by_a_newer_daisy_doesnt_end_the_run(tmp_path):
    open_run(tmp_path, {name: value for name, value in CONFIG.items() if name != "grad_clip"})
    path = save_checkpoint(tmp_path, 1, {})
    assert open_run(tmp_path, CONFIG) == path
    with pytest.raises(CheckpointError, match="grad_clip"):
        open_run(tmp_path, CONFIG | dict(grad_clip=1.0))


def test_a_background_save_is_of_the_moment_and_uses_its_memory_again(tmp_path):
    saver, payload = Saver(tmp_path, keep=2), {"model": {"w": torch.arange(10.0), "empty": torch.empty(0)}, "list": [torch.ones(2, 3).T], "n": (1, None)}
    payload["model"]["tied"] = payload["model"]["w"]
    for step in (1, 2, 3):
        expected = payload["model"]["w"].clone()
        assert saver.save(step, payload) == tmp_path / f"state_step_{step}.pt"
        places = sorted(copy.data_ptr() for copies in saver.room.values() for copy in copies if copy.numel())
        payload["model"]["w"] += 1
        saver.wait()
        saved = load_checkpoint(tmp_path / f"state_step_{step}.pt")
        assert torch.equal(saved["model"]["w"], expected) and torch.equal(saved["list"][0], payload["list"][0]) and saved["n"] == (1, None)
        assert saved["model"]["tied"].data_ptr() == saved["model"]["w"].data_ptr()
        assert step == 1 or places == before
        before = places
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state_step_2.pt", "state_step_3.pt"]
    saver.save(4, {"model": {"w": torch.zeros(3)}})  # another shape
    saver.wait()
    assert load_checkpoint(latest_checkpoint(tmp_path))["model"]["w"].shape == (3,)


def test_a_background_save_that_fails_says_so_once_and_the_next_is_tried(tmp_path):
    (tmp_path / "taken").write_text("")
    saver = Saver(tmp_path / "taken" / "run")
    saver.save(1, PAYLOAD)
    with pytest.raises(CheckpointError) as error: saver.save(2, PAYLOAD)
    assert "state_step_1.pt" in one_line(error)
    (tmp_path / "taken").unlink()
    saver.save(3, PAYLOAD)
    saver.wait()
    saver.wait()
    assert load_checkpoint(latest_checkpoint(tmp_path / "taken" / "run"))["step"] == 3
    with pytest.raises(CheckpointError): saver.save(4, {"a": object()})


class Memory:
    "Memory in the place of a GPU's: notes what it is asked for, and gives pinned only so often, and not before `gate` opens."

    def __init__(self, most=1000): self.asked, self.most, self.gate = [], most, threading.Event()

    def __call__(self, shape, dtype, pinned):
        assert self.gate.wait(60)
        self.asked.append((tuple(shape), dtype, pinned))
        if pinned and sum(pinned for *_, pinned in self.asked) > self.most: raise RuntimeError("CUDA error: out of memory\nmore words")
        return torch.empty(shape, dtype=dtype)

    def opened(self): return self.gate.set() or self


def kinds_of(payload): return [(t.shape, t.dtype) for t in payload.values()]


WEIGHTS = {"a": torch.randn(3, 4), "b": torch.randn(3, 4), "c": torch.arange(5)}


def assert_saved(path, payload):
    saved = load_checkpoint(path)
    assert all(torch.equal(saved[name], value) for name, value in payload.items())


def test_room_made_ahead_is_all_that_a_save_takes(tmp_path):
    memory = Memory().opened()
    saver = Saver(tmp_path, pinned=True, allocate=memory)
    for _ in range(2): saver.reserve(kinds_of(WEIGHTS))  # the second time there is nothing to do
    saver.wait()
    assert sorted(memory.asked, key=str) == sorted(((tuple(shape), dtype, True) for shape, dtype in kinds_of(WEIGHTS)), key=str)
    room = {copy.data_ptr() for copies in saver.room.values() for copy in copies}
    for step in (1, 2, 3):
        path = saver.save(step, dict(WEIGHTS))
        saver.wait()
        assert_saved(path, WEIGHTS)
        assert {copy.data_ptr() for copies in saver.room.values() for copy in copies} == room
    assert len(memory.asked) == 3
    saver.save(4, {"a": WEIGHTS["a"]})  # what a save didn't take is let go
    assert sum(map(len, saver.room.values())) == 1
    saver.wait()


def test_a_save_waits_for_the_room_and_takes_none_of_its_own(tmp_path):
    memory = Memory()
    saver = Saver(tmp_path, pinned=True, allocate=memory)
    saver.reserve(kinds_of(WEIGHTS))  # returns at once: nothing is given yet
    saving = threading.Thread(target=saver.save, args=(1, dict(WEIGHTS)))
    saving.start()
    saving.join(0.2)
    assert saving.is_alive() and not memory.asked
    memory.opened()
    saving.join(60)
    assert not saving.is_alive() and len(memory.asked) == 3
    saver.wait()
    assert_saved(tmp_path / "state_step_1.pt", WEIGHTS)


@pytest.mark.parametrize("ahead", [True, False])
def test_memory_that_cannot_be_pinned_is_said_once_and_replaced(tmp_path, capsys, ahead):
    memory = Memory(most=1).opened()
    saver = Saver(tmp_path, pinned=True, allocate=memory)
    if ahead: saver.reserve(kinds_of(WEIGHTS))
    for step in (1, 2):
        saver.save(step, dict(WEIGHTS))
        saver.wait()
        assert_saved(tmp_path / f"state_step_{step}.pt", WEIGHTS)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "snapshots: no more memory" in err and "out of memory more words" in err, err
    assert [pinned for *_, pinned in memory.asked].count(True) == 2 and not saver.pinned  # not asked for again and again
    saver.reserve([((7,), torch.float32)])
    saver.wait()
    assert len(memory.asked) == 4


def test_a_copy_handed_in_is_saved_as_it_is_and_nothing_is_written_over(tmp_path, monkeypatch):
    "As the optimizers' state comes when it is collected from several ranks, tensor by tensor."
    memory, written, save = Memory().opened(), threading.Event(), ck.save_checkpoint
    saver = Saver(tmp_path, pinned=True, allocate=memory)
    monkeypatch.setattr(ck, "save_checkpoint", lambda *args: written.wait(60) and save(*args))
    now = torch.zeros(3)
    saver.save(1, {"state": saver.copy(now), "weights": torch.full((3,), 10.0)})
    now += 1
    copying = threading.Thread(target=lambda: saver.save(2, {"state": saver.copy(now), "weights": torch.full((3,), 11.0)}))
    copying.start()
    copying.join(0.2)
    assert copying.is_alive()  # the first is still being written
    written.set()
    copying.join(60)
    saver.wait()
    for step in (1, 2):
        saved = load_checkpoint(tmp_path / f"state_step_{step}.pt")
        assert saved["state"].tolist() == [step - 1] * 3 and saved["weights"].tolist() == [9.0 + step] * 3
    assert len(memory.asked) == 2  # one copy of each, used again
