// Tensors that predicates and biases load from: single elements, lines of 64 keys, and bounds over runs.

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

static inline double number(uint8_t x) { return x; }
static inline double number(int32_t x) { return x; }
static inline double number(int64_t x) { return (double)x; }
static inline double number(float x) { return x; }
static inline double number(double x) { return x; }
static inline double number(Bf16 x) { return bits_float((uint32_t)x.bits << 16); }
static inline double number(Fp16 x) { return half_to_float(x.bits); }

// As a float: what is finite stays finite, also in units of log2 and in sums of a few.
constexpr float FINITE = 1e38f;
static inline float rounded(double x) {
    return x < -FINITE && x > -__builtin_inf() ? -FINITE : x > FINITE && x < __builtin_inf() ? FINITE : (float)x;
}
template <typename T> static inline float as_float(T x) { return (float)number(x); }
static inline float as_float(double x) { return rounded(x); }

// Calls `use` with the elements as what they are; the order is that of LOAD_TYPES in launch.py.
template <typename Use> static inline auto with_type(const Source& from, Use use) {
    switch (from.type) {
        case 0: case 1: return use((const uint8_t*)from.data);
        case 2: return use((const int32_t*)from.data);
        case 3: return use((const int64_t*)from.data);
        case 4: return use((const float*)from.data);
        case 5: return use((const double*)from.data);
        case 6: return use((const Bf16*)from.data);
        default: return use((const Fp16*)from.data);
    }
}

static inline I position(const Source& from, int axis, I index) {
    if (index < 0) index += from.size[axis];
    return most(0, least(index, from.size[axis] - 1));
}
static inline I place(const Source& from, int axis, I index) { return position(from, axis, index) * from.stride[axis]; }

static inline I element(const Source& from, I at) {
    if (from.type <= 1) return ((const uint8_t*)from.data)[at];
    return from.type == 2 ? ((const int32_t*)from.data)[at] : ((const int64_t*)from.data)[at];
}
static inline double value(const Source& from, I at) {
    return with_type(from, [&](auto data) { return number(data[at]); });
}

// A list of units of keys, `unit` keys each, that rule `rule` goes through for head `head`.
struct List {
    const Source* from;
    I at, step, count, unit;
    int rule;
    I head;
    I first_key(I i) const { return element(*from, at + i * step) * unit; }
    bool same(const List& to) const { return from->data == to.from->data && at == to.at && unit == to.unit; }
};

// The list along an axis whose first element is at `at`.
static inline List list_at(const Source& from, int axis, I at, I count, I unit, int rule, I head) {
    return {&from, at, from.stride[axis], least(count, from.size[axis]), unit, rule, head};
}

// The elements of a tile's keys whose indices go on by a fixed number a key: index `axis` of key j is first + j * by.
struct Line {
    const Source& from;
    int rank;
    I first[4], by[4], at, step;
    bool inside; // no index is negative or beyond its axis

    Line(const Source& source, int axes) : from(source), rank(axes), at(0), step(0), inside(true) {}

    void along(int axis, I start, I move, int keys) {
        I last = start + move * (keys - 1);
        inside = inside && least(start, last) >= 0 && most(start, last) < from.size[axis];
        first[axis] = start, by[axis] = move;
        at += start * from.stride[axis];
        step += move * from.stride[axis];
    }
    I place_of(int key) const {
        I found = 0;
        for (int axis = 0; axis < rank; axis++) found += place(from, axis, first[axis] + key * by[axis]);
        return found;
    }
};

// A line as KB floats, zeros from `keys` on: where it lies, or in `to`.
static inline const float* floats_of(const Line& line, int keys, float* to) {
    if (line.from.type == 4 && line.inside && line.step == 1 && keys == KB)
        return (const float*)line.from.data + line.at;
    with_type(line.from, [&](auto data) {
        data += line.inside ? line.at : 0;
        if (!line.inside)
            for (int j = 0; j < keys; j++) to[j] = as_float(data[line.place_of(j)]);
        else if (line.step == 1 && keys == KB)
            for (int j = 0; j < KB; j++) to[j] = as_float(data[j]);
        else
            for (int j = 0; j < keys; j++) to[j] = as_float(data[j * line.step]);
    });
    for (int j = keys; j < KB; j++) to[j] = 0;
    return to;
}

static inline void integers_of(const Line& line, int keys, I* to) {
    if (line.inside && line.step == 1 && line.from.type == 3)
        memcpy(to, (const I*)line.from.data + line.at, sizeof(I) * keys);
    else
        for (int j = 0; j < keys; j++)
            to[j] = element(line.from, line.inside ? line.at + j * line.step : line.place_of(j));
}

// Which elements of a line aren't 0, as bits.
static inline uint64_t bits_of(const Line& line, int keys) {
    Bytes found;
    if (line.from.type <= 1 && line.inside && line.step == 1) {
        memcpy(found.of, (const uint8_t*)line.from.data + line.at, keys);
        for (int j = 0; j < KB; j++) found.of[j] = found.of[j] != 0;
    } else {
        for (int j = 0; j < keys; j++)
            found.of[j] = element(line.from, line.inside ? line.at + j * line.step : line.place_of(j)) != 0;
    }
    return found.bits();
}

// The least and the greatest element of each SUMMARY_BLOCK elements along one axis, for all other indices.
struct Summary {
    I *least, *greatest, stride[4];
};

static I summary_blocks(const Source& from, int axis) { return (from.size[axis] + SUMMARY_BLOCK - 1) / SUMMARY_BLOCK; }

// Lays out a summary and returns how many blocks it has. What is broadcast over an axis is summarised once.
static I shape_summary(Summary& to, const Source& from, int axis) {
    I count = summary_blocks(from, axis);
    for (int i = 0; i < 4; i++) to.stride[i] = 0;
    to.stride[axis] = 1;
    for (int i = 3; i >= 0; i--) {
        if (i == axis || from.stride[i] == 0) continue;
        to.stride[i] = count;
        count *= from.size[i];
    }
    return count;
}

struct Extremes { I low, high; };

template <typename T> static Extremes extremes_in(const T* from, I count, I stride) {
    T low = from[0], high = from[0];
    if (stride == 1)
        for (I i = 0; i < count; i++) low = from[i] < low ? from[i] : low, high = from[i] > high ? from[i] : high;
    else
        for (const T* end = from + count * stride; count--;) {
            end -= stride;
            low = *end < low ? *end : low, high = *end > high ? *end : high;
        }
    return {(I)low, (I)high};
}

// Of the elements first..last (included) of the line along an axis that starts at `at`.
static Extremes extremes_of(const Source& from, int axis, I at, I first, I last) {
    I stride = from.stride[axis], count = last - first + 1;
    at += first * stride;
    if (from.type <= 1) return extremes_in((const uint8_t*)from.data + at, count, stride);
    if (from.type == 2) return extremes_in((const int32_t*)from.data + at, count, stride);
    return extremes_in((const int64_t*)from.data + at, count, stride);
}

static void fill_summary(const Summary& to, const Source& from, int axis) {
    I size[4], index[4] = {}, blocks = summary_blocks(from, axis);
    for (int i = 0; i < 4; i++) size[i] = i != axis && to.stride[i] ? from.size[i] : 1;
    for (;;) {
        I at = 0, found = 0;
        for (int i = 0; i < 4; i++) at += index[i] * from.stride[i], found += index[i] * to.stride[i];
        for (I block = 0; block < blocks; block++) {
            I first = block * SUMMARY_BLOCK, last = least(first + SUMMARY_BLOCK, from.size[axis]) - 1;
            Extremes of = extremes_of(from, axis, at, first, last);
            to.least[found + block] = of.low, to.greatest[found + block] = of.high;
        }
        int i = 3;
        while (i >= 0 && ++index[i] == size[i]) index[i--] = 0;
        if (i < 0) return;
    }
}

// Makes the summaries of a launch, in one piece of memory; null if it ran out.
static I* summarise(const Source* loads, Summary* to) {
    I total = 0;
    for (int i = 0; i < SUMMARIES; i++) total += 2 * shape_summary(to[i], loads[SUMMARISED[i][0]], SUMMARISED[i][1]);
    I *memory = (I*)malloc(sizeof(I) * most(1, total)), *at = memory;
    for (int i = 0; memory && i < SUMMARIES; i++) {
        const Source& from = loads[SUMMARISED[i][0]];
        I count = shape_summary(to[i], from, SUMMARISED[i][1]);
        to[i].least = at, to[i].greatest = at + count, at += 2 * count;
        if (count) fill_summary(to[i], from, SUMMARISED[i][1]);
    }
    return memory;
}

// A bound over the elements first..last along an axis, as `Bound` of expr.py says; `at` is the line's place in the
// tensor, `line` that in the summary.
static I bound_of(const Source& from, const Summary& by, int axis, I at, I line, I first, I last, bool greatest) {
    I size = from.size[axis];
    if (size == 0) return greatest ? FAR : -FAR;
    if (first < 0) first = 0, last = size - 1;
    first = least(first, size - 1), last = most(first, least(last, size - 1));
    I found = greatest ? -FAR : FAR;
    auto join = [&](I x) { found = greatest ? most(found, x) : least(found, x); };
    while (first <= last) {
        I block = first / SUMMARY_BLOCK, end = least(size, (block + 1) * SUMMARY_BLOCK) - 1;
        if (first == block * SUMMARY_BLOCK && end <= last) {
            join((greatest ? by.greatest : by.least)[line + block]);
        } else {
            Extremes part = extremes_of(from, axis, at, first, least(end, last));
            join(greatest ? part.high : part.low);
        }
        first = end + 1;
    }
    return found;
}

#if BIAS
// Lane i is x's where bit first + i of `bits` is set, else 0.
static inline Floats chosen(Floats x, uint64_t bits, int first) {
    Ints lane;
    for (int i = 0; i < W; i++) lane[i] = 1 << i;
    return (lane & (int32_t)(uint32_t)(bits >> first)) != 0 ? x : Floats{};
}

// Multiplies a row of what is added by its unit. Finite values stay finite also in units of log2, and the keys at -inf
// are dropped: returns the others.
static inline uint64_t finish_row(float* row, float unit) {
    const Floats high = Floats{} + FINITE / unit, low = -high, infinite = Floats{} + __builtin_inff();
    Ints dropped = {}, left = {};
    for (int v = 0; v < KB; v += W) {
        Floats x = *(AnyFloats*)(row + v), y = x < low ? low : x > high & x < infinite ? high : x;
        dropped |= x == -infinite;
        left |= x != -infinite;
        *(AnyFloats*)(row + v) = (x == -infinite ? x : y) * unit;
    }
    if (!any_lane(dropped)) return ~0ull;
    if (!any_lane(left)) return 0;
    uint64_t kept = 0;
    for (int j = 0; j < KB; j++) kept |= (uint64_t)(row[j] != -__builtin_inff()) << j;
    return kept;
}
#endif
