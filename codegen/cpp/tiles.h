// Query tiles: a cache of packed key tiles in each thread, and the loops over the key tiles that a query tile meets, in
// order by its rules' bands and then those of its lists. Positions are slots; without a layout these are tokens.

// Where the rows of a tile's keys and values lie.
static Direct addresses_of(const Call& c, const QueryTile& t, const KeyTile& keys) {
    Direct rows = {};
    I on = KEY_LAYOUT || keys.next < 0 ? 0 : keys.next - keys.first;
    rows.keys_ahead = on * c.ks[2], rows.values_ahead = on * c.vs[2];
    const Element* k = (const Element*)c.k + t.batch * c.ks[0] + t.kv_head * c.ks[1];
    const Element* v = (const Element*)c.v + t.batch * c.vs[0] + t.kv_head * c.vs[1];
    for (int j = 0; j < keys.count; j++) {
        I row = keys.at ? keys.at[j] : keys.first + j;
#if KEY_LAYOUT
        row = key_token(c, t.batch, t.kv_head * (c.heads / c.kv_heads), row);
        if (row < 0) continue;
#endif
        rows.key[j] = k + row * c.ks[2], rows.value[j] = v + row * c.vs[2];
    }
    return rows;
}

// The slot of a packed tile of keys and values, packed now unless it is there.
static I packed(const Call& c, Worker& w, const QueryTile& t, const KeyTile& keys) {
    I tile = keys.first / KB, slot = keys.at ? w.slots : tile % w.slots;
    if (!keys.at) {
        Tag& tag = w.tags[slot];
        if (tag.batch == t.batch && tag.kv_head == t.kv_head && tag.tile == tile) return slot;
        tag = {t.batch, t.kv_head, tile};
    }
    Direct rows = addresses_of(c, t, keys);
    pack_keys(w.keys + slot * K_TILE, rows.key, c.ks[3], rows.value);
    pack_values(w.values + slot * V_TILE, rows.value, c.vs[3]);
    w.infinite[slot] = PAIR == 2 && any_infinite(w.values + slot * V_TILE);
    return slot;
}

// The spans of key tiles that the bands of a query tile meet, in order and apart; returns how many.
static I spans_of(const Call& c, const QueryTile& t, Interval* spans) {
    I count = 0, q0 = t.first + c.offset;
    for (I h = t.head; h < t.head + t.heads; h++) {
        if (t.as_before(h)) continue;
        Interval found[MAX_BANDS];
        int bands = bands_of(t.rule_of(h), c, t.batch, h, q0, q0 + t.count - 1, found);
        for (int i = 0; i < bands; i++) {
            I low = most(0, found[i].low), high = least(c.k_slots, found[i].high);
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

// The lists of a query tile's heads, each head's own; returns how many.
static I lists_of(const Call& c, const QueryTile& t, List* lists) {
    I count = 0;
    for (I h = t.head; LISTS && h < t.head + t.heads; h++)
        count += lists_of_rule(t.rule_of(h), c, t.batch, h, t.first + c.offset, lists + count);
    return count;
}

// Whether an earlier one of a query tile's lists is the same as number i.
static bool met_before(const List* lists, I i) {
    for (I j = 0; j < i; j++)
        if (lists[j].same(lists[i])) return true;
    return false;
}

// Asks what rules want to know of data for these queries, whatever the keys.
static void ask(const Call& c, QueryTile& t, I* facts) {
    I q0 = t.first + c.offset;
    t.facts = facts;
    for (I h = t.head; FACTS && h < t.head + t.heads; h++, facts += FACTS) {
        if (t.as_before(h)) memcpy(facts, facts - FACTS, sizeof(I) * FACTS);
        else if (t.rule_of(h) >= 0) ask_of(t.rule_of(h), c, t.batch, h, q0, q0 + t.count - 1, facts);
    }
}

// Begins to go through keys by a tile's rules: asks what these want to know of data, whatever the keys.
static void begin(const Call& c, Worker& w, QueryTile& t) {
    memset(w.prepared, 0, t.heads);
    ask(c, t, w.facts);
}

// Which keys of a tile each row keeps.
static void fill_keep(const Call& c, const Worker& w, const QueryTile& t, const KeyTile& keys) {
    I q0 = t.first + c.offset, q1 = q0 + t.count - 1, k0 = keys.first, k1 = keys.last, *y = w.row_facts;
    uint64_t inside = first_keys(keys.count), *keep = w.keep;
    for (I h = t.head; h < t.head + t.heads; h++, keep += t.count, y += t.count * ROW_FACTS) {
        int rule = t.rule_of(h);
        if (rule < 0 || empty_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1)) {
            memset(keep, 0, sizeof(uint64_t) * t.count);
        } else if (full_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1)) {
            for (I i = 0; i < t.count; i++) keep[i] = inside;
        } else {
            bool& prepared = w.prepared[h - t.head];
            if (!prepared) prepare_of(rule, c, t.batch, h, q0, t.count, y);
            prepared = true;
            if (keys.at) keep_listed_rows_of(rule, c, t.batch, h, q0, t.count, keys.at, keys.count, y, keep);
            else keep_rows_of(rule, c, t.batch, h, q0, t.count, k0, keys.count, y, keep);
            for (I i = 0; i < t.count; i++) keep[i] &= inside;
        }
    }
    for (I r = t.rows(); r < BM; r++) w.keep[r] = 0;
}

// A tile's place: 0 nothing is kept, 1 some, 2 all of it.
static int class_of(const Call& c, const QueryTile& t, const KeyTile& keys) {
    I q0 = t.first + c.offset, q1 = q0 + t.count - 1, k0 = keys.first, k1 = keys.last;
    bool all = keys.count == KB, none = true;
    for (I h = t.head; h < t.head + t.heads && (all || none); h++) {
        int rule = t.rule_of(h);
        all = all && rule >= 0;
        if (rule < 0 || t.as_before(h)) continue;
        none = none && empty_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1);
        all = all && full_of(rule, c, t.facts_of(h), t.batch, h, q0, q1, k0, k1);
    }
    return none ? 0 : all ? 2 : 1;
}

#if BIAS
static void add_biases(const Call& c, Worker& w, const QueryTile& t, const KeyTile& keys) {
    I q0 = t.first + c.offset;
    for (I i = 0; i < t.heads; i++) {
        I h = t.head + i, row = i * t.count;
        float* add = w.add + row * KB;
#if GATHERS
        if (keys.at) {
            add_bias_listed(c, t.batch, h, q0, t.count, keys.at, keys.count, add, w.lines + row, w.keep + row);
            continue;
        }
#endif
        add_bias(c, t.batch, h, q0, t.count, keys.first, keys.count, add, w.lines + row, w.keep + row);
    }
    for (I r = t.rows(); r < (t.rows() + MR - 1) / MR * MR; r++) w.lines[r] = w.lines[0];
}
#endif

// What a block of rows drops of a tile, and adds to it; all is kept where `marked` is false.
static Masks masks_of(const Worker& w, const QueryTile& t, I block, bool marked) {
    const uint64_t* keep = w.keep + block * MR;
    uint64_t any = 0, all = ~0ull;
    for (int r = 0; r < MR && marked; r++) {
        any |= keep[r];
        all &= block * MR + r < t.rows() ? keep[r] : ~0ull;
    }
    bool whole = !marked || (all & first_keys(KB)) == first_keys(KB);
    return {whole ? nullptr : keep, BIAS ? w.lines + block * MR : nullptr, whole ? ~0ull : any};
}

// Meets a tile whose keys are read where they lie.
static void meet_lying(
    const Call& c, Worker& w, const QueryTile& t, const KeyTile& keys, bool marked, const Scoring& scoring) {
#if READS
    Masks masks[DIRECT_BLOCKS];
    uint64_t any = 0;
    for (I block = 0; block * MR < t.rows(); block++) any |= (masks[block] = masks_of(w, t, block, marked)).any;
    if (any) meet_direct(w.rows, t.rows(), addresses_of(c, t, keys), scoring, masks, any);
#endif
}

// Meets a tile of class `kind`, which is not 0.
static void meet_tile(
    const Call& c, Worker& w, const QueryTile& t, const KeyTile& keys, int kind, const Scoring& scoring) {
    bool marked = BIAS || kind == 1; // an added -inf drops a key of a full tile
    if (marked) fill_keep(c, w, t, keys);
#if BIAS
    add_biases(c, w, t, keys);
#endif
    if (w.direct) return meet_lying(c, w, t, keys, marked, scoring);
    I slot = -1;
    for (I block = 0; block * MR < t.rows(); block++) {
        Masks some = masks_of(w, t, block, marked);
        if (!some.any) continue;
        if (slot < 0) slot = packed(c, w, t, keys);
        const int32_t* values = w.values + slot * V_TILE;
        if (w.infinite[slot] && some.keep) clear_dropped(w.cleared, values, some.any), values = w.cleared;
        meet(w.rows[block], (const float*)(w.keys + slot * K_TILE), (const float*)values, scoring,
             BIAS || some.keep ? &some : nullptr);
    }
}

// Has a tile, if it is packed, on its way to the core while another one is met.
static void fetch_packed(const Worker& w, const QueryTile& t, I tile) {
    I slot = tile % w.slots;
    const Tag& tag = w.tags[slot];
    if (tag.batch != t.batch || tag.kv_head != t.kv_head || tag.tile != tile) return;
    for (I i = 0; i < K_TILE; i += 16) __builtin_prefetch(w.keys + slot * K_TILE + i, 0, 2);
    for (I i = 0; i < V_TILE; i += 16) __builtin_prefetch(w.values + slot * V_TILE + i, 0, 2);
}

static I tiles_of(const List& list) { return (list.count * list.unit + KB - 1) / KB; }

static void meet_kept(const Call& c, Worker& w, const QueryTile& t, const KeyTile& keys, const Scoring& scoring) {
    int kind = class_of(c, t, keys);
    if (kind) meet_tile(c, w, t, keys, kind, scoring);
}

// Goes through a part of a list whose units are whole tiles.
static void meet_whole(
    const Call& c, Worker& w, const QueryTile& t, const List& list, Part part, const Scoring& scoring) {
    I tiles = list.unit / KB;
    auto tile_at = [&](I i) { return list.first_key(i / tiles) / KB + i % tiles; };
    for (I i = part.from; i < part.to; i++) {
        I tile = tile_at(i);
        if (tile < 0 || tile * KB >= c.k_slots) continue;
        I next = i + 1 < part.to ? tile_at(i + 1) : -1;
        if (next >= 0) fetch_packed(w, t, next);
        meet_kept(c, w, t, tile_of(c, tile, next), scoring);
    }
}

// Goes through a part of a list whose units are gathered into tiles.
static void gather(const Call& c, Worker& w, const QueryTile& t, const List& list, Part part, const Scoring& scoring) {
    int32_t at[KB];
    int count = 0;
    auto meet_gathered = [&] {
        if (count) meet_kept(c, w, t, {at[0], at[count - 1], count, at}, scoring);
        count = 0;
    };
    I first = (part.from * KB + list.unit - 1) / list.unit, last = (part.to * KB + list.unit - 1) / list.unit;
    for (I i = first; i < least(last, list.count); i++) {
        I low = list.first_key(i), high = least(low + list.unit, c.k_slots);
        if (low < 0 || low >= high || !class_of(c, t, {low, high - 1, 1, nullptr})) continue;
        for (I k = low; k < high; k++) {
            at[count++] = (int32_t)k;
            if (count == KB) meet_gathered();
        }
    }
    meet_gathered();
}

// Goes through a part of the lists of a query tile, each once for all heads that have it.
static void meet_lists(const Call& c, Worker& w, QueryTile t, Part part, const Scoring& scoring) {
    I count = lists_of(c, t, w.lists), number = 0;
    t.rules = w.rules;
    for (I i = 0; i < count && number < part.to; i++) {
        const List& list = w.lists[i];
        if (met_before(w.lists, i)) continue;
        I first = number;
        number += tiles_of(list);
        if (number <= part.from) continue;
        for (I r = 0; r < t.heads; r++) w.rules[r] = -1;
        for (I j = i; j < count; j++)
            if (w.lists[j].same(list)) w.rules[w.lists[j].head - t.head] = w.lists[j].rule;
        begin(c, w, t);
        Part here = {most(0, part.from - first), least(tiles_of(list), part.to - first)};
        (list.unit % WHOLE ? gather : meet_whole)(c, w, t, list, here, scoring);
    }
}

// The row of the tensors of queries where row r of a tile lies, -1 where a slot holds no token.
static I token_of(const Call& c, const QueryTile& t, I r) {
    I q = t.first + r % t.count;
#if QUERY_LAYOUT
    q = query_token(c, t.batch, t.head + r / t.count, q);
#endif
    return q;
}

// A row's sum starts at nothing, or in its first part with the weight of a logit that has no value.
static void start_row(const Call& c, Rows& rows, int i, const QueryTile& t, I r, bool first) {
    rows.sum[i] = Floats{};
    rows.reference[i] = NOTHING;
#if SKIPS
    rows.below[i] = r < t.rows() ? c.below[t.head + r / t.count] : __builtin_inff();
#endif
#if SINK
    if (!first) return;
    float logit = r < t.rows() ? sink_of(c, t.batch, t.head + r / t.count, t.first + r % t.count + c.offset) : 0;
    if (logit == -__builtin_inff()) return;
    rows.reference[i] = logit;
    rows.sum[i][0] = 1;
#endif
}

// Has a row of the output on its way to the core that writes it when the tile's keys are through.
static void fetch_output(const Call& c, const QueryTile& t, I head, I token) {
    const Element* to = (const Element*)c.out + t.batch * c.os[0] + head * c.os[1] + token * c.os[2];
    for (I i = 0; c.os[3] == 1 && i < DV; i += 64 / (I)sizeof(Element)) __builtin_prefetch(to + i, 1, 2);
}

static void start_rows(const Call& c, Worker& w, const QueryTile& t, bool first) {
    const Element* q = (const Element*)c.q + t.batch * c.qs[0];
    for (I block = 0; block * MR < t.rows(); block++) {
        Rows& rows = w.rows[block];
        const Element* from[MR];
        for (int i = 0; i < MR; i++) {
            I r = block * MR + i, token = r < t.rows() ? token_of(c, t, r) : -1;
            from[i] = token < 0 ? nullptr : q + (t.head + r / t.count) * c.qs[1] + token * c.qs[2];
            if (token >= 0) fetch_output(c, t, t.head + r / t.count, token);
            start_row(c, rows, i, t, r, first);
        }
        memset(rows.out, 0, sizeof rows.out);
        int sign = (c.scale > 0) - (c.scale < 0);
#if READS
        if (w.direct) {
            lay_queries(rows.q, from, c.qs[3], sign);
            continue;
        }
#endif
        pack_queries(rows.q, from, c.qs[3], sign);
    }
}

// Takes the rows of a query tile through a part of its key tiles: those of its spans, then those of its lists.
static void meet_part(const Call& c, Worker& w, QueryTile t, Part part) {
    constexpr double UNIT = BIAS ? 1 : 1.4426950408889634;
    double scale = c.scale == 0 ? 1 : c.scale < 0 ? -c.scale : c.scale; // queries have the sign, and a zero
    Scoring scoring = {(float)((SOFTCAP ? c.softcap : scale) * UNIT), (float)(SOFTCAP ? scale / c.softcap : 0),
                       PAIR == 2 ? DK : t.rows() <= FEW_ROWS ? 16 : 64};
    start_rows(c, w, t, part.from == 0);
    begin(c, w, t);
    I spans = spans_of(c, t, w.spans), number = 0;
    for (I i = 0; i < spans; i++)
        for (I tile = w.spans[i].low; tile < w.spans[i].high && number < part.to; tile++) {
            I next = tile + 1 < w.spans[i].high ? tile + 1 : i + 1 < spans ? w.spans[i + 1].low : -1;
            KeyTile keys = tile_of(c, tile, number + 1 < part.to ? next : -1);
            int kind = SUMMARIES || part.has(number) ? class_of(c, t, keys) : 0;
            if (FETCH_NEXT_TILE && !w.direct && next >= 0) fetch_packed(w, t, next);
            if (kind && part.has(number)) meet_tile(c, w, t, keys, kind, scoring);
            number += SUMMARIES ? kind != 0 : 1; // as costs are counted
        }
    if (LISTS) meet_lists(c, w, t, part.behind(number), scoring);
}

static void store_rows(const Call& c, const Worker& w, Rows* rows, const QueryTile& t) {
    I stored = 0;
#if READS
    for (I block = 0; w.direct && block * MR < t.rows(); block++) order_columns(rows[block]);
#endif
    for (I r = 0; r < t.rows(); r++) {
        I token = token_of(c, t, r);
        if (token < 0) continue;
        stored++;
        I h = t.head + r / t.count;
        Element* to = (Element*)c.out + t.batch * c.os[0] + h * c.os[1] + token * c.os[2];
        store_row(to, c.os[3], rows[r / MR], r % MR);
        if (c.lse) c.lse[(t.batch * c.heads + h) * c.q_len + token] = lse_of(rows[r / MR], r % MR);
    }
    if (QUERY_LAYOUT) __atomic_fetch_add(w.stored, stored, __ATOMIC_RELAXED);
}

#if QUERY_LAYOUT
// Writes what queries get that no slot holds: they keep nothing. Returns false if memory ran out.
static bool store_nothing(const Call& c) {
    bool* held = (bool*)malloc(most(1, c.q_len));
    if (!held) return false;
    for (I row = 0; row < c.b * c.heads; row++) {
        I b = row / c.heads, h = row % c.heads;
        memset(held, 0, c.q_len);
        for (I slot = 0; slot < c.q_slots; slot++) {
            I token = query_token(c, b, h, slot);
            if (token >= 0) held[token] = true;
        }
        for (I token = 0; token < c.q_len; token++) {
            if (held[token]) continue;
            Element* to = (Element*)c.out + b * c.os[0] + h * c.os[1] + token * c.os[2];
            for (I i = 0; i < DV; i++) to[i * c.os[3]] = Element{};
            if (c.lse) c.lse[row * c.q_len + token] = -__builtin_inff();
        }
    }
    free(held);
    return true;
}
#endif
