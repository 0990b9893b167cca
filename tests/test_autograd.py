"""gpuxent.torch against torch.nn.functional: the same losses and gradients through autograd, on the tensors' memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import gpuxent.torch as gt
from gpuxent.interop import torch as interop

ROWS, VOCAB, FEATURES = 12, 17, 5
LABELS = torch.arange(ROWS) % VOCAB
LABELS[::5] = -100


def logits(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def gradients(loss, *tensors, upstream=None):
    return torch.autograd.grad(loss, tensors, upstream)


SHAPES = [((VOCAB,), ()), ((ROWS, VOCAB), (ROWS,)), ((3, VOCAB, 4), (3, 4)), ((2, VOCAB, 3, 2), (2, 3, 2))]
OPTIONS = [{}, {"label_smoothing": 0.1, "weight": True}, {"reduction": "none", "weight": True}, {"reduction": "sum"}]


@pytest.mark.parametrize(("shape", "of_labels"), SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_as_torch_has_it(shape, of_labels, soft, options):
    x = logits(*shape)
    if soft:
        y = torch.softmax(logits(*shape, seed=1).detach(), dim=min(1, len(shape) - 1))
    else:
        y = torch.randint(VOCAB, of_labels, generator=torch.Generator().manual_seed(2))
    if "weight" in options:
        options = options | {"weight": torch.linspace(0.1, 2, VOCAB, dtype=torch.float64)}
    ours, theirs = gt.cross_entropy(x, y, **options), F.cross_entropy(x, y, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    upstream = torch.rand_like(theirs)
    (a,), (b,) = gradients(ours, x, upstream=upstream), gradients(theirs, x, upstream=upstream)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    x = logits(ROWS, VOCAB, dtype=dtype)
    loss = gt.cross_entropy(x, LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == dtype
    wide = x.detach().double().requires_grad_()
    truth = F.cross_entropy(wide, LABELS)
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    x, hidden, head, bias = (
        logits(*shape, seed=i) for i, shape in enumerate([(ROWS, VOCAB), (ROWS, FEATURES), (VOCAB, FEATURES), (VOCAB,)])
    )
    options = {"reduction": reduction, "z_loss": 0.01, "softcap": 5.0, "label_smoothing": 0.1}
    assert gradcheck(lambda x: gt.cross_entropy(x, LABELS, **options), x)
    assert gradcheck(lambda *p: gt.linear_cross_entropy(p[0], p[1], LABELS, p[2], **options), (hidden, head, bias))
    targets = torch.rand(ROWS, VOCAB, dtype=torch.float64)
    assert gradcheck(lambda x: gt.binary_cross_entropy(x, targets, pos_weight=2.0, reduction=reduction), x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(reduction, with_bias):
    hidden, head = logits(2, 6, FEATURES), logits(VOCAB, FEATURES, seed=1)
    bias = logits(VOCAB, seed=2) if with_bias else None
    y = LABELS.reshape(2, 6)
    ours = gt.linear_cross_entropy(hidden, head, y, bias, reduction=reduction)
    theirs = F.cross_entropy(F.linear(hidden, head, bias).movedim(-1, 1), y, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    parameters = [hidden, head, *([bias] if with_bias else [])]
    upstream = torch.rand_like(theirs)
    for a, b in zip(
        gradients(ours, *parameters, upstream=upstream), gradients(theirs, *parameters, upstream=upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_only_what_needs_a_gradient_is_made():
    hidden, head = logits(ROWS, FEATURES).detach(), logits(VOCAB, FEATURES)
    loss = gt.linear_cross_entropy(hidden, head, LABELS)
    assert loss.grad_fn.grad.hidden is None
    loss.backward()
    assert head.grad is not None
    assert not gt.linear_cross_entropy(hidden, head.detach(), LABELS).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_binary(reduction):
    x, y = logits(ROWS, VOCAB), torch.rand(ROWS, VOCAB, dtype=torch.float64)
    weight = torch.linspace(0.5, 2, VOCAB, dtype=torch.float64)
    ours = gt.binary_cross_entropy(x, y, pos_weight=weight, reduction=reduction)
    theirs = F.binary_cross_entropy_with_logits(x, y, pos_weight=weight, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    upstream = torch.rand_like(theirs)
    (a,), (b,) = gradients(ours, x, upstream=upstream), gradients(theirs, x, upstream=upstream)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_upstream_gradients_of_any_strides():
    """stride 0 from expand, and every second of another tensor."""
    x = logits(ROWS, VOCAB)
    gt.cross_entropy(x, LABELS, reduction="none").sum().backward()
    (expected,) = gradients(F.cross_entropy(x, LABELS, reduction="sum"), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-14)
    upstream = torch.rand(2 * ROWS, dtype=torch.float64)[::2]
    (a,) = gradients(gt.cross_entropy(x, LABELS, reduction="none"), x, upstream=upstream)
    (b,) = gradients(F.cross_entropy(x, LABELS, reduction="none"), x, upstream=upstream)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_nothing_is_copied_on_the_way_in():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = logits(ROWS, VOCAB, dtype=dtype)
        array = interop._array(x)
        assert array.__array_interface__["data"][0] == x.data_ptr()
        assert interop._tensor(array).data_ptr() == x.data_ptr()
        assert interop._tensor(array).dtype == dtype


def test_a_gradient_twice_and_again():
    x = logits(ROWS, VOCAB)
    loss = gt.cross_entropy(x, LABELS)
    (a,) = torch.autograd.grad(loss, x, retain_graph=True)
    (b,) = torch.autograd.grad(loss, x)
    assert torch.equal(a, b)
    head = logits(VOCAB, FEATURES)
    loss = gt.linear_cross_entropy(logits(ROWS, FEATURES), head, LABELS)
    (a,) = torch.autograd.grad(3 * loss, head, retain_graph=True)
    (b,) = torch.autograd.grad(loss, head)
    torch.testing.assert_close(a, 3 * b)


def test_double_backward_is_refused():
    x = logits(ROWS, VOCAB)
    hidden, head = logits(ROWS, FEATURES), logits(VOCAB, FEATURES)
    targets = torch.rand(ROWS, VOCAB, dtype=torch.float64)
    for loss, of in (
        (gt.cross_entropy(x, LABELS), x),
        (gt.binary_cross_entropy(x, targets), x),
        (gt.linear_cross_entropy(hidden, head, LABELS), head),
        (gt.linear_cross_entropy(hidden, head, LABELS, reduction="none").sum(), hidden),
    ):
        (grad,) = torch.autograd.grad(loss, of, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()


def test_logits_that_were_written_to_are_noticed():
    x = logits(ROWS, VOCAB)
    y = x * 1
    loss = gt.cross_entropy(y, LABELS)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what it resumes with
def test_compile_does_not_break():
    head = torch.nn.Linear(FEATURES, VOCAB).double()
    hidden = logits(ROWS, FEATURES)

    def step(hidden):
        return 2 * gt.cross_entropy(head(hidden), LABELS) + gt.linear_cross_entropy(hidden, head.weight, LABELS)

    compiled = torch.compile(step, backend="eager")
    (expected,) = gradients(step(hidden), hidden)
    (found,) = gradients(compiled(hidden), hidden)
    torch.testing.assert_close(found, expected)


def test_a_model_learns_the_same():
    """Ten steps of SGD with our loss and with theirs."""

    def train(loss_of):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)).double()
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
        tokens = torch.randint(VOCAB, (4, 9))
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    theirs = train(lambda m, x, y: F.cross_entropy(m(x).transpose(1, 2), y))
    assert theirs[-1] < theirs[0]
    assert train(lambda m, x, y: gt.cross_entropy(m(x).transpose(1, 2), y)) == pytest.approx(theirs, rel=1e-10)
    fused = train(lambda m, x, y: gt.linear_cross_entropy(m[0](x), m[1].weight, y, m[1].bias))
    assert fused == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: gt.cross_entropy(x.detach().numpy(), LABELS), TypeError, "input must be a torch.Tensor, got numpy"),
        (lambda x: gt.cross_entropy(x, LABELS + VOCAB), IndexError, r"labels\[0\] is -83, expected a class"),
        (lambda x: gt.cross_entropy(x, LABELS[:3]), ValueError, "labels of dtype int64 must have shape"),
        (lambda x: gt.cross_entropy(x, LABELS, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda x: gt.cross_entropy(x, LABELS.to("meta")), ValueError, "target must be on the device of input, cpu"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(logits(ROWS, VOCAB))
