// Copies tiles of tensors with any strides into the layouts of the micro-kernels, and results back.

static inline float half_to_float(uint16_t x) {
    uint32_t low = x & 0x7fff, wide = float_bits(bits_float(low << 13) * 0x1p112f);
    return bits_float((low >= 0x7c00 ? wide | 0x7f800000 : wide) | (uint32_t)(x & 0x8000) << 16);
}

#if IO_BF16
typedef uint16_t Element;
static inline float widen(uint16_t x) { return bits_float((uint32_t)x << 16); }
static inline uint16_t narrow(float x) { return bf16_of(x); }
#elif IO_FP16
typedef uint16_t Element;
static inline float widen(uint16_t x) { return half_to_float(x); }
static inline uint16_t narrow(float x) {
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); // rounds beyond the largest finite value
    if (size < 0x38800000) return (uint16_t)(sign | (float_bits(bits_float(size) + 0.5f) - float_bits(0.5f)));
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
#else
typedef float Element;
static inline float widen(float x) { return x; }
static inline float narrow(float x) { return x; }
#endif

#if PACKED_BF16
typedef uint16_t Packed; // what a 32-bit lane holds PAIR of
static inline Packed packed_of(Element x) { return x; }
static inline Packed negative(Packed x) { return x ^ 0x8000; }
#else
typedef float Packed;
static inline Packed packed_of(Element x) { return widen(x); }
static inline Packed negative(Packed x) { return -x; }
#endif

static inline void pack_line(Packed* to, const Element* from, I column, int count) {
    if (column == 1)
        for (int i = 0; i < count; i++) to[i] = packed_of(from[i]);
    else
        for (int i = 0; i < count; i++) to[i] = packed_of(from[i * column]);
}

// Queries of MR rows, by step, times `sign` (1, -1, or 0 where the scale is 0). A null row is zeros.
static void pack_queries(float* to, const Element* const* rows, I column, int sign) {
    Packed line[DK * PAIR] = {};
    for (int r = 0; r < MR; r++) {
        if (rows[r] && sign) pack_line(line, rows[r], column, D);
        else memset(line, 0, sizeof line);
        if (sign < 0)
            for (int i = 0; i < D; i++) line[i] = negative(line[i]);
        for (int step = 0; step < DK; step++) memcpy(to + step * MR + r, line + step * PAIR, 4);
    }
}

template <int... L> struct Lanes {};
template <int N, int... L> struct LanesTo : LanesTo<N - 1, N - 1, L...> {};
template <int... L> struct LanesTo<0, L...> { typedef Lanes<L...> type; };

// Swaps the off-diagonal S x S squares of each 2S x 2S square that rows a and b are part of.
template <int S, int... L>
static inline __attribute__((always_inline)) void swap_squares(Ints& a, Ints& b, Lanes<L...>) {
#ifdef __clang__
    Ints low = __builtin_shufflevector(a, b, (L & S ? W + L - S : L)...);
    b = __builtin_shufflevector(a, b, (L & S ? W + L : L + S)...);
#else
    Ints low = __builtin_shuffle(a, b, Ints{(L & S ? W + L - S : L)...});
    b = __builtin_shuffle(a, b, Ints{(L & S ? W + L : L + S)...});
#endif
    a = low;
}

template <int S>
static inline __attribute__((always_inline)) void transpose(Ints (&rows)[W]) {
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & S)) swap_squares<S>(rows[i], rows[i + S], typename LanesTo<W>::type());
        transpose<S * 2>(rows);
    }
}

// Whether rows of so many elements, one after the other, are read as they lie: nothing to widen, and whole vectors.
constexpr bool as_it_lies(int size, int lanes) { return sizeof(Element) == sizeof(Packed) && size % lanes == 0; }

// Fetches a row that is needed soon: rows from lists lie where no processor expects them.
static inline void fetch(const Element* row, int size) {
    for (int i = 0; row && i < size; i += 64 / (int)sizeof(Element)) __builtin_prefetch(row + i);
}

// Keys, transposed: panels of NRW keys, by step. A null row is zeros. Meanwhile the keys' values are fetched.
static void pack_keys(int32_t* to, const Element* const* rows, I column, const Element* const* values) {
    constexpr int WIDTH = (DK + W - 1) / W * W * PAIR; // of a line, padded
    static const Packed zeros[WIDTH] = {};
    Packed lines[W * WIDTH] = {};
    for (int group = 0; group < KB; group += W) {
        const Packed* from[W];
        for (int i = 0; i < W; i++) {
            const Element* row = rows[group + i];
            if (group + W < KB) fetch(rows[group + W + i], D);
            fetch(values[group + i], DV);
            from[i] = !row ? zeros : as_it_lies(D, W * PAIR) && column == 1 ? (const Packed*)row : lines + i * WIDTH;
            if (from[i] == lines + i * WIDTH) pack_line(lines + i * WIDTH, row, column, D);
        }
        int32_t* panel = to + group / NRW * NRW * DK + group % NRW;
        for (int step = 0; step < DK; step += W) {
            Ints square[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) memcpy(square + i, from[i] + step * PAIR, sizeof(Ints));
            transpose<1>(square);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++)
                if (step + i < DK) *(AnyInts*)(panel + (step + i) * NRW) = square[i];
        }
    }
}

template <int WIDTH>
static inline __attribute__((always_inline)) void pack_lanes(int32_t* to, const Packed* const* from, int column) {
#if PACKED_BF16
    for (int i = 0; i < WIDTH; i++) to[i] = from[0][column + i] | (uint32_t)from[1][column + i] << 16;
#else
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; i += W) *(AnyFloats*)((float*)to + i) = *(const AnyFloats*)(from[0] + column + i);
#endif
}

// Values: panels of NRW columns, by key (or pair of keys). Null rows, and columns from DV on, are zeros.
static void pack_values(int32_t* to, const Element* const* rows, I column) {
    static const Packed zeros[DVP] = {};
    Packed lines[PAIR][DVP] = {};
    for (int key = 0; key < KB; key += PAIR) {
        const Packed* from[PAIR];
        for (int i = 0; i < PAIR; i++) {
            const Element* row = rows[key + i];
            from[i] = !row ? zeros : as_it_lies(DV, W) && column == 1 ? (const Packed*)row : lines[i];
            if (from[i] == lines[i]) pack_line(lines[i], row, column, DV);
        }
        constexpr int REST = DVP % NRW, DONE = DVP - REST;
        for (int panel = 0; panel < DONE; panel += NRW)
            pack_lanes<NRW>(to + panel * KS + key / PAIR * NRW, from, panel);
        if constexpr (REST > 0) pack_lanes<REST>(to + DONE * KS + key / PAIR * REST, from, DONE);
    }
}

// Whether some element of packed values in pairs is infinite or no number: all bits of its exponent are set, so that one
// more carries into the sign.
static bool any_infinite(const int32_t* values) {
    uint32_t found = 0;
    for (I i = 0; i < V_TILE; i++) found |= ((uint32_t)values[i] & 0x7f807f80) + 0x00800080;
    return found & 0x80008000;
}

// Values in pairs without those of keys that aren't among `keys`: 0 times one that is infinite is no number, and a pair
// is multiplied for the sake of one of its keys.
static void clear_dropped(int32_t* to, const int32_t* from, uint64_t keys) {
    for (int panel = 0; panel < DVP; panel += NRW) {
        int width = DVP - panel < NRW ? DVP - panel : NRW;
        for (int pair = 0; pair < KS; pair++) {
            uint64_t some = keys >> pair * PAIR;
            int32_t kept = (some & 1 ? 0xffff : 0) | (some & 2 ? ~0xffff : 0);
            I at = (I)panel * KS + pair * width;
            for (int i = 0; i < width; i++) to[at + i] = from[at + i] & kept;
        }
    }
}

static inline float sum_of(const Rows& rows, int r) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += rows.sum[r][i];
    return sum;
}

// The natural logarithm of a row's sum of weights, as they are without a reference. Where all scores are near the lowest
// number there is, the sum is all rounding error, and too small to count.
static inline float lse_of(const Rows& rows, int r) {
    double sum = sum_of(rows, r), top = rows.reference[r];
    if (sum == 0) return -__builtin_inff();
    return (float)((top < -1e30 ? top : top + __builtin_log2(sum)) * 0.6931471805599453);
}

static void store_row(Element* to, I stride, const Rows& rows, int r) {
    float sum = sum_of(rows, r);
    float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int panel = 0; panel < DVV; panel += NR) {
        int width = (DVV - panel < NR ? DVV - panel : NR) * W;
        int columns = DV - panel * W < width ? DV - panel * W : width;
        const float* out = rows.out + panel * W * MR + r * width;
        if (stride == 1)
            for (int i = 0; i < columns; i++) to[panel * W + i] = narrow(out[i] * inverse);
        else
            for (int i = 0; i < columns; i++) to[(panel * W + i) * stride] = narrow(out[i] * inverse);
    }
}
