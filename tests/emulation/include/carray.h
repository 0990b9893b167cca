// What CuPy puts before an elementwise or reduction kernel: arrays of any strides and an index over a shape. The number
// of dimensions is known at run time only, so that one library serves all.
#pragma once
#include "emulator.h"

#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ll)
#define CUDART_NAN __longlong_as_double(0x7fffffffffffffffll)
#define M_PI 3.1415926535897932384626433832795

namespace emulation {
constexpr int most_dimensions = 16;

struct Shape {
    ptrdiff_t size, dimensions, extents[most_dimensions];
};
}  // namespace emulation

// Filled in by Python.
template <typename T> class CArray {
    T* data_;
    emulation::Shape shape_;
    ptrdiff_t strides_[emulation::most_dimensions];  // in bytes

    T& at(const ptrdiff_t* index) const {
        ptrdiff_t offset = 0;
        for (int i = 0; i < shape_.dimensions; ++i) offset += strides_[i] * index[i];
        return *reinterpret_cast<T*>(reinterpret_cast<size_t>(data_) + (size_t)offset);
    }

public:
    ptrdiff_t size() const { return shape_.size; }
    const ptrdiff_t* shape() const { return shape_.extents; }
    const ptrdiff_t* strides() const { return strides_; }

    T& operator[](const ptrdiff_t* index) { return at(index); }
    const T& operator[](const ptrdiff_t* index) const { return at(index); }
    template <typename Integer, int count> const T& operator[](const Integer (&index)[count]) const {
        ptrdiff_t wide[count];
        for (int i = 0; i < count; ++i) wide[i] = (ptrdiff_t)index[i];
        return at(wide);
    }
    // In C order. The first index is not reduced, as in CuPy: beyond the end it runs on.
    T& operator[](ptrdiff_t i) { return const_cast<T&>(const_cast<const CArray&>(*this)[i]); }
    const T& operator[](ptrdiff_t i) const {
        ptrdiff_t index[emulation::most_dimensions];
        for (int axis = (int)shape_.dimensions; --axis > 0;) {
            index[axis] = i % shape_.extents[axis];
            i /= shape_.extents[axis];
        }
        index[0] = i;
        return at(index);
    }
    T& operator[](int i) { return (*this)[(ptrdiff_t)i]; }
    const T& operator[](int i) const { return (*this)[(ptrdiff_t)i]; }
};

class CIndexer {
    emulation::Shape shape_;
    ptrdiff_t index_[emulation::most_dimensions];

public:
    ptrdiff_t size() const { return shape_.size; }
    const ptrdiff_t* get() const { return index_; }
    void set(ptrdiff_t i) {
        for (int axis = (int)shape_.dimensions; --axis > 0;) {
            index_[axis] = i % shape_.extents[axis];
            i /= shape_.extents[axis];
        }
        index_[0] = i;
    }
};
