// CUDA C++ as NVRTC offers it, for g++: what a .cu file sees when it is compiled for the emulation. Nothing is included,
// so that a kernel which needs a header fails here as it would with NVRTC. The other side is runtime.cpp.
#pragma once

using size_t = __SIZE_TYPE__;
using ptrdiff_t = __PTRDIFF_TYPE__;

#define GPUXENT_EMULATED 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ __attribute__((static_shared_memory_is_not_emulated))  // an error: call emulation::shared_memory()

// ---------------------------------------------------------------------------------------------------------------------
// Vector types

#define EMULATION_VECTORS(T, name, align2, align4)                                                                     \
    struct name##1 { T x; };                                                                                           \
    struct alignas(align2) name##2 { T x, y; };                                                                        \
    struct name##3 { T x, y, z; };                                                                                     \
    struct alignas(align4) name##4 { T x, y, z, w; };                                                                  \
    inline name##1 make_##name##1(T x) { return {x}; }                                                                 \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                         \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATION_VECTORS(signed char, char, 2, 4)
EMULATION_VECTORS(unsigned char, uchar, 2, 4)
EMULATION_VECTORS(short, short, 4, 8)
EMULATION_VECTORS(unsigned short, ushort, 4, 8)
EMULATION_VECTORS(int, int, 8, 16)
EMULATION_VECTORS(unsigned, uint, 8, 16)
EMULATION_VECTORS(long long, longlong, 16, 16)
EMULATION_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(double, double, 16, 16)
#undef EMULATION_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// What runtime.cpp offers

namespace emulation {

// These never change for a thread, so g++ may ask once.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_size();
__attribute__((const)) uint3 grid_size();
__attribute__((const)) unsigned lane();
__attribute__((const)) char* shared_memory();  // this block's dynamic shared memory
__attribute__((const)) unsigned cluster_rank();                    // of this block
__attribute__((const)) unsigned cluster_size();
void cluster_sync();                        // a barrier for all threads of all blocks of the cluster
void* peer_memory(const void* own, unsigned rank);
template <typename T> T* peer(T* own, unsigned rank) { return static_cast<T*>(peer_memory(own, rank)); }

enum class Reduction { add, min, max, min_unsigned, max_unsigned, all_bits, any_bit, odd_bits };

int block_barrier(int predicate);           // the number of threads that came with a true predicate
void warp_barrier(unsigned mask);
unsigned warp_ballot(unsigned mask, bool predicate);
unsigned warp_reduce(unsigned mask, Reduction reduction, unsigned value);
unsigned warp_match(unsigned mask, unsigned long long value);
void warp_shuffle(unsigned mask, void* value, unsigned size, unsigned source);
unsigned active_lanes();
void atomic_access(const void* address, unsigned size);
[[noreturn]] void trap(const char* what);

template <typename To, typename From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())
#define warpSize 32

#define assert(condition) ((condition) ? (void)0 : emulation::trap("assert(" #condition ")"))
inline void __trap() { emulation::trap("__trap()"); }

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warps

inline void __syncthreads() { emulation::block_barrier(0); }
inline int __syncthreads_or(int predicate) { return emulation::block_barrier(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return emulation::block_barrier(!predicate) == 0; }
inline int __syncthreads_count(int predicate) { return emulation::block_barrier(predicate); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline unsigned __activemask() { return emulation::active_lanes(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::warp_ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::warp_ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulation::warp_ballot(mask, predicate == 0) == 0; }

namespace emulation {
template <typename T> inline T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "CUDA shuffles 2, 4 and 8 bytes");
    warp_shuffle(mask, &value, sizeof(T), source);
    return value;
}
// The lane that `wanted` names if it lies in this lane's group of `width`, else this lane.
inline unsigned in_group(int wanted, int width) {
    const int first = (int)lane() & ~(width - 1);
    return (unsigned)(wanted >= first && wanted < first + width ? wanted : (int)lane());
}
}  // namespace emulation

#define EMULATION_SHUFFLES(T)                                                                                          \
    inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {                                         \
        const int first = (int)emulation::lane() & ~(width - 1);                                                       \
        return emulation::shuffle(mask, value, (unsigned)(first | (source & (width - 1))));                           \
    }                                                                                                                  \
    inline T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {                                       \
        const int source = (int)emulation::lane() ^ step, first = (int)emulation::lane() & ~(width - 1);               \
        return emulation::shuffle(mask, value, source < first + width ? (unsigned)source : emulation::lane());        \
    }                                                                                                                  \
    inline T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {                                 \
        return emulation::shuffle(mask, value, emulation::in_group((int)(emulation::lane() + step), width));          \
    }                                                                                                                  \
    inline T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {                                   \
        return emulation::shuffle(mask, value, emulation::in_group((int)(emulation::lane() - step), width));          \
    }

EMULATION_SHUFFLES(int)
EMULATION_SHUFFLES(unsigned)
EMULATION_SHUFFLES(long)
EMULATION_SHUFFLES(unsigned long)
EMULATION_SHUFFLES(long long)
EMULATION_SHUFFLES(unsigned long long)
EMULATION_SHUFFLES(float)
EMULATION_SHUFFLES(double)

#define EMULATION_REDUCE(name, T, reduction)                                                                           \
    inline T __reduce_##name##_sync(unsigned mask, T value) {                                                          \
        return (T)emulation::warp_reduce(mask, emulation::Reduction::reduction, (unsigned)value);                      \
    }

EMULATION_REDUCE(add, int, add)
EMULATION_REDUCE(add, unsigned, add)
EMULATION_REDUCE(min, int, min)
EMULATION_REDUCE(min, unsigned, min_unsigned)
EMULATION_REDUCE(max, int, max)
EMULATION_REDUCE(max, unsigned, max_unsigned)
EMULATION_REDUCE(and, unsigned, all_bits)
EMULATION_REDUCE(or, unsigned, any_bit)
EMULATION_REDUCE(xor, unsigned, odd_bits)
#undef EMULATION_REDUCE

template <typename T> inline unsigned __match_any_sync(unsigned mask, T value) {
    unsigned long long wide = 0;
    __builtin_memcpy(&wide, &value, sizeof(T));
    return emulation::warp_match(mask, wide);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

#define EMULATION_LOAD(name) template <typename T> inline T name(const T* address) { return *address; }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldlu)
EMULATION_LOAD(__ldcv)
#undef EMULATION_LOAD

#define EMULATION_STORE(name) template <typename T> inline void name(T* address, T value) { *address = value; }
EMULATION_STORE(__stwb)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwt)
#undef EMULATION_STORE

namespace emulation {
// No other thread can come between: threads give way at barriers and warp operations only.
template <typename T, typename Change>
__attribute__((noinline, no_sanitize("thread"))) T update(T* address, Change change) {
    atomic_access(address, sizeof(T));
    const T old = *address;
    *address = change(old);
    return old;
}
}  // namespace emulation

#define EMULATION_ATOMIC(name, T, expression)                                                                          \
    inline T name(T* address, T value) {                                                                               \
        return emulation::update(address, [=](T old) { return (T)(expression); });                                     \
    }

EMULATION_ATOMIC(atomicAdd, int, (unsigned)old + (unsigned)value)
EMULATION_ATOMIC(atomicAdd, unsigned, old + value)
EMULATION_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicSub, int, (unsigned)old - (unsigned)value)
EMULATION_ATOMIC(atomicSub, unsigned, old - value)
EMULATION_ATOMIC(atomicExch, int, ((void)old, value))
EMULATION_ATOMIC(atomicExch, unsigned, ((void)old, value))
EMULATION_ATOMIC(atomicExch, unsigned long long, ((void)old, value))
EMULATION_ATOMIC(atomicExch, float, ((void)old, value))
EMULATION_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATION_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#define EMULATION_ATOMICS(T)                                                                                           \
    EMULATION_ATOMIC(atomicMin, T, value < old ? value : old)                                                          \
    EMULATION_ATOMIC(atomicMax, T, value > old ? value : old)
EMULATION_ATOMICS(int)
EMULATION_ATOMICS(unsigned)
EMULATION_ATOMICS(long long)
EMULATION_ATOMICS(unsigned long long)
#undef EMULATION_ATOMICS
#define EMULATION_ATOMICS(T)                                                                                           \
    EMULATION_ATOMIC(atomicAnd, T, old & value)                                                                        \
    EMULATION_ATOMIC(atomicOr, T, old | value)                                                                         \
    EMULATION_ATOMIC(atomicXor, T, old ^ value)                                                                        \
    inline T atomicCAS(T* address, T expected, T value) {                                                              \
        return emulation::update(address, [=](T old) { return old == expected ? value : old; });                       \
    }
EMULATION_ATOMICS(int)
EMULATION_ATOMICS(unsigned)
EMULATION_ATOMICS(unsigned long long)
#undef EMULATION_ATOMICS
#undef EMULATION_ATOMIC

// ---------------------------------------------------------------------------------------------------------------------
// Bits

inline float __int_as_float(int x) { return emulation::bits<float>(x); }
inline int __float_as_int(float x) { return emulation::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
inline int __double2hiint(double x) { return (int)(emulation::bits<unsigned long long>(x) >> 32); }
inline int __double2loint(double x) { return (int)(unsigned)emulation::bits<unsigned long long>(x); }
inline double __hiloint2double(int high, int low) {
    return emulation::bits<double>((unsigned long long)(unsigned)high << 32 | (unsigned)low);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers: one function of libm for each type, and the overloads of C++

#define EMULATION_MATH1(name)                                                                                          \
    extern "C" double name(double) noexcept;                                                                           \
    extern "C" float name##f(float) noexcept;                                                                          \
    inline float name(float x) { return name##f(x); }
#define EMULATION_MATH2(name)                                                                                          \
    extern "C" double name(double, double) noexcept;                                                                   \
    extern "C" float name##f(float, float) noexcept;                                                                   \
    inline float name(float x, float y) { return name##f(x, y); }

EMULATION_MATH1(acos)
EMULATION_MATH1(acosh)
EMULATION_MATH1(asin)
EMULATION_MATH1(asinh)
EMULATION_MATH1(atan)
EMULATION_MATH1(atanh)
EMULATION_MATH1(cbrt)
EMULATION_MATH1(ceil)
EMULATION_MATH1(cos)
EMULATION_MATH1(cosh)
EMULATION_MATH1(erf)
EMULATION_MATH1(erfc)
EMULATION_MATH1(exp)
EMULATION_MATH1(exp2)
EMULATION_MATH1(expm1)
EMULATION_MATH1(fabs)
EMULATION_MATH1(floor)
EMULATION_MATH1(lgamma)
EMULATION_MATH1(log)
EMULATION_MATH1(log10)
EMULATION_MATH1(log1p)
EMULATION_MATH1(log2)
EMULATION_MATH1(logb)
EMULATION_MATH1(nearbyint)
EMULATION_MATH1(rint)
EMULATION_MATH1(round)
EMULATION_MATH1(sin)
EMULATION_MATH1(sinh)
EMULATION_MATH1(sqrt)
EMULATION_MATH1(tan)
EMULATION_MATH1(tanh)
EMULATION_MATH1(tgamma)
EMULATION_MATH1(trunc)
EMULATION_MATH2(atan2)
EMULATION_MATH2(copysign)
EMULATION_MATH2(fdim)
EMULATION_MATH2(fmax)
EMULATION_MATH2(fmin)
EMULATION_MATH2(fmod)
EMULATION_MATH2(hypot)
EMULATION_MATH2(nextafter)
EMULATION_MATH2(pow)
EMULATION_MATH2(remainder)
#undef EMULATION_MATH1
#undef EMULATION_MATH2

extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double scalbn(double, int) noexcept;
extern "C" float scalbnf(float, int) noexcept;
extern "C" double frexp(double, int*) noexcept;
extern "C" float frexpf(float, int*) noexcept;
extern "C" double modf(double, double*) noexcept;
extern "C" float modff(float, float*) noexcept;
extern "C" int ilogb(double) noexcept;
extern "C" int ilogbf(float) noexcept;
extern "C" long long llrint(double) noexcept;
extern "C" long long llrintf(float) noexcept;
extern "C" long long llround(double) noexcept;
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
inline float ldexp(float x, int n) { return ldexpf(x, n); }
inline float scalbn(float x, int n) { return scalbnf(x, n); }
inline float frexp(float x, int* n) { return frexpf(x, n); }
inline int ilogb(float x) { return ilogbf(x); }

inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double exp10(double x) { return pow(10.0, x); }
inline float exp10f(float x) { return powf(10.0f, x); }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline bool signbit(double x) { return __builtin_signbit(x); }

extern "C" int abs(int) noexcept;
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline long long llabs(long long x) { return abs(x); }

#define EMULATION_EXTREMA(A, B, T)                                                                                     \
    constexpr inline T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; }                                             \
    constexpr inline T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }

EMULATION_EXTREMA(int, int, int)
EMULATION_EXTREMA(unsigned, unsigned, unsigned)
EMULATION_EXTREMA(int, unsigned, unsigned)
EMULATION_EXTREMA(unsigned, int, unsigned)
EMULATION_EXTREMA(long, long, long)
EMULATION_EXTREMA(unsigned long, unsigned long, unsigned long)
EMULATION_EXTREMA(long, unsigned long, unsigned long)
EMULATION_EXTREMA(unsigned long, long, unsigned long)
EMULATION_EXTREMA(long long, long long, long long)
EMULATION_EXTREMA(unsigned long long, unsigned long long, unsigned long long)
EMULATION_EXTREMA(long long, unsigned long long, unsigned long long)
EMULATION_EXTREMA(unsigned long long, long long, unsigned long long)
#undef EMULATION_EXTREMA
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax((double)a, b); }
inline double min(float a, double b) { return fmin((double)a, b); }
inline double max(double a, float b) { return fmax(a, (double)b); }
inline double min(double a, float b) { return fmin(a, (double)b); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline double __drcp_rn(double x) { return 1 / x; }
inline double __dsqrt_rn(double x) { return sqrt(x); }

namespace emulation {
// As PTX has it: out of range goes to the nearest end, NaN to 0 or, where either side has 64 bits, to the topmost bit.
template <typename To, typename From> inline To converted(From whole) {
    constexpr bool is_signed = (To)-1 < (To)0, wide = sizeof(From) == 8 || sizeof(To) == 8;
    constexpr int bits = 8 * sizeof(To);
    constexpr To top_bit = (To)(1ull << (bits - 1)), lowest = is_signed ? top_bit : 0, highest = (To)~lowest;
    const From end = ldexp((From)1, is_signed ? bits - 1 : bits);
    if (whole != whole) return wide ? top_bit : 0;
    if (whole < (is_signed ? -end : 0)) return lowest;
    return whole >= end ? highest : (To)whole;
}
}  // namespace emulation

#define EMULATION_TO_INTEGER(from, From, to, To)                                                                       \
    inline To __##from##2##to##_rn(From x) { return emulation::converted<To>(rint(x)); }                               \
    inline To __##from##2##to##_rz(From x) { return emulation::converted<To>(trunc(x)); }                              \
    inline To __##from##2##to##_rd(From x) { return emulation::converted<To>(floor(x)); }                              \
    inline To __##from##2##to##_ru(From x) { return emulation::converted<To>(ceil(x)); }
#define EMULATION_CONVERSIONS(name, T)                                                                                 \
    EMULATION_TO_INTEGER(float, float, name, T)                                                                        \
    EMULATION_TO_INTEGER(double, double, name, T)                                                                      \
    inline float __##name##2float_rn(T x) { return (float)x; }

EMULATION_CONVERSIONS(int, int)
EMULATION_CONVERSIONS(uint, unsigned)
EMULATION_CONVERSIONS(ll, long long)
EMULATION_CONVERSIONS(ull, unsigned long long)
#undef EMULATION_CONVERSIONS
#undef EMULATION_TO_INTEGER
inline float __double2float_rn(double x) { return (float)x; }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline double __ll2double_rn(long long x) { return (double)x; }
inline double __ull2double_rn(unsigned long long x) { return (double)x; }

extern "C" void* memcpy(void*, const void*, size_t) noexcept;
extern "C" void* memset(void*, int, size_t) noexcept;
