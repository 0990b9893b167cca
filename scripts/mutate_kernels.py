"""Proves that the checks of the CUDA kernels can fail: plants fault after fault in a copy, and each must be found.

    python scripts/mutate_kernels.py [WORD ...]     only faults whose description contains one of the words

Runs on the emulation, without a GPU. Exit status 1 if a fault went unnoticed. That the tests pass without one is for
scripts/test to show.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "gpuxent/backends/kernels"
WORKERS = 2
PAIRS = "tests/test_cupy_pairs.py::test_every_kernel_in_every_order"
SHAPES = "tests/test_cupy.py::test_every_kernel_in_every_order"  # finds most faults within seconds


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str  # occurs once
    new: str
    test: str = SHAPES  # what has to find it


FAULTS = [
    Fault("no barrier after the warps' results", "groups.cu", "x;\n        __syncthreads();", "x;"),
    Fault("a warp more than there is", "groups.cu", "lane < warps ? of_warps[lane]", "lane <= warps ? of_warps[lane]"),
    Fault("a lane mask of half a warp", "groups.cu", "0xffffffffu", "0x0000ffffu"),
    Fault("two reductions in one slot", "groups.cu", "        ++slot;\n", ""),
    Fault(
        "a block that leaves its cluster",
        "groups.cu",
        "void leave() const { Cluster<count>::wait(); }",
        "void leave() const {}",
    ),
    Fault(
        "lanes that do not wait before they write",
        "groups.cu",
        "        __syncwarp();\n",
        "",
        "tests/test_cupy.py::test_odd_rows_in_place",
    ),
    Fault("a dropped tail", "formats.cu", "(count + per_vector - 1) / per_vector)", "count / per_vector)"),
    Fault(
        "16 bytes from anywhere", "formats.cu", "aligned(step == 1 && (size_t)first % 16 == 0)", "aligned(step == 1)"
    ),
    Fault(
        "a vector beyond the row",
        "formats.cu",
        "(vector + 2) * per_vector <= count",
        "(vector + 1) * per_vector <= count",
    ),
    Fault("words shifted by 4 bytes too few", "formats.cu", "past & 4 ?", "past & 16 ?"),
    Fault(
        "an offset in 32 bits",
        "task.cu",
        ": row * at.step",
        ": (int)((unsigned)row * (unsigned)at.step)",
        "tests/test_cupy.py::test_rows_more_than_2_to_the_31_elements_apart",
    ),
    Fault(
        "columns of a slice taken for those of the row",
        "task.cu",
        "label - task.vocab_start - begin",
        "label - begin",
        "tests/test_cupy.py::test_slices_of_the_vocabulary_with_rank",
    ),
    Fault(
        "softcap that makes classes of what is none",
        "task.cu",
        "if (column + i >= count) x[i]",
        "if (column + i > count) x[i]",
        "tests/test_cupy.py::test_features",
    ),
    Fault("a sum that is not brought to the maximum", "sums.cu", "others * scale;", "others;"),
    Fault("the maximum counted twice", "sums.cu", "alone ? sum : sum - 1.0", "sum"),
    Fault(
        "a NaN forgotten",
        "sums.cu",
        "nan = fmaf(part, 0.0f, nan);",
        "",
        "tests/test_losses.py::test_special_values",
    ),
    Fault(
        "the spread row read beyond its end",
        "sums.cu",
        "(how & any_spread) && column + i < count",
        "how & any_spread",
        "tests/test_cupy.py::test_features",
    ),
    Fault(
        "rounding that all terms share",
        "task.cu",
        "if (sizeof(logit_t) == 2 && !(how & with_temperature)) return",
        "return",
        "tests/test_losses.py::test_rounding_that_all_classes_share_does_not_add_up",
    ),
    Fault(
        "1 - p from p",
        "gradient.cu",
        "label_logit == stats.max ? stats.rest :",
        "false ? 0.0 :",
        "tests/test_losses.py::test_gradient_keeps_its_digits_at_the_label",
    ),
    Fault("a result written beyond the row", "gradient.cu", "if (column + i < slice.count) out", "out"),
    Fault(
        "a label's entry one class further",
        "gradient.cu",
        "(value_t)push.entry, push.label)",
        "(value_t)push.entry, push.label + 1)",
    ),
    Fault("a row that is not there", "resident.cu", "piece, row < task.rows);", "piece, true);"),
    Fault(
        "rows of others read while they are written",
        "resident.cu",
        "    if (row >= task.rows) piece.count = 0;\n    const Slice",
        "    const Slice",
        "tests/test_cupy.py::test_odd_rows_in_place",
    ),
    Fault(
        "a class within the piece taken for one of the row",
        "split.cu",
        "argmax : argmax + piece.begin",
        "argmax : argmax",
    ),
    Fault(
        "a row's divergences without the rounding of their logits' difference",
        "pairs.cu",
        "lost - by.ratio_low",
        "-by.ratio_low",
        "tests/test_pairs.py::test_close_models_however_far_their_logits_are_apart",
    ),
    Fault(
        "KL the wrong way round",
        "pairs.cu",
        "p_leads ? terms.ahead : terms.behind",
        "p_leads ? terms.behind : terms.ahead",
        PAIRS,
    ),
    Fault("JS without its cancellation", "pairs.cu", " - ahead * e;", ";", PAIRS),
    Fault("a class that only base has", "pairs.cu", "only_p ? infinity<double>() : kl", "kl", PAIRS),
    Fault(
        "one factor for both sides",
        "pairs.cu",
        "p_leads ? by.p_factor : by.q_factor",
        "by.p_factor",
        PAIRS,
    ),
    Fault(
        "the other side's labels",
        "pairs.cu",
        "q.look(BlockGroup<blocks>(), q_label)",
        "q.look(BlockGroup<blocks>(), p_label)",
        PAIRS,
    ),
    Fault("the other side kept over base's", "pairs.cu", "kept + p.slice.vectors", "kept", PAIRS),
    Fault(
        "what is beyond a row's end taken for a class",
        "pairs.cu",
        "v < slice.vectors ? (real)part[j] : -infinity<real>()",
        "v < slice.vectors ? (real)part[j] : (real)0",
        "tests/test_cupy_pairs.py::test_types",
    ),
    Fault("a block that takes its cluster's memory away", "pairs.cu", "    group.leave();\n", "", PAIRS),
    Fault(
        "logits before their temperature",
        "pairs.cu",
        "x[i * each + j] *= (real)task.inverse_temperature",
        "x[i * each + j] *= 1",
        "tests/test_cupy_pairs.py::test_transforms",
    ),
    Fault("sums of a warp that nobody adds up", "pairs.cu", "0.5 * group.reduce(tv, Sum())", "0.5 * tv", PAIRS),
]


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if not words or any(word in fault.what for word in words)]
    with ThreadPoolExecutor(WORKERS) as pool:
        missed = 0
        for fault, (caught, by) in zip(faults, pool.map(run, faults), strict=True):
            missed += not caught
            print(
                f"{'caught' if caught else 'MISSED'}  {fault.file:12} {fault.what}{': ' + by if caught else ''}",
                flush=True,
            )
    print(f"{len(faults) - missed} of {len(faults)} faults caught")
    return 1 if missed else 0


def run(fault: Fault) -> tuple[bool, str]:
    """(did a test fail, which) with this fault; one that does not compile, or cannot be planted, is an error."""
    with tempfile.TemporaryDirectory(prefix="gpuxent-fault-") as folder:
        copy = Path(folder)
        for name in ("gpuxent", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / KERNELS / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise SystemExit(f"{fault.what}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}")
        path.write_text(text.replace(fault.old, fault.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            fault.test,
            "-k",
            "cupy",
        ]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or "CompileError" in done.stdout:
        raise SystemExit(f"{fault.what}:\n{done.stdout}{done.stderr}")
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return bool(done.returncode), failed[0].rpartition("::")[2] if failed else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
