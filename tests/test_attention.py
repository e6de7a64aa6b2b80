"""Attention's backends against float64, its layer, and the wrapper of Flash 4, as far as a CPU can show them.

The package flash-attn-4 needs a GPU to be imported, so a stand-in for its two functions, written from what they document,
is put in its place here; test_gpu_attention.py runs the real ones.
"""
import copy
import math
import os
import subprocess
import sys
import types
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend

import daisy.attention as attention
from daisy.attention import (CausalSelfAttention, KVCache, Linear, attend, auto_backend, choose_backend, explain_backend, flash_forward, prepare_mask)
from daisy.masks import MaskSpec, dense_mask, document_ids
from daisy.rope import rope_tables

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}  # relative norms of the output and of the gradients
CPU = torch.device("cpu")


def packed_mask(num_tokens, bounds, left):
    "Who sees whom as flash-attn-4 documents it: in each document causal, and `left` keys before the token itself."
    at = torch.arange(num_tokens)
    document = torch.searchsorted(bounds, at.int(), right=True)
    near = True if left is None else at[None] >= at[:, None] - left
    return (at[None] <= at[:, None]) & near & (document[:, None] == document[None])


def per_query_head(k, num_heads):
    return k.float().repeat_interleave(num_heads // k.size(1), dim=1)


@pytest.fixture
def flash_calls(monkeypatch):
    """Put a stand-in where `flash_attn.cute.interface` would be; the list tells the windows that it was called with.

    Rows without bounds, (B, T, heads, hd), are packed rows whose log-sum-exp (heads, N) stands as (B, heads, T).
    """
    calls = []

    def of_rows(function):
        def either(q, k, v, *others, **options):
            if "cu_seqlens_q" in options:
                return function(q, k, v, *others, **options)
            rows, tokens = q.shape[:2]
            bounds = torch.arange(rows + 1, dtype=torch.int32) * tokens
            options = {name: x.flatten(0, 1) if torch.is_tensor(x) else x for name, x in options.items()}
            packed = [x.transpose(0, 1).flatten(1) if x.dtype == torch.float32 else x.flatten(0, 1) for x in (q, k, v, *others)]
            first, second, *rest = function(*packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=tokens, max_seqlen_k=tokens, **options)
            return first.view(q.shape), second.view(-1, rows, tokens).transpose(0, 1).contiguous() if not others else second, *rest
        return either

    @of_rows

    def forward(q, k, v, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse,
                window_size_left=None, window_size_right=None):
        assert causal and return_lse and window_size_right in (None, 0) and cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max() and cu_seqlens_q.dtype == torch.int32
        calls.append(("forward", window_size_left))
        scores = torch.einsum("thd,shd->hts", q.float(), per_query_head(k, q.size(1))) * softmax_scale
        scores.masked_fill_(~packed_mask(len(q), cu_seqlens_q, window_size_left), -math.inf)
        output = torch.einsum("hts,shd->thd", scores.softmax(-1), per_query_head(v, q.size(1)))
        return output.to(q.dtype).contiguous(), scores.logsumexp(-1), None, None, None

    @of_rows
    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dq, dk, dv,
                 window_size_left=None, window_size_right=None):
        assert causal and dout.is_contiguous()
        calls.append(("backward", window_size_left))
        keys, values, grad = per_query_head(k, q.size(1)), per_query_head(v, q.size(1)), dout.float()
        scores = torch.einsum("thd,shd->hts", q.float(), keys) * softmax_scale
        weights = (scores - lse[..., None]).exp() * packed_mask(len(q), cu_seqlens_q, window_size_left)
        dweights = torch.einsum("thd,shd->hts", grad, values)
        dscores = softmax_scale * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        shared = (len(k), k.size(1), -1, k.size(2))  # the query heads of one key-value head add up
        dq.copy_(torch.einsum("hts,shd->thd", dscores, keys))
        dk.copy_(torch.einsum("hts,thd->shd", dscores, q.float()).view(shared).sum(2))
        dv.copy_(torch.einsum("hts,thd->shd", weights, grad).view(shared).sum(2))
        return dq, dk, dv

    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["flash_attn.cute.interface"].__dict__.update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return calls


def random_inputs(doc_ids, heads, kv_heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*doc_ids.shape, n, head_dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def output_and_gradients(backend, spec, doc_ids, tensors, weight):
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = attend(*leaves, prepare_mask(backend, spec, doc_ids), leaves[0].size(-1) ** -0.5, backend)
    (output * weight.to(output.dtype)).sum().backward()
    return output.detach(), [t.grad for t in leaves]


def assert_agrees(backend, dtype, spec, doc_ids, heads, kv_heads, head_dim, together=False):
    """Output and gradients, each within its relative norm, or the three gradients `together`: where a query has only a key or two to
    choose from, its own gradient is a small difference of large numbers, and rounding those to bfloat16 is most of it."""
    *qkv, weight = random_inputs(doc_ids, heads, kv_heads, head_dim, dtype)
    wanted, wanted_grads = output_and_gradients("reference", spec, doc_ids, [t.double() for t in qkv], weight)
    output, grads = output_and_gradients(backend, spec, doc_ids, qkv, weight)
    tolerance, grad_tolerance = TOLERANCES[dtype]
    assert output.dtype == dtype and (output.double() - wanted).norm() < tolerance * wanted.norm()
    if together:
        grads, wanted_grads = ([torch.cat([g.flatten().double() for g in gradients])] for gradients in (grads, wanted_grads))
    for name, got, want in zip("qkv", grads, wanted_grads):
        size = want.norm() if want.norm() > 1e-6 * wanted_grads[-1].norm() else wanted_grads[-1].norm()  # one key: q and k don't matter
        assert (got.double() - want).norm() < grad_tolerance * size, f"gradient of {name}"


@st.composite
def cases(draw):
    "A spec, rows of documents and head counts: odd lengths, one token, one-token documents, windows beyond the row, shared heads."
    tokens = draw(st.sampled_from([1, 2, 7, 33, 64, 90]))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=1, max_size=2))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)]))
    spec = MaskSpec(draw(st.none() | st.integers(1, 120)), draw(st.sampled_from([0, 0, 2, 3])), draw(st.sampled_from([4, 16, 128])))
    return spec, document_ids(torch.tensor(rows).int(), eos_id=1), heads, kv_heads, draw(st.sampled_from([64, 128]))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=25)
@given(cases())
def test_backend_agrees_with_float64(backend, dtype, case):
    assert_agrees(backend, dtype, *case, together=dtype == torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("tokens,window,heads,kv_heads,head_dim", [(200, 50, 4, 2, 64), (129, 1, 2, 2, 128), (129, 500, 2, 1, 128)])
def test_each_gradient_agrees_in_bfloat16(backend, tokens, window, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(tokens)
    doc_ids = document_ids((torch.rand(2, tokens, generator=generator) < 0.02).int(), eos_id=1)
    assert_agrees(backend, torch.bfloat16, MaskSpec(window), doc_ids, heads, kv_heads, head_dim)


@settings(deadline=None, max_examples=10)
@given(cases())
def test_flex_forward_agrees_with_float64(case):
    "A CPU has only the forward pass of flex, here uncompiled."
    spec, doc_ids, *shape = case
    q, k, v, _ = random_inputs(doc_ids, *shape, torch.float32)
    wanted = attend(q.double(), k.double(), v.double(), prepare_mask("reference", spec, doc_ids), 0.1, "reference")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output = attention.torch_flex_attention(q, k, v, block_mask=prepare_mask("flex", spec, doc_ids), scale=0.1, enable_gqa=True)
    assert (output.transpose(1, 2).double() - wanted).norm() < 1e-5 * wanted.norm()


def test_flex_agrees_shape_by_shape_and_too_many_shapes_are_an_error(monkeypatch):
    "Where torch would go on uncompiled, slow and without a word. Compiled without inductor, which takes long."
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "_compiled_flex", lru_cache(attention._compiled_flex.__wrapped__))
    attention._compiled_flex()

    def difference(tokens):
        doc_ids = document_ids((torch.arange(tokens) % 13 == 5).int()[None], eos_id=1)
        q, k, v, _ = random_inputs(doc_ids, 4, 2, 16, torch.float32)
        output, wanted = (attend(q, k, v, prepare_mask(name, MaskSpec(9), doc_ids), 0.25, name) for name in ("flex", "reference"))
        return (output - wanted).abs().max()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(cache_size_limit=3):
        assert max(difference(tokens) for tokens in (20, 33, 20, 47, 33)) < 1e-5
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            difference(64)
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens,window,heads,kv_heads,head_dim", [
    (1, 8, 2, 2, 64), (33, 1, 2, 2, 64), (33, 12, 4, 2, 64), (33, 500, 4, 1, 128), (90, None, 2, 2, 128), (90, 90, 2, 1, 64)])
def test_flash_operators_agree_with_float64(flash_calls, tokens, window, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(tokens)
    for chance in (0.0, 0.1, 1.0):  # one document, some, one for each token
        doc_ids = document_ids((torch.rand(2, tokens, generator=generator) < chance).int(), eos_id=1)
        assert_agrees("flash", torch.bfloat16, MaskSpec(window), doc_ids, heads, kv_heads, head_dim)
    left = window - 1 if window and window < tokens else None  # a window as long as the row is none
    assert flash_calls == [("forward", left), ("backward", left)] * 3


@pytest.mark.parametrize("backend", ["flash", "sdpa", "flex"])
@pytest.mark.parametrize("tokens,window,heads,kv_heads", [(1, 8, 2, 2), (33, 12, 4, 2), (33, None, 2, 2), (90, 500, 2, 1)])
def test_without_documents_one_mask_serves_whole_rows(flash_calls, backend, tokens, window, heads, kv_heads):
    "The same as documents that fill their rows, forward and backward, and the kernel gets rows instead of bounds."
    spec, doc_ids = MaskSpec(window), torch.zeros(3, tokens, dtype=torch.int32)
    *qkv, weight = random_inputs(doc_ids, heads, kv_heads, 64, torch.bfloat16)
    whole = prepare_mask(backend, spec, seq_len=tokens, device=CPU)
    if backend == "flex":
        wanted = prepare_mask(backend, spec, doc_ids)
        assert torch.equal(whole.to_dense().expand(3, -1, -1, -1), wanted.to_dense())
        return
    results = []
    for mask in (whole, prepare_mask(backend, spec, doc_ids)):
        leaves = [x.clone().requires_grad_() for x in qkv]
        output = attend(*leaves, mask, 0.125, backend)
        results.append([output, *torch.autograd.grad((output * weight).sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert backend == "sdpa" or whole.bounds is None and flash_calls[0] == flash_calls[2]


def test_the_length_of_the_bounds_changes_nothing(flash_calls):
    doc_ids = document_ids((torch.arange(80) % 7 == 3).int().view(2, 40), eos_id=1)
    q, k, v, _ = random_inputs(doc_ids, 2, 2, 64, torch.bfloat16)
    outputs = [attend(q, k, v, prepare_mask("flash", MaskSpec(5), doc_ids, capacity), 0.1, "flash") for capacity in (None, 14, 80, 300)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    with pytest.raises(RuntimeError, match="more than 11 documents"):
        prepare_mask("flash", MaskSpec(5), doc_ids, 11)


def test_flash_operators_keep_torchs_rules(flash_calls):
    "Schema, fake tensors, autograd and compilation, by torch's own check."
    doc_ids = document_ids((torch.arange(40) % 17 == 3).int().view(2, 20), eos_id=1)
    q, k, v, _ = random_inputs(doc_ids, 4, 2, 16, torch.bfloat16)
    packed = [x.flatten(0, 1).requires_grad_() for x in (q, k, v)]
    mask = prepare_mask("flash", MaskSpec(5), doc_ids)
    library.opcheck(flash_forward, (*packed, mask.bounds, mask.window, mask.max_seq_len, 0.25), atol=1e-2, rtol=1e-2)
    rows = [x.requires_grad_() for x in (q, k, v)]
    library.opcheck(flash_forward, (*rows, None, mask.window, mask.max_seq_len, 0.25), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_a_growing_window_compiles_one_layer(flash_calls, backend):
    "Whole graph, forward and backward, while window and documents change: one graph for one shape, and the right numbers."
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, x, rope, value_embed, _ = layer_and_inputs()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
    for seed, window in enumerate((2, 5, 9, 30, None)):
        doc_ids = document_ids((torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.1).int(), eos_id=1)
        spec = MaskSpec(window)
        output = compiled(x, rope, prepare_mask(backend, spec, doc_ids), backend, value_embed=value_embed)
        output.float().sum().backward()
        wanted = layer(x, rope, prepare_mask("reference", spec, doc_ids), "reference", value_embed=value_embed)
        assert (output - wanted).norm() < 2e-2 * wanted.norm()
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for one shape"


def test_a_window_in_the_code_would_compile_a_graph_each():
    "The count above can fail: a plain number, as a careless mask would hold it, is burnt into the graph."
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, window: x.tril() - x.tril(-window), backend=counter, fullgraph=True, dynamic=False)
    for window in (2, 5, 9):
        compiled(torch.randn(10, 10), window)
    assert counter.frame_count == 3


def test_flash_refuses_float32_and_names_a_way_out(flash_calls):
    doc_ids = document_ids(torch.zeros(1, 4), eos_id=1)
    with pytest.raises(ValueError, match="float32.*bfloat16.*flex"):
        attend(*torch.randn(3, 1, 4, 2, 16), prepare_mask("flash", MaskSpec(), doc_ids), 0.25, "flash")
    assert not flash_calls


@pytest.mark.parametrize("name,device,long_every,words", [
    ("fast", "cpu", 0, "'fast' is not known: choose auto, reference, sdpa, flex, flash"), ("flex", "cpu", 0, "'flex' needs a CUDA GPU.*sdpa"),
    ("flash", "cpu", 0, "'flash' needs a CUDA GPU"), ("flash", "cuda", 4, "no long-range blocks \\(long_every 4\\): choose flex")])
def test_a_wrong_choice_of_backend_is_refused(name, device, long_every, words):
    with pytest.raises(ValueError, match=words):
        choose_backend(name, torch.device(device), long_every)


@pytest.mark.parametrize("installed,capability", [(False, (9, 0)), (True, (8, 0)), (True, (9, 0)), (True, (12, 0))])
def test_flash_is_chosen_only_where_it_runs(installed, capability, monkeypatch):
    monkeypatch.setattr(attention, "flash_installed", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if installed and capability >= (9, 0):
        assert choose_backend("flash", torch.device("cuda")) == choose_backend("auto", torch.device("cuda")) == "flash"
        assert choose_backend("auto", torch.device("cuda"), long_every=3) == "flex"
        assert explain_backend("auto", torch.device("cuda")) == "flash (installed, Hopper or later)"
        assert explain_backend("auto", torch.device("cuda"), long_every=3) == "flex (long-range blocks)"
    else:
        assert choose_backend("auto", torch.device("cuda")) == "flex"
        why = "flash needs a Hopper or later GPU" if installed else "flash-attn-4 isn't installed"
        assert explain_backend("auto", torch.device("cuda")) == f"flex ({why})"
        with pytest.raises(ValueError, match="pip install 'daisy\\[flash\\]'"):
            choose_backend("flash", torch.device("cuda"))


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise ImportError('needs a GPU')")
    assert not attention.flash_installed()
    monkeypatch.syspath_prepend(tmp_path)
    assert attention.flash_installed() and "flash_attn.cute" not in sys.modules


def test_auto_never_picks_what_cannot_be():
    for long_every in (0, 3):
        for device in ("cpu", "cuda"):
            name = auto_backend(torch.device(device), long_every)
            assert choose_backend("auto", torch.device(device), long_every) == name
            assert explain_backend("auto", torch.device(device), long_every).startswith(f"{name} (")
            assert not (device == "cpu" and name in ("flex", "flash")) and not (long_every and name == "flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_computes_in_the_inputs_type_and_keeps_float32(dtype):
    torch.manual_seed(0)
    ours = Linear(24, 40)
    torch.manual_seed(0)
    torchs = nn.Linear(24, 40, bias=False)
    assert torch.equal(ours.weight, torchs.weight)
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    output = ours(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == dtype and ours.weight.dtype == ours.weight.grad.dtype == torch.float32
    assert torch.equal(output, F.linear(x, torchs.weight.to(dtype)))
    if dtype == torch.float32:
        assert torch.equal(output, torchs(x))


def layer_and_inputs(tokens=40, dtype=torch.bfloat16, **options):
    "A layer with every option on, none of its weights zero, and what it is called with."
    torch.manual_seed(0)
    layer = CausalSelfAttention(64, 4, 2, 16, **{"value_gate": True, "attention_gate": True, **options})
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight.size(1) ** -0.5)
    x, value_embed = torch.randn(2, tokens, 64).to(dtype), torch.randn(2, tokens, 32).to(dtype)
    doc_ids = document_ids((torch.rand(2, tokens) < 0.1).int(), eos_id=1)
    return layer, x, rope_tables(tokens, 16), value_embed, doc_ids


def run_layer(layer, x, rope, value_embed, mask, dtype):
    layer = copy.deepcopy(layer).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rope = [table.to(torch.float64 if dtype == torch.float64 else torch.float32) for table in rope]
    x, value_embed = (t.to(dtype, copy=True).requires_grad_() for t in (x, value_embed))
    output = layer(x, rope, mask, "reference", value_embed=value_embed)
    output.sum().backward()
    return dict(output=output, x=x.grad, value_embed=value_embed.grad, **{name: p.grad for name, p in layer.named_parameters()})


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_layer_computes_in_the_type_of_the_stream(dtype, tolerance):
    "In bfloat16 every step of it rounds, about 1e-2 in all; weights' gradients are float32 whatever the stream is."
    layer, x, rope, value_embed, doc_ids = layer_and_inputs(90)
    mask = prepare_mask("reference", MaskSpec(30), doc_ids)
    wanted = run_layer(layer, x, rope, value_embed, mask, torch.float64)
    got = run_layer(layer, x, rope, value_embed, mask, dtype)
    for name in wanted:
        assert got[name].dtype == (dtype if name in ("output", "x", "value_embed") else torch.float32), name
        assert (got[name].double() - wanted[name]).norm() < tolerance * wanted[name].norm(), name


def test_an_attention_gate_of_zeros_changes_nothing():
    gated, x, rope, value_embed, doc_ids = layer_and_inputs()
    plain = CausalSelfAttention(64, 4, 2, 16, value_gate=True)
    plain.load_state_dict({name: p for name, p in gated.state_dict().items() if not name.startswith("attention_gate")})
    nn.init.zeros_(gated.attention_gate.weight)
    mask = prepare_mask("sdpa", MaskSpec(9), doc_ids)
    output = gated(x, rope, mask, value_embed=value_embed)
    assert torch.equal(output, plain(x, rope, mask, value_embed=value_embed))
    with torch.no_grad():
        gated.attention_gate.weight[1] = -50 * x[0, 7, :32].sign()  # shuts the second head for this token
    y = gated(x, rope, mask, value_embed=value_embed)[0, 7] - output[0, 7]
    assert y.abs().max() > 1e-2


def test_a_layer_without_options_has_no_parameters_for_them():
    assert {name for name, _ in CausalSelfAttention(64, 4, 2, 16).named_parameters()} == {"q.weight", "k.weight", "v.weight", "out.weight"}


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
def test_nothing_leaks_from_the_future_or_from_other_documents(flash_calls, backend):
    layer, x, rope, value_embed, _ = layer_and_inputs()
    doc_ids = torch.zeros(2, 40, dtype=torch.int32)
    doc_ids[:, 20:] = 1
    mask = prepare_mask(backend, MaskSpec(15), doc_ids)
    changed = x.clone()
    changed[:, 10] += 1
    before, after = (layer(z, rope, mask, backend, value_embed=value_embed) for z in (x, changed))
    noticed = (before != after).any(-1).any(0).nonzero().flatten().tolist()
    assert noticed == list(range(10, 20))  # the window reaches to 24, the document ends at 19


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_a_cache_of_any_type_gives_what_a_full_pass_gives(dtype, tolerance):
    layer, x, (cos, sin), value_embed, doc_ids = layer_and_inputs(dtype=dtype)
    spec, steps = MaskSpec(9), []
    full = layer(x, (cos, sin), dense_mask(spec, doc_ids), value_embed=value_embed)
    cache, ends = KVCache([spec], 2, 40, 2, 16, dtype=dtype), doc_ids.diff(dim=1, prepend=torch.zeros(2, 1, dtype=doc_ids.dtype))
    for start, end in ((0, 7), (7, 8), (8, 30), (30, 40)):
        piece = cache.piece(ends[:, start:end], eos_id=1)
        rope = cos[piece.positions], sin[piece.positions]
        steps.append(layer(x[:, start:end], rope, None, value_embed=value_embed[:, start:end], cache=cache.layer(0, piece)))
        cache.advance(ends[:, start:end], piece)
    assert cache.keys[0].dtype == dtype and cache.keys[0].size(1) == 9 and (torch.cat(steps, 1) - full).norm() < tolerance * full.norm()


# ---- one new token a row by one kernel

@torch.no_grad()
def by_torch(qkv, value_embed, x, gate, rope, cache, norm, scale):
    "What `attend_new_token` promises, by torch's operations: the answers, and the cache's rings changed."
    K, hd = cache.keys.shape[2:]
    q, k, v = qkv.view(*qkv.shape[:2], -1, hd).split((qkv.size(-1) // hd - 2 * K, K, K), dim=2)
    if value_embed is not None:
        v = v + 2 * torch.sigmoid(F.linear(x[..., :gate.size(1)], gate)).unsqueeze(-1) * value_embed.view_as(v)
    q, k = (attention.rms_norm(q), attention.rms_norm(k)) if norm else (q, k)
    return cache.attend(attention.apply_rope(q, *rope), attention.apply_rope(k, *rope), v, scale)


def new_tokens(B, places, H, K, hd, lengths, window, starts=None, long_every=0, block_size=128, dtype=torch.float32, norm=True, add=True, device="cpu"):
    "A random token for each row, and two caches with the same rings: one for torch, one for the kernel."
    generator = torch.Generator().manual_seed(places + hd)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    qkv, keys, values = draw(B, 1, (H + 2 * K) * hd), draw(B, places, K, hd), draw(B, places, K, hd)
    channels = min(32, H * hd)
    gated = (draw(B, 1, K * hd), draw(B, 1, H * hd), draw(K, channels) / channels**0.5) if add else (None, None, None)
    lengths = torch.tensor(lengths, device=device)
    starts = torch.zeros_like(lengths) if starts is None else torch.tensor(starts, device=device)
    piece = attention.Piece(lengths[:, None], starts[:, None], lengths, None, None, False)
    rope = tuple(table.to(device)[piece.positions] for table in rope_tables(int(lengths.max()) + 1, hd))
    arrived, spec = torch.zeros(B, K, dtype=torch.int32, device=device), MaskSpec(window, long_every, block_size)
    caches = [attention.LayerCache(keys.clone(), values.clone(), spec, piece, places, counter) for counter in (None, arrived)]
    return (qkv, *gated, rope), *caches, (norm, 0.2)


NEW_TOKENS = {  # rows, places, heads, key heads, head dim, tokens before, window, where documents begin
    "a first token": (1, 40, 2, 2, 64, [0], None),
    "half of a ring": (1, 96, 2, 2, 128, [47], None),
    "empty, half full, full, wrapped": (4, 37, 2, 2, 32, [0, 18, 36, 1000], 37),
    "one place": (2, 1, 2, 1, 16, [0, 5], 1),
    "four heads share": (2, 50, 8, 2, 16, [49, 400], 50),
    "three heads share, narrow": (2, 33, 3, 1, 8, [32, 7], None),
    "documents begin": (4, 40, 2, 1, 64, [30, 30, 41, 1000], 40, [0, 30, 25, 999]),
    "a window within the ring": (2, 90, 2, 2, 16, [89, 60], 9),
    "more parts than are merged at a time": (2, 700, 1, 1, 8, [699, 1500], 700),
}


KERNEL = """
import inspect, sys
sys.path.insert(0, "tests")
import torch
import daisy.attention as attention
from test_attention import NEW_TOKENS, by_torch, new_tokens
vars(attention).update(inspect.getclosurevars(attention._one_token_kernel().fn).nonlocals)  # the interpreter looks for names in the module
attention.FEW_PLACES, attention.MANY_PLACES = 8, 16

def check(case, tolerance, rounding, **settings):
    given, plain, ours, how = new_tokens(*case, **settings)
    for step in range(2):  # the counters must be as they were
        want, got = by_torch(*given, plain, *how), ours.attend_new_token(*given, *how)
        assert (got - want).norm() < tolerance * want.norm() and got.dtype == want.dtype and got.shape == want.shape, (case, settings)
        for ring, expected in ((ours.keys, plain.keys), (ours.values, plain.values)):
            torch.testing.assert_close(ring, expected, atol=rounding, rtol=rounding)
        assert not ours.arrived.any()

for case in NEW_TOKENS.values():
    check(case, 1e-5, 1e-6)
attention.FEW_PROGRAMS = 1  # from here on more places a program
case = NEW_TOKENS["four heads share"]
check(case, 1e-5, 1e-6, norm=False, add=False)
check(case, 5e-3, 1e-3, dtype=torch.float16)
check(case, 2e-2, 1e-2, dtype=torch.bfloat16)  # the interpreter cuts off where a GPU rounds
for long_every, lengths in ((2, [89, 60]), (3, [40, 0])):
    check((2, 90, 2, 2, 16, lengths, 9), 1e-5, 1e-6, long_every=long_every, block_size=8)

# a text from an empty ring on, token by token, inside of a compiled graph
given, plain, ours, how = new_tokens(2, 11, 2, 1, 8, [0, 4], 7)
one = torch.compile(lambda *given: ours.attend_new_token(*given, *how), fullgraph=True, backend="aot_eager")
with torch.no_grad():
    for step in range(15):
        torch.testing.assert_close(one(*given), by_torch(*given, plain, *how))
        ours.piece.lengths.add_(1)
"""


@pytest.mark.skipif(not attention.HAS_TRITON, reason="needs triton, which CPU builds of torch lack")
def test_the_kernel_for_one_token_agrees_with_torch_in_tritons_interpreter():
    run = subprocess.run([sys.executable, "-c", KERNEL], cwd=Path(__file__).parent.parent, env=os.environ | dict(TRITON_INTERPRET="1"),
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("how, head_dim, words", [
    ("triton", 64, "needs a CUDA GPU of Ampere or later, Triton, and a head_dim .* this is 'cpu' and 64: choose torch"),
    ("flash", 64, "by 'flash' is not known: choose auto, torch or triton")])
def test_a_wrong_choice_for_single_tokens_is_refused(how, head_dim, words):
    with pytest.raises(ValueError, match=words) as error:
        attention.choose_one_token(how, CPU, head_dim)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("triton, capability, head_dim, runs", [
    (True, (9, 0), 128, True), (True, (8, 0), 16, True), (True, (9, 0), 96, False), (True, (9, 0), 256, False),
    (True, (7, 5), 64, False), (False, (9, 0), 64, False)])
def test_single_tokens_take_the_kernel_where_it_runs_and_is_asked_for(triton, capability, head_dim, runs, monkeypatch):
    monkeypatch.setattr(attention, "HAS_TRITON", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda")
    if runs: assert attention.choose_one_token("triton", gpu, head_dim) == "triton"
    else:
        with pytest.raises(ValueError, match="choose torch"): attention.choose_one_token("triton", gpu, head_dim)
    assert attention.choose_one_token("torch", gpu, head_dim) == attention.choose_one_token("auto", gpu, head_dim) == "torch"
