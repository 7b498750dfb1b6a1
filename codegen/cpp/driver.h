// From a launch to tiles: work items, a cache of packed tiles in each thread, and the loop over key tiles.

constexpr int BM = BLOCKS * MR; // most query rows of a tile: rows are queries of one head, or of several when few
constexpr int FEW_ROWS = 4 * MR; // so few that reading keys costs more than multiplying them: sum more exactly
constexpr I WORTH_A_THREAD = 64; // blocks of work, a quarter of a microsecond each
constexpr I CACHE_BYTES = 8 << 20, TOTAL_CACHE_BYTES = 64 << 20;

struct Item { I batch, kv_head, first, cost; }; // the queries first.. of the heads that share a KV head

struct Tag { I batch, kv_head, tile; };

struct Worker {
    Rows* rows;        // BLOCKS of them
    uint64_t* keep;    // BM
    float* add;        // BM * KB, with BIAS
    const float** lines; // BM of them: what is added to each row
    I* facts;          // FACTS for each of BM heads
    Interval* spans;   // of key tiles: MAX_BANDS for each of BM heads
    Tag* tags;         // of the packed tiles
    int32_t *keys, *values;
    I slots;
};

struct Plan {
    const Call* call;
    const Item* items;
    I count, work, step, slots, item_heads, item_rows; // work: blocks of rows that meet a tile, about
    char* memory;
    I worker_bytes;
    I next, worker; // atomic
};

// A query tile: `heads` heads from `head` on, `count` queries each from `first` on. Row r is query first + r % count.
struct Queries {
    I batch, kv_head, head, heads, first, count;
    const I* facts;
    I rows() const { return heads * count; }
    const I* facts_of(I h) const { return facts + (h - head) * FACTS; }
};

static char* carve(char*& at, I bytes) {
    char* found = at;
    at += (bytes + 63) / 64 * 64;
    return found;
}

static Worker worker_at(char* at, I slots) {
    Worker w;
    w.rows = (Rows*)carve(at, sizeof(Rows) * BLOCKS);
    w.keep = (uint64_t*)carve(at, sizeof(uint64_t) * BM);
    w.add = (float*)carve(at, BIAS ? sizeof(float) * BM * KB : 0);
    w.lines = (const float**)carve(at, BIAS ? sizeof(float*) * BM : 0);
    w.facts = (I*)carve(at, sizeof(I) * BM * FACTS);
    w.spans = (Interval*)carve(at, sizeof(Interval) * BM * MAX_BANDS);
    w.tags = (Tag*)carve(at, sizeof(Tag) * slots);
    w.keys = (int32_t*)carve(at, 4 * K_TILE * slots);
    w.values = (int32_t*)carve(at, 4 * V_TILE * slots);
    w.slots = slots;
    return w;
}

static I worker_bytes(I slots) {
    char* start = (char*)64;
    Worker w = worker_at(start, slots);
    return ((char*)(w.values + V_TILE * slots) - start + 127) / 64 * 64;
}

// The slot of a packed tile of keys and values, packed now unless it is there.
static I packed(const Call& c, Worker& w, I batch, I kv_head, I tile) {
    I slot = tile % w.slots;
    Tag& tag = w.tags[slot];
    if (tag.batch == batch && tag.kv_head == kv_head && tag.tile == tile) return slot;
    tag = {batch, kv_head, tile};
    I start = tile * KB, count = least(KB, c.k_len - start);
    const Element* k = (const Element*)c.k + batch * c.ks[0] + kv_head * c.ks[1] + start * c.ks[2];
    const Element* v = (const Element*)c.v + batch * c.vs[0] + kv_head * c.vs[1] + start * c.vs[2];
    pack_keys(w.keys + slot * K_TILE, k, c.ks[2], c.ks[3], (int)count);
    pack_values(w.values + slot * V_TILE, v, c.vs[2], c.vs[3], (int)count);
    return slot;
}

// The spans of key tiles that the bands of a query tile meet, in order and apart; returns how many.
static I spans_of(const Call& c, const Queries& t, Interval* spans) {
    I count = 0, q0 = t.first + c.offset;
    for (I h = t.head; h < t.head + t.heads; h++) {
        if (h > t.head && c.rules[h] == c.rules[h - 1] && !RULES_USE_HEAD) continue;
        Interval found[MAX_BANDS];
        int bands = bands_of(c.rules[h], c, t.batch, h, q0, q0 + t.count - 1, found);
        for (int i = 0; i < bands; i++) {
            I low = most(0, found[i].low), high = least(c.k_len, found[i].high);
            if (low >= high) continue;
            Interval span = {low / KB, (high + KB - 1) / KB};
            I at = count++;
            for (; at > 0 && spans[at - 1].low > span.low; at--) spans[at] = spans[at - 1];
            spans[at] = span;
        }
    }
    I kept = 0;
    for (I i = 0; i < count; i++) {
        if (kept && spans[i].low <= spans[kept - 1].high)
            spans[kept - 1].high = most(spans[kept - 1].high, spans[i].high);
        else
            spans[kept++] = spans[i];
    }
    return kept;
}

// Asks what rules want to know of data for these queries, whatever the keys.
static void ask(const Call& c, Queries& t, I* facts) {
    I q0 = t.first + c.offset;
    t.facts = facts;
    for (I h = t.head; FACTS && h < t.head + t.heads; h++, facts += FACTS) {
        if (h > t.head && c.rules[h] == c.rules[h - 1] && !RULES_USE_HEAD)
            memcpy(facts, facts - FACTS, sizeof(I) * FACTS);
        else
            ask_of(c.rules[h], c, t.batch, h, q0, q0 + t.count - 1, facts);
    }
}

// Which keys of a tile each row keeps.
static void fill_keep(const Call& c, const Worker& w, const Queries& t, I k0, int keys) {
    I q0 = t.first + c.offset, q1 = q0 + t.count - 1, k1 = k0 + keys - 1;
    uint64_t inside = first_keys(keys), *keep = w.keep;
    for (I h = t.head; h < t.head + t.heads; h++, keep += t.count) {
        int rule = c.rules[h];
        if (empty_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1)) {
            memset(keep, 0, sizeof(uint64_t) * t.count);
        } else if (full_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1)) {
            for (I i = 0; i < t.count; i++) keep[i] = inside;
        } else {
            rows_of(rule, c, t.batch, h, q0, t.count, k0, keys, keep);
            for (I i = 0; i < t.count; i++) keep[i] &= inside;
        }
    }
    for (I r = t.rows(); r < BM; r++) w.keep[r] = 0;
}

// A tile's place: 0 nothing is kept, 1 some, 2 all of it.
static int class_of(const Call& c, const Queries& t, I k0, I keys) {
    I q0 = t.first + c.offset, q1 = q0 + t.count - 1, k1 = k0 + keys - 1;
    bool all = keys == KB, none = true;
    for (I h = t.head; h < t.head + t.heads && (all || none); h++) {
        if (h > t.head && c.rules[h] == c.rules[h - 1] && !RULES_USE_HEAD) continue;
        none = none && empty_of(c.rules[h], c, t.facts_of(h), t.batch, h, q0, q1, k0, k1);
        all = all && full_of(c.rules[h], c, t.facts_of(h), t.batch, h, q0, q1, k0, k1);
    }
    return none ? 0 : all ? 2 : 1;
}

#if BIAS
static void add_biases(const Call& c, Worker& w, const Queries& t, I k0, int keys) {
    for (I h = 0; h < t.heads; h++)
        add_bias(c, t.batch, t.head + h, t.first + c.offset, t.count, k0, keys, w.add + h * t.count * KB,
                 w.lines + h * t.count, w.keep + h * t.count);
    for (I r = t.rows(); r < (t.rows() + MR - 1) / MR * MR; r++) w.lines[r] = w.lines[0];
}
#endif

static void meet_tile(const Call& c, Worker& w, const Queries& t, I tile, const Scoring& scoring) {
    I k0 = tile * KB, keys = least(KB, c.k_len - k0);
    int kind = class_of(c, t, k0, keys);
    if (kind == 0) return;
    bool marked = BIAS || kind == 1; // an added -inf drops a key of a full tile
    if (marked) fill_keep(c, w, t, k0, (int)keys);
#if BIAS
    add_biases(c, w, t, k0, (int)keys);
#endif
    I slot = -1;
    for (I block = 0; block * MR < t.rows(); block++) {
        const uint64_t* keep = w.keep + block * MR;
        uint64_t any = 0, all = ~0ull;
        for (int r = 0; r < MR && marked; r++) {
            any |= keep[r];
            all &= block * MR + r < t.rows() ? keep[r] : ~0ull;
        }
        if (marked && !any) continue;
        if (slot < 0) slot = packed(c, w, t.batch, t.kv_head, tile);
        bool whole = !marked || all == ~0ull;
        Masks masks = {whole ? nullptr : keep, BIAS ? w.lines + block * MR : nullptr};
        meet(w.rows[block], (const float*)(w.keys + slot * K_TILE), (const float*)(w.values + slot * V_TILE),
             scoring, whole && !BIAS ? nullptr : &masks);
    }
}

// A row's sum starts at nothing, or with the weight of a logit that has no value.
static void start_row(const Call& c, Rows& rows, int i, const Queries& t, I r) {
    rows.sum[i] = Floats{};
    rows.reference[i] = NOTHING;
#if SINK
    float logit = r < t.rows() ? sink_of(c, t.batch, t.head + r / t.count, t.first + r % t.count + c.offset) : 0;
    if (logit == -__builtin_inff()) return;
    rows.reference[i] = logit;
    rows.sum[i][0] = 1;
#endif
}

static void start_rows(const Call& c, Worker& w, const Queries& t) {
    const Element* q = (const Element*)c.q + t.batch * c.qs[0];
    for (I block = 0; block * MR < t.rows(); block++) {
        Rows& rows = w.rows[block];
        const Element* from[MR];
        for (int i = 0; i < MR; i++) {
            I r = block * MR + i;
            from[i] = r < t.rows() ? q + (t.head + r / t.count) * c.qs[1] + (t.first + r % t.count) * c.qs[2] : nullptr;
            start_row(c, rows, i, t, r);
        }
        memset(rows.out, 0, sizeof rows.out);
        pack_queries(rows.q, from, c.qs[3], (c.scale > 0) - (c.scale < 0));
    }
}

static void query_tile(const Call& c, Worker& w, Queries t) {
    constexpr double UNIT = BIAS ? 1 : 1.4426950408889634;
    double scale = c.scale == 0 ? 1 : c.scale < 0 ? -c.scale : c.scale; // pack_queries has the sign, and a zero
    Scoring scoring = {(float)((SOFTCAP ? c.softcap : scale) * UNIT), (float)(SOFTCAP ? scale / c.softcap : 0),
                       PAIR == 2 ? DK : t.rows() <= FEW_ROWS ? 16 : 64};
    start_rows(c, w, t);
    ask(c, t, w.facts);
    I spans = spans_of(c, t, w.spans);
    for (I i = 0; i < spans; i++)
        for (I tile = w.spans[i].low; tile < w.spans[i].high; tile++) meet_tile(c, w, t, tile, scoring);
    for (I r = 0; r < t.rows(); r++) {
        Element* to = (Element*)c.out + t.batch * c.os[0] + (t.head + r / t.count) * c.os[1]
                      + (t.first + r % t.count) * c.os[2];
        store_row(to, c.os[3], w.rows[r / MR], r % MR);
    }
}

static Queries queries_of(const Call& c, const Item& item, I head, I heads, I rows) {
    return {item.batch, item.kv_head, head, heads, item.first, least(rows, c.q_len - item.first), nullptr};
}

static void work(void* argument) {
    Plan& plan = *(Plan*)argument;
    const Call& c = *plan.call;
    I number = __atomic_fetch_add(&plan.worker, 1, __ATOMIC_RELAXED), group = c.heads / c.kv_heads;
    if (number >= c.threads) return;
    Worker w = worker_at(plan.memory + number * plan.worker_bytes, plan.slots);
    for (I i = 0; i < w.slots; i++) w.tags[i].tile = -1;
    for (;;) {
        I from = __atomic_fetch_add(&plan.next, plan.step, __ATOMIC_RELAXED);
        if (from >= plan.count) return;
        for (I i = from; i < least(from + plan.step, plan.count); i++) {
            const Item& item = plan.items[i];
            I first = item.kv_head * group;
            for (I h = first; h < first + group; h += plan.item_heads)
                query_tile(c, w, queries_of(c, item, h, least(plan.item_heads, first + group - h), plan.item_rows));
        }
    }
}

static int longest_first(const void* a, const void* b) {
    const Item &x = *(const Item*)a, &y = *(const Item*)b;
    if (x.cost != y.cost) return x.cost > y.cost ? -1 : 1;
    return a < b ? -1 : 1; // items of one cost stay in order, so neighbours share packed tiles
}

// About how many key tiles an item's queries meet: those in its spans, less those that data empties.
static I cost_of(const Call& c, const Plan& plan, const Item& item, Interval* spans, I* facts) {
    I group = c.heads / c.kv_heads, first = item.kv_head * group, tiles = 0;
    for (I h = first; h < first + group; h += plan.item_heads) {
        Queries t = queries_of(c, item, h, least(plan.item_heads, first + group - h), plan.item_rows);
        if (SUMMARIES) ask(c, t, facts);
        I count = spans_of(c, t, spans);
        for (I i = 0; i < count; i++) {
            if (!SUMMARIES) tiles += spans[i].high - spans[i].low;
            for (I tile = spans[i].low; SUMMARIES && tile < spans[i].high; tile++)
                tiles += class_of(c, t, tile * KB, least(KB, c.k_len - tile * KB)) != 0;
        }
    }
    int shift = 0; // keep the three leading bits: items of about one cost are of one cost
    while (tiles >> shift > 7) shift++;
    return tiles >> shift << shift;
}

// Whether the query heads of a KV head have the rules of those of the one before, and so its costs.
static bool costs_as_before(const Call& c, I kv_head) {
    I group = c.heads / c.kv_heads;
    const int32_t* rules = c.rules + kv_head * group;
    return kv_head > 0 && !RULES_USE_HEAD && !memcmp(rules, rules - group, sizeof(int32_t) * group);
}

static void fill_items(const Call& c, Plan& plan, Item* items) {
    Item* item = items;
    Interval* spans = (Interval*)malloc(sizeof(Interval) * BM * MAX_BANDS + sizeof(I) * BM * FACTS);
    I* facts = (I*)(spans + BM * MAX_BANDS);
    for (I b = 0; b < c.b; b++)
        for (I h = 0; h < c.kv_heads; h++) {
            const Item* before = costs_as_before(c, h) ? item - plan.count / (c.b * c.kv_heads) : nullptr;
            for (I first = 0; first < c.q_len; first += plan.item_rows, item++) {
                *item = {b, h, first, 0};
                item->cost = before ? before++->cost : spans ? cost_of(c, plan, *item, spans, facts) : 0;
            }
        }
    free(spans);
    for (I i = 0; i < plan.count; i++)
        plan.work += items[i].cost * (4 + (plan.item_rows * plan.item_heads + MR - 1) / MR);
    qsort(items, plan.count, sizeof(Item), longest_first);
}

// Runs a launch. Returns 0, or 1 if memory ran out (then nothing useful is in the output).
extern "C" int sparsify_run(const Call* call) {
    Call c = *call;
    if (c.b == 0 || c.heads == 0 || c.q_len == 0) return 0;
    I group = c.heads / c.kv_heads, tiles = most(1, (c.k_len + KB - 1) / KB);
    Summary summaries[SUMMARIES + 1];
    I* summary = summarise(c.loads, summaries);
    if (!summary) return 1;
    c.summaries = summaries;
    Plan plan = {};
    plan.call = &c;
    plan.item_rows = least(BM, c.q_len);
    plan.item_heads = most(1, least(group, BM / plan.item_rows));
    plan.count = c.b * c.kv_heads * ((c.q_len + plan.item_rows - 1) / plan.item_rows);
    Item* items = (Item*)malloc(sizeof(Item) * plan.count);
    if (!items) {
        free(summary);
        return 1;
    }
    plan.items = items;
    fill_items(c, plan, items);
    c.threads = c.parallel ? most(1, least(c.threads, least(plan.count, plan.work / WORTH_A_THREAD))) : 1;
    plan.step = most(1, least(8, plan.count / (c.threads * 8)));
    bool once = plan.item_rows == c.q_len && plan.item_heads == group; // no two query tiles share keys, as in decoding
    I budget = least(CACHE_BYTES, TOTAL_CACHE_BYTES / c.threads) / (4 * (K_TILE + V_TILE));
    plan.slots = once ? 1 : most(1, least(tiles, budget));
    plan.worker_bytes = worker_bytes(plan.slots);
    plan.memory = (char*)aligned_alloc(64, plan.worker_bytes * c.threads);
    if (plan.memory) {
        if (c.threads == 1) work(&plan);
        else c.parallel(work, &plan, (unsigned)c.threads, 0);
    }
    bool failed = !plan.memory;
    free(items);
    free(summary);
    free(plan.memory);
    return failed;
}
