"""A causal language model of `transformers` learns the same from our losses as from its own, and is scored alike.

The model is made from its configuration and small: nothing is downloaded, and a connection is an error. In float32,
where its own loss rounds too: what is allowed is a few times what was measured.
"""

import math
import socket

import numpy as np
import pytest
import torch

import gpuxent as gx
import gpuxent.torch as gt

VOCAB, LENGTH, STEPS = 5003, 64, 20
RNG = np.random.default_rng(0)
LENGTHS = np.array([64, 63, 40, 2, 1, 57])  # of the documents; one predicts a single token, one nothing
COUNTED = np.arange(LENGTH) < LENGTHS[:, None]
FREQUENT = (VOCAB * RNG.random(COUNTED.shape) ** 3).astype(np.int64)
TOKENS = torch.tensor(np.where(COUNTED, FREQUENT, 0))
LABELS = torch.tensor(np.where(COUNTED, FREQUENT, -100))
MASK = torch.tensor(COUNTED)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def never(*_):
        raise AssertionError("this test must not connect to anything")

    monkeypatch.setattr(socket.socket, "connect", never)


def a_model(tied):
    """The same at every call. `tied`: the classifier is the embedding, whose gradient then has two sources."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds: not in every worker that collects this file

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": LENGTH}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **layers, initializer_range=0.2, tie_word_embeddings=tied))


def its_own(model):
    return model(TOKENS, attention_mask=MASK, labels=LABELS).loss


def from_logits(model):
    logits = model(TOKENS, attention_mask=MASK).logits
    return gt.cross_entropy(logits[:, :-1].movedim(-1, 1), LABELS[:, 1:])


def from_hidden_states(model):
    hidden = model.model(TOKENS, attention_mask=MASK).last_hidden_state
    return gt.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, LABELS[:, 1:])


def gradients(model, loss_of):
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def train(model, loss_of):
    # Not Adam: it divides rounding errors by themselves where a gradient is nearly 0. Nor steps so long that the loss
    # jumps: rounding then grows a thousandfold within twenty, on some CPUs beyond what is asserted.
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True], ids=["own classifier", "tied"])
@pytest.mark.parametrize("ours", [from_logits, from_hidden_states])
def test_gradient_of_every_parameter(ours, tied):
    expected, expected_grads = gradients(a_model(tied), its_own)
    loss, grads = gradients(a_model(tied), ours)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        size = grad.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-5 * size, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tied", [False, True], ids=["own classifier", "tied"])
@pytest.mark.parametrize("ours", [from_logits, from_hidden_states])
def test_it_learns_the_same(ours, tied):
    expected = train(a_model(tied), its_own)
    assert expected[-1] < 0.7 * expected[0]
    assert train(a_model(tied), ours) == pytest.approx(expected, rel=1e-4)


def test_perplexity():
    """Of a model that has learnt something: its logits, and its hidden states with its classifier."""
    model = a_model(tied=False)
    train(model, from_hidden_states)
    with torch.no_grad():
        expected = math.exp(its_own(model).item())
        logits = model(TOKENS, attention_mask=MASK).logits[:, :-1].numpy()
        hidden = model.model(TOKENS, attention_mask=MASK).last_hidden_state[:, :-1].numpy()
    labels, classifier = LABELS[:, 1:].numpy(), model.lm_head.weight.detach().numpy()
    assert expected < VOCAB / 10
    assert gx.perplexity(logits, labels) == pytest.approx(expected, rel=1e-6)
    assert gx.perplexity(gx.linear_logits(hidden, classifier), labels) == pytest.approx(expected, rel=1e-5)
