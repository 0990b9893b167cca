"""gpuxent.jax against the oracle, and against JAX's own derivatives of Optax's losses, under every transformation."""

import contextlib
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from makers import (
    FLOAT_DTYPES,
    SPECIAL_BATCHES,
    SPECIAL_BINARY,
    SPECIAL_ROWS,
    binary_logits,
    binary_targets,
    class_weight,
    labels,
    logits,
    soft_labels,
)
from oracle import assert_close

import gpuxent as gx
import gpuxent.jax as gj
from gpuxent.interop import _xla
from gpuxent.interop import jax as interop

ROWS, VOCAB, FEATURES = 12, 17, 5
REDUCTIONS = ["mean", "sum", "none"]
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "temperature": 1.5}
OPTIONS = [{}, {"class_weight": class_weight(VOCAB, np.float32)}, ALL_OPTIONS]
TRANSFORMS = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def x64_for(dtype):
    """JAX has no float64 unless it is told to."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def work_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def assert_gradient(actual, expected, dtype, eps=8):
    """Within so many eps, or the rounding to 16 bits; entries below the largest one are judged beside it."""
    expected = np.asarray(expected)
    assert actual.dtype == dtype
    largest = np.max(abs(expected), where=np.isfinite(expected), initial=0)
    assert_close(actual, expected, eps if np.dtype(dtype).itemsize > 2 else 0.51, dtype, floor=float(largest) / 8)


def assert_trees(actual, expected, rtol=1e-11, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, strict=True), actual, expected)


# ---- cross-entropy ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_loss_and_gradient(dtype, reduction, options, soft):
    x = logits(ROWS, VOCAB, dtype)
    y = soft_labels(ROWS, VOCAB, work_dtype(dtype)) if soft else labels(x, dtype=np.int32)
    upstream = np.linspace(-1, 2, ROWS).astype(np.float32) if reduction == "none" else np.float32(3)
    with x64_for(dtype):
        loss, pull = jax.vjp(jax.jit(lambda x: gj.cross_entropy(x, y, reduction=reduction, **options)), jnp.asarray(x))
        (dlogits,) = pull(jnp.asarray(upstream, loss.dtype))
    assert loss.dtype == work_dtype(dtype)
    eps = 4 if "softcap" not in options else 16  # the conditioning of tanh
    assert_close(loss, oracle.cross_entropy(x, y, reduction=reduction, **options), eps, work_dtype(dtype))
    expected = oracle.cross_entropy_grad(x, y, reduction=reduction, grad_output=upstream, **options)
    assert_gradient(dlogits, expected, dtype, 2 * eps)


@transforms
def test_as_optax(transform, x64):
    x, y = jnp.asarray(logits(ROWS, VOCAB, np.float64, kinds="ordinary")), jnp.arange(ROWS) % VOCAB

    def theirs(x):
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean() ** 2

    def ours(x):
        return transform(gj.cross_entropy)(x, y) ** 2

    expected = jax.value_and_grad(theirs)(x)
    for again in TRANSFORMS.values():
        assert_trees(again(jax.value_and_grad(ours))(x), expected)
        assert_trees(jax.value_and_grad(again(ours))(x), expected)
    pull = jax.vjp(ours, x)[1]
    assert_trees(pull(2.0), pull(2.0))


@pytest.mark.parametrize("options", [{}, {"class_weight": jnp.linspace(0.1, 2, VOCAB)}], ids=["plain", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("jitted", [False, True])
def test_vmap(options, reduction, jitted, x64):
    """Entry by entry, whatever is mapped: logits, labels, both, or upstream gradients alone."""
    x = jnp.stack([jnp.asarray(logits(ROWS, VOCAB, np.float64, seed, "ordinary")) for seed in range(3)])
    y = jnp.stack([jnp.asarray(labels(x[0], seed)) for seed in range(3)])

    def loss(x, y):
        return gj.cross_entropy(x, y, reduction=reduction, **options)

    def weighted(x, y):
        return jnp.sum(loss(x, y) * jnp.arange(1.0, 1 + jnp.size(loss(x, y))).reshape(jnp.shape(loss(x, y))))

    for f in (loss, jax.grad(weighted)):
        mapped = {axes: jax.vmap(f, axes) for axes in ((0, 0), (0, None), (None, 0))}
        for axes, g in mapped.items():
            given = [array if axis == 0 else array[0] for array, axis in zip((x, y), axes, strict=True)]
            entries = [f(x[i] if axes[0] == 0 else x[0], y[i] if axes[1] == 0 else y[0]) for i in range(3)]
            assert_trees((jax.jit(g) if jitted else g)(*given), jnp.stack(entries))
        both = jax.vmap(jax.vmap(f, (None, 0)), (0, None))(x, y)
        assert_trees(both, jnp.stack([jnp.stack([f(a, b) for b in y]) for a in x]))
    assert_trees(jax.grad(lambda x: jax.vmap(weighted)(x, y).sum())(x), jax.vmap(jax.grad(weighted))(x, y))


def test_vmap_of_upstream_gradients_and_of_weights(x64):
    x, y = jnp.asarray(logits(ROWS, VOCAB, np.float64, kinds="ordinary")), jnp.arange(ROWS) % VOCAB
    ours = jax.jacrev(lambda x: gj.cross_entropy(x, y, reduction="none"))(x)
    assert_trees(ours, jax.jacrev(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, y))(x))
    weights = jnp.stack([jnp.linspace(0.1, 2, VOCAB), jnp.ones(VOCAB)])
    for reduction in REDUCTIONS:
        f = jax.grad(lambda x, w: gj.cross_entropy(x, y, class_weight=w, reduction=reduction).sum())  # noqa: B023
        assert_trees(jax.vmap(f, (None, 0))(x, weights), jnp.stack([f(x, w) for w in weights]))


def test_vmap_of_losses_is_one_call(monkeypatch):
    calls = []
    loss = interop._loss
    monkeypatch.setattr(interop, "_loss", lambda *given, **arrays: calls.append(1) or loss(*given, **arrays))
    x = jnp.asarray(logits(ROWS, VOCAB))
    jax.vmap(lambda x, y: gj.cross_entropy(x, y, reduction="none"))(x, jnp.zeros(ROWS, int)).block_until_ready()
    assert len(calls) == 1


def test_inside_loops(x64):
    x, y = jnp.asarray(logits(ROWS, VOCAB, np.float64, kinds="ordinary")), jnp.arange(ROWS) % VOCAB

    def total(loss_of, scale):
        def step(total, given):
            return total + loss_of(scale * given[0], given[1]), None

        return jax.lax.scan(step, 0.0, (jnp.stack([x, x * 2]), jnp.stack([y, y + 1])))[0]

    def theirs(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    expected = jax.value_and_grad(lambda scale: total(theirs, scale))(1.5)
    assert_trees(jax.value_and_grad(lambda scale: total(gj.cross_entropy, scale))(1.5), expected)


@pytest.mark.parametrize("row", SPECIAL_ROWS, ids=lambda row: row.name)
def test_special_values(row):
    x = np.array([row.logits], np.float32)
    soft = isinstance(row.label, list)
    y = np.array([row.label], np.float32 if soft else np.int32)
    ours = jax.jit(jax.value_and_grad(lambda x: gj.cross_entropy(x, y, reduction="sum", **row.options)))
    loss, dlogits = ours(x)
    assert_close(loss, np.float64(row.loss), 4)
    assert_gradient(dlogits, np.array([row.gradient]), np.float32)


@pytest.mark.parametrize("batch", SPECIAL_BATCHES, ids=lambda batch: batch.name)
def test_special_batches(batch):
    x, y = np.array(batch.logits, np.float32).reshape(-1, 4), np.array(batch.labels, np.int32)
    for reduction, expected in (("none", batch.losses), ("sum", batch.sum), ("mean", batch.mean)):
        loss = jax.jit(lambda x: gj.cross_entropy(x, y, reduction=reduction, **batch.options))(x)  # noqa: B023
        assert_close(loss, np.array(expected, np.float64), 4)
    dlogits = jax.grad(lambda x: gj.cross_entropy(x, y, **batch.options))(x)
    gradient = np.array(batch.gradient, np.float64).reshape(-1, 4)
    assert_gradient(dlogits, gradient, np.float32)
    assert (dlogits[gradient == 0] == 0).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_labels_of_any_integer_type(dtype):
    x, y = logits(ROWS, VOCAB), (np.arange(ROWS) % VOCAB).astype(dtype)
    expected = gx.cross_entropy(x, y)
    for taken in (y, jnp.asarray(y)):
        assert gj.cross_entropy(x, taken) == np.float32(expected)
        assert jax.jit(gj.cross_entropy)(x, taken) == np.float32(expected)


def test_a_single_row_and_none():
    x = logits(1, VOCAB)[0]
    assert gj.cross_entropy(x, 3) == np.float32(gx.cross_entropy(x, 3))
    assert jax.grad(gj.cross_entropy)(x, 3).shape == (VOCAB,)
    assert jax.grad(gj.cross_entropy)(np.zeros((0, 4), np.float32), np.zeros(0, int)).shape == (0, 4)
    assert jax.vmap(gj.cross_entropy)(jnp.zeros((0, 3, 4)), jnp.zeros((0, 3), int)).shape == (0,)


# ---- memory ----


def test_nothing_is_copied_on_the_way_in(monkeypatch):
    seen = []

    def address(options, out, logits, **_):
        seen.append(logits.__array_interface__["data"][0])
        out[0][...] = 0

    monkeypatch.setattr(interop, "_loss", address)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        x = jnp.asarray(logits(ROWS, VOCAB), dtype)
        jax.jit(lambda x: gj.cross_entropy(x, jnp.zeros(ROWS, int)))(x).block_until_ready()  # JAX keeps what is patched
        assert seen.pop() == x.unsafe_buffer_pointer()


@pytest.mark.parametrize("loss_of", [gj.cross_entropy, lambda x, _: gj.binary_cross_entropy(x, jnp.ones(x.shape))])
def test_the_gradient_takes_the_place_of_logits_that_nobody_needs(loss_of):
    rows, vocab = 64, 4096
    kernel, hidden, y = jnp.ones((8, vocab)), jnp.ones((rows, 8)), jnp.zeros(rows, int)
    step = jax.jit(jax.grad(lambda kernel: loss_of(hidden @ kernel, y))).lower(kernel).compile()
    targets = 1 if loss_of is not gj.cross_entropy else 0
    assert step.memory_analysis().temp_size_in_bytes < (1.2 + targets) * 4 * rows * vocab


@transforms
def test_logits_that_are_needed_are_kept(transform):
    x, y = jnp.asarray(logits(ROWS, VOCAB, kinds="ordinary")), jnp.arange(ROWS) % VOCAB
    before = np.array(x)

    def both(loss_of, x):
        z = jnp.tanh(x)
        return loss_of(z, y) + jnp.sum(z**3) + 2 * loss_of(z, y[::-1]), z

    def theirs(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    found = transform(jax.value_and_grad(lambda x: both(gj.cross_entropy, x), has_aux=True))(x)
    assert_trees(found, jax.value_and_grad(lambda x: both(theirs, x), has_aux=True)(x), rtol=1e-5, atol=1e-6)
    own = before.copy()
    transform(jax.grad(gj.cross_entropy))(own, y).block_until_ready()
    transform(jax.grad(gj.cross_entropy))(x, y).block_until_ready()
    assert np.array_equal(x, before)
    assert np.array_equal(own, before)


def test_logits_that_are_their_own_labels():
    p = jnp.asarray(soft_labels(ROWS, VOCAB))
    frozen = np.array(p)
    for ours in (gj.cross_entropy, gj.binary_cross_entropy):
        found = jax.jit(lambda p: jax.grad(lambda p: ours(p, jax.lax.stop_gradient(p)))(p * 1))(p)  # noqa: B023
        assert_trees(found, jax.grad(lambda x: ours(x, frozen))(p), 0, 0)  # noqa: B023


# ---- linear ----


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = ((ROWS, FEATURES), (VOCAB, FEATURES), (VOCAB,))
    return [jnp.asarray(rng.normal(0, 1, shape).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@transforms
def test_linear(reduction, with_bias, transform, x64):
    given, y = parameters()[: 2 + with_bias], jnp.asarray(labels(np.zeros((ROWS, VOCAB))))

    def ours(hidden, classifier, bias=None):
        loss = gj.linear_cross_entropy(hidden, classifier, y, bias=bias, reduction=reduction)
        return (loss * jnp.linspace(3, 2, loss.size).reshape(loss.shape)).sum()

    def theirs(hidden, classifier, bias=0.0):
        rows = optax.softmax_cross_entropy_with_integer_labels(hidden @ classifier.T + bias, jnp.maximum(y, 0))
        rows = jnp.where(y < 0, 0, rows)
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (y >= 0).sum()}[reduction]
        return (loss * jnp.linspace(3, 2, loss.size).reshape(loss.shape)).sum()

    for wrt in (tuple(range(len(given))), (0,), (1,)):
        found = jax.value_and_grad(transform(ours), wrt)(*given)
        assert_trees(found, jax.value_and_grad(theirs, wrt)(*given))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda t: np.dtype(t).name)
def test_linear_dtypes_and_options(dtype):
    hidden, classifier, bias = (np.asarray(array).astype(dtype) for array in parameters(np.float32))
    y = soft_labels(ROWS, VOCAB, work_dtype(dtype))
    options = {**ALL_OPTIONS, "class_weight": class_weight(VOCAB)}
    wide = [array.astype(np.float64) for array in (hidden, classifier, bias)]
    loss, grad = gx.linear_cross_entropy_and_grad(*wide[:2], y, bias=wide[2], **options)

    def ours(hidden, classifier, bias):
        return gj.linear_cross_entropy(hidden, classifier, y, bias=bias, memory=1000, **options)

    with x64_for(dtype):
        found, grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(hidden, classifier, bias)
    assert_close(found, loss, 32, work_dtype(dtype))
    for own, expected in zip(grads, vars(grad).values(), strict=True):
        assert_gradient(np.asarray(own), expected, dtype, 64)


def test_only_the_gradients_that_are_wanted_are_made(monkeypatch):
    made = []
    real = interop.linear_cross_entropy_and_grad

    def noted(*arrays, **options):
        made.append(options["wrt"])
        return real(*arrays, **options)

    monkeypatch.setattr(interop, "linear_cross_entropy_and_grad", noted)
    hidden, classifier, _ = parameters(np.float32)
    y = jnp.zeros(ROWS, int)
    jax.grad(lambda c: gj.linear_cross_entropy(hidden, c, y))(classifier).block_until_ready()
    jax.jit(jax.grad(lambda h: gj.linear_cross_entropy(h, classifier, y, reduction="none").sum()))(hidden)
    jax.jit(lambda: gj.linear_cross_entropy(hidden, classifier, y))().block_until_ready()
    assert made == [("classifier",), ("hidden",)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_under_vmap(reduction, x64):
    hidden, classifier, bias = parameters()
    y, many = jnp.arange(ROWS) % VOCAB, jnp.stack([hidden, 2 * hidden, hidden - 1])

    def loss(hidden, classifier, bias):
        return gj.linear_cross_entropy(hidden, classifier, y, bias=bias, reduction=reduction).sum()

    grad = jax.value_and_grad(loss, (0, 1, 2))
    entries = [grad(hidden, classifier, bias) for hidden in many]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)
    assert_trees(jax.jit(jax.vmap(grad, (0, None, None)))(many, classifier, bias), expected)
    summed = jax.grad(lambda c: jax.vmap(loss, (0, None, None))(many, c, bias).sum())(classifier)
    assert_trees(summed, expected[1][1].sum(0))


# ---- binary ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, VOCAB), (2, 3, VOCAB)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_binary(dtype, reduction, shape, weighted):
    x, y = binary_logits(shape, dtype), binary_targets(shape, np.float32, ignore_index=-1)
    weights = {"pos_weight": 2.5, "class_weight": class_weight(VOCAB, np.float32) if len(shape) > 1 else 0.5}
    options = {"reduction": reduction, "ignore_index": -1, **(weights if weighted else {})}
    upstream = np.linspace(-1, 2, x.size).reshape(shape) if reduction == "none" else np.float64(3)
    upstream = upstream.astype(np.float32)
    with x64_for(dtype):
        loss, pull = jax.vjp(jax.jit(lambda x: gj.binary_cross_entropy(x, y, **options)), jnp.asarray(x))
        (dlogits,) = pull(jnp.asarray(upstream, loss.dtype))
    assert loss.dtype == work_dtype(dtype)
    assert_close(loss, oracle.binary_cross_entropy(x, y, **options), 4, work_dtype(dtype))
    expected = oracle.binary_cross_entropy_grad(x, y, grad_output=upstream, **options)
    assert_gradient(dlogits, expected, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@transforms
def test_binary_as_optax(reduction, transform, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, (3, ROWS, VOCAB)))
    y = jnp.asarray(np.random.default_rng(1).random(x.shape))

    def ours(x, y):
        return gj.binary_cross_entropy(x, y, reduction=reduction).sum()

    def theirs(x, y):
        losses = optax.sigmoid_binary_cross_entropy(x, y)
        return losses.mean() if reduction == "mean" else losses.sum()

    expected = jax.vmap(jax.value_and_grad(theirs))(x, y)
    assert_trees(jax.vmap(jax.value_and_grad(transform(ours)))(x, y), expected)
    assert_trees(transform(jax.vmap(jax.value_and_grad(ours)))(x, y), expected)
    assert_trees(jax.vmap(jax.grad(transform(ours)))(x[0], y[0]), jax.vmap(jax.grad(theirs))(x[0], y[0]))


@pytest.mark.parametrize("special", SPECIAL_BINARY, ids=lambda special: special.name)
def test_special_binary_values(special):
    y = np.array([[special.target]], np.float32)
    ours = jax.jit(
        jax.value_and_grad(lambda x: gj.binary_cross_entropy(x, y, reduction="sum", **special.options)),
    )
    loss, dlogits = ours(np.array([[special.logit]], np.float32))
    tiny = np.finfo(np.float32).smallest_normal  # what is below, XLA's threads take for 0
    expected = [0 if abs(value) < tiny else value for value in (special.loss, special.gradient)]
    assert_close(loss, np.float64(expected[0]), 4)
    assert_gradient(dlogits, np.array([[expected[1]]]), np.float32)


# ---- what is refused ----

X, Y, WEIGHT = logits(ROWS, VOCAB), np.arange(ROWS) % VOCAB, np.ones(VOCAB, np.float32)
TOO_LARGE = jnp.asarray(Y + VOCAB)
HIDDEN, CLASSIFIER = np.ones((ROWS, FEATURES), np.float32), np.ones((VOCAB, FEATURES), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: gj.cross_entropy(None, Y), TypeError, "logits must be"),
        (
            lambda x: gj.cross_entropy(object(), Y),
            TypeError,
            "logits must be a JAX or NumPy array, got builtins.object",
        ),
        (lambda x: gj.cross_entropy(x, None), TypeError, "labels must be"),
        (lambda x: gj.cross_entropy(x.astype(jnp.int8), Y), TypeError, "logits must be float16.*got int8"),
        (lambda x: gj.cross_entropy(x, Y[:3]), ValueError, r"labels of dtype int64 must have shape \(12,\)"),
        (lambda x: gj.cross_entropy(x, jnp.zeros((3, 2))), ValueError, "labels of dtype float32 are soft"),
        (lambda x: gj.cross_entropy(x, Y, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda x: gj.cross_entropy(x, Y, temperature=x[0, 0]), TypeError, "temperature must be a number above 0"),
        (lambda x: gj.cross_entropy(x, Y, ignore_index=[1]), TypeError, "ignore_index must be an integer"),
        (lambda x: gj.cross_entropy(x, x, ignore_index=1), ValueError, "ignore_index must be left at its default"),
        (
            lambda x: gj.cross_entropy(x, Y, class_weight=WEIGHT[:3]),
            ValueError,
            r"class_weight must have shape \(17,\)",
        ),
        (lambda x: gj.cross_entropy(x, Y, class_weight=-WEIGHT), ValueError, r"class_weight\[0\] is -1"),
        (lambda x: gj.cross_entropy(x, TOO_LARGE), IndexError, r"labels\[0\] is 17, expected a class"),
        (lambda x: gj.cross_entropy(x, Y + 2**32), IndexError, r"labels\[0\] is 4294967296, expected a class"),
        (lambda x: gj.linear_cross_entropy(HIDDEN, x, Y), ValueError, r"classifier must have shape \(vocab, 5\)"),
        (lambda x: gj.linear_cross_entropy(HIDDEN, CLASSIFIER, Y + VOCAB), IndexError, r"labels\[0\] is 17"),
        (lambda x: gj.linear_cross_entropy(HIDDEN, CLASSIFIER, Y, memory=0), ValueError, "memory must be"),
        (lambda x: gj.binary_cross_entropy(x, Y), ValueError, "targets must have the shape of logits"),
        (lambda x: gj.binary_cross_entropy(x, x, pos_weight=-1), ValueError, "pos_weight is -1, expected"),
        (lambda x: gx.cross_entropy(x, Y), TypeError, r"use gpuxent.jax.*or numpy.asarray\(logits\)"),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_what_is_known_is_refused_at_once(call, error, message, jitted):
    with pytest.raises(error, match=message):
        jax.eval_shape(call, X) if jitted else call(jnp.asarray(X))


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (gj.cross_entropy, (X, Y + VOCAB), r"IndexError: labels\[0\] is 17, expected a class in \[0, 17\)"),
        (gj.cross_entropy, (X, X), r"ValueError: labels\[0, :\] .* expected probabilities that sum to 1"),
        (lambda x, w: gj.cross_entropy(x, Y, class_weight=w), (X, -WEIGHT), r"ValueError: class_weight\[0\] is -1"),
        (gj.binary_cross_entropy, (X, X + 300), r"ValueError: targets\[0, :\] has 17 entries outside"),
        (gj.linear_cross_entropy, (HIDDEN, CLASSIFIER, Y - 1), r"IndexError: labels\[0\] is -1, expected a class"),
    ],
)
def test_what_is_found_when_it_is_computed(call, given, message):
    for again in (jax.jit(call), jax.jit(jax.value_and_grad(call))):
        with pytest.raises((RuntimeError, ValueError), match=message):  # JAX's choice
            jax.block_until_ready(again(*map(jnp.asarray, given)))


def test_unchecked_labels_outside_the_vocabulary_have_an_infinite_loss():
    x = np.zeros((ROWS, VOCAB), np.float32)
    for y in (Y + VOCAB, Y - 1 - VOCAB, Y + 2**32):
        for of in (gj.cross_entropy, jax.jit(gj.cross_entropy, static_argnames=("reduction", "check_labels"))):
            taken = y if of is gj.cross_entropy else np.clip(y, -1000, 1000)  # jit itself takes 64 bits for 32
            assert (of(x, taken, reduction="none", check_labels=False) == np.inf).all()


def test_no_gradient_of_labels_and_weights():
    soft = jnp.asarray(soft_labels(ROWS, VOCAB))
    for f, given in (
        (lambda y: gj.cross_entropy(X, y), soft),
        (lambda w: gj.cross_entropy(X, Y, class_weight=w), WEIGHT),
        (lambda y: gj.linear_cross_entropy(HIDDEN, CLASSIFIER, y), soft),
        (lambda y: gj.binary_cross_entropy(X, y), soft),
        (lambda w: gj.binary_cross_entropy(X, soft, pos_weight=w), 2.0),
    ):
        for grad in (jax.grad(f), jax.jit(jax.grad(jax.checkpoint(f)))):
            with pytest.raises(TypeError, match=r"there is no gradient of (labels|targets|class_weight|pos_weight)"):
                grad(given)
        assert not np.any(jax.grad(lambda a: f(jax.lax.stop_gradient(a)))(given))  # noqa: B023


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (lambda x: gj.cross_entropy(x, Y), X),
        (lambda x: gj.cross_entropy(x, Y, reduction="none").sum(), X),
        (lambda x: gj.binary_cross_entropy(x, np.zeros_like(X)), X),
        (lambda h: gj.linear_cross_entropy(h, CLASSIFIER, Y), HIDDEN),
        (lambda c: gj.linear_cross_entropy(HIDDEN, c, Y, reduction="none").sum(), CLASSIFIER),
    ],
)
def test_other_derivatives_are_refused(loss, given):
    for transform in TRANSFORMS.values():
        twice = jax.grad(lambda x: transform(jax.grad(loss))(x).sum())  # noqa: B023
        for derivative in (twice, jax.jit(twice), jax.hessian(transform(loss))):
            with pytest.raises(TypeError, match="cannot be differentiated again"):
                derivative(jnp.asarray(given))
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(transform(loss), (given,), (given,))


# ---- how XLA calls ----


def test_a_call_is_compiled_once(caplog):
    def run():
        return [gj.cross_entropy(X, Y), jax.grad(gj.cross_entropy)(X, Y), gj.binary_cross_entropy(X, np.zeros_like(X))]

    jax.block_until_ready(run())
    with jax.log_compiles():
        jax.block_until_ready(run())
        assert not caplog.records
        jax.block_until_ready(gj.cross_entropy(X, Y, z_loss=0.125))
        assert caplog.records


def run_child(code, cores=None, **environment):
    """In a process of its own, which has to end."""
    first = f"import os; os.sched_setaffinity(0, {cores}); os.environ.update({environment})" if cores else ""
    first = first or f"import os; os.environ.update({environment})"
    done = subprocess.run(
        [sys.executable, "-c", first + "\n" + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


STRESS = """
    import threading, jax, jax.numpy as jnp, numpy as np, gpuxent.jax as gj
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 20000), dtype=np.float32))
    y = jnp.arange(256)

    @jax.jit
    def step(x):
        def loss(x):
            z = x * 1.5
            return gj.cross_entropy(z, y) + gj.cross_entropy(z + 1, y, reduction="none").sum()
        loss, grad = jax.value_and_grad(loss)(x)
        return x - grad, loss

    z = x
    for _ in range(30):  # each waits for the one before, and nobody for them
        z, loss = step(z)
    chained = float(loss)
    many = [step(x + i)[1] for i in range(30)]  # all at once
    seen = [float(loss) for loss in many]

    def work(results):
        results += [float(step(x + i)[1]) for i in range(4)]

    results = [[] for _ in range(6)]
    threads = [threading.Thread(target=work, args=(own,)) for own in results]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(chained, *seen[:4])
    assert all(own == seen[:4] for own in results)
"""


def test_many_calls_in_flight_on_one_core_and_on_all():
    """With jax.pure_callback this hangs on one core: np.asarray waits for the thread that it runs on."""
    assert run_child(STRESS, cores={min(os.sched_getaffinity(0))}) == run_child(STRESS)


def test_shard_map():
    """Gradients of what all devices share are added up."""
    run_child(
        """
        import jax, jax.numpy as jnp, numpy as np, optax, gpuxent.jax as gj
        from jax.sharding import AxisType, PartitionSpec as P
        mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
        rng = np.random.default_rng(0)
        hidden, head = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((8, 5), (17, 5)))
        y = jnp.arange(8)

        def sharded(loss):
            local = lambda *arrays: jax.lax.psum(loss(*arrays), "devices")
            specs = (P("devices"), P(), P("devices"))
            return jax.jit(jax.value_and_grad(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()), (0, 1)))

        def theirs(hidden, head, y):
            return optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, y).sum()

        ours = (
            lambda hidden, head, y: gj.cross_entropy(hidden @ head.T, y, reduction="sum"),
            lambda hidden, head, y: gj.linear_cross_entropy(hidden, head, y, reduction="sum"),
        )
        for loss in ours:
            for found in (sharded(loss), jax.jit(jax.value_and_grad(loss, (0, 1)))):
                expected = jax.value_and_grad(theirs, (0, 1))(hidden, head, y)
                for a, b in zip(jax.tree.leaves(found(hidden, head, y)), jax.tree.leaves(expected), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_on_a_gpu(reduction, monkeypatch):
    """What is called gets arrays of CuPy, or of what takes its place."""
    cupy = pytest.importorskip("cupy")
    hidden, classifier, _ = parameters(np.float32)
    cases = [
        (lambda x: gj.cross_entropy(x, Y, reduction=reduction, class_weight=WEIGHT, **ALL_OPTIONS), X),
        (lambda x: gj.cross_entropy(x, jnp.asarray(soft_labels(ROWS, VOCAB)), reduction=reduction), X),
        (lambda x: gj.binary_cross_entropy(x, np.zeros_like(X), pos_weight=WEIGHT, reduction=reduction), X),
        (lambda h: gj.linear_cross_entropy(h, classifier, Y, reduction=reduction), hidden),
        (lambda c: gj.linear_cross_entropy(hidden, c, Y, reduction=reduction), classifier),
    ]
    expected = [jax.vjp(f, x) for f, x in cases]
    expected = [(loss, pull(jnp.ones_like(loss))) for loss, pull in expected]

    @contextlib.contextmanager
    def memory(context, buffer):
        written = []

        def brought(buffer):
            host = np.asarray(buffer)
            device = cupy.asarray(host)
            if buffer.writeable:
                written.append((host, device))
            return device

        yield brought
        for host, device in written:
            host[...] = device.get()

    monkeypatch.setattr(_xla, "_memory", memory)
    for (f, x), wanted in zip(cases, expected, strict=True):
        loss, pull = jax.vjp(f, x)
        assert_trees((loss, pull(jnp.ones_like(loss))), wanted, rtol=1e-5, atol=1e-6)
