// A convolution for one group of images: its weights are gathered, then tiles of pixels and outputs are computed.
// Longer than other files: both parts share where the weights of a block lie.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kept.h"
#include "numbers.h"
#include "team.h"

template <class Number>
struct Convolution {
    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    const Kept *reads, *writes;      // null: all
    char *pack, *scratch;
    const Value* residual;
    const int64_t team_size, member;
    int64_t taps, in_units, out_count, in_pitch, out_pitch, pixels, runs, weight_rows;
    int64_t block, blocks;           // outputs whose weights lie together, in whole vectors and BLOCK at most; how many such
    int64_t places, place_units;     // of a gathered block: kernel positions, and units from one to the next
    bool gathers, picks, by_rows;
    bool at_once;                    // a thread gathers a kernel row of a block just before it multiplies with it
    bool by_outputs;                 // a thread multiplies with the weights that it has gathered, rather than with all of them
    bool whole_rows;                 // kernel positions side by side are one run, of weights and of inputs

    Convolution(const Team& team, const Operation& op, int64_t group_number, char* pack)
        : program(team.program), op(op), input(program.values[op.input]), output(program.values[op.output]),
          group(program.groups[group_number]), pack(pack), scratch(team.scratch), team_size(team.size), member(team.member) {
        const Kepts kepts(program, group);
        reads = kepts.of(input);
        writes = kepts.of(output);
        residual = op.residual < 0 ? nullptr : &program.values[op.residual];
        const int64_t in_count = reads ? reads->count : input.channels;
        out_count = writes ? writes->count : output.channels;
        taps = op.kernel_height * op.kernel_width;
        in_pitch = round_up(in_count, Number::PAIR) * Number::SIZE;
        out_pitch = round_up(out_count, Number::PAIR) * Number::SIZE;
        in_units = ceil_divide(in_count, Number::PAIR);
        places = taps;
        place_units = in_units;
        weight_rows = ceil_divide(input.channels, Number::PAIR);
        pixels = output.height * output.width;
        const bool some_in = reads && reads->count < input.channels;
        const bool pays = Number::PAIR > 1 || group.count * pixels >= MANY_PIXELS;
        by_rows = writes && writes->count < output.channels;
        gathers = by_rows || (some_in && pays);
        CHECK(by_rows ? op.rows : op.weight);
        picks = some_in && !gathers;
        in_blocks_of(gathers ? std::min(BLOCK, vectors() * LANES) : op.block);
        at_once = gathers && gathers_at_once();
        by_outputs = by_rows && !at_once && splits_outputs();
        if (by_outputs) in_blocks_of(block_of_threads());
        runs = at_once || by_outputs ? ceil_divide(group.count * pixels, RUN) : runs_for();
        whole_rows = !picks && op.dilation_width == 1;
        CHECK(op.kernel_width * in_units * 4 <= (int64_t)sizeof(zeros));
        CHECK(op.pad_width <= input.pad);
    }

    void in_blocks_of(int64_t outputs) {
        block = outputs;
        blocks = outputs ? ceil_divide(out_count, outputs) : 0;
    }

    // Few enough pixels at a time that all threads have about the same to do.
    int64_t runs_for() const {
        const int64_t all = group.count * pixels, least = ceil_divide(all, RUN);
        if (team_size == 1 || !blocks || least * blocks >= 8 * team_size) return least;
        const int64_t most = std::max(least, all / SHORT_RUN);
        return std::min(most, round_up(std::max(least, ceil_divide(2 * team_size, blocks)), team_size));
    }

    int64_t in_bytes() const { return group.count * input.height * input.width * in_pitch; }
    int64_t block_bytes() const { return places * place_units * block * 4; }
    int64_t row_units() const { return op.kernel_width * in_units; }

    // What a thread reads of weights or inputs that another has written comes from the cache of that one. Where weights are
    // more, threads share the outputs rather than the pixels; in bfloat16 they would too often write to one cache line.
    bool splits_outputs() const {
        const int64_t bytes = vectors() * LANES * places * place_units * 4;
        return Number::PAIR == 1 && team_size > 1 && vectors() >= team_size && in_bytes() < bytes;
    }
    int64_t vectors() const { return ceil_divide(out_count, LANES); }
    // What a thread writes of gathered weights lies together as far as possible.
    int64_t block_of_threads() const {
        const int64_t own = own_vectors(0).count;
        return own >= 4 ? BLOCK : own >= 2 ? 2 * LANES : LANES;
    }
    // Each thread has as many vectors of outputs as any other; of those that are left over it has some of the pixels.
    Span own_vectors(int64_t thread) const { return {vectors() / team_size * thread, vectors() / team_size}; }
    Span shared_vectors() const { return {vectors() - vectors() % team_size, vectors() % team_size}; }

    // Calls `work(number, vectors)` for each block with some of these vectors; those of the block are counted anew.
    template <class Work>
    void each_block(Span vectors, const Work& work) const {
        const int64_t last = vectors.first + vectors.count, each = block / LANES;
        for (int64_t v = vectors.first, now; v < last; v += now) {
            now = std::min(each - v % each, last - v);
            work(v / each, Span{v % each, now});
        }
    }

    // Where blocks run one by one, of which each thread has several, and where a kernel row of a block stays in the
    // second-level cache: what is gathered then never leaves it, and the next weights come while these are multiplied
    // with. Sums of some pixels wait in memory for the next kernel row.
    bool gathers_at_once() const {
        const bool by_blocks = in_bytes() <= blocks * block_bytes() && blocks >= 2 * team_size;
        const bool fits = block == BLOCK && row_units() * BLOCK * 4 <= 2 * CACHED;
        return by_blocks && fits && (op.kernel_height == 1 || group.count * pixels <= SUMMED);
    }

    // ------------------------------------------------------------------------------------------- gather

    // All kernel positions are one row of inputs where no input is left out.
    bool squeezes() const { return reads && reads->count < input.channels; }
    int64_t parts() const { return ceil_divide(by_rows ? taps * in_units : in_units, GATHERED); }
    int64_t pack_items() const {
        if (!gathers || at_once) return 0;
        return by_rows ? ceil_divide(out_count, LANES) * (squeezes() ? taps : parts()) : blocks * taps * parts();
    }

    // Write the weights of kept inputs and outputs: of some outputs, kernel positions and inputs.
    void gather(int64_t item) const {
        if (by_rows && squeezes()) return squeeze(item / taps * LANES, item % taps, columns_of(item / taps * LANES));
        const int64_t part = item % parts(), turn = item / parts(), first = part * GATHERED;
        if (by_rows)
            return transpose(turn * LANES, first, std::min(first + GATHERED, taps * in_units), columns_of(turn * LANES));
        select(turn / taps, turn % taps, first, std::min(first + GATHERED, in_units));
    }

    // The same of a kernel row of a block, at once.
    void gather_row(int64_t block_number, int64_t down) const {
        const int64_t first = down * op.kernel_width, last = first + op.kernel_width, begin = block_number * block;
        for (int64_t tap = first; !by_rows && tap < last; ++tap) select(block_number, tap, 0, in_units);
        for (int64_t number = begin; by_rows && number < std::min(out_count, begin + block); number += LANES) {
            const Columns columns = {packed(number, 0, row_units()), block, first * in_units};
            if (!squeezes()) transpose(number, first * in_units, last * in_units, columns);
            for (int64_t tap = first; squeezes() && tap < last; ++tap) squeeze(number, tap, columns);
        }
    }

    // Where the gathered weights of a block lie; each thread has a place for a row if it gathers just before it multiplies.
    char* packed_block(int64_t number) const {
        return at_once ? pack + member * row_units() * block * 4 : pack + number * block_bytes();
    }

    typedef const char* Rows[LANES];

    // The rows of a vector of kept outputs, from some unit on; null behind the last.
    void find_rows(int64_t output_number, int64_t unit, Rows& rows) const {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t number = output_number + lane;
            rows[lane] = number < out_count ? op.rows + (writes->index[number] * taps * weight_rows + unit) * 4 : nullptr;
            CHECK(rows[lane] <= op.rows + op.rows_bytes);
        }
    }

    uint32_t* packed(int64_t output_number, int64_t unit, [[maybe_unused]] int64_t count) const {
        uint32_t* place = (uint32_t*)packed_block(output_number / block) + unit * block + output_number % block;
        CHECK((char*)place >= pack && (char*)(place + (count - 1) * block + LANES) <= pack + program.pack_bytes);
        return place;
    }

    struct Columns {         // where the weights of a vector of outputs come to lie, for each unit of inputs
        uint32_t* start;
        int64_t pitch, first = 0;  // the unit at the start
        uint32_t* of(int64_t unit) const { return start + (unit - first) * pitch; }
    };
    Columns columns_of(int64_t output_number) const { return {packed(output_number, 0, taps * in_units), block}; }

    // Of a vector of kept outputs, whose rows are all that is read; they come out as columns.
    void transpose(int64_t output_number, int64_t first, int64_t last, const Columns& target) const {
        Rows rows;
        find_rows(output_number, first, rows);
        const int64_t whole = (last - first) / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES) {
            for (int lane = 0; lane < LANES; ++lane) __builtin_prefetch(rows[lane] + (k + AHEAD * LANES) * 4, 0, 2);
            write_columns(rows, k, LANES, target, first + k);
        }
        for (int64_t k = whole; k < last - first; ++k)
            for (int lane = 0; lane < LANES; ++lane)
                target.of(first + k)[lane] = rows[lane] ? ((const uint32_t*)rows[lane])[k] : 0;
    }

    // The same of one kernel position, closed inputs squeezed out.
    void squeeze(int64_t output_number, int64_t tap, const Columns& target) const {
        alignas(64) typename Number::Channel squeezed[LANES][SQUEEZED + 2 * LANES];
        Rows rows, columns;
        find_rows(output_number, tap * weight_rows, rows);
        for (int lane = 0; lane < LANES; ++lane) columns[lane] = rows[lane] ? (const char*)squeezed[lane] : nullptr;
        int64_t start = 0;  // the kept input that `squeezed` begins with
        for (int64_t m = 0, last = 0; m < reads->num_moves; m = last) {
            int64_t end = start;
            for (; last < reads->num_moves; ++last) {
                const int64_t then = reads->moves[last].target + reads->moves[last].count;
                if (then - start > SQUEEZED) break;
                end = then;
            }
            for (int lane = 0; lane < LANES && rows[lane]; ++lane)
                for (int64_t n = m; n < last; ++n) {
                    const Move& move = reads->moves[n];
                    const char* source = rows[lane] + move.source * LANES * Number::SIZE;
                    CHECK(source + LANES * Number::SIZE <= op.rows + op.rows_bytes);
                    __builtin_prefetch(source + AHEAD * LANES * Number::SIZE, 0, 2);
                    Number::squeeze(source, move.bits, squeezed[lane] + (move.target - start));
                }
            const bool odd = (end - start) % Number::PAIR, ends = last == reads->num_moves;
            for (int lane = 0; lane < LANES && odd && ends; ++lane) squeezed[lane][end - start] = 0;
            const int64_t count = (end - start) / Number::PAIR + (odd && ends);
            const int64_t unit = tap * in_units + start / Number::PAIR;
            for (int64_t k = 0; k < count; k += LANES) write_columns(columns, k, std::min(LANES, count - k), target, unit + k);
            start += count * Number::PAIR;
            for (int lane = 0; lane < LANES && odd && !ends; ++lane) squeezed[lane][0] = squeezed[lane][count * Number::PAIR];
        }
    }

    // Sixteen units of sixteen rows as columns, of which `count` are written. Four times, vectors that are half of all
    // apart are zipped: rows then have become columns.
    static void write_columns(const Rows& rows, int64_t k, int64_t count, const Columns& target, int64_t unit) {
        Units units[LANES], mixed[LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane) units[lane] = rows[lane] ? *(const Units*)(rows[lane] + k * 4) : Units{};
#pragma GCC unroll 4
        for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
            for (int i = 0; i < LANES / 2; ++i) {
                const Units a = units[i], b = units[i + LANES / 2];
                mixed[2 * i] = __builtin_shuffle(a, b, Units{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
                mixed[2 * i + 1] = __builtin_shuffle(a, b, Units{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) units[i] = mixed[i];
        }
        if (count == LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) *(Units*)target.of(unit + i) = units[i];
        } else {
            for (int i = 0; i < count; ++i) *(Units*)target.of(unit + i) = units[i];
        }
    }

    // Of one block of outputs, all kept: rows of closed inputs are left out.
    void select(int64_t number, int64_t tap, int64_t first, int64_t last) const {
        const char* source = op.weight + (number * taps + tap) * weight_rows * block * 4;
        const int64_t bytes = round_up(std::min(block, out_count - number * block), LANES) * 4;
        uint32_t* target = packed(number * block, (at_once ? tap % op.kernel_width : tap) * in_units, last);
        CHECK(block == op.block);
        const auto row = [&](int64_t number) {
            const char* found = source + reads->index[number] / Number::PAIR * block * 4;
            CHECK(found >= op.weight && found + bytes <= op.weight + op.weight_bytes);
            return found;
        };
        for (int64_t k = first; k < last; ++k) {
            const int64_t later = std::min((k + AHEAD) * Number::PAIR, reads->count - 1), a = k * Number::PAIR;
            const char *from = row(a), *ahead = row(later);
            const char* other = Number::PAIR > 1 && a + 1 < reads->count ? row(a + 1) : nullptr;
            for (int64_t place = 0; place < bytes; place += 64) {
                __builtin_prefetch(ahead + place, 0, 2);
                Units units = *(const Units*)(from + place);
                if (Number::PAIR > 1) {
                    units = reads->index[a] % 2 ? units >> 16 : units & 0xffffu;
                    if (other) {
                        const Units second = *(const Units*)(other + place);
                        units |= reads->index[a + 1] % 2 ? second & 0xffff0000u : second << 16;
                    }
                }
                *(Units*)((char*)(target + k * block) + place) = units;
            }
        }
    }

    // --------------------------------------------------------------------------------------- convolution

    // Where a thread gathers at once: its blocks, and a share of the pixels of each block that is left over.
    int64_t run_items() const {
        return by_outputs ? team_size : at_once ? (blocks / team_size + blocks % team_size) * team_size : runs * blocks;
    }

    // Compute one block of outputs of a few pixels, those of all images counted through; or of all of them, if a thread
    // gathers the weights for it.
    void run(int64_t item) const {
        if (by_outputs) return run_own(item);
        if (at_once) {
            const int64_t each = blocks / team_size, items = each + blocks % team_size;
            const int64_t share = item / items, number = item % items, whole = each * team_size;
            const auto block_of = [&](int64_t i) { return i < each ? share * each + i : whole + i - each; };
            const bool is_shared = number >= each;
            const int64_t first = is_shared ? runs * share / team_size : 0;
            const int64_t last = is_shared ? runs * (share + 1) / team_size : runs;
            if (first == last) return;
            for (int64_t down = 0; down < op.kernel_height; ++down) {
                gather_row(block_of(number), down);
                const bool ends = down + 1 == op.kernel_height;
                const Rest rest = {down, down + 1, block_of(number + ends), ends ? 0 : down + 1};
                int64_t tiles = 0;
                for (int64_t r = first; r < last; ++r) run_block(block_of(number), pixels_of(r), rest, tiles);
            }
            return;
        }
        // Block by block, so that weights stay in the cache; or if inputs are larger, as many pixels at a time as stay
        // there with their inputs; or if all weights stay there, all blocks of some pixels, which lie together.
        int64_t together = runs;
        const int64_t weight_bytes = blocks * block_bytes();
        if (in_bytes() > weight_bytes) together = std::max<int64_t>(1, CACHED * runs / in_bytes());
        if (weight_bytes <= CACHED) together = 1;
        const int64_t first = item / (blocks * together) * together;
        const int64_t members = std::min(together, runs - first);
        int64_t tiles = 0;
        const int64_t run = first + (item - first * blocks) % members;
        run_block((item - first * blocks) / members, pixels_of(run), {0, op.kernel_height}, tiles);
    }

    // The outputs of a thread that has gathered their weights.
    void run_own(int64_t thread) const {
        int64_t tiles = 0;
        for (int64_t run = 0; run < runs; ++run) {
            const Span all = pixels_of(run), some = part_of(all, thread, team_size);
            const auto compute = [&](Span vectors, Span pixels) {
                each_block(vectors, [&](int64_t number, Span of_block) {
                    run_block(number, pixels, {0, op.kernel_height}, tiles, of_block);
                });
            };
            compute(own_vectors(thread), all);
            compute(shared_vectors(), some);
        }
    }

    Span pixels_of(int64_t run) const { return part_of({0, group.count * pixels}, run, runs); }

    struct Rest {
        int64_t first_row, last_row;            // of the kernel, whose products are added now
        int64_t next_block = -1, next_row = 0;  // what this thread probably gathers next; -1: nothing
    };

    struct Factors {          // of a block of outputs; gates of some images
        alignas(64) float bias[BLOCK], gates[RUN + 1][BLOCK];
    };

    void find_factors(int64_t number, int64_t first_image, int64_t last_image, Factors& found) const {
        const int64_t first = number * block, count = std::min(block, out_count - first);
        for (int64_t k = 0; k < count; ++k) found.bias[k] = op.bias[writes ? writes->index[first + k] : first + k];
        std::fill(found.bias + count, found.bias + BLOCK, 0.0f);
        CHECK(last_image - first_image <= RUN);
        for (int64_t i = first_image; writes && i <= last_image; ++i) {
            const float* all = program.gates + program.images[group.first + i] * program.layer_starts[program.num_layers] +
                               program.layer_starts[output.layer];
            float* gate = found.gates[i - first_image];
            for (int64_t k = 0; k < count; ++k) gate[k] = all[writes->index[first + k]];
            std::fill(gate + count, gate + BLOCK, 0.0f);
        }
    }

    // One block of outputs of some pixels, or some vectors of it. `tiles_done`: how many tiles have used the same weights
    // before.
    void run_block(int64_t number, Span of_pixels, const Rest& rest, int64_t& tiles_done,
                   Span of_vectors = {0, BLOCK / LANES}) const {
        if (!of_pixels.count) return;
        const int64_t begin = of_pixels.first, end = begin + of_pixels.count, first_image = begin / pixels;
        const int64_t count = std::min(block, out_count - number * block);
        const int64_t vectors = std::min(ceil_divide(count, LANES), of_vectors.first + of_vectors.count);

        Factors factors;
        find_factors(number, first_image, (end - 1) / pixels, factors);
        const char* weight = gathers ? packed_block(number) : op.weight + number * taps * weight_rows * block * 4;
        for (int64_t v = of_vectors.first; v < vectors; v += MAX_VECTORS) {
            const int64_t now = std::min<int64_t>(MAX_VECTORS, vectors - v);
            const int64_t tiles = ceil_divide(end - begin, MAX_PIXELS[now]);
            for (int64_t t = 0; t < tiles; ++t, ++tiles_done) {
                const int64_t from = begin + (end - begin) * t / tiles, to = begin + (end - begin) * (t + 1) / tiles;
                const int64_t channel = number * block + v * LANES;
                with_size(now, to - from, [&](auto vectors_now, auto pixels_now) {
                    const auto compute = whole_rows ? &Convolution::tile<vectors_now, pixels_now, true>
                                                    : &Convolution::tile<vectors_now, pixels_now, false>;
                    (this->*compute)(from, first_image, weight + v * LANES * 4, factors.bias + v * LANES,
                                     &factors.gates[0][v * LANES], channel, std::min(out_count - channel, now * LANES),
                                     rest, fetched(rest, tiles_done));
                });
            }
        }
        if (rest.last_row == op.kernel_height && of_vectors.first == 0) clear_pads(begin, end, number);
    }

    // What is fetched into the second-level cache while a tile is computed: for the unit k of the products two cache lines
    // of row `index[k & mask]`.
    struct Fetched {
        const char* base = zeros;
        const int32_t* index = (const int32_t*)zeros;
        int64_t row_bytes = 0, mask = 0, shift = 63;
        const char* of(int64_t k) const { return base + index[k & mask] * row_bytes + (k >> shift) * 128; }
    };

    // A part of the rows of a block that is gathered soon. So many tiles have fetched others.
    Fetched fetched(const Rest& rest, int64_t part) const {
        const int64_t number = rest.next_block, row_lines = op.kernel_width * weight_rows * 4 / 64;
        if (!at_once || number < 0 || number >= blocks) return {};
        if (by_rows) {
            const int64_t first = number * BLOCK, start = part * row_units() / BLOCK * 2;
            if (first + BLOCK > out_count || start >= row_lines) return {};
            return {op.rows + (rest.next_row * op.kernel_width * weight_rows * 4) + start * 64, writes->index + first,
                    taps * weight_rows * 4, BLOCK - 1, 6};
        }
        if (part >= BLOCK / LANES / 2 || taps > 1) return {};
        if (Number::PAIR > 1) return {};  // a row holds two inputs, of which one may be closed
        return {op.weight + (number * weight_rows * BLOCK + part * 2 * LANES) * 4, reads->index, BLOCK * 4, -1, 63};
    }

    // Calls `work` with the numbers of vectors and pixels as types, as it needs a register for each sum.
    template <int V = MAX_VECTORS, int P = 1, class Work>
    static void with_size(int64_t vectors, int64_t count, const Work& work) {
        if constexpr (V > 1) {
            if (vectors < V) return with_size<V - 1, 1>(vectors, count, work);
        }
        if constexpr (P < MAX_PIXELS[V]) {
            if (count > P) return with_size<V, P + 1>(vectors, count, work);
        }
        work(std::integral_constant<int, V>(), std::integral_constant<int, P>());
    }

    struct Pixel {
        int64_t top;          // input row of the first kernel position
        const char* base;     // its pixel there
        char* target;
        const char* added;
        const float* gate;
    };

    // P pixels by V vectors of outputs: sums stay in registers until they are written.
    template <int V, int P, bool WHOLE_ROWS>
    __attribute__((noinline)) void tile(int64_t from, int64_t first_image, const char* weight, const float* bias,
                                        const float* gates, int64_t channel, int64_t count, const Rest& rest,
                                        Fetched next) const {
        Pixel tile_pixels[P];
        locate(tile_pixels, P, from, first_image, gates, channel);
        for (int p = 0; p < P; ++p)  // what the end of the tile needs comes while products are made
            for (int64_t place = 0; place < count * Number::SIZE; place += 64) {
                __builtin_prefetch(tile_pixels[p].target + place, 1);
                if (residual) __builtin_prefetch(tile_pixels[p].added + place);
            }
        Vector sums[P][V];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[p][v] = rest.first_row ? *summed(from + p, channel, v) : Vector{};
        const int64_t row_bytes = (input.width + input.pad) * in_pitch * op.dilation_height;
        const int64_t tap_bytes = (gathers ? in_units : weight_rows) * block * 4;
        for (int64_t down = rest.first_row; down < rest.last_row; ++down, weight += tap_bytes * op.kernel_width) {
            bool inside[P], any = false;
            for (int p = 0; p < P; ++p) {
                inside[p] = (uint64_t)(tile_pixels[p].top + down * op.dilation_height) < (uint64_t)input.height;
                any |= inside[p];
            }
            if (!any) continue;
            for (int64_t across = 0; across < (WHOLE_ROWS ? 1 : op.kernel_width); ++across) {
                const int64_t units = WHOLE_ROWS ? op.kernel_width * in_units : in_units;
                const int64_t shift = down * row_bytes + across * op.dilation_width * in_pitch;
                const uint32_t* x[P];
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p) {
                    x[p] = (const uint32_t*)(inside[p] ? tile_pixels[p].base + shift : zeros);
                    CHECK(!inside[p] || (const char*)x[p] >= input.data);
                    CHECK(!inside[p] || (const char*)(x[p] + units) <= input.data + program.batch * input.image_bytes);
                }
                const char* row = weight + across * tap_bytes;
                if (!WHOLE_ROWS && picks)
                    add_products<V, P, true>(sums, x, row, units, next);
                else
                    add_products<V, P, false>(sums, x, row, units, next);
            }
        }
        const bool ends = rest.last_row == op.kernel_height;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            if (ends) {
                finish<V>(sums[p], bias, tile_pixels[p], count);
                continue;
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) *summed(from + p, channel, v) = sums[p][v];
        }
    }

    // Where sums of a pixel wait for the next kernel row.
    Vector* summed(int64_t pixel, int64_t channel, int64_t v) const {
        Vector* place = (Vector*)scratch + (pixel * BLOCK + channel % BLOCK) / LANES + v;
        CHECK((char*)(place + 1) <= scratch + program.scratch_bytes);
        return place;
    }

    // Products of `units` neighbouring inputs of each pixel, whose weights lie in rows of a block, with some left out or not.
    template <int V, int P, bool PICKS>
    __attribute__((always_inline)) void add_products(Vector (&sums)[P][V], const uint32_t* const (&x)[P],
                                                     const char* weight, int64_t units,
                                                     const Fetched& next) const {
        const int32_t* index = PICKS ? reads->index : nullptr;
        const int64_t row_bytes = block * 4;
        for (int64_t k = 0; k < units; ++k) {
            const char* row = weight + (PICKS ? index[k] : k) * row_bytes;
            CHECK(gathers || (row >= op.weight && row + V * LANES * 4 <= op.weight + op.weight_bytes));
            CHECK(!gathers || (row >= pack && row + V * LANES * 4 <= pack + program.pack_bytes));
            if (PICKS) {  // no processor guesses which rows come next
                const char* later = weight + index[std::min(k + AHEAD, units - 1)] * row_bytes;
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) __builtin_prefetch(later + v * LANES * 4);
            }
            const char* soon = next.of(k);
            __builtin_prefetch(soon, 0, 2);  // in a function of its own GCC would leave it out
            __builtin_prefetch(soon + 64, 0, 2);
            Units w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) w[v] = *(const Units*)(row + v * LANES * 4);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                const uint32_t value = x[p][k];
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sums[p][v] = Number::add_product(sums[p][v], value, w[v]);
            }
        }
    }

    // Where the pixels of a tile read and write.
    void locate(Pixel* found, int count, int64_t from, int64_t first_image, const float* gates, int64_t channel) const {
        int64_t turn = from / pixels, pixel = from - turn * pixels;
        int64_t row = pixel / output.width, column = pixel - row * output.width;
        for (int p = 0; p < count; ++p) {
            const int64_t image = program.images[group.first + turn];
            const int64_t top = row * op.stride_height - op.pad_height, left = column * op.stride_width - op.pad_width;
            found[p].top = top;
            found[p].base = input.data + image * input.image_bytes + input.pixel(top, left) * in_pitch;
            found[p].target = at(output, image, row, column, channel);
            found[p].added = residual ? at(*residual, image, row, column, channel) : nullptr;
            found[p].gate = gates + (turn - first_image) * BLOCK;
            if (++column < output.width) continue;
            column = 0;
            if (++row < output.height) continue;
            row = 0;
            ++turn;
        }
    }

    char* at(const Value& value, int64_t image, int64_t row, int64_t column, int64_t channel) const {
        const int64_t place = image * value.image_bytes + value.pixel(row, column) * out_pitch + channel * Number::SIZE;
        CHECK(place >= 0 && place < program.batch * value.image_bytes);
        return value.data + place;
    }

    // Zeros around the rows that end among these pixels, and before the first row of an image; of one block.
    void clear_pads(int64_t begin, int64_t end, int64_t number) const {
        const int64_t first = number * block, bytes = std::min(block * Number::SIZE, out_pitch - first * Number::SIZE);
        for (int64_t i = begin / output.width; output.pad && i < end / output.width; ++i) {
            const int64_t image = program.images[group.first + i / output.height], row = i % output.height;
            for (int64_t p = 0; p < output.pad; ++p) {
                std::memset(at(output, image, row, output.width + p, first), 0, bytes);
                if (row == 0) std::memset(at(output, image, 0, p - output.pad, first), 0, bytes);
            }
        }
    }

    // Bias, residual sum, activation, gate.
    template <int V>
    __attribute__((always_inline)) void finish(const Vector (&sums)[V], const float* bias, const Pixel& pixel,
                                               int64_t count) const {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Vector value = sums[v] + *(const Vector*)(bias + v * LANES);
            const int64_t lanes = std::min(LANES, count - v * LANES);
            const int64_t place = v * LANES * Number::SIZE;
            char* target = pixel.target + place;
            const char* added = pixel.added + place;
            if (residual) value += read_some<Number>(added, lanes);
            value = activated(value, op.activation);
            if (writes && op.activation) value *= *(const Vector*)(pixel.gate + v * LANES);
            write_some<Number>(target, value, lanes);
            if (Number::PAIR > 1 && lanes % 2) Number::write(target + lanes * Number::SIZE, 0.0f);
        }
    }
};
