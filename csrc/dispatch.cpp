// Which instruction-set level is in use.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace bitmosaic {

#if !defined(BITMOSAIC_X86)
const Level* avx2_level() { return nullptr; }
const Level* avx512_level() { return nullptr; }
const Level* avx512vbmi_level() { return nullptr; }
#endif

namespace {

bool has_avx2() {
#if defined(BITMOSAIC_X86)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(BITMOSAIC_EMULATE)
    return has_avx2();  // which is what it is made of (emulate_avx512.h)
#elif defined(BITMOSAIC_X86)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// Cascade Lake has VNNI without VBMI; Ice Lake, Zen 4 and all later ones have both.
bool has_avx512vbmi() {
#if defined(BITMOSAIC_EMULATE)
    return has_avx512();
#elif defined(BITMOSAIC_X86)
    return has_avx512() && __builtin_cpu_supports("avx512vbmi");
#else
    return false;
#endif
}

std::vector<const Level*> available() {  // best last
    std::vector<const Level*> levels{&scalar_level()};
    if (const Level* level = has_avx2() ? avx2_level() : nullptr) levels.push_back(level);
    if (const Level* level = has_avx512() ? avx512_level() : nullptr) levels.push_back(level);
    if (const Level* level = has_avx512vbmi() ? avx512vbmi_level() : nullptr) levels.push_back(level);
    return levels;
}

const Level* find(const std::string& name) {  // null where it is not there
    for (const Level* level : available())
        if (name == level->name) return level;
    return nullptr;
}

std::string remedy() {
    std::string text = "This build has on this CPU:";
    for (const std::string& name : level_names()) text += " " + name;
    return text + ".";
}

const Level* chosen() {
    const char* name = std::getenv("BITMOSAIC_CPU_LEVEL");
    if (name == nullptr || *name == '\0') return available().back();
    if (const Level* level = find(name)) return level;
    throw std::runtime_error("BITMOSAIC_CPU_LEVEL must be a level that is there, not '" + std::string(name) +
                             "'. " + remedy());
}

std::atomic<const Level*> in_use{nullptr};

}  // namespace

const Level& level() {
    const Level* level = in_use.load(std::memory_order_acquire);
    if (level == nullptr) {
        level = chosen();
        in_use.store(level, std::memory_order_release);
    }
    return *level;
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Level* level : available()) names.push_back(level->name);
    return names;
}

void use_level(const std::string& name) {
    const Level* level = find(name);
    if (level == nullptr)
        throw std::invalid_argument("level must be one that is there, not '" + name + "'. " + remedy());
    in_use.store(level, std::memory_order_release);
}

}  // namespace bitmosaic
