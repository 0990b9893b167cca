// What is summed over a row, so that it comes out the same whoever adds up what: in one thread or in a cluster.

// The largest logit and the second largest: the same twice where they are equal.
template <typename real> struct TopTwo {
    real max = -infinity<real>(), second = -infinity<real>();

    __device__ __forceinline__ void add(real x) {
        second = larger(second, smaller(max, x));
        max = larger(max, x);
    }
    // Infinities give way to 0, so that nothing is inf - inf: exp(-inf - 0) is 0.
    static __device__ __forceinline__ real finite(real x) { return x - x == 0 ? x : 0; }
    // What no logit counts as more than. Two of +inf must not make the sum infinite, which would hide a NaN.
    __device__ __forceinline__ real bound() const { return second == infinity<real>() ? 0 : second; }
};

struct MergeTopTwo {
    template <typename T> static __device__ __forceinline__ T nothing() { return {}; }
    template <typename real> __device__ __forceinline__ TopTwo<real> operator()(TopTwo<real> a, TopTwo<real> b) const {
        TopTwo<real> both;
        both.max = larger(a.max, b.max);
        both.second = larger(smaller(a.max, b.max), larger(a.second, b.second));
        return both;
    }
};

template <typename real> __device__ __forceinline__ TopTwo<real> from_lane(TopTwo<real> mine, int step) {
    TopTwo<real> other;
    other.max = from_lane(mine.max, step);
    other.second = from_lane(mine.second, step);
    return other;
}

// The largest two of the vectors that a thread sees.
template <typename logit_t, int how, bool in_pairs = sizeof(logit_t) == 2 && !(how & with_softcap)> struct VectorTops {
    TopTwo<real_of<logit_t, how>> top;

    __device__ __forceinline__ void add(const Task& task, uint4 raw, int column, int count) {
        real_of<logit_t, how> x[Format<logit_t>::per_vector];
        unpack<logit_t, how>(task, raw, x, column, count);
        #pragma unroll
        for (auto value : x) top.add(value);
    }
    __device__ __forceinline__ TopTwo<real_of<logit_t, how>> found() const { return top; }
};

// 16-bit logits two at a time, as they are.
template <typename logit_t, int how> struct VectorTops<logit_t, how, true> {
    using format = Format<logit_t>;
    using pair_t = typename format::pair_t;
    unsigned max = format::absent, second = format::absent;

    __device__ __forceinline__ void add(const Task&, uint4 raw, int, int) {
        add_pair(raw.x);
        add_pair(raw.y);
        add_pair(raw.z);
        add_pair(raw.w);
    }
    __device__ __forceinline__ void add_pair(unsigned word) {
        pair_t x = pair(word), top = pair(max), next = pair(second);
        next = __hmax2(next, __hmin2(top, x));
        top = __hmax2(top, x);
        max = bits(top);
        second = bits(next);
    }
    __device__ __forceinline__ TopTwo<float> found() const {
        const pair_t top = pair(max), next = pair(second);
        TopTwo<float> low, high;
        low.max = format::value(top.x);
        low.second = format::value(next.x);
        high.max = format::value(top.y);
        high.second = format::value(next.y);
        return MergeTopTwo()(low, high);
    }
    static __device__ __forceinline__ pair_t pair(unsigned word) { return *reinterpret_cast<const pair_t*>(&word); }
    static __device__ __forceinline__ unsigned bits(pair_t pair) { return *reinterpret_cast<const unsigned*>(&pair); }
};

// A sum of float32 numbers of at most 8: in integers, of which additions can be regrouped. Units of 2**-40 keep 4 eps of
// a sum above 1 of 2**21 terms. NaN is a bit of its own.
struct FixedSum {
    static constexpr unsigned long long nan_bit = 1ull << 63;
    unsigned long long units = 0;
    float nan = 0;  // 0 or NaN

    __device__ __forceinline__ void add(float part) {
        units += (unsigned long long)__float2ll_rn(part * 1099511627776.0f);
        nan = fmaf(part, 0.0f, nan);
    }
    struct Plus {
        template <typename T> static __device__ __forceinline__ T nothing() { return 0; }
        template <typename T> __device__ __forceinline__ T operator()(T a, T b) const {
            return ((a | b) & nan_bit) | ((a + b) & ~nan_bit);
        }
    };
    using Packed = unsigned long long;
    __device__ __forceinline__ Packed packed() const { return nan == 0.0f ? units & ~nan_bit : nan_bit; }
    static __device__ __forceinline__ double value(Packed sum) {
        if (sum & nan_bit) return -infinity<double>() + infinity<double>();
        return (double)((long long)(sum << 1) >> 1) * (1.0 / 1099511627776.0);  // 63 bits, signed
    }
};

// Of float64 numbers: as it comes. Kernels for them are chosen by the row alone.
struct FloatSum {
    double sum = 0.0;

    __device__ __forceinline__ void add(double part) { sum += part; }
    using Plus = Sum;
    using Packed = double;
    __device__ __forceinline__ Packed packed() const { return sum; }
    static __device__ __forceinline__ double value(Packed sum) { return sum; }
};

template <typename real> struct SumOf { using type = FixedSum; };
template <> struct SumOf<double> { using type = FloatSum; };

// In pairs: one after another, small terms would each be rounded at the size of the maximum, all in the same direction.
template <typename real, int n> __device__ __forceinline__ real total_of(real (&terms)[n]) {
    #pragma unroll
    for (int apart = 1; apart < n; apart *= 2) {
        #pragma unroll
        for (int i = 0; i + apart < n; i += 2 * apart) terms[i] += terms[i + apart];
    }
    return terms[0];
}

// What the second look at a row finds, beside the maxima of the first.
template <typename logit_t, typename soft_t, int how> struct RowSums {
    using real = real_of<logit_t, how>;
    using Sums = typename SumOf<real>::type;

    Sums sum, moment;  // of exp(x - second), and of exp(x - second) * (x - second), the maximum counting as the second
    double gap = 0.0, weight = 0.0;
    int argmax = Smaller::nothing<int>(), before = 0;

    // The logits of a vector, of which the first is at `column` of `count`.
    template <int n>
    __device__ __forceinline__ void add(const Task& task, const real (&x)[n], int column, int count, TopTwo<real> top,
                                        const Exponential<logit_t, how>& e, const SpreadRow<logit_t, soft_t, how>& spread,
                                        long long first_class, double ranked, long long label) {
        const real max = top.finite(top.max), second = top.finite(top.second), bound = top.bound();
        real terms[n], moment_part = 0, gaps = 0, weights = 0;
        #pragma unroll
        for (int i = 0; i < n; ++i) {
            const real clipped = at_most(x[i], bound), term = e.exact(clipped, second);
            terms[i] = term;
            if (how & with_moment) moment_part += term == 0 ? 0 : term * (clipped - second);
            if ((how & any_spread) && column + i < count) {
                const real s = spread.at(column + i);
                weights += s;
                if (s != 0) gaps += s * (max - x[i]);  // weight 0 on a -inf logit counts 0
            }
            if ((how & with_argmax) && same(x[i], top.max) && column + i < argmax) argmax = column + i;
            if (how & with_rank) before += before_label(task, x[i], first_class + column + i, ranked, label);
        }
        sum.add(total_of(terms));
        if (how & with_moment) moment.add(moment_part);
        if (how & any_spread) {
            gap += gaps;
            weight += weights;
        }
    }
};

// RowStats from what was summed; the sums are those of the whole row.
template <int how, typename real>
__device__ __forceinline__ Stats finished(const Task& task, TopTwo<real> top, double sum, double moment) {
    Stats stats = Stats::empty();
    const double below = (widened(top.second) - widened(top.max)) * task.inverse_temperature;
    const double scale = Exponential<double, 0>(task.inverse_temperature).exact(widened(top.second), widened(top.max));
    const bool alone = top.second == -infinity<real>();  // no other has a probability, and nothing counted as 1
    const double others = alone ? sum : sum - 1.0;
    stats.max = widened(top.max) * task.inverse_temperature;
    if (top.max == infinity<real>()) stats.rest = top.max - top.max;
    else if (top.max == -infinity<real>()) stats.rest = -1.0;
    else stats.rest = alone ? others : others * scale;
    if (how & with_moment) stats.moment = alone || scale == 0.0 ? 0.0 : scale * (moment * task.inverse_temperature + below * others);
    if (sum != sum) stats.max = stats.rest = sum;
    return stats;
}
