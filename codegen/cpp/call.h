// The integer arithmetic of tile rules.

// Arithmetic saturates far beyond any position, so products of sizes can't wrap around.
constexpr I FAR = (I)1 << 58;

constexpr I operator""_I(const char* digits) {
    I value = 0;
    for (; *digits; digits++) value = value > FAR / 10 ? FAR : value * 10 + (*digits - '0');
    return value > FAR ? FAR : value;
}

static inline I mul(I a, I b) {
    I product;
    if (__builtin_mul_overflow(a, b, &product)) return (a < 0) == (b < 0) ? FAR : -FAR;
    return product > FAR ? FAR : product < -FAR ? -FAR : product;
}
static inline I floordiv(I a, I b) { return a / b - (a % b < 0); } // b > 0
static inline I mod(I a, I b) { I rest = a % b; return rest < 0 ? rest + b : rest; }
static inline I least(I a, I b) { return a < b ? a : b; }
static inline I most(I a, I b) { return a > b ? a : b; }

struct Interval { I low, high; }; // keys, or tiles of keys: low included, high excluded

// As bits: the first `count` keys of a tile, and its keys j with lane + j >= 0 or with lane - j >= 0.
static inline uint64_t first_keys(I count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }
static inline uint64_t keys_from(I lane) { return ~first_keys(-lane); }
static inline uint64_t keys_to(I lane) { return first_keys(lane + 1); }

// How many of ascending keys are below a limit; and as bits, those with limit + key >= 0 or with limit - key >= 0.
static inline I keys_below(I limit, const int32_t* at, int keys) {
    int count = 0;
    for (int step = 32; step; step >>= 1)
        if (count + step <= keys && at[count + step - 1] < limit) count += step;
    return count + (count < keys && at[count] < limit);
}
static inline uint64_t listed_from(I limit, const int32_t* at, int keys) {
    return ~first_keys(keys_below(-limit, at, keys));
}
static inline uint64_t listed_to(I limit, const int32_t* at, int keys) {
    return first_keys(keys_below(limit + 1, at, keys));
}

// A byte for each key of a tile, 1 or 0: vectors fill these faster than bits.
struct Bytes {
    uint8_t of[KB] = {};
    uint64_t bits() const {
        uint64_t found = 0;
        for (int j = 0; j < KB; j += 8) { // eight bytes to eight bits
            uint64_t eight;
            memcpy(&eight, of + j, 8);
            found |= (eight * 0x0102040810204080) >> 56 << j;
        }
        return found;
    }
};

// Bits that depend on one number, as they were for the latest numbers.
struct Memory {
    static constexpr int SIZE = 16;
    I number[SIZE];
    uint64_t bits[SIZE];
    Memory() { for (I& x : number) x = -2 * FAR; }
    uint64_t& bits_of(I x) { return bits[x & (SIZE - 1)]; }
    bool renew(I x) { // whether the bits aren't those of x yet
        I& held = number[x & (SIZE - 1)];
        return held != x && (held = x, true);
    }
};
