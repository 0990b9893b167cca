// Rows that stay where a second look costs no memory traffic: registers, shared memory, or (as a last resort) L2.
//
// 1. the largest logit and the second largest; 2. the sum of exp(x - second), one exponential per logit; 3. the gradient,
// if it is wanted. In 2 the maximum counts as if it were no larger than the second, so as 1: without that 1 the sum is
// rest * exp(max - second), every digit of it, however confident the row.

constexpr int vectors_in_registers = 4;  // per thread

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

// What a group knows of its row after two looks at it.
template <typename logit_t, int how> struct Found {
    using Sums = typename SumOf<real_of<logit_t, how>>::type;
    TopTwo<real_of<logit_t, how>> top;
    typename Sums::Packed sum, moment;
    double gap, weight;
    int before, argmax;

    __device__ __forceinline__ Stats stats(const Task& task) const {
        Stats stats = finished<how>(task, top, Sums::value(sum), Sums::value(moment));
        stats.gap = gap * task.inverse_temperature;
        stats.weight = weight;
        stats.rank = before;
        if (argmax != Smaller::nothing<int>()) stats.argmax = task.vocab_start + argmax;
        return stats;
    }
};

template <typename logit_t, typename soft_t, int how, class Held, class Group>
__device__ __forceinline__ Found<logit_t, how> look_at_row(const Task& task, Held& held, Group& group, const Piece& piece,
                                                           const SpreadRow<logit_t, soft_t, how>& spread, double label_logit) {
    VectorTops<logit_t, how> tops;
    held.load([&](uint4 raw, int column) { tops.add(task, raw, column, piece.count); });
    const auto top = group.reduce(tops.found(), MergeTopTwo());

    const Exponential<logit_t, how> e(task.inverse_temperature);
    const long long first_class = task.vocab_start + piece.begin, ranked_class = (how & with_rank) ? task.labels[piece.row] : 0;
    const double ranked = (how & with_rank) && task.ranked_logit ? task.ranked_logit[piece.row] : label_logit;
    RowSums<logit_t, soft_t, how> row;
    held.each([&](auto& x, int column) {
        row.add(task, x, column, piece.count, top, e, spread, first_class, ranked, ranked_class);
    });

    using Plus = typename Found<logit_t, how>::Sums::Plus;
    Found<logit_t, how> found;
    found.top = top;
    found.sum = group.reduce(row.sum.packed(), Plus());
    found.moment = (how & with_moment) ? group.reduce(row.moment.packed(), Plus()) : 0;
    found.gap = (how & any_spread) ? group.reduce(row.gap, Sum()) : 0.0;
    found.weight = (how & any_spread) ? group.reduce(row.weight, Sum()) : 0.0;
    found.before = (how & with_rank) ? group.reduce(row.before, Sum()) : 0;
    found.argmax = row.argmax;
    if (how & with_argmax) {  // as a column of the whole row: the blocks of a cluster compare theirs
        if (found.argmax != Smaller::nothing<int>()) found.argmax += piece.begin;
        found.argmax = group.reduce(found.argmax, Smaller());
    }
    return found;
}

// The transformed logit at the label, which is a column of the whole row, or -1.
template <typename logit_t, int how>
__device__ __forceinline__ double logit_of(const Task& task, const Slice<logit_t>& slice, int begin, int label) {
    if (label < 0) return -infinity<double>();
    const logit_t* at = slice.first + (label - begin) * slice.step;
    return widened(read_one<logit_t, how>(task, at)) * task.inverse_temperature;
}

template <int how> __device__ __forceinline__ void write(const Task& task, long long row, const Stats& stats, double label_logit) {
    write<how>(task, row, stats);
    task.label_logit[row] = label_logit;
}

template <typename logit_t, typename soft_t, int how, class Held, class Group>
__device__ __forceinline__ void resident_row(const Task& task, Held& held, Group& group, const Piece& piece, bool real_row) {
    using real = real_of<logit_t, how>;
    const SpreadRow<logit_t, soft_t, how> spread(task, piece.row, piece.begin);
    const int label = real_row ? local_label(task, piece.row, 0, (int)task.vocab) : -1;
    const double label_logit = logit_of<logit_t, how>(task, held.slice, piece.begin, label);
    group.before_writes();  // over what was just read
    const auto found = look_at_row<logit_t, soft_t, how>(task, held, group, piece, spread, label_logit);
    group.done_with_peers();

    Stats stats = Stats::empty();
    if (group.decides()) {
        stats = found.stats(task);
        if (group.leads() && real_row) write<how>(task, piece.row, stats, label_logit);
    }
    if (how & with_gradient) {
        const auto push = group.template once<Push<real>>([&] {
            const bool here = (how & any_spread) && label >= piece.begin && label < piece.begin + piece.count;
            const double base = here ? (double)spread.base_at(label - piece.begin) : 0.0;
            return push_of<how, real>(task, piece.row, stats, label_logit, label - piece.begin, base);
        });
        const Exponential<logit_t, how> e(task.inverse_temperature);
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

// Rows of some lanes of a warp, one after another: to finish a row takes as long as to read a short one, so each lane
// keeps what was found of one of them, and at last all finish theirs at once.
template <typename logit_t, typename soft_t, int how, int lanes> __device__ __forceinline__ void short_rows(const Task& task) {
    constexpr int abreast = 32 / lanes;
    LaneGroup<lanes> group;
    const long long warp = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const long long of_warp = warp * abreast * task.steps, of_group = of_warp + threadIdx.x % 32 / lanes;
    Found<logit_t, how> mine{};
    for (int step = 0; step < task.steps && of_warp + step * abreast < task.rows; ++step) {
        const long long row = of_group + step * abreast;
        Piece piece(task, row < task.rows ? row : task.rows - 1);
        if (row >= task.rows) piece.count = 0;  // lanes without a row go along, for the shuffles' sake
        const Slice<logit_t> slice = piece.logits<logit_t>(task);
        const SpreadRow<logit_t, soft_t, how> spread(task, piece.row, 0);
        double ranked = 0.0;
        if ((how & with_rank) && piece.count)
            ranked = logit_of<logit_t, how>(task, slice, 0, local_label(task, piece.row, 0, piece.count));
        InRegisters<logit_t, how, vectors_in_registers> held{task, slice, group.thread(), lanes};
        const auto found = look_at_row<logit_t, soft_t, how>(task, held, group, piece, spread, ranked);
        if (group.thread() == step) mine = found;
    }
    const long long row = of_group + group.thread() * abreast;
    if (group.thread() >= task.steps || row >= task.rows) return;
    const Piece piece(task, row);
    const int label = local_label(task, row, 0, piece.count);
    write<how>(task, row, mine.stats(task), logit_of<logit_t, how>(task, piece.logits<logit_t>(task), 0, label));
}

// Several rows per warp: `lanes` (8, 16 or 32) each. block 256; grid (ceil(rows / (256 / lanes))), and without gradient as
// many rows fewer as a group takes `steps`, at most `lanes`.
template <typename logit_t, typename soft_t, int how, int lanes>
__global__ __launch_bounds__(256, blocks_of_256<logit_t, how>) void small_rows(const Task task) {
    if (!(how & with_gradient)) {
        short_rows<logit_t, soft_t, how, lanes>(task);
        return;
    }
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    Piece piece(task, row < task.rows ? row : task.rows - 1);
    if (row >= task.rows) piece.count = 0;
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    LaneGroup<lanes> group;
    InRegisters<logit_t, how, vectors_in_registers> held{task, slice, group.thread(), lanes};
    resident_row<logit_t, soft_t, how>(task, held, group, piece, row < task.rows);
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
