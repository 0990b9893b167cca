// What one class adds to the sums and maps of _cupy_sums.py, in float64: models that are close differ by little.

__device__ inline double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
__device__ inline double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// ---- Numbers as they are stored ----
//
// CuPy compiles with -ftz=true: any arithmetic on float32, conversion included, takes a subnormal for 0. A probability
// may be one, and -ln of it is 100, not infinity. So stored numbers are read and written as integers. Memory holds a
// sign, an exponent with a bias, and so many bits of fraction; a double has all of their numbers as normal ones.

template <int fraction_bits, int bias> __device__ inline double widened(unsigned magnitude, bool negative) {
    const unsigned long long fields = (unsigned long long)magnitude << (52 - fraction_bits);
    const bool finite = magnitude >> fraction_bits < 2 * bias + 1;
    const double rebias = __longlong_as_double((2046ll - bias) << 52);  // 2**(1023 - bias)
    const double value = finite ? __longlong_as_double((long long)fields) * rebias
                                : __longlong_as_double((long long)(fields | 0x7ff0000000000000ull));
    return negative ? -value : value;
}

// Rounded once, to the nearest, to even on ties. Returns the magnitude's bits; the caller adds the sign.
template <int fraction_bits, int bias> __device__ inline unsigned narrowed(double value) {
    const unsigned infinite = (2u * bias + 1) << fraction_bits;
    if (value != value) return infinite | 1u << (fraction_bits - 1);
    const double size = fabs(value);
    const unsigned long long bits = (unsigned long long)__double_as_longlong(size);
    if (size < __longlong_as_double((1024ll - bias) << 52)) {  // subnormal: the sum's last bit counts the smallest
        const double ruler = __longlong_as_double((1024ll - bias + 52 - fraction_bits) << 52);
        return (unsigned)(__double_as_longlong(size + ruler) - __double_as_longlong(ruler));
    }
    const int dropped = 52 - fraction_bits;
    const unsigned long long half = (1ull << (dropped - 1)) - 1 + (bits >> dropped & 1);
    const unsigned long long rounded = (bits + half - ((unsigned long long)(1023 - bias) << 52)) >> dropped;
    return rounded < infinite ? (unsigned)rounded : infinite;
}

__device__ inline unsigned sign_of(double value, int place) {
    return (unsigned)((unsigned long long)__double_as_longlong(value) >> 63) << place;
}

__device__ inline double from_half(unsigned short bits) { return widened<10, 15>(bits & 0x7fffu, bits >> 15); }
__device__ inline double from_bfloat16(unsigned short bits) { return widened<7, 127>(bits & 0x7fffu, bits >> 15); }
__device__ inline double from_float(float stored) {
    const unsigned bits = __float_as_uint(stored);
    return widened<23, 127>(bits & 0x7fffffffu, bits >> 31);
}

__device__ inline unsigned short to_half(double value) {
    return (unsigned short)(narrowed<10, 15>(value) | sign_of(value, 15));
}
__device__ inline unsigned short to_bfloat16(double value) {
    return (unsigned short)(narrowed<7, 127>(value) | sign_of(value, 15));
}
__device__ inline float to_float(double value) {
    return __uint_as_float(narrowed<23, 127>(value) | sign_of(value, 31));
}

// ---- Functions that several terms share ----

__device__ inline double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

// fmax would drop a NaN.
__device__ inline double at_least_0(double x) { return x < 0 ? 0 : x; }

// What sum = a + b was rounded by, exactly (Knuth, TAOCP 2, 4.2.2).
__device__ inline double two_sum_error(double a, double b, double sum) {
    const double part = sum - a;
    return (a - (sum - part)) + (b - part);
}

// exp(a - b): exp would multiply the rounding error of a - b by |a - b|.
__device__ inline double exp_difference(double a, double b) {
    const double difference = a - b, error = two_sum_error(a, -b, difference);
    return exp(difference) * (fabs(error) < 1 ? 1 + error : 1);
}

// ---- Sums ----

// `low` is what additions have rounded off: a thread adds hundreds of terms one by one, and where they are equal, as of
// classes that share a logit, their errors do not cancel.
struct Sum {
    double value, low;
    __device__ inline Sum(double value = 0) : value(value), low(0) {}
    __device__ inline double total() const { return fabs(value) < infinity() ? value + low : value; }
};

__device__ inline Sum added(Sum a, Sum b) {
    Sum sum(a.value + b.value);
    sum.low = a.low + b.low + two_sum_error(a.value, b.value, sum.value);
    return sum;
}

struct Sums {
    Sum first, second, third;
};

__device__ inline Sums added(Sums a, Sums b) {
    return Sums{added(a.first, b.first), added(a.second, b.second), added(a.third, b.third)};
}

// ---- Rows of one array: maximum and sum of exponentials, in one pass over any stride ----
//
// `sum` is that of exp(logit - frame) over every class but one that has the maximum, and `moment` that of
// exp(logit - frame) * (logit - max). A frame near the maximum serves all maxima within 32 of it: a maximum that moves,
// as it does at every class of an ascending row, rounds nothing that has been summed.
struct RowState {
    double max;
    Sum sum, moment;
    long long argmax;
};

__device__ inline double frame_of(double max) { return fabs(max) < infinity() ? 64 * rint(max / 64) : 0; }

// argmax 2**53 loses every tie: RowStats' NO_CLASS
__device__ inline RowState no_class() { return RowState{-infinity(), 0, 0, 1ll << 53}; }
__device__ inline RowState one_class(double logit, long long column) { return RowState{logit, 0, 0, column}; }

__device__ inline void rescale(Sum& sum, double scale) {
    sum.value *= scale;
    sum.low *= scale;
}

template <bool with_moment> __device__ inline RowState merged(RowState lead, RowState other) {
    if (other.max > lead.max || other.max != other.max) {  // a NaN leads, and stays
        const RowState swapped = lead;
        lead = other;
        other = swapped;
    }
    const double frame = frame_of(lead.max), other_frame = frame_of(other.max);
    if (frame != other_frame && other.sum.value != 0) {
        const double scale = exp(other_frame - frame);
        rescale(other.sum, scale);
        rescale(other.moment, scale);
    }
    const double weight = exp_difference(other.max, frame);  // the maximum that is none any more joins the sum
    if (with_moment) {
        const double below = other.sum.total() + weight;
        lead.moment = added(lead.moment, other.moment);
        lead.moment = added(lead.moment, below == 0 ? 0 : below * (other.max - lead.max));
    }
    lead.sum = added(added(lead.sum, other.sum), weight);
    if (other.max == lead.max && other.argmax < lead.argmax) lead.argmax = other.argmax;
    return lead;
}

__device__ inline void store_row(RowState row, double& top, double& rest, long long& argmax, double& moment) {
    const bool empty = row.max == -infinity(), valid = empty || fabs(row.max) < infinity();
    const double scale = exp_difference(frame_of(row.max), row.max);
    top = row.max;
    rest = empty ? -1 : valid ? row.sum.total() * scale : not_a_number();
    moment = empty ? 0 : valid ? row.moment.total() * scale : not_a_number();
    argmax = row.argmax;
}

__device__ inline double softmax_term(double logit, double max, double rest) {
    return exp_difference(logit, max) / (1 + rest);
}

// ---- Two rows: divergences ----

struct Pair {
    double p, q, log_ratio;  // ln(p / q)
};

// log1p is exact where the two are close, and loses the smaller one where they are far apart.
__device__ inline Pair pair_of_probs(double p, double q) {
    return Pair{p, q, fabs(p - q) < q / 2 ? log1p((p - q) / q) : log(p) - log(q)};
}

// p ln(p/q) - p + q: each is non-negative, so no sum of them is ever negative, and an error of the normalizers counts
// only squared. Over rows that sum to 1 the last two cancel. Close to 1 the ratio alone says more than p - q.
__device__ inline double kl_term(Pair x) {
    if (fabs(x.log_ratio) < 1) return at_least_0(x.p * (x.log_ratio + expm1(-x.log_ratio)));
    if (x.log_ratio == infinity()) return x.log_ratio;  // q excludes the class: however small p is, or has become
    return x.p == 0 ? x.q : at_least_0(x.p * x.log_ratio - (x.p - x.q));
}

// (p ln(p/m) + q ln(q/m)) / 2 with m = (p + q) / 2, where ln(p/m) = ln 2 - softplus(-ln(p/q)). Close to 1 these cancel,
// and with t = (p - q) / (p + q) = tanh(ln(p/q) / 2) they come to m (t ln(p/q) + ln(1 - t**2)) / 2.
__device__ inline double js_term(Pair x) {
    if (fabs(x.log_ratio) < 1) {
        const double t = tanh(x.log_ratio / 2);
        return at_least_0((x.p + x.q) / 2 * (t * x.log_ratio + log1p(-t * t)) / 2);
    }
    const double ln_2 = 0.693147180559945309;
    const double from_p = x.p == 0 ? 0 : x.p * (ln_2 - softplus(-x.log_ratio));
    const double from_q = x.q == 0 ? 0 : x.q * (ln_2 - softplus(x.log_ratio));
    return at_least_0((from_p + from_q) / 2);
}

__device__ inline double tv_term(Pair x) { return fabs(x.p - x.q) / 2; }

// A weight of 0 counts 0 even where the probability is 0.
__device__ inline double cross_term(double weight, double p) { return weight == 0 ? 0 : -weight * log(p); }

// ---- Checks of rows ----

// How many are not in [0, high], and the sum of all. An entry equal to `ignore` (NaN for none) is no fault; a NaN is.
__device__ inline Sums range_term(double x, double high, double ignore) {
    const bool fine = (x >= 0 && x <= high) || x == ignore;
    return Sums{fine ? 0. : 1., x, 0};
}

// How many are 1, how many neither 1 nor 0, and the sum of the classes of the ones.
__device__ inline Sums onehot_term(double x, double column) {
    return Sums{x == 1 ? 1. : 0., x != 1 && x != 0 ? 1. : 0., x == 1 ? column : 0};
}

// ---- Independent sigmoids ----

// class_weight (pos_weight y positive + (1 - y) negative), where these are -ln p and -ln(1 - p); a term of weight 0 is 0
// even where its log is infinite.
__device__ inline double weighted_loss(
    double x, double y, double positive, double negative, double pos_weight, double class_weight, double ignore) {
    if (y == ignore) return 0;
    if (x != x) return x;
    double loss = y == 0 || pos_weight == 0 ? 0 : pos_weight * y * positive;
    loss += y == 1 ? 0 : (1 - y) * negative;
    return class_weight == 0 ? 0 : class_weight * loss;
}

__device__ inline double loss_of_logit(double x, double y, double pos_weight, double class_weight, double ignore) {
    return weighted_loss(x, y, softplus(-x), softplus(x), pos_weight, class_weight, ignore);
}

__device__ inline double loss_of_prob(double x, double y, double pos_weight, double class_weight, double ignore) {
    return weighted_loss(x, y, -log(x), -log1p(-x), pos_weight, class_weight, ignore);
}

__device__ inline Sums counted(double loss, double y, double ignore) { return Sums{loss, y == ignore ? 0. : 1., 0}; }

// class_weight ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x))
__device__ inline double slope_of_logit(double x, double y, double pos_weight, double class_weight, double ignore) {
    if (y == ignore) return 0;
    const double small = exp(-fabs(x));
    const double rising = x >= 0 ? 1 : small, falling = x >= 0 ? small : 1;
    return class_weight * (((1 - y) * rising - pos_weight * y * falling) / (1 + small));
}
