"""Attention's backends against float64 on a GPU: `python -m pytest -m gpu tests/test_gpu_attention.py`. Writes nothing.

Flash is skipped where `flash-attn-4` isn't installed. The first call of each shape compiles; with pytest-xdist, `-n 10 --dist worksteal`
keeps all workers busy to the end.
"""
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daisy.attention import CausalSelfAttention, attend, flash_installed, prepare_mask
from daisy.masks import MaskSpec, document_ids, varlen_capacity
from daisy.rope import rope_tables

from test_attention import NEW_TOKENS, by_torch, new_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROOT = Path(__file__).parent.parent
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}  # relative norms of the output and of the gradients

# What compiles is a shape: cases that share one are one test, since a kernel takes longest to compile, in float32 above all.
# Rows of fewer than 128 tokens get flex's kernel for decoding, whose blocks hold the row and all heads of a key-value head together:
# at 127 tokens of head_dim 128 in float32, without matrix units, its unrolled loops take the compiler minutes, so such rows are short here.
# tokens, heads, key-value heads, head_dim: [(name, window, mean tokens of a document, 0: one document)]
CASES = {
    (1, 2, 2, 64): [("one token", 8, 0)],
    (31, 2, 2, 64): [("one-token documents in a short row", 16, 1), ("a short row", None, 10)],
    (129, 2, 2, 128): [("one-token documents", 64, 1), ("window of one", 1, 40), ("window longer than the sequence", 500, 40)],
    (333, 4, 2, 64): [("odd length, grouped heads", 50, 40), ("odd length, no window", None, 40)],
    (384, 4, 1, 128): [("one key-value head", 128, 60)],
    (2048, 2, 1, 128): [("one document", 512, 0), ("many documents", 512, 100)],
}


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["sdpa", "flex", "flash"])
def backend(request):
    if request.param == "flash" and not flash_installed():
        pytest.skip("flash-attn-4 is not installed")
    return request.param


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random_documents(rows, tokens, mean_tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    opens = torch.rand(rows, tokens, generator=generator, device="cuda") < (1 / mean_tokens if mean_tokens else 0)
    return document_ids(opens.int(), eos_id=1)


def output_and_gradients(backend, spec, doc_ids, tensors, weight, whole_rows=False):
    leaves = [t.clone().requires_grad_() for t in tensors]
    room = varlen_capacity(doc_ids.numel(), int((doc_ids[:, -1] - doc_ids[:, 0] + 1).sum()))  # for flash, as a model leaves it
    documents = dict(seq_len=doc_ids.size(1), device=doc_ids.device) if whole_rows else dict(doc_ids=doc_ids, capacity=room)
    output = attend(*leaves, prepare_mask(backend, spec, **documents), leaves[0].size(-1) ** -0.5, backend)
    (output * weight.to(output.dtype)).sum().backward()
    return output.detach(), [t.grad for t in leaves]


def assert_agrees(backend, dtype, spec, doc_ids, heads, kv_heads, head_dim, whole_rows=False, case=""):
    generator = torch.Generator("cuda").manual_seed(1)
    *qkv, weight = (torch.randn(*doc_ids.shape, n, head_dim, generator=generator, device="cuda").to(dtype)
                    for n in (heads, kv_heads, kv_heads, heads))
    wanted, wanted_grads = output_and_gradients("reference", spec, doc_ids, [t.double() for t in qkv], weight)
    output, grads = output_and_gradients(backend, spec, doc_ids, qkv, weight, whole_rows)
    tolerance, grad_tolerance = TOLERANCES[dtype]
    assert output.dtype == dtype and relative(output, wanted) < tolerance, case
    for name, got, want in zip("qkv", grads, wanted_grads):
        size = want.norm() if want.norm() > 1e-6 * wanted_grads[2].norm() else wanted_grads[2].norm()  # one key: q and k don't matter
        assert (got.double() - want).norm() < grad_tolerance * size, f"gradient of {name}, {case}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=lambda shape: " + ".join(name for name, *_ in CASES[shape]))
def test_backend_agrees_with_float64(backend, dtype, shape):
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash computes in bfloat16")
    tokens, *heads = shape
    for name, window, mean_tokens in CASES[shape]:
        assert_agrees(backend, dtype, MaskSpec(window), random_documents(2, tokens, mean_tokens), *heads, case=name)


@pytest.mark.parametrize("tokens,window,heads,kv_heads,head_dim", [(333, 50, 4, 2, 64), (2048, 512, 2, 1, 128), (2048, None, 2, 2, 128)])
def test_whole_rows_agree_with_float64(backend, tokens, window, heads, kv_heads, head_dim):
    "Without documents: one mask for all rows, and flash in its fixed-length form."
    assert_agrees(backend, torch.bfloat16, MaskSpec(window), random_documents(2, tokens, 0), heads, kv_heads, head_dim, whole_rows=True)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_long_range_blocks_agree_with_float64(name):
    spec = MaskSpec(window=100, long_every=3)
    for dtype in TOLERANCES:
        assert_agrees(name, dtype, spec, random_documents(2, 1100, 700), 2, 1, 128)


def test_a_window_of_w_is_the_token_and_w_minus_1_before_it(backend, tokens=640, at=130):
    "Change one value: exactly the `window` tokens from it on may notice. All windows in one process, which compiles once for them."
    doc_ids = random_documents(1, tokens, 0)
    q, k, v = torch.randn(3, 1, tokens, 2, 128, device="cuda", dtype=torch.bfloat16)
    changed = v.clone()
    changed[:, at] = 100.0
    whole_rows = dict(seq_len=tokens, device=q.device)
    for window in (1, 2, 64, 127, 128, 129, 300):
        for documents in (dict(doc_ids=doc_ids), whole_rows) if backend == "flash" else (dict(doc_ids=doc_ids),):
            mask = prepare_mask(backend, MaskSpec(window), **documents)
            before, after = (attend(q, k, x, mask, 0.01, backend) for x in (v, changed))
            noticed = (before != after).flatten(2).any(-1)[0].nonzero().flatten()
            assert noticed.tolist() == list(range(at, min(at + window, tokens))), f"window {window}, {list(documents)}"


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_masks_are_made_without_waiting_for_the_gpu(name):
    doc_ids = random_documents(2, 4096, 300)
    for spec in (MaskSpec(1000), MaskSpec()):
        prepare_mask(name, spec, doc_ids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            prepare_mask(name, spec, doc_ids)
            prepare_mask(name, spec, seq_len=4096, device=doc_ids.device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_too_many_documents_for_the_bounds_stop_the_program_with_the_reason():
    "In a process of its own: a failed assertion on a GPU ends it."
    code = ("import torch; from daisy.masks import varlen_bounds; ids = torch.arange(64, device='cuda')[None]\n"
            "varlen_bounds(ids, 63); torch.cuda.synchronize()")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "more than 63 documents" in run.stderr, run.stderr[-2000:]


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_a_growing_window_compiles_one_graph(name, tokens=512):
    from torch._dynamo.testing import CompileCounterWithBackend

    if name == "flash" and not flash_installed():
        pytest.skip("flash-attn-4 is not installed")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda q, k, v, mask: attend(q, k, v, mask, 0.1, name), backend=counter, fullgraph=True, dynamic=False)
    q, k, v = torch.randn(3, 2, tokens, 2, 128, device="cuda", dtype=torch.bfloat16)
    for seed, window in enumerate((64, 100, 128, 300, 512)):
        spec, doc_ids = MaskSpec(window), random_documents(2, tokens, 100, seed)
        output = compiled(*(t.clone().requires_grad_() for t in (q, k, v)), prepare_mask(name, spec, doc_ids))
        output.sum().backward()
        wanted = attend(q.double(), k.double(), v.double(), prepare_mask("reference", spec, doc_ids), 0.1, "reference")
        assert relative(output, wanted) < TOLERANCES[torch.bfloat16][0]
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for one shape"


def layer_and_inputs(tokens=1111, model_dim=512):
    "A layer with every option on, none of its weights zero, and what it is called with."
    torch.manual_seed(0)
    layer = CausalSelfAttention(model_dim, 4, 2, 128, value_gate=True, attention_gate=True).cuda()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=weight.size(1) ** -0.5)
    x, value_embed, weight = (torch.randn(2, tokens, n, device="cuda").bfloat16() for n in (model_dim, 256, model_dim))
    return layer, x, value_embed, weight


def run_layer(layer, x, value_embed, weight, dtype, backend, compiled=False):
    layer = copy.deepcopy(layer).to(torch.float64 if dtype == torch.float64 else torch.float32)
    rope = [table.cuda().to(torch.float64 if dtype == torch.float64 else torch.float32) for table in rope_tables(x.size(1), 128)]
    x, value_embed = (t.to(dtype, copy=True).requires_grad_() for t in (x, value_embed))
    mask = prepare_mask(backend, MaskSpec(300), random_documents(2, x.size(1), 200))
    call = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    output = call(x, rope, mask, backend, value_embed=value_embed)
    (output * weight.to(dtype)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return dict(output=output.detach(), x=x.grad, value_embed=value_embed.grad, **grads)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_compiled_layer_errs_no_more_than_the_plain_one(backend, dtype):
    """Output and every gradient of a whole layer. In bfloat16 its projections, norm and rotation round too, about 1e-2 in all,
    so the yardstick is the uncompiled reference in bfloat16: compiling and another kernel may add nothing to speak of."""
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash computes in bfloat16")
    torch._dynamo.reset()
    parts = layer_and_inputs()
    wanted = run_layer(*parts, torch.float64, "reference")
    plain = run_layer(*parts, dtype, "reference")
    fast = run_layer(*parts, dtype, backend, compiled=True)
    for name in wanted:
        if name not in ("output", "x", "value_embed"):
            assert fast[name].dtype == torch.float32, f"the gradient of {name} is kept in {fast[name].dtype}"
        error = relative(fast[name], wanted[name])
        assert error < max(1.25 * relative(plain[name], wanted[name]), TOLERANCES[dtype][0]), name
        assert error < 2e-2, name


# one new token a row by one kernel; what it must agree with is torch's form, which test_attention.py holds against a full pass

MANY = {"a long ring, 64 rows": (64, 768, 8, 8, 128, [500 + 9 * i for i in range(64)], 768), "longer than 32 parts": (1, 5000, 8, 8, 128, [4999], None),
        "grouped, 128 wide": (4, 300, 8, 2, 128, [299, 10, 1000, 0], 300)}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("norm,add,long_every", [(True, True, 0), (False, False, 0), (True, False, 2)])
@pytest.mark.parametrize("name", [*NEW_TOKENS, *MANY])
@torch.no_grad()
def test_the_kernel_for_one_token_agrees_with_torch(name, norm, add, long_every, dtype, tolerance):
    settings = dict(norm=norm, add=add, long_every=long_every, block_size=16, dtype=dtype, device="cuda")
    given, plain, ours, how = new_tokens(*(NEW_TOKENS | MANY)[name], **settings)
    for _ in range(20):  # the counters must come back to zero, and whoever is last must see what all others wrote
        ours.piece.lengths.add_(1)  # of both caches
        want, got = by_torch(*given, plain, *how), ours.attend_new_token(*given, *how)
        assert relative(got, want) < tolerance and got.dtype == dtype
        assert relative(ours.keys, plain.keys) < tolerance and relative(ours.values, plain.values) < tolerance and not ours.arrived.any()


@torch.no_grad()
def test_the_kernel_for_one_token_is_the_same_every_time():
    "A merge that read a part too early would differ now and then: many programs, thousands of merges."
    given, _, ours, how = new_tokens(*MANY["a long ring, 64 rows"], dtype=torch.bfloat16, device="cuda")
    first = ours.attend_new_token(*given, *how).clone()
    differ = sum(not torch.equal(ours.attend_new_token(*given, *how), first) for _ in range(200))
    assert differ == 0
