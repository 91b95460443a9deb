// A sparse network as one native program; `schedule.py` describes it and calls it.
//
// A program is a table of operations on values, which are activations of all images of a batch, channels last. A value
// that a gate writes holds, of each image, only the channels that the image keeps. Several threads run the program
// together. They meet only where one needs what another wrote.
//
// All numbers that products are made of are units of 32 bits: one channel in float32, two neighbours in bfloat16. Plain
// vector types of GCC and Clang are used, so that the code runs wherever they do; AVX-512 has shorter ways here and
// there.

#include <optional>
#include <type_traits>
#include <variant>

#include "channelwise.h"
#include "convolution.h"
#include "mixture.h"
#include "simple.h"
#include "team.h"
#include "winograd.h"

struct Step {             // one operation for one group
    const Operation* op;
    int64_t group;
};

struct Walk {             // over the steps of some parts, with each `by`th group of them from `first` on
    const Program& program;
    int64_t part, last, first, by, number = 0;

    bool next(Step& step) {
        for (; part < last; ++part, number = 0) {
            const Part& now = program.parts[part];
            const int64_t operations = now.last - now.first, groups = (now.num_groups - first + by - 1) / by;
            if (number >= operations * groups) continue;
            const int64_t o = now.group_major ? number % operations : number / groups;
            const int64_t g = now.group_major ? number / operations : number % groups;
            step = {&program.operations[now.first + o], now.first_group + first + g * by};
            ++number;
            return true;
        }
        return false;
    }
};

template <class Number>
using AnyConvolution = std::conditional_t<Number::PAIR == 1, std::variant<Convolution<Float>, Winograd<2>, Winograd<4>>,
                                          std::variant<Convolution<Number>>>;

template <class Number>
static AnyConvolution<Number> convolution_of(const Team& team, const Step& step, char* pack) {
    if constexpr (Number::PAIR == 1) {
        if (step.op->tile == 2) return Winograd<2>(team, *step.op, step.group, pack);
        if (step.op->tile == 4) return Winograd<4>(team, *step.op, step.group, pack);
    }
    return Convolution<Number>(team, *step.op, step.group, pack);
}

// The team gathers the weights of the next step, which may be null, with what is left of its time.
template <class Number>
static void run_step(Team& team, const Step& now, const Step* next, int64_t number) {
    const Operation& op = *now.op;
    char* pack = team.pack[number % 2];
    char* next_pack = team.pack[(number + 1) % 2];
    std::optional<AnyConvolution<Number>> following;
    int64_t more = 0;
    if (next && next->op->kind == CONVOLVE && team.size > 1) {
        following.emplace(convolution_of<Number>(team, *next, next_pack));
        more = std::visit([](const auto& convolution) { return convolution.pack_items(); }, *following);
    }
    const auto gather = [&](int64_t item) {
        std::visit([&](const auto& convolution) { convolution.gather(item); }, *following);
    };
    const auto together = [&](int64_t own, const auto& work) {
        // Some gathering comes early, which is a matter of memory, while others multiply; what is left fills the end.
        const auto count = [&](int64_t thread) { return team.part(own, thread).count + team.part(more, thread).count; };
        team.share(count, [&](int64_t thread, int64_t item) {
            const Span runs = team.part(own, thread), gathers = team.part(more, thread);
            const int64_t early = gathers.count / 2, all = runs.count + early;
            const int64_t gathered = item < all ? item * early / all : item - runs.count;
            const bool gathers_now = item >= all || (item + 1) * early / all > gathered;
            gathers_now ? gather(gathers.first + gathered) : work.run(runs.first + item - gathered);
        });
    };
    if (op.kind == CONVOLVE) {
        std::visit(
            [&](const auto& convolution) {
                if (team.size == 1)
                    for (int64_t item = 0; item < convolution.pack_items(); ++item) convolution.gather(item);
                together(convolution.run_items(), convolution);
            },
            convolution_of<Number>(team, now, pack));
    } else if (op.kind == DEPTHWISE) {
        const Channelwise<Number> channelwise(team.program, op, now.group);
        together(channelwise.items(), channelwise);
    } else if (op.kind == NORMS || op.kind == RESPOND) {
        const Response<Number> response(team.program, op, now.group);
        together(response.items(), response);
    } else if (op.kind == AVERAGE || op.kind == SOFTMAX) {
        const Mixture<Number> mixture(team.program, op, now.group);
        together(mixture.items(), mixture);
    } else {
        const Simple<Number> simple(team.program, op, now.group);
        together(simple.items(), simple);
    }
    team.meet();
}

template <class Number>
static void run_steps(Team& team, Walk walk) {
    Step now, next;
    if (!walk.next(now)) return;
    if (team.size > 1 && now.op->kind == CONVOLVE) {
        std::visit(
            [&](const auto& convolution) {
                const int64_t items = convolution.pack_items();
                if (!items) return;
                const auto count = [&](int64_t thread) { return team.part(items, thread).count; };
                team.share(count, [&](int64_t thread, int64_t item) {
                    convolution.gather(team.part(items, thread).first + item);
                });
                team.meet();
            },
            convolution_of<Number>(team, now, team.pack[0]));
    }
    bool goes_on = true;
    for (int64_t number = 0; goes_on; ++number, now = next) {
        goes_on = walk.next(next);
        run_step<Number>(team, now, goes_on ? &next : nullptr, number);
    }
}

template <class Number>
static void run_program(Program& program) {
    const bool asks = program.num_threads > 1;
    const int64_t threads = asks ? program.thread_count() : 1, member = asks ? program.thread_number() : 0;
    CHECK(threads <= program.num_threads);
    // All threads share the first two rooms when they work together; each has one of its own when it works alone.
    char *room = program.rooms + member * program.room_bytes, *scratch = program.scratch + member * program.scratch_bytes;
    Team all = {program, threads, member, 0, {program.rooms, program.rooms + program.room_bytes}, scratch};
    Team alone = {program, 1, 0, 0, {room, room}, scratch};
    if (!program.has_lists) {
        for (int64_t group = member; group < program.num_groups; group += threads)
            if (program.groups[group].num_layers && !Kepts(program, program.groups[group]).fill())
                program.lacks.store(1, std::memory_order_relaxed);
        all.meet();
        if (program.lacks.load(std::memory_order_relaxed)) return;  // the caller makes them, and calls again
    }
    const auto is_separate = [&](int64_t part) {
        const int64_t groups = program.parts[part].num_groups;
        return threads > 1 && (groups >= 4 * threads || (groups > 1 && groups % threads == 0));
    };
    for (int64_t p = 0; p < program.num_parts;) {
        const int64_t first = p++;
        if (is_separate(first)) {
            run_steps<Number>(alone, {program, first, p, member, threads});
            all.meet();
        } else {
            while (p < program.num_parts && !is_separate(p)) ++p;
            run_steps<Number>(all, {program, first, p, 0, 1});
        }
    }
}

extern "C" void deepmoe_run(void* data) {
    Program& program = *(Program*)data;
    if (program.is_bfloat16)
        run_program<Bfloat16>(program);
    else
        run_program<Float>(program);
}

// The sizes of what Python fills in, to be compared with its own.
extern "C" int64_t deepmoe_size(int64_t number) {
    const int64_t sizes[] = {sizeof(Value), sizeof(Operation), sizeof(Part), sizeof(Group), sizeof(Program), sizeof(Kept), sizeof(Move)};
    return sizes[number];
}
