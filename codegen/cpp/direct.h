// Keys and values read where they lie, for query tiles of few rows: packing a tile costs more than such rows multiply.
// Elements of 16 bits are read two in a lane: of each 2 * W columns first the even ones, then the odd ones. Queries are
// laid out like that, and what is summed of the values is put in order at the end.

// The rows of a tile's keys and values: null where there is none. Those of the tile that is met next lie so many
// elements on; 0 where that isn't known.
struct Direct {
    const Element *key[KB], *value[KB];
    I keys_ahead, values_ahead;
};

#if READS
// While a row is read, the one in its place in the next tile is fetched, line by line and into the second cache: early
// enough for memory, and so evenly that products go on meanwhile. Fetched into the first cache, or all while keys are
// multiplied, lines of memory and those of products wait for each other.
static inline __attribute__((always_inline)) void fetch_line(const Element* row, int column) {
    constexpr int LINE = 64 / sizeof(Element);
    if (column % LINE == 0) __builtin_prefetch(row + column, 0, 2);
}

template <int R> struct Count { static constexpr int rows = R; };

template <bool ON> struct Flag { static constexpr bool on = ON; };
constexpr int DIRECT_BLOCKS = DIRECT_ROWS ? (DIRECT_ROWS + MR - 1) / MR : 1;
constexpr int SUMS = W == 16 ? 16 : 8; // that registers hold beside what is added to them

static inline Floats halves_to_floats(Ints x) { // the lower 16 bits of each lane, the others being 0
#if IO_FP16
    Ints low = x & 0x7fff, wide = (Ints)((Floats)(low << 13) * 0x1p112f);
    return (Floats)(wide | (low >= 0x7c00 & 0x7f800000) | (x & 0x8000) << 16);
#else
    return (Floats)(x << 16);
#endif
}

// The next HALVES * W elements, in vectors.
static inline __attribute__((always_inline)) void read(Floats* to, const Element* from) {
#if IO_BF16 || IO_FP16
    Ints lanes = *(const AnyInts*)from;
    to[0] = halves_to_floats(IO_BF16 ? lanes : lanes & 0xffff);
    to[1] = IO_BF16 ? (Floats)(lanes & ~0xffff) : halves_to_floats(lanes >> 16 & 0xffff);
#else
    to[0] = *(const AnyFloats*)from;
#endif
}

// Where column i is in what `read` gives.
static inline int place_of(int i) { return HALVES == 1 ? i : i / (2 * W) * 2 * W + i % 2 * W + i / 2 % W; }

// Queries of MR rows, by row, times `sign`. A null row is zeros.
static void lay_queries(float* to, const Element* const* rows, I column, int sign) {
    for (int r = 0; r < MR; r++)
        for (int i = 0; i < D; i++) to[r * D + place_of(i)] = rows[r] && sign ? sign * widen(rows[r][i * column]) : 0;
}

// Sums the lanes of each of W vectors: lane i is the sum of vector i.
template <int S>
static inline __attribute__((always_inline)) Floats sums_of(Floats* rows) {
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W / S; i += 2) {
            Ints a = (Ints)rows[i], b = (Ints)rows[i + 1];
            swap_squares<S>(a, b, typename LanesTo<W>::type());
            rows[i / 2] = (Floats)a + (Floats)b;
        }
        return sums_of<S * 2>(rows);
    } else {
        return rows[0];
    }
}

// Keeps a number that several products need in a register: compilers read it from memory for each of them, and such
// reads are what products then wait for.
#if defined __AVX512F__
#define HOLD(x) asm("" : "+v"(x))
#elif defined __x86_64__
#define HOLD(x) asm("" : "+x"(x))
#else
#define HOLD(x)
#endif

// The products of R rows with W keys, row r's in scores[r * KV]. With PREFETCH rows that are needed soon are fetched.
template <int R, bool PREFETCH>
static inline __attribute__((always_inline)) void
multiply_keys(Floats* scores, const float* const* q, const Element* const* keys, const Element* const* soon) {
    constexpr int AT_ONCE = SUMS / R < W ? SUMS / R : W, STEP = HALVES * W;
    Floats sums[R][W];
    for (int j = 0; j < W; j += AT_ONCE) {
        Floats acc[R][AT_ONCE] = {};
        for (int i = 0; i < D; i += STEP) {
            Floats x[AT_ONCE][HALVES];
#pragma GCC unroll 16
            for (int n = 0; n < AT_ONCE; n++) {
                if (PREFETCH) fetch_line(soon[j + n], i);
                read(x[n], keys[j + n] + i);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int half = 0; half < HALVES; half++) {
                    Floats y = *(const AnyFloats*)(q[r] + i + half * W);
                    HOLD(y);
#pragma GCC unroll 16
                    for (int n = 0; n < AT_ONCE; n++) acc[r][n] += x[n][half] * y;
                }
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < AT_ONCE; n++) sums[r][j + n] = acc[r][n];
    }
    for (int r = 0; r < R; r++) scores[r * KV] = sums_of<1>(sums[r]);
}

// The keys of a tile that some row keeps, one after the other: their numbers and values.
struct Kept {
    int count;
    uint8_t number[KB];
    const Element* value[KB];
    I ahead; // the values of the next tile, as in Direct
};

// Adds weights * values to NV vectors of sums, from vector `first` on, for R rows and `count` of the kept keys. With
// PREFETCH the values of the next tile are fetched meanwhile.
template <int R, int NV, bool PREFETCH>
static inline __attribute__((always_inline)) void
add_columns(float* sums, int first, const float* weights, const Kept& kept, int start, int count) {
    Floats acc[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) acc[r][n] = *(const AnyFloats*)(sums + r * DVP + (first + n) * W);
    for (int i = 0; i < count; i++) {
        Floats x[NV];
        const Element* value = kept.value[start + i];
#pragma GCC unroll 16
        for (int n = 0; n < NV; n += HALVES) {
            if (PREFETCH && kept.ahead) fetch_line(value + kept.ahead, (first + n) * W);
            read(x + n, value + (first + n) * W);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) acc[r][n] += x[n] * weights[r * KB + kept.number[start + i]];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) *(AnyFloats*)(sums + r * DVP + (first + n) * W) = acc[r][n];
}

// out += weights * values for R rows, of the kept keys: some keys after the other, all columns of each. The sum over
// one tile is made apart, as in weigh_values.
template <int R, bool PREFETCH>
static inline __attribute__((always_inline)) void
add_values(float* const* out, const float* weights, const Kept& kept) {
    constexpr int NV = SUMS / R < DVV ? SUMS / R : DVV, DONE = DVV / NV * NV, AT_ONCE = 16;
    float sums[R * DVP] __attribute__((aligned(64))) = {};
    for (int i = 0; i < kept.count; i += AT_ONCE) {
        int some = least(AT_ONCE, kept.count - i);
        for (int v = 0; v < DONE; v += NV) add_columns<R, NV, PREFETCH>(sums, v, weights, kept, i, some);
        for (int v = DONE; v < DVV; v += HALVES)
            add_columns<R, HALVES, PREFETCH>(sums, v, weights, kept, i, some);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < DVV; v++) {
            float* to = out[r] + (v / NR * NR * MR + v % NR) * W;
            *(AnyFloats*)to += *(const AnyFloats*)(sums + (r * DVV + v) * W);
        }
}

// Calls `use` with rows `from` to `to` - 1, four, two or one at a time, and whether they are the first.
template <typename Use> static inline __attribute__((always_inline)) void by_rows(int from, int to, Use use) {
    int r = from;
    auto some = [&](auto n) __attribute__((always_inline)) {
        r == from ? use(r, n, Flag<true>()) : use(r, n, Flag<false>());
        r += n.rows;
    };
    while (r + 4 <= to) some(Count<4>());
    if (to - r >= 2) some(Count<2>());
    if (to - r >= 1) some(Count<1>());
}

// One tile of keys for `count` rows in blocks of MR, each with its masks. What none of the rows keeps, so that it isn't
// in `any`, is not read.
static __attribute__((noinline)) void
meet_direct(Rows* blocks, int count, const Direct& tile, const Scoring& scoring, const Masks* masks, uint64_t any) {
    static const Element zeros[D > DV ? D : DV] = {};
    Floats scores[DIRECT_BLOCKS * MR][KV];
    Kept kept;
    kept.count = 0, kept.ahead = tile.values_ahead;
    for (int group = 0; group < KB; group += W) {
        const Element *keys[W], *soon[W];
        int before = kept.count;
        for (int i = 0; i < W; i++) {
            int j = group + i;
            bool there = any >> j & 1 && tile.key[j];
            keys[i] = there ? tile.key[j] : zeros;
            soon[i] = tile.keys_ahead && tile.key[j] ? tile.key[j] + tile.keys_ahead : tile.value[j];
            kept.number[kept.count] = j, kept.value[kept.count] = tile.value[j];
            kept.count += there;
        }
        if (kept.count > before)
            by_rows(0, count, [&](int r, auto n, auto first) __attribute__((always_inline)) {
                const float* q[n.rows];
                for (int i = 0; i < n.rows; i++) q[i] = blocks[(r + i) / MR].q + (r + i) % MR * D;
                multiply_keys<n.rows, first.on>(&scores[r][group / W], q, keys, soon);
            });
        else
            for (int r = 0; r < count; r++) scores[r][group / W] = Floats{};
    }
    float weights[DIRECT_BLOCKS * MR * KB] __attribute__((aligned(64)));
    int from = 0; // the first row that was weighed and whose values aren't added
    auto add_until = [&](int to) {
        by_rows(from, to, [&](int r, auto n, auto first) __attribute__((always_inline)) {
            float* out[n.rows];
            for (int i = 0; i < n.rows; i++) out[i] = blocks[(r + i) / MR].out + (r + i) % MR * NRW;
            add_values<n.rows, first.on>(out, weights + r * KB, kept);
        });
    };
    for (int r = 0; r < count; r += MR) {
        Floats(&of_block)[MR][KV] = *(Floats(*)[MR][KV])scores[r];
        const Masks& mine = masks[r / MR];
        const Masks* some = BIAS || mine.keep ? &mine : nullptr;
        if (mine.any &&
            weigh_keys<false>(blocks[r / MR], least(MR, count - r), of_block, scoring, some, weights + r * KB))
            continue;
        add_until(r);
        from = r + MR;
    }
    add_until(count);
}

// Puts the columns of weighted values in order.
static void order_columns(Rows& rows) {
    if (HALVES == 1) return;
    for (float* at = rows.out; at < rows.out + MR * DVP; at += HALVES * W) {
        float line[HALVES * W];
        for (int i = 0; i < HALVES * W; i++) line[i] = at[place_of(i)];
        memcpy(at, line, sizeof line);
    }
}
#endif
