// Operations without products, row by row.
#pragma once

#include <algorithm>
#include <cstring>

#include "kept.h"
#include "numbers.h"

template <class Number>
struct Simple {
    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    const Kept *in, *out;
    int64_t in_count, out_count, in_pitch, out_pitch;

    Simple(const Program& program, const Operation& op, int64_t group_number)
        : program(program), op(op), input(program.values[std::max<int64_t>(op.input, 0)]),
          output(program.values[op.output]), group(program.groups[group_number]) {
        const Kepts kepts(program, group);
        in = op.input < 0 ? nullptr : kepts.of(input);
        out = kepts.of(output);
        in_count = in ? in->count : input.channels;
        out_count = out ? out->count : output.channels;
        in_pitch = round_up(in_count, Number::PAIR) * Number::SIZE;
        out_pitch = round_up(out_count, Number::PAIR) * Number::SIZE;
    }

    int64_t items() const { return group.count * output.height; }

    // One row of one image.
    void run(int64_t item) const {
        const int64_t image = program.images[group.first + item / output.height], row = item % output.height;
        const char* from = input.data + image * input.image_bytes;
        char* to = output.data + image * output.image_bytes + output.pixel(row, 0) * out_pitch;
        output.clear_pads(output.data + image * output.image_bytes, row, out_pitch);
        if (op.kind == LOAD) return load(image, row, to);
        for (int64_t column = 0; column < output.width; ++column, to += out_pitch) {
            if (op.kind == POOL)
                pool(from, row, column, to);
            else
                spread(from + input.pixel(row, column) * in_pitch, image, to);
        }
    }

    // A row of an image as it was given; zeros behind the last channel where channels come in pairs.
    void load(int64_t image, int64_t row, char* to) const {
        const int64_t* strides = program.source_strides;
        std::memset(to, 0, output.width * out_pitch);
        const char* from = program.source + (image * strides[0] + row * strides[2]) * Number::SIZE;
        for (int64_t channel = 0; channel < op.image_channels; ++channel)
            for (int64_t column = 0; column < output.width; ++column)
                std::memcpy(to + column * out_pitch + channel * Number::SIZE,
                            from + (channel * strides[1] + column * strides[3]) * Number::SIZE, Number::SIZE);
    }

    // The largest value under the kernel, NaN if there is one; channels that the input does not have are zero.
    void pool(const char* from, int64_t row, int64_t column, char* to) const {
        const int64_t top = row * op.stride_height - op.pad_height, left = column * op.stride_width - op.pad_width;
        const int64_t count = std::min(in_count, out_count);
        for (int64_t c = 0; c < count; c += LANES) {
            const int64_t lanes = std::min(LANES, count - c);
            Vector best = {};
            bool first = true;
            for (int64_t down = 0; down < op.kernel_height; ++down)
                for (int64_t across = 0; across < op.kernel_width; ++across) {
                    const int64_t y = top + down * op.dilation_height, x = left + across * op.dilation_width;
                    if (y < 0 || y >= input.height || x < 0 || x >= input.width) continue;
                    const Vector value = read_some<Number>(from + input.pixel(y, x) * in_pitch + c * Number::SIZE, lanes);
                    const auto larger = (value > best) | (value != value);
                    best = first ? value : larger ? value : best;
                    first = false;
                }
            write_some<Number>(to + c * Number::SIZE, best, lanes);
        }
        std::memset(to + count * Number::SIZE, 0, out_pitch - count * Number::SIZE);
    }

    // WIDEN: kept channels in their places, zeros in the others. SCALE: kept channels times their gates.
    void spread(const char* from, int64_t image, char* to) const {
        if (op.kind == WIDEN) {
            std::memset(to, 0, out_pitch);
            for (int64_t k = 0; k < in_count; ++k)
                std::memcpy(to + (in ? in->index[k] : k) * Number::SIZE, from + k * Number::SIZE, Number::SIZE);
            return;
        }
        const float* gates = program.gates + image * program.layer_starts[program.num_layers] + program.layer_starts[output.layer];
        for (int64_t k = 0; k < out_count; ++k)
            Number::write(to + k * Number::SIZE, Number::read(from + k * Number::SIZE) * gates[out->index[k]]);
        std::memset(to + out_count * Number::SIZE, 0, out_pitch - out_count * Number::SIZE);
    }
};
