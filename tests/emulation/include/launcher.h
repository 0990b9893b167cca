// The end of every kernel's library: how runtime.cpp calls the kernel, and what Python must pass.
#pragma once

namespace emulation {

struct Parameter {
    char kind, target;  // i, u, f, b, p(ointer), s(truct); of the target of a pointer, v(oid) besides
    unsigned size, target_size;
};

template <typename T> inline constexpr char kind_of = 's';
template <> inline constexpr char kind_of<void> = 'v';
template <> inline constexpr char kind_of<bool> = 'b';
template <> inline constexpr char kind_of<float> = 'f';
template <> inline constexpr char kind_of<double> = 'f';
template <> inline constexpr char kind_of<char> = 'i';
template <> inline constexpr char kind_of<signed char> = 'i';
template <> inline constexpr char kind_of<short> = 'i';
template <> inline constexpr char kind_of<int> = 'i';
template <> inline constexpr char kind_of<long> = 'i';
template <> inline constexpr char kind_of<long long> = 'i';
template <> inline constexpr char kind_of<unsigned char> = 'u';
template <> inline constexpr char kind_of<unsigned short> = 'u';
template <> inline constexpr char kind_of<unsigned> = 'u';
template <> inline constexpr char kind_of<unsigned long> = 'u';
template <> inline constexpr char kind_of<unsigned long long> = 'u';
template <typename T> inline constexpr char kind_of<T*> = 'p';
template <typename T> inline constexpr char kind_of<const T> = kind_of<T>;
template <typename T> inline constexpr unsigned size_of = sizeof(T);
template <> inline constexpr unsigned size_of<void> = 1;
template <> inline constexpr unsigned size_of<const void> = 1;

template <typename T> struct Describe { static constexpr Parameter value{kind_of<T>, 0, sizeof(T), 0}; };
template <typename T> struct Describe<T*> {
    static constexpr Parameter value{'p', kind_of<T>, sizeof(T*), size_of<T>};
};

template <int... index> struct Indices {};
template <int count, int... index> struct CountTo : CountTo<count - 1, count - 1, index...> {};
template <int... index> struct CountTo<0, index...> { using type = Indices<index...>; };

template <typename Kernel> struct Launcher;
template <typename... P> struct Launcher<void (*)(P...)> {
    static constexpr int count = sizeof...(P);
    static constexpr Parameter parameters[count + 1] = {Describe<P>::value..., {}};
    static void call(void (*kernel)(P...), void** arguments) {
        spread(kernel, arguments, typename CountTo<count>::type());
    }
    template <int... index>
    __attribute__((noipa, no_sanitize("thread", "undefined"))) static void spread(void (*kernel)(P...), void** arguments, Indices<index...>) {
        kernel(*static_cast<P*>(arguments[index])...);
    }
};

// The first number of what __launch_bounds__ and __cluster_dims__ are given.
template <typename... Rest> constexpr unsigned first(unsigned number, Rest...) { return number; }

}  // namespace emulation

#define EMULATION_KERNEL(...)                                                                                          \
    static constexpr auto emulation_kernel = &__VA_ARGS__;                                                             \
    using EmulationLauncher = emulation::Launcher<decltype(&__VA_ARGS__)>;                                             \
    extern "C" {                                                                                                       \
    int emulation_count() { return EmulationLauncher::count; }                                                         \
    const emulation::Parameter* emulation_parameters() { return EmulationLauncher::parameters; }                       \
    void emulation_call(void** arguments) { EmulationLauncher::call(emulation_kernel, arguments); }                    \
    }
