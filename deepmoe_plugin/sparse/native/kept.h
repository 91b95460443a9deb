// The experts that a group of images keeps, as lists.
#pragma once

#include <algorithm>

#include "layout.h"

struct Move {             // kept channels of one vector
    uint32_t bits, count;
    int32_t source;       // vector
    int32_t target;       // kept channel
};

struct Kept {             // of one layer for one group
    int64_t count;
    int64_t num_moves;
    int32_t* index;
    Move* moves;
};

static int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

struct Kepts {            // of all layers of one group, laid out in memory that Python gives
    const Program& program;
    const Group& group;
    Kept* const layers;

    Kepts(const Program& program, const Group& group) : program(program), group(group), layers((Kept*)group.lists) {}

    const Kept* of(const Value& value) const {
        if (value.layer < 0) return nullptr;
        CHECK(value.layer >= group.first_layer && value.layer < group.first_layer + group.num_layers);
        return &layers[value.layer - group.first_layer];
    }

    // Whether the weights of all layers are there as the group needs them.
    bool fill() const {
        bool is_complete = true;
        const int64_t* starts = program.layer_starts + group.first_layer;
        int32_t* indices = (int32_t*)(layers + group.num_layers);
        Move* moves = (Move*)(indices + starts[group.num_layers] - starts[0] + 1);
        for (int64_t l = 0; l < group.num_layers; ++l) {
            const int64_t width = starts[l + 1] - starts[l], layer = group.first_layer + l;
            Kept& kept = layers[l];
            kept = {0, 0, indices, moves};
            const bool all = mark(layer, width, indices) > program.most_kept[layer];
            for (int64_t c = 0; c < width; ++c) {  // the marks give way to the list
                const bool is_kept = all || indices[c];
                indices[kept.count] = (int32_t)c;
                kept.count += is_kept;
            }
            if (kept.count == width && program.whole[layer].load(std::memory_order_relaxed) != PRESENT) {
                program.whole[layer].store(ASKED_FOR, std::memory_order_relaxed);
                is_complete = false;
            }
            for (int64_t done = 0; done < kept.count;) {
                Move move = {0, 0, kept.index[done] / (int32_t)LANES, (int32_t)done};
                for (; done < kept.count && kept.index[done] / LANES == move.source; ++done, ++move.count)
                    move.bits |= 1u << kept.index[done] % LANES;
                kept.moves[kept.num_moves++] = move;
            }
            indices += width;
            moves += kept.num_moves;
        }
        CHECK((char*)moves <= group.lists + group.lists_bytes);
        return is_complete;
    }

    // Mark the experts that any image of the group keeps; how many they are.
    int64_t mark(int64_t layer, int64_t width, int32_t* marks) const {
        std::fill(marks, marks + width, 0);
        for (int64_t i = 0; i < group.count; ++i) {
            const float* gates = program.gates + program.images[group.first + i] * program.layer_starts[program.num_layers] +
                                 program.layer_starts[layer];
            for (int64_t c = 0; c < width; ++c) marks[c] |= gates[c] > 0;
        }
        int64_t count = 0;
        for (int64_t c = 0; c < width; ++c) count += marks[c];
        return count;
    }
};
