"""Cross-entropy from probabilities, with labels in the form that the caller names."""

import numpy as np
import oracle
import pytest
from makers import FLOAT_DTYPES, REFERENCE_NLL, REFERENCE_PROBS, class_weight, probabilities, soft_labels
from oracle import assert_close

import gpuxent as gx

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: np.dtype(d).name)
FORMATS = pytest.mark.parametrize("label_format", ["index", "onehot", "soft"])


def test_reference_values():
    for row in REFERENCE_PROBS:
        probs, label = np.array([row.values]), np.array([row.label])
        for labels, form in ((label, "index"), (np.eye(3)[label], "onehot"), (np.eye(3)[label], "soft")):
            loss = gx.cross_entropy_from_probs(probs, labels, label_format=form)
            assert_close(loss, np.float64(row.loss), 4, np.float64)
    for p, loss in REFERENCE_NLL:
        actual = gx.cross_entropy_from_probs(np.array([[p, 1 - p]]), np.array([0]), label_format="index")
        assert round(float(actual), 3) == loss


@DTYPES
@FORMATS
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_the_oracle(dtype, label_format, weighted, reduction, home):
    probs = probabilities(16, 50, dtype, kinds="ordinary")
    index = np.random.default_rng(0).integers(0, 50, 16)
    if label_format == "index":
        index[::5] = -100
    options = {"reduction": reduction} | ({"class_weight": class_weight(50)} if weighted else {})
    labels = {
        "index": index,
        "onehot": np.eye(50, dtype=np.int8)[np.abs(index) % 50],
        "soft": soft_labels(16, 50, np.float32),
    }
    actual = gx.cross_entropy_from_probs(home.put(probs), labels[label_format], label_format=label_format, **options)
    truth = oracle.cross_entropy_from_probs(probs, labels["soft"] if label_format == "soft" else index, **options)
    assert_close(home.compute(actual), truth, 4, np.float64 if dtype is np.float64 else np.float32)


def test_probability_0(home):
    probs = np.array([[0.0, 1.0]])
    for labels, form, loss in (
        (np.array([0]), "index", np.inf),
        (np.array([1]), "index", 0.0),
        (np.array([[0.0, 1.0]]), "soft", 0.0),
        (np.array([[0.5, 0.5]]), "soft", np.inf),
        (np.array([[True, False]]), "onehot", np.inf),
    ):
        assert home.compute(gx.cross_entropy_from_probs(home.put(probs), labels, label_format=form)) == loss


def test_agrees_with_the_loss_from_logits():
    x = np.random.default_rng(0).normal(0, 2, (20, 300))
    y = np.arange(20)
    assert_close(
        gx.cross_entropy_from_probs(gx.softmax(x), y, label_format="index"), gx.cross_entropy(x, y), 8, np.float64
    )


def test_the_form_is_never_guessed(home):
    probs = home.put(np.full((3, 4), 0.25))
    with pytest.raises(TypeError, match="label_format"):
        gx.cross_entropy_from_probs(probs, np.zeros(3, int))
    with pytest.raises(ValueError, match="label_format must be one of 'index', 'onehot', 'soft', got 'auto'"):
        gx.cross_entropy_from_probs(probs, np.zeros(3, int), label_format="auto")
    with pytest.raises(TypeError, match="index labels must be integers, got dtype float64"):
        gx.cross_entropy_from_probs(probs, np.zeros(3), label_format="index")
    with pytest.raises(TypeError, match="soft labels must be floats, got dtype int64"):
        gx.cross_entropy_from_probs(probs, np.zeros((3, 4), int), label_format="soft")


def test_errors(home):
    good = np.full((3, 4), 0.25)
    onehot = np.eye(4)[[0, 1, 2]]
    for row, found in (
        ([1, 1, 0, 0], "has 2 entries equal to 1 and 0 entries other than 0 and 1"),
        ([0, 0, 0, 0], "has 0 entries equal to 1"),
        ([0.5, 0.5, 0, 0], "has 0 entries equal to 1 and 2 entries other than 0 and 1"),
    ):
        bad = onehot.copy()
        bad[1] = row
        with pytest.raises(ValueError, match=rf"labels\[1, :\] {found}"):
            home.compute(gx.cross_entropy_from_probs(home.put(good), bad, label_format="onehot", check_labels=False))
    bad = good.copy()
    bad[2, 0] += 0.1
    with pytest.raises(ValueError, match=r"probs\[2, :\] sums to 1.1, expected probabilities that sum to 1"):
        home.compute(gx.cross_entropy_from_probs(home.put(bad), np.zeros(3, int), label_format="index"))
    with pytest.raises(ValueError, match=r"labels\[2, :\] sums to 1.1"):
        home.compute(gx.cross_entropy_from_probs(home.put(good), bad, label_format="soft"))
    with pytest.raises(IndexError, match=r"labels\[1\] is 4, expected a class in \[0, 4\) or ignore_index=-100"):
        home.compute(gx.cross_entropy_from_probs(home.put(good), np.array([0, 4, 1]), label_format="index"))
    with pytest.raises(ValueError, match="ignore_index must be left at its default for soft labels, got 3"):
        gx.cross_entropy_from_probs(home.put(good), good, label_format="soft", ignore_index=3)


def test_divergences_where_one_model_is_almost_sure():
    """ln(p / q) where p is far below q: 1 + (p - q) / q is 0 in floating point, and its logarithm is not."""
    p, q = np.array([[1e-20, 1.0]]), np.array([[0.5, 0.5]])
    assert_close(np.asarray(gx.kl_divergence_from_probs(p, q)), np.array([np.log(2)]), 4, np.float64)
    js = (np.log(1 / 0.75) + 0.5 * (np.log(0.5 / 0.25) + np.log(0.5 / 0.75))) / 2
    assert_close(np.asarray(gx.js_divergence_from_probs(p, q)), np.array([js]), 8, np.float64)
