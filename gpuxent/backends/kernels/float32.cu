// float32 as it is stored, denormals included: CuPy compiles with -ftz=true, which makes zeros of them in C++.

__device__ __forceinline__ double widened(float x) {
#ifdef GPUXENT_EMULATED
    return x;
#else
    double result;
    asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(x));
    return result;
#endif
}

__device__ __forceinline__ float narrowed(double x) {
#ifdef GPUXENT_EMULATED
    return (float)x;
#else
    float result;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(x));
    return result;
#endif
}
