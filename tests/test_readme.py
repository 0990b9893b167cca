"""The README's Python runs, and says what it is said to compute."""

import re
from pathlib import Path

import numpy as np

import gpuxent as gx

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
        if "lazy.compute()" in block:
            assert abs(names["lazy"].compute() - names["loss"]) < 1e-6
            assert names["result"].scored == 460
            assert (names["kl"] > 0).all()
        if "SoftmaxRegression" in block:
            assert names["model"].score(names["features"], names["classes"]) > 0.5
            assert abs(names["model"].loss_curve_[-1] - names["online"].loss_curve_[-1]) < 0.05
            assert np.allclose(names["lazy"].compute(), names["model"].predict_proba(names["features"]))
        if "calibration." in block:
            assert abs(names["fit"].temperature - 2) < 4 * names["fit"].stderr_iid
            assert names["check"].helps
            assert names["found"].ece.low > 0.1
            assert names["each"].classes == (3, 17)
            assert abs(names["scaling"].scale.mean() - 0.5) < 0.05
            assert (
                abs(gx.evaluate(names["mended"], names["words"]).cross_entropy - names["scaling"].cross_entropy) < 1e-12
            )
            assert names["scaled"].helps
        if "gx.linear_cross_entropy" in block:
            assert (
                abs(names["loss"] - gx.cross_entropy(names["hidden"] @ names["classifier"].T, names["labels"])) < 1e-4
            )
            assert names["grad"].classifier.shape == (32000, 64)
    assert (names["head"].weight.grad != 0).any()
    assert names["kernel"].shape == names["grad"].shape == (64, 1000)
    assert len(blocks) == 8
    assert names["logits"].shape == (2, 8, 50)


def test_what_the_readme_names_exists():
    for name in set(re.findall(r"gx\.([A-Za-z_]+)", README)) | set(re.findall(r"gpuxent\.([a-z_]+)\(", README)):
        assert hasattr(gx, name), name
