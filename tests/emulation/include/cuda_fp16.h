#pragma once
#include "emulator.h"

struct __half {
    unsigned short bits;
    __half() = default;
    __half(float x) : bits(emulation::bits<unsigned short>((_Float16)x)) {}
    operator float() const { return (float)emulation::bits<_Float16>(bits); }
};
using half = __half;
struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;

inline float __half2float(__half x) { return (float)x; }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __double2half(double x) {
    __half rounded;
    rounded.bits = emulation::bits<unsigned short>((_Float16)x);
    return rounded;
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return emulation::bits<__half>(bits); }
inline bool __hisnan(__half x) { return isnan(__half2float(x)); }
template <> inline __half __ldg(const __half* address) { return *address; }

// Of a number and a NaN, the number.
inline __half2 __hmax2(__half2 a, __half2 b) {
    return {__half(fmaxf(__half2float(a.x), __half2float(b.x))), __half(fmaxf(__half2float(a.y), __half2float(b.y)))};
}
inline __half2 __hmin2(__half2 a, __half2 b) {
    return {__half(fminf(__half2float(a.x), __half2float(b.x))), __half(fminf(__half2float(a.y), __half2float(b.y)))};
}
