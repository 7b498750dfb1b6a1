// Copies tiles of tensors with any strides into the layouts of the micro-kernels, and results back.

#if IO_BF16
typedef uint16_t Element;
static inline float widen(uint16_t x) { return bits_float((uint32_t)x << 16); }
static inline uint16_t narrow(float x) { return bf16_of(x); }
#elif IO_FP16
typedef uint16_t Element;
static inline float widen(uint16_t x) {
    uint32_t low = x & 0x7fff;
    uint32_t wide = float_bits(bits_float(low << 13) * 0x1p112f);
    return bits_float((low >= 0x7c00 ? wide | 0x7f800000 : wide) | (uint32_t)(x & 0x8000) << 16);
}
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

// Queries of MR rows, by step, times `sign` (1, -1, or 0 where the scale is 0). A null row is zeros.
static void pack_queries(float* to, const Element* const* rows, I stride, int sign) {
    for (int r = 0; r < MR; r++)
        for (int step = 0; step < DK; step++) {
#if PACKED_BF16
            uint32_t pair = 0;
            for (int i = 0; i < 2 && rows[r] && sign && step * 2 + i < D; i++)
                pair |= (uint32_t)(uint16_t)(rows[r][(step * 2 + i) * stride] ^ (sign < 0 ? 0x8000 : 0)) << (16 * i);
            to[step * MR + r] = bits_float(pair);
#else
            to[step * MR + r] = rows[r] && sign ? sign * widen(rows[r][step * stride]) : 0.0f;
#endif
        }
}

// Keys, transposed: panels of NRW keys, by step. Keys from `count` on are zeros.
static void pack_keys(uint32_t* to, const Element* from, I row, I column, int count) {
    for (int panel = 0; panel < KB; panel += NRW)
        for (int step = 0; step < DK; step++)
            for (int j = 0; j < NRW; j++) {
                uint32_t lane = 0;
                const Element* key = from + (panel + j) * row;
                if (panel + j < count) {
#if PACKED_BF16
                    lane = key[step * 2 * column];
                    if (step * 2 + 1 < D) lane |= (uint32_t)key[(step * 2 + 1) * column] << 16;
#else
                    lane = float_bits(widen(key[step * column]));
#endif
                }
                to[(int64_t)panel * DK + step * NRW + j] = lane;
            }
}

// Values: panels of NRW columns, by key (or pair of keys). Keys from `count` on, and columns from DV on, are zeros.
static void pack_values(uint32_t* to, const Element* from, I row, I column, int count) {
    memset(to, 0, V_TILE * 4);
    for (int panel = 0; panel < DVV; panel += NR) {
        int width = (DVV - panel < NR ? DVV - panel : NR) * W;
        int columns = DV - panel * W < width ? DV - panel * W : width;
        for (int j = 0; j < count; j++) {
            const Element* value = from + j * row + panel * W * column;
            uint32_t* lanes = to + (int64_t)panel * W * KS + j / PAIR * width;
            for (int i = 0; i < columns; i++) {
#if PACKED_BF16
                lanes[i] |= (uint32_t)value[i * column] << (16 * (j & 1));
#else
                lanes[i] = float_bits(widen(value[i * column]));
#endif
            }
        }
    }
}

static void store_row(Element* to, I stride, const Rows& rows, int r) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += rows.sum[r][i];
    float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int panel = 0; panel < DVV; panel += NR) {
        int width = (DVV - panel < NR ? DVV - panel : NR) * W;
        int columns = DV - panel * W < width ? DV - panel * W : width;
        const float* out = rows.out + panel * W * MR + r * width;
        for (int i = 0; i < columns; i++) to[(panel * W + i) * stride] = narrow(out[i] * inverse);
    }
}
