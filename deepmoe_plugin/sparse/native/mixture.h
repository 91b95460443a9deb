// What a gating network has besides convolutions. All channels are there: gates come only after it.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"
#include "numbers.h"

template <class Number>
struct Mixture {
    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    int64_t pitch;

    Mixture(const Program& program, const Operation& op, int64_t group_number)
        : program(program), op(op), input(program.values[op.input]), output(program.values[op.output]),
          group(program.groups[group_number]), pitch(round_up(input.channels, Number::PAIR) * Number::SIZE) {
        CHECK(input.layer < 0 && output.layer < 0 && input.channels == output.channels);
        CHECK(op.kind == SOFTMAX || output.height * output.width == 1);
    }

    int64_t vectors() const { return ceil_divide(input.channels, LANES); }
    int64_t items() const { return group.count * (op.kind == AVERAGE ? vectors() : output.height); }

    // AVERAGE: a vector of channels of one image. SOFTMAX: one row of one image.
    void run(int64_t item) const {
        const int64_t each = op.kind == AVERAGE ? vectors() : output.height, part = item % each;
        const int64_t image = program.images[group.first + item / each];
        const char* from = input.data + image * input.image_bytes;
        char* to = output.data + image * output.image_bytes;
        if (op.kind == AVERAGE) {
            average(from, part * LANES, to + output.pixel(0, 0) * pitch);
        } else {
            for (int64_t column = 0; column < output.width; ++column)
                softmax(from + input.pixel(part, column) * pitch, to + output.pixel(part, column) * pitch);
        }
        if (op.kind == SOFTMAX || part == 0) output.clear_pads(to, op.kind == SOFTMAX ? part : 0, pitch);
    }

    void average(const char* from, int64_t channel, char* to) const {
        const int64_t lanes = std::min(LANES, input.channels - channel);
        Vector sum = {};
        for (int64_t row = 0; row < input.height; ++row)
            for (int64_t column = 0; column < input.width; ++column)
                sum += read_some<Number>(from + input.pixel(row, column) * pitch + channel * Number::SIZE, lanes);
        put(to, channel, lanes, sum / (float)(input.height * input.width));
    }

    // The largest is subtracted first, so that no power overflows.
    void softmax(const char* from, char* to) const {
        float largest = Number::read(from), sum = 0;
        for (int64_t c = 1; c < input.channels; ++c) largest = std::max(largest, Number::read(from + c * Number::SIZE));
        const auto power = [&](int64_t c) { return std::exp(Number::read(from + c * Number::SIZE) - largest); };
        for (int64_t c = 0; c < input.channels; ++c) sum += power(c);
        for (int64_t channel = 0; channel < input.channels; channel += LANES) {
            const int64_t lanes = std::min(LANES, input.channels - channel);
            Vector value = {};
            for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = power(channel + lane) / sum;
            put(to, channel, lanes, value);
        }
    }

    void put(char* pixel, int64_t channel, int64_t lanes, Vector value) const {
        write_some<Number>(pixel + channel * Number::SIZE, value, lanes);
        if (Number::PAIR > 1 && lanes % 2) Number::write(pixel + (channel + lanes) * Number::SIZE, 0.0f);
    }
};
