// Work split into equal parts, where items are few for the threads or uneven, as in decoding (the stream-K of
// LeanAttention): the key tiles of all items are one line of work, and each part is an equal piece of it. An item that
// lies in several parts has a state of its rows for each; who is done last joins these in the order of the keys, so
// what comes out does not depend on who that is. A skip compares with the largest score of its own part.

constexpr I WORTH_A_SPLIT = 8; // an item is split that is longer than a part divided by this

struct Item { I batch, kv_head, first, cost; }; // the queries first.. of the heads that share a KV head

struct Split {
    I parts, total;  // how many, and of how many tiles together; 0 parts where nothing is split
    I *starts;       // where each item starts in the line, and where the last one ends
    I *done;         // of each item, how many of its parts are done: atomic
    I blocks;        // of rows in a state
    Rows* states;    // two for each part: of an item that it begins with, and of one that goes on behind it
};

// Whether splitting pays: whether a thread could have much more to do than others.
static bool worth_a_split(const Item* items, I count, I threads) {
    I total = 0, longest = 0;
    for (I i = 0; i < count; i++) total += items[i].cost, longest = most(longest, items[i].cost);
    return threads > 1 && longest * threads * WORTH_A_SPLIT > total;
}

// Lays out a line of items in natural order. An item without tiles counts as one: its rows are written. Returns false
// if memory ran out.
static bool split(Split& to, const Item* items, I count, I parts, I blocks) {
    to.starts = (I*)calloc(2 * count + 1, sizeof(I));
    if (!to.starts) return false;
    to.done = to.starts + count + 1;
    for (I i = 0; i < count; i++) to.starts[i + 1] = to.starts[i] + most(1, items[i].cost);
    to.total = to.starts[count], to.parts = least(parts, to.total), to.blocks = blocks;
    to.states = (Rows*)aligned_alloc(64, sizeof(Rows) * 2 * to.parts * blocks);
    return to.states;
}

static I start_of(const Split& s, I part) { return s.total * part / s.parts; }
static I part_of(const Split& s, I number) { return ((number + 1) * s.parts - 1) / s.total; } // that has a tile

// The state of an item that starts at `start` for a part.
static Rows* state_of(const Split& s, I start, I part) {
    return s.states + (2 * part + (start > start_of(s, part))) * s.blocks;
}

// Joins states of the same rows, those of an item's parts first..last, in the first one.
static Rows* join(const Split& s, I start, I first, I last) {
    Rows* to = state_of(s, start, first);
    for (I row = 0; row < s.blocks * MR; row++) {
        I block = row / MR, r = row % MR;
        float top = to[block].reference[r];
        for (I part = first + 1; part <= last; part++) {
            float other = state_of(s, start, part)[block].reference[r];
            top = other > top ? other : top;
        }
        for (I part = first; part <= last; part++) {
            const Rows& from = state_of(s, start, part)[block];
            float weight = from.reference[r] == top ? 1.0f : exp2_of(from.reference[r] - top);
            to[block].sum[r] = (part > first ? to[block].sum[r] : Floats{}) + from.sum[r] * weight;
            for (int panel = 0; panel < DVV; panel += NR) {
                int width = (DVV - panel < NR ? DVV - panel : NR) * W, at = panel * W * MR + r * width;
                for (int i = at; i < at + width; i++)
                    to[block].out[i] = (part > first ? to[block].out[i] : 0) + from.out[i] * weight;
            }
        }
        to[block].reference[r] = top;
    }
    return to;
}

// Takes an item through a part, and stores its rows if all of it is done. `queries` are those of the item.
static void work_item(const Call& c, Split& s, Worker w, const QueryTile& queries, I item, I part) {
    I start = s.starts[item], end = s.starts[item + 1], first = part_of(s, start), last = part_of(s, end - 1);
    if (first < last) w.rows = state_of(s, start, part);
    I from = most(0, start_of(s, part) - start), to = part < last ? start_of(s, part + 1) - start : FAR;
    meet_part(c, w, queries, {from, to});
    if (__atomic_add_fetch(&s.done[item], 1, __ATOMIC_ACQ_REL) <= last - first) return;
    store_rows(c, w, first < last ? join(s, start, first, last) : w.rows, queries);
}
