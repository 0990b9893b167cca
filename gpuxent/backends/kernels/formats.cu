// Logit types: how 16 bytes of memory become numbers to compute with, and back. Shared memory, and what NVRTC lacks.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

// All shared memory is dynamic and comes from here, so that the emulation of the tests can put it where it watches.
__device__ __forceinline__ char* shared_memory() {
#ifdef GPUXENT_EMULATED
    return emulation::shared_memory();
#else
    extern __shared__ uint4 everything[];
    return reinterpret_cast<char*>(everything);
#endif
}

template <bool choice, typename A, typename B> struct Either { using type = A; };
template <typename A, typename B> struct Either<false, A, B> { using type = B; };

template <typename real> __device__ __forceinline__ real infinity();
template <> __device__ __forceinline__ float infinity<float>() { return __int_as_float(0x7f800000); }
template <> __device__ __forceinline__ double infinity<double>() {
    return __longlong_as_double(0x7ff0000000000000ll);
}

// Larger and smaller drop a NaN: sums keep it. In PTX, since CuPy compiles with -ftz=true, by which denormals would all be
// equal: the class of the maximum is one of them or another.
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ bool same(double a, double b) { return a == b; }
__device__ __forceinline__ double at_most(double x, double bound) { return x > bound ? bound : x; }  // or NaN
__device__ __forceinline__ double widened(double x) { return x; }

#ifdef GPUXENT_EMULATED
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ bool same(float a, float b) { return a == b; }
__device__ __forceinline__ float at_most(float x, float bound) { return x > bound ? bound : x; }
#else
__device__ __forceinline__ float larger(float a, float b) {
    float result;
    asm("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float smaller(float a, float b) {
    float result;
    asm("min.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ bool same(float a, float b) {
    int result;
    asm("{ .reg .pred equal; setp.eq.f32 equal, %1, %2; selp.s32 %0, 1, 0, equal; }" : "=r"(result) : "f"(a), "f"(b));
    return result;
}
__device__ __forceinline__ float at_most(float x, float bound) {
#if __CUDA_ARCH__ < 800
    return x > bound ? bound : x;
#else
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(bound));
    return result;
#endif
}
#endif

// A logit type: the numbers in 16 bytes, how to read and to write them. `value` is float, or double for double.
template <typename logit_t> struct Format;

template <> struct Format<__nv_bfloat16> {
    using value_t = float;
    static constexpr int per_vector = 8;
    using pair_t = __nv_bfloat162;
    static constexpr unsigned absent = 0xff80ff80u;  // two of -inf
    static __device__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __nv_bfloat16 logit(float x) { return __float2bfloat16_rn(x); }
    static __device__ void unpack(uint4 raw, float (&x)[8]) {
        const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    static __device__ uint4 pack(const float (&x)[8]) {
        unsigned words[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            words[i] = *reinterpret_cast<const unsigned*>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <> struct Format<__half> {
    using value_t = float;
    static constexpr int per_vector = 8;
    using pair_t = __half2;
    static constexpr unsigned absent = 0xfc00fc00u;
    static __device__ float value(__half x) { return __half2float(x); }
    static __device__ __half logit(float x) { return __float2half_rn(x); }
    static __device__ void unpack(uint4 raw, float (&x)[8]) {
        const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
    static __device__ uint4 pack(const float (&x)[8]) {
        unsigned words[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
            words[i] = *reinterpret_cast<const unsigned*>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <> struct Format<float> {
    using value_t = float;
    static constexpr int per_vector = 4;
    static __device__ float value(float x) { return x; }
    static __device__ float logit(float x) { return x; }
    static __device__ void unpack(uint4 raw, float (&x)[4]) {
        x[0] = __uint_as_float(raw.x);
        x[1] = __uint_as_float(raw.y);
        x[2] = __uint_as_float(raw.z);
        x[3] = __uint_as_float(raw.w);
    }
    static __device__ uint4 pack(const float (&x)[4]) {
        return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    }
};

template <> struct Format<double> {
    using value_t = double;
    static constexpr int per_vector = 2;
    static __device__ double value(double x) { return x; }
    static __device__ double logit(double x) { return x; }
    static __device__ void unpack(uint4 raw, double (&x)[2]) {
        x[0] = __longlong_as_double((long long)(((unsigned long long)raw.y << 32) | raw.x));
        x[1] = __longlong_as_double((long long)(((unsigned long long)raw.w << 32) | raw.z));
    }
    static __device__ uint4 pack(const double (&x)[2]) {
        const unsigned long long a = (unsigned long long)__double_as_longlong(x[0]);
        const unsigned long long b = (unsigned long long)__double_as_longlong(x[1]);
        return make_uint4((unsigned)a, (unsigned)(a >> 32), (unsigned)b, (unsigned)(b >> 32));
    }
};

// How a vector is read: never again; perhaps again; or where other threads may be writing beside it.
enum class Reading { once, again, beside_writes };

// A row, or a slice of one, in memory, as vectors on a grid that begins with its first logit, whatever that one's address
// is: so the sums over a vector do not depend on where a row lies. The last vector may be filled up with -inf.
template <typename logit_t> struct Slice {
    static constexpr int per_vector = Format<logit_t>::per_vector;

    const logit_t* first;
    long long step;
    int count, vectors;
    bool aligned;

    __device__ __forceinline__ Slice(const logit_t* first, long long step, int count)
        : first(first), step(step), count(count), vectors((count + per_vector - 1) / per_vector),
          aligned(step == 1 && (size_t)first % 16 == 0) {}

    __device__ __forceinline__ bool is_plain(int vector) const { return aligned && (vector + 1) * per_vector <= count; }

    template <Reading reading> __device__ __forceinline__ uint4 load(int vector) const {
        return is_plain(vector) ? load_plain<reading>(vector) : load_other<reading>(vector);
    }

    // n vectors that lie `apart`, as far as they exist: the plain ones first, so that all are on their way.
    template <Reading reading, int n> __device__ __forceinline__ void load(int vector, int apart, uint4 (&raw)[n]) const {
        #pragma unroll
        for (int i = 0; i < n; ++i)
            if (is_plain(vector + i * apart)) raw[i] = load_plain<reading>(vector + i * apart);
        if (is_plain(vector + (n - 1) * apart)) return;
        #pragma unroll
        for (int i = 0; i < n; ++i) {
            const int v = vector + i * apart;
            if (v < vectors && !is_plain(v)) raw[i] = load_other<reading>(v);
        }
    }

    template <Reading reading> __device__ __forceinline__ uint4 load_plain(int vector) const {
        const uint4* at = reinterpret_cast<const uint4*>(first) + vector;
        return reading == Reading::once ? __ldcs(at) : *at;
    }

    template <Reading reading> __device__ __forceinline__ uint4 load_other(int vector) const {
        // The two aligned vectors in which it lies begin and end in this row.
        if (step == 1 && reading != Reading::beside_writes && vector > 0 && (vector + 2) * per_vector <= count)
            return load_across(first + vector * per_vector);
        return load_singly(vector);
    }

    static __device__ __forceinline__ uint4 load_across(const logit_t* at) {
        const int past = (int)((size_t)at % 16);
        const uint4* vectors = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(at) - past);
        const uint4 low = vectors[0], high = vectors[1];
        unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        #pragma unroll
        for (int i = 0; i < 6; ++i) words[i] = past & 8 ? words[i + 2] : words[i];
        #pragma unroll
        for (int i = 0; i < 5; ++i) words[i] = past & 4 ? words[i + 1] : words[i];
        #pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = past & 2 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

    __device__ __forceinline__ uint4 load_singly(int vector) const {
        using value_t = typename Format<logit_t>::value_t;
        value_t x[per_vector];
        #pragma unroll
        for (int i = 0; i < per_vector; ++i) {
            const int column = vector * per_vector + i;
            x[i] = column < count ? Format<logit_t>::value(first[column * step]) : -infinity<value_t>();
        }
        return Format<logit_t>::pack(x);
    }
};
