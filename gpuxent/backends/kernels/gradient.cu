// The gradient of a row from its statistics: three directions, and at the label an entry of its own.

// dlogits = factor * exp(x - max) - spread * s, times the slope of softcap; `entry` at the label. See GradWeights in
// _records.py; factor is the weight of the softmax over the sum of the exponentials.
template <typename real> struct Push {
    real max, factor, spread, entry;
    int label;  // a column of this slice, or -1
    bool off;   // nothing pushes: exactly 0, whatever the logits are
};

// 1 / x within an ulp, by Newton's iteration: the exact division is a call, and spills registers.
__device__ __forceinline__ double reciprocal(double x) {
    double y = __fdividef(1.0f, (float)x);
    #pragma unroll
    for (int i = 0; i < 2; ++i) y = fma(fma(-x, y, 1.0), y, y);
    return y;
}

template <int how, typename real>
__device__ __forceinline__ Push<real> push_of(const Task& task, long long row, const Stats& stats, double label_logit, int label,
                              double base_at_label) {
    const double of_label = task.label_weight[row], of_spread = task.spread_weight[row], of_lse = task.lse_weight[row];
    const double total = 1.0 + stats.rest, share = reciprocal(total);
    double softmax = of_label + of_spread * stats.weight;
    if (of_lse != 0.0) softmax += of_lse * (stats.max + log1p(stats.rest));
    if (stats.max == -infinity<double>()) softmax = stats.max - stats.max;  // no distribution, no gradient: NaN
    // 1 - p without forming it from p, so that it keeps its digits in confident rows
    const double others = label_logit == stats.max ? stats.rest : total - Exponential<double, 0>(1.0).exact(label_logit, stats.max);
    double entry = (softmax - of_label) - softmax * (others * share);
    if (how & any_spread) entry -= of_spread * base_at_label;
    entry *= task.inverse_temperature;
    if (how & with_softcap) {
        const double t = label_logit * task.temperature * task.inverse_softcap;
        entry *= 1.0 - t * t;
    }
    Push<real> push;
    push.max = (real)(stats.max * task.temperature);
    push.factor = (real)(softmax * share * task.inverse_temperature);
    push.spread = (real)(of_spread * task.inverse_temperature);
    push.entry = (real)entry;
    push.label = label;
    push.off = of_label == 0.0 && of_spread == 0.0 && of_lse == 0.0;
    return push;
}

// Writes vectors of a slice. Each thread writes only where it has read: the result may lie over the logits.
template <typename logit_t> struct Writer {
    using format = Format<logit_t>;
    const Slice<logit_t> slice;

    __device__ __forceinline__ void write(const typename format::value_t (&x)[format::per_vector], int column) const {
        logit_t* out = const_cast<logit_t*>(slice.first) + column * slice.step;
        if (slice.aligned && column + format::per_vector <= slice.count) {
            *reinterpret_cast<uint4*>(out) = format::pack(x);
        } else {
            #pragma unroll
            for (int i = 0; i < format::per_vector; ++i)
                if (column + i < slice.count) out[i * slice.step] = format::logit(x[i]);
        }
    }
    __device__ __forceinline__ void write_one(typename format::value_t x, int column) const {
        const_cast<logit_t*>(slice.first)[column * slice.step] = format::logit(x);
    }
};

// Turns the logits x of a vector, whose first column is given, into their gradient, and writes it.
template <typename logit_t, typename soft_t, int how, typename real, int n>
__device__ __forceinline__ void push_logits(const Task& task, const Push<real>& push, const SpreadRow<logit_t, soft_t, how>& spread,
                                            const Exponential<logit_t, how>& e, const Writer<logit_t>& writer, real (&x)[n],
                                            int column) {
    using value_t = typename Format<logit_t>::value_t;
    value_t result[n];
    #pragma unroll
    for (int i = 0; i < n; ++i) {
        real entry = push.factor * e.of(x[i], push.max);
        if ((how & any_spread) && column + i < writer.slice.count) entry -= push.spread * spread.at(column + i);
        if (how & with_softcap) {
            const double t = (double)x[i] * task.inverse_softcap;
            entry *= (real)(1.0 - t * t);
        }
        result[i] = push.off ? 0 : (value_t)entry;
    }
    writer.write(result, column);
    if ((unsigned)(push.label - column) < (unsigned)n && !push.off)  // the same thread, so after the others
        writer.write_one((value_t)push.entry, push.label);
}

// The piece of a row that a group works on: `lanes` of a warp, for short rows, or a block (0).
template <int lanes> struct Share {
    using Group = typename Either<lanes != 0, LaneGroup<lanes != 0 ? lanes : 32>, BlockGroup<1>>::type;
    Group group;
    Piece piece;

    __device__ __forceinline__ explicit Share(const Task& task) : piece(task, index(task)) {
        if (own_index() >= task.rows * task.slices) piece.count = 0;  // lanes without a row go along
    }
    static __device__ __forceinline__ long long own_index() {
        return lanes ? ((long long)blockIdx.x * blockDim.x + threadIdx.x) / (lanes ? lanes : 1) : blockIdx.x;
    }
    static __device__ __forceinline__ long long index(const Task& task) {
        const long long last = task.rows * task.slices - 1, own = own_index();
        return own < last ? own : last;
    }
    // Shows `change` all vectors; for results that lie over the logits, too.
    template <typename logit_t, int how, typename F> __device__ __forceinline__ void each_vector(const Task& task, F change) {
        const Slice<logit_t> slice = piece.logits<logit_t>(task);
        for (int v = group.thread(); v < slice.vectors; v += lanes ? lanes : blockDim.x) {
            real_of<logit_t, how> x[Format<logit_t>::per_vector];
            const int column = v * Format<logit_t>::per_vector;
            unpack<logit_t, how>(task, slice.template load<Reading::beside_writes>(v), x, column, slice.count);
            change(x, column);
        }
    }
};

// From statistics that are there already. grid (rows * slices), or (ceil(rows / (256 / lanes))); block up to 256.
template <typename logit_t, typename soft_t, int how, int lanes>
__global__ __launch_bounds__(256, how & with_softcap ? 1 : lanes ? 2 : 3) void gradient_rows(const Task task) {
    using real = real_of<logit_t, how>;
    Share<lanes> share(task);
    const Piece& piece = share.piece;
    const SpreadRow<logit_t, soft_t, how> spread(task, piece.row, piece.begin);
    const auto push = share.group.template once<Push<real>>([&] {
        Stats stats = Stats::empty();
        stats.max = task.max[piece.row];
        stats.rest = task.rest[piece.row];
        if (how & any_spread) stats.weight = task.weight[piece.row];
        const int label = local_label(task, piece.row, piece.begin, piece.count);
        const double base = (how & any_spread) && label >= 0 ? (double)spread.base_at(label) : 0.0;
        return push_of<how, real>(task, piece.row, stats, task.label_logit[piece.row], label, base);
    });
    const Exponential<logit_t, how> e(task.inverse_temperature);
    const Writer<logit_t> writer{piece.out<logit_t>(task)};
    share.template each_vector<logit_t, how>(task, [&](auto& x, int column) {
        push_logits(task, push, spread, e, writer, x, column);
    });
}

// log softmax = (x - max) - log1p(rest), likewise.
template <typename logit_t, int lanes> __global__ __launch_bounds__(256, 3) void log_prob_rows(const Task task) {
    using real = real_of<logit_t, 0>;
    Share<lanes> share(task);
    const Piece& piece = share.piece;
    const real log_sum = share.group.template once<real>([&] { return (real)log1p(task.rest[piece.row]); });
    const real max = (real)task.max[piece.row];
    const Writer<logit_t> writer{piece.out<logit_t>(task)};
    share.template each_vector<logit_t, 0>(task, [&](auto& x, int column) {
        #pragma unroll
        for (auto& value : x) value = (value - max) - log_sum;
        writer.write(x, column);
    });
}

// The transformed logit at each row's label, -inf where there is none in these columns. One thread per row.
template <typename logit_t, int how> __global__ void label_logit_rows(const Task task) {
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= task.rows) return;
    const int label = local_label(task, row, 0, (int)task.vocab);
    const logit_t* logits = static_cast<const logit_t*>(task.logits) + offset(task, task.logits_at, row);
    double logit = -infinity<double>();
    if (label >= 0) logit = widened(read_one<logit_t, how>(task, logits + label * task.logits_at.column)) * task.inverse_temperature;
    task.label_logit[row] = logit;
}
