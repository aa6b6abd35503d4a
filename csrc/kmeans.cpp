// The Python module `bitmosaic._kmeans`: one-dimensional k-means, one row after another on each thread.
//
// `bitmosaic/kmeans.py` says what is computed and why, and computes the same in torch: every sum is taken in
// the same order and every comparison made on the same numbers, so that the centres agree bit for bit, ties and
// rounding included. Tensors arrive as addresses of contiguous arrays; values are finite, weights at least 0.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "pool.h"

namespace nb = nanobind;

namespace bitmosaic {
namespace {

constexpr double tiny = 1e-300;   // stands for the mass of an empty cluster
constexpr double slack = 1e-9;    // what a prefix may lose beyond the known loss, as a share of the squares
constexpr double infinity = std::numeric_limits<double>::infinity();

// A sorted row and its prefix sums, of values less the row's mean.
class Line {
public:
    explicit Line(int64_t length)
        : values(length), sums(length + 1), masses(length + 1), squares(length + 1), keys_(length), other_(length) {}

    void load(const float* row, const float* weights) {
        sort(row);
        double total = 0, moment = 0;
        for (size_t i = 0; i < values.size(); ++i) {
            const auto from = static_cast<uint32_t>(keys_[i]);
            values[i] = static_cast<double>(row[from]) + 0.0;  // +0 for -0: they are one value
            const double mass = weights ? static_cast<double>(weights[from]) : 1.0;
            masses[i + 1] = mass;
            total += mass;
            moment += mass * values[i];
        }
        mean = moment / std::max(total, tiny);
        accumulate();
    }

    // The same row seen from its largest value.
    void flip(const Line& line) {
        const size_t length = values.size();
        for (size_t i = 0; i < length; ++i) {
            values[i] = line.values[length - 1 - i];
            masses[i + 1] = line.masses[length - i] - line.masses[length - 1 - i];
        }
        mean = line.mean;
        accumulate();
    }

    int64_t length() const { return static_cast<int64_t>(values.size()); }

    std::vector<double> values, sums, masses, squares;
    double mean = 0;

private:
    // Turn the masses of values, from masses[1] on, into prefix sums.
    void accumulate() {
        sums[0] = masses[0] = squares[0] = 0;
        for (size_t i = 0; i < values.size(); ++i) {
            const double left = values[i] - mean, moment = masses[i + 1] * left;
            sums[i + 1] = sums[i] + moment;
            squares[i + 1] = squares[i] + moment * left;
            masses[i + 1] += masses[i];
        }
    }

    // Sort stably by value: keys whose order is that of floats above the index, three passes of 11 bits.
    void sort(const float* row) {
        for (size_t i = 0; i < keys_.size(); ++i) {
            const float value = row[i] + 0.0f;
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            bits ^= bits >> 31 ? ~uint32_t{0} : uint32_t{1} << 31;
            keys_[i] = uint64_t{bits} << 32 | i;
        }
        for (int shift = 32; shift < 64; shift += 11) {
            uint32_t places[2049] = {};
            for (const uint64_t key : keys_) ++places[(key >> shift & 2047) + 1];
            for (int digit = 1; digit < 2048; ++digit) places[digit] += places[digit - 1];
            for (const uint64_t key : keys_) other_[places[key >> shift & 2047]++] = key;
            keys_.swap(other_);
        }
    }

    std::vector<uint64_t> keys_, other_;
};

// The clusters between cuts: cuts[0] = 0 to cuts[count] = length; `mean` of an empty one is some value.
struct Clusters {
    explicit Clusters(int64_t count) : cuts(count + 1), moved(count + 1), mean(count), mass(count), centres(count) {}

    int64_t count() const { return static_cast<int64_t>(mean.size()); }

    void start_at_quantiles(const Line& line) {
        for (int64_t k = 0; k < count(); ++k) {
            const double wanted = line.masses.back() * ((static_cast<double>(k) + 0.5) / static_cast<double>(count()));
            const auto place = std::lower_bound(line.masses.begin() + 1, line.masses.end(), wanted);
            centres[k] = line.values[std::min(place - line.masses.begin() - 1, line.length() - 1)];
        }
    }

    // Assign and average until nothing moves, at most `steps` times. An empty cluster keeps its centre.
    void lloyd(const Line& line, int steps) {
        cut(line, cuts);
        for (int step = 0; step < steps; ++step) {
            average(line);
            for (int64_t k = 0; k < count(); ++k) {
                if (mass[k] > 0) centres[k] = mean[k];
            }
            cut(line, moved);
            if (moved == cuts) break;
            cuts.swap(moved);
        }
    }

    // Cut halfway between neighbouring centres.
    void cut(const Line& line, std::vector<int64_t>& into) const {
        into.front() = 0;
        for (int64_t k = 1; k < count(); ++k) {
            const double middle = (centres[k] + centres[k - 1]) / 2;
            into[k] = std::upper_bound(line.values.begin(), line.values.end(), middle) - line.values.begin();
        }
        into.back() = line.length();
    }

    void average(const Line& line) {
        for (int64_t k = 0; k < count(); ++k) {
            const int64_t from = cuts[k], to = cuts[k + 1];
            mass[k] = line.masses[to] - line.masses[from];
            const double found = (line.sums[to] - line.sums[from]) / std::max(mass[k], tiny) + line.mean;
            const double low = line.values[std::min(from, line.length() - 1)];
            const double high = line.values[std::max<int64_t>(to - 1, 0)];
            mean[k] = std::min(std::max(found, low), high);
        }
    }

    double loss(const Line& line) const {
        double gain = 0;
        for (int64_t k = 0; k < count(); ++k) {
            const double sum = line.sums[cuts[k + 1]] - line.sums[cuts[k]];
            gain += sum * sum / std::max(line.masses[cuts[k + 1]] - line.masses[cuts[k]], tiny);
        }
        return line.squares.back() - gain;
    }

    // Write each cluster's mean; an empty cluster repeats its neighbour's.
    void write_means(const Line& line, float* into) {
        average(line);
        double first = infinity, below = -infinity;
        for (int64_t k = 0; k < count(); ++k) {
            if (mass[k] > 0) first = std::min(first, mean[k]);
        }
        if (first == infinity) first = line.mean;
        for (int64_t k = 0; k < count(); ++k) {
            if (mass[k] > 0) below = std::max(below, mean[k]);
            into[k] = static_cast<float>(below == -infinity ? first : below);
        }
    }

    std::vector<int64_t> cuts, moved;
    std::vector<double> mean, mass, centres;
};

// The best `count` clusters of every prefix that is not given up.
class Half {
public:
    Half(int64_t length, int64_t count)
        : ends_(length + 1), count_(count), gain_(ends_), next_(ends_), last_(ends_ * (count - 1)), first_(ends_) {}

    int64_t stop() const { return stop_; }
    double gain(int64_t end) const { return gain_[end]; }

    void solve(const Line& line, double allowed) {
        int64_t kept = 0;
        for (int64_t end = 0; end < ends_; ++end) {
            gain_[end] = line.sums[end] * line.sums[end] / std::max(line.masses[end], tiny);
            kept += line.squares[end] - gain_[end] <= allowed;
        }
        stop_ = std::max<int64_t>(kept, 1) - 1;
        const int32_t* before = first_.data();
        for (int64_t added = 0; added + 1 < count_; ++added) {
            add(line, allowed, before, &last_[added * ends_]);
            before = &last_[added * ends_];
        }
    }

    // Trace the cuts of the prefix up to `end` back: place(k, cut) for k from `count` down to 0.
    template <class Place>
    void trace(int64_t end, const Place& place) const {
        for (int64_t k = count_; k > 0; --k) {
            place(k, end);
            end = k > 1 ? last_[(k - 2) * ends_ + end] : 0;
        }
        place(0, end);
    }

private:
    // Add a cluster to all prefixes, by halving strides. `before` are the last cuts with a cluster less.
    void add(const Line& line, double allowed, const int32_t* before, int32_t* best) {
        const int64_t reach = stop_;
        int64_t stop = ends_ - 1, stride = 1;
        while (stride * 2 <= stop) stride *= 2;
        best[0] = 0;
        next_[0] = 0;
        for (; stride; stride /= 2) {
            int64_t fits = 0, present = 0;
            for (int64_t at = stride; at <= stop; at += 2 * stride, ++present) {
                const int64_t low = std::min<int64_t>(std::max(best[at - stride], before[std::min(at, reach)]), reach);
                int64_t high = std::min(at, reach);
                // The end after `stop` has been visited too, so this one has.
                if (at + stride < ends_) high = std::min<int64_t>(high, best[at + stride]);
                search(line, low, std::max(high, low), at, best);
                fits += line.squares[at] - next_[at] <= allowed;
            }
            if (fits < present) stop = stride + 2 * stride * fits - 1;
        }
        gain_.swap(next_);
        stop_ = stop;
    }

    void search(const Line& line, int64_t low, int64_t high, int64_t at, int32_t* best) {
        const double sum = line.sums[at], mass = line.masses[at];
        double most = -infinity;
        int64_t found = low;
        for (int64_t cut = low; cut <= high; ++cut) {
            const double part = sum - line.sums[cut];
            const double gain = part * part / std::max(mass - line.masses[cut], tiny) + gain_[cut];
            if (gain > most) {
                most = gain;
                found = cut;
            }
        }
        next_[at] = most;
        best[at] = static_cast<int32_t>(found);
    }

    int64_t ends_, count_, stop_ = 0;
    std::vector<double> gain_, next_;
    std::vector<int32_t> last_, first_;
};

// What one thread works with, made before it starts: a task must not throw.
struct Bench {
    Bench(int64_t length, int64_t count, bool optimal)
        : line(length), flipped(optimal ? length : 0), clusters(count),
          left(optimal ? length : 0, optimal ? count / 2 : 1), right(left) {}

    Line line, flipped;
    Clusters clusters;
    Half left, right;
};

struct Job {
    const float *values, *weights, *start;  // [rows, length], the same or null, [rows, count] or null
    float* centres;                         // [rows, count]
    int64_t rows, length, count;
    int steps, chunks;
    bool optimal;
    std::vector<Bench> benches;  // one for each chunk
};

void find_optimum(Bench& bench, int steps, float* centres) {
    const Line& line = bench.line;
    bench.flipped.flip(line);
    bench.clusters.start_at_quantiles(line);
    bench.clusters.lloyd(line, steps);
    bench.clusters.cut(line, bench.clusters.cuts);
    const double allowed = std::max(bench.clusters.loss(line) + slack * line.squares.back(), 0.0);
    bench.left.solve(line, allowed);
    bench.right.solve(bench.flipped, allowed);
    const int64_t length = line.length(), count = bench.clusters.count();
    int64_t middle = length - bench.right.stop();
    double most = -infinity;
    for (int64_t cut = middle; cut <= bench.left.stop(); ++cut) {
        const double gain = bench.left.gain(cut) + bench.right.gain(length - cut);
        if (gain > most) {
            most = gain;
            middle = cut;
        }
    }
    auto& cuts = bench.clusters.cuts;
    bench.right.trace(length - middle, [&](int64_t k, int64_t end) { cuts[count - k] = length - end; });
    bench.left.trace(middle, [&](int64_t k, int64_t end) { cuts[k] = end; });
    bench.clusters.write_means(line, centres);
}

void improve(Bench& bench, const float* start, int steps, float* centres) {
    Clusters& clusters = bench.clusters;
    if (start) {
        std::copy_n(start, clusters.count(), clusters.centres.begin());
    } else {
        clusters.start_at_quantiles(bench.line);
    }
    clusters.lloyd(bench.line, steps);
    for (int64_t k = 0; k < clusters.count(); ++k) centres[k] = static_cast<float>(clusters.centres[k]);
}

void run_chunk(void* context, int chunk) {
    Job& job = *static_cast<Job*>(context);
    Bench& bench = job.benches[chunk];
    const int64_t stop = job.rows * (chunk + 1) / job.chunks;
    for (int64_t row = job.rows * chunk / job.chunks; row < stop; ++row) {
        const float* weights = job.weights ? job.weights + row * job.length : nullptr;
        float* centres = job.centres + row * job.count;
        bench.line.load(job.values + row * job.length, weights);
        if (job.optimal) {
            find_optimum(bench, job.steps, centres);
        } else {
            improve(bench, job.start ? job.start + row * job.count : nullptr, job.steps, centres);
        }
    }
}

void run(bool optimal, uintptr_t values, uintptr_t weights, uintptr_t start, uintptr_t centres, int64_t rows,
         int64_t length, int64_t count, int steps, int threads) {
    nb::gil_scoped_release unlocked;
    const auto floats = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
    Job job{floats(values), floats(weights), floats(start), reinterpret_cast<float*>(centres), rows,
            length, count, steps, static_cast<int>(std::min<int64_t>(rows, 4 * int64_t{threads})), optimal, {}};
    job.benches.assign(job.chunks, Bench(length, count, optimal));
    parallel(job.chunks, threads, &run_chunk, &job);
}

}  // namespace
}  // namespace bitmosaic

NB_MODULE(_kmeans, m) {
    m.doc() = "One-dimensional k-means of many rows; `bitmosaic.kmeans` is what uses it.";
    m.def("run", &bitmosaic::run, nb::arg("optimal"), nb::arg("values"), nb::arg("weights"), nb::arg("start"),
          nb::arg("centres"), nb::arg("rows"), nb::arg("length"), nb::arg("count"), nb::arg("steps"),
          nb::arg("threads"));
}
