// From a launch to query tiles: work items, the longest first, and threads that take them.

constexpr I WORTH_A_THREAD = 64; // blocks of work, a quarter of a microsecond each
constexpr I DIRECT_WORK = 12; // of a tile that few rows meet, which waits for memory
constexpr I TILE_WORK = 4; // of a packed tile beside its blocks: its keys are classed, and packed or fetched
constexpr I MANY_ITEMS = 32; // for one thread
constexpr I TOTAL_CACHE_BYTES = 64 << 20;
constexpr I FRESH_BYTES = 32 << 20; // from so many on an allocator takes new memory each time
constexpr uintptr_t HUGE = 2 << 20; // bytes of a large page

struct Plan {
    const Call* call;
    const Item* items; // query tiles, in the order in which threads take them
    I count;           // of the items
    I work;            // of all items: blocks of rows that meet a tile, about
    I longest;         // key tiles that an item meets, at most
    I step;            // items that a thread takes at once
    I item_heads;      // query heads of an item
    I item_rows;       // queries of each of these heads
    I blocks;          // of MR rows in an item
    I slots;           // packed key tiles that a thread keeps
    char* memory;      // of all workers, one behind the other
    I worker_bytes;    // of each
    Split split;       // into equal parts; of 0 parts where threads take whole items
    bool once;         // whether no two items share keys, as in decoding
    bool direct;       // whether keys are read where they lie
    I next;            // the first item or part that no thread has taken: atomic
    I worker;          // how many workers have begun: atomic
    I stored;          // rows of the output that were written, counted with a layout of queries: atomic
};

static QueryTile queries_of(const Call& c, const Item& item, I head, I heads, I rows) {
    I count = least(rows, c.q_slots - item.first);
    return {item.batch, item.kv_head, head, heads, item.first, count, c.rules + head, nullptr};
}

static void work_items(Plan& plan, Worker& w) {
    const Call& c = *plan.call;
    I group = c.heads / c.kv_heads;
    for (;;) {
        I from = __atomic_fetch_add(&plan.next, plan.step, __ATOMIC_RELAXED);
        if (from >= plan.count) return;
        for (I i = from; i < least(from + plan.step, plan.count); i++) {
            const Item& item = plan.items[i];
            I first = item.kv_head * group;
            for (I h = first; h < first + group; h += plan.item_heads) {
                QueryTile t = queries_of(c, item, h, least(plan.item_heads, first + group - h), plan.item_rows);
                meet_part(c, w, t, {0, FAR});
                store_rows(c, w, w.rows, t);
            }
        }
    }
}

static void work_parts(Plan& plan, Worker& w) {
    const Call& c = *plan.call;
    Split& split = plan.split;
    for (;;) {
        I part = __atomic_fetch_add(&plan.next, 1, __ATOMIC_RELAXED);
        if (part >= split.parts) return;
        for (I i = 0; i < plan.count && split.starts[i] < start_of(split, part + 1); i++) {
            if (split.starts[i + 1] <= start_of(split, part)) continue;
            const Item& item = plan.items[i];
            I head = item.kv_head * plan.item_heads;
            work_item(c, split, w, queries_of(c, item, head, plan.item_heads, plan.item_rows), i, part);
        }
    }
}

static void work(void* argument) {
    Plan& plan = *(Plan*)argument;
    I number = __atomic_fetch_add(&plan.worker, 1, __ATOMIC_RELAXED);
    if (number >= plan.call->threads) return;
    Worker w = worker_at(plan.memory + number * plan.worker_bytes, plan.slots);
    w.direct = plan.direct;
    w.stored = &plan.stored;
    for (I i = 0; i < w.slots; i++) w.tags[i].tile = -1;
    plan.split.parts ? work_parts(plan, w) : work_items(plan, w);
}

static int longest_first(const void* a, const void* b) {
    const Item &x = *(const Item*)a, &y = *(const Item*)b;
    if (x.cost != y.cost) return x.cost > y.cost ? -1 : 1;
    // Items of one cost stay in order, so neighbours share packed tiles.
    if (x.batch != y.batch) return x.batch < y.batch ? -1 : 1;
    if (x.kv_head != y.kv_head) return x.kv_head < y.kv_head ? -1 : 1;
    return x.first < y.first ? -1 : x.first > y.first;
}

// About how many key tiles an item's queries meet: those in its spans, less those that data empties, and its lists'.
static I cost_of(const Call& c, const Plan& plan, const Item& item, Interval* spans, List* lists, I* facts) {
    I group = c.heads / c.kv_heads, first = item.kv_head * group, tiles = 0;
    for (I h = first; h < first + group; h += plan.item_heads) {
        QueryTile t = queries_of(c, item, h, least(plan.item_heads, first + group - h), plan.item_rows);
        if (SUMMARIES) ask(c, t, facts);
        I count = spans_of(c, t, spans);
        for (I i = 0; i < count; i++) {
            if (!SUMMARIES) tiles += spans[i].high - spans[i].low;
            for (I tile = spans[i].low; SUMMARIES && tile < spans[i].high; tile++)
                tiles += class_of(c, t, tile_of(c, tile)) != 0;
        }
        I listed = lists_of(c, t, lists);
        for (I i = 0; i < listed; i++)
            if (!met_before(lists, i)) tiles += tiles_of(lists[i]);
    }
    return tiles;
}

// A cost by its leading bits, so that items of about one cost are of one cost and stay in order: tiles that one packs
// serve the next. Few bits where threads have many items each, and the last ones even out who is done first.
static I about(I cost, I items_per_thread) {
    int shift = 0, limit = items_per_thread >= MANY_ITEMS ? 1 : 7;
    while (cost >> shift > limit) shift++;
    return cost >> shift << shift;
}

// Whether the query heads of a KV head have the rules of those of the one before, and so its costs.
static bool costs_as_before(const Call& c, I kv_head) {
    I group = c.heads / c.kv_heads;
    const int32_t* rules = c.rules + kv_head * group;
    return kv_head > 0 && !LISTS && !RULES_USE_HEAD && !memcmp(rules, rules - group, sizeof(int32_t) * group);
}

static void fill_items(const Call& c, Plan& plan, Item* items) {
    Item* item = items;
    constexpr I PER_HEAD = sizeof(Interval) * MAX_BANDS + sizeof(List) * LISTS + sizeof(I) * FACTS;
    Interval* spans = (Interval*)malloc(PER_HEAD * BM);
    List* lists = (List*)(spans + BM * MAX_BANDS);
    I* facts = (I*)(lists + BM * LISTS);
    for (I b = 0; b < c.b; b++)
        for (I h = 0; h < c.kv_heads; h++) {
            const Item* before = costs_as_before(c, h) ? item - plan.count / (c.b * c.kv_heads) : nullptr;
            for (I first = 0; first < c.q_slots; first += plan.item_rows, item++) {
                *item = {b, h, first, 0};
                item->cost = before ? before++->cost : spans ? cost_of(c, plan, *item, spans, lists, facts) : 0;
            }
        }
    free(spans);
    for (I i = 0; i < plan.count; i++) {
        plan.work += items[i].cost * (plan.direct ? DIRECT_WORK : TILE_WORK + plan.blocks);
        plan.longest = most(plan.longest, items[i].cost);
    }
}

// Decides how many threads take part, and whether items are split between them, which is for query tiles that share no
// keys; else puts the longest first. Returns false if memory ran out.
static bool share_out(Call& c, Plan& plan, Item* items) {
    I worth = c.parallel ? most(1, least(c.threads, plan.work / WORTH_A_THREAD)) : 1;
    if (plan.once && worth_a_split(items, plan.count, worth)) {
        c.threads = worth;
        return split(plan.split, items, plan.count, worth * PARTS_A_THREAD, plan.blocks);
    }
    for (I i = 0; i < plan.count; i++) items[i].cost = about(items[i].cost, plan.count / c.threads);
    qsort(items, plan.count, sizeof(Item), longest_first);
    c.threads = least(worth, plan.count);
    plan.step = most(1, least(ITEMS_AT_ONCE, plan.count / (c.threads * 8)));
    return true;
}

// Asks for large pages under an output that no one wrote to yet: of small ones each is a fault, and these took 7 % of the
// time where little is kept. What is smaller is memory that the allocator has used before.
static void use_large_pages(const Call& c) {
#ifdef MADV_HUGEPAGE
    I last = (c.b - 1) * c.os[0] + (c.heads - 1) * c.os[1] + (c.q_len - 1) * c.os[2] + (DV - 1) * c.os[3] + 1;
    uintptr_t from = ((uintptr_t)c.out + HUGE - 1) & -HUGE, to = (uintptr_t)((Element*)c.out + last) & -HUGE;
    if (last * (I)sizeof(Element) >= FRESH_BYTES && to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// How a launch is cut into items, which are yet to be filled in.
static Plan plan_of(const Call& c) {
    I group = c.heads / c.kv_heads;
    Plan plan = {};
    plan.call = &c;
    plan.item_rows = least(TILE_ROWS, c.q_slots);
    plan.item_heads = most(1, least(group, BM / plan.item_rows));
    plan.count = c.b * c.kv_heads * ((c.q_slots + plan.item_rows - 1) / plan.item_rows);
    plan.blocks = (plan.item_rows * plan.item_heads + MR - 1) / MR;
    plan.once = plan.item_rows == c.q_slots && plan.item_heads == group;
    plan.direct = READS && plan.once && c.q_slots * group <= DIRECT_ROWS && c.ks[3] == 1 && c.vs[3] == 1;
    return plan;
}

// How many packed key tiles a thread keeps: twice what an item meets, which stays in a near cache. An odd number:
// strides don't meet in a few slots.
static I slots_of(const Call& c, const Plan& plan) {
    if (plan.once) return 1;
    I tiles = most(1, (c.k_slots + KB - 1) / KB), near = 2 * plan.longest + 1;
    I budget = least(CACHE_BYTES, TOTAL_CACHE_BYTES / c.threads) / (4 * (K_TILE + V_TILE));
    return most(1, least(tiles, least(budget, LISTS || SUMMARIES ? budget : near)));
}

// Has the threads do what was shared out. Returns false if memory ran out.
static bool run_plan(const Call& c, Plan& plan) {
    plan.slots = slots_of(c, plan);
    plan.worker_bytes = worker_bytes(plan.slots);
    plan.memory = (char*)aligned_alloc(64, plan.worker_bytes * c.threads);
    if (!plan.memory) return false;
    if (c.threads == 1) work(&plan);
    else c.parallel(work, &plan, (unsigned)c.threads, 0);
    free(plan.memory);
#if QUERY_LAYOUT
    if (plan.stored < c.b * c.heads * c.q_len) return store_nothing(c);
#endif
    return true;
}

// Plans a launch whose data are summarised, and runs it. Returns false if memory ran out.
static bool attend(Call& c) {
    Plan plan = plan_of(c);
    Item* items = (Item*)malloc(sizeof(Item) * plan.count);
    if (!items) return false;
    plan.items = items;
    fill_items(c, plan, items);
    bool done = share_out(c, plan, items) && run_plan(c, plan);
    free(items);
    free(plan.split.starts);
    free(plan.split.states);
    return done;
}

// Runs a launch. Returns 0, or 1 if memory ran out (then nothing useful is in the output).
extern "C" int sparsify_run(const Call* call) {
    Call c = *call;
    if (c.b == 0 || c.heads == 0 || c.q_len == 0) return 0;
#if QUERY_LAYOUT
    if (c.q_slots == 0) return !store_nothing(c);
#endif
    use_large_pages(c);
    Summary summaries[SUMMARIES + 1];
    I* summary = summarise(c.loads, summaries);
    if (!summary) return 1;
    c.summaries = summaries;
    bool done = attend(c);
    free(summary);
    return !done;
}
