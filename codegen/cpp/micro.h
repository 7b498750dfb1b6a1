// Micro-kernels on vectors of W floats, written once for every instruction set (GCC and Clang vector extensions).
// A block of MR query rows meets a tile of KB keys: scores in registers, online softmax, weights times values.

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef float AnyFloats __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef int32_t AnyInts __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

constexpr int W = VECTOR_BYTES / 4;       // floats in a vector
constexpr int KV = KB / W;                // vectors in a row of scores
constexpr int NRW = NR * W;               // columns of a register block
constexpr int DVV = (DV + W - 1) / W;     // vectors in a row of values, padded with zeros
constexpr int DVP = DVV * W;
constexpr int PAIR = PACKED_BF16 ? 2 : 1; // elements that one 32-bit lane of a packed operand holds
constexpr int DK = (D + PAIR - 1) / PAIR; // steps of the q.k product
constexpr int KS = KB / PAIR;             // steps of the weights-times-values product
constexpr int HALVES = IO_BF16 || IO_FP16 ? 2 : 1; // elements of a tensor in a 32-bit lane
constexpr int64_t K_TILE = (int64_t)DK * KB, V_TILE = (int64_t)KS * DVP; // in 32-bit lanes
constexpr float NOTHING = -3e38f;         // below every score that a key can have, and finite
constexpr float LOG2E = 1.44269504f;
constexpr float SLACK = SKIPS ? 1.0f : 8.0f; // a row's reference lags its largest score by at most so many powers of 2

static inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline uint16_t bf16_of(float f) {
    uint32_t u = float_bits(f);
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// 2**x for x <= SLACK or so; exactly 0 from -127 downwards, so a masked score (-inf) weighs nothing; NaN stays NaN.
static inline __attribute__((always_inline)) Floats exp2_of(Floats x) {
    const Floats low = Floats{} - 127.0f, magic = Floats{} + 12583039.0f; // 1.5 * 2**23 + 127
    x = low > x ? low : x;
    Floats n = x + magic, f = x - (n - magic), p = Floats{} + EXP2[EXP2_DEGREE];
#pragma GCC unroll 8
    for (int i = EXP2_DEGREE - 1; i >= 0; i--) p = p * f + EXP2[i];
    return p * (Floats)((Ints)n << 23);
}

static inline float exp2_of(float x) { return exp2_of(Floats{} + x)[0]; }

// tanh to about a unit in the last place: an odd polynomial near 0, else by way of 2**x.
static inline Floats tanh_of(Floats x) {
    Floats y = x * x, size = x < 0.0f ? -x : x, power = exp2_of(size * -2.88539008f);
    Floats p = y * -6.274239141526389e-3f + 2.1071678786247515e-2f;
    p = p * y - 5.3852309843239826e-2f;
    p = p * y + 1.333258613779597e-1f;
    p = p * y - 3.333331755964682e-1f;
    Floats far = (1.0f - power) / (1.0f + power);
    return size < 0.55f ? x * y * p + x : x < 0.0f ? -far : far;
}

// acc += the products of packed operands: one float, or a pair of bf16, in each 32-bit lane.
static inline __attribute__((always_inline)) void dot(Floats& acc, Floats lanes, Floats others) {
#if PACKED_BF16 && defined __AVX512BF16__
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(lanes), "v"(others));
#elif PACKED_BF16 // the same in two products, so that any machine can check what is laid out in pairs
    Ints a = (Ints)lanes, b = (Ints)others;
    acc += (Floats)(a & ~0xffff) * (Floats)(b & ~0xffff) + (Floats)(a << 16) * (Floats)(b << 16);
#else
    acc += lanes * others;
#endif
}

// The same of one operand in all lanes.
static inline __attribute__((always_inline)) void dot(Floats& acc, Floats lanes, const float* one) {
#if PACKED_BF16
    int32_t pair;
    memcpy(&pair, one, 4);
    dot(acc, lanes, (Floats)(Ints{} + pair));
#else
    acc += lanes * *one;
#endif
}

// acc[r][n] += sum over steps of a[r * row + step * next] * b[step][n], for steps first..last-1, or those at `steps`.
template <int NV, bool SOME = false>
static inline __attribute__((always_inline)) void
multiply(Floats (&acc)[MR][NV], const float* a, int row, int next, const float* b, int stride, int first, int last,
         const uint8_t* steps = nullptr) {
#pragma GCC unroll UNROLL
    for (int i = first; i < last; i++) {
        int step = SOME ? steps[i] : i;
        Floats lanes[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) lanes[n] = *(const AnyFloats*)(b + (int64_t)step * stride + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) dot(acc[r][n], lanes[n], a + r * row + step * next);
    }
}

// The steps of a product that count, where not all of them do: those from first to last - 1, or `last` ones in a list.
struct Steps {
    int first, last;
    bool listed;
    uint8_t at[KS + 8];
};

// For each byte, the numbers of the bits that are set in it, one after the other.
struct Bits {
    uint64_t of[256];
    constexpr Bits() : of() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0, count = 0; bit < 8; bit++)
                if (byte >> bit & 1) of[byte] |= (uint64_t)bit << 8 * count++;
    }
};
static constexpr Bits BITS;

// Whether the keys of a tile, of which there is one, lie side by side.
static inline bool one_run(uint64_t keys) {
    uint64_t run = keys >> __builtin_ctzll(keys);
    return (run & (run + 1)) == 0;
}

static void steps_of(Steps& steps, uint64_t keys) {
    steps.first = __builtin_ctzll(keys) / PAIR, steps.last = (63 - __builtin_clzll(keys)) / PAIR + 1;
    steps.listed = !one_run(keys);
    if (!steps.listed) return;
    steps.last = 0;
    if (PAIR == 2) {
        for (; keys; keys &= keys - 1) {
            int step = __builtin_ctzll(keys) / PAIR;
            if (!steps.last || steps.at[steps.last - 1] != step) steps.at[steps.last++] = step;
        }
        return;
    }
    for (int first = 0; first < KB && keys >> first; first += 8) {
        uint8_t byte = (uint8_t)(keys >> first);
        uint64_t numbers = BITS.of[byte] + first * 0x0101010101010101ull;
        memcpy(steps.at + steps.last, &numbers, 8);
        steps.last += __builtin_popcount(byte);
    }
}

// The running state of MR query rows. Scores and references are in units of log2.
struct Rows {
    Floats sum[MR];                                       // of the weights, by lane
    float reference[MR];                                  // what scores are taken relative to: no more than the largest
    float below[SKIPS ? MR : 1];                          // scores so far below the reference may be left out
    float q[(READS ? D : DK) * MR] __attribute__((aligned(64))); // queries: packed, by step, or by row
    float out[MR * DVP] __attribute__((aligned(64)));     // weighted values, by panel of NRW columns
};

// What a tile drops or adds for MR rows: bit j of keep[r] is key j (null keeps all), and `any` what some row keeps;
// add[r] is a row of KB floats, with BIAS.
struct Masks {
    const uint64_t* keep;
    const float* const* add;
    uint64_t any;
};

static inline bool any_lane(Ints found) {
    uint64_t words[VECTOR_BYTES / 8], all = 0;
    memcpy(words, &found, sizeof words);
    for (uint64_t word : words) all |= word;
    return all != 0;
}

static __attribute__((noinline)) void raise_references(Rows& rows, int count, const Floats (&top)[MR], float factor) {
    for (int r = 0; r < count; r++) {
        float highest = top[r][0];
        for (int i = 1; i < W; i++) highest = top[r][i] > highest ? top[r][i] : highest;
        highest *= factor;
        if (!(highest > rows.reference[r])) continue;
        float decay = exp2_of(rows.reference[r] - highest);
        rows.reference[r] = highest;
        rows.sum[r] *= decay;
        for (int panel = 0; panel < DVV; panel += NR) {
            int width = (DVV - panel < NR ? DVV - panel : NR) * W;
            float* out = rows.out + panel * W * MR + r * width;
            for (int i = 0; i < width; i++) out[i] *= decay;
        }
    }
}

// out += weights * values for MR rows and a panel of NV vectors. The sum over one tile is made apart from the running
// one, which keeps rounding errors from growing with the number of keys. steps: those that count, null for all.
template <int NV>
static inline __attribute__((always_inline)) void
weigh_values(float* out, const float* weights, const float* values, const Steps* steps) {
    Floats acc[MR][NV] = {};
    if (steps && steps->listed) multiply<NV, true>(acc, weights, KS, 1, values, NV * W, 0, steps->last, steps->at);
    else if (steps) multiply<NV>(acc, weights, KS, 1, values, NV * W, steps->first, steps->last);
    else multiply<NV>(acc, weights, KS, 1, values, NV * W, 0, KS);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) *(AnyFloats*)(out + (r * NV + n) * W) += acc[r][n];
}

// Stores the weights of a row from vector v on: one vector, or two that are packed together.
template <bool PACKED>
static inline __attribute__((always_inline)) void store_weights(float* to, int v, const Floats* weights) {
    if constexpr (PACKED && PACKED_BF16) {
#ifndef __AVX512BF16__
        for (int j = 0; j < 2 * W; j++) ((uint16_t*)to)[v * W + j] = bf16_of(weights[j / W][j % W]);
#else
        Ints pairs;
        asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(weights[0]), "v"(weights[1]));
        *(AnyInts*)(to + v / 2 * W) = pairs;
#endif
    } else {
        *(AnyFloats*)(to + v * W) = weights[0];
    }
}

// How q.k products become scores: times `factor`, or with a softcap factor * tanh(inner * product). In units of log2,
// but with BIAS in natural ones: what is added is then rounded as little as its model's own code rounds it.
// Products are summed `chunk` steps at a time: rounding errors grow with the length of a running sum.
struct Scoring {
    float factor, inner;
    int chunk;
};

// Calls `use` with 0 to `count` - 1 in steps of STEP; with ALL up to MOST - 1, unrolled, which takes a compiler long.
template <bool ALL, int MOST, int STEP = 1, typename Use>
static inline __attribute__((always_inline)) void each(int count, Use use) {
    if constexpr (ALL) {
#pragma GCC unroll 16
        for (int i = 0; i < MOST; i += STEP) use(i);
    } else {
        for (int i = 0; i < count; i += STEP) use(i);
    }
}

template <bool ALL, typename Use> static inline __attribute__((always_inline)) void each_row(int count, Use use) {
    each<ALL, MR>(count, use);
}

template <bool ALL, int STEP = 1, typename Use> static inline __attribute__((always_inline)) void each_vector(Use use) {
    each<ALL, KV, STEP>(KV, use);
}

// From the products of a tile's keys with rows to scores, and to weights by row: with ALL, of all MR rows and packed, else
// of the first `count` and as floats. Returns whether any key counts. `masks` is null on a full tile; with ALL
// the weights of vectors none of whose keys counts are not written, else they are 0.
template <bool ALL, bool SOME>
static inline __attribute__((always_inline)) bool
weigh_some(Rows& rows, int count, Floats (&scores)[MR][KV], const Scoring& scoring, const Masks* masks, float* to) {
    float factor = scoring.factor;
    auto used = [&](int v) __attribute__((always_inline)) { // whether any key of a vector counts
        return !SOME || (masks->any >> (v * W) & first_keys(W)) != 0;
    };
    Floats top[MR];
    if (SOFTCAP) {
        for (int r = 0; r < count; r++)
            for (int v = 0; v < KV; v++) scores[r][v] = tanh_of(scores[r][v] * scoring.inner) * factor;
        factor = 1.0f;
    }
    if (BIAS) {
        for (int r = 0; r < count; r++)
            for (int v = 0; v < KV; v++)
                scores[r][v] = scores[r][v] * factor + *(const AnyFloats*)(masks->add[r] + v * W);
        factor = LOG2E;
    }
    Ints above = {}, counts = {};
    each_row<ALL>(count, [&](int r) __attribute__((always_inline)) { top[r] = Floats{} - __builtin_inff(); });
    if (SOME) {
        Ints lane;
        for (int i = 0; i < W; i++) lane[i] = 1 << i;
        uint64_t all = ~0ull;
        for (int r = 0; r < count; r++) all &= masks->keep[r];
        each_vector<ALL>([&](int v) __attribute__((always_inline)) {
            if (!used(v) || (all >> (v * W) & first_keys(W)) == first_keys(W)) return;
            each_row<ALL>(count, [&](int r) __attribute__((always_inline)) {
                Ints here = (lane & (int32_t)(uint32_t)(masks->keep[r] >> (v * W))) != 0;
                scores[r][v] = here ? scores[r][v] : Floats{} - __builtin_inff();
            });
        });
    }
    each_vector<ALL>([&](int v) __attribute__((always_inline)) {
        if (!used(v)) return;
        each_row<ALL>(count, [&](int r) __attribute__((always_inline)) {
            top[r] = scores[r][v] > top[r] ? scores[r][v] : top[r];
            if (SKIPS) counts |= scores[r][v] != scores[r][v]; // a NaN counts
        });
    });
    each_row<ALL>(count, [&](int r) __attribute__((always_inline)) {
        above |= top[r] * factor > Floats{} + (rows.reference[r] + SLACK);
        if (SKIPS) counts |= ~(top[r] * factor < Floats{} + (rows.reference[r] + rows.below[r]));
    });
    if (SKIPS && !any_lane(counts)) return false;
    if (__builtin_expect(any_lane(above), 0)) raise_references(rows, count, top, factor);
    constexpr int TOGETHER = ALL ? PAIR : 1; // vectors that are packed together
    Floats sum[MR];
    each_row<ALL>(count, [&](int r) __attribute__((always_inline)) { sum[r] = rows.sum[r]; });
    each_vector<ALL, TOGETHER>([&](int v) __attribute__((always_inline)) {
        if (ALL && !used(v) && !(TOGETHER == 2 && used(v + 1))) return;
        each_row<ALL>(count, [&](int r) __attribute__((always_inline)) {
            Floats weights[TOGETHER];
#pragma GCC unroll 2
            for (int i = 0; i < TOGETHER; i++) {
                weights[i] = used(v + i) ? exp2_of(scores[r][v + i] * factor - rows.reference[r]) : Floats{};
                sum[r] += weights[i];
            }
            store_weights<ALL>(to + r * (ALL ? KS : KB), v, weights);
        });
    });
    each_row<ALL>(count, [&](int r) __attribute__((always_inline)) { rows.sum[r] = sum[r]; });
    return true;
}

template <bool ALL>
static inline __attribute__((always_inline)) bool
weigh_keys(Rows& rows, int count, Floats (&scores)[MR][KV], const Scoring& scoring, const Masks* masks, float* to) {
    return masks && (!BIAS || masks->keep) ? weigh_some<ALL, true>(rows, count, scores, scoring, masks, to)
                                           : weigh_some<ALL, false>(rows, count, scores, scoring, masks, to);
}

// One tile of keys for MR rows; `masks` is null on a full tile.
static __attribute__((noinline)) void
meet(Rows& rows, const float* keys, const float* values, const Scoring& scoring, const Masks* masks) {
    Floats scores[MR][KV];
#pragma GCC unroll 16
    for (int panel = 0; panel < KV; panel += NR) {
        if (masks && !(masks->any >> (panel * W) & first_keys(NRW))) { // dropped below
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) scores[r][panel + n] = Floats{};
            continue;
        }
        for (int from = 0; from < DK; from += scoring.chunk) {
            int to = from + scoring.chunk < DK ? from + scoring.chunk : DK;
            Floats acc[MR][NR] = {};
            multiply<NR>(acc, rows.q, 1, MR, keys + (int64_t)panel * W * DK, NRW, from, to);
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) scores[r][panel + n] = from ? scores[r][panel + n] + acc[r][n] : acc[r][n];
        }
    }
    float weights[MR * KS] __attribute__((aligned(64)));
    if (!weigh_keys<true>(rows, MR, scores, scoring, masks, weights)) return;
    Steps some;
    bool all = !masks || (masks->any & first_keys(KB)) == first_keys(KB);
    if (!all) steps_of(some, masks->any & first_keys(KB));
    const Steps* steps = all ? nullptr : &some;
#pragma GCC unroll 16
    for (int panel = 0; panel + NR <= DVV; panel += NR)
        weigh_values<NR>(rows.out + panel * W * MR, weights, values + (int64_t)panel * W * KS, steps);
    constexpr int REST = DVV % NR, DONE = DVV - REST;
    if constexpr (REST > 0)
        weigh_values<REST>(rows.out + DONE * W * MR, weights, values + (int64_t)DONE * W * KS, steps);
}
