// The exact sum of float64 values over a denominator, rounded once: in any order, by any number of threads, the same.
//
// The sum is an integer in units of 2**-1074, the smallest float64, as limbs of 32 bits in signed words of 64: a word
// takes 2**31 additions before anything has to be carried.

namespace totals {

constexpr int WARP = 32;      // threads of a block
constexpr int AT_ONCE = 4;    // values that a thread has on their way from memory
constexpr int LIMBS = 68;     // 2098 bits for the largest float64, and 78 more for how many of them are added
constexpr int POSITIVE = LIMBS, NEGATIVE = LIMBS + 1, NANS = LIMBS + 2;  // infinities and NaNs are counted beside
constexpr int WORDS = LIMBS + 3;
constexpr long long LOW = 0xffffffffll;

__device__ __forceinline__ double number(double x) { return x; }
__device__ __forceinline__ double number(const double* x) { return *x; }

__device__ __forceinline__ double from_bits(unsigned long long bits) {
    return __longlong_as_double(static_cast<long long>(bits));
}

// Adds a value to a column of words, `WARP` apart. Each thread has a column of its own: no two ever meet.
__device__ __forceinline__ void add(double value, long long* column) {
    const long long bits = __double_as_longlong(value);
    const int exponent = static_cast<int>(bits >> 52) & 0x7ff;
    long long mantissa = bits & 0xfffffffffffffll;
    if (exponent == 0x7ff) {
        column[WARP * (mantissa != 0 ? NANS : bits < 0 ? NEGATIVE : POSITIVE)] += 1;
        return;
    }
    if (exponent > 0) mantissa |= 1ll << 52;
    const int position = exponent > 0 ? exponent - 1 : 0;  // of the mantissa's lowest bit
    const int shift = position & 31;
    const long long low = (mantissa & LOW) << shift;
    const long long high = ((mantissa >> 32) << shift) + (low >> 32);
    const long long sign = bits < 0 ? -1 : 1;
    long long* limb = column + WARP * (position >> 5);
    limb[0] += sign * (low & LOW);
    limb[WARP] += sign * (high & LOW);
    limb[2 * WARP] += sign * (high >> 32);
}

// Carries, so that every limb is in [0, 2**32). Returns what is left above them: -1 for a negative sum, else 0.
__device__ __forceinline__ long long carry_up(long long* limbs, long long carry, long long flip) {
    for (int i = 0; i < LIMBS; ++i) {
        const long long sum = (limbs[i] ^ flip) + carry;
        limbs[i] = sum & LOW;
        carry = sum >> 32;
    }
    return carry;
}

// (sum of limbs) / denominator, rounded to nearest, ties to even.
//
// Integers do it: sum = S * 2**-1074 and denominator = D * 2**e with D of 53 bits. The first 107 bits of S, an integer
// T, divided by D give an integer of 54 or 55 bits and a remainder. Bits of S below T can only make the quotient
// larger by less than one unit: that they, or the remainder, are not 0 is all that rounding needs to know of them.
__device__ double rounded_quotient(long long* limbs, double denominator) {
    if (denominator == 0 || denominator != denominator) return from_bits(0x7ff8000000000000ull);
    unsigned long long sign = __double_as_longlong(denominator) < 0 ? 1ull << 63 : 0;
    if (carry_up(limbs, 0, 0) < 0) {
        carry_up(limbs, 1, LOW);  // the two's complement
        sign ^= 1ull << 63;
    }
    int top = LIMBS - 1;
    while (top >= 0 && limbs[top] == 0) --top;
    const unsigned long long over = static_cast<unsigned long long>(__double_as_longlong(denominator)) << 1 >> 1;
    if (top < 0 || over >> 52 == 0x7ff) return from_bits(sign);

    unsigned long long divisor = over & 0xfffffffffffffull;
    int divisor_place = static_cast<int>(over >> 52);  // of its lowest bit, above 2**-1074
    if (divisor_place > 0) {
        divisor |= 1ull << 52;
        --divisor_place;
    } else {
        const int shift = __clzll(static_cast<long long>(divisor)) - 11;
        divisor <<= shift;
        divisor_place = -shift;
    }

    auto limb = [&](int i) { return i < 0 ? 0ull : static_cast<unsigned long long>(limbs[i]); };
    const int shift = __clzll(limbs[top]) - 32;  // 0 to 31
    const unsigned long long next = limb(top - 2) << 32 | limb(top - 3);
    const unsigned long long high = (limb(top) << 32 | limb(top - 1)) << shift | next >> 32 >> (32 - shift);
    const unsigned long long low = next << shift | limb(top - 4) >> (32 - shift);
    bool below = (low & 0x1fffff) != 0 || (limb(top - 4) << shift & LOW) != 0;
    for (int i = 0; i < top - 4; ++i) below = below || limbs[i] != 0;

    // The 107 bits: 52, which are less than the divisor, and five digits of 11. A digit guessed from float64 is off by
    // one at most: remainder and divisor are rounded to 2**-53, and the digit is less than 2**11.
    unsigned long long remainder = high >> 12, quotient = 0, digits = high << 52 | low >> 12;
    const double inverse = 1.0 / static_cast<double>(divisor);
    for (int i = 0; i < 5; ++i) {
        const unsigned long long part = remainder << 11 | digits >> 53;
        digits <<= 11;
        unsigned long long digit = static_cast<unsigned long long>(static_cast<double>(part) * inverse);
        long long rest = static_cast<long long>(part - digit * divisor);
        if (rest < 0) {
            --digit;
            rest += static_cast<long long>(divisor);
        } else if (rest >= static_cast<long long>(divisor)) {
            ++digit;
            rest -= static_cast<long long>(divisor);
        }
        remainder = static_cast<unsigned long long>(rest);
        quotient = quotient << 11 | digit;
    }
    below = below || remainder != 0;

    // A float64 has 53 bits, none of them below 2**-1074.
    const int place = 32 * top + (32 - shift) - 107 - divisor_place;  // of the quotient's lowest bit, above 2**0
    const int spare = 64 - __clzll(static_cast<long long>(quotient)) - 53;
    const int drop = place + spare < -1074 ? -1074 - place : spare;
    if (drop > 55) return from_bits(sign);  // less than half of the smallest
    const unsigned long long half = 1ull << (drop - 1), dropped = quotient & (2 * half - 1);
    unsigned long long result = quotient >> drop;
    if (dropped > half || (dropped == half && (below || (result & 1)))) ++result;
    const int exponent = place + drop + 1074;
    if (exponent > 2045) return from_bits(sign | 0x7ffull << 52);
    // The leading bit, where there is one, adds 1 to the exponent; so does a carry out of the 53 bits.
    return from_bits(sign | ((static_cast<unsigned long long>(exponent) << 52) + result));
}

// `sums` has WORDS words of 0 and a counter; a single block needs none. The last block to finish rounds.
template <typename value_t, typename denominator_t>
__global__ void __launch_bounds__(WARP)
exact_total(const value_t* values, long long count, denominator_t denominator, unsigned long long* sums, double* out) {
    long long* words = reinterpret_cast<long long*>(shared_memory());  // WORDS of WARP each, then WORDS + 1
    long long* own = words + WORDS * WARP;
    const int lane = static_cast<int>(threadIdx.x);
    const long long step = static_cast<long long>(gridDim.x) * WARP;
    for (int i = 0; i < WORDS; ++i) words[i * WARP + lane] = 0;
    __syncthreads();

    for (long long first = static_cast<long long>(blockIdx.x) * WARP + lane; first < count; first += AT_ONCE * step) {
        double batch[AT_ONCE];
        #pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const long long at = first + i * step;
            batch[i] = at < count ? static_cast<double>(values[at]) : 0.0;
        }
        #pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) add(batch[i], words + lane);
    }
    __syncthreads();

    for (int word = lane; word < WORDS; word += WARP) {
        long long sum = 0;
        for (int i = 0; i < WARP; ++i) sum += words[word * WARP + ((lane + i) & (WARP - 1))];
        own[word] = sum;
    }
    __syncthreads();

    if (gridDim.x > 1) {
        for (int word = lane; word < WORDS; word += WARP) {
            // One step of carrying leaves room for the sums of 2**29 blocks.
            const long long kept = word < LIMBS ? own[word] & LOW : own[word];
            const long long carried = word > 0 && word < LIMBS ? own[word - 1] >> 32 : 0;
            if (kept + carried != 0) atomicAdd(sums + word, static_cast<unsigned long long>(kept + carried));
        }
        __threadfence();
        __syncthreads();
        if (lane == 0) own[WORDS] = atomicAdd(sums + WORDS, 1ull) == gridDim.x - 1;
        __syncthreads();
        if (own[WORDS] == 0) return;
        __threadfence();
        for (int word = lane; word < WORDS; word += WARP) own[word] = static_cast<long long>(atomicAdd(sums + word, 0ull));
        __syncthreads();
    }
    if (lane != 0) return;

    const double over = number(denominator);
    const bool up = own[POSITIVE] != 0, down = own[NEGATIVE] != 0;
    if (own[NANS] != 0 || (up && down) || over == 0) *out = from_bits(0x7ff8000000000000ull);
    else if (up || down) *out = from_bits(up ? 0x7ffull << 52 : 0xfffull << 52);
    else *out = rounded_quotient(own, over);
}

}  // namespace totals
