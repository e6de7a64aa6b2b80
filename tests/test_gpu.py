"""What only a GPU can show: `python -m pytest -m gpu tests` on a machine with one; attention alone is in test_gpu_attention.py.

Nearly all of the time is the compiler's: with pytest-xdist, `-n 10 --dist worksteal` keeps ten cores at it to the end.
"""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_real_run import CONFIG

from daisy.attention import explain_backend, flash_installed
from daisy.checkpoint import Saver, load_checkpoint
from daisy.config import load_config
from daisy.generate import Decoder, Replayed, Sampling, generate_batch, prefill, reading_copy
from daisy.gpt import GPT, GPTConfig, compile_gpt, cross_entropy, explain_loss_kernel, soft_cap
from daisy.loader import IGNORE, TokenLoader
from daisy.real_run import Run, prepare_data
from daisy.trainer import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROOT = Path(__file__).parent.parent


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model, inputs, targets):
    loss = model(inputs, targets)
    loss.backward()
    return loss.item(), {name.removeprefix("model."): p.grad.clone() for name, p in model.named_parameters()}


ALL = dict(smear=True, backout=True, attention_gate=True, value_layers="0 1 -1", rope_fraction=0.5)


def awake(model, seed=0):
    "Give random numbers to all that starts at zero or one."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2: p.add_(0.3 * torch.randn(p.shape, generator=generator))
            elif not p.any(): p.normal_(std=p.size(1) ** -0.5, generator=generator)
    return model


def two_models(tokens, window, how, **settings):
    "The same random weights twice: one computes in float32, with dense masks and uncompiled, the other as a run on a GPU does."
    extras = {name: settings.pop(name) for name in list(settings) if name not in ("backend", "compute_dtype")}
    config = GPTConfig(**dict(vocab_size=500, num_layers=4, num_heads=2, head_dim=128, model_dim=256, max_seq_len=tokens, eos_token_id=0,
                              window_short=window, depth_skips=True) | extras)
    plain, fast = GPT(config), GPT(config, **settings)
    fast.load_state_dict(awake(plain).state_dict())
    return plain.cuda(), compile_gpt(fast.cuda(), how)


def batch_of(tokens, seed):
    ids = torch.randint(0, 500, (2, tokens + 1), generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


CHEAP, FULL = dict(activation_checkpointing="cheap"), dict(activation_checkpointing="full")
ROWS = dict(document_mask=False)  # flash in its fixed-length form
WAYS = [("layers", ROWS), ("layers", ALL), ("layers", CHEAP), ("layers", FULL), ("full", {}), ("full", CHEAP | ROWS)]  # each takes seconds to compile
flash = pytest.param("flash", marks=pytest.mark.skipif(not flash_installed(), reason="needs flash-attn-4"))


@pytest.mark.parametrize("how,tokens,window,extras", [
    ("layers", 2048, 512, {}), ("layers", 640, 100, ALL), ("layers", 640, 100, dict(long_every=2)),
    ("layers", 256, 64, CHEAP), ("layers", 256, 64, dict(FULL, tie_head=True)), ("full", 256, 64, ROWS), ("full", 640, 100, ALL)], ids=str)
def test_compiled_model_agrees_with_the_plain_one(how, tokens, window, extras, tolerance=1e-3):
    "Loss and every gradient in float32, over several batches: a mask built wrongly shows most in the gradients."
    torch._dynamo.reset()
    plain, fast = two_models(tokens, window, how, backend="flex", **extras)
    for seed in range(2):
        inputs, targets = batch_of(tokens, seed)
        (loss, wanted), (fast_loss, got) = (gradients(m, inputs, targets) for m in (plain, fast))
        assert abs(loss - fast_loss) < tolerance * loss
        for name in wanted:
            assert relative(got[name], wanted[name]) < tolerance or wanted[name].norm() < 1e-6, f"{name}, batch {seed}"
        plain.zero_grad(), fast.zero_grad()


@pytest.mark.parametrize("backend", ["flex", flash])
@pytest.mark.parametrize("how,extras", WAYS, ids=str)
def test_in_bfloat16_loss_and_gradients_come_near_float32_and_a_window_schedule_compiles_nothing_again(backend, how, extras):
    "Both of one compiled model, since what takes time is to compile it."
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    plain, fast = two_models(1024, 256, how, backend=backend, compute_dtype=torch.bfloat16, **extras)
    inputs, targets = batch_of(1024, 0)
    (loss, wanted), (fast_loss, got) = (gradients(m, inputs, targets) for m in (plain, fast))
    assert abs(loss - fast_loss) < 2e-3 * loss
    assert {g.dtype for g in got.values()} == {torch.float32}
    together = [torch.cat([gradients[name].flatten() for name in wanted]) for gradients in (got, wanted)]
    assert relative(*together) < 5e-2

    seen = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    for seed, fraction in enumerate((0.25, 0.25, 0.5, 0.75, 1.0)):
        fast.model.set_window_fraction(fraction)
        fast(*batch_of(1024, seed)).backward()
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(seen)) == 1 and seen[0] >= 1 and (how == "layers" or seen[0] == 1), seen


@pytest.mark.parametrize("loss_kernel,compiled,cap", [("torch", True, 15.0), ("triton", False, 15.0), ("triton", True, 15.0), ("triton", True, 0.0)])
def test_the_loss_in_chunks_agrees_with_float32(loss_kernel, compiled, cap):
    generator = torch.Generator("cuda").manual_seed(0)
    x, head = (torch.randn(*shape, generator=generator, device="cuda") for shape in ((5000, 256), (50_304, 256)))
    targets = torch.randint(0, 50_257, (5000,), generator=generator, device="cuda")
    targets[::7] = IGNORE
    x, head = x.bfloat16(), (0.05 * head).bfloat16()
    ours = partial(cross_entropy, loss_kernel=loss_kernel)
    loss_of = torch.compile(lambda *given: ours(*given), fullgraph=True) if compiled else ours

    def run(x, head, function, chunk_tokens):
        x, head = x.requires_grad_(), head.requires_grad_()
        loss = function(x, head, targets, cap, 50_257, chunk_tokens)
        return loss.detach(), *torch.autograd.grad(3 * loss, (x, head))

    def naive(x, head, targets, cap, vocab_size, chunk_tokens):
        return torch.nn.functional.cross_entropy(soft_cap((x @ head.T)[:, :vocab_size], cap), targets, ignore_index=IGNORE)

    expected = run(x.double(), head.double(), naive, 0)
    loss, *grads = run(x.clone(), head.float(), loss_of, 2048)  # 5,000 tokens: two whole chunks and a part
    assert abs(loss - expected[0]) < 1e-3 * expected[0] and not grads[1][50_257:].any()
    for got, wanted in zip(grads, expected[1:]):
        assert relative(got, wanted) < 1e-2


def test_tiny_config_trains_on_the_gpu(tmp_path):
    "As a user would; the shards may be given in DAISY_TEST_SHARDS where the machine has no documentation to build them from."
    shards = os.environ.get("DAISY_TEST_SHARDS")
    files = [f"train_files={shards}/train_*.bin", f"val_files={shards}/val_*.bin"] if shards else [
        f"train_files={tmp_path}/data/train_*.bin", f"val_files={tmp_path}/data/val_*.bin"]
    if not shards:
        subprocess.run([sys.executable, "-c", "import sys; from daisy.shards import main; sys.exit(main())", "python_docs",
                        str(tmp_path / "data"), "--vocab-size", "2048", "--quiet"], check=True, cwd=ROOT)
    run = subprocess.run([sys.executable, "train.py", "config/tiny.yml", "num_iterations=30", "val_loss_every=15", *files,
                          f"checkpoint_dir={tmp_path}/checkpoints"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"attention {explain_backend('auto', torch.device('cuda'))}, compiled by layers" in run.stdout
    assert f"loss {explain_loss_kernel('auto', torch.device('cuda'), 15.0)}" in run.stdout
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 1.5
    sample = subprocess.run([sys.executable, "sample.py", str(tmp_path / "checkpoints" / "state_step_30.pt"), "--raw", "--prompt", "The ",
                             "--max_tokens", "20", "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert sample.returncode == 0 and len(sample.stdout) > 10, sample.stderr


# training without waiting

def toy_run(folder, *changes):
    "A small run on the GPU, with shards of its own."
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(f"{n} times {number} is {n * number}." for n in range(200)))
    (folder / "toy.yml").write_text(CONFIG.format(here=folder))
    config = load_config(folder / "toy.yml", ["device=cuda", "head_dim=64", "model_dim=128", f"checkpoint_dir={folder}/run", "sample_tokens=0", *changes])
    prepare_data(config)
    return Run(config)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("attention, how", [("sdpa", "false"), ("auto", "layers")])
def test_a_step_never_waits_for_the_gpu(tmp_path, attention, how, optimizer):
    "Nothing is read back and no copy waited for: torch is told to make an error of it. 4,096 tokens, so that tables get their gradients sorted."
    run = toy_run(tmp_path, f"attention={attention}", f"compile={how}", f"optimizer={optimizer}", "global_batch_size=128", "device_batch_size=64", "grad_clip=1")
    loader = TokenLoader(run.train_files, run.rows, run.config.max_seq_len, eos_id=run.eos_id, device=run.device, prefetch=run.accumulation)
    trainer = run._trainer(loader, Progress())
    assert run.accumulation == 2
    for _ in range(3): trainer.train_step()  # compiles, and counts documents where the kernel wants to know
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"): torch.ones(1, device="cuda").item()  # so it would notice
        steps = [trainer.train_step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()
    torch.cuda.synchronize()
    assert all(step.values.isfinite().all() and step.values.is_pinned() for step in steps)


def test_room_for_snapshots_is_pinned_and_made_once(tmp_path):
    weights = {str(i): torch.randn(1000, 1000, device="cuda") for i in range(8)} | {"on the CPU": torch.arange(3)}
    saver = Saver(tmp_path, pinned=True)
    saver.reserve([(w.shape, w.dtype) for w in weights.values()])
    saver.wait()
    room = {copy.data_ptr() for copies in saver.room.values() for copy in copies}
    assert len(room) == 9 and all(copy.is_pinned() for copies in saver.room.values() for copy in copies)
    for step in (1, 2):
        expected = {name: w.cpu().clone() for name, w in weights.items()}
        path = saver.save(step, dict(weights))
        for w in weights.values(): w.add_(1)  # at once
        saver.wait()
        saved = load_checkpoint(path)
        assert all(torch.equal(saved[name], w) for name, w in expected.items())
        assert {copy.data_ptr() for copies in saver.room.values() for copy in copies} == room


def test_a_run_makes_room_for_its_snapshots_behind_its_first_step(tmp_path):
    run, asked = toy_run(tmp_path, "attention=sdpa", "compile=false", "num_iterations=6", "val_loss_every=3"), []
    allocate, run.saver.allocate = run.saver.allocate, lambda *how: (asked.append(how), allocate(*how))[1]
    room = []
    make_room, run._make_room = run._make_room, lambda: (make_room(), room.append((len(asked), len(run._saved_kinds()))))
    run.fit(Progress())
    (before, kinds), = room
    assert before <= kinds <= len(asked) <= kinds + 3 and all(pinned for *_, pinned in asked)  # and the states of the random generators
    saved = load_checkpoint(tmp_path / "run" / "state_step_6.pt")
    for name, w in run.model.state_dict().items(): assert torch.equal(saved["model"][name], w.cpu())


# decoding: recorded steps

def writer(dtype=torch.float32, **extras):
    "A model whose windows end long before the texts below do."
    shape = dict(vocab_size=500, num_layers=4, num_heads=2, head_dim=128, model_dim=256, max_seq_len=96, eos_token_id=0, window_short=40)
    return awake(GPT(GPTConfig(**shape | extras), compute_dtype=dtype)).cuda().eval()


PROMPTS = [[0, 5, 6], list(range(1, 150)), [7, 0, 9] * 11]


@pytest.mark.parametrize("attention", ["torch", "triton"])
@pytest.mark.parametrize("compiled", ["false", "layers", "full"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("extras", [{}, dict(ALL, depth_skips=True, num_kv_heads=1), dict(long_every=2, max_seq_len=300)], ids=str)
def test_recorded_steps_write_what_eager_ones_write(attention, compiled, rows, extras):
    "200 tokens, past every window; the recorded batch is used three times: as it is, recorded, replayed."
    torch._dynamo.reset()
    model, sampling = writer(**extras), Sampling(0.9, 20, 0.95, 1.1)
    expected = generate_batch(Decoder(model, graphs=False, attention="torch"), PROMPTS[:rows], 200, sampling, seed=3)
    decoder = Decoder(model, compiled, attention=attention)
    for _ in range(3):
        assert generate_batch(decoder, PROMPTS[:rows], 200, sampling, seed=3) == expected
    assert generate_batch(decoder, PROMPTS[:rows], 200, sampling, seed=4) != expected


def test_no_more_than_one_recording_a_shape():
    recorded = []

    def record(work):
        from daisy.generate import record
        recorded.append(work)
        return record(work)

    decoder = Decoder(writer(), record=record)
    for seed in range(4):
        for prompt in PROMPTS[:2]:  # 3 and 149 tokens: two widths, one capacity
            generate_batch(decoder, [prompt], 60, seed=seed)
    assert len(recorded) == 3  # two widths of prompts to read, one step


@torch.no_grad()
def recorded_logits(model, text, counts, compiled, attention):
    "Logits (B, T - 20, V) at places 20 to T of rows of a text, whose first `counts` (B,) of 20 tokens are read as prompts of different lengths."
    B, T = text.shape
    cache, token, logits = model.new_cache(B, T), text[:, :1].clone(), torch.zeros(B, model.config.vocab_size, device="cuda")
    cache.attend_by(attention)
    step = lambda: logits.copy_(model._finish(model.read(token, cache), None)[:, -1])
    prefill(model, text[:, :20], cache, counts)
    cache.length = None
    replayed, seen = Replayed(torch.compile(step, fullgraph=True, dynamic=False) if compiled else step), []
    for t in range(T - 20):
        token.copy_(text.gather(1, (counts + t)[:, None]))
        replayed()
        seen.append(logits.clone())
    assert attention == "torch" or not cache.arrived.any()
    return torch.stack(seen, dim=1)


LENGTHS = [20, 1, 13]


def expected_logits(model, text):
    with torch.no_grad():
        full = model(text)
    return torch.stack([row[count:count + text.size(1) - 20] for row, count in zip(full, LENGTHS)])


@pytest.mark.parametrize("attention", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("extras", [{}, dict(ALL, depth_skips=True, num_kv_heads=1), dict(long_every=2, max_seq_len=300), dict(head_dim=64, num_heads=4, qk_norm=False)], ids=str)
def test_recorded_logits_are_those_of_a_full_pass(attention, compiled, extras):
    "In float32, 300 steps past every window, for rows that are at different places; documents begin in them."
    torch._dynamo.reset()
    model = writer(**extras)
    text = torch.randint(0, 250, (3, 320), generator=torch.Generator().manual_seed(0)).cuda()  # token 0 begins one now and then
    got = recorded_logits(model, text, torch.tensor(LENGTHS, device="cuda"), compiled, attention)
    assert relative(got, expected_logits(model, text)) < 1e-4


@pytest.mark.parametrize("attention", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_in_bfloat16_the_recorded_step_comes_near_float32(attention, compiled):
    "Logits at each place of a given text, past every window."
    torch._dynamo.reset()
    text = torch.randint(1, 500, (3, 160), generator=torch.Generator().manual_seed(0)).cuda()
    got = recorded_logits(reading_copy(writer(torch.bfloat16)), text, torch.tensor(LENGTHS, device="cuda"), compiled, attention)
    assert relative(got, expected_logits(writer(), text)) < 2e-2
