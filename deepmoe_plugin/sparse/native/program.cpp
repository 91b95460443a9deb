// A sparse network as one native program; `program.py` describes it and calls it.
//
// A program is a table of operations on values, which are activations of all images of a batch, channels last. A value
// that a gate writes holds, of each image, only the channels that the image keeps. Several threads run the program
// together. They meet only where one needs what another wrote.
//
// All numbers that products are made of are units of 32 bits: one channel in float32, two neighbours in bfloat16. Plain
// vector types of GCC and Clang are used, so that the code runs wherever they do; AVX-512 has shorter ways here and
// there.

#include <optional>

#include "channelwise.h"
#include "convolution.h"
#include "mixture.h"
#include "simple.h"
#include "team.h"

// One operation for one group; the team gathers the weights of the next one with what is left of its time.
template <class Number>
static void step(Team& team, const Operation& op, int64_t group, const Operation* next, int64_t next_group, int64_t number) {
    char* pack = team.pack[number % 2];
    char* next_pack = team.pack[(number + 1) % 2];
    std::optional<Convolution<Number>> following;
    if (next && next->kind == CONVOLVE && team.size > 1) following.emplace(team, *next, next_group, next_pack);
    const int64_t more = following ? following->pack_items() : 0;
    const auto together = [&](int64_t own, const auto& work) {
        // One thread gathers, which is a matter of memory, while others multiply; what is left fills the end.
        const int64_t early = more / 2, all = own + early;
        team.share(own + more, [&](int64_t item) {
            const int64_t gathered = item < all ? item * early / all : item - own;
            const bool gathers = item >= all || (item + 1) * early / all > gathered;
            gathers ? following->gather(gathered) : work.run(item - gathered);
        });
    };
    if (op.kind == CONVOLVE) {
        const Convolution<Number> convolution(team, op, group, pack);
        if (team.size == 1)
            for (int64_t item = 0; item < convolution.pack_items(); ++item) convolution.gather(item);
        together(convolution.run_items(), convolution);
    } else if (op.kind == DEPTHWISE) {
        const Channelwise<Number> channelwise(team.program, op, group);
        together(channelwise.items(), channelwise);
    } else if (op.kind == NORMS || op.kind == RESPOND) {
        const Response<Number> response(team.program, op, group);
        together(response.items(), response);
    } else if (op.kind == AVERAGE || op.kind == SOFTMAX) {
        const Mixture<Number> mixture(team.program, op, group);
        together(mixture.items(), mixture);
    } else {
        const Simple<Number> simple(team.program, op, group);
        together(simple.items(), simple);
    }
    team.meet();
}

template <class Number>
static void run_part(Team team, const Part& part, int64_t first_group, int64_t by, int64_t& turn) {
    const Program& program = team.program;
    const int64_t operations = part.last - part.first;
    const int64_t groups = (part.num_groups - first_group + by - 1) / by;
    const auto at = [&](int64_t number, const Operation*& op, int64_t& group) {
        const int64_t o = part.group_major ? number % operations : number / groups;
        const int64_t g = part.group_major ? number / operations : number % groups;
        op = &program.operations[part.first + o];
        group = part.first_group + first_group + g * by;
    };
    const int64_t steps = operations * groups;
    if (team.size > 1 && steps) {
        const Operation* op;
        int64_t group;
        at(0, op, group);
        if (op->kind == CONVOLVE) {
            const Convolution<Number> convolution(team, *op, group, team.pack[0]);
            if (convolution.pack_items()) {
                team.share(convolution.pack_items(), [&](int64_t item) { convolution.gather(item); });
                team.meet();
            }
        }
    }
    for (int64_t number = 0; number < steps; ++number) {
        const Operation *op, *next = nullptr;
        int64_t group, next_group = 0;
        at(number, op, group);
        if (number + 1 < steps) at(number + 1, next, next_group);
        step<Number>(team, *op, group, next, next_group, number);
    }
    turn = team.turn;
}

template <class Number>
static void run_program(Program& program) {
    const bool asks = program.num_threads > 1;
    const int64_t threads = asks ? program.thread_count() : 1, member = asks ? program.thread_number() : 0;
    CHECK(threads <= program.num_threads);
    // All threads share the first two rooms when they work together; each has one of its own when it works alone.
    Team all = {program, threads, member, 0, {program.rooms, program.rooms + program.room_bytes}};
    Team alone = {program, 1, 0, 0, {program.rooms + member * program.room_bytes, program.rooms + member * program.room_bytes}};
    for (int64_t group = member; group < program.num_groups; group += threads)
        if (program.groups[group].num_layers) Kepts(program, program.groups[group]).fill();
    all.meet();
    for (int64_t p = 0; p < program.num_parts; ++p) {
        const Part& part = program.parts[p];
        const bool separate = threads > 1 && (part.num_groups >= 4 * threads || (part.num_groups > 1 && part.num_groups % threads == 0));
        if (separate) {
            int64_t turn = 0;
            run_part<Number>(alone, part, member, threads, turn);
            all.meet();
        } else {
            run_part<Number>(all, part, 0, 1, all.turn);
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
