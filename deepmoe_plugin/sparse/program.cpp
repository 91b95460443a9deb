// A sparse network as one native program; `program.py` describes it and calls it.
//
// A program is a table of operations on values, which are activations of all images of a batch, channels last. A value
// that a gate writes holds, of each image, only the channels that the image keeps. Several threads run the program
// together. They meet only where one needs what another wrote.
//
// All numbers that products are made of are units of 32 bits: one channel in float32, two neighbours in bfloat16. Plain
// vector types of GCC and Clang are used, so that the code runs wherever they do; AVX-512 has shorter ways here and
// there. One file, so that one call of a compiler builds it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif
#include <sched.h>

#ifdef CHECKED
// Every address is compared with the memory that it must lie in. Tests run so.
#define CHECK(condition)                                                                  \
    if (!(condition)) {                                                                   \
        std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
        std::abort();                                                                     \
    }
#else
#define CHECK(condition)
#endif

constexpr int64_t LANES = 16;          // outputs in a vector
constexpr int64_t BLOCK = 64;          // outputs whose weights lie together
constexpr int64_t RUN = 56;            // output pixels that a thread takes at a time, at most
constexpr int64_t SHORT_RUN = 16;      // the same where there is too little to do for all threads otherwise
constexpr int64_t CACHED = 1 << 18;    // bytes of inputs that stay in the second-level cache
constexpr int64_t GATHERED = 512;      // inputs whose weights a thread gathers at a time
constexpr int64_t SQUEEZED = 256;      // inputs that are squeezed before they are transposed: what the first-level cache holds
constexpr int64_t MANY_PIXELS = 32;    // from which on gathering pays where only inputs are left out
constexpr int64_t AHEAD = 16;          // rows, or vectors, between what is gathered and what is fetched
#ifdef __AVX512F__
constexpr int MAX_VECTORS = 4;         // vectors of outputs in a tile
constexpr int MAX_PIXELS[] = {0, 8, 8, 8, 7};  // pixels in a tile of so many vectors: what the registers hold
#else
constexpr int MAX_VECTORS = 1;
constexpr int MAX_PIXELS[] = {0, 6};
#endif

alignas(64) static const char zeros[65536] = {};  // a pixel beyond the border

typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Units __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

// ---------------------------------------------------------------- what Python fills in; the same fields, all 64 bits

struct Value {
    char* data;           // (image, pixel, channel)
    int64_t image_bytes;  // from one image to the next
    int64_t height, width, channels;
    int64_t layer;        // gated layer whose kept experts it holds; -1: all channels
    int64_t pad;          // pixels of zeros before the first row and behind each, for kernels that reach beyond

    int64_t pixel(int64_t row, int64_t column) const { return pad + row * (width + pad) + column; }
};

enum Kind : int64_t { CONVOLVE, POOL, LOAD, WIDEN, SCALE };
enum Activation : int64_t { NONE, RELU, GELU };

struct Operation {
    int64_t kind;
    int64_t input, output, residual;  // values; residual -1: none
    int64_t kernel_height, kernel_width, pad_height, pad_width;
    int64_t stride_height, stride_width, dilation_height, dilation_width;
    int64_t image_channels;  // of LOAD
    int64_t activation;
    const float* bias;
    const char* weight;   // (block, kernel position, input, BLOCK), inputs in units; zeros behind the last output. Of
    int64_t weight_bytes; // gated outputs, null as long as no group of images keeps all
    const char* rows;     // of gated outputs: (output, kernel position, input)
    int64_t rows_bytes;
};

struct Part {             // consecutive operations that groups of images run through without meeting each other
    int64_t first, last;  // operations
    int64_t num_groups, first_group;
    int64_t group_major;  // each group runs through all operations before the next; otherwise operation by operation
};

struct Group {
    int64_t first, count;  // of `images`
    int64_t first_layer, num_layers;  // gated layers of its part
    const uint8_t* masks;  // for each expert of these layers, whether it is kept
    char* lists;           // memory for what `Kepts` makes of that
    int64_t lists_bytes;
};

struct Program {
    Value* values;
    const Operation* operations;
    const Part* parts;
    int64_t num_parts;
    const Group* groups;
    int64_t num_groups;
    const int64_t* images;
    int64_t batch;
    const int64_t* layer_starts;  // first expert of each layer, and the number of all
    int64_t num_layers;
    const float* gates;           // (image, expert)
    const char* source;           // images, any strides, counted in elements
    int64_t source_strides[4];
    char* rooms;                  // of the threads: see `room_bytes`
    int64_t room_bytes;
    int64_t pack_bytes;           // the largest gathered weight
    int64_t num_threads;
    int64_t is_bfloat16;
    int (*thread_number)();
    int (*thread_count)();        // OpenMP may give fewer threads than it was asked for
    std::atomic<int64_t> arrived, round;  // barrier of all threads
    std::atomic<int64_t> tickets[4];
};

// ---------------------------------------------------------------------------------------------- kept channels

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

// ------------------------------------------------------------------------------------------------- threads

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

// --------------------------------------------------------------------------------------------- number types

struct Float {
    static constexpr int64_t SIZE = 4, PAIR = 1;
    typedef uint32_t Channel;

    // Chosen ones of sixteen neighbouring channels, side by side; what is written behind them means nothing.
    static void squeeze(const char* source, unsigned bits, Channel* target) {
#ifdef __AVX512F__
        // In a register, then as a whole: compaction into memory is very slow on some processors (Zen 4).
        _mm512_storeu_si512(target, _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_loadu_si512(source)));
#else
        for (; bits; bits &= bits - 1) *target++ = ((const Channel*)source)[__builtin_ctz(bits)];
#endif
    }
    static Vector add_product(Vector sum, uint32_t x, Units weight) {
        float value;
        std::memcpy(&value, &x, 4);
        return sum + value * (Vector)weight;
    }
    static float read(const char* place) { return *(const float*)place; }
    static void write(char* place, float value) { *(float*)place = value; }
    static Vector read_vector(const char* place) { return *(const Vector*)place; }
    static void write_vector(char* place, Vector value) { *(Vector*)place = value; }
};

struct Bfloat16 {
    static constexpr int64_t SIZE = 2, PAIR = 2;
    typedef uint16_t Channel;

    static void squeeze(const char* source, unsigned bits, Channel* target) {
#if defined(__AVX512VBMI2__) && defined(__AVX512VL__)
        const __m256i all = _mm256_loadu_si256((const __m256i*)source);
        _mm256_storeu_si256((__m256i*)target, _mm256_maskz_compress_epi16((__mmask16)bits, all));
#else
        for (; bits; bits &= bits - 1) *target++ = ((const Channel*)source)[__builtin_ctz(bits)];
#endif
    }
    static Vector add_product(Vector sum, uint32_t x, Units weight) {
#ifdef __AVX512BF16__
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)weight);
#else
        const Units both = Units{} + x;
        sum += (Vector)(both << 16) * (Vector)(weight << 16);
        return sum + (Vector)(both & 0xffff0000u) * (Vector)(weight & 0xffff0000u);
#endif
    }
    static float read(const char* place) {
        const uint32_t bits = (uint32_t)*(const uint16_t*)place << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static void write(char* place, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = value != value ? 0x7fc00000u : bits + 0x7fff + (bits >> 16 & 1);
        *(uint16_t*)place = (uint16_t)(bits >> 16);
    }
    static Vector read_vector(const char* place) {
        return (Vector)(__builtin_convertvector(*(const Halves*)place, Units) << 16);
    }
    static void write_vector(char* place, Vector value) {  // to the nearest, even if there are two
        const Units bits = (Units)value, is_number = (Units)(value == value);
        const Units rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        *(Halves*)place = __builtin_convertvector(((rounded & is_number) | (0x7fc00000u & ~is_number)) >> 16, Halves);
    }
};

// Some lanes of a vector; the others are zero.
template <class Number>
static Vector read_some(const char* place, int64_t lanes) {
    if (lanes == LANES) return Number::read_vector(place);
    Vector value = {};
    for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = Number::read(place + lane * Number::SIZE);
    return value;
}

template <class Number>
static void write_some(char* place, Vector value, int64_t lanes) {
    if (lanes == LANES) return Number::write_vector(place, value);
    for (int64_t lane = 0; lane < lanes; ++lane) Number::write(place + lane * Number::SIZE, value[lane]);
}

// ------------------------------------------------------------------------------------------------ activations

// erf(x) = x P(x^2) / Q(x^2) up to 4, where it is 1 to float rounding. The coefficients are a fit of least relative error,
// 6e-8, by repeated least squares.
static Vector erf_of(Vector x) {
    const Vector limit = Vector{} + 4.0f;
    x = x > limit ? limit : x < -limit ? -limit : x;
    const Vector t = x * x;
    Vector p = t * 1.911083736e-08f - 1.942233666e-06f;
    p = p * t + 1.472715958e-04f;
    p = p * t + 3.990012221e-03f;
    p = p * t + 5.152317882e-02f;
    p = p * t + 2.071125656e-01f;
    p = p * t + 1.128379107f;
    Vector q = t * 1.020971686e-03f + 1.495696232e-02f;
    q = q * t + 1.179654747e-01f;
    q = q * t + 5.168799758e-01f;
    q = q * t + 1.0f;
    return x * p / q;
}

static Vector activated(Vector x, int64_t activation) {
    if (activation == RELU) return x < 0.0f ? Vector{} : x;
    if (activation == GELU) return x * 0.5f * (erf_of(x * 0.70710678f) + 1.0f);
    return x;
}

// ---------------------------------------------------------------------------------- convolution of one group

template <class Number>
struct Convolution {
    const Program& program;
    const Operation& op;
    const Value &input, &output;
    const Group& group;
    const Kept *reads, *writes;      // null: all
    char* pack;
    const Value* residual;
    int64_t taps, in_units, out_count, in_pitch, out_pitch, pixels, runs, blocks, weight_rows;
    bool gathers, picks, by_rows;
    bool whole_rows;                 // kernel positions side by side are one run, of weights and of inputs

    Convolution(const Program& program, const Operation& op, int64_t group_number, char* pack, int64_t team_size)
        : program(program), op(op), input(program.values[op.input]), output(program.values[op.output]),
          group(program.groups[group_number]), pack(pack) {
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
        weight_rows = ceil_divide(input.channels, Number::PAIR);
        pixels = output.height * output.width;
        blocks = ceil_divide(out_count, BLOCK);
        runs = runs_for(team_size);
        const bool some_in = reads && reads->count < input.channels;
        const bool pays = Number::PAIR > 1 || group.count * pixels >= MANY_PIXELS;
        by_rows = writes && writes->count < output.channels;
        gathers = by_rows || (some_in && pays);
        CHECK(by_rows ? op.rows : op.weight);
        picks = some_in && !gathers;
        whole_rows = !picks && op.dilation_width == 1;
        CHECK(op.kernel_width * in_units * 4 <= (int64_t)sizeof(zeros));
        CHECK(op.pad_width <= input.pad);
    }

    // Few enough pixels at a time that all threads have about the same to do.
    int64_t runs_for(int64_t team_size) const {
        const int64_t all = group.count * pixels, least = ceil_divide(all, RUN);
        if (team_size == 1 || least * blocks >= 8 * team_size) return least;
        const int64_t most = std::max(least, all / SHORT_RUN);
        return std::min(most, round_up(std::max(least, ceil_divide(2 * team_size, blocks)), team_size));
    }

    // ------------------------------------------------------------------------------------------- gather

    // All kernel positions are one row of inputs where no input is left out.
    bool squeezes() const { return reads && reads->count < input.channels; }
    int64_t parts() const { return ceil_divide(by_rows ? taps * in_units : in_units, GATHERED); }
    int64_t pack_items() const {
        if (!gathers) return 0;
        return by_rows ? ceil_divide(out_count, LANES) * (squeezes() ? taps : parts()) : blocks * taps * parts();
    }

    // Write the weights of kept inputs and outputs: of some outputs, kernel positions and inputs.
    void gather(int64_t item) const {
        if (by_rows && squeezes()) return squeeze(item / taps * LANES, item % taps);
        const int64_t part = item % parts(), turn = item / parts(), first = part * GATHERED;
        if (by_rows) return transpose(turn * LANES, first, std::min(first + GATHERED, taps * in_units));
        select(turn / taps, turn % taps, first, std::min(first + GATHERED, in_units));
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

    uint32_t* packed(int64_t output_number, int64_t unit, int64_t count) const {
        const int64_t place = (output_number / BLOCK * taps * in_units + unit) * BLOCK + output_number % BLOCK;
        CHECK(place >= 0 && (place + (count - 1) * BLOCK + LANES) * 4 <= program.pack_bytes);
        return (uint32_t*)pack + place;
    }

    // Of a vector of kept outputs, whose rows are all that is read; they come out as columns.
    void transpose(int64_t output_number, int64_t first, int64_t last) const {
        Rows rows;
        find_rows(output_number, first, rows);
        uint32_t* target = packed(output_number, first, last - first);
        const int64_t whole = (last - first) / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES) {
            for (int lane = 0; lane < LANES; ++lane) __builtin_prefetch(rows[lane] + (k + AHEAD * LANES) * 4, 0, 2);
            write_columns(rows, k, LANES, target);
        }
        for (int64_t k = whole; k < last - first; ++k)
            for (int lane = 0; lane < LANES; ++lane)
                target[k * BLOCK + lane] = rows[lane] ? ((const uint32_t*)rows[lane])[k] : 0;
    }

    // The same of one kernel position, closed inputs squeezed out.
    void squeeze(int64_t output_number, int64_t tap) const {
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
            uint32_t* target = packed(output_number, tap * in_units + start / Number::PAIR, count);
            for (int64_t k = 0; k < count; k += LANES) write_columns(columns, k, std::min(LANES, count - k), target);
            start += count * Number::PAIR;
            for (int lane = 0; lane < LANES && odd && !ends; ++lane) squeezed[lane][0] = squeezed[lane][count * Number::PAIR];
        }
    }

    // Sixteen units of sixteen rows as columns, of which `count` are written. Four times, vectors that are half of all
    // apart are zipped: rows then have become columns.
    static void write_columns(const Rows& rows, int64_t k, int64_t count, uint32_t* target) {
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
            for (int i = 0; i < LANES; ++i) *(Units*)(target + (k + i) * BLOCK) = units[i];
        } else {
            for (int i = 0; i < count; ++i) *(Units*)(target + (k + i) * BLOCK) = units[i];
        }
    }

    // Of one block of outputs, all kept: rows of closed inputs are left out.
    void select(int64_t block, int64_t tap, int64_t first, int64_t last) const {
        const char* source = op.weight + (block * taps + tap) * weight_rows * BLOCK * 4;
        const int64_t bytes = round_up(std::min(BLOCK, out_count - block * BLOCK), LANES) * 4;
        uint32_t* target = packed(block * BLOCK, tap * in_units, last);
        const auto row = [&](int64_t number) {
            const char* found = source + reads->index[number] / Number::PAIR * BLOCK * 4;
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
                *(Units*)((char*)(target + k * BLOCK) + place) = units;
            }
        }
    }

    // --------------------------------------------------------------------------------------- convolution

    int64_t run_items() const { return runs * blocks; }

    // Compute one block of outputs of a few pixels, those of all images counted through.
    void run(int64_t item) const {
        // Block by block, so that weights stay in the cache; or if inputs are larger, as many pixels at a time as stay
        // there with their inputs; or if all weights stay there, all blocks of some pixels, which lie together.
        int64_t together = runs;
        const int64_t in_bytes = group.count * input.height * input.width * in_pitch;
        const int64_t weight_bytes = blocks * BLOCK * taps * in_units * 4;
        if (in_bytes > weight_bytes) together = std::max<int64_t>(1, CACHED * runs / in_bytes);
        if (weight_bytes <= CACHED) together = 1;
        const int64_t first = item / (blocks * together) * together;
        const int64_t members = std::min(together, runs - first);
        const int64_t block = (item - first * blocks) / members;
        const int64_t run = first + (item - first * blocks) % members;
        const int64_t all = group.count * pixels, begin = all * run / runs, end = all * (run + 1) / runs;
        const int64_t first_image = begin / pixels;
        const int64_t count = std::min(BLOCK, out_count - block * BLOCK);
        const int64_t vectors = ceil_divide(count, LANES);

        alignas(64) float bias[BLOCK] = {}, gates[RUN + 1][BLOCK];
        for (int64_t k = 0; k < count; ++k)
            bias[k] = op.bias[writes ? writes->index[block * BLOCK + k] : block * BLOCK + k];
        for (int64_t i = first_image; writes && i <= (end - 1) / pixels; ++i) {
            const float* all = program.gates + program.images[group.first + i] * program.layer_starts[program.num_layers] +
                               program.layer_starts[output.layer];
            float* gate = gates[i - first_image];
            for (int64_t k = 0; k < count; ++k) gate[k] = all[writes->index[block * BLOCK + k]];
            std::fill(gate + count, gate + BLOCK, 0.0f);
        }
        const char* weight = (gathers ? pack : op.weight) + block * taps * (gathers ? in_units : weight_rows) * BLOCK * 4;
        for (int64_t v = 0; v < vectors; v += MAX_VECTORS) {
            const int64_t now = std::min<int64_t>(MAX_VECTORS, vectors - v);
            const int64_t tiles = ceil_divide(end - begin, MAX_PIXELS[now]);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t from = begin + (end - begin) * t / tiles, to = begin + (end - begin) * (t + 1) / tiles;
                const int64_t channel = block * BLOCK + v * LANES;
                dispatch<MAX_VECTORS, 1>(now, to - from, from, first_image, weight + v * LANES * 4, bias + v * LANES,
                                         &gates[0][v * LANES], channel, std::min(out_count - channel, now * LANES));
            }
        }
        clear_pads(begin, end, block);
    }

    template <int V, int P, class... Args>
    void dispatch(int64_t vectors, int64_t count, Args... args) const {
        if constexpr (V > 1) {
            if (vectors < V) return dispatch<V - 1, 1>(vectors, count, args...);
        }
        if constexpr (P < MAX_PIXELS[V]) {
            if (count > P) return dispatch<V, P + 1>(vectors, count, args...);
        }
        if (whole_rows) return tile<V, P, true>(args...);
        tile<V, P, false>(args...);
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
                                        const float* gates, int64_t channel, int64_t count) const {
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
            for (int v = 0; v < V; ++v) sums[p][v] = Vector{};
        const int64_t row_bytes = (input.width + input.pad) * in_pitch * op.dilation_height;
        const int64_t tap_bytes = (gathers ? in_units : weight_rows) * BLOCK * 4;
        for (int64_t down = 0; down < op.kernel_height; ++down, weight += tap_bytes * op.kernel_width) {
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
                    add_products<V, P, true>(sums, x, row, units);
                else
                    add_products<V, P, false>(sums, x, row, units);
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) finish<V>(sums[p], bias, tile_pixels[p], count);
    }

    // Products of `units` neighbouring inputs of each pixel, whose weights lie in rows of a block, with some left out or not.
    template <int V, int P, bool PICKS>
    __attribute__((always_inline)) void add_products(Vector (&sums)[P][V], const uint32_t* const (&x)[P],
                                                     const char* weight, int64_t units) const {
        const int32_t* index = PICKS ? reads->index : nullptr;
        for (int64_t k = 0; k < units; ++k) {
            const char* row = weight + (PICKS ? index[k] : k) * BLOCK * 4;
            CHECK(gathers || (row >= op.weight && row + V * LANES * 4 <= op.weight + op.weight_bytes));
            CHECK(!gathers || (row >= pack && row + V * LANES * 4 <= pack + program.pack_bytes));
            if (PICKS) {  // no processor guesses which rows come next
                const char* later = weight + index[std::min(k + AHEAD, units - 1)] * BLOCK * 4;
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) __builtin_prefetch(later + v * LANES * 4);
            }
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
        return value.data + image * value.image_bytes + value.pixel(row, column) * out_pitch + channel * Number::SIZE;
    }

    // Zeros around the rows that end among these pixels, and before the first row of an image; of one block.
    void clear_pads(int64_t begin, int64_t end, int64_t block) const {
        const int64_t bytes = std::min(BLOCK * Number::SIZE, out_pitch - block * BLOCK * Number::SIZE);
        for (int64_t i = begin / output.width; output.pad && i < end / output.width; ++i) {
            const int64_t image = program.images[group.first + i / output.height], row = i % output.height;
            for (int64_t p = 0; p < output.pad; ++p) {
                std::memset(at(output, image, row, output.width + p, block * BLOCK), 0, bytes);
                if (row == 0) std::memset(at(output, image, 0, p - output.pad, block * BLOCK), 0, bytes);
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

// --------------------------------------------------------------------------------------- other operations

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
        if (row == 0) std::memset(to - output.pad * out_pitch, 0, output.pad * out_pitch);
        std::memset(to + output.width * out_pitch, 0, output.pad * out_pitch);
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

// -------------------------------------------------------------------------------------------------- program

// One operation for one group; the team gathers the weights of the next one with what is left of its time.
template <class Number>
static void step(Team& team, const Operation& op, int64_t group, const Operation* next, int64_t next_group, int64_t number) {
    char* pack = team.pack[number % 2];
    char* next_pack = team.pack[(number + 1) % 2];
    std::optional<Convolution<Number>> following;
    if (next && next->kind == CONVOLVE && team.size > 1) following.emplace(team.program, *next, next_group, next_pack, team.size);
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
        const Convolution<Number> convolution(team.program, op, group, pack, team.size);
        if (team.size == 1)
            for (int64_t item = 0; item < convolution.pack_items(); ++item) convolution.gather(item);
        together(convolution.run_items(), convolution);
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
            const Convolution<Number> convolution(program, *op, group, team.pack[0], team.size);
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
