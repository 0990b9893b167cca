// Rows that stay where a second look costs no memory traffic: registers, shared memory, or (as a last resort) L2.
//
// 1. the largest logit and the second largest; 2. the sum of exp(x - second), one exponential per logit; 3. the gradient,
// if it is wanted. In 2 the maximum counts as if it were no larger than the second, so as 1: without that 1 the sum is
// rest * exp(max - second), every digit of it, however confident the row.

// ---- where the row stays ----

// `load` shows every vector as it is, `each` its logits; both with the column of the first.

// `vectors_each` vectors per thread in registers.
template <typename logit_t, int how, int vectors_each> struct InRegisters {
    const Task& task;
    const Slice<logit_t>& slice;
    const int thread, threads;
    uint4 raw[vectors_each];

    template <typename F> __device__ __forceinline__ void load(F see) {
        slice.template load<Reading::once>(thread, threads, raw);
        #pragma unroll
        for (int i = 0; i < vectors_each; ++i) {
            const int v = thread + i * threads;
            if (v < slice.vectors) see(raw[i], v * Format<logit_t>::per_vector);
        }
    }
    template <typename F> __device__ __forceinline__ void each(F see) {
        #pragma unroll
        for (int i = 0; i < vectors_each; ++i) {
            const int v = thread + i * threads;
            if (v >= slice.vectors) break;
            real_of<logit_t, how> x[Format<logit_t>::per_vector];
            unpack<logit_t, how>(task, raw[i], x, v * Format<logit_t>::per_vector, slice.count);
            see(x, v * Format<logit_t>::per_vector);
        }
    }
};

// Vectors in shared memory (`copied`), each where the thread that needs it put it, so without a barrier; or left in
// global memory, in the hope that they are still in L2.
template <typename logit_t, int how, bool copied> struct InMemory {
    static constexpr int ahead = 4;  // vectors that a thread loads before it uses the first
    const Task& task;
    const Slice<logit_t>& slice;
    const int thread, threads;
    uint4* kept;

    template <typename F> __device__ __forceinline__ void load(F see) {
        constexpr Reading reading = copied ? Reading::once : Reading::again;
        for (int v = thread; v < slice.vectors; v += ahead * threads) {
            uint4 raw[ahead];
            slice.template load<reading>(v, threads, raw);
            #pragma unroll
            for (int i = 0; i < ahead; ++i) {
                if (v + i * threads >= slice.vectors) break;
                if (copied) kept[v + i * threads] = raw[i];
                see(raw[i], (v + i * threads) * Format<logit_t>::per_vector);
            }
        }
    }
    template <typename F> __device__ __forceinline__ void each(F see) {
        #pragma unroll 2
        for (int v = thread; v < slice.vectors; v += threads)
            see_one(see, copied ? kept[v] : slice.template load<Reading::beside_writes>(v), v);
    }
    template <typename F> __device__ __forceinline__ void see_one(F see, uint4 raw, int v) {
        real_of<logit_t, how> x[Format<logit_t>::per_vector];
        unpack<logit_t, how>(task, raw, x, v * Format<logit_t>::per_vector, slice.count);
        see(x, v * Format<logit_t>::per_vector);
    }
};

// ---- what is done with it ----

template <typename logit_t, typename soft_t, int how, class Held, class Group>
__device__ __forceinline__ void resident_row(const Task& task, Held& held, Group& group, const Piece& piece, bool real_row) {
    using real = real_of<logit_t, how>;
    using Row = RowSums<logit_t, soft_t, how>;
    const Exponential<logit_t, how> e(task.inverse_temperature);
    const SpreadRow<logit_t, soft_t, how> spread(task, piece.row, piece.begin);
    const int label = real_row ? local_label(task, piece.row, 0, (int)task.vocab) : -1;
    double label_logit = -infinity<double>();
    if (label >= 0) {
        const logit_t* at = held.slice.first + (label - piece.begin) * held.slice.step;
        label_logit = widened(read_one<logit_t, how>(task, at)) * task.inverse_temperature;
    }
    group.before_writes();  // over what was just read

    VectorTops<logit_t, how> tops;
    held.load([&](uint4 raw, int column) { tops.add(task, raw, column, piece.count); });
    const TopTwo<real> top = group.reduce(tops.found(), MergeTopTwo());

    const long long first_class = task.vocab_start + piece.begin, ranked_class = (how & with_rank) ? task.labels[piece.row] : 0;
    const double ranked = (how & with_rank) && task.ranked_logit ? task.ranked_logit[piece.row] : label_logit;
    Row row;
    held.each([&](auto& x, int column) {
        row.add(task, x, column, piece.count, top, e, spread, first_class, ranked, ranked_class);
    });

    const auto sum = group.reduce(row.sum.packed(), typename Row::Sums::Plus());
    const auto moment = (how & with_moment) ? group.reduce(row.moment.packed(), typename Row::Sums::Plus()) : sum;
    const double gap = (how & any_spread) ? group.reduce(row.gap, Sum()) : 0.0;
    const double weight = (how & any_spread) ? group.reduce(row.weight, Sum()) : 0.0;
    const int before = (how & with_rank) ? group.reduce(row.before, Sum()) : 0;
    int argmax = row.argmax;
    if (how & with_argmax) {  // as a column of the whole row: the blocks of a cluster compare theirs
        if (argmax != Smaller::nothing<int>()) argmax += piece.begin;
        argmax = group.reduce(argmax, Smaller());
    }
    group.done_with_peers();

    Stats stats = Stats::empty();
    if (group.decides()) {
        stats = finished<how>(task, top, Row::Sums::value(sum), Row::Sums::value(moment));
        stats.gap = gap * task.inverse_temperature;
        stats.weight = weight;
        stats.rank = before;
        if (argmax != Smaller::nothing<int>()) stats.argmax = task.vocab_start + argmax;
        if (group.leads() && real_row) {
            write<how>(task, piece.row, stats);
            task.label_logit[piece.row] = label_logit;
        }
    }
    if (how & with_gradient) {
        const auto push = group.template once<Push<real>>([&] {
            const bool here = (how & any_spread) && label >= piece.begin && label < piece.begin + piece.count;
            const double base = here ? (double)spread.base_at(label - piece.begin) : 0.0;
            return push_of<how, real>(task, piece.row, stats, label_logit, label - piece.begin, base);
        });
        const Writer<logit_t> writer{piece.out<logit_t>(task)};
        if (real_row) held.each([&](auto& x, int column) { push_logits(task, push, spread, e, writer, x, column); });
    }
    group.leave();
}

// ---- kernels ----

// How many blocks of 256 threads a multiprocessor should hold: 4 leave 64 registers to a thread, 2 leave 128.
template <typename logit_t, int how>
constexpr int blocks_of_256 = sizeof(real_of<logit_t, how>) == 8 && (how & ~with_gradient & ~with_argmax)              ? 1
                            : sizeof(real_of<logit_t, how>) == 8 || (how & (with_moment | with_rank | any_spread)) ? 2
                                                                                                                   : 4;
template <typename logit_t, int how> constexpr int most_threads = blocks_of_256<logit_t, how> == 1 ? 256 : 512;

constexpr int vectors_in_registers = 4;

// Several rows per warp: `lanes` (8, 16 or 32) each. grid (ceil(rows / (256 / lanes))), block 256.
template <typename logit_t, typename soft_t, int how, int lanes>
__global__ __launch_bounds__(256, blocks_of_256<logit_t, how>) void small_rows(const Task task) {
    const long long index = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    Piece piece(task, index < task.rows ? index : task.rows - 1);
    if (index >= task.rows) piece.count = 0;  // lanes without a row go along, for the shuffles' sake
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    LaneGroup<lanes> group;
    InRegisters<logit_t, how, vectors_in_registers> held{task, slice, group.thread(), lanes};
    resident_row<logit_t, soft_t, how>(task, held, group, piece, index < task.rows);
}

// One row per block, in registers. grid (rows), block up to most_threads.
template <typename logit_t, typename soft_t, int how>
__global__ __launch_bounds__(most_threads<logit_t, how>, blocks_of_256<logit_t, how> * 256 / most_threads<logit_t, how>)
void block_rows(const Task task) {
    const Piece piece(task, blockIdx.x);
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    BlockGroup<1> group;
    InRegisters<logit_t, how, vectors_in_registers> held{task, slice, group.thread(), (int)blockDim.x};
    resident_row<logit_t, soft_t, how>(task, held, group, piece, true);
}

// One row per block, in shared memory (`copied`) or read again through L2. grid (rows), block up to most_threads.
template <typename logit_t, typename soft_t, int how, bool copied>
__global__ __launch_bounds__(most_threads<logit_t, how>, blocks_of_256<logit_t, how> * 256 / most_threads<logit_t, how>)
void kept_rows(const Task task) {
    const Piece piece(task, blockIdx.x);
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    BlockGroup<1> group;
    uint4* kept = reinterpret_cast<uint4*>(shared_memory() + BlockGroup<1>::shared_bytes);
    InMemory<logit_t, how, copied> held{task, slice, group.thread(), (int)blockDim.x, kept};
    resident_row<logit_t, soft_t, how>(task, held, group, piece, true);
}

// One row in the shared memories of a cluster. `slices` is 8. grid (8 * rows), block up to 256.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <typename logit_t, typename soft_t, int how>
__global__ __cluster_dims__(8, 1, 1) __launch_bounds__(256, blocks_of_256<logit_t, how>) void cluster_rows(const Task task) {
    const Piece piece(task, blockIdx.x);
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    BlockGroup<8> group;
    uint4* kept = reinterpret_cast<uint4*>(shared_memory() + BlockGroup<8>::shared_bytes);
    InMemory<logit_t, how, true> held{task, slice, group.thread(), (int)blockDim.x, kept};
    resident_row<logit_t, soft_t, how>(task, held, group, piece, true);
}
#endif
