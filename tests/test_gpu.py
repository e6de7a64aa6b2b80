"""What only a GPU can show: `python -m pytest -m gpu tests` on a machine with one; attention alone is in test_gpu_attention.py."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daisy.attention import auto_backend
from daisy.gpt import GPT, GPTConfig, compile_gpt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROOT = Path(__file__).parent.parent


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model, inputs, targets):
    loss = model(inputs, targets)
    loss.backward()
    return loss.item(), {name.removeprefix("model."): p.grad.clone() for name, p in model.named_parameters()}


def two_models(tokens, window, backend):
    "The same random weights twice: one computes with dense masks and isn't compiled, the other as a run on a GPU does."
    config = GPTConfig(vocab_size=500, num_layers=4, num_heads=2, head_dim=128, model_dim=256, max_seq_len=tokens, eos_token_id=0,
                       window_short=window, depth_skips=True)
    plain, fast = GPT(config), GPT(config, backend=backend)
    for name, p in plain.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if p.ndim == 2 and ".attn." not in name else 0.1)
    fast.load_state_dict(plain.state_dict())
    return plain.cuda(), compile_gpt(fast.cuda())


@pytest.mark.parametrize("tokens,window", [(256, 64), (2048, 512)])
def test_compiled_model_agrees_with_the_plain_one(tokens, window, tolerance=1e-3):
    "Loss and every gradient in float32, over several batches: a mask built wrongly shows most in the gradients."
    torch._dynamo.reset()
    plain, fast = two_models(tokens, window, "flex")
    for seed in range(2):
        generator = torch.Generator("cuda").manual_seed(seed)
        ids = torch.randint(0, 500, (2, tokens + 1), generator=generator, device="cuda")
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        (loss, wanted), (fast_loss, got) = (gradients(m, inputs, targets) for m in (plain, fast))
        assert abs(loss - fast_loss) < tolerance * loss
        for name in wanted:
            assert relative(got[name], wanted[name]) < tolerance, f"{name}, batch {seed}"
        plain.zero_grad(), fast.zero_grad()


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
    assert f"attention {auto_backend(torch.device('cuda'))}, compiled by layers" in run.stdout
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 1.5
    sample = subprocess.run([sys.executable, "sample.py", str(tmp_path / "checkpoints" / "state_step_30.pt"), "--raw", "--prompt", "The ",
                             "--max_tokens", "20", "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert sample.returncode == 0 and len(sample.stdout) > 10, sample.stderr
