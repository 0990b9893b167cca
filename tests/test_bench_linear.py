"""The benchmark of linear cross-entropy: its quick run works, and what is wrong is not timed."""

import json

import numpy as np
import pytest
from conftest import ON_GPU
from typer.testing import CliRunner

import gpuxent as gx
from bench import linear, regression, torch_rivals
from bench.machine import ROOT


def on_gpu(test):
    return pytest.mark.gpu(test) if ON_GPU else test


def test_a_quick_run(tmp_path):
    result = CliRunner().invoke(linear.app, ["--quick", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "linear.json").read_text())
    parts = ["loss and gradients"] * 2 + ["loss", "memory"] + ["softmax regression"] * 2
    assert [figure["part"] for figure in data["figures"]] == parts
    assert all(np.isfinite(figure["value"]) and figure["value"] > 0 for figure in data["figures"])


@on_gpu
def test_a_quick_run_on_a_gpu(tmp_path, monkeypatch):
    if not ON_GPU:  # PyTorch on the CPU stands in for PyTorch on the GPU
        tensor = torch_rivals.tensor
        monkeypatch.setattr(torch_rivals, "tensor", lambda array: tensor(array.get()))
    result = CliRunner().invoke(linear.app, ["--quick", "--device", "gpu", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("linear-gpu-*.json")
    figures = json.loads(path.read_text())["figures"]
    assert {figure["part"] for figure in figures} == {"loss and gradients", "loss", "memory"}


@pytest.mark.parametrize("wrong", ["hidden", "classifier", "loss"])
def test_a_wrong_result_is_not_timed(wrong, monkeypatch):
    ours = linear.Problem.ours

    def slightly_off(problem):
        loss, grad = ours(problem)
        if wrong == "loss":
            return loss * 1.001, grad
        getattr(grad, wrong)[0] *= 1.01
        return loss, grad

    monkeypatch.setattr(linear.Problem, "ours", slightly_off)
    monkeypatch.setattr(linear, "times", lambda *arguments: pytest.fail("it was timed"))
    result = CliRunner().invoke(linear.app, ["--quick"])
    assert result.exit_code == 1
    assert "off by" in result.output or "the loss is" in result.output


def test_a_model_that_has_not_come_as_far_is_not_timed(monkeypatch):
    fit = regression.Problem.fit

    def stopped_early(problem, kind):
        model = fit(problem, kind)
        if kind is gx.SoftmaxRegression:
            model.coef_ *= 0.0
        return model

    monkeypatch.setattr(regression.Problem, "fit", stopped_early)
    monkeypatch.setattr(regression, "rounds", lambda *arguments: pytest.fail("it was timed"))
    result = CliRunner().invoke(linear.app, ["--quick"])
    assert result.exit_code == 1
    assert "the objective of float32 is" in result.output


def test_committed_results_are_of_a_full_run():
    data = json.loads((ROOT / "bench" / "results" / "linear.json").read_text())
    assert "--quick" not in data["command"]
    assert str(linear.Problem.full) in data["figures"][0]["what"]
    assert str(regression.FULL) in data["figures"][-1]["what"]
