/* A GPU without a GPU: the calls to the CUDA runtime and driver that torch and Triton make. See README.md.

Memory is the host's, taken lazily. Copies are made; kernels are counted by name and do nothing. Work on a stream is done
when it is ordered, so that waiting takes no time and is only counted. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define RT API cudaError_t
#define DRV API CUresult
#define PROCESSORS 132

/* ---- what is counted; the order is that of COUNTED in fakegpu.py ---- */
enum { LAUNCHES, WAITS, UPLOADS, DOWNLOADS, MALLOCS, GRAPHS, NUMBERS };
static atomic_long counted[NUMBERS];
static FILE *diary;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

API void fake_gpu_counts(long *into) { for (int i = 0; i < NUMBERS; i++) into[i] = counted[i]; }

/* Write a line for every kernel, copy and wait from now on to a file; to none with NULL. */
API void fake_gpu_diary(const char *path) {
    pthread_mutex_lock(&lock);
    if (diary) fclose(diary);
    diary = path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&lock);
}

static void note(const char *what, const char *name, size_t bytes) {
    if (!diary) return;
    pthread_mutex_lock(&lock);
    if (diary) fprintf(diary, "%s %s %zu\n", what, name, bytes);
    pthread_mutex_unlock(&lock);
}

/* ---- capture: a graph is the number of its nodes ---- */
static cudaStream_t captured_stream;
static int capturing;
static unsigned long long captures;
static long nodes;

static cudaError_t work(const char *kernel) {
    if (capturing) nodes++;
    else counted[LAUNCHES]++;
    note("kernel", kernel, 0);
    return cudaSuccess;
}

API void fake_gpu_kernel(const char *name) { work(name); }

static cudaError_t waited(const char *how) {
    counted[WAITS]++;
    note("wait", how, 0);
    return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

/* ---- kernels, by the name that the compiler registered ---- */
#define NAMES (1 << 20)
static struct { const void *function; const char *name; } names[NAMES];

static size_t slot(const void *function) {
    size_t i = ((size_t)function >> 4) * 0x9E3779B97F4A7C15ull >> 44;
    while (names[i].function && names[i].function != function) i = (i + 1) % NAMES;
    return i;
}

static const char *name_of(const void *function) {
    const char *name = names[slot(function)].name;
    return name ? name : "unknown";
}

API void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API char __cudaInitModule(void **handle) { return 1; }
API void __cudaRegisterVar(void **h, char *host, char *dev, const char *name, int e, size_t n, int c, int g) {}
API void __cudaRegisterFunction(void **h, const char *host, char *dev, const char *name, int limit, void *a, void *b,
                                void *c, void *d, int *e) {
    size_t i = slot(host);
    names[i].function = host, names[i].name = name;
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
RT __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return cudaSuccess;
}
RT cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return work(name_of(f)); }
RT cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return work(name_of(f)); }
RT cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return work(name_of(f)); }
RT __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
RT __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return work(name_of(k)); }
RT cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }

/* ---- devices: FAKE_GPU_COUNT of them, or those of them that CUDA_VISIBLE_DEVICES lists by number ---- */
static __thread int current;

static int physical(int wanted, int *found) {
    const char *all = getenv("FAKE_GPU_COUNT"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    int there = all ? atoi(all) : 1, seen = 0, is = -1;
    if (!visible) { seen = there, is = wanted; }
    for (const char *at = visible; at && *at; at++) {
        char *end;
        long number = strtol(at, &end, 10);
        if (end == at || number < 0 || number >= there) break;
        if (seen++ == wanted) is = number;
        if (!*(at = end)) break;
    }
    if (found) *found = seen;
    return is;
}

static int devices(void) { int found; physical(0, &found); return found; }
static size_t capacity(void) { const char *bytes = getenv("FAKE_GPU_MEMORY"); return bytes ? strtoull(bytes, 0, 10) : 85000000000ull; }

RT cudaGetDeviceCount(int *n) { *n = devices(); return *n ? cudaSuccess : cudaErrorNoDevice; }
RT cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
RT cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
RT cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
RT cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }

RT cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    default: *value = 1;
    }
    return cudaSuccess;
}

RT cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    int number = physical(device, NULL);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Fake H100");
    memset(p->uuid.bytes, 0x10 + number, sizeof p->uuid.bytes);
    p->pciBusID = 1 + number, p->totalGlobalMem = capacity(), p->major = 9, p->warpSize = 32;
    p->multiProcessorCount = PROCESSORS, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->totalConstMem = 65536, p->textureAlignment = 512;
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10;
    p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->maxBlocksPerMultiProcessor = 32, p->asyncEngineCount = 3;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
    return cudaSuccess;
}
RT cudaDeviceGetPCIBusId(char *id, int n, int device) { snprintf(id, n, "0000:%02x:00.0", 1 + physical(device, NULL)); return cudaSuccess; }
RT cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return cudaSuccess; }
RT cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return cudaSuccess; }
RT cudaDeviceSynchronize(void) { return waited("device"); }

/* ---- memory: every block is remembered, so that a copy's direction and a device's use are known ---- */
enum { ON_HOST, PINNED, ON_DEVICE };
struct block { char *start; size_t bytes; int where, device; struct block *next; };
static struct block *blocks;
static size_t used[64];

static struct block *find(const void *address) {
    struct block *block = blocks;
    while (block && !((char *)address >= block->start && (char *)address < block->start + block->bytes)) block = block->next;
    return block;
}

static int where(const void *address) {
    pthread_mutex_lock(&lock);
    struct block *block = find(address);
    int is = block ? block->where : ON_HOST;
    pthread_mutex_unlock(&lock);
    return is;
}

static cudaError_t take(void **pointer, size_t bytes, int kind) {
    bytes = bytes ? bytes : 1;
    pthread_mutex_lock(&lock);
    void *start = MAP_FAILED;
    if (kind == PINNED || used[current] + bytes <= capacity())
        start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
        struct block *block = malloc(sizeof *block);
        *block = (struct block){start, bytes, kind, current, blocks};
        blocks = block, *pointer = start;
        if (kind == ON_DEVICE) used[current] += bytes;
    }
    pthread_mutex_unlock(&lock);
    return start == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}

static cudaError_t give(void *pointer) {
    pthread_mutex_lock(&lock);
    for (struct block **at = &blocks; *at; at = &(*at)->next)
        if ((*at)->start == pointer) {
            struct block *block = *at;
            *at = block->next;
            if (block->where == ON_DEVICE) used[block->device] -= block->bytes;
            munmap(block->start, block->bytes);
            free(block);
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

RT cudaMalloc(void **pointer, size_t bytes) { counted[MALLOCS]++; return take(pointer, bytes, ON_DEVICE); }
RT cudaFree(void *pointer) { return give(pointer); }
RT cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return take(pointer, bytes, PINNED); }
RT cudaFreeHost(void *pointer) { return give(pointer); }
RT cudaMemGetInfo(size_t *left, size_t *all) { *all = capacity(), *left = *all - used[current]; return cudaSuccess; }
RT cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    memset(a, 0, sizeof *a);
    pthread_mutex_lock(&lock);
    struct block *block = find(pointer);
    if (block) {
        a->type = block->where == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice, a->device = block->device;
        a->devicePointer = (void *)pointer, a->hostPointer = block->where == PINNED ? (void *)pointer : NULL;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* What comes back was computed by kernels that did nothing. A single byte is the answer to a question, such as whether
all losses are finite: yes. A number that decides, such as a size, is 0. */
static cudaError_t copy(void *to, const void *from, size_t n) {
    int source = where(from), target = where(to);
    if (target == ON_DEVICE && source == ON_DEVICE) {
        if (capturing) nodes++;
        note("copy", "on the device", n);
        return cudaSuccess;
    }
    if (target == ON_DEVICE) {
        counted[UPLOADS]++;
        note("copy", source == PINNED ? "to the device, pinned" : "to the device", n);
        memmove(to, from, n);
        return cudaSuccess;
    }
    counted[DOWNLOADS]++;
    note("copy", "from the device", n);
    if (n <= 16) memset(to, n == 1, n);
    else memmove(to, from, n);
    return cudaSuccess;
}
RT cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { copy(to, from, n); return waited("copy"); }
RT cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { return copy(to, from, n); }
RT cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { return copy(to, from, n); }
RT cudaMemset(void *to, int value, size_t n) { memset(to, value, n); return cudaSuccess; }
RT cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t s) {
    if (capturing) nodes++;
    else if (n <= 1 << 20) memset(to, value, n);
    note("fill", "", n);
    return cudaSuccess;
}
RT cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = (void *)symbol; return cudaSuccess; }

/* ---- streams and events ---- */
static cudaError_t stream(cudaStream_t *s) { *s = malloc(1); return cudaSuccess; }
RT cudaStreamCreate(cudaStream_t *s) { return stream(s); }
RT cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return stream(s); }
RT cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return stream(s); }
RT cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return cudaSuccess; }
RT cudaStreamSynchronize(cudaStream_t s) {
    return waited("stream") && s == captured_stream ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
RT cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *data, unsigned flags) { call(s, cudaSuccess, data); return cudaSuccess; }
RT cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = calloc(1, sizeof(double)); return cudaSuccess; }
RT cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
RT cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
RT cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(double *)e = 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
    return cudaSuccess;
}
RT cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
RT cudaEventSynchronize(cudaEvent_t e) { return waited("event"); }
RT cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = *(double *)b - *(double *)a + 1e-3; return cudaSuccess; }

/* ---- graphs ---- */
RT cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    capturing = 1, nodes = 0, captured_stream = s, captures++;
    return cudaSuccess;
}
RT cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d, const cudaGraphEdgeData *e,
                                 size_t n, enum cudaStreamCaptureMode mode) { return cudaStreamBeginCapture(s, mode); }
static void *graph(long of) { long *made = malloc(sizeof *made); *made = of; return made; }
RT cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) { capturing = 0, *g = graph(nodes); return cudaSuccess; }
RT cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *is) {
    *is = capturing && s == captured_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
RT cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *is, unsigned long long *id, cudaGraph_t *g,
                            const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
    enum cudaStreamCaptureStatus status;
    cudaStreamIsCapturing(s, &status);
    if (is) *is = status;
    if (id) *id = status ? captures : 0;
    if (g) *g = NULL;
    if (d) *d = NULL;
    if (e) *e = NULL;
    if (n) *n = 0;
    return cudaSuccess;
}
RT cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t g, unsigned long long flags) { *made = graph(*(long *)g); return cudaSuccess; }
RT cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) { counted[GRAPHS]++; note("graph", "nodes:", *(long *)g); return cudaSuccess; }
RT cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *list, size_t *n) { *n = g ? *(long *)g : 0; return cudaSuccess; }

/* ---- functions, errors ---- */
RT cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90, a->maxDynamicSharedSizeBytes = 48 << 10;
    return cudaSuccess;
}
RT cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared, unsigned flags) {
    *n = threads > 0 && threads <= 2048 ? 2048 / threads : 1;
    return cudaSuccess;
}
RT cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, shared, 0);
}
API const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    default: return "error of the fake GPU";
    }
}
API const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfTheFakeGPU"; }

/* ---- driver: what Triton and torch look up in libcuda.so.1, which is a link to this library ---- */
static CUresult nothing(void) { return CUDA_SUCCESS; }
static void *entry(const char *symbol) { void *found = dlsym(RTLD_DEFAULT, symbol); return found ? found : (void *)nothing; }
RT cudaGetDriverEntryPointByVersion(const char *symbol, void **f, unsigned version, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *status) {
    *f = entry(symbol);
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
DRV cuGetProcAddress_v2(const char *symbol, void **f, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    *f = entry(symbol);
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
static long context;
DRV cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
DRV cuDeviceGetCount(int *n) { *n = devices(); return CUDA_SUCCESS; }
DRV cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
DRV cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) { return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)a, d); }
DRV cuDeviceGetName(char *name, int n, CUdevice d) { snprintf(name, n, "Fake H100"); return CUDA_SUCCESS; }
DRV cuDeviceGetUuid(CUuuid *uuid, CUdevice d) { memset(uuid, 0x10 + physical(d, NULL), sizeof *uuid); return CUDA_SUCCESS; }
DRV cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&context; return CUDA_SUCCESS; }
DRV cuCtxCreate_v2(CUcontext *c, unsigned flags, CUdevice d) { return cuCtxGetCurrent(c); }
DRV cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return cuCtxGetCurrent(c); }
DRV cuStreamGetCtx(CUstream s, CUcontext *c) { return cuCtxGetCurrent(c); }
DRV cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0, *active = 1; return CUDA_SUCCESS; }
DRV cuCtxGetDevice(CUdevice *d) { *d = current; return CUDA_SUCCESS; }
DRV cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
DRV cuGetErrorString(CUresult error, const char **text) { *text = "error of the fake GPU"; return CUDA_SUCCESS; }
DRV cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
DRV cuModuleLoadData(CUmodule *m, const void *image) { *m = malloc(1); return CUDA_SUCCESS; }
DRV cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) { return cuModuleLoadData(m, image); }
DRV cuModuleLoad(CUmodule *m, const char *file) { return cuModuleLoadData(m, file); }
DRV cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)strdup(name); return CUDA_SUCCESS; }
DRV cuFuncGetName(const char **name, CUfunction f) { *name = (const char *)f; return CUDA_SUCCESS; }
DRV cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
    *value = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
DRV cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream s, void **p, void **e) { return (CUresult)work((const char *)f); }
DRV cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, CUstream s, void **p) { return (CUresult)work((const char *)f); }
DRV cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { return (CUresult)work((const char *)f); }
DRV cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
DRV cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) { *n = 2; return CUDA_SUCCESS; }
DRV cuPointerGetAttribute(void *into, CUpointer_attribute a, CUdeviceptr p) {
    if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)into = p;
    else *(int *)into = CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
}
DRV cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **into, CUdeviceptr p) {
    for (unsigned i = 0; i < n; i++) cuPointerGetAttribute(into[i], a[i], p);
    return CUDA_SUCCESS;
}

/* ---- calls that succeed without doing anything, by symbol: their prototypes do not matter ---- */
#define NOTHING(symbol) API int nothing_##symbol(void) __asm__(#symbol); int nothing_##symbol(void) { return 0; }
NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError) NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery)
NOTHING(cudaStreamWaitEvent) NOTHING(cudaStreamUpdateCaptureDependencies) NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cudaEventQuery) NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy) NOTHING(cudaFuncSetAttribute)
NOTHING(cudaMemcpy2DAsync) NOTHING(cudaMemcpyToSymbol) NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
NOTHING(cudaMallocAsync) NOTHING(cudaFreeAsync) NOTHING(cudaDeviceEnablePeerAccess) NOTHING(cudaDeviceGetDefaultMemPool)
NOTHING(cudaDeviceGetGraphMemAttribute) NOTHING(cudaDeviceSetGraphMemAttribute) NOTHING(cudaGraphAddNode)
NOTHING(cudaGraphConditionalHandleCreate) NOTHING(cudaGraphNodeGetDependencies) NOTHING(cudaGraphRetainUserObject)
NOTHING(cudaIpcCloseMemHandle) NOTHING(cudaIpcGetEventHandle) NOTHING(cudaIpcGetMemHandle) NOTHING(cudaIpcOpenEventHandle)
NOTHING(cudaIpcOpenMemHandle) NOTHING(cudaKernelSetAttributeForDevice) NOTHING(cudaLibraryGetKernel)
NOTHING(cudaLibraryLoadData) NOTHING(cudaLibraryUnload) NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaMemPoolSetAccess)
NOTHING(cudaMemPoolSetAttribute) NOTHING(cudaMemPoolTrimTo) NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
NOTHING(cudaUserObjectCreate) NOTHING(cudaUserObjectRelease) NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
