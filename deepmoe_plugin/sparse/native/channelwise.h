// Depthwise convolutions and norms.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kept.h"
#include "numbers.h"

// `norm(conv(x))` of all channels, either of them only if the operation has it.
template <class Number>
struct Channelwise {
    static constexpr int PIXELS = MAX_VECTORS > 1 ? 7 : 4, VECTORS = MAX_VECTORS > 1 ? 2 : 1;  // of a tile
    static constexpr int WIDE = 7;  // kernels of ConvNeXt, whose weights of a row stay in registers

    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    int64_t pitch, padded;  // bytes of a pixel; channels in whole vectors

    Channelwise(const Program& program, const Operation& op, int64_t group_number)
        : program(program), op(op), input(program.values[op.input]), output(program.values[op.output]),
          group(program.groups[group_number]), pitch(round_up(input.channels, Number::PAIR) * Number::SIZE),
          padded(round_up(input.channels, LANES)) {
        CHECK(input.layer < 0 && output.layer < 0 && input.channels == output.channels);
        CHECK(!op.weight || op.pad_width <= input.pad);
        CHECK(!op.weight || op.weight_bytes == op.kernel_height * op.kernel_width * padded * 4);
        CHECK(!op.rows || op.rows_bytes == 3 * padded * 4);
    }

    int64_t items() const { return group.count * output.height; }

    // One row of one image.
    void run(int64_t item) const {
        const int64_t image = program.images[group.first + item / output.height], row = item % output.height;
        const char* from = input.data + image * input.image_bytes;
        char* to = output.data + image * output.image_bytes + output.pixel(row, 0) * pitch;
        output.clear_pads(output.data + image * output.image_bytes, row, pitch);
        if (op.weight)
            for (int64_t channel = 0; channel < input.channels;) {
                const bool whole = channel + VECTORS * LANES <= input.channels;
                for (int64_t column = 0; column < output.width; column += PIXELS) {
                    const int64_t count = std::min<int64_t>(PIXELS, output.width - column);
                    whole ? choose<VECTORS, 1>(count, from, row, column, channel, to)
                          : choose<1, 1>(count, from, row, column, channel, to);
                }
                channel += whole ? VECTORS * LANES : LANES;
            }
        if (!op.rows) return;
        for (int64_t column = 0; column < output.width; ++column, to += pitch)
            normalise(op.weight ? to : from + input.pixel(row, column) * pitch, to);
    }

    template <int V, int P>
    void choose(int64_t count, const char* from, int64_t row, int64_t column, int64_t channel, char* to) const {
        if constexpr (P < PIXELS) {
            if (count > P) return choose<V, P + 1>(count, from, row, column, channel, to);
        }
        const int64_t lanes = std::min(LANES, input.channels - channel);
        if (lanes < LANES) return convolve<V, P, 0, false>(from, row, column, channel, lanes, to);
        if (op.kernel_width == WIDE && op.stride_width == 1 && op.dilation_width == 1)
            return convolve<V, P, WIDE, true>(from, row, column, channel, lanes, to);
        convolve<V, P, 0, true>(from, row, column, channel, lanes, to);
    }

    // P pixels of V vectors of channels: sums stay in registers until they are written. K: the width of the kernel if it
    // is known and moves by single pixels; each input is then read once for all outputs in its row. 0: any other.
    template <int V, int P, int K, bool WHOLE>
    void convolve(const char* from, int64_t row, int64_t column, int64_t channel, int64_t lanes, char* to) const {
        Vector sums[P][V];
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < V; ++v) sums[p][v] = *(const Vector*)(op.bias + channel + v * LANES);
        const int64_t left = column * op.stride_width - op.pad_width, step = op.stride_width * pitch;
        for (int64_t down = 0; down < op.kernel_height; ++down) {
            const int64_t y = row * op.stride_height - op.pad_height + down * op.dilation_height;
            if (y < 0 || y >= input.height) continue;
            if constexpr (K > 0) {
                add_row<V, P, K>(sums, (const float*)op.weight + down * K * padded + channel,
                                 from + input.pixel(y, left) * pitch + channel * Number::SIZE);
                continue;
            }
            for (int64_t across = 0; across < op.kernel_width; ++across) {
                const float* weight = (const float*)op.weight + (down * op.kernel_width + across) * padded + channel;
                const char* x = from + input.pixel(y, left + across * op.dilation_width) * pitch + channel * Number::SIZE;
                CHECK(x >= from && x + (P - 1) * step + ((V - 1) * LANES + lanes) * Number::SIZE <= from + input.image_bytes);
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) {
                        const char* place = x + p * step + v * LANES * Number::SIZE;
                        const Vector value = WHOLE ? Number::read_vector(place) : read_some<Number>(place, lanes);
                        sums[p][v] += value * *(const Vector*)(weight + v * LANES);
                    }
            }
        }
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < V; ++v) put(to + (column + p) * pitch, channel + v * LANES, sums[p][v]);
    }

    // The products of one row of a kernel.
    template <int V, int P, int K>
    __attribute__((always_inline)) void add_row(Vector (&sums)[P][V], const float* weight, const char* x) const {
        Vector weights[K][V];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) weights[k][v] = *(const Vector*)(weight + k * padded + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < P + K - 1; ++i) {
            const char* place = x + i * pitch;
            CHECK(place >= input.data);
            CHECK(place + V * LANES * Number::SIZE <= input.data + program.batch * input.image_bytes);
            Vector values[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) values[v] = Number::read_vector(place + v * LANES * Number::SIZE);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v)
                    if (i - p >= 0 && i - p < K) sums[p][v] += values[v] * weights[i - p][v];
        }
    }

    void put(char* pixel, int64_t channel, Vector value) const {
        const int64_t lanes = std::min(LANES, input.channels - channel);
        write_some<Number>(pixel + channel * Number::SIZE, value, lanes);
        if (Number::PAIR > 1 && lanes % 2) Number::write(pixel + (channel + lanes) * Number::SIZE, 0.0f);
    }

    // Of one pixel: to a mean of zero and a variance of one, times weights, plus biases.
    void normalise(const char* from, char* to) const {
        const float *weight = (const float*)op.rows, *bias = weight + padded, epsilon = bias[padded];
        const int64_t whole = input.channels / LANES * LANES, rest = input.channels - whole;
        const auto each = [&](const auto& work) {
            for (int64_t channel = 0; channel < whole; channel += LANES)
                work(channel, LANES, Number::read_vector(from + channel * Number::SIZE));
            if (rest) work(whole, rest, read_some<Number>(from + whole * Number::SIZE, rest));
        };
        Vector sum = {};
        each([&](int64_t, int64_t, Vector value) { sum += value; });
        const float mean = total(sum) / input.channels;
        Vector squares = {};
        each([&](int64_t, int64_t lanes, Vector value) {
            Vector difference = value - mean;
            for (int64_t lane = lanes; lane < LANES; ++lane) difference[lane] = 0;
            squares += difference * difference;
        });
        const float scale = 1 / std::sqrt(total(squares) / input.channels + epsilon);
        each([&](int64_t channel, int64_t, Vector value) {
            put(to, channel, (value - mean) * scale * *(const Vector*)(weight + channel) + *(const Vector*)(bias + channel));
        });
    }
};

// GRN of kept channels. NORMS: the Euclidean norm of each channel over all pixels. RESPOND: channels times what their norms
// say, relative to the mean of all norms, plus biases; the mean is weighted by the gates, and biases are times the gates.
template <class Number>
struct Response {
    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    const Kept& kept;
    int64_t pitch;

    Response(const Program& program, const Operation& op, int64_t group_number)
        : program(program), op(op), input(program.values[op.input]), output(program.values[op.output]),
          group(program.groups[group_number]), kept(*Kepts(program, group).of(input)),
          pitch(round_up(kept.count, Number::PAIR) * Number::SIZE) {
        CHECK(input.layer >= 0 && input.layer == output.layer);
        CHECK(op.kind == NORMS || op.weight_bytes == 3 * input.channels * 4);
    }

    int64_t vectors() const { return ceil_divide(kept.count, LANES); }
    int64_t items() const { return group.count * (op.kind == NORMS ? vectors() : output.height); }

    // NORMS: a vector of channels of one image. RESPOND: one row of one image.
    void run(int64_t item) const {
        const int64_t each = op.kind == NORMS ? vectors() : output.height;
        const int64_t image = program.images[group.first + item / each];
        const char* from = input.data + image * input.image_bytes;
        char* to = output.data + image * output.image_bytes;
        op.kind == NORMS ? measure(from, item % each * LANES, to) : respond(from, image, item % each, to);
    }

    void measure(const char* from, int64_t channel, char* to) const {
        const int64_t lanes = std::min(LANES, kept.count - channel);
        Vector sum = {};
        for (int64_t row = 0; row < input.height; ++row)
            for (int64_t column = 0; column < input.width; ++column) {
                const char* place = from + input.pixel(row, column) * pitch + channel * Number::SIZE;
                const Vector value = read_some<Number>(place, lanes);
                sum += value * value;
            }
        for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] = std::sqrt(sum[lane]);
        put(to, channel, lanes, sum);
    }

    void respond(const char* from, int64_t image, int64_t row, char* to) const {
        const int64_t width = input.channels;
        const float *weight = (const float*)op.weight, *bias = weight + width, epsilon = bias[width];
        const float* gates = program.gates + image * program.layer_starts[program.num_layers] + program.layer_starts[input.layer];
        const Value& measured = program.values[op.residual];
        const char* norms = measured.data + image * measured.image_bytes;
        float of_gates = 0, of_norms = 0;
        for (int64_t c = 0; c < width; ++c) of_gates += gates[c];
        for (int64_t k = 0; k < kept.count; ++k) of_norms += Number::read(norms + k * Number::SIZE);
        const float scale = 1 / (of_norms / width / std::max(of_gates / width, 1e-6f) + epsilon);
        for (int64_t channel = 0; channel < kept.count; channel += LANES) {
            const int64_t lanes = std::min(LANES, kept.count - channel);
            Vector factor = {}, shift = {};
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t expert = kept.index[channel + lane];
                factor[lane] = 1 + weight[expert] * Number::read(norms + (channel + lane) * Number::SIZE) * scale;
                shift[lane] = bias[expert] * gates[expert];
            }
            for (int64_t column = 0; column < output.width; ++column) {
                const char* place = from + input.pixel(row, column) * pitch + channel * Number::SIZE;
                put(to + output.pixel(row, column) * pitch, channel, lanes, read_some<Number>(place, lanes) * factor + shift);
            }
        }
        output.clear_pads(to, row, pitch);
    }

    void put(char* pixel, int64_t channel, int64_t lanes, Vector value) const {
        write_some<Number>(pixel + channel * Number::SIZE, value, lanes);
        if (Number::PAIR > 1 && lanes % 2) Number::write(pixel + (channel + lanes) * Number::SIZE, 0.0f);
    }
};
