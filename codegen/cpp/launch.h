// What a launch passes: mirrored by `CALL` in launch.py, filled there and in ready.cpp.jinja.

typedef int64_t I;

struct Source { // a tensor that predicates and biases load from
    const void* data;
    I type;     // an index in LOAD_TYPES of launch.py
    I size[4], stride[4];
};
struct Summary;

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

struct Call {
    const void *q, *k, *v;
    void* out;
    float* lse; // of each row (batch, head, query): the logarithm of its sum of weights; null where nobody asks
    const I* sizes;
    const Source* loads;
    const Summary* summaries;
    const int32_t* rules; // the rule of each query head
    const float* below;   // with SKIPS: how far below a row's largest score its head skips, in units of log2
    Parallel parallel;    // runs a function on so many threads; null where there is one thread
    I threads, b, heads, kv_heads, q_len, k_len, q_slots, k_slots, offset;
    I qs[4], ks[4], vs[4], os[4]; // strides in elements: batch, head, position, column
    double scale, softcap;
};
