// Keys and values read where they lie, for query tiles of few rows: packing a tile costs more than such rows multiply.
// Elements of 16 bits are read two in a lane: of each 2 * W columns first the even ones, then the odd ones. Queries are
// laid out like that, and what is summed of the values is put in order at the end. Where bf16 are multiplied in pairs,
// keys and queries are left as they lie, and the values of two keys are put side by side.

// The rows of a tile's keys and values: null where there is none. Those of the tile that is met next lie so many
// elements on; 0 where that isn't known.
struct Direct {
    const Element *key[KB], *value[KB];
    I keys_ahead, values_ahead;
};

#if READS
// While a row is read, the one in its place in the next tile is fetched, line by line and into the second cache: early
// enough for memory, and so evenly that products go on meanwhile. Fetched into the first cache, or all while keys are
// multiplied, lines of memory and those of products wait for each other. Where the next tile isn't known, or this one
// has holes and so may that, this tile's own values are fetched while its keys are multiplied.
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

constexpr int PARTS = HALVES / PAIR; // vectors that the elements of one that is read are in

// The next HALVES * W elements, in PARTS vectors.
static inline __attribute__((always_inline)) void read(Floats* to, const Element* from) {
#if PACKED_BF16
    to[0] = *(const AnyFloats*)from;
#elif IO_BF16 || IO_FP16
    Ints lanes = *(const AnyInts*)from;
    to[0] = halves_to_floats(IO_BF16 ? lanes : lanes & 0xffff);
    to[1] = IO_BF16 ? (Floats)(lanes & ~0xffff) : halves_to_floats(lanes >> 16 & 0xffff);
#else
    to[0] = *(const AnyFloats*)from;
#endif
}

// Where column i of the values is in what is summed of them. In pairs, of each 8 columns the first 4 are in one vector
// and the last 4 in the next, as `side_by_side` has them; of other halves, the even ones are, and the odd ones.
static inline int place_of(int i) {
    int group = i / (HALVES * W) * HALVES * W, at = i - group;
    if (PAIR == 2) return group + at / 4 % 2 * W + at / 8 * 4 + at % 4;
    return HALVES == 1 ? i : group + at % 2 * W + at / 2;
}

// Queries of MR rows, by row, times `sign`. A null row is zeros.
static void lay_queries(float* to, const Element* const* rows, I column, int sign) {
    for (int r = 0; r < MR; r++)
        for (int i = 0; i < D; i++) {
            Packed x = rows[r] && sign ? packed_of(rows[r][i * column]) : 0;
            x = sign < 0 ? negative(x) : x;
            ((Packed*)(to + r * D))[PAIR == 2 ? i : place_of(i)] = x;
        }
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
            Floats x[AT_ONCE][PARTS];
#pragma GCC unroll 16
            for (int n = 0; n < AT_ONCE; n++) {
                if (PREFETCH) fetch_line(soon[j + n], i);
                read(x[n], keys[j + n] + i);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; part++) {
                    Floats y = *(const AnyFloats*)(q[r] + i / PAIR + part * W);
                    HOLD(y);
#pragma GCC unroll 16
                    for (int n = 0; n < AT_ONCE; n++) dot(acc[r][n], x[n][part], y);
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

#if PACKED_BF16
typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));

// The elements of two vectors in pairs, of each 8 the first or the last 4.
template <int HALF, int... L>
static inline __attribute__((always_inline)) Floats pairs_of(Shorts a, Shorts b, Lanes<L...>) {
#ifdef __clang__
    return (Floats)__builtin_shufflevector(a, b, (L / 8 * 8 + HALF * 4 + L % 8 / 2 + L % 2 * 2 * W)...);
#else
    return (Floats)__builtin_shuffle(a, b, Shorts{(L / 8 * 8 + HALF * 4 + L % 8 / 2 + L % 2 * 2 * W)...});
#endif
}

// The next 2 * W columns of the values of two keys, each column's side by side.
static inline __attribute__((always_inline)) void side_by_side(Floats* to, const Element* one, const Element* other) {
    Shorts a, b;
    memcpy(&a, one, sizeof a), memcpy(&b, other, sizeof b);
    to[0] = pairs_of<0>(a, b, LanesTo<2 * W>::type()), to[1] = pairs_of<1>(a, b, LanesTo<2 * W>::type());
}
#endif

// The weights of the kept keys of a row, one after the other and as products take them.
static inline __attribute__((always_inline)) void take_weights(Packed* to, const float* weights, const Kept& kept) {
#if PACKED_BF16
    Packed all[KB] __attribute__((aligned(64)));
    for (int v = 0; v < KV; v += 2) store_weights<true>((float*)all, v, (const Floats*)(weights + v * W));
    if (kept.count == KB) memcpy(to, all, sizeof all);
    else
        for (int i = 0; i < kept.count; i++) to[i] = all[kept.number[i]];
    if (kept.count % 2) to[kept.count] = 0;
#else
    for (int i = 0; i < kept.count; i++) to[i] = weights[kept.number[i]];
#endif
}

// Adds weights * values to NV vectors of sums, from vector `first` on, for R rows and those kept keys from `start` to
// `end` - 1. With PREFETCH the values of the next tile are fetched meanwhile.
template <int R, int NV, bool PREFETCH>
static inline __attribute__((always_inline)) void
add_columns(float* sums, int first, const Packed* weights, const Kept& kept, int start, int end) {
    Floats acc[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) acc[r][n] = *(const AnyFloats*)(sums + r * DVP + (first + n) * W);
    for (int i = start; i < end; i += PAIR) {
        Floats x[NV];
        const Element* const* values = kept.value + i;
#pragma GCC unroll 16
        for (int n = 0; n < NV; n += HALVES) {
            int column = (first + n) * W;
            for (int j = 0; PREFETCH && kept.ahead && j < PAIR; j++) fetch_line(values[j] + kept.ahead, column);
#if PACKED_BF16
            side_by_side(x + n, values[0] + column, values[1] + column);
#else
            read(x + n, values[0] + column);
#endif
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) dot(acc[r][n], x[n], (const float*)(weights + r * KB + i));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) *(AnyFloats*)(sums + r * DVP + (first + n) * W) = acc[r][n];
}

// Vector v of what row r of a block sums of the values.
static inline float* sum_at(Rows& rows, int r, int v) {
    int panel = v / NR * NR, width = DVV - panel < NR ? DVV - panel : NR;
    return rows.out + (panel * MR + r * width + v - panel) * W;
}

// Adds weights * values of the kept keys for R rows from `row` on: some keys after the other, all columns of each. The
// sum over one tile is made apart, as in weigh_values.
template <int R, bool PREFETCH>
static inline __attribute__((always_inline)) void
add_values(Rows* blocks, int row, const float* weights, const Kept& kept) {
    constexpr int NV = SUMS / R < DVV ? SUMS / R : DVV, DONE = DVV / NV * NV, AT_ONCE = 16;
    float sums[R * DVP] __attribute__((aligned(64))) = {};
    Packed taken[R * KB] __attribute__((aligned(64)));
    for (int r = 0; r < R; r++) take_weights(taken + r * KB, weights + r * KB, kept);
    for (int i = 0; i < kept.count; i += AT_ONCE) {
        int end = least(i + AT_ONCE, kept.count);
        for (int v = 0; v < DONE; v += NV) add_columns<R, NV, PREFETCH>(sums, v, taken, kept, i, end);
        for (int v = DONE; v < DVV; v += HALVES) add_columns<R, HALVES, PREFETCH>(sums, v, taken, kept, i, end);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < DVV; v++) {
            float* to = sum_at(blocks[(row + r) / MR], (row + r) % MR, v);
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
    bool holes = !one_run(any & first_keys(KB));
    I keys_ahead = holes ? 0 : tile.keys_ahead;
    kept.count = 0, kept.ahead = holes ? 0 : tile.values_ahead;
    for (int group = 0; group < KB; group += W) {
        const Element *keys[W], *soon[W];
        int before = kept.count;
        for (int i = 0; i < W; i++) {
            int j = group + i;
            bool there = any >> j & 1 && tile.key[j];
            keys[i] = there ? tile.key[j] : zeros;
            soon[i] = keys_ahead && tile.key[j] ? tile.key[j] + keys_ahead : there ? tile.value[j] : zeros;
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
    if (PAIR == 2 && kept.count % 2) kept.value[kept.count] = zeros; // of no weight
    float weights[DIRECT_BLOCKS * MR * KB] __attribute__((aligned(64)));
    int from = 0; // the first row that was weighed and whose values aren't added
    auto add_until = [&](int to) {
        by_rows(from, to, [&](int r, auto n, auto first) __attribute__((always_inline)) {
            add_values<n.rows, first.on>(blocks, r, weights + r * KB, kept);
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
