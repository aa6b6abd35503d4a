// A decoding step in one call: a token through the blocks and the head of a Llama-like model, in float32.
//
// Between two matrices a step has microseconds of work. Done by torch it takes 8 ms a token of a 1 B model,
// four times what it takes in a loop of its own: the weights that stream past leave nothing of an
// interpreter in the caches. Here it takes less than one.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace bitmosaic {

struct Norm {
    const float* weight = nullptr;  // null: there is none
    float epsilon = 0;
};

struct Projection {
    std::shared_ptr<Storage> weight;
    const float* bias = nullptr;  // [out] or null

    Product product(float* y) const { return {weight->matrix(), bias, y}; }
};

struct Block {
    Norm attention_norm, query_norm, key_norm, mlp_norm;
    Projection query, key, value, output, gate, up, down;
    // [key_heads][room][head_width], the first `length` tokens filled.
    float* keys = nullptr;
    float* values = nullptr;

    // Channels between gate and down; blocks may differ, where some have been dropped.
    int64_t inner() const { return gate.weight->matrix().out; }
};

struct Decoder {
    int width = 0, heads = 0, key_heads = 0, head_width = 0;
    float scale = 0;    // of the products of queries and keys
    bool tanh = false;  // the gate's function: gelu by tanh in place of silu
    std::vector<Block> blocks;
    Norm last_norm;
    Projection head;
    int64_t room = 0;   // tokens that keys and values have room for

    // Throws std::invalid_argument where a matrix has not the shape that the numbers above ask for.
    void check() const;

    // Take a token's embedding [width] and the rotation [head_width] of its place, add its keys and values as
    // those of token `length`, and give logits. Throws std::invalid_argument where there is no room.
    void step(const float* embedding, const float* cosine, const float* sine, int64_t length, float* logits,
              Pass pass, int threads) const;
};

}  // namespace bitmosaic
