// The threads that share a row, and what they know together: some lanes of a warp, a block, or a cluster of blocks.

constexpr unsigned every_lane = 0xffffffffu;

struct Larger {
    template <typename T> static __device__ __forceinline__ T nothing() { return -infinity<T>(); }
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return larger(a, b); }
};
struct Smaller {
    template <typename T> static __device__ __forceinline__ T nothing() { return 0x7fffffff; }
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Sum {
    template <typename T> static __device__ __forceinline__ T nothing() { return 0; }
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

template <typename T> __device__ __forceinline__ T from_lane(T mine, int step) {
    return __shfl_xor_sync(every_lane, mine, step);
}

template <int lanes, typename T, typename Operation> __device__ __forceinline__ T over_lanes(T x, Operation both) {
    #pragma unroll
    for (int step = lanes / 2; step; step /= 2) x = both(x, from_lane(x, step));
    return x;
}

// Barriers of a cluster and the shared memory of its blocks; a cluster of one is a block.
template <int ranks> struct Cluster {
#if defined(GPUXENT_EMULATED)
    static __device__ __forceinline__ int rank() { return ranks > 1 ? emulation::cluster_rank() : 0; }
    static __device__ __forceinline__ void sync() {
        if (ranks > 1) emulation::cluster_sync();
    }
    static __device__ __forceinline__ void arrive() {}
    static __device__ __forceinline__ void wait() { sync(); }
    static __device__ __forceinline__ const void* peer(const void* mine, int rank) { return emulation::peer(mine, rank); }
#elif __CUDA_ARCH__ >= 900
    static __device__ __forceinline__ int rank() { return blockIdx.x % ranks; }
    static __device__ __forceinline__ void sync() {
        if (ranks > 1) {
            __cluster_barrier_arrive();
            __cluster_barrier_wait();
        }
    }
    // In two halves, and without a promise about what was written.
    static __device__ __forceinline__ void arrive() {
        if (ranks > 1) __cluster_barrier_arrive_relaxed();
    }
    static __device__ __forceinline__ void wait() {
        if (ranks > 1) __cluster_barrier_wait();
    }
    static __device__ __forceinline__ const void* peer(const void* mine, int rank) {
        return __cluster_map_shared_rank(mine, rank);
    }
#else
    static __device__ __forceinline__ int rank() { return 0; }
    static __device__ __forceinline__ void sync() {}
    static __device__ __forceinline__ void arrive() {}
    static __device__ __forceinline__ void wait() {}
    static __device__ __forceinline__ const void* peer(const void* mine, int) { return mine; }
#endif
};

// Some lanes of a warp (8, 16 or 32): shuffles do it all. The other groups of the warp go along.
template <int lanes> struct LaneGroup {
    __device__ __forceinline__ int thread() const { return threadIdx.x % lanes; }
    __device__ __forceinline__ bool leads() const { return thread() == 0; }
    template <typename T, typename Operation> __device__ __forceinline__ T reduce(T x, Operation both) {
        return over_lanes<lanes>(x, both);
    }
    // Whether this thread computes what one thread computes for all: here all do, which costs no more.
    __device__ __forceinline__ bool decides() const { return true; }
    __device__ __forceinline__ void before_writes() const { __syncwarp(); }
    // What `compute` gives where the group decides, for all; and a barrier.
    template <typename T, typename F> __device__ __forceinline__ T once(F compute) const {
        __syncwarp();
        return compute();
    }
    __device__ __forceinline__ void done_with_peers() const {}
    __device__ __forceinline__ void leave() const {}
};

// All threads of `count` blocks. Each reduction has a slot of its own in shared memory, so one barrier does.
template <int count> struct BlockGroup {
    static constexpr int slots = 8, slot_bytes = 32 * 16, peers_bytes = slots * 16, once_bytes = 64;
    static constexpr size_t shared_bytes = slots * slot_bytes + peers_bytes + once_bytes;

    int slot = 0;

    __device__ __forceinline__ int thread() const { return threadIdx.x; }
    __device__ __forceinline__ bool leads() const { return threadIdx.x == 0 && Cluster<count>::rank() == 0; }
    template <typename T, typename Operation> __device__ __forceinline__ T reduce(T x, Operation both) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (int)blockDim.x / 32;
        T* of_warps = reinterpret_cast<T*>(shared_memory() + slot * slot_bytes);
        x = over_lanes<32>(x, both);
        if (lane == 0) of_warps[warp] = x;
        __syncthreads();
        x = over_lanes<32>(lane < warps ? of_warps[lane] : Operation::template nothing<T>(), both);
        if (count > 1) {
            T* of_block = reinterpret_cast<T*>(shared_memory() + slots * slot_bytes + slot * 16);
            if (threadIdx.x == 0) *of_block = x;
            Cluster<count>::sync();
            x = Operation::template nothing<T>();
            if (lane < count) x = *static_cast<const T*>(Cluster<count>::peer(of_block, lane));
            x = over_lanes<32>(x, both);
        }
        ++slot;
        return x;
    }
    __device__ __forceinline__ bool decides() const { return threadIdx.x == 0; }
    __device__ __forceinline__ void before_writes() const {}  // the reductions are barriers, of the whole cluster
    template <typename T, typename F> __device__ __forceinline__ T once(F compute) const {
        static_assert(sizeof(T) <= once_bytes, "");
        T* result = reinterpret_cast<T*>(shared_memory() + slots * slot_bytes + peers_bytes);
        if (threadIdx.x == 0) *result = compute();
        __syncthreads();
        return *result;
    }
    // Nobody goes while others read its memory.
    __device__ __forceinline__ void done_with_peers() const { Cluster<count>::arrive(); }
    __device__ __forceinline__ void leave() const { Cluster<count>::wait(); }
};
