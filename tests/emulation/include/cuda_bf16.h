#pragma once
#include "emulator.h"

namespace emulation {
inline unsigned short bfloat16_of(float x) {
    const unsigned all = bits<unsigned>(x);
    if (x != x) return 0x7fff;
    return (unsigned short)((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
}
}  // namespace emulation

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(emulation::bfloat16_of(x)) {}
    operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
using nv_bfloat16 = __nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
// Rounded once: a float32 that is odd where it is inexact rounds to bfloat16 as the double would.
inline __nv_bfloat16 __double2bfloat16(double x) {
    float narrow = (float)x;
    if ((double)narrow != x && x == x) {
        unsigned all = __float_as_uint(narrow);
        const bool away = (double)narrow > x ? x >= 0 : x < 0;
        all = away && (all & 0x7fffffffu) ? all - 1u : all;
        narrow = __uint_as_float(all | 1u);
    }
    return __nv_bfloat16(narrow);
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float __low2float(__nv_bfloat162 x) { return __bfloat162float(x.x); }
inline float __high2float(__nv_bfloat162 x) { return __bfloat162float(x.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return emulation::bits<__nv_bfloat16>(bits); }

// Of a number and a NaN, the number.
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__nv_bfloat16(fmaxf(__bfloat162float(a.x), __bfloat162float(b.x))), __nv_bfloat16(fmaxf(__bfloat162float(a.y), __bfloat162float(b.y)))};
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__nv_bfloat16(fminf(__bfloat162float(a.x), __bfloat162float(b.x))), __nv_bfloat16(fminf(__bfloat162float(a.y), __bfloat162float(b.y)))};
}
