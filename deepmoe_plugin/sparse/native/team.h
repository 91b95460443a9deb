// Threads that work together.
#pragma once

#include <sched.h>

#include "layout.h"

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif

struct Span {             // neighbouring items
    int64_t first, count;
};

// One of so many parts.
static Span part_of(Span all, int64_t number, int64_t parts) {
    const int64_t first = all.count * number / parts;
    return {all.first + first, all.count * (number + 1) / parts - first};
}

struct Team {             // threads that run a part of the program together
    Program& program;
    int64_t size, member, turn;
    char* pack[2];
    char* scratch;        // of this thread

    void meet() {
        if (size == 1) return;
        std::atomic<int64_t>&arrived = program.lines[0].number, &rounds = program.lines[1].number;
        const int64_t round = rounds.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; rounds.load(std::memory_order_acquire) == round; ++spins) {
            PAUSE();
            if (spins > 20000) sched_yield();
        }
    }

    // What one of the threads does first of so many items. It is the same part of all operations, so that a thread mostly
    // reads what it has written itself.
    Span part(int64_t count, int64_t thread) const {
        return part_of({0, count}, thread, size);
    }

    // Calls `work(owner, item)` for the items of each thread, `count(owner)` of them, each on one of the threads: its own
    // first, then what others have left. Between two calls, threads meet.
    template <class Count, class Work>
    void share(const Count& count, const Work& work) {
        if (size == 1) {
            for (int64_t item = 0; item < count(0); ++item) work(0, item);
            return;
        }
        tickets(turn + 2)[member].number.store(0, std::memory_order_relaxed);
        Line* taken = tickets(turn++);
        for (int64_t i = 0; i < size; ++i) {
            const int64_t owner = (member + i) % size, all = count(owner);
            for (int64_t item; (item = taken[owner].number.fetch_add(1, std::memory_order_relaxed)) < all;) work(owner, item);
        }
    }

    Line* tickets(int64_t of) const { return program.lines + 2 + of % 4 * size; }
};
