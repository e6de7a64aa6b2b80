"""sample.py as its user meets it: a small checkpoint trained here, every option, and everything that can be mistyped."""
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daisy import real_run
from daisy.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from daisy.config import COMMANDS
from daisy.real_run import DEFAULT_PROMPT, TEMPLATE, bench_main, sample_main, train_main
from daisy.sft import build_sft_shards
from daisy.shards import build_corpus_shards
from daisy.tokens import encoding_from_json, encoding_from_merges, encoding_to_json, load_encoding

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
max_seq_len: 128
val_seq_len: 128
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


def random_checkpoint(checkpoint, folder):
    "The checkpoint with random weights, which never ends a text; returns its path."
    saved = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    saved["model"] = {name: 0.3 * torch.randn(w.shape, generator=generator) for name, w in saved["model"].items()}
    saved["model"]["head.weight"][encoding_from_json(saved["encoding"]).eot_token] = 0
    return str(save_checkpoint(folder, 1, saved))


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
    "300 tokens from a model that was trained on rows of 128."
    short, long = (sample("--raw", "--prompt", "D", "--seed", 0, "--max_tokens", n)[1] for n in (5, 300))
    assert long.startswith(short[:3]) and len(long) > len(short)


def test_max_seq_len_has_an_effect(sample, tmp_path, checkpoint):
    saved = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    saved["model"] = {name: 0.3 * torch.randn(w.shape, generator=generator) for name, w in saved["model"].items()}
    path = str(save_checkpoint(tmp_path, 1, saved))
    texts = {n: sample("--temperature", 0, "--max_tokens", 60, "--max_seq_len", n, path=path)[1] for n in (2, 128)}
    assert texts[2] != texts[128] == sample("--temperature", 0, "--max_tokens", 60, path=path)[1]


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
    assert out.returncode == 0 and out.stderr == "checkpoint: checkpoints/state_step_2.pt\n" and out.stdout.startswith("### Instruction:\n")


def test_a_folder_is_the_latest_checkpoint_in_it(sample, run_dir, checkpoint):
    code, out, err = sample("--seed", 1, path=str(run_dir / "checkpoints"))
    assert code == 0 and err == f"checkpoint: {checkpoint}\n" and out == sample("--seed", 1)[1]


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
    assert refused(sample(path=str(tmp_path)), f"no checkpoint in {tmp_path}", "it is a folder")
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
    ("--seed", "-1", "--seed -1 must be from 0 to 2**63 - 1; leave --seed out"), ("--num_samples", "0", "--num_samples 0"), ("--num_samples", "5000", "from 1 to 1,024"), ("--seed", str(2**70), "must be from 0 to")])
def test_a_value_out_of_range(sample, option, value, word):
    assert refused(sample(option, value), word)


@pytest.mark.parametrize("options", [("--temperature", "warm"), ("--max_tokens", "1.5"), ("--seed", "one"), ("--colour", "blue"), ("a.pt", "b.pt")], ids=str)
def test_not_understood(sample, options):
    code, out, err = sample(*options)
    assert code == 2 and out == "" and err.startswith("sample.py: ") and err.count("\n") == 1 and err.endswith("; --help lists the options\n")
    assert options[0] in err


def test_a_question_goes_behind_prompt(sample):
    assert refused(sample(path="What does os do?"), "What does os do?: there is no such file; a question goes behind --prompt")
    code, out, err = sample("What does os do?")
    assert code == 2 and out == "" and err == "sample.py: not understood: 'What does os do?'; a question goes behind --prompt; --help lists the options\n"


def test_help(capsys):
    assert sample_main(["--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--device", "--max_tokens", "--temperature", "--top_k", "--top_p", "--repetition_penalty", "--seed", "--max_seq_len", "--prompt", "--raw", "--chat", "--num_samples"):
        assert option in shown


def test_cuda_where_there_is_none(sample, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(sample("--device", "cuda"), "--device cuda needs a CUDA GPU", "set --device cpu")


# ---- standard input

def run_command(run_dir, *options, stdin):
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--max_tokens", "5", "--seed", "0", *options]
    return subprocess.run(command, cwd=run_dir, input=stdin, capture_output=True)


@pytest.mark.parametrize("stdin, options, start", [
    ("Document 5 says\n", ["--raw"], "Document 5 says"), ("Say café.\n", [], TEMPLATE.format(prompt="Say café.")),
    ("theirs", ["--raw", "--prompt", "Mine"], "Mine")])
def test_what_is_piped_in_is_the_prompt_unless_one_is_given(run_dir, stdin, options, start):
    out = run_command(run_dir, *options, stdin=stdin.encode())
    assert out.returncode == 0 and out.stderr == b"checkpoint: checkpoints/state_step_2.pt\n" and out.stdout.decode().startswith(start)


@pytest.mark.parametrize("options", [["--raw"], []])
def test_an_empty_pipe_is_no_prompt(run_dir, options):
    for nothing in (b"", b"\n"):
        out = run_command(run_dir, *options, stdin=nothing)
        assert out.returncode == 1 and out.stdout == b"" and out.stderr == b"sample.py: standard input is empty: pipe a text in, or give one with --prompt\n"


@pytest.mark.parametrize("options", [["--raw"], [], ["--chat"]])
def test_standard_input_that_is_not_utf8(run_dir, options):
    out = run_command(run_dir, *options, stdin=b"a\xff\xfeb\n")
    said = out.stderr.decode().removeprefix("checkpoint: checkpoints/state_step_2.pt\n")  # a conversation has begun by then
    assert out.returncode == 1 and out.stdout == b"" and said.count("\n") == 1 and "standard input isn't UTF-8: byte 2 is 0xff" in said


def test_a_prompt_that_is_not_utf8(run_dir):
    command = [sys.executable, ROOT / "sample.py", "--device", "cpu", "--prompt", b"caf\xe9"]
    out = subprocess.run(command, cwd=run_dir, capture_output=True, stdin=subprocess.DEVNULL)
    assert out.returncode == 1 and out.stdout == b"" and "the prompt isn't UTF-8: byte 4 is 0xe9" in out.stderr.decode()
    assert out.stderr.count(b"\n") == 1


# ---- several at once, a conversation

def test_several_samples_are_what_their_seeds_write_alone(sample):
    code, out, err = sample("--raw", "--prompt", "Document 1", "--num_samples", 3, "--seed", 5)
    assert code == 0 and err == ""
    parts = re.split(r"^--- (\d) of 3, --seed (\d+)\n", out, flags=re.M)
    assert parts[0] == "" and parts[1::3] == ["1", "2", "3"] and parts[2::3] == ["5", "6", "7"]
    for seed, text in zip((5, 6, 7), parts[3::3]):
        assert sample("--raw", "--prompt", "Document 1", "--seed", seed)[1] == text
    assert len(set(parts[3::3])) == 3
    named = re.search(r"--seed (\d+)\n(.*)\n---", sample("--raw", "--prompt", "D", "--num_samples", 2)[1], re.S)  # without a seed too
    assert sample("--raw", "--prompt", "D", "--seed", named[1])[1] == named[2] + "\n"


def test_a_conversation(run_dir):
    out = run_command(run_dir, "--chat", stdin=b"Say hello.\n\nAnd again?\n")
    assert out.returncode == 0 and out.stderr == b"checkpoint: checkpoints/state_step_2.pt\n" and b"###" not in out.stdout
    alone = run_command(run_dir, "--chat", "--prompt", "Say hello.", stdin=b"And again?\n")
    assert alone.stdout == out.stdout  # the first question from the command line is the same conversation


def test_the_second_answer_has_read_the_first_question(sample, monkeypatch, tmp_path, checkpoint):
    path = random_checkpoint(checkpoint, tmp_path)
    answers = []
    for first in ("What is 1?", "What is 2?"):
        monkeypatch.setattr(sys, "stdin", Terminal("And then?\n"))
        code, out, err = sample("--chat", "--prompt", first, "--temperature", 0, "--max_tokens", 12, path=path)
        assert code == 0 and "Traceback" not in err
        answers.append(out.split("> ")[1])
    assert answers[0] != answers[1]


def test_a_quarter_of_the_context_is_kept_free_for_an_answer(sample, monkeypatch, checkpoint):
    "And not all that --max_tokens allows: of 128 tokens two short turns fit into the other three quarters."
    asked, encoding = [], encoding_from_json(load_checkpoint(checkpoint)["encoding"])
    monkeypatch.setattr(real_run, "generate", lambda decoder, ids, *_, **__: asked.append(encoding.decode(ids)) or encoding.encode_ordinary("Yes."))
    monkeypatch.setattr(sys, "stdin", Terminal("B?\n"))
    code, out, err = sample("--chat", "--prompt", "A?", "--max_tokens", 500)
    assert code == 0 and err == "" and out.count("Yes.") == 2
    assert asked[1].removeprefix("<|endoftext|>") == TEMPLATE.format(prompt="A?") + "Yes.\n\n" + TEMPLATE.format(prompt="B?")
    monkeypatch.setattr(sys, "stdin", Terminal("B?\nC?\n"))
    assert "(the first 1 of 2 turns no longer fit" in sample("--chat", "--prompt", "A?", "--max_tokens", 500)[2]


def test_a_conversation_that_grows_too_long_forgets_its_beginning(run_dir):
    out = run_command(run_dir, "--chat", stdin=b"How long is this?\n" * 4)
    assert out.returncode == 0 and "turns no longer fit and are left out" in out.stderr.decode() and b"Traceback" not in out.stderr


@pytest.mark.parametrize("options, word", [(("--raw",), "--raw"), (("--num_samples", 2), "--num_samples")])
def test_a_conversation_takes_neither(sample, options, word):
    assert refused(sample("--chat", *options), "leave out", word)


# ---- it ends early

def interrupted(run_dir, path, *options, stdin=subprocess.DEVNULL):
    "Ctrl-C once the first bytes are there: exit code, standard output, standard error."
    command = [sys.executable, ROOT / "sample.py", path, "--device", "cpu", "--max_tokens", "500000", "--seed", "0", *options]
    process = subprocess.Popen(command, cwd=run_dir, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begin = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    return process.returncode, begin + out, err.decode()


INTERRUPTED_LOADING = """
import os, runpy, signal, sys

class Interrupting:
    "Ctrl-C when numpy, the first of the large ones, is about to be imported."
    def find_spec(self, name, path=None, target=None):
        if name == "numpy": os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
script, *sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def interrupted_while_loading(folder, script, *words):
    "The line on standard error; nothing on standard output, and code 130."
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LOADING, script, *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 130 and done.stdout == ""
    return done.stderr.strip()


@pytest.mark.parametrize("script, words, program", [
    ("sample.py", [], "sample.py"), ("sample.py", ["--chat"], "sample.py"), ("train.py", ["run.yml"], "train.py"), ("launch.py", ["--", "run.yml"], "run.sh"),
    ("build_sft_shards.py", [], "build_sft_shards.py")], ids=str)
def test_ctrl_c_while_it_loads(run_dir, script, words, program):
    assert interrupted_while_loading(run_dir, ROOT / script, ROOT / script, *words) == f"{program}: interrupted"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_an_installed_command_loads(tmp_path, command):
    (tmp_path / "start.py").write_text(f"import sys\nfrom daisy.config import run_command\nsys.argv[0] = 'bin/{command}'\nsys.exit(run_command())\n")
    assert interrupted_while_loading(tmp_path, tmp_path / "start.py", tmp_path / "start.py") == f"{command}: interrupted"


def test_ctrl_c_in_the_middle_of_a_stream(run_dir, tmp_path, checkpoint):
    code, out, err = interrupted(run_dir, random_checkpoint(checkpoint, tmp_path), "--raw", "--prompt", "D")
    assert code == 130 and err.strip() == "sample.py: interrupted" and out.startswith(b"D") and out.endswith(b"\n")


def test_ctrl_c_ends_an_answer_and_then_the_conversation_goes_on(run_dir, tmp_path, checkpoint):
    path = random_checkpoint(checkpoint, tmp_path)
    code, out, err = interrupted(run_dir, path, "--chat", "--prompt", "Hello?")
    assert code == 0 and err.strip() == "(stopped)" and len(out) >= 40  # then standard input ended


def test_the_reader_leaves(run_dir, tmp_path, checkpoint):
    "As in `python sample.py | head -c 20`."
    command = [sys.executable, ROOT / "sample.py", random_checkpoint(checkpoint, tmp_path), "--device", "cpu", "--max_tokens", "500000", "--raw", "--prompt", "D"]
    process = subprocess.Popen(command, cwd=run_dir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20), process.stdout.close()
    assert process.wait(timeout=200) != 0 and process.stderr.read() == b""


def test_a_model_that_diverges_in_the_middle(sample, tmp_path, checkpoint):
    "Its text so far stands, then one line says why there is no more."
    saved = load_checkpoint(random_checkpoint(checkpoint, tmp_path))
    encoding = encoding_from_json(saved["encoding"])
    whole = sample("--raw", "--prompt", "D", "--temperature", 0, "--max_tokens", 60, path=str(tmp_path / "state_step_1.pt"))[1]
    late = next(c for c in whole[30:] if c.isascii() and c.isprintable() and c not in whole[:30])
    saved["model"]["embed.weight"][encoding.encode_ordinary(late)[0]] = math.nan
    code, out, err = sample("--raw", "--prompt", "D", "--temperature", 0, "--max_tokens", 60, path=str(save_checkpoint(tmp_path, 2, saved)))
    assert code == 1 and err.count("\n") == 1 and "NaN or infinity" in err and len(out) > 20 and whole.startswith(out.rstrip("\n"))


def test_a_prompt_longer_than_the_context_is_answered_with_a_word_of_warning(sample):
    code, out, err = sample("--raw", "--prompt", "Document 1 says. " * 20, "--seed", 0)
    assert code == 0 and out.startswith("Document 1") and err.count("\n") == 1
    assert re.fullmatch(r"sample.py: the prompt has \d+ tokens and a layer looks back at 128: .*\n", err)


def test_a_device_that_is_no_device(sample):
    assert refused(sample("--device", "toaster"), "toaster")


def test_more_tokens_than_memory_holds(sample):
    assert refused(sample("--max_tokens", 10**15), "max_tokens")


def test_a_refused_seed_prints_no_prompt(sample):
    code, out, _ = sample("--seed", -1)
    assert code == 1 and out == ""


# ---- fine-tuning on shards that mark no responses

def fine_tune(run_dir, checkpoint, folder, capsys, *overrides):
    "Two steps from the checkpoint's weights: exit code, and the lines on standard error but for the progress bar."
    capsys.readouterr()
    code = train_main([str(run_dir / "run.yml"), f"init_checkpoint={checkpoint}", "ignore_prior_schedule=true", f"checkpoint_dir={folder / 'tuned'}", *overrides])
    return code, [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "marks" in line or line.startswith("train.py")]


def test_only_a_run_that_asks_for_responses_warns_of_shards_without_marks(run_dir, checkpoint, tmp_path, capsys):
    code, said = fine_tune(run_dir, checkpoint, tmp_path, capsys, "loss_on_prompt=false")
    assert code == 0 and said == [f"warning: {run_dir}/data/train_000.bin marks no responses, so every token teaches; build shards with build_sft_shards.py, "
                                  "or set loss_on_prompt=true"]
    for number, overrides in enumerate(([], ["loss_on_prompt=true"])):
        assert fine_tune(run_dir, checkpoint, tmp_path / str(number), capsys, *overrides) == (0, [])


def test_marked_shards_are_no_reason_to_warn(run_dir, checkpoint, tmp_path, capsys):
    rows = [json.dumps({"instruction": f"What is {i} plus {i}?", "response": f"{i} plus {i} is {2 * i}."}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    build_sft_shards([str(tmp_path / "rows.jsonl")], tmp_path / "own", load_encoding(run_dir / "data" / "encoding.json"))
    own = [f"{split}_files={tmp_path}/own/{split}_*.bin" for split in ("train", "val")]
    (tmp_path / "own" / "encoding.json").write_text((run_dir / "data" / "encoding.json").read_text())
    assert fine_tune(run_dir, checkpoint, tmp_path, capsys, "loss_on_prompt=false", *own) == (0, [])


def test_missing_shards_for_responses_name_their_builder(run_dir, checkpoint, tmp_path, capsys):
    own = [f"{split}_files={tmp_path}/own/{split}_*.bin" for split in ("train", "val")]
    code, said = fine_tune(run_dir, checkpoint, tmp_path, capsys, "loss_on_prompt=false", *own)
    assert code == 1 and said == [f"train.py: {tmp_path}/own/train_*.bin: matches no file; `python build_sft_shards.py --source SOURCE --out-dir {tmp_path}/own "
                                  f"--encoding {run_dir}/data/encoding.json` builds shards there"]


# ---- what it costs

@pytest.mark.parametrize("options", [("--batch", "1,2"), ("--batch", "1", "2"), ("--batch", "1", "2", "--uncached")], ids=str)
def test_the_decode_benchmark_adds_a_row_for_each_batch(tmp_path, options, capsys):
    command = ["decode", "config/tiny.yml", "num_layers=2", *options, "--prompt-tokens", "20", "--new-tokens", "6", "--device", "cpu"]
    assert bench_main([*command, "--out", str(tmp_path / "rows.jsonl"), "--commit", "abc"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["command"] == " ".join(["daisy-bench", *command]) and row["commit"] == "abc" and row["name"] == "tiny"
        assert (row["prompt"], row["new_tokens"], row["top_k"], row["num_layers"]) == (20, 6, 50, 2)
        assert row.get("attention") == (None if "--uncached" in options else "torch")
        assert row["tok_s"] > 0 and row["first_token_ms"] > 0 and row["how"] == ("uncached" if "--uncached" in options else "not compiled")


def test_the_decode_benchmark_measures_several_ways_and_counts_their_kernels(tmp_path, capsys):
    command = ["decode", "config/tiny.yml", "num_layers=1", "--batch", "1", "--attention", "auto", "torch", "--prompt-tokens", "8", "--new-tokens", "3",
               "--kernels", "2", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]
    assert bench_main(command) == 0
    assert [json.loads(line)["attention"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["torch", "torch"]
    lines = [line for line in capsys.readouterr().out.splitlines() if " us " in line]
    assert len(lines) == 6 and lines[0].endswith("in all") and lines[3].endswith("in all")
    assert bench_main([*command, "--attention", "triton"]) == 1 and "choose torch" in capsys.readouterr().err
