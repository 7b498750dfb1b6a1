// Mask tensors: bool ones drop keys, floating ones are added to the scores (and -inf drops the key).

#if TENSOR_MASK
static inline float half_to_float(uint16_t x) {
    uint32_t low = x & 0x7fff, wide = float_bits(bits_float(low << 13) * 0x1p112f);
    return bits_float((low >= 0x7c00 ? wide | 0x7f800000 : wide) | (uint32_t)(x & 0x8000) << 16);
}

static inline float mask_value(const void* data, I at, I type) {
    switch (type) { // MASK_TYPES of launch.py
        case 1: return ((const float*)data)[at];
        case 2: return bits_float((uint32_t)((const uint16_t*)data)[at] << 16);
        case 3: return half_to_float(((const uint16_t*)data)[at]);
        default: {
            double x = ((const double*)data)[at];
            return x < -1e38 && x > -__builtin_inf() ? -1e38f : x > 1e38 && x < __builtin_inf() ? 1e38f : (float)x;
        }
    }
}
#endif

static void apply_mask(const Call& c, I b, I head, I first, I heads, I count, I k0, int keys, uint64_t* keep, float* add) {
#if TENSOR_MASK
    for (I r = 0; r < heads * count; r++) {
        I at = b * c.ms[0] + (head + r / count) * c.ms[1] + (first + r % count) * c.ms[2] + k0 * c.ms[3];
        uint64_t kept = 0;
        for (int j = 0; j < keys; j++, at += c.ms[3]) {
#if ADD_MASK
            float x = mask_value(c.mask, at, c.mask_type);
            kept |= (uint64_t)(x != -__builtin_inff()) << j;
            x = x < -1e38f ? -1e38f : x > 1e38f && x < __builtin_inff() ? 1e38f : x; // dtypes' lowest stays finite
            add[r * KB + j] = x * 1.44269504f;
#else
            kept |= (uint64_t)(((const uint8_t*)c.mask)[at] != 0) << j;
#endif
        }
        keep[r] &= kept;
    }
#if ADD_MASK
    for (I r = 0; r < (heads * count + MR - 1) / MR * MR; r++)
        for (int j = r < heads * count ? keys : 0; j < KB; j++) add[r * KB + j] = 0;
#endif
#endif
}
