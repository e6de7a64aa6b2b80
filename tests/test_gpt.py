"""The GPT over random shapes and switches: what must hold whatever the config, beyond the cases that lesson 09 shows."""
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import daisy.gpt
from daisy.block import MLP
from daisy.gpt import (
    HAS_TRITON, GPT, GPTConfig, choose_loss_kernel, compile_gpt, count_parameters, cross_entropy, explain_loss_kernel, flops_per_token, soft_cap)
from daisy.loader import IGNORE

V, EOS = 50, 0
SWITCHES = ("value_embeds", "residual_gates", "x0_gates", "depth_skips", "smear", "backout", "attention_gate", "qk_norm", "tie_head")
OFF = dict(value_embeds=False, residual_gates=False, x0_gates=False, depth_skips=False, logit_softcap=0.0)
ALL = dict(depth_skips=True, smear=True, backout=True, attention_gate=True)
SHAPE = dict(vocab_size=V, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, model_dim=24, max_seq_len=16, eos_token_id=EOS)


@st.composite
def configs(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 0), (4, 2), (4, 1), (3, 3)]))
    return GPTConfig(
        vocab_size=V, num_layers=draw(st.integers(1, 5)), num_heads=heads, num_kv_heads=kv_heads, head_dim=draw(st.sampled_from([2, 8])),
        model_dim=draw(st.sampled_from([8, 40])), max_seq_len=draw(st.sampled_from([1, 7, 16])), eos_token_id=EOS,
        window_short=draw(st.sampled_from([0, 1, 3, 99])), window_long=draw(st.sampled_from([0, 5, 99])),
        window_pattern=draw(st.sampled_from(["SSSL", "L", "SL"])), logit_softcap=draw(st.sampled_from([0.0, 15.0])),
        rope_fraction=draw(st.sampled_from([1.0, 0.5])), long_every=draw(st.sampled_from([0, 2])),
        value_layers=draw(st.sampled_from(["", "0", "-1 0"])), activation_checkpointing=draw(st.sampled_from(["none", "cheap", "full"])),
        **{name: draw(st.booleans()) for name in SWITCHES})


def awake(config, seed=0, **kwargs):
    "A model whose zeros and ones have been replaced, so that every part says something."
    model, generator = GPT(config, **kwargs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2: p.add_(0.3 * torch.randn(p.shape, generator=generator))
            elif not p.any(): p.normal_(std=p.size(1) ** -0.5, generator=generator)
    return model


def tokens_like(B, T, seed=0, low=0):
    return torch.randint(low, V, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same(a, b, tolerance=1e-5):
    difference = (a - b).norm() / b.norm()
    assert a.shape == b.shape and difference < tolerance, difference.item()


# the switches

@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(1, 24))
def test_the_first_loss_is_ln_v(config, T):
    tokens = tokens_like(2, T)
    loss = GPT(config)(tokens, tokens_like(2, T, seed=1)).item()
    assert abs(loss - math.log(V)) < (1.2 if config.tie_head else 1e-5)


@pytest.mark.parametrize("switch", ["residual_gates", "x0_gates", "depth_skips", "smear", "backout", "attention_gate"])
@pytest.mark.parametrize("others", [False, True])
def test_a_gate_at_its_start_is_the_network_without_it(switch, others):
    base = {**SHAPE, **dict.fromkeys(SWITCHES[:7], others)}
    without = awake(GPTConfig(**{**base, switch: False}))
    with_gate = GPT(GPTConfig(**{**base, switch: True}))  # its gates as they start
    assert with_gate.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert torch.equal(with_gate(tokens_like(2, 11)), without(tokens_like(2, 11)))


def test_silent_value_embeddings_are_the_network_without_them():
    without = awake(GPTConfig(**{**SHAPE, "value_embeds": False}))
    model = awake(GPTConfig(**SHAPE))
    model.load_state_dict(without.state_dict(), strict=False)
    with torch.no_grad():
        for table in model.value_embeds.values(): table.weight.zero_()
    assert torch.equal(model(tokens_like(2, 11)), without(tokens_like(2, 11)))


@settings(max_examples=20, deadline=None)
@given(configs())
def test_what_is_off_leaves_no_parameter(config):
    names = " ".join(name for name, _ in GPT(config).named_parameters())
    for key, words in dict(value_embeds="value_", residual_gates="residual_gates", x0_gates="x0_gates", smear="smear", backout="backout",
                           attention_gate="attention_gate").items():
        assert (words in names) == getattr(config, key)
    assert ("skip_gates" in names) == config.depth_skips and ("head.weight" in names) != config.tie_head


@pytest.mark.parametrize("num_layers", [2, 3, 5])
@pytest.mark.parametrize("extras", [OFF, ALL, dict(ALL, tie_head=True, qk_norm=False)], ids=["plain", "all", "tied, no QK-norm"])
def test_once_awake_every_parameter_gets_a_gradient(num_layers, extras):
    model = awake(GPTConfig(**{**SHAPE, "num_layers": num_layers, **extras}))
    model(tokens_like(3, 9, low=1), tokens_like(3, 9, seed=1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


# who sees what

@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 24), st.data())
def test_the_future_changes_nothing(config, T, data):
    model, tokens = awake(config), tokens_like(2, T)
    t = data.draw(st.integers(0, T - 1))
    changed = tokens.clone()
    changed[:, t:] = tokens_like(2, T - t, seed=7)
    with torch.no_grad():
        assert torch.equal(model(changed)[:, :t], model(tokens)[:, :t])


@settings(max_examples=30, deadline=None)
@given(configs(), st.integers(1, 12), st.integers(1, 12))
def test_a_document_is_read_as_if_it_stood_alone(config, before, length):
    model = awake(config)
    document = torch.cat([torch.tensor([[EOS]]), tokens_like(1, length, low=1)], dim=1)
    row = torch.cat([tokens_like(1, before, seed=3), document], dim=1)
    with torch.no_grad():  # only differences of positions count, so it doesn't matter where the document begins
        assert_same(model(row)[:, before:], model(document), 1e-4)


@settings(max_examples=10, deadline=None)
@given(configs())
def test_rows_of_a_batch_are_strangers(config):
    model, tokens = awake(config), tokens_like(3, 10)
    with torch.no_grad():
        assert_same(model(tokens)[1:2], model(tokens[1:2]))


@settings(max_examples=60, deadline=None)
@given(configs(), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 2))
def test_the_cached_path_equals_the_full_forward(config, pieces, B):
    model, tokens = awake(config), tokens_like(B, sum(pieces))  # longer than max_seq_len, with documents inside
    cache = model.new_cache(B, sum(pieces))
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        assert_same(cached, model(tokens))
    assert cache.length == sum(pieces)


def test_a_full_cache_says_what_to_do():
    model = GPT(GPTConfig(**SHAPE))
    with pytest.raises(ValueError, match=r"6 tokens don't fit a cache of 5: make it with new_cache\(batch_size, 6\)"):
        model(tokens_like(1, 6), cache=model.new_cache(1, 5))


# lengths and windows

@pytest.mark.parametrize("T", [1, 2, 13, 127])
@pytest.mark.parametrize("extras", [{}, OFF, dict(ALL, tie_head=True)], ids=["default", "plain", "all, tied"])
def test_odd_lengths_and_backends_agree(T, extras):
    config = GPTConfig(**{**SHAPE, **extras})
    tokens, outputs = tokens_like(2, T), {}
    for backend in ("sdpa", "reference"):
        model = awake(config, backend=backend)
        loss = model(tokens, tokens_like(2, T, seed=1))
        loss.backward()
        outputs[backend] = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    assert_same(outputs["sdpa"], outputs["reference"])


def test_a_window_longer_than_the_row_is_no_window():
    tokens = tokens_like(2, 16)
    models = [awake(GPTConfig(**SHAPE, window_short=w, window_long=w)) for w in (0, 16, 1000)]
    assert torch.equal(models[0](tokens), models[1](tokens)) and torch.equal(models[0](tokens), models[2](tokens))


def test_rows_longer_than_in_training_keep_the_windows_of_training():
    model = awake(GPTConfig(**{**SHAPE, "num_layers": 1}))  # one layer that sees max_seq_len = 16 keys
    tokens = tokens_like(1, 70, low=1)
    with torch.no_grad():
        logits = model(tokens)
        changed = tokens.clone()
        changed[0, 40] = tokens[0, 40] % (V - 1) + 1
        moved = (model(changed) != logits).any(-1)[0].nonzero().flatten().tolist()
        assert moved[0] == 40 and moved[-1] == 40 + 15
        assert_same(model(tokens[:, :9]), logits[:, :9])
    assert model.rope_cos.dtype == torch.float32 and "rope_cos" not in model.state_dict()


# the head and the loss

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from([0.0, 1.0, 15.0]), st.integers(0, 100), st.integers(0, 5),
       st.sampled_from([1.0, -0.25, 3.0]))
def test_chunks_change_neither_loss_nor_gradients(N, chunk_tokens, cap, seed, ignored, upstream):
    generator = torch.Generator().manual_seed(seed)
    x, head = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (N, 64))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:ignored] = IGNORE
    expected = F.cross_entropy(soft_cap(x @ head.T, cap)[:, :V], targets, ignore_index=IGNORE, reduction="sum") / max(N - ignored, 1)
    loss = cross_entropy(x, head, targets, cap, V, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(upstream * loss, (x, head)), torch.autograd.grad(upstream * expected, (x, head))):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(x, head, targets, cap, V, chunk_tokens=chunk_tokens), expected)


KERNEL = """
import torch, triton, triton.language
import daisy.gpt as gpt
gpt.tl = triton.language  # the interpreter looks for it among the module's names
gpt.LOSS_BLOCK = 64
generator = torch.Generator().manual_seed(0)
for cap in (0.0, 15.0, 40.0):
    for vocab_size, width in ((257, 320), (64, 64), (500, 512)):  # padded or not, and blocks that don't come out even
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
            logits = (8 * torch.randn(7, width, generator=generator)).to(dtype)
            logits[5], logits[6] = 100.0, -100.0
            targets = torch.tensor([3, 1, -1, vocab_size - 1, 0, 9, 9])
            given = targets, cap, vocab_size, torch.tensor(1 / 6)
            loss, slope = gpt._loss_and_slope(logits.clone(), *given)
            losses, slopes = gpt.fused_loss_and_slope(logits, *given)
            torch.testing.assert_close(losses.sum(), loss)
            assert slopes.dtype == dtype and (slopes - slope).float().norm() < tolerance * slope.float().norm(), (cap, vocab_size, dtype)
            assert losses[2] == 0 and not slopes[2].any() and not slopes[:, vocab_size:].any()
x, head = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (20, 128))
targets = torch.randint(-1, 100, (20,), generator=generator)
results = []
for fused in (False, True):  # as cross_entropy calls it, the second time inside of a compiled graph
    loss_of = lambda x, head: 3 * gpt._LinearCrossEntropy.apply(x, head, targets, 15.0, 100, 8, fused)
    loss = (torch.compile(loss_of, fullgraph=True, backend="aot_eager") if fused else loss_of)(x, head)
    results.append((loss.detach(), *torch.autograd.grad(loss, (x, head))))
torch.testing.assert_close(results[1], results[0])
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which CPU builds of torch lack")
def test_the_loss_kernel_agrees_with_torch_in_tritons_interpreter():
    run = subprocess.run([sys.executable, "-c", KERNEL], cwd=Path(__file__).parent.parent, env=os.environ | dict(TRITON_INTERPRET="1"),
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_on_a_cpu_the_loss_kernel_is_torchs():
    rows, losses = tokens_like(2, 17), []
    for name in ("auto", "torch"):
        model = awake(GPTConfig(**SHAPE, loss_kernel=name))
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        losses.append((loss, *(p.grad for p in model.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*losses))


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REFUSED = [("fast", CUDA, 15.0, True, "loss_kernel 'fast' is not known: choose auto, torch or triton"),
           ("triton", CPU, 15.0, True, "loss_kernel 'triton' needs a CUDA GPU, this is 'cpu': choose auto or torch"),
           ("triton", CUDA, 15.0, False, "loss_kernel 'triton' needs the package triton, which comes with torch's builds for CUDA: choose auto or torch"),
           ("triton", CUDA, 40.5, True, "loss_kernel 'triton' takes a logit_softcap of at most 40, not 40.5: lower it, 0 is none, or choose auto or torch")]


@pytest.mark.parametrize("name,device,cap,has_triton,message", REFUSED, ids=["unknown", "cpu", "package", "soft-cap"])
@pytest.mark.parametrize("function", [choose_loss_kernel, explain_loss_kernel])
def test_a_loss_kernel_asked_for_by_name_is_had_or_refused(function, name, device, cap, has_triton, message, monkeypatch):
    monkeypatch.setattr("daisy.gpt.HAS_TRITON", has_triton)
    with pytest.raises(ValueError) as error:
        function(name, device, cap)
    assert str(error.value) == message


@pytest.mark.parametrize("device,cap,has_triton,chosen", [
    (CPU, 15.0, True, "torch (no CUDA)"), (CUDA, 15.0, False, "torch (triton isn't installed)"), (CUDA, 0.0, True, "triton (installed, CUDA)"),
    (CUDA, 40.0, True, "triton (installed, CUDA)"), (CUDA, 41.0, True, "torch (triton takes a soft-cap of at most 40)")], ids=str)
def test_auto_picks_a_loss_kernel_and_says_why(device, cap, has_triton, chosen, monkeypatch):
    monkeypatch.setattr("daisy.gpt.HAS_TRITON", has_triton)
    assert explain_loss_kernel("auto", device, cap) == chosen and choose_loss_kernel("auto", device, cap) == chosen.split()[0]
    assert explain_loss_kernel("torch", device, cap) == "torch (as set)"
    if chosen.startswith("triton"):
        assert explain_loss_kernel("triton", device, cap) == "triton (as set)"
    in_a_graph = torch.compile(lambda x: x + len(choose_loss_kernel("auto", device, cap)), backend="eager", fullgraph=True)
    assert in_a_graph(torch.zeros(())) == len(chosen.split()[0])  # the compiler sees through the choice
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [None, "layers", "full"])
def test_a_model_refuses_a_loss_kernel_in_one_line_where_it_would_train_and_nowhere_else(how):
    "A checkpoint that was trained with the kernel still writes, and is still scored, without it."
    model, rows = GPT(GPTConfig(**SHAPE, loss_kernel="triton")), tokens_like(2, 17)
    called = model if how is None else compile_gpt(model, how, backend="eager")
    with pytest.raises(ValueError, match="^loss_kernel 'triton' needs a CUDA GPU, this is 'cpu': choose auto or torch$"):
        called(rows[:, :-1], rows[:, 1:])
    with torch.no_grad():
        assert called(rows[:, :-1], rows[:, 1:]).isfinite() and called(rows).shape == (2, 17, V)
    torch._dynamo.reset()


@pytest.mark.parametrize("cached", [False, True])
def test_without_document_mask_attention_reads_on_across_documents(cached):
    "What a token that opens documents means to attention: all, or nothing. Where none stands in a row both are one."
    kept, one_text = (awake(GPTConfig(**SHAPE, document_mask=switch)) for switch in (True, False))
    one_text.load_state_dict(kept.state_dict())

    def logits(model, tokens):
        if not cached:
            return model(tokens)
        cache = model.new_cache(len(tokens), tokens.size(1))
        return torch.cat([model(part, cache=cache) for part in tokens.split(5, dim=1)], dim=1)

    rows = tokens_like(2, 12)
    rows[rows == SHAPE["eos_token_id"]] += 1
    torch.testing.assert_close(logits(one_text, rows), kept(rows))
    rows[:, 6] = SHAPE["eos_token_id"]
    cut, whole = kept(rows), one_text(rows)
    torch.testing.assert_close(logits(one_text, rows), whole)
    torch.testing.assert_close(whole[:, :6], cut[:, :6])
    assert not torch.allclose(whole[:, 7:], cut[:, 7:])


def test_a_tied_head_in_chunks_collects_both_gradients(monkeypatch):
    "The table is read twice, and its two gradients add up, over two micro-batches too."
    config, rows = GPTConfig(**SHAPE, tie_head=True), tokens_like(4, 17)
    models = {chunk_tokens: awake(config) for chunk_tokens in (5, 10_000)}
    for chunk_tokens, model in models.items():
        monkeypatch.setattr("daisy.gpt.cross_entropy", partial(cross_entropy, chunk_tokens=chunk_tokens))
        for half, share in ((rows[:1], 0.25), (rows[1:], 0.75)):
            (share * model(half[:, :-1], half[:, 1:])).backward()
    for chunked, whole in zip(models[5].parameters(), models[10_000].parameters()):
        torch.testing.assert_close(chunked.grad, whole.grad)


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_in_bfloat16_the_loss_is_float32s_and_its_gradients_come_near(cap):
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(200, 64, generator=generator).bfloat16(), 0.1 * torch.randn(512, 64, generator=generator).bfloat16()
    targets = torch.randint(0, 500, (200,), generator=generator)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = x.to(dtype).requires_grad_(), head.float().requires_grad_()
        loss = cross_entropy(*leaves, targets, cap, 500, chunk_tokens=64)
        loss.backward()
        assert loss.dtype == leaves[1].grad.dtype == torch.float32 and leaves[0].grad.dtype == dtype
        results.append((loss.detach(), *(leaf.grad.float() for leaf in leaves)))
    (loss, *grads), (rounded_loss, *rounded_grads) = results
    assert abs(loss - rounded_loss) < 2e-3 * loss
    for ours, theirs in zip(rounded_grads, grads):
        assert_same(ours, theirs, 1e-2)


def test_padding_is_never_offered_and_never_learns():
    model, tokens = awake(GPTConfig(**SHAPE)), tokens_like(2, 8)
    assert model.head.weight.shape == (64, 24) and model(tokens).shape == (2, 8, V)
    loss = model(tokens, tokens)
    torch.testing.assert_close(loss, F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    loss.backward()
    assert not model.head.weight.grad[V:].any() and not model.embed.weight.grad[V:].any()


def test_ignored_targets_dont_count():
    model, tokens, targets = awake(GPTConfig(**SHAPE)), tokens_like(1, 8), tokens_like(1, 8, seed=1)
    masked = targets.clone()
    masked[0, 3:] = IGNORE
    logits = model(tokens)
    torch.testing.assert_close(model(tokens, masked), F.cross_entropy(logits[0, :3], targets[0, :3]))
    assert model(tokens, torch.full_like(targets, IGNORE)) == 0


@pytest.mark.parametrize("extras", [{}, ALL], ids=["default", "all"])
def test_in_bfloat16_weights_gradients_and_loss_stay_float32(extras):
    tokens, targets = tokens_like(2, 16), tokens_like(2, 16, seed=1)
    config = GPTConfig(**SHAPE, **extras)
    expected = awake(config)(tokens, targets)
    model = awake(config, compute_dtype=torch.bfloat16)
    loss, cache = model(tokens, targets), model.new_cache(2, 16)
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {loss.dtype} == {torch.float32}
    assert model.hidden(tokens).dtype == cache.keys[0].dtype == torch.bfloat16
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache) for piece in tokens.split(5, dim=1)], dim=1)
        assert_same(cached, model(tokens), 2e-2)
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)


# building, counting, learning

@settings(max_examples=20, deadline=None)
@given(configs(), st.integers(1, 40))
def test_counts_add_up(config, seq_len):
    model = GPT(config)
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    matrices = counts["attention"] + counts["mlp"] + (counts["embed"] if config.tie_head else counts["head"])
    pairs_at_most = 12 * config.num_heads * config.head_dim * config.num_layers * seq_len
    assert 6 * matrices < flops_per_token(model, seq_len) <= 6 * (matrices + counts["gates"]) + pairs_at_most


def test_growing_windows_are_counted_as_far_as_they_have_grown():
    half, full = (GPT(GPTConfig(vocab_size=64, eos_token_id=0, num_layers=4, num_heads=2, head_dim=8, model_dim=16, max_seq_len=64,
                                window_short=short, window_long=long)) for short, long in ((8, 32), (16, 64)))
    assert flops_per_token(full, 64, 0.5) == flops_per_token(half, 64) < flops_per_token(full, 64)


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (GPT(GPTConfig(**SHAPE), seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


@pytest.mark.parametrize("extras", [{}, OFF, ALL, dict(tie_head=True)], ids=["default", "plain", "all", "tied"])
def test_weights_that_are_laid_out_unfilled_end_as_if_torch_had_filled_them_first(extras, monkeypatch):
    "The same numbers, to the bit, as over torch's own; and none is left of what the memory held."
    def poisoned(make, *args, **kwargs):
        module = unfilled(make, *args, **kwargs)
        for p in module.parameters(): p.data.fill_(math.nan)
        return module

    config, unfilled, states = GPTConfig(**{**SHAPE, **extras}), daisy.gpt._unfilled, []
    for way in (unfilled, poisoned, lambda make, *args, **kwargs: make(*args, **kwargs)):
        monkeypatch.setattr("daisy.gpt._unfilled", way)
        states.append(GPT(config, seed=3).state_dict())
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]) and torch.equal(weight, states[2][name]), name
    monkeypatch.undo()
    before = torch.random.get_rng_state()
    GPT(GPTConfig(**SHAPE), make_feed_forward=MLP)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers are used up


def test_a_large_shape_is_built_on_meta_for_nothing():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50_257, num_layers=48, num_heads=25, head_dim=64, model_dim=1600, max_seq_len=1024,
                              eos_token_id=50_256, value_embeds=False))
    assert count_parameters(model)["mlp"] == 48 * 8 * 1600**2 and flops_per_token(model, 1024) > 6e9


def test_another_feed_forward_drops_in():
    class Scale(nn.Module):
        def __init__(self, model_dim, mlp_ratio):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(model_dim))

        def forward(self, x): return self.gate * x

    model = GPT(GPTConfig(**SHAPE), make_feed_forward=Scale)
    assert math.isclose(model(tokens_like(2, 8), tokens_like(2, 8)).item(), math.log(V), rel_tol=1e-5)


@pytest.mark.parametrize("extras", [OFF, ALL, dict(tie_head=True)], ids=["plain", "all", "tied"])
def test_one_batch_can_be_overfitted(extras):
    model, rows = GPT(GPTConfig(**{**SHAPE, "model_dim": 48, **extras})), tokens_like(2, 17, low=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < 0.3


def test_flash_has_room_for_twice_the_documents_of_the_first_batch():
    "Dense documents at the start make room; the number of places, and so the compiled shape, then stays."
    config = GPTConfig(vocab_size=50, num_layers=2, num_heads=1, head_dim=8, model_dim=8, max_seq_len=2048, eos_token_id=0)
    model, tokens = GPT(config, backend="flash"), torch.ones(2, 2048, dtype=torch.long)
    tokens[:, ::4] = 0  # 1,024 documents of 4 tokens, four times what 2 x 2,048 tokens get unasked
    places = [len(next(iter(model.masks(batch).values())).bounds) - 1 for batch in (tokens, torch.ones_like(tokens), tokens[:, :64])]
    assert places == [2048, 2048, 128]
    assert len(next(iter(GPT(config, backend="flash").masks(torch.ones_like(tokens)).values())).bounds) - 1 == 256
