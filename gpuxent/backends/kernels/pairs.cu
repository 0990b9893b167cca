// Two models' rows: the record of each, and how far their distributions diverge, which needs the normalizers of both. So
// a row is looked at three times, of which one is a read of memory: see resident.cu.
//
// A class of probabilities p and q adds to each divergence the larger of the two times a function of x = |ln(p/q)|, which
// logits and normalizers give without p and q: see _numba_pairs.py. None is negative, and each keeps its digits near 0.

// (exp(r) - 1 - r) / r**2 on |r| <= ln(2) / 2, and C(w) = 1 - (w - (2 - w) ln(2 / (2 - w))) / w**2 on [0, 1], from the
// highest power down.
__device__ constexpr float exp_terms_float[] = {1.98577929383e-4f, 0.00139336866972f, 0.00833336088321f, 0.0416664647281f,
                                                0.166666665314f, 0.500000001346f};
__device__ constexpr float js_terms_float[] = {-7.75270693251e-4f, 8.18649415571e-4f, -0.00199819485826f,
                                               -0.00275135759962f, -0.010484434039f, -0.0416621120709f, 0.749999950203f};
__device__ constexpr double exp_terms_double[] = {
    2.506835151683288e-08, 2.7620158308807557e-07, 2.755735523697101e-06, 2.480152116210936e-05,
    0.00019841269784701888, 0.0013888888917288683, 0.00833333333335626, 0.04166666666662401, 0.16666666666666644,
    0.5000000000000001};
__device__ constexpr double js_terms_double[] = {
    -1.8748606053315399e-06, 1.2945879004697594e-05, -4.275047549655311e-05, 8.644524592321876e-05,
    -0.00012015559901751202, 0.00011861638784933903, -8.925088728066859e-05, 4.454554144599523e-05,
    -2.8812718681245583e-05, -1.554542320947478e-05, -5.565569357745372e-05, -0.0001392785726025643,
    -0.00037205016609274087, -0.0010416646751731803, -0.0031250000913959396, -0.010416666664457471,
    -0.04166666666668781, 0.75};

template <typename real, int n> __device__ __forceinline__ real polynomial(const real (&from_highest)[n], real x) {
    real sum = from_highest[0];
    #pragma unroll
    for (int i = 1; i < n; ++i) sum = fma(sum, x, from_highest[i]);
    return sum;
}

// What depends on the type: 2**k, which is 0 for the lowest k; where exp(-x) is 0; the largest number; ln 2 in two parts.
template <typename real> struct Falling;

template <> struct Falling<float> {
    static constexpr float zero_from = 87.7524f, largest = 3.4028234e38f, ln_2 = 0.693147182f, ln_2_low = -1.9046543e-9f;
    static __device__ __forceinline__ float power(float k) { return __int_as_float(((int)k + 127) << 23); }
    static __device__ __forceinline__ float exp_series(float r) { return polynomial(exp_terms_float, r); }
    static __device__ __forceinline__ float js_series(float w) { return polynomial(js_terms_float, w); }
};

template <> struct Falling<double> {
    static constexpr double zero_from = 708.812, largest = 1.7976931348623157e308, ln_2 = 0.6931471805599453,
                            ln_2_low = 2.3190468138462996e-17;
    static __device__ __forceinline__ double power(double k) {
        return __longlong_as_double(((long long)k + 1023) << 52);
    }
    static __device__ __forceinline__ double exp_series(double r) { return polynomial(exp_terms_double, r); }
    static __device__ __forceinline__ double js_series(double w) { return polynomial(js_terms_double, w); }
};

// What a class adds to the divergences, over the larger of its two probabilities; JS and TV twice.
template <typename real> struct Terms {
    real ahead, behind, js, tv;

    // x >= 0: infinite for a class that one side excludes, NaN if both do
    __device__ __forceinline__ explicit Terms(real x) {
        using falling = Falling<real>;
        x = smaller(x, falling::largest);
        const real d = -smaller(x, falling::zero_from), k = rint(d * (real)1.4426950408889634);
        const real r = fma(-k, falling::ln_2_low, fma(-k, falling::ln_2, d)), power = falling::power(k);
        const real curve = r * r * falling::exp_series(r), fall = curve + r;  // exp(r) - 1 - r, and exp(r) - 1
        const real e = fma(power, fall, power), w = (1 - power) - power * fall;
        const bool near = x < (real)0.34;  // k is 0
        ahead = near ? curve : x - w;
        behind = near ? fma(x, w, -ahead) : fma(-x, e, w);
        js = w * w * falling::js_series(w) - ahead * e;
        tv = w;
    }
};

// What makes probabilities of logits, and logarithms of their ratio of the logits' difference.
template <typename real> struct Normalizers {
    real p_max, q_max, p_factor, q_factor, ratio, ratio_low;

    __device__ __forceinline__ Normalizers(double p_top, double p_rest, double q_top, double q_rest)
        : p_max((real)p_top), q_max((real)q_top), p_factor((real)reciprocal(1.0 + p_rest)),
          q_factor((real)reciprocal(1.0 + q_rest)) {
        const double tops = p_top - q_top, sums = log1p(p_rest) - log1p(q_rest), both = tops + sums;
        ratio = (real)both;
        ratio_low = (real)((both - (double)ratio) + (rounding_of(tops, p_top, q_top) + rounding_of(both, tops, -sums)));
    }
    // Has each side a distribution?
    __device__ __forceinline__ bool valid() const { return ratio - ratio == 0; }
};

template <typename real> struct DivergenceSums {
    double kl = 0.0, reverse = 0.0, js = 0.0, tv = 0.0;
    bool only_p = false, only_q = false;  // is there a class that the other side excludes?

    // The transformed logits of some classes.
    template <int n> __device__ __forceinline__ void add(const real (&p)[n], const real (&q)[n], const Normalizers<real>& by) {
        const Exponential<real, 0> e(1.0);
        real parts[4] = {0, 0, 0, 0};
        #pragma unroll
        for (int i = 0; i < n; ++i) {
            const real d = p[i] - q[i], rounding = rounding_of(d, p[i], q[i]), lost = rounding == rounding ? rounding : 0;
            const real log_ratio = (d - by.ratio) + (lost - by.ratio_low);  // NaN where both exclude the class
            const Terms<real> terms(fabs(log_ratio));
            const bool p_leads = log_ratio > 0;
            const real leader = e.exact(p_leads ? p[i] : q[i], p_leads ? by.p_max : by.q_max);
            const real larger = leader * (p_leads ? by.p_factor : by.q_factor);
            parts[0] += larger * (p_leads ? terms.ahead : terms.behind);
            parts[1] += larger * (p_leads ? terms.behind : terms.ahead);
            parts[2] += larger * terms.js;
            parts[3] += larger * terms.tv;
            only_p = only_p || d == infinity<real>();
            only_q = only_q || d == -infinity<real>();
        }
        kl += parts[0];
        reverse += parts[1];
        js += parts[2];
        tv += parts[3];
    }
    // grid (rows): writes a row's four, in the order of Divergences in _records.py.
    template <class Group> __device__ __forceinline__ void write(Group& group, const Normalizers<real>& by, double* out) const {
        const double found[4] = {group.reduce(only_p ? infinity<double>() : kl, Sum()),
                                 group.reduce(only_q ? infinity<double>() : reverse, Sum()),
                                 0.5 * group.reduce(js, Sum()), 0.5 * group.reduce(tv, Sum())};
        if (!group.leads()) return;
        #pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = by.valid() ? found[i] : infinity<double>() - infinity<double>();
    }
};

// One side's piece of a row: in shared memory once it has been read (`copied`), or in L2.
template <typename logit_t, int how, bool copied> struct Side {
    const Task& task;
    const Piece& piece;
    const Slice<logit_t> slice;
    uint4* kept;

    __device__ __forceinline__ Side(const Task& task, const Piece& piece, uint4* kept)
        : task(task), piece(piece), slice(piece.logits<logit_t>(task)), kept(kept) {}

    __device__ __forceinline__ double label_logit() const {
        return logit_of<logit_t, how>(task, slice, piece.begin, local_label(task, piece.row, 0, (int)task.vocab));
    }
    template <class Group> __device__ __forceinline__ Found<logit_t, how> look(Group group, double label_logit) const {
        InMemory<logit_t, how, copied> held{task, slice, group.thread(), (int)blockDim.x, kept};
        const SpreadRow<logit_t, float, how> no_spread(task, piece.row, piece.begin);
        return look_at_row<logit_t, float, how>(task, held, group, piece, no_spread, label_logit);
    }
    // Some transformed logits, as many as a vector of the other side has if that is more; -inf beyond the end.
    template <typename real, int n> __device__ __forceinline__ void read(int chunk, real (&x)[n]) const {
        constexpr int each = Format<logit_t>::per_vector;
        #pragma unroll
        for (int i = 0; i < n / each; ++i) {
            const int v = chunk * (n / each) + i;
            real_of<logit_t, how> part[each];
            if (v < slice.vectors)
                unpack<logit_t, how>(task, copied ? kept[v] : slice.template load<Reading::again>(v), part, v * each, slice.count);
            #pragma unroll
            for (int j = 0; j < each; ++j) {
                x[i * each + j] = v < slice.vectors ? (real)part[j] : -infinity<real>();
                if (sizeof(real) == 8) x[i * each + j] *= (real)task.inverse_temperature;
            }
        }
    }
};

template <int n, typename real, class P, class Q>
__device__ __forceinline__ DivergenceSums<real> divergences_of(const P& p, const Q& q, const Normalizers<real>& by) {
    DivergenceSums<real> sums;
    for (int chunk = threadIdx.x; chunk * n < p.slice.count; chunk += blockDim.x) {
        real a[n], b[n];
        p.read(chunk, a);
        q.read(chunk, b);
        sums.add(a, b, by);
    }
    return sums;
}

template <typename p_t, typename q_t>
constexpr int classes_at_once =
    Format<p_t>::per_vector > Format<q_t>::per_vector ? Format<p_t>::per_vector : Format<q_t>::per_vector;

template <typename p_t, typename q_t, int p_how, int q_how, typename real, bool copied, int blocks>
__device__ __forceinline__ void whole_pair(const Task& base, const Task& other, double* out) {
    const Piece piece(base, blockIdx.x);
    uint4* kept = reinterpret_cast<uint4*>(shared_memory() + BlockGroup<blocks>::shared_bytes);
    const Side<p_t, p_how, copied> p(base, piece, kept);
    const Side<q_t, q_how, copied> q(other, piece, kept + p.slice.vectors);
    const double p_label = p.label_logit(), q_label = q.label_logit();
    // Each look takes up the slots of the group again: its last reduction is a barrier behind the first one's readers.
    const auto p_found = p.look(BlockGroup<blocks>(), p_label);
    const auto q_found = q.look(BlockGroup<blocks>(), q_label);
    BlockGroup<blocks> group;
    const auto by = group.template once<Normalizers<real>>([&] {
        const Stats p_stats = p_found.stats(base), q_stats = q_found.stats(other);
        if (group.leads()) {
            write<p_how>(base, piece.row, p_stats, p_label);
            write<q_how>(other, piece.row, q_stats, q_label);
        }
        return Normalizers<real>(p_stats.max, p_stats.rest, q_stats.max, q_stats.rest);
    });
    divergences_of<classes_at_once<p_t, q_t>>(p, q, by).write(group, by, out + 4 * piece.row);
    group.done_with_peers();
    group.leave();
}

// One pair of rows per block, in shared memory (`copied`) or read again through L2. grid (rows), block up to 256.
template <typename p_t, typename q_t, int p_how, int q_how, typename real, bool copied>
__global__ __launch_bounds__(256, sizeof(real) == 8 ? 1 : 2) void pair_rows(const Task base, const Task other, double* out) {
    whole_pair<p_t, q_t, p_how, q_how, real, copied, 1>(base, other, out);
}

// One pair in the shared memories of a cluster. `slices` is 8. grid (8 * rows), block up to 256.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <typename p_t, typename q_t, int p_how, int q_how, typename real>
__global__ __cluster_dims__(8, 1, 1) __launch_bounds__(256, sizeof(real) == 8 ? 1 : 2)
void cluster_pairs(const Task base, const Task other, double* out) {
    whole_pair<p_t, q_t, p_how, q_how, real, true, 8>(base, other, out);
}
#endif

// Where the statistics of whole rows are known: what these classes add. grid (rows), block up to 256.
template <typename p_t, typename q_t, int p_how, int q_how, typename real>
__global__ __launch_bounds__(256, sizeof(real) == 8 ? 1 : 2) void divergence_rows(const Task base, const Task other, double* out) {
    const Piece piece(base, blockIdx.x);
    const Side<p_t, p_how, false> p(base, piece, nullptr);
    const Side<q_t, q_how, false> q(other, piece, nullptr);
    BlockGroup<1> group;
    const auto by = group.template once<Normalizers<real>>([&] {
        return Normalizers<real>(base.max[piece.row], base.rest[piece.row], other.max[piece.row], other.rest[piece.row]);
    });
    divergences_of<classes_at_once<p_t, q_t>>(p, q, by).write(group, by, out + 4 * piece.row);
}
