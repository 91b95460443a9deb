// What Python fills in, the same fields with 64 bits each as in `layout.py`, and the vectors that all is computed with.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

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

// Python knows the first of these sizes too, and defines them: see `layout.py`.
constexpr int64_t LANES = DEEPMOE_LANES;   // outputs in a vector
constexpr int64_t BLOCK = DEEPMOE_BLOCK;   // outputs whose weights lie together, at most
constexpr int64_t RUN = 56;            // output pixels that a thread takes at a time, at most
constexpr int64_t SHORT_RUN = 16;      // the same where there is too little to do for all threads otherwise
constexpr int64_t CACHED = 1 << 18;    // bytes of inputs that stay in the second-level cache
constexpr int64_t TILES = DEEPMOE_TILES;   // the same in tiles of `Winograd`
constexpr int64_t SHORT_TILES = 7;
constexpr int64_t SUMMED = DEEPMOE_SUMMED;  // pixels whose sums wait in memory, at most
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

alignas(64) static const char zeros[4 * DEEPMOE_MAX_INPUTS] = {};  // a pixel beyond the border

// Vectors may begin at any number, so only a read between two numbers is misaligned; `make sanitize` reports those.
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Units __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

struct Value {
    char* data;           // (image, pixel, channel)
    int64_t image_bytes;  // from one image to the next
    int64_t height, width, channels;
    int64_t layer;        // gated layer whose kept experts it holds; -1: all channels
    int64_t pad;          // pixels of zeros before the first row and behind each, for kernels that reach beyond

    int64_t pixel(int64_t row, int64_t column) const { return pad + row * (width + pad) + column; }

    // Writes the zeros behind a row of an image, and those before the first one.
    void clear_pads(char* image, int64_t row, int64_t pitch) const {
        if (row == 0) std::memset(image, 0, pad * pitch);
        std::memset(image + pixel(row, width) * pitch, 0, pad * pitch);
    }
};

enum Kind : int64_t { CONVOLVE, POOL, LOAD, WIDEN, SCALE, DEPTHWISE, NORMS, RESPOND, AVERAGE, SOFTMAX };
enum Activation : int64_t { NONE, RELU, GELU };

struct Operation {
    int64_t kind;
    int64_t input, output, residual;  // values; residual -1: none; of RESPOND the norms
    int64_t kernel_height, kernel_width, pad_height, pad_width;
    int64_t stride_height, stride_width, dilation_height, dilation_width;
    int64_t image_channels;  // of LOAD
    int64_t activation;
    int64_t tile;            // of CONVOLVE: outputs of a tile of `Winograd` along each side; 0: each product is computed
    int64_t block;           // of CONVOLVE: outputs whose weights lie together in `weight`
    const float* bias;
    const char* weight;   // (block, kernel position, input, output), inputs in units; zeros behind the last output. Of
    int64_t weight_bytes; // gated outputs, null as long as no group of images keeps all. Of DEPTHWISE (kernel position,
                          // channel), float32, whole vectors, null: only a norm. Of RESPOND weights, biases and epsilon
    const char* rows;     // of gated outputs: (output, kernel position, input). Of DEPTHWISE weights, biases and epsilon
                          // of the norm, whole vectors, null: no norm
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
    char* lists;           // memory for what `Kepts` makes of their gates
    int64_t lists_bytes;
};

struct alignas(64) Line {  // a number alone in its cache line, so that whoever waits for it disturbs nobody else
    std::atomic<int64_t> number;
};

enum Whole : int64_t { ABSENT, ASKED_FOR, PRESENT };

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
    const int64_t* most_kept;     // experts of each layer: a group that keeps more runs with all of them
    std::atomic<int64_t>* whole;  // of each layer, whether the weights for all experts are there
    const float* gates;           // (image, expert)
    int64_t has_lists;            // the lists of groups are those of these gates
    const char* source;           // images, any strides, counted in elements
    int64_t source_strides[4];
    char* rooms;                  // of the threads: see `room_bytes`
    int64_t room_bytes;
    int64_t pack_bytes;           // the largest gathered weight
    char* scratch;                // of the threads: see `scratch_bytes`
    int64_t scratch_bytes;        // what `Winograd` keeps of a run of tiles, at most
    int64_t num_threads;
    int64_t is_bfloat16;
    int (*thread_number)();
    int (*thread_count)();        // OpenMP may give fewer threads than it was asked for
    Line* lines;                          // of the team: arrivals and rounds of its barrier, then tickets of each thread
    std::atomic<int64_t> lacks;           // nothing ran: weights for all experts of a layer are not there
};
