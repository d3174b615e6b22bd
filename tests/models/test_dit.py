"""DiT against a reference written from the papers (complex rotations, explicit softmax), and what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.kernels import dispatch
from lowvram.kernels.rms_norm_rotate import turned
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.memory.tracer import LiveBytes
from lowvram.models.dit import DiT, DiTBlock, RMSNorm, rotations, sinusoids
from lowvram.settings.diffusion import DIT_SIZES

TINY = {"dim": 32, "depth": 2, "heads": 2, "in_channels": 3}
EVERYTHING = {"num_classes": 5, "context_dim": 12, "pooled_dim": 7, "size_conditioning": True}


def dit(seed=0, *, trained=True, **kwargs):
    """A small one; `trained` makes all weights matter, those that begin at zero too."""
    torch.manual_seed(seed)
    network = DiT(**{**TINY, **kwargs})
    if trained:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def conditions(batch=2, tokens=5):
    generator = torch.Generator().manual_seed(3)
    return {
        "labels": torch.randint(5, (batch,), generator=generator),
        "context": torch.randn(batch, tokens, 12, generator=generator),
        "context_mask": torch.arange(tokens) < torch.tensor([[tokens], [2]])[:batch],
        "pooled": torch.randn(batch, 7, generator=generator),
        "size_ids": torch.tensor([[512.0, 384, 0, 0, 512, 512], [640, 640, 3, 90, 512, 768]])[:batch],
    }


def latents(batch=2, height=8, width=12, channels=3, seed=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


# The reference: one function on a state dict, in fp64, which shares no code with the class.


def ref_norm(x, weight=None):
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def ref_sinusoids(x):
    frequencies = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = x.double()[..., None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


def ref_rotate(x, width):
    """Each pair as a complex number, turned by its token's row or column."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    numbers = torch.complex(x[..., :half], x[..., half:])
    out = torch.empty_like(numbers)
    for token in range(x.shape[-2]):
        for j in range(half):
            position = token // width if j < quarter else token % width
            angle = position * 100.0 ** (-(j % quarter) / quarter)
            out[..., token, j] = numbers[..., token, j] * complex(math.cos(angle), math.sin(angle))
    return torch.cat([out.real, out.imag], -1)


def ref_heads(x, heads):
    batch, tokens, dim = x.shape
    return x.view(batch, tokens, heads, dim // heads).transpose(1, 2)


def ref_softmax(q, k, v, mask=None):
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    out = torch.softmax(logits, -1) @ v
    return out.transpose(1, 2).flatten(2)


def ref_mlp2(x, w, name):
    return F.linear(F.silu(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])), *ref_layer(w, f"{name}.2"))


def ref_layer(w, name):
    return w[f"{name}.weight"], w[f"{name}.bias"]


def ref_block(x, c, w, heads, width, context, mask):
    dim = x.shape[-1]
    s1, m1, g1, s2, m2, g2 = F.linear(c, *ref_layer(w, "modulation")).view(-1, 6, 1, dim).unbind(1)
    q, k, v = F.linear(ref_norm(x) * (1 + m1) + s1, w["attention.qkv.weight"]).split(dim, -1)
    q, k, v = (ref_heads(part, heads) for part in (q, k, v))
    q = ref_rotate(ref_norm(q, w["attention.q_norm.weight"]), width)
    k = ref_rotate(ref_norm(k, w["attention.k_norm.weight"]), width)
    x = x + g1 * F.linear(ref_softmax(q, k, v), w["attention.out.weight"])
    q = ref_heads(F.linear(ref_norm(x, w["cross_norm.weight"]), w["cross_attention.q.weight"]), heads)
    k, v = (ref_heads(part, heads) for part in F.linear(context, w["cross_attention.kv.weight"]).split(dim, -1))
    q, k = ref_norm(q, w["cross_attention.q_norm.weight"]), ref_norm(k, w["cross_attention.k_norm.weight"])
    x = x + F.linear(ref_softmax(q, k, v, mask), w["cross_attention.out.weight"])
    gate, up = F.linear(ref_norm(x) * (1 + m2) + s2, w["mlp.gate_up.weight"]).chunk(2, -1)
    return x + g2 * F.linear(gate * torch.sigmoid(gate) * up, w["mlp.down.weight"])


def reference(w, x, time, labels, context, context_mask, pooled, size_ids, heads=2, patch=2):
    """w: the parameters by name."""
    height, width = x.shape[2:]
    c = ref_mlp2(ref_sinusoids(time), w, "time_embed") + w["class_embedding.weight"][labels]
    c = c + ref_mlp2(pooled.double(), w, "pooled_embed")
    c = c + ref_mlp2(ref_sinusoids(size_ids).flatten(1), w, "size_embed")
    c = c * torch.sigmoid(c)
    context = ref_norm(context.double(), w["context_norm.weight"])
    tokens = F.unfold(x.double(), patch, stride=patch).transpose(1, 2)
    tokens = F.linear(tokens, *ref_layer(w, "patch_embed"))
    for i in range(2):
        block = {name.removeprefix(f"layers.{i}."): v for name, v in w.items() if name.startswith(f"layers.{i}.")}
        tokens = ref_block(tokens, c, block, heads, width // patch, context, context_mask)
    shift, scale = F.linear(c, *ref_layer(w, "final_modulation"))[:, None].chunk(2, -1)
    tokens = F.linear(ref_norm(tokens) * (1 + scale) + shift, *ref_layer(w, "final"))
    return F.fold(tokens.transpose(1, 2), (height, width), patch, stride=patch)


def test_output_and_every_gradient_are_the_reference_s():
    network = dit(**EVERYTHING, out_channels=6).double()
    x, time = latents().double().requires_grad_(), torch.tensor([17.25, 3.0])  # small: angles are taken in fp32
    given_conditions = conditions() | {"size_ids": torch.tensor([[1.0, 2, 0, 0, 8, 4], [3, 5, 7, 1, 4, 2]])}
    out = network(x, time, **given_conditions)
    names, parameters = zip(*network.named_parameters(), strict=True)
    expected = reference(dict(zip(names, parameters, strict=True)), x, time, **given_conditions)
    assert out.shape == (2, 6, 8, 12)
    torch.testing.assert_close(out, expected, atol=2e-5 * expected.std().item(), rtol=0)
    grads, expected_grads = (torch.autograd.grad(y.square().mean(), (x, *parameters)) for y in (out, expected))
    for name, grad, expected_grad in zip(("x", *names), grads, expected_grads, strict=True):
        scale = expected_grad.square().mean().sqrt()
        assert scale > 0, name
        error = (grad - expected_grad).abs().max() / scale
        assert error < 2e-4, f"{name}: {error}"


# Its parts.


def test_time_is_embedded_as_diffusers_does():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    time = torch.tensor([0.0, 0.5, 13, 500, 999.75, 1000])
    expected = embeddings.get_timestep_embedding(time, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoids(time), expected, atol=1e-5, rtol=0)


@given(height=st.integers(1, 7), width=st.integers(1, 7), quarter=st.integers(1, 5))
@settings(max_examples=20)
def test_rotations_are_complex_ones(height, width, quarter):
    x = torch.randn(2, 3, height * width, 4 * quarter, dtype=torch.float64)
    ours = turned(x, *rotations(height, width, 4 * quarter).double())
    torch.testing.assert_close(ours, ref_rotate(x, width), atol=1e-5, rtol=1e-5)


def test_what_two_tokens_make_of_each_other_depends_on_rows_and_columns_between_them():
    height, width, head_dim = 6, 9, 16
    q, k = torch.randn(2, 1, head_dim).double()
    rotation = rotations(height, width, head_dim).double()
    q_all, k_all = (turned(x.expand(height * width, -1), *rotation) for x in (q, k))
    logits = (q_all @ k_all.T).view(height, width, height, width)
    torch.testing.assert_close(logits[1:, :, 1:], logits[:-1, :, :-1], atol=1e-5, rtol=0)  # both one row lower
    torch.testing.assert_close(logits[:, 1:, :, 1:], logits[:, :-1, :, :-1], atol=1e-5, rtol=0)
    assert (logits[0, 0, 1, 0] - logits[0, 0, 0, 0]).abs() > 1e-3  # and it does depend on each axis
    assert (logits[0, 0, 0, 1] - logits[0, 0, 0, 0]).abs() > 1e-3
    assert (logits[0, 0, 0, 1] - logits[0, 0, 1, 0]).abs() > 1e-3


def test_rotations_do_not_depend_on_the_size_of_the_image():
    small, large = rotations(3, 4, 16).view(2, 3, 4, 8), rotations(8, 5, 16).view(2, 8, 5, 8)
    torch.testing.assert_close(large[:, :3, :4], small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_torch_s_and_keeps_its_input_alone(dtype):
    x = (100 * torch.randn(3, 5, 64)).to(dtype).requires_grad_()
    ours, theirs = RMSNorm(64), torch.nn.RMSNorm(64, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    dy = torch.randn(3, 5, 64).to(dtype)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = ours(x)
    expected = theirs.double()(x.double())
    assert out.dtype == dtype
    tolerance = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 2 * torch.finfo(dtype).eps}
    if dtype != torch.float64:
        tolerance = {"atol": max(tolerance["atol"], 1e-6), "rtol": max(tolerance["rtol"], 1e-6)}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    grads = torch.autograd.grad(out, (x, *ours.parameters()), dy)
    expected_grads = torch.autograd.grad(expected, (x, *theirs.parameters()), dy.double())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max().item()
        limit = 8 * max(torch.finfo(dtype).eps, 1e-7) * scale
        torch.testing.assert_close(grad.double(), expected_grad.double(), atol=limit, rtol=0)
    assert [t.data_ptr() for t in kept.values() if t.numel() >= x.numel()] == [x.data_ptr()]


def test_triton_kernels_make_the_same_network():
    network, x, time = dit(**EVERYTHING, depth=1), latents(height=4, width=6), torch.tensor([3.0, 700.0])
    found = {}
    for impl in ("reference", "triton"):
        with dispatch.using(impl):
            out = network(x, time, **conditions())
        found[impl] = (out, *torch.autograd.grad(out.square().mean(), tuple(network.parameters())))
    for ours, wanted in zip(found["triton"], found["reference"], strict=True):
        assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_block_keeps_what_its_products_need_and_peaks_little_higher():
    """In tensors of the stream's size: q, k and v 3, q and k normed 2, of the MLP 16 / 3 and 8 / 3; and one each for
    the inputs of both branches, attention's output, both branches' results, the stream between them, and the result.
    """
    block, x, condition = DiTBlock(96, 2, 256), torch.randn(4, 64, 96).requires_grad_(), torch.randn(4, 96)
    rotation, unit = rotations(8, 8, 48), x.numel() * 4
    with LiveBytes() as memory:
        memory.watch(block, x, condition, rotation)
        before_bytes = memory.live_bytes
        y = block(x, condition, rotation)
        kept = (memory.live_bytes - before_bytes) / unit
        y.sum().backward()
    assert 20 < kept < 20.5  # 27.9 by plain operations
    assert (memory.peak_bytes - before_bytes) / unit < 26.5  # 33.8; mostly gradients within the MLP, 16 / 3 and 8 / 3


def test_queries_and_keys_are_normalised():
    block = dit(trained=False).layers[0]
    x, rotation = torch.randn(1, 6, 32), rotations(2, 3, 16)
    before = block.attention(x, rotation)
    with torch.no_grad():
        block.attention.qkv.weight[:64] *= 300  # of queries and keys: logits would be 90000 times as large
    torch.testing.assert_close(block.attention(x, rotation), before, atol=1e-5, rtol=1e-4)


# adaLN-zero.


def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero():
    torch.manual_seed(0)
    block = DiTBlock(32, 2, 64, context_dim=12)
    for linear in (block.modulation, block.cross_attention.out):  # a lone block is initialised by its network
        assert linear.weight.abs().max() > 0
    network = dit(trained=False, **EVERYTHING)
    x, condition, context = torch.randn(2, 6, 32), torch.randn(2, 32), torch.randn(2, 5, 12)
    for layer in network.layers:
        assert torch.equal(layer(x, condition, rotations(2, 3, 16), context), x)
    assert torch.equal(network(latents(), torch.tensor([0.0, 1000.0]), **conditions()), torch.zeros(2, 3, 8, 12))


def test_all_parameters_learn_although_much_begins_at_zero():
    network = dit(trained=False, **EVERYTHING)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(4):
        loss = (network(latents(seed=step), torch.tensor([100.0, 900.0]), **conditions()) - latents()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    assert not [name for name, p in network.named_parameters() if torch.equal(p, before[name])]


# Sizes.


@pytest.mark.parametrize("name, millions", [("S", 32.43), ("B", 129.45), ("L", 458.15)])
def test_named_sizes_have_the_parameters_of_the_paper(name, millions):
    dim, depth, heads = DIT_SIZES[name]
    with torch.device("meta"):
        network = DiT(dim=dim, depth=depth, heads=heads)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    published = {"S": 33, "B": 130, "L": 458}  # arXiv 2212.09748, table 1, for a plain MLP and patches of 2
    assert count / 1e6 == pytest.approx(published[name], rel=0.02)
    assert len(network.blocks()) == depth


@given(height=st.integers(1, 6), width=st.integers(1, 6), patch=st.integers(1, 3))
@settings(max_examples=25)
def test_any_height_and_width_that_the_patch_divides(height, width, patch):
    network = dit(patch=patch, depth=1)
    x = latents(1, height * patch, width * patch)
    out = network(x, torch.tensor(5.0))
    assert out.shape == x.shape and out.isfinite().all()
    transposed = network._image(network._patches(x), *x.shape[2:])
    assert torch.equal(transposed, x)


def test_batches_are_their_rows_and_time_may_be_a_scalar():
    network, x, given_conditions = dit(**EVERYTHING), latents(), conditions()
    time = torch.tensor([3.0, 700.0])
    together = network(x, time, **given_conditions)
    for i in range(2):
        row = {name: value[i : i + 1] for name, value in given_conditions.items()}
        torch.testing.assert_close(network(x[i : i + 1], time[i], **row), together[i : i + 1], atol=1e-4, rtol=1e-4)
    same = network(x, torch.tensor(7.0), **given_conditions)
    torch.testing.assert_close(same, network(x, torch.tensor([7.0, 7.0]), **given_conditions))


# Conditions.


def test_each_condition_matters():
    network, x, time = dit(**EVERYTHING), latents(), torch.tensor([3.0, 700.0])
    out = network(x, time, **conditions())
    others = conditions()
    others = {
        "labels": (others["labels"] + 1) % 5,
        "context": others["context"] * torch.tensor([1.0, -1.0] * 6),
        "context_mask": ~others["context_mask"] | (torch.arange(5) == 0),
        "pooled": others["pooled"] + 1,
        "size_ids": others["size_ids"] + 64,
    }
    for name, value in others.items():
        assert (network(x, time, **{**conditions(), name: value}) - out).abs().max() > 1e-3, name
    assert (network(x, time + 10, **conditions()) - out).abs().max() > 1e-3


def test_masked_tokens_are_not_looked_at():
    network, x, time, given_conditions = dit(**EVERYTHING), latents(), torch.tensor([3.0, 700.0]), conditions()
    out = network(x, time, **given_conditions)
    changed = torch.where(given_conditions["context_mask"][..., None], given_conditions["context"], 1e4)
    torch.testing.assert_close(network(x, time, **{**given_conditions, "context": changed}), out)
    shorter = {name: value[1:] for name, value in given_conditions.items()}
    shorter |= {"context": shorter["context"][:, :2], "context_mask": None}  # the second sample has two tokens
    torch.testing.assert_close(network(x[1:], time[1:], **shorter), out[1:], atol=1e-5, rtol=1e-5)


def test_a_sample_whose_tokens_are_all_masked_attends_to_nothing():
    network, x, time, given_conditions = dit(**EVERYTHING), latents(), torch.tensor([3.0, 700.0]), conditions()
    out = network(x, time, **{**given_conditions, "context_mask": torch.tensor([[True] * 5, [False] * 5])})
    nothing = {**given_conditions, "context": given_conditions["context"] * torch.tensor([1.0, 0.0])[:, None, None]}
    torch.testing.assert_close(out, network(x, time, **{**nothing, "context_mask": None}))
    grads = torch.autograd.grad(out.sum(), tuple(network.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 4, 8, 8)}, r"x has shape \[2, 4, 8, 8\], not \[B, 3, H, W\]"),
        ({"x": torch.randn(3, 8, 8)}, r"x has shape \[3, 8, 8\]"),
        ({"x": torch.randn(2, 3, 8, 9)}, "latents of 8x9 can't be cut into patches of 2x2"),
        ({"time": torch.zeros(3)}, r"time has shape \[3\] for 2 images"),
        ({"labels": None}, "built with num_classes, but got no labels"),
        ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, r"labels has shape \[2, 1\], not \[2\]"),
        ({"context": None, "context_mask": None}, "built with context_dim, but got no context"),
        ({"context": torch.randn(2, 5, 13)}, r"context has shape \[2, 5, 13\], not \[2, 5, 12\]"),
        ({"context": torch.randn(2, 12)}, r"context has shape \[2, 12\], not \[2, L, 12\]"),
        ({"context_mask": torch.ones(2, 4, dtype=torch.bool)}, r"torch.bool \[2, 4\], not torch.bool \[2, 5\]"),
        ({"context_mask": torch.ones(2, 5)}, r"context_mask is torch.float32"),
        ({"pooled": torch.randn(1, 7)}, r"pooled has shape \[1, 7\], not \[2, 7\]"),
        ({"size_ids": torch.randn(2, 5)}, r"size_ids has shape \[2, 5\], not \[2, 6\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    inputs = {"x": latents(), "time": torch.zeros(2), **conditions()} | change
    with pytest.raises(LowVRAMError, match=message):
        dit(**EVERYTHING)(inputs.pop("x"), inputs.pop("time"), **inputs)


@pytest.mark.parametrize("name", ["labels", "context", "pooled", "size_ids", "context_mask"])
def test_a_condition_that_would_be_ignored_is_refused(name):
    with pytest.raises(LowVRAMError, match=name):
        dit()(latents(), torch.zeros(2), **{name: conditions()[name]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 36, "heads": 2}, r"dim=36 with heads=2.*multiple of 4.*\n.*dim=32"),
        ({"heads": 0}, "heads=0"),
        ({"depth": 0}, "depth=0 is too small"),
        ({"patch": 0}, "patch=0 is too small"),
        ({"num_classes": 0}, "num_classes=0 is too small"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
    ],
)
def test_sizes_that_make_no_network_are_named(change, message):
    with pytest.raises(LowVRAMError, match=message):
        DiT(**{**TINY, **change})


# Widths of numbers.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_weights_and_autocast_stay_near_fp32(dtype):
    network, x, time, given_conditions = dit(**EVERYTHING), latents(), torch.tensor([3.0, 700.0]), conditions()
    out = network(x, time, **given_conditions)
    scale = out.std()

    def check(result, expected_dtype):
        assert result.dtype == expected_dtype
        # 0.04 standard deviations for bf16's 8 bits through two blocks, 0.005 for fp16's 11; typical, not largest
        error = (result.float() - out).square().mean().sqrt() / scale
        assert error < (0.04 if dtype == torch.bfloat16 else 0.005)

    check(network(x.to(dtype), time, **given_conditions), dtype)  # fp32 weights
    with torch.autocast("cpu", dtype=dtype):
        check(network(x, time, **given_conditions), torch.float32)
        check(network(x.to(dtype), time, **given_conditions), dtype)
    network.to(dtype)
    check(network(x, time, **given_conditions), torch.float32)  # narrow weights
    narrow = network(x.to(dtype), time, **given_conditions)
    check(narrow, dtype)
    grads = torch.autograd.grad(narrow.float().square().mean(), tuple(network.parameters()))
    assert all(grad.isfinite().all() and grad.dtype == dtype for grad in grads)


def test_large_fp16_values_do_not_overflow_in_norms():
    network = dit().half()
    out = network(200 * latents().half(), torch.tensor(3.0))  # the squares of the stream are beyond fp16
    assert out.isfinite().all()


# From outside.


def test_blocks_are_the_transformer_blocks_and_recomputing_them_is_exact():
    network, x, time, given_conditions = dit(**EVERYTHING), latents(), torch.tensor([3.0, 700.0]), conditions()
    blocks = find_blocks(network)
    assert blocks == {"layers.0": network.layers[0], "layers.1": network.layers[1]}
    parameters = tuple(network.parameters())
    plain = torch.autograd.grad(network(x, time, **given_conditions).square().mean(), parameters)
    with recomputing(list(blocks.values())):
        recomputed = torch.autograd.grad(network(x, time, **given_conditions).square().mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_it_learns_to_denoise():
    """Flow matching on two patterns, told apart by their class: far below what the best constant reaches."""
    torch.manual_seed(0)
    network = DiT(**TINY, num_classes=3)
    rows = torch.linspace(-2, 2, 8)
    patterns = torch.stack([rows[:, None].expand(8, 8), rows[None].expand(8, 8)])[:, None].expand(2, 3, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        labels = torch.randint(2, (16,))
        x0, eps, t = patterns[labels], torch.randn(16, 3, 8, 8), torch.rand(16)
        mixed = torch.lerp(x0, eps, t[:, None, None, None])
        loss = F.mse_loss(network(mixed, 1000 * t, labels=labels), eps - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.2  # zero is predicted: variance of noise, 1, and of the patterns
    assert sum(losses[-10:]) / 10 < 0.45
