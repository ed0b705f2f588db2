/* A GPU without kernels: what torch's CUDA build calls in the CUDA runtime and in cuBLAS, with all arithmetic left out.

   Preloaded before libcudart and libcublas, it lets torch believe in an H100. Real stays all that is torch's own: the
   dispatcher, device and dtype checks, autocast's lists, the choice of attention kernels, autograd's threads, the caching
   allocator, and where the host waits for the device. Not real: numbers, speed, cuDNN, NCCL.

       memory    cudaMalloc reserves addresses and counts bytes; nothing is ever written there, so tens of GiB are free
       limit     gpu_limit(bytes) sets how much there is, at any time; beyond it cudaMalloc fails as a full card does
       launches  a kernel's launch succeeds and does nothing
       answers   what is copied back is a float in [0.5, 1), a flag true, eight bytes the integer 0 */
#define _GNU_SOURCE
#include <driver_types.h> /* the API's types without its functions */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OK cudaSuccess
#define NOTHING(name) int name(void) { return 0; }                /* succeeds, whatever its arguments */
#define HANDLE(name) int name(void **out) { static uintptr_t next = 4096; *out = (void *)(next += 64); return 0; }
#define ZERO(name, type) int name(void *of, type *out) { *out = 0; return 0; }

/* memory */
enum { MOST = 1 << 17, PAGE = 2 << 20 };
static struct { char *start; size_t size; } blocks[MOST];
static int count;
static size_t used, total = (size_t)79 << 30;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;

void gpu_limit(size_t bytes) { total = bytes; }
size_t gpu_used(void) { return used; }

cudaError_t cudaMalloc(void **out, size_t size) {
    size = (size + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    void *found = MAP_FAILED;
    if (used + size <= total && count < MOST)
        found = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found != MAP_FAILED) {
        blocks[count].start = found, blocks[count++].size = size;
        used += size;
    }
    pthread_mutex_unlock(&lock);
    *out = found == MAP_FAILED ? 0 : found;
    return found == MAP_FAILED ? cudaErrorMemoryAllocation : OK;
}

static int place(const void *p) { /* the number of the block that p lies in, or -1 */
    for (int i = 0; i < count; i++)
        if ((char *)p >= blocks[i].start && (char *)p < blocks[i].start + blocks[i].size) return i;
    return -1;
}

static int on_device(const void *p) {
    pthread_mutex_lock(&lock);
    int i = place(p);
    pthread_mutex_unlock(&lock);
    return i >= 0;
}

cudaError_t cudaFree(void *p) {
    pthread_mutex_lock(&lock);
    int i = p ? place(p) : -1;
    if (i >= 0) {
        munmap(blocks[i].start, blocks[i].size);
        used -= blocks[i].size;
        blocks[i] = blocks[--count];
    }
    pthread_mutex_unlock(&lock);
    return OK;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *all) { *all = total, *available = total - used; return OK; }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { return posix_memalign(p, 4096, size + 1) ? 2 : OK; }
cudaError_t cudaFreeHost(void *p) { free(p); return OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *p) {
    memset(of, 0, sizeof *of);
    of->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    of->device = on_device(p) ? 0 : -2;
    of->devicePointer = of->hostPointer = (void *)p;
    return OK;
}

/* copies */
static void answer(void *to, size_t size) {
    static uint32_t seed = 1;
    if (size == 1) *(char *)to = 1;
    else if (size == 8) *(int64_t *)to = 0;
    else
        for (size_t i = 0; i < size / 4; i++) {
            seed = seed * 1664525u + 1013904223u;
            ((uint32_t *)to)[i] = 0x3F000000u | seed >> 9; /* exponent of 0.5, a random mantissa */
        }
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (on_device(to)) return OK;
    if (on_device(from)) answer(to, size);
    else memcpy(to, from, size);
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, size, kind, 0);
}
NOTHING(cudaMemset) NOTHING(cudaMemsetAsync) NOTHING(cudaMemcpyPeerAsync)
NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)

/* the device */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "no kernels");
    of->totalGlobalMem = total;
    of->major = 9;
    of->multiProcessorCount = 132;
    of->warpSize = 32;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxThreadsPerMultiProcessor = 2048;
    of->sharedMemPerBlock = 49152;
    of->sharedMemPerBlockOptin = of->sharedMemPerMultiprocessor = 232448;
    of->regsPerBlock = of->regsPerMultiprocessor = of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->maxGridSize[0] = 2147483647;
    return OK;
}
cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr which, int device) {
    switch ((int)which) {
    case cudaDevAttrComputeCapabilityMajor: *out = 9; break;
    case cudaDevAttrMultiProcessorCount: *out = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *out = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *out = 2048; break;
    case cudaDevAttrWarpSize: *out = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = 232448; break;
    case cudaDevAttrMaxGridDimX: *out = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *out = 65535; break;
    default: *out = 0;
    }
    return OK;
}
cudaError_t cudaGetDeviceCount(int *out) { char *n = getenv("GPUS"); *out = n ? atoi(n) : 1; return OK; }
cudaError_t cudaGetDevice(int *out) { *out = current; return OK; }
cudaError_t cudaSetDevice(int device) { current = device; return OK; }
cudaError_t cudaDriverGetVersion(int *out) { *out = 13000; return OK; }
cudaError_t cudaRuntimeGetVersion(int *out) { *out = 13000; return OK; }
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) { snprintf(out, size, "0000:%02x:00.0", device); return OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) { *out = 0; return OK; }
const char *cudaGetErrorString(cudaError_t e) { return e ? "out of memory" : "no error"; }
const char *cudaGetErrorName(cudaError_t e) { return e ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }
NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError) NOTHING(cudaDeviceSynchronize) NOTHING(cudaDeviceEnablePeerAccess)

/* streams, events, graphs: everything is done as soon as it is asked for */
HANDLE(cudaStreamCreateWithFlags) HANDLE(cudaStreamCreateWithPriority) HANDLE(cudaEventCreateWithFlags)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamWaitEvent)
NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery) NOTHING(cudaEventRecord) NOTHING(cudaEventSynchronize)
NOTHING(cudaEventRecordWithFlags) NOTHING(cudaThreadExchangeStreamCaptureMode)
ZERO(cudaStreamGetPriority, int) ZERO(cudaStreamIsCapturing, int)
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
    *status = 0;
    return OK;
}
cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t a, cudaEvent_t b) { *out = 1; return OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *with) { call(with); return OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, void (*call)(cudaStream_t, cudaError_t, void *), void *with, unsigned f) {
    call(s, OK, with);
    return OK;
}

/* kernels: registered, sized, launched, and never run */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *f) {
    memset(of, 0, sizeof *of);
    of->ptxVersion = of->binaryVersion = 90;
    of->maxThreadsPerBlock = 1024;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *f, int b, size_t s, unsigned x) {
    *out = 2;
    return OK;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *shared, void *stream) {
    g->x = g->y = g->z = b->x = b->y = b->z = 1;
    *shared = 0, *(void **)stream = 0;
    return OK;
}
static void *binary[4];
void **__cudaRegisterFatBinary(void *b) { return binary; }
char __cudaInitModule(void **b) { return 1; }
cudaError_t __cudaGetKernel(void **out, const void *f) { *out = binary; return OK; }
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary) NOTHING(__cudaRegisterFunction)
NOTHING(__cudaRegisterVar) NOTHING(__cudaLaunchKernel) NOTHING(cudaLaunchKernel) NOTHING(cudaLaunchKernelExC)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaKernelSetAttributeForDevice)
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) { static char here[1 << 16]; *out = here; return OK; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *out = (void *)cudaDeviceSynchronize; /* what torch asks for is called with whatever arguments, and succeeds */
    if (result) *result = 0;
    return OK;
}

/* cuBLAS */
HANDLE(cublasCreate_v2) HANDLE(cublasLtMatmulDescCreate) HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetSmCountTarget) NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute) NOTHING(cublasLtMatmul)
ZERO(cublasGetMathMode, int) ZERO(cublasGetPointerMode_v2, int)
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *c, void *d, void *p, int n, void *r, int *got) {
    memset(r, 0, 96);
    *got = 1;
    return 0;
}
NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasSgemm_v2) NOTHING(cublasSgemmStridedBatched)
NOTHING(cublasSgemv_v2) NOTHING(cublasDotEx) NOTHING(cublasSdot_v2) NOTHING(cublasSgemmEx)
NOTHING(cublasDgemm_v2) NOTHING(cublasDgemmStridedBatched) NOTHING(cublasDgemv_v2)

/* the driver's library, libcuda.so.1, which this file is too */
NOTHING(cuInit) NOTHING(cuModuleLoadData) NOTHING(cuModuleLoadDataEx) NOTHING(cuModuleGetFunction) NOTHING(cuLaunchKernel)
NOTHING(cuLaunchCooperativeKernel) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncGetAttribute) NOTHING(cuCtxSetCurrent)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuStreamWriteValue32)
NOTHING(cuLinkCreate) NOTHING(cuLinkAddData) NOTHING(cuLinkComplete) NOTHING(cuPointerGetAttribute)
NOTHING(cuGetErrorString) NOTHING(cuDevicePrimaryCtxGetState)
int cuCtxGetCurrent(void **out) { *out = binary; return 0; }
int cuCtxGetDevice(int *out) { *out = 0; return 0; }
int cuDriverGetVersion(int *out) { *out = 13000; return 0; }
int cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long long flags, void *r) { *out = (void *)cuInit; return 0; }
