// What every kernel over rows is told, and the record of a row: the vocabulary of the other files.

// Features, compiled away when off: the bits of the template argument `how`.
constexpr int with_argmax = 1, with_moment = 2, with_rank = 4, with_softcap = 8, with_gradient = 16;
constexpr int spread_uniform = 32, spread_by_class = 64, spread_soft = 96, any_spread = 96;  // two bits: one of four
constexpr int with_temperature = 128;  // for 16-bit logits, whose exponents take it in exactly only on request

constexpr long long no_class = 1ll << 53;  // loses every tie; see NO_CLASS in _records.py

// One array of rows, in elements: classes lie `column` apart, rows `step`, and `inner` rows of the task (all, if that is
// 0) `outer`.
struct Strides {
    long long outer, step, column;
};

// Passed by value; Python fills it in (`_cupy_core.TASK`). Every member is 8 bytes wide.
struct Task {
    const void* logits;
    void* out;
    const long long* labels;       // a class, or negative; null: rows without labels
    const double* ranked_logit;    // transformed logit at the label, where it may lie in another slice; else null
    const double *label_weight, *spread_weight, *lse_weight;  // GradWeights
    const void* soft;              // rows of soft labels
    const void *scale, *base;      // per class, in the type that is computed with; null: the number is below
    double scale_number, base_number;
    double *max, *rest, *label_logit, *gap, *weight, *moment;  // RowStats, one entry per row
    long long *argmax, *rank;
    void* pieces;                  // what is known of each slice of each row, where rows are cut up
    long long rows, inner, vocab, slices, steps, vocab_start;
    Strides logits_at, out_at, soft_at;
    double softcap, inverse_softcap, temperature, inverse_temperature;
};

__device__ __forceinline__ long long offset(const Task& task, Strides at, long long row) {
    return task.inner ? row / task.inner * at.outer + row % task.inner * at.step : row * at.step;
}

// The slice of a row that a block works on: slice i of `slices`, all of one width, at 16-byte boundaries of the row.
struct Piece {
    long long row;
    int begin, count;

    __device__ __forceinline__ Piece(const Task& task, long long index) : row(index / task.slices) {
        const int vocab = (int)task.vocab, slices = (int)task.slices, width = ((vocab + slices - 1) / slices + 15) / 16 * 16;
        begin = (int)(index % task.slices) * width;
        if (begin > vocab) begin = vocab;
        count = vocab - begin < width ? vocab - begin : width;
    }
    template <typename logit_t> __device__ __forceinline__ Slice<logit_t> logits(const Task& task) const {
        const Strides at = task.logits_at;
        return {static_cast<const logit_t*>(task.logits) + offset(task, at, row) + begin * at.column, at.column, count};
    }
    template <typename logit_t> __device__ __forceinline__ Slice<logit_t> out(const Task& task) const {
        const Strides at = task.out_at;
        return {static_cast<logit_t*>(task.out) + offset(task, at, row) + begin * at.column, at.column, count};
    }
};

// float, or double for double logits and for softcap: its rounding would cost more than a loss may be off.
template <typename logit_t, int how>
using real_of = typename Either<sizeof(logit_t) == 8 || (how & with_softcap) != 0, double, float>::type;

// What rounding took from d = a - b (TwoSum; Knuth, TAOCP 2, 4.2.2).
template <typename real> __device__ __forceinline__ real rounding_of(real d, real a, real b) {
    const real virtual_a = d + b;
    return (a - virtual_a) + ((virtual_a - d) - b);
}

// exp of a difference of logits over the temperature: `of` in one subtraction, one multiplication and one instruction,
// `exact` for sums, where the rounding of a large difference, the same in thousands of terms, would cost a loss more
// than 4 eps. 16-bit logits differ by what float32 holds, and log2 e is nearly a float32; log2 e over a temperature is not.
template <typename logit_t, int how, typename real = real_of<logit_t, how>> struct Exponential;

template <typename logit_t, int how> struct Exponential<logit_t, how, float> {
    float factor, factor_rest;  // together log2 e over the temperature
    __device__ __forceinline__ explicit Exponential(double inverse_temperature) {
        const double whole = 1.4426950408889634 * inverse_temperature;
        factor = (float)whole;
        factor_rest = (float)(whole - (double)factor);
    }
    __device__ __forceinline__ float of(float a, float b) const { return exp2f((a - b) * factor); }
    __device__ __forceinline__ float exact(float a, float b) const {
        if (sizeof(logit_t) == 2 && !(how & with_temperature)) return of(a, b);
        const float d = a - b, t = d * factor, e = exp2f(t);
        const float of_product = fmaf(d, factor_rest, fmaf(d, factor, -t));
        const float lost = fmaf(rounding_of(d, a, b), factor, of_product);
        return fabsf(lost) < 1.0f ? fmaf(e, lost * 0.69314718f, e) : e;
    }
};

template <typename logit_t, int how> struct Exponential<logit_t, how, double> {
    double factor;
    __device__ __forceinline__ explicit Exponential(double inverse_temperature) : factor(inverse_temperature) {}
    __device__ __forceinline__ double of(double a, double b) const { return exact(a, b); }
    __device__ __forceinline__ double exact(double a, double b) const {
        const double d = a - b, e = exp(d * factor), lost = rounding_of(d, a, b);
        return fabs(lost) < 1.0 ? fma(e, lost * factor, e) : e;
    }
};

// Not inlined: dozens of copies of tanh would fill the registers.
__device__ __noinline__ double capped(double x, double softcap, double inverse) { return softcap * tanh(x * inverse); }

// A logit after softcap, and before the division by the temperature, which every formula takes in as a factor.
template <int how, typename real, int n> __device__ __forceinline__ void cap(const Task& task, real (&x)[n]) {
    if (how & with_softcap) {
        #pragma unroll
        for (int i = 0; i < n; ++i) x[i] = (real)capped(widened(x[i]), task.softcap, task.inverse_softcap);
    }
}

// The logits of a vector, of which the first is at `column` of `count`: what fills the last one up stays -inf.
template <typename logit_t, int how, typename real, int n>
__device__ __forceinline__ void unpack(const Task& task, uint4 raw, real (&x)[n], int column, int count) {
    typename Format<logit_t>::value_t values[n];
    Format<logit_t>::unpack(raw, values);
    #pragma unroll
    for (int i = 0; i < n; ++i) x[i] = values[i];
    cap<how>(task, x);
    if (how & with_softcap) {
        #pragma unroll
        for (int i = 0; i < n; ++i)
            if (column + i >= count) x[i] = -infinity<real>();
    }
}

template <typename logit_t, int how> __device__ __forceinline__ auto read_one(const Task& task, const logit_t* at) {
    real_of<logit_t, how> x[1] = {(real_of<logit_t, how>)Format<logit_t>::value(*at)};
    cap<how>(task, x);
    return x[0];
}

// The label of a row as one of `count` columns from `begin` on, or -1.
__device__ __forceinline__ int local_label(const Task& task, long long row, int begin, int count) {
    if (!task.labels) return -1;
    const long long label = task.labels[row], local = label - task.vocab_start - begin;
    return label >= 0 && local >= 0 && local < count ? (int)local : -1;
}

// The spread row s of one row: `s.at(column)`.
template <typename logit_t, typename soft_t, int how> struct SpreadRow {
    using real = real_of<logit_t, how>;
    const soft_t* soft = nullptr;
    long long soft_step = 1;
    const real *scale = nullptr, *base = nullptr;
    real scale_number = 0, base_number = 0;

    // Columns count from `begin` on.
    __device__ __forceinline__ SpreadRow(const Task& task, long long row, int begin) {
        if (!(how & any_spread)) return;
        base_number = (real)task.base_number;
        if ((how & any_spread) == spread_uniform) return;
        if (task.base) base = static_cast<const real*>(task.base) + begin;
        if ((how & any_spread) == spread_by_class) return;
        scale_number = (real)task.scale_number;
        if (task.scale) scale = static_cast<const real*>(task.scale) + begin;
        soft_step = task.soft_at.column;
        soft = static_cast<const soft_t*>(task.soft) + offset(task, task.soft_at, row) + begin * soft_step;
    }
    __device__ __forceinline__ real base_at(int column) const {
        return (how & any_spread) != spread_uniform && base ? base[column] : base_number;
    }
    __device__ __forceinline__ real at(int column) const {
        if ((how & any_spread) != spread_soft) return base_at(column);
        return (scale ? scale[column] : scale_number) * (real)Format<soft_t>::value(soft[column * soft_step]) + base_at(column);
    }
};

// The record of (a slice of) a row: RowStats in _records.py, where the fields are explained.
struct Stats {
    double max, rest, gap, weight, moment;
    long long argmax, rank;

    static __device__ __forceinline__ Stats empty() { return {-infinity<double>(), -1.0, 0.0, 0.0, 0.0, no_class, 0}; }
};

template <int how> __device__ __forceinline__ void write(const Task& task, long long entry, const Stats& stats) {
    task.max[entry] = stats.max;
    task.rest[entry] = stats.rest;
    if (how & any_spread) {
        task.gap[entry] = stats.gap;
        task.weight[entry] = stats.weight;
    }
    if (how & with_moment) task.moment[entry] = stats.moment;
    if (how & with_argmax) task.argmax[entry] = stats.argmax;
    if (how & with_rank) task.rank[entry] = stats.rank;
}

// Whether a class comes before the label when classes are sorted by logit, and by index among equals. `ranked` is
// transformed, so the logit has to be.
template <typename real>
__device__ __forceinline__ bool before_label(const Task& task, real x, long long column, double ranked, long long label) {
    const double transformed = widened(x) * task.inverse_temperature;
    return transformed > ranked || (transformed == ranked && column < label);
}
