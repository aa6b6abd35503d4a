// The search of E4M3 scales, sixteen at a time.
#include "scale_search_lanes.h"

namespace bitmosaic {

void search_scales_avx512(const ScaleSearch& search, int64_t begin, int64_t end) {
    Sweep<16>::run(search, begin, end);
}

}  // namespace bitmosaic
