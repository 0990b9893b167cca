"""The emulation of CUDA: right results in every schedule, and each of its diagnoses on a kernel that deserves it."""

import re
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import emulation
import ml_dtypes
import numpy as np
import pytest
from emulation import Fault, check_canaries, schedule

HEAD = """
__device__ __forceinline__ char* shared_memory() {
#ifdef GPUXENT_EMULATED
    return emulation::shared_memory();
#else
    extern __shared__ uint4 everything[];
    return reinterpret_cast<char*>(everything);
#endif
}
"""
SCHEDULES = pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])


@pytest.fixture(autouse=True)
def cupy():
    yield emulation.module
    check_canaries()


def kernel(body: str, parameters: str = "int* x", before: str = "") -> object:
    """The kernel `k` of that body."""
    code = f'{HEAD}\n{before}\nextern "C" __global__ void k({parameters}) {{\n{body}\n}}'
    return emulation.module.RawModule(code=code, options=("-std=c++17",)).get_function("k")


def run(
    body: str, block: int = 32, grid: int = 1, size: int = 256, shared_mem: int = 0, before: str = ""
) -> np.ndarray:
    """What a kernel leaves in `int x[size]`, first all -1."""
    x = emulation.module.full(size, -1, np.int32)
    kernel(body, before=before)((grid,), (block,), (x,), shared_mem=shared_mem)
    return x.get()


# ------------------------------------------------------------------------------------------------ what runs, runs right
SUM = """
template <typename T> __global__ __launch_bounds__(256)
void row_sums(const T* __restrict__ x, double* __restrict__ sums, int n) {
    double* of_warp = reinterpret_cast<double*>(shared_memory());
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    double sum = 0;
    #pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[(long long)blockIdx.x * n + i];
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = lane < warps ? of_warp[lane] : 0;
        for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) sums[blockIdx.x] = sum;
    }
}
"""


@SCHEDULES
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_reduction(cupy, order, dtype):
    name = {np.float32: "row_sums<float>", np.int64: "row_sums<long long>"}[dtype]
    module = cupy.RawModule(code=HEAD + SUM, options=("-std=c++17",), name_expressions=(name,))
    x = np.random.default_rng(0).integers(-1000, 1000, (5, 1237)).astype(dtype)
    sums = cupy.empty(5)
    with schedule(order, seed=3):
        module.get_function(name)((5,), (256,), (cupy.asarray(x), sums, np.int32(1237)), shared_mem=64)
    assert sums.get().tolist() == x.sum(1).tolist()


@SCHEDULES
def test_a_cluster_reads_its_peers(cupy, order):
    code = (
        HEAD
        + """
    extern "C" __global__ __cluster_dims__(4, 1, 1) void k(const int* x, int* out) {
        int* mine = reinterpret_cast<int*>(shared_memory());
        mine[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
        emulation::cluster_sync();
        int sum = 0;
        for (int rank = 0; rank < 4; ++rank) sum += emulation::peer(mine, rank)[threadIdx.x];
        out[blockIdx.x * blockDim.x + threadIdx.x] = sum + 1000 * (int)emulation::cluster_rank();
        emulation::cluster_sync();
    }"""
    )
    x = np.arange(12 * 64, dtype=np.int32).reshape(12, 64)
    out = cupy.empty_like(cupy.asarray(x))
    with schedule(order):
        cupy.RawKernel(code, "k")((12,), (64,), (cupy.asarray(x), out), shared_mem=256)
    sums = x.reshape(3, 4, 64).sum(1, keepdims=True) + 1000 * np.arange(4)[:, None]
    assert np.array_equal(out.get(), sums.reshape(12, 64))


@SCHEDULES
def test_warp_operations(order):
    with schedule(order):
        x = run("""
        const int lane = threadIdx.x;
        x[lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
        x[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 3, 16);
        x[64 + lane] = __shfl_sync(0xffffffffu, lane, 5, 8);
        x[96 + lane] = __any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane < 31);
        x[128 + lane] = __reduce_max_sync(0xffffffffu, lane ^ 21);
        x[160 + lane] = __reduce_add_sync(0xffffffffu, lane);
        if (lane < 8) x[192 + lane] = __shfl_xor_sync(0xffu, lane, 1);
        else x[192 + lane] = __shfl_xor_sync(0xffffff00u, lane, 2);
        x[224 + lane] = __match_any_sync(0xffffffffu, lane / 30);
        """)
    lane = np.arange(32)
    assert (x[:32] == 0x49249249).all()
    assert x[32:64].tolist() == np.where(lane % 16 < 3, lane, lane - 3).tolist()
    assert x[64:96].tolist() == (lane // 8 * 8 + 5).tolist()
    assert (x[96:128] == 1).all()
    assert (x[128:160] == 31).all()
    assert (x[160:192] == 496).all()
    assert x[192:224].tolist() == np.where(lane < 8, lane ^ 1, lane ^ 2).tolist()
    assert x[224:].view(np.uint32).tolist() == [0x3FFFFFFF] * 30 + [0xC0000000] * 2


@SCHEDULES
def test_atomics(cupy, order):
    body = """
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(sum, (double)i);
    atomicAdd(count, 1ull);
    atomicMax(top, (int)(i * 7 % 101));
    if (atomicAdd(next, 1u) == gridDim.x * blockDim.x - 1) *last = 1;
    """
    arrays = [cupy.zeros(1, t) for t in (np.float64, np.uint64, np.int32, np.uint32, np.int32)]
    with schedule(order):
        kernel(body, "double* sum, unsigned long long* count, int* top, unsigned* next, int* last")((3,), (64,), arrays)
    assert [a.item() for a in arrays] == [192 * 191 / 2, 192, 100, 192, 1]


def test_sixteen_bits(cupy):
    """Conversions round as ml_dtypes and NumPy do."""
    body = """
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        halves[i] = __float2half_rn(x[i]);
        brains[i] = __float2bfloat16_rn(x[i]);
        from_double[i] = __double2bfloat16(y[i]);
        const __half2 pair = __floats2half2_rn(x[i], -x[i]);
        back[i] = __high2float(pair) + __half22float2(pair).x + __bfloat162float(brains[i]);
    }"""
    rng = np.random.default_rng(1)
    middles = (np.arange(1, 400) * 2.0**-8 + 1) * (1 + rng.choice([-1, 0, 1], 399) * 1e-12)
    y = np.concatenate(
        [middles, rng.normal(0, 10.0 ** rng.integers(-9, 5, 4000)), [np.inf, -np.inf, np.nan, 0.0, -0.0]]
    )
    x = y.astype(np.float32)
    made = [cupy.empty(x.size, t) for t in (np.uint16, np.uint16, np.uint16, np.float32)]
    kernel(
        body,
        "const float* x, const double* y, __half* halves, __nv_bfloat16* brains, __nv_bfloat16* from_double,"
        "float* back, int n",
        "#include <cuda_fp16.h>\n#include <cuda_bf16.h>",
    )((1,), (32,), (cupy.asarray(x), cupy.asarray(y), *made, np.int32(x.size)))
    halves, brains, from_double, back = (a.get() for a in made)
    with np.errstate(all="ignore"):
        assert np.array_equal(halves.view(np.float16), x.astype(np.float16), equal_nan=True)
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(brains.view(ml_dtypes.bfloat16).astype(np.float32), want, equal_nan=True)
    finite = np.isfinite(halves.view(np.float16))
    assert np.array_equal(back[finite], want[finite])
    # Rounded once: no other bfloat16 is nearer.
    once = from_double.view(ml_dtypes.bfloat16)
    finite = np.isfinite(y)
    error = np.abs(once.astype(np.float64)[finite] - y[finite])
    for towards in (-np.inf, np.inf):
        other = np.nextafter(once[finite], ml_dtypes.bfloat16(towards)).astype(np.float64)
        assert (error <= np.abs(other - y[finite])).all()
    assert np.array_equal(once[-5:].astype(np.float64), y[-5:], equal_nan=True)


def test_conversions_to_integers(cupy):
    body = "to_int[threadIdx.x] = __float2int_rn(x[threadIdx.x]); to_ull[threadIdx.x] = __float2ull_rd(x[threadIdx.x]);"
    x = cupy.asarray([2.5, -1.5, 3e9, -3e30, np.nan, 7.9], np.float32)
    to_int, to_ull = cupy.empty(6, np.int32), cupy.empty(6, np.uint64)
    kernel(body, "const float* x, int* to_int, unsigned long long* to_ull")((1,), (6,), (x, to_int, to_ull))
    assert to_int.get().tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 8]
    assert to_ull.get().tolist() == [2, 0, 3 * 10**9, 0, 2**63, 7]


def test_records_by_value_and_null_pointers(cupy):
    kind = np.dtype([("data", np.uint64), ("scale", np.float64), ("n", np.int32)], align=True)
    code = """
    struct Task { const double* data; double scale; int n; };
    extern "C" __global__ void k(const Task task, double* out, const double* none) {
        if (threadIdx.x < task.n) out[threadIdx.x] = none ? 0 : task.data[threadIdx.x] * task.scale;
    }"""
    x, out = cupy.arange(5, dtype=np.float64), cupy.empty(5)
    task = np.array((x.data.ptr, 3.0, 5), kind)
    launch = cupy.RawKernel(code, "k")
    launch((1,), (32,), (task, out, 0))
    assert out.get().tolist() == [0, 3, 6, 9, 12]
    with pytest.raises(Fault, match="argument 0 is a record of 8 bytes where the kernel takes a struct of 24 bytes"):
        launch((1,), (32,), (np.array((1,), [("data", np.uint64)]), out, 0))


# ------------------------------------------------------------------------------------------------- what a GPU lets pass
MISSING_BARRIER = """
int* shared = reinterpret_cast<int*>(shared_memory());
shared[threadIdx.x] = threadIdx.x;
{barrier}
x[threadIdx.x] = shared[(threadIdx.x + {step}) % blockDim.x];
"""


@SCHEDULES
@pytest.mark.parametrize(("step", "barrier"), [(1, "__syncwarp();"), (32, "__syncthreads();")])
def test_a_missing_barrier_is_a_race(order, step, barrier):
    block = 64 if step == 32 else 32
    with schedule(order):
        whole = run(MISSING_BARRIER.format(step=step, barrier=barrier), block, shared_mem=256)
        assert whole[:block].tolist() == np.roll(np.arange(block), -step).tolist()
        race = (
            r"k: block \(0, 0, 0\), thread \(\d+, 0, 0\): race: (read|write) of byte \d+ of a block's shared memory of"
        )
        with pytest.raises(Fault, match=race) as caught:
            run(MISSING_BARRIER.format(step=step, barrier=""), block, shared_mem=256)
    assert "kernel.cu:" in str(caught.value)


def test_a_race_in_an_array():
    """Such as a gradient written over logits that another thread has yet to read."""
    with pytest.raises(Fault, match="race: read of byte 0 of an array of 1024 bytes"):
        run("x[threadIdx.x] = 1; x[32 + threadIdx.x] = x[0];")
    with pytest.raises(Fault, match="race: write of byte 4 of an array"):
        run("if (threadIdx.x < 2) x[1] = threadIdx.x;")
    with pytest.raises(Fault, match="race: atomic update of byte 0 of an array"):
        run("if (threadIdx.x == 0) x[0] = 7; atomicAdd(x, 1);")
    run("atomicAdd(x, 1); __syncthreads(); if (threadIdx.x == 9) x[0] = 7;")
    run("x[0] = 7;")  # all the same: no harm


def test_a_schedule_shows_what_no_barrier_orders():
    """Whole lanes run one after another, so the order of atomics is that of the schedule."""
    seen = set()
    for order in ("forward", "backward", "shuffled"):
        with schedule(order):
            seen.add(tuple(run("const int at = atomicAdd(x, 1) + 1; x[1 + at] = threadIdx.x;", 64)[1:65].tolist()))
    assert len(seen) == 3


WAITING = {
    "if (threadIdx.x < 40) __syncthreads(); else __syncwarp();": (
        r"deadlock: 40 of 64 threads wait at __syncthreads .*; 24 of 64 threads wait at __syncwarp with mask ffffffff"
    ),
    "if (threadIdx.x != 3) __syncwarp();": "__syncwarp with mask ffffffff waits for lane 3, which has ended",
    "x[0] = __shfl_xor_sync(0xffu, 1, 1);": r"thread \(8, 0, 0\): a shuffle with mask 000000ff, which leaves out",
    "__syncwarp(threadIdx.x < 16 ? ~0u : 0xffff0000u);": "waits for lane 16, which has ended",
    "x[0] = __shfl_sync(threadIdx.x < 16 ? 0xffffu : 0xffff0000u, 1, 20);": "reads lane 20, which takes no part",
    "if (threadIdx.x < 16) __any_sync(~0u, 1); else __shfl_sync(~0u, 1, 0);": "a vote at .* meets a shuffle of lane 16",
    "if (threadIdx.x < 50) __syncwarp(threadIdx.x < 32 ? ~0u : 0x3ffffu); else __syncwarp();": (
        "waits for lane 0, which has ended"
    ),
    "emulation::cluster_sync(); if (threadIdx.x) __syncthreads(); else emulation::cluster_sync();": (
        "deadlock: 1 of 64 threads wait at a barrier of the cluster .*; 63 of 64 threads wait at __syncthreads"
    ),
}


@pytest.mark.parametrize(("body", "message"), WAITING.items())
def test_threads_that_wait_for_ever(body, message):
    with pytest.raises(Fault, match=message) as caught:
        run(body, 64)
    assert re.search(r"at kernel\.cu:\d+", str(caught.value))


def test_threads_that_have_ended_count_as_arrived():
    x = run("if (threadIdx.x >= 32) return; __syncthreads(); x[threadIdx.x] = 1;", 64)
    assert x[:33].tolist() == [1] * 32 + [-1]


def test_a_warp_of_less_than_32_lanes():
    with pytest.raises(Fault, match="waits for lane 20, which does not exist"):
        run("__syncwarp();", 20)
    assert run("x[threadIdx.x] = __ballot_sync(0xfffffu, 1);", 20)[0] == 0xFFFFF


@pytest.mark.parametrize("size", [3, 64, 1000, 4096])
@pytest.mark.parametrize(("at", "where"), [("n", "0 bytes behind the end"), ("-1", "4 bytes before")])
@pytest.mark.parametrize("what", ["read", "write"])
def test_one_element_beyond_an_array(cupy, size, at, where, what):
    x = cupy.zeros(size, np.float32)
    body = f"const int at = {at}; " + ("x[0] = x[at];" if what == "read" else "x[at] = 1;")
    message = rf"{what} of 4 bytes from {where} (of )?an array of {4 * size} bytes at kernel\.cu:\d+"
    with pytest.raises(Fault, match=message):
        kernel(body, "float* x, int n")((1,), (1,), (x, np.int32(size)))


def test_far_beyond_an_array(cupy):
    for at in (2**40, -(2**40)):
        with pytest.raises(Fault, match=r"from 0x\w+, near no array at kernel\.cu:"):
            kernel("x[0] = x[at];", "float* x, long long at")((1,), (1,), (cupy.zeros(3, np.float32), at))
    with pytest.raises(Fault, match="null pointer"):
        kernel("x[0] = 1;", "float* x")((1,), (1,), (0,))


def test_what_numpy_functions_write_beside_an_array_is_found(cupy):
    x = cupy.zeros(5, np.float32)
    np.lib.stride_tricks.as_strided(x._host, (6,))[5] = 1
    with pytest.raises(Fault, match="4 bytes just outside an array of 20 bytes were written"):
        check_canaries()
    np.lib.stride_tricks.as_strided(x._host, (8,))[5:].view(np.uint8)[:4] = 0xA5


def test_shared_memory_ends_where_it_ends():
    body = "shared_memory()[threadIdx.x + {}] = 0;"
    run(body.format(0), 32, shared_mem=32)
    with pytest.raises(
        Fault, match="write of 1 bytes from 0 bytes behind the end of a block's shared memory of 32 bytes"
    ):
        run(body.format(1), 32, shared_mem=32)
    assert np.isnan(run("x[0] = *reinterpret_cast<int*>(shared_memory());", 1, shared_mem=8).view(np.float32)[0])


def test_a_peer_that_has_not_started_or_has_ended(cupy):
    code = (
        HEAD
        + """
    extern "C" __global__ __cluster_dims__(2, 1, 1) void k(int* x, int first, int last) {
        int* mine = reinterpret_cast<int*>(shared_memory());
        if (threadIdx.x == 0) *mine = blockIdx.x;
        BEFORE
        if (blockIdx.x == 0) x[threadIdx.x] = *emulation::peer(mine, 1);
        AFTER
    }"""
    )
    barrier = "emulation::cluster_sync();"

    def launch(before, after):
        x = cupy.empty(32, np.int32)
        whole = code.replace("BEFORE", before).replace("AFTER", after)
        cupy.RawKernel(whole, "k")((2,), (32,), (x, np.int32(0), np.int32(0)), shared_mem=16)
        return x.get()

    assert launch(barrier, barrier).tolist() == [1] * 32
    with pytest.raises(Fault, match="block 1 may not have started"):
        launch("", barrier)
    with schedule("backward"), pytest.raises(Fault, match="access to byte 0 of a block's shared memory of 16 bytes"):
        launch(barrier + "if (blockIdx.x == 1) return; __syncthreads();", "")


def test_misaligned_vectors(cupy):
    x = cupy.zeros(16, np.float32)
    load = kernel("*y = *reinterpret_cast<const float4*>(x);", "const float* x, float4* y")
    load((1,), (1,), (x[4:], cupy.empty(4, np.float32)))
    with pytest.raises(Fault, match=r"misaligned address 0x\w+, not a multiple of 16, at kernel\.cu:"):
        load((1,), (1,), (x[1:], cupy.empty(4, np.float32)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x[0] = x[0] * x[1];", "signed integer overflow in a multiplication at kernel.cu:"),
        ("x[0] = 1 << x[1];", "shift by more bits than there are"),
        ("x[0] = 5 / x[2];", "division by zero"),
        ("int local[4] = {}; for (int i = 0; i <= x[3]; ++i) local[i] = i; x[0] = local[1];", "index out of bounds"),
        ("x[0] = *reinterpret_cast<bool*>(shared_memory());", "value that its type does not have"),
        ("x[0] = (int)(x[0] * 4.0f);", "conversion of NaN or of too large a number to an integer at kernel.cu:"),
        ("assert(x[1] < 32);", r"assert\(x\[1\] < 32\)"),
        ("if (x[1] == 40) __trap();", r"__trap\(\)"),
    ],
)
def test_undefined_behaviour(cupy, body, message):
    with pytest.raises(Fault, match=message):
        kernel(body)((1,), (1,), (cupy.asarray([2**30, 40, 0, 4], np.int32),), shared_mem=16)


def test_other_threads_can_launch():
    """Dask's, say: one after another."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(f"__syncthreads(); x[threadIdx.x] = {i % 3};", 64)[:64], range(20)))
    assert [set(x.tolist()) for x in found] == [{i % 3} for i in range(20)]
    with ThreadPoolExecutor(1) as pool, pytest.raises(Fault, match="race"):
        pool.submit(run, "x[0] = threadIdx.x;").result()


def test_a_launch_that_does_not_end(cupy, monkeypatch):
    monkeypatch.setattr(emulation, "seconds", 1)
    for body in ("while (*reinterpret_cast<volatile int*>(x) == -1);", "for (volatile int i = 0; ; i = 1) x[0] = 1;"):
        with pytest.raises(Fault, match=r"no end after 1 seconds, at kernel\.cu:"):
            run(body, 1)


def test_a_fault_leaves_nothing_behind():
    for _ in range(3):
        with pytest.raises(Fault):
            run("if (threadIdx.x == 5) x[10000] = 1; __syncthreads();", 64)
        assert run("__syncthreads(); x[threadIdx.x] = 1;", 64)[:64].tolist() == [1] * 64


def test_code_that_nvrtc_would_not_take():
    from emulation.compiler import CompileError

    for body in (
        "x[0] = INFINITY;",
        "x[0] = (int32_t)1;",
        "x[0] = INT_MAX;",
        "__shared__ int s[4]; x[0] = s[0];",
        "x[0] = std::max(1, 2);",
    ):
        with pytest.raises(CompileError, match="error"):
            run(body)


# ------------------------------------------------------------------------------------------------------------- launches
def test_arguments_are_checked(cupy):
    x = cupy.zeros(4, np.float32)
    launch = kernel("x[0] = n + f + b;", "float* x, int n, double f, bool b")
    launch((1,), (1,), (x, np.int32(1), 2.0, True))
    launch((1,), (1,), (x, np.uint32(1), np.float64(2), np.bool_(True)))
    assert x[0].item() == 4
    for args, message in (
        ((x, 1, 2.0, True), "argument 1 is a int64 where the kernel takes i4"),
        ((x, np.int32(1), 2, True), "argument 2 is a int64 where the kernel takes f8"),
        ((x, np.int32(1), np.float32(2), True), "argument 2 is a float32"),
        ((x, np.int32(1), 2.0, 1), "argument 3 is a int64 where the kernel takes b1"),
        (
            (x.astype(np.float64), np.int32(1), 2.0, True),
            r"argument 0 is an array of float64 where the kernel takes f4\*",
        ),
        ((np.float32(1), np.int32(1), 2.0, True), "argument 0 is a float32 where the kernel takes a pointer"),
        ((x, x, 2.0, True), "argument 1 is an array where the kernel takes i4"),
        ((x, np.int32(1), 2.0), "3 arguments, the kernel takes 4"),
    ):
        with pytest.raises(Fault, match=message):
            launch((1,), (1,), args)
    for bad in (None, np.zeros(4, np.float32), "x"):
        with pytest.raises(TypeError, match="Unsupported type"):
            launch((1,), (1,), (bad, np.int32(1), 2.0, True))


def test_limits_of_a_launch(cupy):
    x = cupy.zeros(4, np.int32)
    launch = kernel("x[0] = (int)blockDim.x;")
    for grid, block, shared, message in (
        ((1,), (1025,), 0, "too large a block"),
        ((1,), (32, 64), 0, "too large a block"),
        ((0,), (32,), 0, "an empty launch"),
        ((1, 65536), (32,), 0, "too large a grid"),
        ((2**31,), (32,), 0, "too large a grid"),
        ((1,), (32,), 48 * 1024 + 1, "shared memory is limited to 49152 bytes"),
    ):
        with pytest.raises(Fault, match=message):
            launch(grid, block, (x,), shared_mem=shared)
    with pytest.raises(Fault, match="at most 232448"):
        launch.max_dynamic_shared_size_bytes = 228 * 1024
    launch.max_dynamic_shared_size_bytes = 100000
    launch((1,), (1,), (x,), shared_mem=100000)
    with pytest.raises(TypeError, match="tuples"):
        launch(1, 32, (x,))


def test_what_the_kernel_declares_limits_a_launch(cupy):
    code = """
    namespace inner {
    template <int n> constexpr int most = 32 * n;
    constexpr int ranks = 2;
    // k(x) has two blocks; __global__ void k(
    template <typename T, int n> __global__ __cluster_dims__(ranks, 1, 1) __launch_bounds__(most<n>, 2) void k(T* x) {
        if (blockIdx.x == 1 && threadIdx.x == 0) *x = emulation::cluster_size() * 100 + emulation::cluster_rank();
    }
    }"""
    launch = cupy.RawModule(code=code, name_expressions=["inner::k<int, 2>"]).get_function("inner::k<int, 2>")
    x = cupy.zeros(1, np.int32)
    launch((2,), (64,), (x,))
    assert x.item() == 201
    assert launch.max_threads_per_block == 64
    with pytest.raises(Fault, match="__launch_bounds__ is 64"):
        launch((2,), (65,), (x,))
    with pytest.raises(Fault, match="no multiple of the cluster of 2 blocks"):
        launch((3,), (64,), (x,))


# ------------------------------------------------------------------------------------ elementwise and reduction kernels
@SCHEDULES
def test_elementwise(cupy, order):
    k = cupy.ElementwiseKernel(
        "T x, raw float64 table, int64 n, float32 f",
        "T z, int64 at",
        "z = twice(x) + table[i % table.size()] * n; at = i; if (f > 1.5f) z = -z",
        "some_name",
        preamble="template <typename T> __device__ T twice(T x) { return 2 * x; }",
    )
    x, table = np.arange(12.0).reshape(3, 4), np.arange(5.0)
    with schedule(order):
        z, at = k(cupy.asarray(x).T, cupy.asarray(table), 10, 1.0)
        out = cupy.empty((4, 3)), cupy.empty((4, 3), np.int64)
        same = k(cupy.asarray(x).T, cupy.asarray(table)[::-1], 10, 2.0, *out)
        row = k(cupy.asarray(x[0]), cupy.asarray(table), np.int64(10), 1)
    index = np.arange(12).reshape(4, 3)
    assert np.array_equal(z.get(), 2 * x.T + table[index % 5] * 10)
    assert np.array_equal(at.get(), index)
    assert same[0] is out[0]
    assert np.array_equal(out[0].get(), -(2 * x.T + table[::-1][index % 5] * 10))
    assert row[0].shape == (4,)


def test_elementwise_rules(cupy):
    k = cupy.ElementwiseKernel("T x, T y", "T z", "z = x + y", "add")
    x, y = cupy.ones((3, 1)), cupy.ones(4)
    assert k(x, y).shape == (3, 4)
    assert k(x, 2)[0].item() == 3
    with pytest.raises(TypeError, match="Type is mismatched"):
        k(x, y.astype(np.float32))
    with pytest.raises(ValueError, match="Loop size is undecided"):
        k(1.0, 2.0)
    with pytest.raises(ValueError, match="Out shape is mismatched"):
        k(y, y, cupy.empty(1))
    assert k(x, x, cupy.empty((3, 2))).shape == (3, 2)  # outputs take part in the broadcast
    with pytest.raises(TypeError, match="Wrong number of arguments"):
        k(x)
    with pytest.raises(TypeError, match="Unsupported type"):
        k(x, np.ones(4))
    assert k(cupy.ones((0, 3)), 1.0).shape == (0, 3)
    raw = cupy.ElementwiseKernel("raw T x", "raw T z", "z[i] = x[i] * 2", "double_it")
    assert raw(y, size=4).get().tolist() == [2] * 4
    with pytest.raises(ValueError, match="Loop size is undecided"):
        raw(y)
    with pytest.raises(Fault, match="0 bytes behind the end of an array of 32 bytes"):
        raw(y, size=5)
    with pytest.raises(ValueError, match="Can not use 'i'"):
        cupy.ElementwiseKernel("T i", "T z", "z = i", "bad")


@SCHEDULES
def test_reduction(cupy, order):
    k = cupy.ReductionKernel("T x, float64 shift", "T y", "x - shift", "a + b", "y = a * 2", "0", "sums")
    x = np.random.default_rng(0).integers(-9, 9, (3, 4, 50)).astype(np.float64)
    with schedule(order):
        for axis in (None, 0, 1, -1, (0, 2), (1, 0)):
            for keepdims in (False, True):
                want = 2 * (x - 1).sum(axis, keepdims=keepdims)
                assert np.array_equal(k(cupy.asarray(x), 1, axis=axis, keepdims=keepdims).get(), want)
        assert np.array_equal(k(cupy.asarray(x)[:, ::2, ::-3], 1.0, axis=1).get(), 2 * (x[:, ::2, ::-3] - 1).sum(1))
        assert k(cupy.ones((3, 0)), 1.0, axis=1).get().tolist() == [0, 0, 0]


STATE = """
struct State {
    double max, rest;
    __device__ State() : max(-1e308), rest(0) {}
    __device__ State(double x) : max(x), rest(0) {}
};
__device__ State merged(const State& p, const State& q) {
    State s;
    s.max = p.max > q.max ? p.max : q.max;
    s.rest = (1 + p.rest) * exp(p.max - s.max) + (1 + q.rest) * exp(q.max - s.max) - 1;
    return s;
}
"""


@SCHEDULES
def test_reduction_of_records_to_several_outputs(cupy, order):
    k = cupy.ReductionKernel(
        "T x, bool wanted",
        "T top, T rest",
        "wanted ? State(x) : State()",
        "merged(a, b)",
        "top = a.max, rest = a.rest",
        "",
        "lse",
        reduce_type="State",
        preamble=STATE,
    )
    x = np.random.default_rng(0).normal(0, 3, (5, 100))
    with schedule(order):
        top, rest = cupy.empty(5), cupy.empty(5)
        assert k(cupy.asarray(x), True, top, rest, axis=1) is top
        assert k(cupy.asarray(x), True, axis=1).get().tolist() == top.get().tolist()
    assert np.array_equal(top.get(), x.max(1))
    np.testing.assert_allclose(top.get() + np.log1p(rest.get()), np.log(np.exp(x).sum(1)), rtol=1e-13)


def test_reduction_by_cub_has_rules_of_its_own(cupy):
    """One array in, one out, reduced along contiguous axes: CuPy replaces names as text and takes 32 bytes at most."""
    from emulation.compiler import CompileError

    x = cupy.asarray(np.arange(12.0).reshape(3, 4))
    bad_name = cupy.ReductionKernel("T x", "T y", "exp(x)", "a + b", "y = a", "0", "bad_name")
    wide = cupy.ReductionKernel(
        "T in0", "T out0", "Wide{in0}", "Wide{a.x + b.x}", "out0 = a.x", "", "wide", reduce_type="Wide",
        preamble="struct Wide { double x, more[4]; };",
    )  # fmt: skip
    for k in (bad_name, wide):
        with schedule("forward"), pytest.raises(CompileError):
            k(x, axis=1)
        with schedule("backward"):
            assert k(x, axis=1).shape == (3,)
        assert k(x, axis=0).shape == (4,)


# --------------------------------------------------------------------------------------------------------------- arrays
def test_arrays_do_not_mix_with_numpy(cupy):
    x = cupy.arange(6.0).reshape(2, 3)
    host = np.ones((2, 3))
    for mixed in (
        lambda: x + host,
        lambda: host * x,
        lambda: np.where(x > 1, host, 0),
        lambda: np.logaddexp(host, x),
        lambda: x.__setitem__(0, host[0]),
        lambda: np.asarray(x),
        lambda: np.array(x),
        lambda: np.concatenate([x, host]),
        lambda: np.add(x, 1, out=host),
        lambda: host.__iadd__(x),
    ):
        with pytest.raises(TypeError):
            mixed()
    assert not isinstance(x, np.ndarray)
    assert type(x).__module__ == "cupy"


def test_arrays_work_as_arrays(cupy):
    x = cupy.arange(6.0).reshape(2, 3)
    ufuncs = x + 1, 1 + x, np.float64(2) * x, np.log1p(x), np.isfinite(x), -x, x == 3
    views = x[0], x[0, 1], x.T, x[:, None], np.expand_dims(x, 0), cupy.broadcast_to(x, (4, 2, 3)), x[x > 2]
    others = np.where(x > 2, x, 0), cupy.where(x > 1, 1.0, x), x.sum(), np.sum(x, axis=0), x.max(1), np.zeros_like(x)
    for made in ufuncs + views + others:
        assert type(made) is cupy.ndarray
    assert x.sum().shape == ()
    assert x[0, 1].data.ptr == x.data.ptr + 8
    x[0, 1] = 50
    x[1] += x[0]
    assert x.get().tolist() == [[0, 50, 2], [3, 54, 7]]
    assert np.log(x * 0 - 1).get().shape == (2, 3)  # silent
    assert x.data.ptr % 256 == 0
    assert x.T.strides == (8, 24)
    assert x.T.flags.f_contiguous
    assert not x.T.flags.c_contiguous
    assert np.shape(x) == (2, 3)
    assert np.isnan(cupy.empty(3).get()).all()
    assert cupy.asnumpy(x).base is None
    assert cupy.asarray(x) is x
    assert x.device == cupy.cuda.Device(0)


def test_waiting_is_counted(cupy):
    x = cupy.arange(6.0)
    cupy.synchronisations = 0
    np.where(x > 1, np.exp(x), 0).sum()
    assert cupy.synchronisations == 0
    scalars = x[0].item, lambda: bool(x[0]), lambda: float(x[1]), lambda: int(x[1])
    arrays = x.get, lambda: cupy.asnumpy(x), lambda: x[x > 1], lambda: repr(x)
    for wait in (*scalars, *arrays, lambda: cupy.cuda.Device(0).synchronize()):
        before = cupy.synchronisations
        wait()
        assert cupy.synchronisations == before + 1


def test_bfloat16_can_be_moved_but_not_computed_with(cupy):
    x = cupy.asarray(np.arange(4).astype(ml_dtypes.bfloat16))
    assert x[::2].copy().view(np.uint16).dtype == np.uint16
    assert x.astype(np.float32).get().tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="bfloat16"):
        x + x
    with pytest.raises(TypeError, match="bfloat16"):
        x.sum()


def test_functions_that_cupy_lacks(cupy):
    with pytest.raises(AttributeError):
        cupy.spacing  # noqa: B018
    with pytest.raises(TypeError):
        np.spacing(cupy.ones(3))


@pytest.mark.parametrize("devices", [0, 1])
def test_installing_is_undone(monkeypatch, devices):
    """The emulation takes the place of a CuPy that cannot compute, not of one that can."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    runtime = types.SimpleNamespace(getDeviceCount=lambda: devices)
    real = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", real)
    if devices:
        with pytest.raises(RuntimeError, match="a real CuPy with a GPU"):
            emulation.install()
    else:
        undo = emulation.install()
        assert sys.modules["cupy"] is emulation.module
        undo()
    assert sys.modules["cupy"] is real


def test_libraries_are_kept(cupy):
    """A second process, or a second module of the same text, compiles nothing."""
    from emulation.kernels import function

    run("x[0] = 3;", 1)
    function.cache_clear()
    start = time.perf_counter()
    assert run("x[0] = 3;", 1)[0] == 3
    assert time.perf_counter() - start < 0.1
