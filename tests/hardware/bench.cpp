// Runs records from standard input through a combinational circuit and counts those that differ.
//
// A record is IN_WORDS words of input and OUT_WORDS words of expected output, 32 bits each, little-endian.
// Ends with 0 where all records agree, 1 where one differs, 2 where the input is cut or empty.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "Vbench.h"
#include "verilated.h"

int main() {
    constexpr std::size_t words = IN_WORDS + OUT_WORDS, batch = 4096;
    std::vector<std::uint32_t> records(words * batch);
    Vbench bench;
    std::uint64_t count = 0, wrong = 0;
    for (;;) {
        const std::size_t got = std::fread(records.data(), 4, records.size(), stdin);
        if (got % words != 0) {
            std::fprintf(stderr, "input ends inside a record\n");
            return 2;
        }
        for (std::size_t at = 0; at < got; at += words, ++count) {
            std::memcpy(bench.in.data(), &records[at], 4 * IN_WORDS);
            bench.eval();
            if (std::memcmp(bench.out.data(), &records[at + IN_WORDS], 4 * OUT_WORDS) == 0) continue;
            if (++wrong > 3) continue;
            std::fprintf(stderr, "record %llu differs\n", static_cast<unsigned long long>(count));
            for (std::size_t w = 0; w < words; ++w)
                std::fprintf(stderr, w + 1 == words ? "%08x" : "%08x ", records[at + w]);
            std::fprintf(stderr, "\n gave");
            for (std::size_t w = 0; w < OUT_WORDS; ++w) std::fprintf(stderr, " %08x", bench.out[w]);
            std::fprintf(stderr, "\n");
        }
        if (got < records.size()) break;
    }
    bench.final();
    std::printf("%llu %llu\n", static_cast<unsigned long long>(count), static_cast<unsigned long long>(wrong));
    return count == 0 ? 2 : wrong != 0;
}
