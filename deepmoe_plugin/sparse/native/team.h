// Threads that work together.
#pragma once

#include <sched.h>

#include "layout.h"

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif

struct Team {             // threads that run a part of the program together
    Program& program;
    int64_t size, member, turn;
    char* pack[2];

    void meet() {
        if (size == 1) return;
        const int64_t round = program.round.load(std::memory_order_acquire);
        if (program.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            program.arrived.store(0, std::memory_order_relaxed);
            program.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; program.round.load(std::memory_order_acquire) == round; ++spins) {
            PAUSE();
            if (spins > 20000) sched_yield();
        }
    }

    // Calls `work(item)` for each of `count` items, each on one of the threads. Between two calls, threads meet.
    template <class Work>
    void share(int64_t count, Work work) {
        if (size == 1) {
            for (int64_t item = 0; item < count; ++item) work(item);
            return;
        }
        auto& tickets = program.tickets[turn % 4];
        if (member == 0) program.tickets[(turn + 2) % 4].store(0, std::memory_order_relaxed);
        ++turn;
        for (int64_t item; (item = tickets.fetch_add(1, std::memory_order_relaxed)) < count;) work(item);
    }
};
