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

    void fill() const {
        const int64_t* starts = program.layer_starts + group.first_layer;
        int32_t* indices = (int32_t*)(layers + group.num_layers);
        Move* moves = (Move*)(indices + starts[group.num_layers] - starts[0] + 1);
        for (int64_t l = 0; l < group.num_layers; ++l) {
            const int64_t width = starts[l + 1] - starts[l];
            const uint8_t* mask = group.masks + starts[l] - starts[0];
            Kept& kept = layers[l];
            kept = {0, 0, indices, moves};
            for (int64_t c = 0; c < width; ++c) {
                kept.index[kept.count] = (int32_t)c;
                kept.count += mask[c] != 0;
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
    }
};
