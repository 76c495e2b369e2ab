// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 that runs nothing: all it does is to write down what is launched.
//
// Parameters are what the binary says that they are, as for a driver: bytes that a launcher leaves
// out, or has in another order, are seen. Every thread has a current device, as with CUDA.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int devices = 4;

struct Module {
  const char* image;
  int device;
  bool loaded;
};

struct Function {
  std::string name;
  const Module* module;
  std::map<int, int> sizes;  // of the parameters, by position
  unsigned shared;
};

std::mutex mutex;
std::string record, taken;
int until_failure = -1;
thread_local int current;

const Elf64_Shdr* section_of(const char* image, const std::string& name) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i)
    if (name == names + sections[i].sh_name) return sections + i;
  return nullptr;
}

// Entries have a kind, an attribute and two bytes more, which for kind 4 are the size of what
// follows. That of a parameter (0x17): index, position (2 bytes), offset (2 bytes), and in the
// upper 14 bits of the last word its size.
bool read_parameters(const char* image, Function* function) {
  const Elf64_Shdr* section = section_of(image, ".nv.info." + function->name);
  if (!section) return false;
  const char *at = image + section->sh_offset, *end = at + section->sh_size;
  while (at + 4 <= end) {
    uint16_t size, position;
    uint32_t word;
    std::memcpy(&size, at + 2, 2);
    if (at[0] == 4 && at[1] == 0x17) {
      std::memcpy(&position, at + 8, 2);
      std::memcpy(&word, at + 12, 4);
      function->sizes[position] = word >> 18;
    }
    at += at[0] == 4 ? 4 + size : 4;
  }
  return true;
}

template <typename... Values>
void add(const char* format, Values... values) {
  char text[512];
  snprintf(text, sizeof text, format, values...);
  record += text;
}

}  // namespace

extern "C" {

// What the tests ask.

int current_device() { return current; }
void set_current_device(int device) { current = device; }
void fail_after(int launches) { until_failure = launches; }

// The launches since the last call, a line of JSON each.
const char* recorded() {
  std::lock_guard<std::mutex> lock(mutex);
  taken.swap(record);
  record.clear();
  return taken.c_str();
}

// What Triton asks of a driver.

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = devices, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device + 1));
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current); }

CUresult cuCtxSetCurrent(CUcontext context) {
  current = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_LAUNCH_FAILED ? "as asked for" : "what no driver would take";
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  static const std::map<int, int> values = {
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
      {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 227 * 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 228 * 1024},
  };
  const auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  // The image is read once, in cuModuleGetFunction, which follows at once.
  auto* made = new Module{static_cast<const char*>(image), current, true};
  return *module = reinterpret_cast<CUmodule>(made), CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  reinterpret_cast<Module*>(module)->loaded = false;  // kept, for a launch that comes too late
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto* from = reinterpret_cast<Module*>(module);
  auto* made = new Function{name, from, {}, 0};
  *function = reinterpret_cast<CUfunction>(made);
  return read_parameters(from->image, made) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->shared = static_cast<unsigned>(value);
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters,
                          void** extra) {
  const auto* function = reinterpret_cast<const Function*>(handle);
  std::lock_guard<std::mutex> lock(mutex);
  if (until_failure >= 0 && until_failure-- == 0) return CUDA_ERROR_LAUNCH_FAILED;
  const bool fits =
      config->sharedMemBytes <= 48 * 1024 || config->sharedMemBytes <= function->shared;
  const bool here = function->module->device == current && function->module->loaded;
  if (!fits || !here || extra) return CUDA_ERROR_INVALID_VALUE;
  add(R"({"kernel": "%s", "function": %lu, "device": %d, "stream": %lu, )", function->name.c_str(),
      reinterpret_cast<unsigned long>(function), current,
      reinterpret_cast<unsigned long>(config->hStream));
  add(R"("grid": [%u, %u, %u], "block": [%u, %u, %u], "shared": %u, )", config->gridDimX,
      config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY, config->blockDimZ,
      config->sharedMemBytes);
  record += R"("attributes": [)";
  for (unsigned i = 0; i < config->numAttrs; ++i)
    add("%s[%d, %d]", i ? ", " : "", static_cast<int>(config->attrs[i].id),
        config->attrs[i].value.cooperative);
  record += R"(], "parameters": [)";
  for (const auto& [position, size] : function->sizes) {
    record += position ? ", \"" : "\"";
    for (int i = 0; i < size; ++i)
      add("%02x", static_cast<unsigned char*>(parameters[position])[i]);
    record += "\"";
  }
  record += "]}\n";
  return CUDA_SUCCESS;
}

}  // extern "C"
