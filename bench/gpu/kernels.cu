// What the benchmark itself runs on the GPU.

// Reads every byte, 16 at a time and eight such loads in flight, and adds the sum of the 32-bit words to `totals`, of
// which there are 256 so that warps do not wait for one another.
extern "C" __global__ __launch_bounds__(256)
void read_all(const uint4* __restrict__ data, long long count, unsigned* totals) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + 7 * stride < count; i += 8 * stride) {
        uint4 loaded[8];
        #pragma unroll
        for (int k = 0; k < 8; ++k) loaded[k] = data[i + k * stride];
        #pragma unroll
        for (int k = 0; k < 8; ++k) sum += (loaded[k].x + loaded[k].y) + (loaded[k].z + loaded[k].w);
    }
    for (; i < count; i += stride) {
        const uint4 loaded = data[i];
        sum += (loaded.x + loaded.y) + (loaded.z + loaded.w);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) atomicAdd(totals + (blockIdx.x * 8 + threadIdx.x / 32) % 256, sum);
}

// Keeps the stream busy for so long, so that what is queued behind it runs without gaps.
#ifndef GPUXENT_EMULATED
__device__ unsigned long long nanoseconds_now() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

extern "C" __global__ void hold(unsigned long long nanoseconds) {
    const unsigned long long started = nanoseconds_now();
    while (nanoseconds_now() - started < nanoseconds) {}
}
#endif
