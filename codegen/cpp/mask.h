// Mask tensors: bool ones drop keys, floating ones are added to the scores (and -inf drops the key).

#if TENSOR_MASK
#if ADD_MASK
static inline float mask_value(float x) { return x; }
static inline float mask_value(double x) { return x < -1e38 && x > -__builtin_inf() ? -1e38f : (float)x; }
struct Bf16 { uint16_t bits; };
static inline float mask_value(Bf16 x) { return bits_float((uint32_t)x.bits << 16); }
struct Fp16 { uint16_t bits; };
static inline float mask_value(Fp16 x) { return half_to_float(x.bits); }

// Fills a row of what is added, in units of log2, and returns the keys that aren't dropped.
template <typename T> static uint64_t add_row(const T* from, I stride, int keys, float* add) {
    if (stride == 1)
        for (int j = 0; j < keys; j++) add[j] = mask_value(from[j]);
    else
        for (int j = 0; j < keys; j++) add[j] = mask_value(from[j * stride]);
    for (int j = keys; j < KB; j++) add[j] = 0;
    const Floats low = Floats{} - 1e38f, high = Floats{} + 1e38f, infinite = Floats{} + __builtin_inff();
    Ints dropped = {}, left = {};
    for (int j = 0; j < KB; j += W) { // a dtype's lowest value must stay finite in units of log2
        Floats x = *(AnyFloats*)(add + j), y = x < low ? low : x > high & x < infinite ? high : x;
        dropped |= x == -infinite;
        left |= x != -infinite;
        *(AnyFloats*)(add + j) = (x == -infinite ? x : y) * 1.44269504f;
    }
    if (!any_lane(dropped)) return ~0ull;
    if (!any_lane(left)) return 0;
    uint64_t kept = 0;
    for (int j = 0; j < KB; j++) kept |= (uint64_t)(add[j] != -__builtin_inff()) << j;
    return kept;
}

static uint64_t mask_row(const Call& c, I at, int keys, float* add) {
    switch (c.mask_type) { // MASK_TYPES of launch.py
        case 1: return add_row((const float*)c.mask + at, c.ms[3], keys, add);
        case 2: return add_row((const Bf16*)c.mask + at, c.ms[3], keys, add);
        case 3: return add_row((const Fp16*)c.mask + at, c.ms[3], keys, add);
        default: return add_row((const double*)c.mask + at, c.ms[3], keys, add);
    }
}
#else
static uint64_t mask_row(const Call& c, I at, int keys, float*) {
    const uint8_t* from = (const uint8_t*)c.mask + at;
    uint8_t row[KB] = {};
    if (c.ms[3] == 1) memcpy(row, from, keys);
    else
        for (int j = 0; j < keys; j++) row[j] = from[j * c.ms[3]];
    uint64_t kept = 0;
    for (int j = 0; j < KB; j++) kept |= (uint64_t)(row[j] != 0) << j;
    return kept;
}
#endif
#endif

// Applies the mask tensor to the rows of a query tile: `count` queries of each of `heads` heads.
static void apply_mask(
    const Call& c, I b, I head, I first, I heads, I count, I k0, int keys, uint64_t* keep, float* add) {
#if TENSOR_MASK
    uint64_t kept = 0;
    I previous = -1;
    for (I r = 0; r < heads * count; r++) {
        I at = b * c.ms[0] + (head + r / count) * c.ms[1] + (first + r % count) * c.ms[2] + k0 * c.ms[3];
        float* row = add + (ADD_MASK ? r * KB : 0);
        if (at != previous) kept = mask_row(c, at, keys, row);
        else if (ADD_MASK) memcpy(row, row - KB, sizeof(float) * KB); // broadcast over queries or heads
        previous = at;
        keep[r] &= kept;
    }
    for (I r = heads * count; ADD_MASK && r % MR; r++) memset(add + r * KB, 0, sizeof(float) * KB);
#endif
}
