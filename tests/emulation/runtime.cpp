// Runs CUDA blocks on the CPU: a thread is a fiber, the blocks of a cluster share one scheduler, everything happens on
// one OS thread and in an order that is the same every time. Whatever goes wrong ends the launch with a message.
//
// Built once into a library of its own; kernels' libraries see include/emulator.h and find the rest here when loaded.
#include "emulator.h"
#undef assert

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulation {

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

constexpr size_t page = 4096, stack_size = 128 * 1024, guard_size = 64 << 20;

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
struct Context {
    void* stack_pointer;
};
extern "C" void emulation_switch(Context* from, Context* to);
__asm__(
    ".text\n"
    ".globl emulation_switch\n"
    ".type emulation_switch,@function\n"
    "emulation_switch:\n"
    "    pushq %rbp\n"
    "    pushq %rbx\n"
    "    pushq %r12\n"
    "    pushq %r13\n"
    "    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq (%rsi), %rsp\n"
    "    popq %r15\n"
    "    popq %r14\n"
    "    popq %r13\n"
    "    popq %r12\n"
    "    popq %rbx\n"
    "    popq %rbp\n"
    "    ret\n");

void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + stack_size) - 1;  // at `entry` the stack is as after a call
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context.stack_pointer = top;
}
#else
using Context = ucontext_t;
void emulation_switch(Context* from, Context* to) { swapcontext(from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

enum class State : unsigned char { ready, at_warp, at_block, at_cluster, ended };
enum class Operation : unsigned char { barrier, ballot, reduce, match, shuffle };
const char* const operation_names[] = {"__syncwarp", "a vote", "__reduce_*_sync", "__match_any_sync", "a shuffle"};

struct Block;

struct Fiber {
    uint3 thread_index, block_index;
    Block* block;
    unsigned number, lane;  // in the block, in the warp
    Context context;
    State state;
    void* waits_at;  // a place in the kernel's code
    // what it brings to a warp operation, and takes away
    Operation operation;
    Reduction reduction;
    unsigned mask, source, size;
    unsigned long long value, result;
    int predicate;    // brought to a block barrier
    uint64_t synced;  // when it last passed __syncwarp
};

struct Warp {
    Fiber* lanes;
    unsigned count;
};

struct Block {
    Fiber* fibers;
    unsigned count, live, rank;
    char* shared;
    int predicates;
    bool closed;      // its shared memory is out of reach
    uint64_t synced;  // when it last passed a barrier
};

// As ctypes fills it in.
struct Launch {
    void (*call)(void**);
    void** arguments;
    unsigned grid[3], block[3];
    unsigned cluster, shared_bytes, order, seconds;
    uint64_t seed;
};

enum Order : unsigned { forward, backward, shuffled };

namespace {

Fiber* current;  // the thread that runs
uint3 block_dim, grid_dim;

const Launch* launch;
Context scheduler;
sigjmp_buf way_out;
char message[4096];
std::vector<Fiber> fibers;
std::vector<Block> blocks;
std::vector<Warp> warps;
char *stacks, *stacks_end;  // each with a guard page below
uint64_t random_state;

// Time goes on at every barrier; what happened before the last barrier of two threads is in order.
uint64_t now = 1, cluster_started, cluster_synced;

char* stack_of(size_t fiber) { return stacks + fiber * (stack_size + page) + page; }

Fiber& running() { return *current; }

uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

// In which order the schedule takes `count` things.
void put_in_order(std::vector<unsigned>& order, unsigned count) {
    order.resize(count);
    for (unsigned i = 0; i < count; ++i) order[i] = launch->order == backward ? count - 1 - i : i;
    if (launch->order == shuffled)
        for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults. A place in the code is written as <address>, which Python turns into file and line.

[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...) {
    size_t used = 0;
    if (current) {
        const Fiber& t = *current;
        used = (size_t)snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u): ", t.block_index.x,
                                t.block_index.y, t.block_index.z, t.thread_index.x, t.thread_index.y, t.thread_index.z);
    }
    va_list rest;
    va_start(rest, format);
    vsnprintf(message + used, sizeof message - used, format, rest);
    va_end(rest);
    siglongjmp(way_out, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory that is watched: arrays, and the shared memory of blocks

// Who used some of 4 bytes, when and where.
struct Use {
    uint64_t time;
    uint32_t place;  // the lower half of an address
    uint16_t thread, bytes;
};
struct Uses {
    Use write, update, read, other_read;  // the last ones; the reads by two different threads
};

struct Allocation {
    char *region, *begin, *end, *region_end;  // data inside of pages that can be reached
    Uses* uses;                               // one for every 4 bytes of the region; made when needed
    const Block* block;                       // whose shared memory it is
};
std::map<char*, Allocation> allocations;  // by region
std::vector<Allocation> arenas;           // shared memory: each ends near a guard page

// Which allocation a page belongs to, for the pages seen last; none: the page holds constants.
struct Known {
    uintptr_t page;
    Allocation* allocation;
} known[1024];

void forget() { memset(static_cast<void*>(known), 0, sizeof known); }

size_t uses_size(const Allocation& a) { return (size_t)(a.region_end - a.region) / 4 * sizeof(Uses); }

void discard(Allocation& a) {
    munmap(a.region - guard_size, (size_t)(a.region_end - a.region) + 2 * guard_size);
    if (a.uses) munmap(a.uses, uses_size(a));
    forget();
}

bool around(const Allocation& a, const char* address) {
    return address >= a.region - guard_size && address < a.region_end + guard_size;
}

// With what is out of reach around it.
Allocation* find(const char* address) {
    for (Allocation& arena : arenas)
        if (around(arena, address)) return &arena;
    const auto after = allocations.upper_bound(const_cast<char*>(address));
    if (after != allocations.begin() && around(std::prev(after)->second, address)) return &std::prev(after)->second;
    return after != allocations.end() && around(after->second, address) ? &after->second : nullptr;
}

// Says what lies around an address that must not be used.
void describe(char* text, size_t size, const char* address) {
    const auto say = [&](const Allocation& a) {
        const size_t bytes = (size_t)(a.end - a.begin);
        const char* const what = a.block ? "a block's shared memory" : "an array";
        if (address >= a.end) {
            snprintf(text, size, "%zu bytes behind the end of %s of %zu bytes", (size_t)(address - a.end), what, bytes);
        } else if (address < a.begin) {
            snprintf(text, size, "%zu bytes before %s of %zu bytes", (size_t)(a.begin - address), what, bytes);
        } else {
            snprintf(text, size, "byte %zu of %s of %zu bytes", (size_t)(address - a.begin), what, bytes);
        }
    };
    if (const Allocation* near = find(address)) {
        say(*near);
    } else if (address >= stacks && address < stacks_end) {
        snprintf(text, size, "the end of a thread's stack of %zu bytes", stack_size);
    } else {
        snprintf(text, size, "%p, near no array", static_cast<const void*>(address));
    }
}

struct sigaction old_actions[5];
const int signals[5] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
pid_t launching_thread;
volatile sig_atomic_t expired;

void handle(int signal, siginfo_t* info, void* context) {
    const ucontext_t* at = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
    void* code = reinterpret_cast<void*>(at->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    void* code = reinterpret_cast<void*>(at->uc_mcontext.pc);
#else
    void* code = nullptr;
#endif
    if (signal == SIGVTALRM && launch && gettid() != launching_thread) {  // any thread may get it
        syscall(SYS_tgkill, getpid(), launching_thread, signal);
        return;
    }
    if (gettid() != launching_thread || !launch) {  // not ours
        for (int i = 0; i < 5; ++i)
            if (signals[i] == signal) sigaction(signal, &old_actions[i], nullptr);
        return;
    }
    code = static_cast<char*>(code) + 1;  // as if it were where a call returns to
    if (signal == SIGVTALRM) {
        if (expired) fault("no end after %u seconds, at <%p>", launch->seconds, code);
        expired = 1;  // better said at the next access, which knows its place
        return;
    }
    if (signal == SIGFPE) fault("division by zero at <%p>", code);
    if (signal == SIGILL) fault("undefined behaviour at <%p>", code);
    char where[200];
    describe(where, sizeof where, static_cast<const char*>(info->si_addr));
    fault("access to %s at <%p>", where, code);
}

void install_handlers() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    launching_thread = gettid();
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &action, &old_actions[i]);
    itimerval timer = {};
    timer.it_value.tv_sec = launch->seconds;
    timer.it_interval.tv_sec = 1;
    expired = 0;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void restore_handlers() {
    const itimerval off = {};
    setitimer(ITIMER_VIRTUAL, &off, nullptr);
    for (int i = 0; i < 5; ++i) sigaction(signals[i], &old_actions[i], nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Every access of a kernel, as -fsanitize=thread reports it

char* guarded(size_t size) {
    char* region = static_cast<char*>(
        mmap(nullptr, size + 2 * guard_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (region == MAP_FAILED) return nullptr;
    mprotect(region + guard_size, size, PROT_READ | PROT_WRITE);
    return region + guard_size;
}

// Has a barrier come between an earlier use and this thread? Blocks of other clusters are not looked at.
bool in_order(const Use& use, const Fiber& self) {
    if (use.time < cluster_started || use.thread == (uint16_t)(&self - fibers.data())) return true;
    const Fiber& other = fibers[use.thread];
    if (other.block != self.block) return use.time < cluster_synced;
    if (use.time < self.block->synced) return true;
    return other.number / 32 == self.number / 32 && use.time < self.synced && use.time < other.synced;
}

enum Kind { reading, writing, updating };

[[noreturn]] void race(const Use& use, const char* address, Kind kind, void* place, const char* earlier) {
    char where[200];
    describe(where, sizeof where, address);
    const Fiber& other = fibers[use.thread];
    const uintptr_t before = (reinterpret_cast<uintptr_t>(place) & ~(uintptr_t)0xffffffff) | use.place;
    fault("race: %s of %s at <%p>, which thread (%u, %u, %u) of block (%u, %u, %u) %s at <%p>, and no barrier between",
          kind == reading ? "read" : kind == writing ? "write" : "atomic update", where, place, other.thread_index.x,
          other.thread_index.y, other.thread_index.z, other.block_index.x, other.block_index.y, other.block_index.z,
          earlier, reinterpret_cast<void*>(before));
}

// A write over another thread's write, which is no race if the value stays: seen at the next access or change of threads.
struct {
    Use earlier;
    const char* address;
    size_t size;
    void* place;
    char before[16];
} overwritten;

void judge_overwriting() {
    if (!overwritten.size) return;
    const bool same = !memcmp(overwritten.before, overwritten.address, overwritten.size);
    overwritten.size = 0;
    if (!same) race(overwritten.earlier, overwritten.address, writing, overwritten.place, "wrote");
}

void look_for_races(Allocation& a, const char* address, size_t size, Kind kind, void* place) {
    if (!a.uses) {
        void* made = mmap(nullptr, uses_size(a), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) return;
        a.uses = static_cast<Uses*>(made);
    }
    const Fiber& self = running();
    Use use = {now, (uint32_t)reinterpret_cast<uintptr_t>(place), (uint16_t)(&self - fibers.data()), 0};
    size_t offset = (size_t)(address - a.region);
    for (const size_t end = offset + size; offset < end;) {
        const size_t first = offset % 4, last = first + (end - offset) < 4 ? first + (end - offset) : 4;
        use.bytes = (uint16_t)((1u << last) - (1u << first));
        Uses& uses = a.uses[offset / 4];
        const auto conflicts = [&](const Use& earlier) { return earlier.bytes & use.bytes && !in_order(earlier, self); };
        const auto check = [&](const Use& earlier, const char* what) {
            if (conflicts(earlier)) race(earlier, a.region + offset, kind, place, what);
        };
        if (kind != writing || size > sizeof overwritten.before) {
            check(uses.write, "wrote");
        } else if (!overwritten.size && conflicts(uses.write)) {
            overwritten = {uses.write, address, size, place, {}};
            memcpy(overwritten.before, address, size);
        }
        if (kind != updating) check(uses.update, "updated");
        if (kind != reading) {
            check(uses.read, "read");
            check(uses.other_read, "read");
        }
        if (kind == reading && uses.read.thread != use.thread) uses.other_read = uses.read;
        (kind == reading ? uses.read : kind == writing ? uses.write : uses.update) = use;
        offset += last - first;
    }
}

[[noreturn]] void out_of_bounds(const char* address, size_t size, Kind kind, void* place) {
    char where[200];
    describe(where, sizeof where, address);
    fault("%s of %zu bytes from %s at <%p>", kind == reading ? "read" : "write", size, where, place);
}

void access(const void* where, size_t size, Kind kind, void* place) {
    const char* const address = static_cast<const char*>(where);
    judge_overwriting();
    if (expired) fault("no end after %u seconds, at <%p>", launch->seconds, place);
    if ((address >= stacks && address < stacks_end)) return;
    const uintptr_t number = reinterpret_cast<uintptr_t>(address) / page;
    Known& entry = known[number % (sizeof known / sizeof *known)];
    if (entry.page != number) {
        Dl_info library;
        Allocation* const found = find(address);
        if (!found && !dladdr(address, &library)) out_of_bounds(address, size, kind, place);
        entry = {number, found};
    }
    if (!entry.allocation) return;
    Allocation& a = *entry.allocation;
    if (address < a.begin || address + size > a.end) out_of_bounds(address, size, kind, place);
    look_for_races(a, address, size, kind, place);
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler

void leave(State state, void* place) {
    Fiber& self = running();
    judge_overwriting();
    self.state = state;
    self.waits_at = place;
    emulation_switch(&self.context, &scheduler);
}

void run_fiber() {
    launch->call(launch->arguments);
    leave(State::ended, nullptr);
}

void resume(Fiber& fiber) {
    current = &fiber;
    emulation_switch(&scheduler, &fiber.context);
    if (fiber.state == State::ended) --fiber.block->live;
}

unsigned long long reduced(Reduction reduction, unsigned a, unsigned b) {
    switch (reduction) {
        case Reduction::add: return a + b;
        case Reduction::min: return (unsigned)((int)a < (int)b ? a : b);
        case Reduction::max: return (unsigned)((int)a > (int)b ? a : b);
        case Reduction::min_unsigned: return a < b ? a : b;
        case Reduction::max_unsigned: return a > b ? a : b;
        case Reduction::all_bits: return a & b;
        case Reduction::any_bit: return a | b;
        case Reduction::odd_bits: return a ^ b;
    }
    return 0;
}

// All lanes of `mask` are here with the same operation: each gets its result.
void complete(Warp& warp, unsigned mask) {
    Fiber* const lanes = warp.lanes;
    const Fiber& first = lanes[__builtin_ctz(mask)];
    unsigned long long common = first.operation == Operation::reduce ? first.value : 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const Fiber& lane = lanes[__builtin_ctz(rest)];
        if (first.operation == Operation::ballot && lane.value) common |= 1ull << lane.lane;
        if (first.operation == Operation::reduce && &lane != &first)
            common = reduced(first.reduction, (unsigned)common, (unsigned)lane.value);
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        Fiber& lane = lanes[__builtin_ctz(rest)];
        lane.result = common;
        if (lane.operation == Operation::shuffle) {
            if (!(mask >> lane.source & 1u)) {
                current = &lane;
                fault("a shuffle reads lane %u, which takes no part (mask %08x) at <%p>", lane.source, mask, lane.waits_at);
            }
            lane.result = lanes[lane.source].value;
        }
        if (lane.operation == Operation::match) {
            lane.result = 0;
            for (unsigned other = mask; other; other &= other - 1) {
                const Fiber& peer = lanes[__builtin_ctz(other)];
                if (peer.value == lane.value) lane.result |= 1ull << peer.lane;
            }
        }
        if (lane.operation == Operation::barrier) lane.synced = now + 1;
        lane.state = State::ready;
    }
    ++now;
}

// Lets every group of lanes go on whose members have all arrived.
bool complete_operations(Warp& warp) {
    bool moved = false;
    for (unsigned i = 0; i < warp.count; ++i) {
        Fiber& lane = warp.lanes[i];
        if (lane.state != State::at_warp) continue;
        bool all_here = true;
        for (unsigned rest = lane.mask; rest; rest &= rest - 1) {
            const unsigned other = (unsigned)__builtin_ctz(rest);
            if (other >= warp.count || warp.lanes[other].state == State::ended) {
                current = &lane;
                fault("%s with mask %08x waits for lane %u, which %s, at <%p>", operation_names[(int)lane.operation],
                      lane.mask, other, other >= warp.count ? "does not exist" : "has ended", lane.waits_at);
            }
            const Fiber& peer = warp.lanes[other];
            if (peer.state != State::at_warp || peer.mask != lane.mask) {
                all_here = false;
            } else if (peer.operation != lane.operation || peer.size != lane.size || peer.reduction != lane.reduction) {
                current = &lane;
                fault("%s at <%p> meets %s of lane %u at <%p>", operation_names[(int)lane.operation], lane.waits_at,
                      operation_names[(int)peer.operation], other, peer.waits_at);
            }
        }
        if (all_here) {
            complete(warp, lane.mask);
            moved = true;
        }
    }
    return moved;
}

// Runs a warp until all its lanes wait for others; one step of it when shuffled.
bool run_warp(Warp& warp) {
    static std::vector<unsigned> order;
    bool moved = false;
    for (;;) {
        bool ran = false;
        put_in_order(order, warp.count);
        for (unsigned i : order) {
            if (warp.lanes[i].state != State::ready) continue;
            resume(warp.lanes[i]);
            ran = true;
        }
        const bool completed = complete_operations(warp);
        moved |= ran | completed;
        if ((!ran && !completed) || launch->order == shuffled) return moved;
    }
}

bool all_at(const Block& block, State state) {
    for (unsigned i = 0; i < block.count; ++i)
        if (block.fibers[i].state != state && block.fibers[i].state != State::ended) return false;
    return true;
}

void release(Block& block) {
    block.synced = now;
    for (unsigned i = 0; i < block.count; ++i)
        if (block.fibers[i].state != State::ended) block.fibers[i].state = State::ready;
}

// The shared memory of a block that has ended is out of reach at once, for the rest of its cluster.
void close_ended(Block& block) {
    if (block.live || block.closed) return;
    block.closed = true;
    if (!launch->shared_bytes || blocks.size() == 1) return;
    const Allocation& arena = arenas[block.rank];
    mprotect(arena.region, (size_t)(arena.region_end - arena.region), PROT_NONE);
}

bool open_barriers() {
    bool moved = false, all_at_cluster = true, any_live = false;
    for (Block& block : blocks) {
        if (!block.live) continue;
        any_live = true;
        all_at_cluster &= all_at(block, State::at_cluster);
        if (!all_at(block, State::at_block)) continue;
        block.predicates = 0;
        for (unsigned i = 0; i < block.count; ++i)
            if (block.fibers[i].state != State::ended) block.predicates += block.fibers[i].predicate != 0;
        ++now;
        release(block);
        moved = true;
    }
    if (any_live && all_at_cluster && !moved) {
        cluster_synced = ++now;
        for (Block& block : blocks) release(block);
        moved = true;
    }
    return moved;
}

[[noreturn]] void deadlock() {
    struct Group {
        const Fiber* one;
        unsigned count;
    };
    std::vector<Group> groups;
    for (const Fiber& fiber : fibers) {
        bool known = false;
        for (Group& group : groups) {
            known = group.one->state == fiber.state && group.one->waits_at == fiber.waits_at
                 && (fiber.state != State::at_warp || group.one->mask == fiber.mask);
            if (known) {
                ++group.count;
                break;
            }
        }
        if (!known) groups.push_back({&fiber, 1});
    }
    char text[2048];
    size_t used = 0;
    for (const Group& group : groups) {
        const Fiber& one = *group.one;
        if (used > sizeof text - 300) break;
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%u of %zu threads ", used ? "; " : "", group.count,
                                 fibers.size());
        const size_t left = sizeof text - used;
        char* const end = text + used;
        if (one.state == State::ended) used += (size_t)snprintf(end, left, "have ended");
        if (one.state == State::at_block) used += (size_t)snprintf(end, left, "wait at __syncthreads at <%p>", one.waits_at);
        if (one.state == State::at_cluster)
            used += (size_t)snprintf(end, left, "wait at a barrier of the cluster at <%p>", one.waits_at);
        if (one.state == State::at_warp)
            used += (size_t)snprintf(end, left, "wait at %s with mask %08x at <%p>", operation_names[(int)one.operation],
                                     one.mask, one.waits_at);
        used += (size_t)snprintf(text + used, sizeof text - used, " (one is thread %u of block %u, %u, %u)", one.number,
                                 one.block_index.x, one.block_index.y, one.block_index.z);
    }
    current = nullptr;
    fault("deadlock: %s", text);
}

void make_room() {
    const unsigned threads = launch->block[0] * launch->block[1] * launch->block[2];
    const size_t total = (size_t)threads * launch->cluster, stacks_size = total * (stack_size + page);
    if ((size_t)(stacks_end - stacks) < stacks_size) {
        if (stacks) munmap(stacks, (size_t)(stacks_end - stacks));
        stacks = static_cast<char*>(
            mmap(nullptr, stacks_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        stacks_end = stacks + stacks_size;
        for (size_t i = 0; i < total; ++i) mprotect(stack_of(i), stack_size, PROT_READ | PROT_WRITE);
    }
    for (Allocation& arena : arenas) discard(arena);
    arenas.clear();
    const size_t arena_size = (launch->shared_bytes + page - 1) / page * page;
    for (unsigned rank = 0; arena_size && rank < launch->cluster; ++rank) {
        char* region = guarded(arena_size);
        char* begin = region + arena_size - (launch->shared_bytes + 15) / 16 * 16;
        arenas.push_back({region, begin, begin + launch->shared_bytes, region + arena_size, nullptr, nullptr});
    }
    forget();

    fibers.assign((size_t)threads * launch->cluster, Fiber());
    blocks.assign(launch->cluster, Block());
    warps.clear();
    for (unsigned rank = 0; rank < launch->cluster; ++rank) {
        Block& block = blocks[rank];
        block.fibers = &fibers[(size_t)rank * threads];
        block.count = threads;
        block.rank = rank;
        if (arena_size) {
            block.shared = arenas[rank].begin;
            arenas[rank].block = &block;
        }
        for (unsigned first = 0; first < threads; first += 32)
            warps.push_back({block.fibers + first, threads - first < 32 ? threads - first : 32});
        for (unsigned number = 0; number < threads; ++number) {
            Fiber& fiber = block.fibers[number];
            fiber.block = &block;
            fiber.number = number;
            fiber.lane = number % 32;
            const unsigned x = launch->block[0], y = launch->block[1];
            fiber.thread_index = {number % x, number / x % y, number / x / y};
        }
    }
}

void start(Block& block, unsigned long long index) {
    const unsigned long long x = launch->grid[0], y = launch->grid[1];
    const uint3 position = {(unsigned)(index % x), (unsigned)(index / x % y), (unsigned)(index / x / y)};
    block.live = block.count;
    block.closed = false;
    if (block.shared) {
        const Allocation& arena = arenas[block.rank];
        mprotect(arena.region, (size_t)(arena.region_end - arena.region), PROT_READ | PROT_WRITE);
        memset(arena.region, 0xff, (size_t)(arena.region_end - arena.region));
    }
    for (unsigned number = 0; number < block.count; ++number) {
        Fiber& fiber = block.fibers[number];
        fiber.block_index = position;
        fiber.state = State::ready;
        prepare(fiber.context, stack_of((size_t)(&fiber - fibers.data())), run_fiber);
    }
}

void run_cluster() {
    static std::vector<unsigned> order;
    cluster_started = ++now;
    cluster_synced = 0;
    for (;;) {
        bool moved = false, live = false;
        put_in_order(order, (unsigned)warps.size());
        for (unsigned i : order) {
            moved |= run_warp(warps[i]);
            close_ended(*warps[i].lanes[0].block);
        }
        moved |= open_barriers();
        for (const Block& block : blocks) live |= block.live > 0;
        if (!live) break;
        if (!moved) deadlock();
    }
    current = nullptr;
}

void run_grid() {
    make_room();
    std::vector<unsigned> order;
    const unsigned long long count = (unsigned long long)launch->grid[0] * launch->grid[1] * launch->grid[2];
    const unsigned clusters = (unsigned)(count / launch->cluster);
    put_in_order(order, clusters);
    for (unsigned cluster : order) {
        for (unsigned rank = 0; rank < launch->cluster; ++rank)
            start(blocks[rank], (unsigned long long)cluster * launch->cluster + rank);
        run_cluster();
    }
}

template <typename T>
T warp_operation(Operation operation, unsigned mask, unsigned long long value, void* place, unsigned size = 0,
                 unsigned source = 0, Reduction reduction = Reduction::add) {
    Fiber& self = running();
    if (!(mask >> self.lane & 1u))
        fault("%s with mask %08x, which leaves out the calling lane %u, at <%p>", operation_names[(int)operation], mask,
              self.lane, place);
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.size = size;
    self.source = source;
    self.reduction = reduction;
    leave(State::at_warp, place);
    return (T)self.result;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What kernels call

#define PLACE __builtin_extract_return_addr(__builtin_return_address(0))

uint3 thread_index() { return running().thread_index; }
uint3 block_index() { return running().block_index; }
uint3 block_size() { return block_dim; }
uint3 grid_size() { return grid_dim; }
char* shared_memory() { return running().block->shared; }
unsigned cluster_rank() { return running().block->rank; }
unsigned cluster_size() { return launch->cluster; }

void cluster_sync() { leave(State::at_cluster, PLACE); }

void* peer_memory(const void* own, unsigned rank) {
    const Block& mine = *running().block;
    if (!mine.shared) fault("peer() without shared memory at <%p>", PLACE);
    const ptrdiff_t offset = static_cast<const char*>(own) - mine.shared;
    if (offset < 0 || offset > (ptrdiff_t)launch->shared_bytes)
        fault("peer() of an address that is not in this block's shared memory at <%p>", PLACE);
    if (rank >= launch->cluster) fault("peer() of block %u in a cluster of %u at <%p>", rank, launch->cluster, PLACE);
    if (!cluster_synced && rank != mine.rank)
        fault("peer() before any barrier of the cluster: block %u may not have started, at <%p>", rank, PLACE);
    return blocks[rank].shared + offset;
}

int block_barrier(int predicate) {
    running().predicate = predicate;
    leave(State::at_block, PLACE);
    return running().block->predicates;
}

void warp_barrier(unsigned mask) { warp_operation<int>(Operation::barrier, mask, 0, PLACE); }
unsigned warp_ballot(unsigned mask, bool predicate) {
    return warp_operation<unsigned>(Operation::ballot, mask, predicate, PLACE);
}
unsigned warp_reduce(unsigned mask, Reduction reduction, unsigned value) {
    return warp_operation<unsigned>(Operation::reduce, mask, value, PLACE, 0, 0, reduction);
}
unsigned warp_match(unsigned mask, unsigned long long value) {
    return warp_operation<unsigned>(Operation::match, mask, value, PLACE);
}
void warp_shuffle(unsigned mask, void* value, unsigned size, unsigned source) {
    unsigned long long word = 0;
    memcpy(&word, value, size);
    word = warp_operation<unsigned long long>(Operation::shuffle, mask, word, PLACE, size, source);
    memcpy(value, &word, size);
}
unsigned lane() { return running().lane; }
unsigned active_lanes() { return 1u << running().lane; }  // all that can be said for sure
void atomic_access(const void* address, unsigned size) {
    if (reinterpret_cast<uintptr_t>(address) % size) fault("misaligned atomic operation at <%p>", PLACE);
    access(address, size, updating, PLACE);
}
void trap(const char* what) { fault("%s at <%p>", what, PLACE); }

}  // namespace emulation

// ---------------------------------------------------------------------------------------------------------------------
// What Python calls

using namespace emulation;

extern "C" const char* emulation_launch(const Launch* what) {
    static char signal_stack[64 * 1024];
    stack_t ours = {}, before;
    ours.ss_sp = signal_stack;
    ours.ss_size = sizeof signal_stack;
    launch = what;
    message[0] = 0;
    overwritten.size = 0;
    random_state = what->seed * 2 + 0x9e3779b97f4a7c15ull;
    block_dim = {what->block[0], what->block[1], what->block[2]};
    grid_dim = {what->grid[0], what->grid[1], what->grid[2]};
    sigaltstack(&ours, &before);
    install_handlers();
    if (!sigsetjmp(way_out, 1)) run_grid();
    restore_handlers();
    sigaltstack(&before, nullptr);
    current = nullptr;
    launch = nullptr;
    return message[0] ? message : nullptr;
}

// The library that an address lies in, and where in it.
extern "C" const char* emulation_library(void* address, size_t* offset) {
    Dl_info info;
    if (!dladdr(address, &info)) return nullptr;
    *offset = (size_t)(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase));
    return info.dli_fname;
}

constexpr int canary = 0xa5;

// `bytes` bytes (or one) that begin at a multiple of `alignment` and end as near to a guard page as that allows.
extern "C" void* emulation_allocate(size_t bytes, size_t alignment) {
    bytes = bytes ? bytes : 1;
    const size_t pages = (bytes + alignment + page - 1) / page * page;
    char* region = guarded(pages);
    if (!region) return nullptr;
    char* end = region + pages;
    char* begin = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end - bytes) / alignment * alignment);
    allocations[region] = {region, begin, begin + bytes, end, nullptr, nullptr};
    forget();
    memset(region, canary, (size_t)(begin - region));
    memset(begin + bytes, canary, (size_t)(end - begin - bytes));
    return begin;
}

// How many bytes before or behind the data were written.
extern "C" long emulation_damage(void* data) {
    const Allocation& a = *find(static_cast<char*>(data));
    long damaged = 0;
    for (const char* p = a.region; p < a.begin; ++p) damaged += (unsigned char)*p != canary;
    for (const char* p = a.end; p < a.region_end; ++p) damaged += (unsigned char)*p != canary;
    return damaged;
}

extern "C" void emulation_free(void* data) {
    Allocation& a = *find(static_cast<char*>(data));
    char* const region = a.region;
    discard(a);
    allocations.erase(region);
}

// ---------------------------------------------------------------------------------------------------------------------
// What g++ calls where -fsanitize=undefined finds something. The data begins with the place.

namespace {
struct Place {
    const char* file;
    uint32_t line, column;
};
[[noreturn]] void undefined(const void* data, const char* what) {
    const Place& place = *static_cast<const Place*>(data);
    fault("%s at %s:%u:%u", what, place.file, place.line, place.column);
}
struct TypeMismatch {
    Place place;
    const void* type;
    unsigned char log_alignment, kind;
};
}  // namespace

#define UNDEFINED(name, what)                                                                                          \
    extern "C" void __ubsan_handle_##name(void* data) { undefined(data, what); }                                       \
    extern "C" void __ubsan_handle_##name##_abort(void* data) { undefined(data, what); }

UNDEFINED(add_overflow, "signed integer overflow in an addition")
UNDEFINED(sub_overflow, "signed integer overflow in a subtraction")
UNDEFINED(mul_overflow, "signed integer overflow in a multiplication")
UNDEFINED(negate_overflow, "signed integer overflow in a negation")
UNDEFINED(divrem_overflow, "division by zero, or overflow in a division,")
UNDEFINED(float_cast_overflow, "conversion of NaN or of too large a number to an integer")
UNDEFINED(shift_out_of_bounds, "shift by more bits than there are, or of a negative number,")
UNDEFINED(out_of_bounds, "index out of bounds")
UNDEFINED(load_invalid_value, "value that its type does not have")
UNDEFINED(pointer_overflow, "pointer arithmetic out of bounds")
UNDEFINED(builtin_unreachable, "unreachable code reached")
UNDEFINED(missing_return, "function without return")
UNDEFINED(vla_bound_not_positive, "array of negative size")
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(invalid_builtin, "zero passed to a bit count")

static void type_mismatch(void* data, uintptr_t address) {
    const TypeMismatch& mismatch = *static_cast<const TypeMismatch*>(data);
    const uintptr_t alignment = (uintptr_t)1 << mismatch.log_alignment;
    char what[200] = "null pointer";
    if (address && address % alignment)
        snprintf(what, sizeof what, "misaligned address %p, not a multiple of %zu,", reinterpret_cast<void*>(address),
                 (size_t)alignment);
    else if (address)
        snprintf(what, sizeof what, "access to more than the object at %p", reinterpret_cast<void*>(address));
    undefined(data, what);
}
extern "C" void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) { type_mismatch(data, address); }
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* data, uintptr_t address) { type_mismatch(data, address); }

// ---------------------------------------------------------------------------------------------------------------------
// What g++ calls at every access where -fsanitize=thread is on

#define ACCESSES(size)                                                                                                 \
    extern "C" void __tsan_read##size(void* address) { access(address, size, reading, PLACE); }                        \
    extern "C" void __tsan_write##size(void* address) { access(address, size, writing, PLACE); }                       \
    extern "C" void __tsan_unaligned_read##size(void* address) { access(address, size, reading, PLACE); }              \
    extern "C" void __tsan_unaligned_write##size(void* address) { access(address, size, writing, PLACE); }

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* address, size_t size) { access(address, size, reading, PLACE); }
extern "C" void __tsan_write_range(void* address, size_t size) { access(address, size, writing, PLACE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
