// What a thread works with: its memory, and what query tiles, key tiles and parts of the way through these are.

constexpr int BM = BLOCKS * MR; // most query rows of a tile: rows are queries of one head, or of several when few
constexpr int FEW_ROWS = 4 * MR; // so few that reading keys costs more than multiplying them: sum more exactly

struct Tag { I batch, kv_head, tile; };

// Of the key tiles that a query tile goes through, in order, those from number `from` on and before number `to`.
struct Part {
    I from, to;
    bool has(I number) const { return number >= from && number < to; }
    Part behind(I number) const { return {from - number, to - number}; } // the same, counted from number `number` on
};

struct Worker {
    Rows* rows;        // BLOCKS of them
    uint64_t* keep;    // BM
    float* add;        // BM * KB, with BIAS
    const float** lines; // BM of them: what is added to each row
    I* facts;          // FACTS for each of BM heads
    I* row_facts;      // ROW_FACTS for each of BM rows
    bool* prepared;    // of each of BM heads: whether its rows' facts are there
    Interval* spans;   // of key tiles: MAX_BANDS for each of BM heads
    List* lists;       // LISTS for each of BM heads
    int32_t* rules;    // of each of BM heads in the list that is gone through
    Tag* tags;         // of the packed tiles
    int32_t *keys, *values; // tiles in `slots` slots, and with GATHERS one more for keys that were gathered
    bool* infinite;    // of each of these, whether some value is infinite or no number; of pairs only
    int32_t* cleared;  // a tile of values without those of dropped keys; of pairs only
    I slots;
    I* stored;         // how many rows of the output all threads have written, where slots may not hold all: atomic
    bool direct;       // whether keys and values are read where they lie
};

// A query tile: `heads` heads from `head` on, `count` queries each from `first` on. Row r is query first + r % count.
// What it goes through keeps by rule rules[i] for its i-th head, nothing where that is -1.
struct QueryTile {
    I batch, kv_head, head, heads, first, count;
    const int32_t* rules;
    const I* facts;
    I rows() const { return heads * count; }
    int rule_of(I h) const { return rules[h - head]; }
    const I* facts_of(I h) const { return facts + (h - head) * FACTS; }
    bool as_before(I h) const { return h > head && rule_of(h) == rule_of(h - 1) && !RULES_USE_HEAD; }
};

// A key tile: `count` keys from first to last, those between them or, with `at`, some of them. next: the first key of the
// next tile on the way, which may turn out empty; -1 where that isn't known.
struct KeyTile {
    I first, last;
    int count;
    const int32_t* at;
    I next = -1;
};

static KeyTile tile_of(const Call& c, I tile, I next_tile = -1) {
    I first = tile * KB, count = least(KB, c.k_slots - first);
    return {first, first + count - 1, (int)count, nullptr, next_tile < 0 ? -1 : next_tile * KB};
}

static char* carve(char*& at, I bytes) {
    char* found = at;
    at += (bytes + 63) / 64 * 64;
    return found;
}

static Worker worker_at(char* at, I slots) {
    Worker w;
    I tiles = slots + GATHERS;
    w.rows = (Rows*)carve(at, sizeof(Rows) * BLOCKS);
    w.keep = (uint64_t*)carve(at, sizeof(uint64_t) * BM);
    w.add = (float*)carve(at, BIAS ? sizeof(float) * BM * KB : 0);
    w.lines = (const float**)carve(at, BIAS ? sizeof(float*) * BM : 0);
    w.facts = (I*)carve(at, sizeof(I) * BM * FACTS);
    w.row_facts = (I*)carve(at, sizeof(I) * BM * ROW_FACTS);
    w.prepared = (bool*)carve(at, BM);
    w.spans = (Interval*)carve(at, sizeof(Interval) * BM * MAX_BANDS);
    w.lists = (List*)carve(at, sizeof(List) * BM * LISTS);
    w.rules = (int32_t*)carve(at, sizeof(int32_t) * BM);
    w.tags = (Tag*)carve(at, sizeof(Tag) * slots);
    w.keys = (int32_t*)carve(at, 4 * K_TILE * tiles);
    w.values = (int32_t*)carve(at, 4 * V_TILE * tiles);
    w.infinite = (bool*)carve(at, tiles);
    w.cleared = (int32_t*)carve(at, PAIR == 2 ? 4 * V_TILE : 0);
    w.slots = slots;
    return w;
}

static I worker_bytes(I slots) {
    char* start = (char*)64;
    Worker w = worker_at(start, slots);
    return ((char*)(w.cleared + (PAIR == 2 ? V_TILE : 0)) - start + 127) / 64 * 64;
}
