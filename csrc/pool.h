// A small thread pool: the caller works too, and never waits for a worker that has not started.
#pragma once

namespace bitmosaic {

// Call task(context, chunk) once for every chunk in [0, chunks), on the caller and up to threads - 1
// workers. Chunks are claimed from an atomic counter; claims carry the call's generation, so that a
// late worker cannot take a later call's chunk. Workers spin for about 2000 pauses, then sleep. Safe from several
// threads at once (a second caller runs its chunks alone while the pool is taken) and after fork
// (workers are made anew). Tasks must not throw.
void parallel(int chunks, int threads, void (*task)(void* context, int chunk), void* context);

}  // namespace bitmosaic
