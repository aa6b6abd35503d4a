#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "pool.h"

namespace bitmosaic {
namespace {

constexpr int64_t kAlone = 64;  // tokens of keys below which one thread attends faster than two

// One calling thread's memory between matrices.
struct Room {
    Buffer<float> hidden, entering, query, key, value, attended, gate, up, added, weights;
};

struct Attention {
    const Decoder& d;
    const Block& block;
    const Level& level;
    int64_t length;
    const float* query;
    float *weights, *y;

    static void run(void* context, int head) {
        const Attention& a = *static_cast<const Attention*>(context);
        const int shared = a.d.heads / a.d.key_heads, width = a.d.head_width;
        const int length = static_cast<int>(a.length);
        const size_t first = static_cast<size_t>(head) * shared * width;
        const size_t keys = static_cast<size_t>(head) * a.d.room * width;
        a.level.attend(a.query + first, shared, a.block.keys + keys, a.block.values + keys, length, width,
                       a.d.scale, a.weights + static_cast<size_t>(head) * kTogether * length, a.y + first);
    }
};

// x * cosine + (second half of x negated, first half) * sine, head by head.
void rotate(float* x, int heads, int width, const float* cosine, const float* sine) {
    const int half = width / 2;
    for (int h = 0; h < heads; ++h, x += width) {
        for (int i = 0; i < half; ++i) {
            const float low = x[i], high = x[half + i];
            x[i] = low * cosine[i] - high * sine[i];
            x[half + i] = high * cosine[half + i] + low * sine[half + i];
        }
    }
}

void normalize_heads(const Level& level, const Norm& norm, float* x, int heads, int width) {
    if (norm.weight == nullptr) return;
    for (int h = 0; h < heads; ++h, x += width) level.normalize(x, norm.weight, norm.epsilon, width, x);
}

void add(float* to, const float* x, int count) {
    for (int i = 0; i < count; ++i) to[i] += x[i];
}

void expect(const char* what, const Projection& given, int64_t out, int64_t in) {
    const Matrix& m = given.weight->matrix();
    if (m.out == out && m.in == in) return;
    const auto shape = [](int64_t rows, int64_t columns) {
        return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
    };
    throw std::invalid_argument(std::string(what) + " must be " + shape(out, in) + ", not " + shape(m.out, m.in) +
                                ". Give the model's own shapes.");
}

}  // namespace

void Decoder::check() const {
    if (width < 1 || key_heads < 1 || heads % key_heads || head_width < 2 || head_width % 2)
        throw std::invalid_argument("heads must be a multiple of key heads, and their width even.");
    bool norms = last_norm.weight != nullptr;
    for (const Block& block : blocks) norms &= block.attention_norm.weight && block.mlp_norm.weight;
    if (!norms) throw std::invalid_argument("Every block must have its two norms, and the decoder a last one.");
    for (const Block& block : blocks) {
        const int64_t all = int64_t{heads} * head_width, kept = int64_t{key_heads} * head_width;
        expect("query", block.query, all, width);
        expect("key", block.key, kept, width);
        expect("value", block.value, kept, width);
        expect("output", block.output, width, all);
        expect("gate", block.gate, block.inner(), width);
        expect("up", block.up, block.inner(), width);
        expect("down", block.down, width, block.inner());
    }
    expect("head", head, head.weight->matrix().out, width);
}

void Decoder::step(const float* embedding, const float* cosine, const float* sine, int64_t length,
                   float* logits, Pass pass, int threads) const {
    if (length < 0 || length >= room || length >= INT32_MAX / kTogether)
        throw std::invalid_argument("The cache must have room for token " + std::to_string(length) +
                                    ", not for " + std::to_string(room) + " tokens. Let it grow first.");
    static thread_local Room of_thread;
    Room& r = of_thread;
    const Level& l = level();
    const int all = heads * head_width, kept = key_heads * head_width;
    float *hidden = r.hidden.reserve(width), *entering = r.entering.reserve(width),
          *query = r.query.reserve(all), *key = r.key.reserve(kept), *value = r.value.reserve(kept),
          *attended = r.attended.reserve(all), *added = r.added.reserve(width);
    float* weights = r.weights.reserve(static_cast<size_t>(key_heads) * kTogether * (length + 1));
    std::copy(embedding, embedding + width, hidden);
    for (const Block& block : blocks) {
        l.normalize(hidden, block.attention_norm.weight, block.attention_norm.epsilon, width, entering);
        const Product qkv[] = {block.query.product(query), block.key.product(key), block.value.product(value)};
        linear_of_one(qkv, 3, entering, pass, threads);
        normalize_heads(l, block.query_norm, query, heads, head_width);
        normalize_heads(l, block.key_norm, key, key_heads, head_width);
        rotate(query, heads, head_width, cosine, sine);
        rotate(key, key_heads, head_width, cosine, sine);
        for (int h = 0; h < key_heads; ++h) {
            const size_t from = static_cast<size_t>(h) * head_width;
            const size_t to = (static_cast<size_t>(h) * room + length) * head_width;
            std::copy(key + from, key + from + head_width, block.keys + to);
            std::copy(value + from, value + from + head_width, block.values + to);
        }
        Attention attention{*this, block, l, length + 1, query, weights, attended};
        parallel(key_heads, length < kAlone ? 1 : threads, Attention::run, &attention);
        const Product output[] = {block.output.product(added)};
        linear_of_one(output, 1, attended, pass, threads);
        add(hidden, added, width);
        l.normalize(hidden, block.mlp_norm.weight, block.mlp_norm.epsilon, width, entering);
        const int64_t inner = block.inner();
        float *gated = r.gate.reserve(inner), *up = r.up.reserve(inner);
        const Product both[] = {block.gate.product(gated), block.up.product(up)};
        linear_of_one(both, 2, entering, pass, threads);
        l.gate(gated, up, tanh, static_cast<int>(inner));
        const Product down[] = {block.down.product(added)};
        linear_of_one(down, 1, gated, pass, threads);
        add(hidden, added, width);
    }
    l.normalize(hidden, last_norm.weight, last_norm.epsilon, width, entering);
    const Product of_head[] = {head.product(logits)};
    linear_of_one(of_head, 1, entering, pass, threads);
}

}  // namespace bitmosaic
