/* A CUDA runtime over host memory. Work of a stream waits until it is synchronized, so that a missing one shows. */
#include <stdlib.h>
#include <string.h>

typedef void (*launch)(void);
typedef struct { int kind; void *to; const void *from; size_t bytes; launch run; int value; } work;
typedef struct { work queue[4096]; int count; int capturing; work taken[16]; int takes; } stream;
typedef struct { work taken[16]; int takes; } graph;

static int devices(void) { const char *said = getenv("FAKE_GPUS"); return said ? atoi(said) : 1; }
static size_t room(void) { const char *said = getenv("FAKE_MEMORY"); return said ? (size_t)atoll(said) : (size_t)64 << 20; }

const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : code == 35 ? "driver is insufficient" : code == 900 ? "not permitted when stream is capturing" : "fake error"; }
int cudaGetLastError(void) { return 0; }
int cudaGetDeviceCount(int *count) { *count = devices(); return *count ? 0 : 35; }
int cudaGetDeviceProperties(char *name, int device) { (void)device; strcpy(name, "Fake GPU"); return 0; }
int cudaMalloc(void **place, size_t bytes) {
    if (bytes > room()) return 2;
    *place = malloc(bytes + 1);
    memset(*place, 0x7f, bytes); /* what lies there before is no zero: half floats of it are NaN */
    return 0;
}
int cudaMallocHost(void **place, size_t bytes) { return cudaMalloc(place, bytes); }
int cudaFree(void *place) { free(place); return 0; }
int cudaStreamCreateWithFlags(stream **place, unsigned flags) { if (flags != 1) return 1; *place = calloc(1, sizeof(stream)); return 0; }

static int add(stream *s, work w) {
    if (!s) return 1; /* the default stream is not to be used */
    if (s->capturing) {
        if (w.kind != 2 || s->takes == 16) return 900;
        s->taken[s->takes++] = w;
        return 0;
    }
    if (s->count == 4096) return 1;
    s->queue[s->count++] = w;
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, stream *s) { if (kind < 1 || kind > 3) return 1; return add(s, (work){0, to, from, bytes, 0, 0}); }
int cudaMemsetAsync(void *to, int value, size_t bytes, stream *s) { return add(s, (work){1, to, 0, bytes, 0, value}); }
int fakeLaunch(launch run, stream *s) { return add(s, (work){2, 0, 0, 0, run, 0}); }
int cudaStreamSynchronize(stream *s) {
    if (s->capturing) return 900;
    for (int i = 0; i < s->count; i++) {
        work w = s->queue[i];
        if (w.kind == 0) memcpy(w.to, w.from, w.bytes);
        if (w.kind == 1) memset(w.to, w.value, w.bytes);
        if (w.kind == 2) w.run();
    }
    s->count = 0;
    return 0;
}
int cudaStreamBeginCapture(stream *s, int mode) { if (mode != 1 || s->capturing) return 1; s->capturing = 1; s->takes = 0; return 0; }
int cudaStreamEndCapture(stream *s, graph **place) {
    if (!s->capturing) return 1;
    s->capturing = 0;
    if (getenv("FAKE_NO_CAPTURE")) return 900;
    *place = calloc(1, sizeof(graph));
    memcpy((*place)->taken, s->taken, sizeof(s->taken));
    (*place)->takes = s->takes;
    return 0;
}
int cudaGraphInstantiateWithFlags(graph **place, graph *g, unsigned long long flags) { (void)flags; *place = malloc(sizeof(graph)); **place = *g; return 0; }
static int launches; /* how often a graph was launched */
int fakeLaunches(void) { return launches; }
int cudaGraphLaunch(graph *g, stream *s) {
    launches++;
    if (g->takes < 0) return 400;
    for (int i = 0; i < g->takes; i++) if (add(s, g->taken[i])) return 1;
    return 0;
}
int cudaGraphExecDestroy(graph *g) { g->takes = -1; return 0; } /* kept, so that a launch of it shows */
int cudaGraphDestroy(graph *g) { free(g); return 0; }
