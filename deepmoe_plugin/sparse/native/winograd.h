// 3x3 convolutions of stride 1 with fewer products: Winograd's minimal filtering (Lavin and Gray, Fast Algorithms for
// Convolutional Neural Networks, 2016).
//
// A tile of OUT x OUT outputs reads IN x IN inputs, IN = OUT + 2. These and the kernel are transformed to IN x IN numbers
// each, whose products, summed over the input channels, are transformed to the outputs. Of an input and an output channel
// that takes 4 products for each output where OUT is 2, and 2.25 where it is 4, instead of 9.
//
// The weights of kept inputs and outputs are transformed as they are gathered, so that no others are stored or read than
// for other convolutions.
#pragma once

#include "convolution.h"

// One direction of the transforms, of numbers `step` apart, in place. The polynomials of OUT = 2 meet at 0, 1, -1 and
// infinity; those of OUT = 4 at 0, +-1/sqrt(2), +-sqrt(2) and infinity, with which rounding errors are a third of those
// with the usual 0, +-1, +-2.
template <int OUT>
struct Transform;

template <>
struct Transform<2> {
    __attribute__((always_inline)) static void inputs(Vector* x, int step) {
        const Vector x1 = x[step], x2 = x[2 * step];
        x[0] -= x2;
        x[step] = x1 + x2;
        x[2 * step] = x2 - x1;
        x[3 * step] = x1 - x[3 * step];
    }
    __attribute__((always_inline)) static void weights(Vector* x, int step) {
        const Vector even = (x[0] + x[2 * step]) * 0.5f, odd = x[step] * 0.5f;
        x[3 * step] = x[2 * step];
        x[step] = even + odd;
        x[2 * step] = even - odd;
    }
    __attribute__((always_inline)) static void outputs(Vector* x, int step) {
        const Vector x1 = x[step], x2 = x[2 * step];
        x[0] += x1 + x2;
        x[step] = x1 - x2 - x[3 * step];
    }
};

template <>
struct Transform<4> {
    static constexpr float A = 0.70710678f, B = 1.41421356f;

    __attribute__((always_inline)) static void inputs(Vector* x, int step) {
        const Vector x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
        const Vector even_a = x4 - x2 * 2.0f, odd_a = (x3 - x1 * 2.0f) * A;
        const Vector even_b = x4 - x2 * 0.5f, odd_b = (x3 - x1 * 0.5f) * B;
        x[0] = x[0] + x4 - x2 * 2.5f;
        x[step] = even_a + odd_a;
        x[2 * step] = even_a - odd_a;
        x[3 * step] = even_b + odd_b;
        x[4 * step] = even_b - odd_b;
        x[5 * step] = x1 + x[5 * step] - x3 * 2.5f;
    }
    __attribute__((always_inline)) static void weights(Vector* x, int step) {
        const Vector x2 = x[2 * step];
        const Vector even_a = (x[0] + x2 * 0.5f) * (-1 / 1.5f), odd_a = x[step] * (-A / 1.5f);
        const Vector even_b = (x[0] + x2 * 2.0f) * (1 / 6.0f), odd_b = x[step] * (B / 6.0f);
        x[step] = even_a + odd_a;
        x[2 * step] = even_a - odd_a;
        x[3 * step] = even_b + odd_b;
        x[4 * step] = even_b - odd_b;
        x[5 * step] = x2;
    }
    __attribute__((always_inline)) static void outputs(Vector* x, int step) {
        const Vector even_a = x[step] + x[2 * step], odd_a = (x[step] - x[2 * step]) * A;
        const Vector even_b = x[3 * step] + x[4 * step], odd_b = (x[3 * step] - x[4 * step]) * B;
        x[0] += even_a + even_b;
        x[step] = odd_a + odd_b;
        x[2 * step] = even_a * 0.5f + even_b * 2.0f;
        x[3 * step] = odd_a * 0.5f + odd_b * 2.0f + x[5 * step];
    }
};

template <int OUT>
struct Winograd : Convolution<Float> {
    static constexpr int IN = OUT + 2, PLACES = IN * IN;
    static constexpr int64_t WEIGHTS = 16;  // inputs whose weights a thread transforms at a time
    static constexpr int64_t SPREAD = 64;   // bytes between arrays that would else share their sets of a cache
    int64_t rows, columns;   // of tiles of an image
    int64_t shares;          // parts of all blocks of outputs that different threads compute of the same tiles
    int64_t most_tiles;      // of a run
    int64_t input_pitch;     // bytes of the transformed inputs of a tile and place
    int64_t product_pitch;   // the same of their products with a block of weights
    char *transformed, *products;

    Winograd(const Team& team, const Operation& op, int64_t group_number, char* pack)
        : Convolution(team, op, group_number, pack) {
        CHECK(op.kernel_height == 3 && op.kernel_width == 3 && op.stride_height == 1 && op.stride_width == 1);
        gathers = true;
        picks = at_once = false;
        places = PLACES;
        place_units = in_units + 1;
        rows = op.dilation_height * ceil_divide(ceil_divide(output.height, op.dilation_height), OUT);
        columns = op.dilation_width * ceil_divide(ceil_divide(output.width, op.dilation_width), OUT);
        const int64_t all = group.count * rows * columns, least = ceil_divide(all, TILES);
        by_outputs = splits_outputs();
        in_blocks_of(by_outputs ? block_of_threads() : std::min(BLOCK, vectors() * LANES));
        runs = by_outputs ? least : std::min(std::max(least, all / SHORT_TILES), round_up(least, team_size));
        shares = std::max<int64_t>(1, std::min(blocks, team_size / runs));
        most_tiles = ceil_divide(all, runs);
        input_pitch = round_up(in_units, LANES) * 4;
        product_pitch = block * 4;
        transformed = team.scratch;
        products = transformed + PLACES * input_place();
        CHECK(products + PLACES * product_place() <= team.scratch + program.scratch_bytes);
    }

    int64_t input_place() const { return most_tiles * input_pitch + SPREAD; }
    int64_t product_place() const { return most_tiles * product_pitch + SPREAD; }

    // ------------------------------------------------------------------------------------------- gather

    int64_t parts() const { return ceil_divide(in_units, WEIGHTS); }
    int64_t pack_items() const { return by_rows ? vectors() : (by_outputs ? vectors() : blocks) * parts(); }

    void gather(int64_t item) const {
        if (by_rows) return transform_rows(item * LANES);
        const int64_t first = item % parts() * WEIGHTS, last = std::min(first + WEIGHTS, in_units), number = item / parts();
        const int64_t each = by_outputs ? 1 : block / LANES;
        transform_vectors({number * each, std::min(each, vectors() - number * each)}, first, last);
    }

    // Of a vector of kept outputs, whose weights become columns in the memory of this thread first.
    void transform_rows(int64_t output_number) const {
        const Columns columns = {(uint32_t*)transformed, LANES};
        CHECK((char*)columns.of(taps * in_units) <= transformed + program.scratch_bytes);
        if (squeezes())
            for (int64_t tap = 0; tap < taps; ++tap) squeeze(output_number, tap, columns);
        else
            transpose(output_number, 0, taps * in_units, columns);
        uint32_t* target = packed(output_number, 0, PLACES * place_units - 1);
        for (int64_t k = 0; k < in_units; ++k) transform_weights(columns.of(k), in_units * LANES, target + k * block);
    }

    // Of some vectors of outputs, all kept, and some kept inputs.
    void transform_vectors(Span of_vectors, int64_t first, int64_t last) const {
        const int64_t tap_units = weight_rows * op.block;
        for (int64_t v = of_vectors.first; v < of_vectors.first + of_vectors.count; ++v) {
            const int64_t output_number = v * LANES, before = output_number % op.block;
            const uint32_t* weights = (const uint32_t*)op.weight + output_number / op.block * taps * tap_units + before;
            uint32_t* target = packed(output_number, 0, PLACES * place_units - 1);
            for (int64_t k = first; k < last; ++k) {
                const uint32_t* found = weights + (reads ? reads->index[k] : k) * op.block;
                CHECK((const char*)(found + (taps - 1) * tap_units + LANES) <= op.weight + op.weight_bytes);
                transform_weights(found, tap_units, target + k * block);
            }
        }
    }

    // The nine weights of an input and some outputs, so many units apart, to what is gathered.
    __attribute__((always_inline)) void transform_weights(const uint32_t* weight, int64_t tap_units, uint32_t* target) const {
        Vector x[PLACES];
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) x[tap / 3 * IN + tap % 3] = *(const Vector*)(weight + tap * tap_units);
#pragma GCC unroll 3
        for (int row = 0; row < 3; ++row) Transform<OUT>::weights(x + row * IN, 1);
#pragma GCC unroll 6
        for (int column = 0; column < IN; ++column) Transform<OUT>::weights(x + column, IN);
#pragma GCC unroll 36
        for (int i = 0; i < PLACES; ++i) *(Vector*)(target + i * place_units * block) = x[i];
    }

    // --------------------------------------------------------------------------------------- convolution

    int64_t run_items() const { return by_outputs ? team_size : blocks ? runs * shares : 0; }

    void run(int64_t item) const {
        if (by_outputs) {
            for (int64_t number = 0; number < runs; ++number) {
                const Span tiles = tiles_of(number);
                transform_inputs(tiles);
                compute(tiles.first, {0, tiles.count}, own_vectors(item));
                compute(tiles.first, part_of({0, tiles.count}, item, team_size), shared_vectors());
            }
            return;
        }
        const Span tiles = tiles_of(item / shares), some = part_of({0, blocks}, item % shares, shares);
        const int64_t each = block / LANES, start = some.first * each, end = (some.first + some.count) * each;
        transform_inputs(tiles);
        compute(tiles.first, {0, tiles.count}, {start, std::min(end, vectors()) - start});
    }

    Span tiles_of(int64_t run) const { return part_of({0, group.count * rows * columns}, run, runs); }

    // Some vectors of outputs of some tiles, counted from the first one whose inputs are transformed.
    void compute(int64_t first_tile, Span tiles, Span of_vectors) const {
        const int64_t tiles_of_image = rows * columns, first = first_tile + tiles.first, first_image = first / tiles_of_image;
        if (!tiles.count) return;
        each_block(of_vectors, [&](int64_t block_number, Span now) {
            Factors factors;
            find_factors(block_number, first_image, (first + tiles.count - 1) / tiles_of_image, factors);
            multiply(block_number, tiles, now);
            each_tile(first_tile, tiles, [&](const Tile& tile, int64_t number) {
                write_outputs(tile, number, block_number, now, first_image, factors);
            });
        });
    }

    struct Tile {
        int64_t turn, row, column;  // image of the group, and its number there
        int64_t top, left;          // its first output
    };

    // Outputs of a tile are as far apart as the kernel's positions, so that they share inputs.
    Tile tile_at(int64_t turn, int64_t row, int64_t column) const {
        const auto first = [](int64_t number, int64_t apart) {
            return apart == 1 ? number * OUT : number / apart * apart * OUT + number % apart;
        };
        return {turn, row, column, first(row, op.dilation_height), first(column, op.dilation_width)};
    }

    // Calls `work(tile, number)` for each of some tiles, counted from `start`.
    template <class Work>
    void each_tile(int64_t start, Span tiles, const Work& work) const {
        const int64_t first = start + tiles.first, turn = first / (rows * columns), place = first % (rows * columns);
        Tile tile = tile_at(turn, place / columns, place % columns);
        for (int64_t i = tiles.first; i < tiles.first + tiles.count; ++i) {
            work(tile, i);
            const bool ends_row = tile.column + 1 == columns, ends_image = ends_row && tile.row + 1 == rows;
            tile = tile_at(tile.turn + ends_image, ends_image ? 0 : tile.row + ends_row, ends_row ? 0 : tile.column + 1);
        }
    }

    void transform_inputs(Span tiles) const {
        each_tile(tiles.first, {0, tiles.count}, [&](const Tile& tile, int64_t number) { transform_tile(tile, number); });
    }

    void transform_tile(const Tile& tile, int64_t number) const {
        const int64_t top = tile.top - op.pad_height, left = tile.left - op.pad_width, step = op.dilation_width * in_pitch;
        const char* image = input.data + program.images[group.first + tile.turn] * input.image_bytes;
        char* target = transformed + number * input_pitch;
        const int64_t right = left + (IN - 1) * op.dilation_width;
        if (left >= -input.pad && right < input.width + input.pad && IN * step <= (int64_t)sizeof(zeros)) {
            const char* starts[IN];  // of rows, whose pixels are so many bytes apart: those around the image are zeros
            for (int i = 0; i < IN; ++i) {
                const int64_t row = top + i * op.dilation_height;
                starts[i] = row >= 0 && row < input.height ? image + input.pixel(row, left) * in_pitch : zeros;
            }
            transform_pixels([&](int i) { return starts[i / IN] + i % IN * step; }, target);
            return;
        }
        const char* pixels[PLACES];
        for (int i = 0; i < PLACES; ++i) {
            const int64_t row = top + i / IN * op.dilation_height, column = left + i % IN * op.dilation_width;
            const bool inside = row >= 0 && row < input.height && column >= 0 && column < input.width;
            pixels[i] = inside ? image + input.pixel(row, column) * in_pitch : zeros;
        }
        transform_pixels([&](int i) { return pixels[i]; }, target);
    }

    // The inputs of a tile, which lie at `place(i)`.
    template <class Place>
    __attribute__((always_inline)) void transform_pixels(const Place& place, char* target) const {
        for (int64_t channel = 0; channel < in_units; channel += LANES) {
            const int64_t lanes = std::min(LANES, in_units - channel);
            Vector x[PLACES];
#pragma GCC unroll 36
            for (int i = 0; i < PLACES; ++i) {
                const char* from = place(i) + channel * 4;
                CHECK(within(from, lanes * 4, input.data, program.batch * input.image_bytes) ||
                      within(from, lanes * 4, zeros, sizeof(zeros)));
                x[i] = read_some<Float>(from, lanes);
            }
#pragma GCC unroll 6
            for (int row = 0; row < IN; ++row) Transform<OUT>::inputs(x + row * IN, 1);
#pragma GCC unroll 6
            for (int column = 0; column < IN; ++column) Transform<OUT>::inputs(x + column, IN);
#pragma GCC unroll 36
            for (int i = 0; i < PLACES; ++i) *(Vector*)(target + i * input_place() + channel * 4) = x[i];
        }
    }

    static bool within(const char* from, int64_t bytes, const char* start, int64_t size) {
        return from >= start && from + bytes <= start + size;
    }

    // Products of the transformed inputs of some tiles with some vectors of a block of transformed weights.
    void multiply(int64_t block_number, Span tiles, Span of_vectors) const {
        const int64_t end = of_vectors.first + of_vectors.count;
        for (int64_t v = of_vectors.first; v < end; v += MAX_VECTORS) {
            const int64_t now = std::min<int64_t>(MAX_VECTORS, end - v), parts = ceil_divide(tiles.count, MAX_PIXELS[now]);
            const int64_t fewer = tiles.count / parts;  // tiles of a part, or one more
            const Multiply compute[2] = {multiply_for(now, fewer), multiply_for(now, std::min(fewer + 1, tiles.count))};
            for (int place = 0; place < PLACES; ++place) {
                const char* weight = packed_block(block_number) + (place * place_units * block + v * LANES) * 4;
                const char* inputs = transformed + place * input_place();
                char* target = products + place * product_place() + v * LANES * 4;
                for (int64_t part = 0; part < parts; ++part) {
                    const Span some = part_of(tiles, part, parts);
                    (this->*compute[some.count - fewer])(inputs + some.first * input_pitch, weight,
                                                         target + some.first * product_pitch);
                }
            }
        }
    }

    typedef void (Winograd::*Multiply)(const char* inputs, const char* weight, char* target) const;

    static Multiply multiply_for(int64_t vectors, int64_t tiles) {
        Multiply found = nullptr;
        with_size(vectors, tiles, [&](auto now, auto count) { found = &Winograd::multiply_tiles<now, count>; });
        return found;
    }

    template <int V, int P>
    __attribute__((noinline)) void multiply_tiles(const char* inputs, const char* weight, char* target) const {
        const uint32_t* x[P];
        Vector sums[P][V];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            x[p] = (const uint32_t*)(inputs + p * input_pitch);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[p][v] = Vector{};
        }
        add_products<V, P, false>(sums, x, weight, in_units, {});
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) *(Vector*)(target + p * product_pitch + v * LANES * 4) = sums[p][v];
    }

    void write_outputs(const Tile& tile, int64_t number, int64_t block_number, Span of_vectors, int64_t first_image,
                       const Factors& factors) const {
        const int64_t channels = std::min(block, out_count - block_number * block);
        const int64_t end = std::min(channels, (of_vectors.first + of_vectors.count) * LANES);
        const int64_t image = program.images[group.first + tile.turn];
        const int64_t down = op.dilation_height, across = op.dilation_width;
        const int64_t height = std::min<int64_t>(OUT, ceil_divide(output.height - tile.top, down));
        const int64_t width = std::min<int64_t>(OUT, ceil_divide(output.width - tile.left, across));
        if (height <= 0 || width <= 0) return;
        const auto row_bytes = [&](const Value& value) { return down * (value.width + value.pad) * out_pitch; };
        for (int64_t first = of_vectors.first * LANES; first < end; first += LANES) {
            Vector x[PLACES];
#pragma GCC unroll 36
            for (int i = 0; i < PLACES; ++i)
                x[i] = *(const Vector*)(products + i * product_place() + number * product_pitch + first * 4);
#pragma GCC unroll 6
            for (int row = 0; row < IN; ++row) Transform<OUT>::outputs(x + row * IN, 1);
#pragma GCC unroll 4
            for (int column = 0; column < OUT; ++column) Transform<OUT>::outputs(x + column, IN);
            const int64_t channel = block_number * block + first;
            char* target = at(output, image, tile.top, tile.left, channel);
            char* added = residual ? at(*residual, image, tile.top, tile.left, channel) : nullptr;
            const int64_t target_row = row_bytes(output), added_row = residual ? row_bytes(*residual) : 0;
            const float* gate = &factors.gates[tile.turn - first_image][first];
#pragma GCC unroll 4
            for (int i = 0; i < OUT; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < OUT; ++j) {
                    if (i >= height || j >= width) continue;
                    const int64_t shift = j * across * out_pitch;
                    finish<1>({x[i * IN + j]}, factors.bias + first,
                              {0, nullptr, target + i * target_row + shift, residual ? added + i * added_row + shift : nullptr, gate},
                              channels - first);
                }
        }
        for (int64_t i = 0; of_vectors.first == 0 && tile.left == 0 && i < height; ++i) {
            const int64_t begin = (tile.turn * output.height + tile.top + i * down) * output.width;
            clear_pads(begin, begin + output.width, block_number);
        }
    }
};
