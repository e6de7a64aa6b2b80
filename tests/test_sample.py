"""sample.py as its user meets it: a small checkpoint trained here, every option, and everything that can be mistyped."""
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daisy.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from daisy.real_run import DEFAULT_PROMPT, TEMPLATE, sample_main, train_main
from daisy.shards import build_corpus_shards
from daisy.tokens import encoding_from_json, encoding_from_merges, encoding_to_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    "A folder in which a model of 257 tokens was trained for two steps: data/, run.yml, checkpoints/."
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} says that {i} plus {i} is {2 * i}. " * 8)
    build_corpus_shards(str(folder / "text"), folder / "data", vocab_size=257)
    (folder / "run.yml").write_text(f"""
train_files: {folder}/data/train_*.bin
val_files: {folder}/data/val_*.bin
vocab_size: 257
num_layers: 2
num_heads: 2
head_dim: 8
model_dim: 16
window_short: 8
num_iterations: 2
global_batch_size: 2
max_seq_len: 32
val_seq_len: 32
device: cpu
sample_tokens: 0
checkpoint_dir: {folder}/checkpoints
""")
    assert train_main([str(folder / "run.yml")]) == 0
    return folder


@pytest.fixture(scope="session")
def checkpoint(run_dir):
    return str(latest_checkpoint(run_dir / "checkpoints"))


class Terminal(io.StringIO):
    "A standard input that nothing is piped into."
    def isatty(self):
        return True


@pytest.fixture
def sample(capsys, checkpoint, monkeypatch):
    "Run the command in this process on the checkpoint: exit code, what it printed, what it complained of."
    monkeypatch.setattr(sys, "stdin", Terminal())

    def run(*options, path=checkpoint):
        capsys.readouterr()
        code = sample_main([*([path] if path else []), "--device", "cpu", "--max_tokens", "20", *map(str, options)])
        out, err = capsys.readouterr()
        return code, out, err
    return run


def refused(result, *words):
    "One line on stderr that says all of `words`, and exit code 1."
    code, _, err = result
    assert code == 1 and err.startswith("sample.py: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    return True


# ---- what it writes

def test_the_prompt_stands_in_the_template(sample):
    code, out, err = sample("--prompt", "Say hello.", "--seed", 0)
    assert code == 0 and err == "" and out.startswith(TEMPLATE.format(prompt="Say hello."))
    assert len(out) > len(TEMPLATE.format(prompt="Say hello.")) + 1


def test_the_default_prompt(sample):
    code, out, _ = sample()
    assert code == 0 and out.startswith(TEMPLATE.format(prompt=DEFAULT_PROMPT))


def test_raw_has_no_template(sample):
    code, out, _ = sample("--raw", "--prompt", "Document 3 says", "--seed", 0)
    assert code == 0 and out.startswith("Document 3 says") and "###" not in out.split("\n")[0]


def test_a_template_in_the_prompt_is_text(sample):
    assert sample("--prompt", "{prompt} {x}", "--seed", 0)[1].startswith(TEMPLATE.format(prompt="{prompt} {x}"))


def test_an_empty_prompt(sample):
    for empty in ("", "  \n"):
        assert refused(sample("--prompt", empty), "the prompt is empty", "--raw")
    assert sample("--raw", "--prompt", "", "--seed", 0)[0] == 0  # a document from its start


def test_special_tokens_and_odd_signs_are_text(sample):
    for prompt in ("<|endoftext|>", "café 🌼 \u200b", "\x00", "  "):
        code, out, _ = sample("--raw", "--prompt", prompt, "--seed", 0)
        assert code == 0 and out.startswith(prompt)


def test_the_same_seed_writes_the_same_text(sample):
    first, again, other = sample("--seed", 1), sample("--seed", 1), sample("--seed", 2)
    assert first == again and first[1] != other[1]


def test_temperature_zero_needs_no_seed(sample):
    assert sample("--temperature", 0) == sample("--temperature", 0, "--seed", 5) == sample("--top_k", 1)


def test_top_p_near_zero_and_top_k_beyond_the_vocabulary(sample):
    assert sample("--top_p", 1e-9)[1] == sample("--temperature", 0)[1]
    assert sample("--top_k", 10**6, "--seed", 3)[1] == sample("--top_k", 0, "--seed", 3)[1]


def test_max_tokens_is_obeyed_past_the_context(sample):
    "100 tokens from a model that was trained on rows of 32."
    short, long = (sample("--raw", "--prompt", "D", "--seed", 0, "--max_tokens", n)[1] for n in (5, 100))
    assert long.startswith(short[:3]) and len(long) > len(short)


def test_max_seq_len_has_an_effect(sample, tmp_path, checkpoint):
    saved = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    saved["model"] = {name: 0.3 * torch.randn(w.shape, generator=generator) for name, w in saved["model"].items()}
    path = str(save_checkpoint(tmp_path, 1, saved))
    texts = {n: sample("--temperature", 0, "--max_tokens", 60, "--max_seq_len", n, path=path)[1] for n in (2, 32)}
    assert texts[2] != texts[32] == sample("--temperature", 0, "--max_tokens", 60, path=path)[1]


def test_it_stops_where_the_document_ends(sample, tmp_path, checkpoint):
    saved = load_checkpoint(checkpoint)
    saved["model"]["head.weight"] = torch.zeros_like(saved["model"]["head.weight"])  # all tokens alike: argmax takes the first
    encoding = encoding_from_json(saved["encoding"])
    out = sample("--raw", "--prompt", "Hi", "--temperature", 0, path=str(save_checkpoint(tmp_path, 1, saved)))[1]
    assert out == "Hi" + encoding.decode([0]) * 20 + "\n"
    many = sample("--raw", "--prompt", "Hi", "--temperature", 100, "--top_k", 0, "--max_tokens", 2000, "--seed", 0, path=str(tmp_path / "state_step_1.pt"))[1]
    assert "<|endoftext|>" not in many


# ---- which checkpoint

def test_bare_takes_the_latest(run_dir, checkpoint):
    out = subprocess.run([sys.executable, ROOT / "sample.py"], cwd=run_dir, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert out.returncode == 0 and out.stderr == "" and out.stdout.startswith("### Instruction:\n")


def test_bare_without_a_checkpoint_says_how_to_make_one(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(sample(path=None), "./run.sh config/tiny.yml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 torn", b"\x80\x04pickle"])
def test_not_a_checkpoint(sample, tmp_path, content):
    path = tmp_path / "state_step_7.pt"
    path.write_bytes(content)
    assert refused(sample(path=str(path)), str(path), "not a usable checkpoint")


def test_missing_file_folder_and_foreign_checkpoint(sample, tmp_path):
    assert refused(sample(path=str(tmp_path / "no.pt")), "there is no such file")
    assert refused(sample(path=str(tmp_path)), "it is a folder")
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    assert refused(sample(path=str(tmp_path / "other.pt")), "daisy didn't write it")


def test_a_diverged_model(sample, tmp_path, checkpoint):
    saved = load_checkpoint(checkpoint)
    saved["model"]["blocks.0.mlp.up.weight"].fill_(math.nan)
    assert refused(sample(path=str(save_checkpoint(tmp_path, 3, saved))), "NaN or infinity")


def test_an_encoding_of_another_vocabulary(sample, tmp_path, checkpoint):
    merges = [(104, 101), (256, 108), (257, 108), (258, 111)] + [(104, i) for i in range(110, 130)]
    saved = load_checkpoint(checkpoint)
    saved["encoding"] = encoding_to_json(encoding_from_merges(merges, "larger"))
    assert refused(sample(path=str(save_checkpoint(tmp_path, 4, saved))), "vocabulary of 257")


# ---- what can be mistyped

@pytest.mark.parametrize("option, value, word", [
    ("--temperature", "-1", "temperature -1.0"), ("--temperature", "nan", "temperature nan"), ("--top_p", "0", "top_p 0.0"),
    ("--top_p", "1.5", "top_p 1.5"), ("--top_k", "-1", "top_k -1"), ("--repetition_penalty", "0", "repetition_penalty 0.0"),
    ("--max_tokens", "0", "--max_tokens 0"), ("--max_tokens", "-3", "--max_tokens -3"), ("--max_seq_len", "0", "--max_seq_len 0"),
    ("--seed", "-1", "seed -1"), ("--seed", str(2**70), "must be from 0 to")])
def test_a_value_out_of_range(sample, option, value, word):
    assert refused(sample(option, value), word)


@pytest.mark.parametrize("options", [("--temperature", "warm"), ("--max_tokens", "1.5"), ("--seed", "one"), ("--colour", "blue"), ("a.pt", "b.pt")])
def test_not_understood(sample, options):
    code, out, err = sample(*options)
    assert code == 2 and out == "" and "usage: sample.py" in err and "Traceback" not in err


def test_help(capsys):
    assert sample_main(["--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--device", "--max_tokens", "--temperature", "--top_k", "--top_p", "--repetition_penalty", "--seed", "--max_seq_len", "--prompt", "--raw"):
        assert option in shown


def test_cuda_where_there_is_none(sample, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(sample("--device", "cuda"), "needs a CUDA GPU")


# ---- standard input

def run_command(run_dir, *options, stdin):
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--max_tokens", "5", "--seed", "0", *options]
    return subprocess.run(command, cwd=run_dir, input=stdin, capture_output=True)


@pytest.mark.parametrize("stdin, options, start", [
    ("Document 5 says\n", ["--raw"], "Document 5 says"), ("Say café.\n", [], TEMPLATE.format(prompt="Say café.")),
    ("", [], TEMPLATE.format(prompt=DEFAULT_PROMPT)), ("theirs", ["--raw", "--prompt", "Mine"], "Mine")])
def test_what_is_piped_in_is_the_prompt_unless_one_is_given(run_dir, stdin, options, start):
    out = run_command(run_dir, *options, stdin=stdin.encode())
    assert out.returncode == 0 and out.stderr == b"" and out.stdout.decode().startswith(start)


def test_standard_input_that_is_not_utf8(run_dir):
    out = run_command(run_dir, "--raw", stdin=b"a\xff\xfeb")
    assert out.returncode == 0 and out.stdout.decode().startswith("a\ufffd\ufffdb")


# ---- still to come in sample_main: remove the mark when it does



def test_a_device_that_is_no_device(sample):
    assert refused(sample("--device", "toaster"), "toaster")


def test_more_tokens_than_memory_holds(sample):
    assert refused(sample("--max_tokens", 10**15), "max_tokens")


def test_a_refused_seed_prints_no_prompt(sample):
    code, out, _ = sample("--seed", -1)
    assert code == 1 and out == ""
